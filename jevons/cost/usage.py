"""What was served, to whom: a row a request, and the keys that requests carry. In the same database as the ledger.

A usage row is written once and never changed. Its id is made with it, so that a batch whose commit broke off can be sent
again without counting twice. What a key spent stands in the key's own row and is added to in the transaction that writes the
usage: a budget is checked without summing, holds over restarts and for several servers, and survives the deletion of old rows.
Secrets are never stored, only their digests (server/key.py makes them). Not done: deletion of old rows, currencies.
"""

from __future__ import annotations

import dataclasses
import uuid
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import sqlalchemy as sql
from sqlalchemy.exc import IntegrityError

from jevons.cost.database import open_database
from jevons.cost.price import Prices

METADATA = sql.MetaData()
KEYS = sql.Table(
    "keys",
    METADATA,
    sql.Column("id", sql.String(32), primary_key=True),
    sql.Column("name", sql.String(100), nullable=False),
    sql.Column("prefix", sql.String(32), nullable=False),  # the beginning of the secret, to recognise it by
    sql.Column("digest", sql.String(64), nullable=False),
    sql.Column("tenant", sql.String(100), nullable=False),
    sql.Column("models", sql.JSON(none_as_null=True)),
    sql.Column("budget", sql.Double),
    sql.Column("spent", sql.Double, nullable=False),
    sql.Column("rate", sql.Double),
    sql.Column("concurrency", sql.Integer),
    sql.Column("expires", sql.Double),
    sql.Column("created", sql.Double, nullable=False),
    sql.Column("revoked", sql.Double),
)
# of two keys with one name at most one is in force
sql.Index("keys_name", KEYS.c.name, unique=True, sqlite_where=KEYS.c.revoked.is_(None), postgresql_where=KEYS.c.revoked.is_(None))
USAGE = sql.Table(
    "usage",
    METADATA,
    sql.Column("id", sql.String(32), primary_key=True),
    sql.Column("key_id", sql.String(32), nullable=False, index=True),
    sql.Column("key_name", sql.String(100), nullable=False),
    sql.Column("model", sql.Text, nullable=False),
    sql.Column("endpoint", sql.Text, nullable=False),
    sql.Column("request_id", sql.Text, nullable=False),
    sql.Column("prompt", sql.BigInteger, nullable=False),
    sql.Column("cached", sql.BigInteger, nullable=False),
    sql.Column("completion", sql.BigInteger, nullable=False),
    sql.Column("reasoning", sql.BigInteger, nullable=False),
    sql.Column("ttft", sql.Double),
    sql.Column("duration", sql.Double, nullable=False),
    sql.Column("device_seconds", sql.Double, nullable=False),
    sql.Column("money", sql.Double, nullable=False),
    sql.Column("status", sql.Text, nullable=False),
    sql.Column("started", sql.Double, nullable=False, index=True),
    sql.Column("minute", sql.BigInteger, nullable=False),  # of `started`: databases round it each in their own way
    sql.Column("session", sql.String(128)),  # the run_id of the server's receipt; null in rows of earlier versions
)
COUNTS = ("prompt", "cached", "completion", "reasoning")
Group = Literal["key", "model", "day", "session"]
GROUPS: dict[Group, sql.ColumnElement[Any]] = {
    "key": USAGE.c.key_id, "model": USAGE.c.model, "day": USAGE.c.minute // 1440, "session": sql.func.coalesce(USAGE.c.session, ""),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class UsageRow:
    """One request. `cached` is a part of `prompt`, `reasoning` a part of `completion`; times are in seconds."""

    key_id: str  # "" for a request without a key
    key_name: str
    model: str
    endpoint: str
    request_id: str
    prompt: int = 0
    cached: int = 0
    completion: int = 0
    reasoning: int = 0
    ttft: float | None = None  # None where no token came
    duration: float = 0.0
    device_seconds: float = 0.0
    money: float | None = None  # None until it is priced
    status: str = "stop"  # the finish reason, or "error"
    started: float = 0.0  # since the epoch
    session: str | None = None  # the run_id of the receipt of the server that answered
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self) -> None:
        assert 0 <= self.cached <= self.prompt and 0 <= self.reasoning <= self.completion, self


