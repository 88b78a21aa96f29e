"""Server-sent events: framing, signs of life while nothing comes, and what happens when the client goes away.

The work of a request must end with its client. Starlette cancels a streaming body when the socket closes, but leaves the generator to the
garbage collector if it was just sending; and it lets a handler that is still collecting an answer run on. `EventStream` closes its
generators in any case, and `connected` gives up what a handler waits for.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from jevons.server.error import APIError
from jevons.server.job import Update

log = logging.getLogger(__name__)

PAUSE = 5.0  # seconds without news after which a stream shows a sign of life; well under any proxy's idle limit
KEEP_ALIVE = b": keep-alive\n\n"  # a comment: clients skip it
T = TypeVar("T")


def frame(data: Any, event: str | None = None) -> bytes:
    """One event. JSON has no raw line breaks, so one data line holds it."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    # a lone surrogate cannot be sent; none comes out of a tokenizer, but a client may have sent one that is echoed
    return (f"event: {event}\n" if event else "").encode() + b"data: " + text.encode("utf-8", "replace") + b"\n\n"


class Paced:
    """A request's updates, with None whenever PAUSE seconds went by without one, until it is closed."""

    def __init__(self, updates: AsyncIterator[Update], seconds: float = PAUSE) -> None:
        self._updates, self._seconds = updates, seconds
        self._pending: asyncio.Future[Update] | None = None
        self._held: list[Update | None] = []

    def __aiter__(self) -> Paced:
        return self

    async def __anext__(self) -> Update | None:
        if self._held:
            return self._held.pop()
        if self._pending is None:
            self._pending = asyncio.ensure_future(_next(self._updates))
        done, _ = await asyncio.wait({self._pending}, timeout=self._seconds)
        if not done:
            return None
        pending, self._pending = self._pending, None
        return pending.result()  # or raises: StopAsyncIteration at the end

    async def aclose(self) -> None:
        if self._pending is not None:
            self._pending.cancel()
            await asyncio.wait({self._pending})
        if isinstance(self._updates, AsyncGenerator):
            await self._updates.aclose()


async def begin(request: Request, updates: AsyncIterator[Update], seconds: float = PAUSE) -> Paced:
    """Wait for the first update, for as long as `seconds`, so that what is wrong with a request raises while its status can be sent."""
    paced = Paced(updates, seconds)
    try:
        paced._held.append(await connected(request, _next(paced)))
    except BaseException:
        await paced.aclose()
        raise
    return paced


async def _next(iterator: AsyncIterator[T]) -> T:
    return await anext(iterator)


class EventStream(StreamingResponse):
    """Frames made of `updates`; both are closed as soon as the response ends, in whatever way."""

    def __init__(self, frames: AsyncGenerator[bytes, None], updates: Paced) -> None:
        super().__init__(frames, media_type="text/event-stream", headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._frames, self._updates = frames, updates

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._updates), aclosing(self._frames):
            await super().__call__(scope, receive, send)


async def connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns; it is cancelled if the client goes away first. The request's body must have been read."""
    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise APIError(499, "the client closed the connection")
        return task.result()
    finally:
        task.cancel()
        watch.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def failure(error: Exception) -> APIError:
    """What a stream that has begun can still say about an error; one that is not the client's is logged."""
    if isinstance(error, APIError):
        return error
    log.error("a stream failed", exc_info=error)
    return APIError(500, "internal error; see the server's log")
