"""One table of all receipts, shared by every run on a machine or in a team.

A row is a stage of a run, keyed by (run_id, stage), and holds absolute totals: recording the same receipt again, after a
crash or from two processes, changes nothing. SQLite serves one machine without a server; any other SQLAlchemy URL serves a
team (cost/database.py opens both). Not done: increments, or history within a stage, which metrics.jsonl has.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sqlalchemy as sql
from sqlalchemy.exc import IntegrityError

from jevons.cost.database import open_database
from jevons.cost.receipt import Receipt

RECEIPTS = sql.Table(
    "receipts",
    sql.MetaData(),
    sql.Column("run_id", sql.String(128), primary_key=True),
    sql.Column("stage", sql.String(128), primary_key=True),
    sql.Column("run", sql.String(255), nullable=False),
    sql.Column("device", sql.String(255), nullable=False),
    sql.Column("device_count", sql.Integer, nullable=False),
    sql.Column("tokens", sql.BigInteger, nullable=False),
    sql.Column("flops", sql.Double, nullable=False),  # Double, because Float is single precision in some databases
    sql.Column("seconds", sql.Double, nullable=False),
    sql.Column("memory", sql.BigInteger),
    sql.Column("peak_flops", sql.Double),
    sql.Column("price_per_hour", sql.Double, nullable=False),
    sql.Column("started", sql.Double, nullable=False),
    sql.Column("finished", sql.Double),
    sql.Column("planned", sql.JSON(none_as_null=True)),
)


class Ledger:
    """A table of receipts at a SQLAlchemy URL, or in a SQLite file that is made where it does not exist.

    Raises ValueError where that cannot be opened; see `open_database`.
    """

    def __init__(self, url_or_path: str | Path, *, busy_timeout: float = 30.0) -> None:
        self.engine = open_database(url_or_path, [RECEIPTS], busy_timeout=busy_timeout)

    def record(self, receipt: Receipt) -> None:
        """Write a stage's totals, in place of those recorded before."""
        values = receipt.to_dict()
        if not self._update(values):
            try:
                with self.engine.begin() as connection:
                    connection.execute(RECEIPTS.insert().values(values))
            except IntegrityError:  # another process made the row in between
                self._update(values)

    def _update(self, values: dict[str, Any]) -> bool:
        here = (RECEIPTS.c.run_id == values["run_id"]) & (RECEIPTS.c.stage == values["stage"])
        with self.engine.begin() as connection:
            return connection.execute(RECEIPTS.update().where(here).values(values)).rowcount > 0

    def rows(self, run: str | None = None) -> list[Receipt]:
        """Receipts in the order in which their stages started; `run` is a run's id or its name."""
        query = sql.select(RECEIPTS).order_by(RECEIPTS.c.started, RECEIPTS.c.run_id, RECEIPTS.c.stage)
        if run is not None:
            query = query.where((RECEIPTS.c.run_id == run) | (RECEIPTS.c.run == run))
        with self.engine.connect() as connection:
            return [Receipt.from_dict({c.name: row[c.name] for c in RECEIPTS.columns}) for row in connection.execute(query).mappings()]

    def close(self) -> None:
        """Give the connections back; SQLite then folds its write-ahead log into the file."""
        self.engine.dispose()
