"""Answers over HTTP while they come: server-sent events with comments that keep the line open, and work that ends when nobody listens.

A failure before the first event becomes an HTTP status, since nothing was sent yet; a failure after it becomes an event, since a status
cannot be sent any more and a cut connection would look like a network fault.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from anyio import CancelScope
from fastapi import Request
from fastapi.responses import StreamingResponse

from jevons.server.error import APIError

log = logging.getLogger(__name__)
T = TypeVar("T")
HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}  # the second: nginx would hold events back


def dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def data(value: Any) -> str:
    return f"data: {dump(value)}\n\n"


async def attended(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client goes away. The body must have been read."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise APIError(499, "the client went away")
        return await task
    finally:
        gone.cancel()
        await _stop(task)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _stop(task: asyncio.Future[Any]) -> None:
    """Cancel and wait, also where the caller was cancelled itself."""
    with CancelScope(shield=True):
        if not task.done():
            task.cancel()
            await asyncio.wait({task})


async def stream(
    request: Request, frames: AsyncGenerator[str, None], *, failure: Callable[[APIError], str], keep_alive: float
) -> StreamingResponse:
    """A response of `frames`, whole events in text. `failure` makes the event of an error that comes after the first of them.

    Returns once the first frame is there or `keep_alive` seconds have passed; an error until then is raised. Closes `frames` in any case.
    """
    first = asyncio.ensure_future(anext(frames))
    try:
        await attended(request, _until(first, keep_alive))
        if first.done() and not isinstance(first.exception(), StopAsyncIteration):
            first.result()
    except BaseException:
        await _stop(first)
        await frames.aclose()
        raise
    return StreamingResponse(_frames(first, frames, failure, keep_alive), media_type="text/event-stream", headers=HEADERS)


async def _until(task: asyncio.Future[Any], seconds: float) -> None:
    await asyncio.wait({task}, timeout=seconds)


async def _frames(
    task: asyncio.Future[str], frames: AsyncGenerator[str, None], failure: Callable[[APIError], str], keep_alive: float
) -> AsyncIterator[str]:
    try:
        while True:
            while not task.done():
                await asyncio.wait({task}, timeout=keep_alive)
                if not task.done():
                    yield ": keep-alive\n\n"
            try:
                frame = task.result()
            except StopAsyncIteration:
                return
            except APIError as error:
                yield failure(error)
                return
            except Exception:  # whoever reads the log gets the cause, the client does not
                log.exception("a streamed answer failed")
                yield failure(APIError(500, "the server failed on this request; see its log"))
                return
            yield frame
            task = asyncio.ensure_future(anext(frames))
    finally:
        await _stop(task)
        with CancelScope(shield=True):
            await frames.aclose()
