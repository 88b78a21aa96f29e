"""The chat page, served by the server it talks to: a fixed table of files, read once, with headers that let it do no more than it must.

A browser page that shows what models write, and that holds an API key, is worth attacking through a model's text. It builds
nodes and never parses markup (page/dom.js); the policy below makes browsers hold it to that: scripts, styles and connections
from this server alone, nothing inline, no string becomes markup (trusted types), no frame around it.

A request names a key of the table, so that no path leads out of it. There is no build step: what is in the folder is what is
sent. Files are small and change with the package: browsers ask each time (no-cache) and get 304 if their copy is the same.
Not done: compression (a proxy's work, if there is one) and signing in (the page asks for an API key when the server does).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files

from fastapi import APIRouter, Request, Response

TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "connect-src": "'self'",
    "img-src": "'self' data:",
    "font-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    "require-trusted-types-for": "'script'",
    "trusted-types": "'none'",
}
HEADERS = {
    "content-security-policy": "; ".join(f"{name} {value}" for name, value in POLICY.items()),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",
}
START = "index.html"


@dataclass(frozen=True)
class File:
    """One file as it is sent."""

    content: bytes
    media_type: str
    etag: str


def load() -> dict[str, File]:
    """All files of the page by name."""
    table = {}
    for file in (files("jevons.server") / "page").iterdir():
        media_type = TYPES.get(file.name.rpartition(".")[2])
        if file.is_file() and media_type:
            content = file.read_bytes()
            table[file.name] = File(content, media_type, f'"{hashlib.sha256(content).hexdigest()[:20]}"')
    assert START in table
    return table


def reply(file: File, request: Request) -> Response:
    headers = {**HEADERS, "etag": file.etag}
    known = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
    if known & {file.etag, "*"}:
        return Response(status_code=304, headers=headers)
    return Response(file.content, media_type=file.media_type, headers=headers)


def router() -> APIRouter:
    """`/` and `/page/NAME`, for GET and HEAD, without a key: there is nothing secret in them."""
    table = load()
    pages = APIRouter()

    @pages.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def start(request: Request) -> Response:
        return reply(table[START], request)

    @pages.api_route("/page/{name:path}", methods=["GET", "HEAD"], include_in_schema=False)
    async def page(name: str, request: Request) -> Response:
        if name not in table or name == START:  # its links are relative to /
            return Response("There is no such file.\n", status_code=404, media_type="text/plain", headers=HEADERS)
        return reply(table[name], request)

    return pages
