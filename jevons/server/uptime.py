"""What a server costs while nobody asks: one row of the ledger, written anew every few seconds for as long as the server is up.

Usage rows know what requests took of the device; what it stood idle for is known only from how long it was there. So a serving
session has a receipt like any stage of a run, stage `serve`, with an id of its own: a server that starts again is another row, and
none is ever added to. SIGKILL costs the seconds since the last writing, five at most. Usage rows carry the session's id, so
tokens and time meet in a report and are not counted here. Not done: seconds in which the machine itself was suspended.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from sqlalchemy.exc import SQLAlchemyError

from jevons.cost.ledger import Ledger
from jevons.cost.receipt import Receipt

LOG = logging.getLogger(__name__)
SECONDS = 5.0  # between two writings


class Uptime:
    """Writes a session's receipt from a thread of its own, until `close`."""

    def __init__(
        self, ledger: Ledger, receipt: Receipt, *, memory: Callable[[], int | None] = lambda: None, seconds: float = SECONDS
    ) -> None:
        """`receipt` has what is known so far, the seconds spent loading included. `memory`: the peak so far, in bytes.

        Raises what the database says of the first writing; later failures are logged and tried again.
        """
        self.ledger, self.receipt = ledger, receipt
        self._memory, self._seconds = memory, seconds
        self._began = time.perf_counter() - receipt.seconds
        self._end = threading.Event()
        self._failed = False
        self._record()
        self._thread = threading.Thread(target=self._live, name="uptime", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """The last writing, with the end."""
        self._end.set()
        self._thread.join()
        self.receipt.finished = time.time()
        self._try()
        self.ledger.close()

    def _live(self) -> None:
        while not self._end.wait(self._seconds):
            self._try()

    def _try(self) -> None:
        try:
            self._record()
        except SQLAlchemyError as error:
            text = " ".join(str(getattr(error, "orig", error)).split())
            (LOG.debug if self._failed else LOG.error)("uptime cannot be recorded: %s", text)
            self._failed = True
        else:
            self._failed = False

    def _record(self) -> None:
        self.receipt.seconds = time.perf_counter() - self._began
        self.receipt.memory = self._memory()
        self.ledger.record(self.receipt)
