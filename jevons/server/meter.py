"""Every request leaves a row, whatever became of it; a request is answered in full only when its row is on disk.

One thread writes. It commits whatever waits in one transaction, so 64 requests that end together cost one sync of the disk,
not 64. While the database is down, rows wait in memory, are tried again with growing pauses, and new requests are refused
once too many wait. A row that the database refuses for what is in it (not for a failure of the database) is logged in full
and left out, or it would hold up all others for ever. Not done: a file for rows that are left when a server with a broken
database stops; those are logged as JSON.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from jevons.cost.price import Prices
from jevons.cost.usage import UsageRow, UsageStore
from jevons.server.error import APIError
from jevons.server.key import Keys

LOG = logging.getLogger(__name__)
BATCH = 1000  # rows in a transaction at most
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0  # seconds between attempts
DAY = 86400


class Meter:
    """Writes usage rows in a thread of its own, which runs from the start until `close`."""

    def __init__(
        self,
        store: UsageStore,
        prices: Prices,
        keys: Keys | None = None,
        *,
        capacity: int = 10_000,
        patience: float = 10.0,
        session: str | None = None,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """`capacity`: how many rows may wait before new requests are refused; `patience`: seconds that a request waits for its row;
        `session`: the run_id of the server's receipt, which its rows carry."""
        self.store, self.prices, self.keys = store, prices, keys
        self.capacity, self.patience, self.session, self._wall = capacity, patience, session, wall
        self.error: str | None = None  # what the database said, while it fails
        self._day = wall() // DAY
        self._today = store.money(self._day * DAY)
        self._waiting: deque[tuple[UsageRow, Future[None]]] = deque()
        self._changed = threading.Condition()
        self._deadline: float | None = None  # of time.monotonic; set when closing
        self._thread = threading.Thread(target=self._live, name="meter", daemon=True)
        self._thread.start()

    @property
    def pending(self) -> int:
        """Rows that are not committed yet."""
        return len(self._waiting)

    def check(self) -> None:
        """Raises APIError 503 where a new request's row might not find room."""
        if self.pending >= self.capacity or not self._thread.is_alive():
            raise APIError(503, "usage cannot be recorded at the moment", code="meter_unavailable", retry_after=LONGEST_PAUSE)

    def priced(self, row: UsageRow) -> UsageRow:
        """The row with its session and its money, by the prices of the moment at which it started."""
        if row.money is not None:
            return row
        counts = {"prompt": row.prompt, "cached": row.cached, "completion": row.completion}
        money = self.prices.money(row.model, **counts, device_seconds=row.device_seconds, when=row.started)
        return dataclasses.replace(row, money=money, session=self.session)

    def today(self) -> float:
        """Money of the requests that ended since midnight UTC; at the start, of those that began since."""
        with self._changed:
            self._turn_day()
            return self._today

    async def record(self, row: UsageRow) -> bool:
        """True once the row is committed; False where that takes longer than `patience`: the row stays, and is tried on.

        Raises what the database said of a row that it refuses. A caller that is cancelled leaves its row to be written.
        """
        future = asyncio.wrap_future(self._put(self.priced(row)))
        done, _ = await asyncio.wait({future}, timeout=self.patience)
        if done:
            future.result()
        return bool(done)

    def _put(self, row: UsageRow) -> Future[None]:
        assert row.money is not None
        future: Future[None] = Future()
        future.set_running_or_notify_cancel()  # it cannot be cancelled from here on
        with self._changed:
            if self._deadline is not None:
                raise RuntimeError("the meter is closed")
            self._turn_day()
            self._today += row.money
            if self.keys is not None:
                self.keys.charge(row.key_id, row.money)
            self._waiting.append((row, future))
            self._changed.notify()
        return future

    def _turn_day(self) -> None:
        if (day := self._wall() // DAY) != self._day:
            self._day, self._today = day, 0.0

    async def close(self, timeout: float = 10.0) -> None:
        """Write what waits, for `timeout` seconds at most while the database fails. Rows that are left are logged."""
        with self._changed:
            self._deadline = time.monotonic() + timeout
            self._changed.notify()
        await asyncio.to_thread(self._thread.join, timeout + 1.0)  # an attempt under way may hang in the database's driver
        with self._changed:
            left = [row for row, _ in self._waiting]
        for row in left:
            LOG.error("usage not recorded: %s", _json(row))

    def _live(self) -> None:
        try:
            self._run()
        except BaseException as error:
            self.error = f"the meter has stopped: {error!r}"  # our own mistake, then: no more requests are taken
            raise

    def _run(self) -> None:
        pause = FIRST_PAUSE
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._deadline is not None)
                batch = [self._waiting[i] for i in range(min(BATCH, len(self._waiting)))]
            if not batch:
                return
            try:
                outcomes = self._commit([row for row, _ in batch])
            except (DBAPIError, PoolTimeout) as error:
                text = " ".join(str(getattr(error, "orig", error)).split())
                (LOG.error if self.error is None else LOG.debug)("usage cannot be recorded, %d rows wait: %s", self.pending, text)
                self.error = text
                if not self._pause(pause):
                    return
                pause = min(2 * pause, LONGEST_PAUSE)
                continue
            if self.error is not None:
                LOG.warning("usage is recorded again")
            self.error, pause = None, FIRST_PAUSE
            self._finish(batch, outcomes)

    def _pause(self, seconds: float) -> bool:
        """Wait before the next attempt. Closing cuts it short, a new row does not. False once closing has had its time."""
        with self._changed:
            closing = self._deadline is not None
            left = seconds if self._deadline is None else min(seconds, self._deadline - time.monotonic())
            if left > 0:
                self._changed.wait_for(lambda: closing != (self._deadline is not None), left)
            return left > 0

    def _finish(self, batch: Sequence[tuple[UsageRow, Future[None]]], outcomes: Sequence[Exception | None]) -> None:
        with self._changed:
            for _ in batch:
                self._waiting.popleft()
        for (row, future), outcome in zip(batch, outcomes):
            if self.keys is not None:
                self.keys.settle(row.key_id, row.money or 0.0)
            if outcome is None:
                future.set_result(None)
            else:
                LOG.error("usage refused by the database (%s): %s", outcome, _json(row))
                future.set_exception(outcome)

    def _commit(self, rows: Sequence[UsageRow]) -> list[Exception | None]:
        """What became of each row. Raises DBAPIError where the database failed, so that nothing is known to be written."""
        try:
            self.store.insert(rows)
        except PoolTimeout:
            raise
        except (SQLAlchemyError, ValueError, OverflowError) as error:
            if isinstance(error, DBAPIError) and not isinstance(error, (DataError, IntegrityError)):
                raise
            if len(rows) == 1:
                return [error]
            return [outcome for row in rows for outcome in self._commit([row])]
        return [None] * len(rows)


def _json(row: UsageRow) -> str:
    return json.dumps(dataclasses.asdict(row))
