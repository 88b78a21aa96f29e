"""Who may ask for what: keys, and the limits that each carries.

A secret is `sk-jevons-` and 43 random characters. The database has its SHA-256 only. That needs no salt and no slow hash: these
protect passwords that people choose, while 256 random bits cannot be guessed from a digest at any speed. A key is found by its
first characters, which `jevons keys list` shows anyway, and its digest is compared in constant time.

All keys are read at once, at most once a second, so a key that is revoked anywhere stops working here within that. Rates
and concurrency are counted in this process alone; budgets in the database (cost/usage.py) plus what this process has not
written yet. A budget can be overdrawn by requests that are under way when it runs out: their cost is known at their end.
Not done: limits over several servers, limits in tokens a minute, roles.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import hmac
import logging
import secrets
import string
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from sqlalchemy.exc import DBAPIError

from jevons.cost.usage import KeyRow, UsageStore
from jevons.server.error import APIError

LOG = logging.getLogger(__name__)
SCHEME = "sk-jevons-"
ALPHABET = string.ascii_letters + string.digits
RANDOM, SHOWN = 43, 8  # 256 bits, of which 48 may be seen
GRACE = 60.0  # seconds for which keys that were read before are trusted while the database cannot be reached


@dataclass(frozen=True)
class Account:
    """Who asks, as far as the rest of the server is concerned. None is no limit."""

    key_id: str
    name: str
    tenant: str  # prefixes in the cache are shared within a tenant only
    models: tuple[str, ...] | None = None
    budget: float | None = None
    rate: float | None = None
    concurrency: int | None = None
    expires: float | None = None

    @classmethod
    def open(cls) -> Account:
        """The one account of a server without keys."""
        return cls("", "open", "")


@dataclass(frozen=True)
class Balance:
    """Dollars of one key since it was made."""

    budget: float | None
    spent: float

    @property
    def remaining(self) -> float | None:
        return None if self.budget is None else max(0.0, self.budget - self.spent)


class Bucket:
    """Tokens that refill at `rate` a second, up to one second's worth and at least one."""

    def __init__(self, rate: float, now: float) -> None:
        self.rate, self.size = rate, max(1.0, rate)
        self.tokens, self.at = self.size, now

    def take(self, now: float) -> float:
        """Take one. Returns 0, or the seconds until there is one; nothing is taken then."""
        self.tokens = min(self.size, self.tokens + (now - self.at) * self.rate)
        self.at = now
        if self.tokens < 1 - 1e-9:  # one that was told when to come back must not be refused for a rounding
            return (1 - self.tokens) / self.rate
        self.tokens -= 1
        return 0.0


class Lease:
    """One request's place among those that its key may have at once. Give it back with `release`, or use it in a `with`."""

    def __init__(self, release: Callable[[], None]) -> None:
        self._release: Callable[[], None] | None = release

    def release(self) -> None:
        """A second call does nothing."""
        release, self._release = self._release, None
        if release is not None:
            release()

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()


