"""One way to open the database that holds receipts, keys and usage: SQLite in a file, or any server by its SQLAlchemy URL.

Tables are made where they are missing, by whichever process comes first. SQLite runs with a write-ahead log, so that readers
never block, and keeps its default of syncing the log at every commit: a committed row survives a power cut too, and the meter
writes many rows a commit. A table of an earlier version gets the columns that it lacks, where they may be null: neither its rows
nor programs of that version mind. Not done: any other migration; a table that lacks more than that is refused.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as sql
from sqlalchemy.exc import ArgumentError, DatabaseError, NoSuchModuleError, OperationalError, ProgrammingError
from sqlalchemy.schema import CreateIndex, CreateTable

SCHEMA_LOCK = 0x6A65766F6E73  # a number of our own among PostgreSQL's advisory locks


def open_database(url_or_path: str | Path, tables: Sequence[sql.Table], *, busy_timeout: float = 30.0) -> sql.Engine:
    """An engine on the database, with `tables` in it. `busy_timeout`: seconds that SQLite waits for another process's write.

    Raises ValueError for a file that is no SQLite database, a server that cannot be reached, or a table of another shape.
    """
    url = _url(url_or_path)
    name = url.render_as_string(hide_password=True) if "://" in str(url_or_path) else str(url_or_path)
    backend = url.get_backend_name()
    options = {"timeout": busy_timeout} if backend == "sqlite" else {"connect_timeout": 5.0} if backend == "postgresql" else {}
    try:
        # a server may have dropped a connection that lay idle: ask before it is used
        engine = sql.create_engine(url, connect_args=options, pool_pre_ping=backend != "sqlite")
    except (ModuleNotFoundError, NoSuchModuleError) as error:
        raise ValueError(f"{name}: no driver for {url.drivername} ({error}); for PostgreSQL: pip install 'jevons[postgres]'") from error
    try:
        with engine.begin() as connection:
            if backend == "sqlite":
                _write_ahead(connection, busy_timeout)
                present = set()  # IF NOT EXISTS is free there
            else:  # elsewhere it may lock a table that others write to, or fail when two processes create at once
                if backend == "postgresql":
                    connection.execute(sql.select(sql.func.pg_advisory_xact_lock(SCHEMA_LOCK)))
                present = set(sql.inspect(connection).get_table_names())
            new = [table for table in tables if table.name not in present]
            for table in new:
                connection.execute(CreateTable(table, if_not_exists=True))
            for table in tables:
                _complete(connection, table, name)
            for index in (index for table in new for index in table.indexes):
                connection.execute(CreateIndex(index, if_not_exists=True))
    except (DatabaseError, ValueError) as error:
        engine.dispose()
        if isinstance(error, OperationalError) and backend != "sqlite":
            raise ValueError(f"{name}: cannot open the ledger ({error.orig})") from error
        if not any(message in str(error) for message in ("file is not a database", "unable to open database file")):
            raise
        raise ValueError(f"{name}: not a ledger ({getattr(error, 'orig', error)}); name another file") from error
    return engine


def _write_ahead(connection: sql.Connection, busy_timeout: float) -> None:
    """Log ahead of writing; commits are synced: SQLite's own default, synchronous=FULL. SQLite waits for other processes' locks by
    itself, but not when it changes the kind of its journal: of processes that open a new ledger at once all but one would fail."""
    end = time.monotonic() + busy_timeout
    while True:
        try:
            connection.exec_driver_sql("PRAGMA journal_mode=WAL")
            return
        except OperationalError as error:
            code = getattr(error.orig, "sqlite_errorcode", 0)
            if code & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > end:
                raise
        time.sleep(0.005)


def missing_columns(connection: sql.Connection, table: sql.Table) -> list[sql.Column[Any]]:
    present = {column["name"] for column in sql.inspect(connection).get_columns(table.name)}
    return [column for column in table.columns if column.name not in present]


def _complete(connection: sql.Connection, table: sql.Table, name: str) -> None:
    """Add the columns that came after the table was made. Raises ValueError where one of them has no value for the rows there are."""
    if not (missing := missing_columns(connection, table)):
        return
    if required := sorted(column.name for column in missing if not column.nullable):
        raise ValueError(f"{name}: not a ledger (its table `{table.name}` lacks {', '.join(required)}); name another")
    if connection.dialect.name == "sqlite":  # elsewhere the schema's lock is held by now; here DDL opens no transaction by itself
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        missing = missing_columns(connection, table)  # another process may have added them before we had the lock
    for statement in (add_column(table, column, connection.dialect) for column in missing):
        try:
            connection.exec_driver_sql(statement)
        except ProgrammingError as error:  # whoever may write into a table need not own it
            raise ValueError(f"{name}: an earlier version's ledger ({error.orig}); as its owner, say: {statement}") from error


def add_column(table: sql.Table, column: sql.Column[Any], dialect: sql.Dialect) -> str:
    """The statement that adds a nullable column to a table."""
    names = dialect.identifier_preparer
    return f"ALTER TABLE {names.format_table(table)} ADD COLUMN {names.format_column(column)} {column.type.compile(dialect)}"


def _url(url_or_path: str | Path) -> sql.URL:
    """A URL as given, or a SQLite file's; its folder is made."""
    if "://" not in str(url_or_path):
        Path(url_or_path).parent.mkdir(parents=True, exist_ok=True)
        return sql.URL.create("sqlite", database=str(url_or_path))
    try:
        url = sql.make_url(str(url_or_path))
    except (ArgumentError, ValueError):  # not shown: they quote the URL, which may hold a password
        raise ValueError("ledger: not a database's URL; one looks like postgresql://user@host/database") from None
    return url.set(drivername="postgresql+psycopg") if url.drivername in ("postgresql", "postgres") else url
