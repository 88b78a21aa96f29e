"""What is served, and the small endpoints around it: models, embeddings, tokenizer, health, metrics, state, balance.

The tokenizer's three endpoints are what lm-eval asks for, so that an evaluation needs no tokenizer of its own. /state is the page's live
view; /metrics says the same and more to Prometheus.
"""

# no `from __future__ import annotations`: FastAPI could not read annotations that name a function's arguments

import asyncio
import base64
import struct
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Annotated, Any, ClassVar, Literal

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import Field, WithJsonSchema

from jevons.server.completion import PROMPT, check_length, long_or_not, read_prompts, text_size
from jevons.server.conversation import read_messages, read_tools, refused
from jevons.server.document import KEYED, STATUSES, WORK, list_of, object_of, responses
from jevons.server.error import APIError
from jevons.server.field import Body, at_most, resolve
from jevons.server.key import Balance
from jevons.server.service import Service
from jevons.server.stream import attended
from jevons.server.ticket import Ticket

Admit = Callable[..., Any]
NUMBER = {"type": "number"}
MODEL = object_of(id="string", object={"const": "model"}, created="integer", owned_by="string", root="string", max_model_len="integer")


class EmbeddingBody(Body):
    ignored: ClassVar[Mapping[str, str]] = {"user": "embeddings are not cached"}
    model: str
    input: Annotated[Any, WithJsonSchema(PROMPT)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, description="Only the model's own width")


class TokenizeBody(Body):
    model: str | None = None
    prompt: str | None = Field(None, description="The text; or give messages")
    messages: list[dict[str, Any]] | None = None
    tools: Any = None
    add_generation_prompt: bool = True
    add_special_tokens: bool | None = Field(None, description="Default: true for a prompt, false for messages")
    return_token_strs: bool | None = None


class DetokenizeBody(Body):
    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0, lt=2**31)]]


def router(service: Service, admit: Admit, identify: Admit, balance: Callable[[Ticket], Balance | None]) -> APIRouter:
    """`identify` knows who asks without counting it against the key's limits."""
    api = APIRouter(tags=["catalog"])
    for routes in (_models, _embeddings, _tokenizer):
        routes(api, service, admit, identify)
    _state(api, service, identify, balance)
    return api


def _models(api: APIRouter, service: Service, admit: Admit, identify: Admit) -> None:
    def entry(name: str) -> dict[str, Any]:
        entry = {"id": name, "object": "model", "created": service.created, "owned_by": "jevons"}
        return entry | {"root": service.model_id, "max_model_len": service.engine_loop.max_length}

    async def models(ticket: Annotated[Ticket, Depends(identify)]) -> Response:
        allowed = ticket.account.models
        names = [service.model_id, *service.aliases]
        shown = [name for name in names if allowed is None or {name, service.model_id} & set(allowed)]
        return JSONResponse({"object": "list", "data": [entry(name) for name in shown]})

    async def model(name: str, ticket: Annotated[Ticket, Depends(identify)]) -> Response:
        resolve(service, name, ticket)
        return JSONResponse(entry(name))

    listed = object_of(object={"const": "list"}, data=list_of(MODEL))
    for prefix in ("/v1", "", "/beta"):
        shown = prefix == "/v1"
        api.get(f"{prefix}/models", responses=responses(listed, *KEYED), response_model=None, include_in_schema=shown)(models)
        api.get(
            f"{prefix}/models/{{name:path}}", responses=responses(MODEL, 403, 404, *KEYED), response_model=None, include_in_schema=shown
        )(model)


def _embeddings(api: APIRouter, service: Service, admit: Admit, identify: Admit) -> None:
    vector = {"anyOf": [list_of("number"), {"type": "string"}]}
    item = object_of(object={"const": "embedding"}, index="integer", embedding=vector)
    reply = object_of(object={"const": "list"}, model="string", data=list_of(item), usage="object")

    @api.post("/embeddings", response_model=None, include_in_schema=False)
    @api.post("/v1/embeddings", responses=responses(reply, *WORK), response_model=None)
    async def embeddings(request: Request, body: EmbeddingBody, ticket: Annotated[Ticket, Depends(admit)]) -> Response:
        resolve(service, body.model, ticket)
        width = service.engine_loop.config.hidden_size
        if body.dimensions not in (None, width):
            raise APIError(400, f"dimensions: this model's vectors have {width} numbers and are not cut", param="dimensions")
        read = lambda: read_prompts(body.input, service.tokenizer, special=True, where="input")  # noqa: E731
        if isinstance(body.input, list) and type(next(iter(body.input), None)) is not int:
            at_most("input", len(body.input), service.limits.max_prompts)
        prompts = await long_or_not(text_size(body.input), read)
        for prompt in prompts:
            check_length(service, len(prompt.ids), "input")
        vectors = await attended(request, service.embed([prompt.ids for prompt in prompts], ticket))
        packed = body.encoding_format == "base64"
        data = [{"object": "embedding", "index": i, "embedding": _base64(v) if packed else v} for i, v in enumerate(vectors)]
        assert ticket.row is not None
        usage = {"prompt_tokens": ticket.row.prompt, "total_tokens": ticket.row.prompt, "jevons": ticket.extras()}
        return JSONResponse({"object": "list", "data": data, "model": body.model, "usage": usage})