class Keys:
    """The keys in a store. `clock` and `wall` are replaced by tests."""

    def __init__(
        self,
        store: UsageStore,
        *,
        allow_open: bool = False,
        refresh: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """`allow_open`: while the store has never had a key, requests need none."""
        self.store, self.allow_open, self.refresh = store, allow_open, refresh
        self._clock, self._wall = clock, wall
        self._reading, self._lock = threading.Lock(), threading.Lock()
        self._rows: dict[str, KeyRow] = {}  # by id
        self._by_prefix: dict[str, list[KeyRow]] = {}
        self._read_at: float | None = None
        self._tried_at: float | None = None
        # money since this process started, by key: charged, of that committed, and what was committed when the rows were read
        self._charged: defaultdict[str, float] = defaultdict(float)
        self._settled: defaultdict[str, float] = defaultdict(float)
        self._settled_then: dict[str, float] = {}
        self._buckets: dict[str, Bucket] = {}
        self._running: Counter[str] = Counter()

    # --- who asks

    async def authenticate(self, secret: str | None) -> Account:
        """The account of a secret. Raises APIError 401, and 503 where the keys cannot be read."""
        if self._is_stale():
            await asyncio.to_thread(self.read)
        return self.find(secret)

    def find(self, secret: str | None) -> Account:
        """`authenticate` among the keys as they were read last."""
        if self.allow_open and not self._rows:
            return Account.open()
        if not secret:
            raise APIError(401, "this server needs a key: send the header 'Authorization: Bearer sk-jevons-...'", code="invalid_api_key")
        digest = _digest(secret)
        for row in self._by_prefix.get(secret[: len(SCHEME) + SHOWN], ()):
            if hmac.compare_digest(row.digest, digest):
                if (state := row.state(self._wall())) != "active":
                    raise APIError(401, f"the key {row.name!r} is {state}", code="invalid_api_key")
                return Account(row.id, row.name, row.tenant, row.models, row.budget, row.rate, row.concurrency, row.expires)
        raise APIError(401, "no such key", code="invalid_api_key")

    def any(self) -> bool:
        """Whether there is a key that works."""
        self.read(force=True)
        return any(row.state(self._wall()) == "active" for row in self._rows.values())

    def _is_stale(self) -> bool:
        return self._tried_at is None or self._clock() - self._tried_at >= self.refresh

    def read(self, *, force: bool = False) -> None:
        """Read all keys anew, if that is due."""
        with self._reading:
            if not force and not self._is_stale():
                return
            with self._lock:
                settled = dict(self._settled)  # before the rows: what is committed in between counts twice until the next reading
            try:
                rows = self.store.all_keys()
            except DBAPIError as error:
                self._tried_at = now = self._clock()
                LOG.error("keys cannot be read: %s", error.orig)
                if self._read_at is None or now - self._read_at > GRACE:
                    raise APIError(503, "the database with the keys cannot be reached", retry_after=5.0) from error
                return
            by_prefix: defaultdict[str, list[KeyRow]] = defaultdict(list)
            for row in rows:
                by_prefix[row.prefix].append(row)
            with self._lock:
                self._rows, self._by_prefix, self._settled_then = {row.id: row for row in rows}, dict(by_prefix), settled
            self._read_at = self._tried_at = self._clock()

    # --- what they may do

    def admit(self, account: Account, *models: str) -> Lease:
        """Let a request in. `models`: the name that it asked for, and the name that stands for, if that is another.

        Raises APIError: 401 expired, 403 not for this model, 402 the budget is spent, 429 too many at once or too fast.
        """
        if account.expires is not None and account.expires <= self._wall():
            raise APIError(401, f"the key {account.name!r} is expired", code="invalid_api_key")
        if account.models is not None and not set(models) & set(account.models):
            allowed = ", ".join(account.models)
            raise APIError(403, f"the key {account.name!r} is for {allowed}, not for {models[0]}", param="model", code="model_not_allowed")
        balance = self.balance(account)
        if balance.budget is not None and balance.spent >= balance.budget:
            raise APIError(402, f"the key {account.name!r} has spent its budget of ${balance.budget:,.2f}", code="insufficient_balance")
        with self._lock:
            running = self._running[account.key_id]
            if account.concurrency is not None and running >= account.concurrency:
                message = f"the key {account.name!r} may have {account.concurrency} requests at once, and has"
                raise APIError(429, message, code="concurrency_limit_exceeded", retry_after=1.0)
            if account.rate is not None and (wait := self._take(account.key_id, account.rate)):
                message = f"the key {account.name!r} may send {account.rate:g} requests a second; the next in {wait:.3f} s"
                raise APIError(429, message, code="rate_limit_exceeded", retry_after=wait)
            self._running[account.key_id] += 1
        return Lease(lambda: self._leave(account.key_id))

    def _take(self, key_id: str, rate: float) -> float:
        bucket, now = self._buckets.get(key_id), self._clock()
        if bucket is None or bucket.rate != rate:
            bucket = self._buckets[key_id] = Bucket(rate, now)
        return bucket.take(now)

    def _leave(self, key_id: str) -> None:
        with self._lock:
            self._running[key_id] -= 1
            if not self._running[key_id]:
                del self._running[key_id]

    # --- what they spent

    def charge(self, key_id: str, money: float) -> None:
        """A request has cost this; its row is not committed yet."""
        with self._lock:
            self._charged[key_id] += money

    def settle(self, key_id: str, money: float) -> None:
        """Its row is committed now."""
        with self._lock:
            self._settled[key_id] += money

    def balance(self, account: Account) -> Balance:
        """What the account has spent, requests under way left out."""
        key = account.key_id
        with self._lock:
            row = self._rows.get(key)
            recent = self._charged[key] - self._settled_then.get(key, 0.0)
            # the row's budget: it may have been changed since the request was let in
            return Balance(row.budget if row else account.budget, (row.spent if row else 0.0) + recent)

    # --- making and ending keys

    def create(
        self,
        name: str,
        *,
        models: Iterable[str] | None = None,
        budget: float | None = None,
        rate: float | None = None,
        concurrency: int | None = None,
        expires: float | None = None,
        tenant: str | None = None,
    ) -> tuple[KeyRow, str]:
        """A new key and its secret, which cannot be had again. `tenant`: by default a tenant of its own."""
        for field, text in (("name", name), ("tenant", name if tenant is None else tenant)):
            if not text or not text.isprintable() or len(text) > 100:
                raise ValueError(f"{field}: must be 1 to 100 printable characters")
        names = None if models is None else tuple(models)
        self._check({"models": names, "budget": budget, "rate": rate, "concurrency": concurrency, "expires": expires})
        secret, key_id = _secret(), secrets.token_hex(6)
        row = KeyRow(
            id=key_id,
            name=name,
            prefix=secret[: len(SCHEME) + SHOWN],
            digest=_digest(secret),
            tenant=tenant or key_id,
            models=names,
            budget=budget,
            rate=rate,
            concurrency=concurrency,
            expires=expires,
            created=self._wall(),
        )
        self.store.add_key(row)
        return row, secret

    def change(self, name_or_id: str, **limits: Any) -> KeyRow:
        """Other limits for a key (models, budget, rate, concurrency, expires); None lifts one. What it spent stays."""
        row = self._active(name_or_id)
        self._check(limits)
        self.store.change_key(row.id, **limits)
        return dataclasses.replace(row, **limits)

    def _check(self, limits: dict[str, Any]) -> None:
        for field in ("budget", "rate", "concurrency"):
            if (value := limits.get(field)) is not None and not 0 < value < float("inf"):
                raise ValueError(f"{field}: must be more than 0, is {value}")
        if (expires := limits.get("expires")) is not None and expires <= self._wall():
            raise ValueError("expires: lies in the past")
        if (models := limits.get("models")) is not None and not (models and all(models)):
            raise ValueError("models: give one name or more, separated by commas")

    def revoke(self, name_or_id: str) -> KeyRow:
        """End a key for good. Its usage stays."""
        row = self._active(name_or_id)
        self.store.change_key(row.id, revoked=self._wall())
        return row

    def rotate(self, name_or_id: str) -> tuple[KeyRow, str]:
        """A new secret for a key that keeps everything else; the old secret ends."""
        row, secret = self._active(name_or_id), _secret()
        self.store.change_key(row.id, prefix=secret[: len(SCHEME) + SHOWN], digest=_digest(secret))
        return row, secret

    def _active(self, name_or_id: str) -> KeyRow:
        rows = [row for row in self.store.all_keys() if row.revoked is None]
        for row in rows:
            if name_or_id in (row.id, row.name):
                return row
        names = ", ".join(row.name for row in rows) or "none"
        raise ValueError(f"no key {name_or_id!r} is in force; there are: {names}")


def _secret() -> str:
    return SCHEME + "".join(secrets.choice(ALPHABET) for _ in range(RANDOM))


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()