@dataclass(frozen=True, kw_only=True)
class KeyRow:
    """A key and its limits; None is no limit."""

    id: str
    name: str
    prefix: str
    digest: str = field(repr=False)
    tenant: str
    models: tuple[str, ...] | None = None
    budget: float | None = None
    spent: float = 0.0
    rate: float | None = None  # requests a second
    concurrency: int | None = None
    expires: float | None = None
    created: float = 0.0
    revoked: float | None = None

    def state(self, now: float) -> Literal["active", "revoked", "expired"]:
        if self.revoked is not None:
            return "revoked"
        return "expired" if self.expires is not None and self.expires <= now else "active"


@dataclass(frozen=True, kw_only=True)
class UsageSums:
    """Sums over the requests of a key, a model, a UTC day or a server's session; `ttft` is the median."""

    group: str  # the key's id, the model, the day as 2026-11-25, or the session ("" where none is known)
    label: str  # the key's name, or the same
    requests: int
    prompt: int
    cached: int
    completion: int
    reasoning: int
    device_seconds: float
    money: float
    ttft: float | None


@dataclass(frozen=True)
class Traffic:
    """Tokens that a group asked for in one minute, which began at `when` (seconds since the epoch)."""

    group: str
    when: float
    prompt: int
    cached: int
    completion: int


def cost_at(traffic: Iterable[Traffic], prices: Prices, model: str) -> dict[str, float]:
    """What each group's tokens cost at a model's prices, minute by minute. Raises ValueError where the table has no such price."""
    costs: defaultdict[str, float] = defaultdict(float)
    for part in traffic:
        costs[part.group] += prices.cost(model, prompt=part.prompt, cached=part.cached, completion=part.completion, when=part.when)
    return dict(costs)


