"""The engine in a thread of its own, seen from asyncio.

An engine belongs to one thread. This one takes commands (submit, abort, call) from a queue between steps and hands each
step's events to the event loop in one call, so that a step of sixty sequences wakes asyncio once, not sixty times. A step
that fails ends the requests under way with that error, frees their memory, and the thread goes on.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from jevons.engine.engine import Engine, Event
from jevons.engine.sequence import Grammar, SamplingParams
from jevons.server.error import APIError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Failure:
    """In an event's place: the engine could not go on with this request."""

    error: APIError | ValueError  # the latter: the engine's refusal


News = Event | Failure
Mailbox = asyncio.Queue[tuple[int, News]]


class EngineLoop:
    """Owns `engine` from `start` to `stop`. Methods are called from the event loop's thread."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.config, self.max_length = engine.model.config, engine.max_length
        self.snapshot: dict[str, float] = engine.snapshot()
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._boxes: dict[int, tuple[Mailbox, int]] = {}  # engine id -> where its events go, and under which number; the thread's own
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._asyncio: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        self._asyncio = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """Abort what is under way and end the thread."""
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def submit(
        self, box: Mailbox, number: int, prompt: Sequence[int], params: SamplingParams, *, tenant: str, grammar: Grammar | None
    ) -> Future[int]:
        """Queue a request whose events go to `box` under `number`; the future is the engine's id, or the engine's refusal."""
        future: Future[int] = Future()

        def command() -> None:
            try:
                id = self.engine.submit(prompt, params, tenant=tenant, grammar=grammar)
            except ValueError as error:
                future.set_result(-1)
                self._deliver([(box, number, Failure(error))])
            else:
                self._boxes[id] = box, number
                future.set_result(id)

        self._commands.put(command)
        return future

    def abort(self, future: Future[int]) -> None:
        """Drop a submitted request if it is still under way; no more events come."""

        def command() -> None:
            if self._boxes.pop(future.result(), None) is not None:
                self.engine.abort(future.result())

        self._commands.put(command)

    async def call(self, function: Callable[[Engine], Any]) -> Any:
        """Run a function on the engine between two steps; its result."""
        future: Future[Any] = Future()

        def command() -> None:
            try:
                future.set_result(function(self.engine))
            except Exception as error:  # handed to whoever waits
                future.set_exception(error)

        self._commands.put(command)
        return await asyncio.wrap_future(future)

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            idle = not self.engine.has_work
            if idle:
                self.snapshot = self.engine.snapshot()
            try:
                while True:
                    command = self._commands.get(block=idle)
                    if command is None:
                        self._fail(APIError(503, "the server is shutting down", retry_after=5))
                        return
                    command()
                    idle = idle and not self.engine.has_work
            except queue.Empty:
                pass
            try:
                events = self.engine.step()
            except Exception:
                log.exception("the engine's step failed; requests under way end with an error")
                self._fail(APIError(500, "the engine failed on this request; see the server's log", code="engine_error"))
                continue
            self._deliver([(*self._boxes[event.id], event) for event in events if event.id in self._boxes])
            for event in events:
                if event.sample is not None:
                    self._boxes.pop(event.id, None)
            self.snapshot = self.engine.snapshot()
            if events and self._commands.empty():
                time.sleep(0)  # let the event loop have the interpreter before the next step takes it

    def _fail(self, error: APIError) -> None:
        """End every request under way with `error` and free its memory."""
        boxes, self._boxes = self._boxes, {}
        self.engine.abort_all()
        self._deliver([(box, number, Failure(error)) for box, number in boxes.values()])

    def _deliver(self, news: list[tuple[Mailbox, int, News]]) -> None:
        def put() -> None:
            for box, number, item in news:
                box.put_nowait((number, item))

        if news:
            assert self._asyncio is not None
            try:
                self._asyncio.call_soon_threadsafe(put)
            except RuntimeError:  # the event loop is closed: nobody is left to be told
                log.warning("%d events after the event loop had closed", len(news))
