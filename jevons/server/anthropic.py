"""POST /anthropic/v1/messages: Anthropic's Messages for clients such as Claude Code, as DeepSeek serves them.

Claude's names stand for the served model. Thinking happens if `thinking` asks for it, as with Anthropic. Versions and betas in headers are
not looked at, signatures of thinking not checked, cache_control marks not needed: equal prefixes are found without.

Not done: images and documents, citations, tools that run on the server or are known to Claude by name only.
"""

# no `from __future__ import annotations`: FastAPI could not read annotations that name a function's arguments

import secrets
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from datetime import UTC, datetime
from typing import Annotated, Any, ClassVar, Literal

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from jevons.data.chat import Message
from jevons.server import grammar
from jevons.server.block import Blocks, Event
from jevons.server.conversation import Conversation, ToolChoice, encode, read_stop, read_tools, refused, to_job
from jevons.server.document import KEYED, WORK, list_of, object_of, responses
from jevons.server.error import APIError
from jevons.server.field import Body, at_most, resolve
from jevons.server.job import Update, Usage
from jevons.server.service import Service
from jevons.server.stream import attended, data, stream
from jevons.server.ticket import Ticket

ERRORS = {400: "invalid_request_error", 401: "authentication_error", 402: "billing_error", 403: "permission_error", 404: "not_found_error"}
ERRORS |= {408: "timeout_error", 413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error"}
BILLING = "x-anthropic-billing-header:"  # Claude Code's first system block; it changes with every request and no cached prefix would fit


class ThinkingOptions(Body):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(None, ge=0)
    display: Literal["summarized", "omitted"] | None = Field(None, description="omitted: the block is there, but empty")


class OutputOptions(Body):
    effort: str | None = None
    format: dict[str, Any] | None = None


class Metadata(Body):
    user_id: str | None = Field(None, description="Whose prompt this is: cached prefixes are not shared between users")


class ToolChoiceOptions(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class CountRequest(Body):
    """What makes up the prompt."""

    ignored: ClassVar[Mapping[str, str]] = {
        "cache_control": "equal prefixes are found without",
        "container": "as with DeepSeek: there are none",
        "context_management": "nothing is cleared from the conversation",
        "mcp_servers": "as with DeepSeek: tools do not run here",
        "inference_geo": "there is one place",
        "service_tier": "there is one",
        "speed": "there is one",
        "diagnostics": "there are none",
        "user_profile_id": "nothing is stored",
        "workspace_id": "there are none",
    }
    model: str
    messages: list[dict[str, Any]] = Field(min_length=1)
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: ToolChoiceOptions | None = None
    thinking: ThinkingOptions | None = None
    output_config: OutputOptions | None = None


class MessageRequest(CountRequest):
    max_tokens: int = Field(ge=1)
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    metadata: Metadata | None = None


def router(service: Service, admit: Callable[..., Any]) -> APIRouter:
    routes = APIRouter(prefix="/anthropic/v1", tags=["anthropic"])
    message = object_of(id="string", type="string", role="string", model="string", content=list_of("object"), usage="object")
    models = object_of(data=list_of("object"), has_more="boolean", first_id="string", last_id="string")

    def thinks(body: CountRequest, ticket: Ticket) -> bool:
        """Check the model's name; whether the reply begins with thinking where the request does not say."""
        name = service.model_id if body.model.startswith("claude") else body.model
        try:
            alias = resolve(service, name, ticket)
        except APIError as error:
            raise APIError(400 if error.status == 404 else error.status, error.message, param="model") from error
        return bool(alias and alias.thinking)

    @routes.post("/messages", summary="Anthropic's messages", response_model=None, responses=_documented(message, *WORK, stream=True))
    async def create_message(request: Request, body: MessageRequest, ticket: Annotated[Ticket, Depends(admit)]) -> Response:
        conversation = read(body, thinks(body, ticket))
        ticket.user = (body.metadata and body.metadata.user_id) or ""
        at_most("metadata.user_id", len(ticket.user.encode()), service.limits.max_user_bytes, "bytes")
        params = {name: getattr(body, name) for name in ("max_tokens", "temperature", "top_p")}
        params["top_k"] = None if body.top_k is None else max(0, body.top_k)
        stop = read_stop(body.stop_sequences, "stop_sequences")
        job = await to_job(service, conversation, params, stop=stop, tenant=ticket.tenant)
        reply = Reply(body, ticket, len(job.prompt))
        updates = service.answer([job], ticket)
        if body.stream:
            return await stream(request, reply.frames(updates), failure=reply.broken, keep_alive=service.limits.keep_alive)
        return JSONResponse(await attended(request, reply.whole(updates)))

    @routes.post(
        "/messages/count_tokens", summary="How many tokens a prompt has", responses=_documented(object_of(input_tokens="integer"), *WORK)
    )
    async def count_tokens(body: CountRequest, ticket: Annotated[Ticket, Depends(admit)]) -> dict[str, int]:
        prompt, _ = await encode(service, read(body, thinks(body, ticket)))
        return {"input_tokens": len(prompt)}

    @routes.get("/models", summary="The served model's names", responses=_documented(models, *KEYED))
    async def list_models(ticket: Annotated[Ticket, Depends(admit)]) -> dict[str, Any]:
        created = datetime.fromtimestamp(service.created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        names = [service.model_id, *service.aliases]
        entries = [{"type": "model", "id": name, "display_name": name, "created_at": created} for name in names]
        return {"data": entries, "has_more": False, "first_id": names[0], "last_id": names[-1]}

    return routes


def _documented(ok: dict[str, Any], *statuses: int, stream: bool = False) -> dict[int | str, dict[str, Any]]:
    """`responses`, with the errors in Anthropic's form."""
    error = object_of(type={"const": "error"}, error=object_of(type="string", message="string"))
    failure = {"content": {"application/json": {"schema": error}}}
    return {status: r if status == 200 else r | failure for status, r in responses(ok, *statuses, stream=stream).items()}


def error_body(error: APIError, request_id: str | None = None) -> dict[str, Any]:
    """The error in Anthropic's form."""
    body = {"type": "error", "error": {"type": ERRORS.get(error.status, "api_error"), "message": error.message}}
    return body if request_id is None else body | {"request_id": request_id}


class Reply:
    """One message while it is made: Anthropic's object, and the events that tell of it."""

    def __init__(self, body: MessageRequest, ticket: Ticket, prompt: int) -> None:
        self.body, self.ticket = body, ticket
        self.id = f"msg_{secrets.token_hex(12)}"
        self.blocks = Blocks(hide_thinking=body.thinking is not None and body.thinking.display == "omitted")
        self.usage = Usage(prompt)
        self.stop_reason: str | None = None
        self.stop_sequence: str | None = None

    def take(self, update: Update) -> list[Event]:
        events = [event for piece in update.pieces for event in self.blocks.take(piece)]
        if update.finish is None:
            return events
        if update.finish == "abort":
            raise APIError(500, "the answer was broken off")
        self.usage, self.stop_sequence = update.usage or self.usage, update.stop
        if update.finish == "length":
            cut = self.usage.completion >= self.body.max_tokens
            self.stop_reason = "max_tokens" if cut else "model_context_window_exceeded"
        elif update.finish == "tool_calls":
            self.stop_reason = "tool_use"
        else:
            self.stop_reason = "end_turn" if update.stop is None else "stop_sequence"
        delta = {"stop_reason": self.stop_reason, "stop_sequence": self.stop_sequence}
        return [*events, *self.blocks.close(), {"type": "message_delta", "delta": delta, "usage": self._usage()}, {"type": "message_stop"}]

    async def whole(self, updates: AsyncGenerator[Update, None]) -> dict[str, Any]:
        async with aclosing(updates):
            async for update in updates:
                self.take(update)
        assert self.stop_reason is not None, "the answer ended without its last update"
        return self.result()

    async def frames(self, updates: AsyncGenerator[Update, None]) -> AsyncGenerator[str, None]:
        begun = False
        async with aclosing(updates):
            async for update in updates:
                if not begun:  # not earlier: what is wrong with the request is still an HTTP status until then
                    begun = True
                    yield _frame({"type": "message_start", "message": self.result()})
                    yield _frame({"type": "ping"})
                for event in self.take(update):
                    yield _frame(event)
        assert self.stop_reason is not None, "the answer ended without its last update"

    def broken(self, error: APIError) -> str:
        """The last event of a stream that cannot go on."""
        return _frame(error_body(error, self.ticket.request_id))

    def result(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.body.model,
            "content": [dict(block) for block in self.blocks.content],
            "stop_reason": self.stop_reason,
            "stop_sequence": self.stop_sequence,
            "usage": self._usage(),
        }

    def _usage(self) -> dict[str, Any]:
        """Anthropic counts the uncached part of the prompt and the cached one apart."""
        usage = self.usage
        return {
            "input_tokens": usage.prompt - usage.cached,
            "cache_read_input_tokens": usage.cached,
            "cache_creation_input_tokens": 0,
            "output_tokens": usage.completion,
            "output_tokens_details": {"thinking_tokens": usage.reasoning},
            "jevons": self.ticket.extras(),
        }


def _frame(event: Event) -> str:
    return f"event: {event['type']}\n{data(event)}"


def read(body: CountRequest, thinking: bool) -> Conversation:
    """The request as a conversation; `thinking` is the default."""
    messages = _read_system(body.system)
    for i, message in enumerate(body.messages):
        messages += _read_message(message, f"messages[{i}]")
    switch, output, choice = body.thinking, body.output_config, body.tool_choice
    tools = _read_tools(body.tools)
    names = [tool["function"]["name"] for tool in tools]
    if choice is not None and choice.type == "tool" and choice.name not in names:
        raise APIError(
            400, f"tool_choice.name: must be one of tools ({', '.join(names)}), is {choice.name!r:.80}", param="tool_choice.name"
        )
    if choice is not None and choice.type in ("any", "tool") and not tools:
        raise APIError(400, f"tool_choice: {choice.type}, but no tools are given", param="tool_choice")
    choices: dict[str, ToolChoice] = {"auto": "auto", "any": "required", "tool": "required", "none": "none"}
    if messages and messages[-1].tool_calls:
        at = f"messages[{len(body.messages) - 1}]"
        raise APIError(400, f"{at}: ends in tool_use; their tool_result must follow", param=at)
    try:
        form = output.format if output else None
        source = (
            grammar.from_response_format({"type": "json_schema", "json_schema": {"name": "output", "schema": form.get("schema")}})
            if form
            else None
        )
    except ValueError as error:
        raise refused(error, "output_config.format") from error
    return Conversation(
        messages=messages,
        tools=tools,
        tool_choice=choices[choice.type] if choice else "auto",
        tool_name=choice.name if choice and choice.type == "tool" else None,
        parallel=not (choice and choice.disable_parallel_tool_use),
        # adaptive: the model decides, so its template does
        thinking=thinking if switch is None else {"enabled": True, "disabled": False, "adaptive": None}[switch.type],
        thinking_budget=switch.budget_tokens if switch else None,
        effort=output.effort if output else None,
        prefix=messages[-1].role == "assistant",
        grammar=source,
    )


def _read_system(system: str | list[dict[str, Any]] | None) -> list[Message]:
    blocks = [{"type": "text", "text": system}] if isinstance(system, str) else system or []
    texts = [_text(block, f"system[{i}]") for i, block in enumerate(blocks)]
    text = "\n\n".join(text for text in texts if not text.startswith(BILLING))
    return [Message("system", text)] if text else []


def _read_message(message: dict[str, Any], at: str) -> list[Message]:
    """One of Anthropic's messages: an assistant's turn is one here too, a user's may hold results of tools, which stand alone."""
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant", "system"):
        raise APIError(400, f"{at}.role: must be user or assistant, is {role!r:.80}", param=f"{at}.role")
    if not isinstance(content, str | list):
        raise APIError(400, f"{at}.content: must be a string or a list of blocks", param=f"{at}.content")
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
    readable = ("text", "thinking", "redacted_thinking", "tool_use") if role == "assistant" else ("text", "tool_result")
    texts, reasoning, calls, out = list[str](), "", list[dict[str, Any]](), list[Message]()
    for j, block in enumerate(blocks):
        where = f"{at}.content[{j}]"
        kind = block.get("type") if isinstance(block, dict) else None
        if kind not in readable:
            raise APIError(
                400, f"{where}: a block of type {kind!r:.80} cannot be read; this model reads {', '.join(readable)}", param=where
            )
        if kind == "text":
            texts.append(_text(block, where))
        elif kind == "thinking":
            reasoning += _string(block, "thinking", where)
        elif kind == "tool_use":
            if not isinstance(block.get("input"), dict):
                raise APIError(400, f"{where}.input: must be an object", param=f"{where}.input")
            function = {"name": _string(block, "name", where), "arguments": block["input"]}
            calls.append({"id": _string(block, "id", where), "type": "function", "function": function})
        elif kind == "tool_result":
            if texts:
                out.append(Message(role, "\n\n".join(texts)))
                texts = []
            out.append(Message("tool", _result(block, where), tool_call_id=_string(block, "tool_use_id", where)))
    if texts or calls or reasoning or not out:
        out.append(Message(role, "\n\n".join(texts), reasoning, tuple(calls)))
    return out


def _result(block: dict[str, Any], where: str) -> str:
    """What a tool returned, as text; templates know no field for failure."""
    content = block.get("content") or ""
    if isinstance(content, list):
        content = "\n".join(_text(part, f"{where}.content[{k}]") for k, part in enumerate(content))
    if not isinstance(content, str):
        raise APIError(400, f"{where}.content: must be a string or a list of text blocks", param=f"{where}.content")
    return f"Error: {content}" if block.get("is_error") else content


def _text(block: Any, where: str) -> str:
    if not isinstance(block, dict) or block.get("type") != "text":
        kind = block.get("type") if isinstance(block, dict) else None
        raise APIError(400, f"{where}: a block of type {kind!r:.80} cannot be read here, only text", param=where)
    return _string(block, "text", where)


def _string(block: dict[str, Any], name: str, where: str) -> str:
    if not isinstance(block.get(name), str):
        raise APIError(400, f"{where}.{name}: must be a string", param=f"{where}.{name}")
    return block[name]


def _read_tools(tools: list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    """From Anthropic's form to OpenAI's, which templates know."""
    functions = []
    for i, tool in enumerate(tools or []):
        if tool.get("type", "custom") not in ("custom", None):
            at = f"tools[{i}].type"
            raise APIError(400, f"{at}: {tool['type']!r:.80} is not known here; describe the tool by an input_schema", param=at)
        if not isinstance(tool.get("input_schema"), dict):
            raise APIError(400, f"tools[{i}].input_schema: must be a JSON schema", param=f"tools[{i}].input_schema")
        function = {n: tool[n] for n in ("name", "description", "strict") if tool.get(n) is not None}
        functions.append({"type": "function", "function": function | {"parameters": tool["input_schema"]}})
    return read_tools(functions)