class UsageStore:
    """Keys and usage at a SQLAlchemy URL or in a SQLite file. Every method is one transaction; all may be called from any thread."""

    def __init__(self, url_or_path: str | Path, *, busy_timeout: float = 30.0) -> None:
        self.engine = open_database(url_or_path, [KEYS, USAGE], busy_timeout=busy_timeout)

    def insert(self, rows: Sequence[UsageRow]) -> None:
        """Write rows and add to what their keys spent. Rows that are there already are left alone."""
        values = [dataclasses.asdict(row) | {"minute": int(row.started // 60)} for row in rows]
        try:
            self._insert(values)
        except IntegrityError:
            with self.engine.connect() as connection:
                known = set(connection.scalars(sql.select(USAGE.c.id).where(USAGE.c.id.in_([row.id for row in rows]))))
            if not known:
                raise
            self._insert([v for v in values if v["id"] not in known])

    def _insert(self, values: list[dict[str, Any]]) -> None:
        if not values:
            return
        spent: defaultdict[str, float] = defaultdict(float)
        for value in values:
            spent[value["key_id"]] += value["money"]
        spent.pop("", None)
        with self.engine.begin() as connection:
            connection.execute(USAGE.insert(), values)
            for key_id, money in sorted(spent.items()):  # in one order everywhere, or two servers could wait for each other
                connection.execute(KEYS.update().where(KEYS.c.id == key_id).values(spent=KEYS.c.spent + money))

    def sums(self, by: Group, since: float | None = None) -> list[UsageSums]:
        """Sums in the order of their groups, over requests that started at `since` or later."""
        group = GROUPS[by]
        chosen = sql.select(USAGE, group.label("grp")).where(_since(since)).subquery()
        sums = [sql.func.sum(chosen.c[name]).label(name) for name in (*COUNTS, "device_seconds", "money")]
        query = sql.select(chosen.c.grp, sql.func.max(chosen.c.key_name).label("name"), sql.func.count().label("requests"), *sums)
        ranked = sql.select(
            chosen.c.grp,
            chosen.c.ttft,
            sql.func.row_number().over(order_by=chosen.c.ttft, partition_by=chosen.c.grp).label("rank"),
            sql.func.count().over(partition_by=chosen.c.grp).label("count"),
        )
        middle = ranked.where(chosen.c.ttft.is_not(None)).subquery()  # the middle one, or the middle two
        median = sql.select(middle.c.grp, sql.func.avg(middle.c.ttft)).group_by(middle.c.grp)
        median = median.where(middle.c.rank.in_([(middle.c.count + 1) // 2, (middle.c.count + 2) // 2]))
        with self.engine.connect() as connection:
            medians = {row[0]: row[1] for row in connection.execute(median)}
            rows = connection.execute(query.group_by(chosen.c.grp).order_by(chosen.c.grp)).mappings().all()
        return [_sums(by, row, medians.get(row["grp"])) for row in rows]

    def traffic(self, by: Group, since: float | None = None) -> list[Traffic]:
        """The tokens of each group, minute by minute: what prices that change with the time of day are applied to."""
        group = GROUPS[by].label("grp")
        query = sql.select(group, USAGE.c.minute, *(sql.func.sum(USAGE.c[name]).label(name) for name in COUNTS[:3]))
        with self.engine.connect() as connection:
            rows = connection.execute(query.where(_since(since)).group_by(group, USAGE.c.minute)).mappings()
            return [Traffic(str(row["grp"]), row["minute"] * 60.0, *(int(row[name]) for name in COUNTS[:3])) for row in rows]

    def cost_at(self, prices: Prices, model: str, since: float | None = None, by: Group = "key") -> dict[str, float]:
        """What the tokens of each group would have cost at `model`'s prices of the minute in which they were asked for."""
        return cost_at(self.traffic(by, since), prices, model)

    def money(self, since: float) -> float:
        """Of all requests that started at `since` or later."""
        with self.engine.connect() as connection:
            return float(connection.scalar(sql.select(sql.func.sum(USAGE.c.money)).where(_since(since))) or 0.0)

    def all_keys(self) -> list[KeyRow]:
        """All keys ever made, the oldest first."""
        with self.engine.connect() as connection:
            rows = connection.execute(sql.select(KEYS).order_by(KEYS.c.created, KEYS.c.id)).mappings().all()
        return [KeyRow(**{**row, "models": None if row["models"] is None else tuple(row["models"])}) for row in rows]

    def add_key(self, key: KeyRow) -> None:
        """Raises ValueError where a key of this name is in force."""
        try:
            with self.engine.begin() as connection:
                connection.execute(KEYS.insert().values(dataclasses.asdict(key)))
        except IntegrityError as error:
            raise ValueError(f"name: there is a key named {key.name!r} already; rotate or revoke it, or choose another name") from error

    def change_key(self, key_id: str, **values: Any) -> None:
        with self.engine.begin() as connection:
            connection.execute(KEYS.update().where(KEYS.c.id == key_id).values(values))

    def close(self) -> None:
        """Give the connections back."""
        self.engine.dispose()


def _since(since: float | None) -> sql.ColumnElement[bool]:
    return sql.true() if since is None else USAGE.c.started >= since


def _sums(by: str, row: Any, ttft: float | None) -> UsageSums:
    group = str(row["grp"])
    if by == "day":
        group = f"{datetime.fromtimestamp(int(row['grp']) * 86400, UTC):%Y-%m-%d}"
    numbers = {name: int(row[name]) for name in ("requests", *COUNTS)}  # sums of whole numbers are Decimal in PostgreSQL
    seconds, money = float(row["device_seconds"]), float(row["money"])
    return UsageSums(group=group, label=row["name"] if by == "key" else group, **numbers, device_seconds=seconds, money=money, ttft=ttft)