def _base64(vector: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


def _tokenizer(api: APIRouter, service: Service, admit: Admit, identify: Admit) -> None:
    tokenizer = service.tokenizer
    strings = {"anyOf": [list_of("string"), {"type": "null"}]}
    counted = object_of(count="integer", max_model_len="integer", tokens=list_of("integer"), token_strs=strings)
    optional = {"type": ["string", "null"]}
    info = object_of(eos_token=optional, bos_token=optional, pad_token=optional, chat_template=optional, vocab_size="integer")

    @api.post("/tokenize", responses=responses(counted, 404, 403, *KEYED), response_model=None)
    async def tokenize(body: TokenizeBody, ticket: Annotated[Ticket, Depends(identify)]) -> Response:
        if body.model is not None:
            resolve(service, body.model, ticket)
        if (body.prompt is None) == (body.messages is None):
            raise APIError(400, "prompt: give either prompt or messages", param="prompt")
        ids = await long_or_not(len(body.prompt or "") + (body.messages is not None) * 2**20, lambda: _encode(service, body))
        names = [tokenizer.raw.id_to_token(id) for id in ids] if body.return_token_strs else None
        length = service.engine_loop.max_length
        return JSONResponse({"count": len(ids), "max_model_len": length, "tokens": ids, "token_strs": names})

    @api.post("/detokenize", responses=responses(object_of(prompt="string"), 404, 403, *KEYED), response_model=None)
    async def detokenize(body: DetokenizeBody, ticket: Annotated[Ticket, Depends(identify)]) -> Response:
        if body.model is not None:
            resolve(service, body.model, ticket)
        text = await long_or_not(4 * len(body.tokens), lambda: tokenizer.decode(body.tokens))
        return JSONResponse({"prompt": text})

    @api.get("/tokenizer_info", responses=responses(info, *KEYED), response_model=None)
    async def tokenizer_info(ticket: Annotated[Ticket, Depends(identify)]) -> Response:
        fields = {name: getattr(tokenizer, name) for name in ("eos_token", "bos_token", "pad_token", "chat_template")}
        return JSONResponse(fields | {"vocab_size": tokenizer.size})


def _encode(service: Service, body: TokenizeBody) -> list[int]:
    tokenizer = service.tokenizer
    if body.prompt is not None:
        return tokenizer.raw.encode(body.prompt, add_special_tokens=body.add_special_tokens is not False).ids
    if tokenizer.template is None:
        raise APIError(400, "messages: this model has no chat template", param="messages")
    try:
        text = tokenizer.template.render(
            read_messages(body.messages), tools=read_tools(body.tools) or None, add_generation_prompt=body.add_generation_prompt
        )
    except ValueError as error:
        raise refused(error, "messages") from error
    return tokenizer.raw.encode(text, add_special_tokens=bool(body.add_special_tokens)).ids


def _state(api: APIRouter, service: Service, identify: Admit, balance: Callable[[Ticket], Balance | None]) -> None:
    cache = object_of(total_blocks="integer", used_blocks="integer", cached_blocks="integer")
    live = object_of(model="string", running="integer", waiting="integer", cache=cache, hit_rate=NUMBER)
    account = object_of(is_available="boolean", balance_infos=list_of("object"))
    health = object_of(["status"], status="string", error={"type": ["string", "null"]})
    unhealthy: dict[int | str, dict[str, Any]] = {503: {"description": STATUSES[503], "content": {"application/json": {"schema": health}}}}

    @api.get("/health", responses=responses(health) | unhealthy, response_model=None)
    async def health_check() -> Response:
        wrong, code = None, 200
        if not service.engine_loop.alive:
            wrong, code = "the engine has stopped", 503
        elif service.draining:
            wrong, code = "the server is shutting down", 503
        elif service.meter.error:
            wrong = "the usage database cannot be written"  # requests are still answered while the meter's queue has room
        return JSONResponse({"status": wrong or "ok", "error": wrong}, status_code=code)

    content = {CONTENT_TYPE_LATEST.partition(";")[0]: {"schema": {"type": "string"}}}
    text: dict[int | str, dict[str, Any]] = {200: {"description": "Prometheus's text format", "content": content}}

    @api.get("/metrics", responses=responses({}, *KEYED) | text, response_model=None)
    async def metrics(ticket: Annotated[Ticket, Depends(identify)]) -> Response:
        return PlainTextResponse(service.metrics.expose(service.engine_loop.snapshot), media_type=CONTENT_TYPE_LATEST)

    @api.get("/state", responses=responses(live, *KEYED), response_model=None)
    async def state(ticket: Annotated[Ticket, Depends(identify)]) -> Response:
        now = service.engine_loop.snapshot
        prompt_rate, completion_rate = service.metrics.rates()
        return JSONResponse(
            {
                "model": service.model_id,
                "version": version("jevons"),
                "uptime": round(service.uptime, 1),
                "running": int(now["running"]),
                "waiting": int(now["waiting"]),
                "cache": {name: int(now[name]) for name in ("total_blocks", "used_blocks", "cached_blocks")},
                "hit_rate": now["prefix_hits"] / max(1, now["prefix_queries"]),
                "prompt_tokens_per_second": prompt_rate,
                "completion_tokens_per_second": completion_rate,
                "requests_today": service.metrics.requests_today,
                "money_today": await asyncio.to_thread(service.meter.today),
                "time": time.time(),
            }
        )

    @api.get("/v1/user/balance", response_model=None, include_in_schema=False)
    @api.get("/user/balance", responses=responses(account, *KEYED), response_model=None)
    async def user_balance(ticket: Annotated[Ticket, Depends(identify)]) -> Response:
        held = balance(ticket)
        remaining = None if held is None else held.remaining
        total = "Infinity" if remaining is None else f"{remaining:.6f}"  # clients make a number of it
        info = {"currency": "USD", "total_balance": total, "granted_balance": total, "topped_up_balance": "0.000000"}
        spent = 0.0 if held is None else held.spent
        return JSONResponse({"is_available": remaining is None or remaining > 0, "balance_infos": [info], "jevons": {"spent": spent}})
