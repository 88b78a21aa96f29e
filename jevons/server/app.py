"""The HTTP application: every endpoint behind one gate, and one form for every error.

The gate is the outermost layer. It numbers requests, bounds the body in size, time and depth before anything reads it, and turns what
nobody expected into a 500 that says nothing about the inside. Then come keys: `admit` lets a request in against its key's limits and holds
its place until the last byte of the reply; `who` only knows who asks.

Not done: cookies and sessions (a key is sent with each request), TLS (a proxy's task).
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jevons.server import anthropic, catalog, chat, completion, response
from jevons.server import page as page_module
from jevons.server.document import describe
from jevons.server.error import APIError
from jevons.server.key import Account, Balance, Keys
from jevons.server.limit import Limits
from jevons.server.ticket import Ticket

if TYPE_CHECKING:
    from jevons.server.service import Service

log = logging.getLogger(__name__)
NAME = re.compile(r"[a-z_][a-z0-9_]*")
TYPE_NAMES = {"str", "int", "float", "bool", "dict", "list", "none"}  # pydantic puts a union's branch into the path


def build(service: Service, keys: Keys | None, *, page: bool = True, cors: Sequence[str] = (), drain: float = 30.0) -> FastAPI:
    """The application. Without `keys` nobody needs one. Pages of origins in `cors` may call. Its end waits `drain` seconds for replies."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if not service.engine_loop.alive:
            service.engine_loop.start()
        watch = asyncio.ensure_future(_watch(service))
        try:
            yield
        finally:
            watch.cancel()
            await service.drain(drain)

    description = "OpenAI's, DeepSeek's and Anthropic's interfaces to one model, each request metered."
    app = FastAPI(title="Jevons", version=version("jevons"), description=description, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_exception_handler(APIError, _on_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http)
    if cors:
        every = ["*"]
        app.add_middleware(
            CORSMiddleware, allow_origins=list(cors), allow_methods=every, allow_headers=every, expose_headers=["x-request-id"]
        )
    app.add_middleware(Gate, limits=service.limits)

    async def who(request: Request) -> Ticket:
        account = Account.open() if keys is None else await keys.authenticate(_secret(request))
        return Ticket(account, request.url.path, request.state.request_id)

    async def admit(request: Request) -> AsyncIterator[Ticket]:
        ticket = await who(request)
        if keys is None:
            yield ticket
            return
        with keys.admit(ticket.account, *(ticket.account.models or ())):  # the model's name is checked where it is read: field.resolve
            yield ticket

    def balance(ticket: Ticket) -> Balance | None:
        return None if keys is None else keys.balance(ticket.account)

    app.include_router(chat.router(service, admit))
    app.include_router(completion.router(service, admit))
    app.include_router(response.router(service, admit))
    app.include_router(anthropic.router(service, admit))
    app.include_router(catalog.router(service, admit, who, balance))
    if page:
        app.include_router(page_module.router())
    keyed = keys is not None and keys.any()
    app.openapi = cache(lambda: describe(app, keyed=keyed, models=[service.model_id, *service.aliases]))  # type: ignore[method-assign]
    return app


async def _watch(service: Service) -> None:
    while True:
        service.metrics.sample(service.engine_loop.snapshot)
        await asyncio.sleep(1.0)


def _secret(request: Request) -> str | None:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" and token.strip() else request.headers.get("x-api-key")


# --- errors


def error_response(path: str, request_id: str, error: APIError, headers: dict[str, str] | None = None) -> JSONResponse:
    """An error in the form that the endpoint's clients read."""
    body = anthropic.error_body(error, request_id) if path.startswith("/anthropic") else error.body()
    return JSONResponse(body, status_code=error.status, headers=error.headers() | (headers or {}))


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, APIError)
    return error_response(request.url.path, request.state.request_id, error)


async def _on_http(request: Request, error: Exception) -> Response:
    """What the router itself refuses: unknown paths, wrong methods, bodies that are not JSON."""
    assert isinstance(error, HTTPException)
    messages = {404: f"no such route: {request.url.path[:200]}", 405: f"{request.method} is not possible here; see the header allow"}
    message = messages.get(error.status_code, str(error.detail))
    return error_response(request.url.path, request.state.request_id, APIError(error.status_code, message), dict(error.headers or {}))


async def _on_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return error_response(request.url.path, request.state.request_id, explain(error.errors()))


def explain(errors: Sequence[Any]) -> APIError:
    """A 400 that names the first field that is wrong, as clients write its path: messages[0].role."""
    first = errors[0]
    path = ""
    for part in first["loc"][1:]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif first["type"] == "extra_forbidden" or (NAME.fullmatch(part) and part not in TYPE_NAMES):
            path += f".{part[:100]}" if path else part[:100]
    kind, message = first["type"], first["msg"]
    if kind == "json_invalid":
        return APIError(400, "the body is not valid JSON")
    if not path:
        return APIError(400, "the body must be a JSON object, sent with content-type application/json")
    messages = {"extra_forbidden": "is not a field that is known here", "missing": "is required", "string_unicode": "is not valid Unicode"}
    return APIError(400, f"{path}: {messages.get(kind, message[:1].lower() + message[1:])}", param=path, code="invalid_value")


# --- the gate


class Gate:
    """Numbers requests, bounds bodies, and answers for what went wrong further in."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self.app, self.limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = f"req_{secrets.token_hex(12)}"
        scope.setdefault("state", {})["request_id"] = request_id
        started = False

        async def numbered(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message = {**message, "headers": [*message["headers"], (b"x-request-id", request_id.encode())]}
            await send(message)

        try:
            body = await self._read(scope, receive)
            if body is None:
                return
            await self.app(scope, _replay(body, receive), numbered)
        except APIError as error:
            await error_response(scope["path"], request_id, error)(scope, receive, numbered)
        except Exception:
            log.exception("request %s failed", request_id)
            if started:
                raise  # cuts the connection: the client must not take half a reply for a whole one
            fault = APIError(500, "the server failed on this request; see its log")
            await error_response(scope["path"], request_id, fault)(scope, receive, numbered)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body; None where the client went away."""
        most = self.limits.max_body_bytes
        too_large = APIError(413, f"the body is larger than {most:,} bytes")
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > most:
            raise too_large
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.limits.body_timeout):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > most:
                        raise too_large
                    if not message.get("more_body"):
                        break
        except TimeoutError as error:
            raise APIError(408, f"the body did not arrive within {self.limits.body_timeout:g} s") from error
        body = b"".join(parts)
        check_json(body, self.limits.max_depth)
        return body


def check_json(body: bytes, max_depth: int) -> None:
    """Refuse what json.loads takes and later code would break on: deep nesting, and halves of surrogate pairs, which no UTF-8 can hold."""
    if body.count(b"[") + body.count(b"{") > max_depth:
        depth = 0
        for bracket in re.findall(rb"[\[\]{}]", re.sub(rb'"(?:[^"\\]|\\.)*"', b"", body)):
            depth += 1 if bracket in b"[{" else -1
            if depth > max_depth:
                raise APIError(400, f"the body is nested deeper than {max_depth} levels")
    if re.search(rb"\\u[dD][89a-fA-F]", body):
        try:
            json.dumps(json.loads(body), ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise APIError(400, "the body has half of a surrogate pair, which is not valid Unicode") from error
        except ValueError:
            pass  # not JSON at all: said where the body is read


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body that was read already, then whatever comes: that the client went away."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
