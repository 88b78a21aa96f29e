"""The OpenAPI document: what FastAPI derives from the request models, corrected to what the server does.

FastAPI writes 422 for bodies that do not validate; here they are 400 like every other malformed request (as with OpenAI). Error bodies
and the statuses that the gate and the keys can give to any route are added.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

STATUSES = {
    400: "Malformed: `param` names the field",
    401: "No key, or one that is unknown, revoked or expired",
    402: "The key's budget is spent",
    403: "The key is not for this model",
    404: "No such model",
    408: "The body did not arrive in time",
    413: "The body is too large",
    429: "Past the key's rate or concurrency; `retry-after` says when to try again",
    500: "A fault of the server; details are in its log",
    503: "The queue is full, or the server is shutting down; `retry-after` says when to try again",
}
TEXT = {"type": ["string", "null"]}
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {"message": {"type": "string"}, "type": {"type": "string"}, "param": TEXT, "code": TEXT},
        }
    },
}
EVERYWHERE = (400, 408, 413, 500)
KEYED = (401, 503)  # 503: the keys' database does not answer
NAMED = ("ChatBody", "CompletionBody", "ResponseRequest", "EmbeddingBody", "TokenizeBody", "DetokenizeBody")  # bodies that name a model
WORK = (401, 402, 403, 404, 429, 503)


def responses(ok: dict[str, Any], *statuses: int, stream: bool = False) -> dict[int | str, dict[str, Any]]:
    """FastAPI's `responses` of a route: the schema of a good reply, and the errors that it can give."""
    content: dict[str, Any] = {"application/json": {"schema": ok}}
    if stream:
        content["text/event-stream"] = {}
    documented: dict[int | str, dict[str, Any]] = {200: {"description": "Answered", "content": content}}
    return documented | {status: _failure(status) for status in sorted({*statuses, *EVERYWHERE})}


def _failure(status: int) -> dict[str, Any]:
    return {"description": STATUSES[status], "content": {"application/json": {"schema": ERROR}}}


def object_of(required: Iterable[str] = (), **properties: Any) -> dict[str, Any]:
    """A JSON schema of an object, given name by name; a plain string stands for a type."""
    fields = {name: {"type": value} if isinstance(value, str) else value for name, value in properties.items()}
    return {"type": "object", "required": list(required or fields), "properties": fields}


def list_of(item: dict[str, Any] | str) -> dict[str, Any]:
    return {"type": "array", "items": {"type": item} if isinstance(item, str) else item}


def describe(app: FastAPI, *, keyed: bool, models: Sequence[str]) -> dict[str, Any]:
    """The whole document. `keyed`: requests need a key; `models`: the names that are served."""
    document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    schemas = document.get("components", {}).get("schemas", {})
    for name in NAMED:
        kinds = schemas[name]["properties"]["model"]
        next(kind for kind in kinds.get("anyOf", [kinds]) if kind["type"] == "string")["enum"] = list(models)
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    if keyed:
        schemes = {"bearer": {"type": "http", "scheme": "bearer"}, "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"}}
        document.setdefault("components", {})["securitySchemes"] = schemes
        for name, path in document["paths"].items():
            for operation in path.values():
                operation["security"] = [] if name in ("/health",) else [{scheme: []} for scheme in schemes]
    return document
