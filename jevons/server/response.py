"""POST /v1/responses: OpenAI's Responses without its memory, as DeepSeek serves them.

Nothing is kept between requests: `input` holds the whole conversation, and what asks for a stored one is refused by name. What a turn was
made of (reasoning, message, calls) comes as separate items and becomes one message again for the template.

Not done: tools that run on the server, images and files, log-probabilities.
"""

# no `from __future__ import annotations`: FastAPI could not read annotations that name a function's arguments

import secrets
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from typing import Annotated, Any, ClassVar, Literal

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from jevons.data.chat import Message
from jevons.server import grammar
from jevons.server.conversation import Conversation, check_parts, read_tool_choice, read_tools, refused, to_job
from jevons.server.document import WORK, list_of, object_of, responses
from jevons.server.error import APIError
from jevons.server.field import Body, at_most, resolve
from jevons.server.item import Event, Output
from jevons.server.job import Update
from jevons.server.service import Service
from jevons.server.stream import attended, data, stream
from jevons.server.ticket import Ticket

STATEFUL = ("previous_response_id", "conversation", "prompt", "background", "context_management")
TEXT_PARTS = ("input_text", "output_text", "text", "refusal")


class Reasoning(Body):
    ignored: ClassVar[Mapping[str, str]] = dict.fromkeys(("summary", "generate_summary"), "the reasoning is returned as it is")
    effort: str | None = None


class TextOptions(Body):
    ignored: ClassVar[Mapping[str, str]] = {"verbosity": "the model has no such setting"}
    format: dict[str, Any] | None = None


class Thinking(Body):
    """DeepSeek's switch, with a budget in tokens."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(None, ge=0)


class ResponseRequest(Body):
    ignored: ClassVar[Mapping[str, str]] = {
        "include": "what there is, reasoning with it, is always included",
        "max_tool_calls": "counts tools that run on the server, of which there are none",
        "metadata": "nothing is stored",
        "moderation": "there is none",
        "prompt_cache_key": "equal prefixes are found without",
        "prompt_cache_options": "equal prefixes are found without",
        "prompt_cache_retention": "the cache keeps what it has room for",
        "safety_identifier": "nobody is reported",
        "service_tier": "there is one",
        "stream_options": "the last event always has usage; events are not padded",
    }
    model: str
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    stream: bool | None = None
    text: TextOptions | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    user: str | None = Field(None, description="As user_id, which comes first")
    # beyond OpenAI's, as in chat completions
    user_id: str | None = None
    thinking: Thinking | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    # refused, each by name, unless they ask for nothing
    store: bool | None = Field(None, description="Only false: nothing is stored")
    previous_response_id: str | None = None
    conversation: Any = None
    prompt: Any = None
    background: bool | None = None
    context_management: Any = None
    truncation: str | None = Field(None, description="Only disabled")
    top_logprobs: int | None = Field(None, description="Only 0")


def router(service: Service, admit: Callable[..., Any]) -> APIRouter:
    routes = APIRouter(tags=["responses"])

    reply = object_of(id="string", object="string", status="string", output=list_of("object"), usage={"type": ["object", "null"]})
    documented = responses(reply, *WORK, stream=True)

    @routes.post("/responses", include_in_schema=False)
    @routes.post("/v1/responses", summary="Responses (stateless)", response_model=None, responses=documented)
    async def create_response(request: Request, body: ResponseRequest, ticket: Annotated[Ticket, Depends(admit)]) -> Response:
        alias = resolve(service, body.model, ticket)
        ticket.user = body.user_id if body.user_id is not None else body.user or ""
        at_most("user_id", len(ticket.user.encode()), service.limits.max_user_bytes, "bytes")
        conversation, params = read(body, alias.thinking if alias else None)
        job = await to_job(service, conversation, params, tenant=ticket.tenant)
        reply = Reply(body, ticket)
        updates = service.answer([job], ticket)
        if body.stream:
            return await stream(request, reply.frames(updates), failure=reply.broken, keep_alive=service.limits.keep_alive)
        return JSONResponse(await attended(request, reply.whole(updates)))

    return routes


class Reply:
    """One response while it is made: OpenAI's object, and the events that tell of it."""

    def __init__(self, body: ResponseRequest, ticket: Ticket) -> None:
        self.body, self.ticket = body, ticket
        self.id, self.created = f"resp_{secrets.token_hex(16)}", int(time.time())
        self.output = Output()
        self.status = "in_progress"
        self.sent = 0
        self.error: APIError | None = None
        self.last: Update | None = None

    def take(self, update: Update) -> list[Event]:
        events = [event for piece in update.pieces for event in self.output.take(piece)]
        if update.finish is None:
            return events
        self.last = update
        if update.finish == "abort":
            return events + self.fail(APIError(500, "the answer was broken off"))
        if update.finish == "length":
            self.status = "incomplete"
            events += self.output.close("incomplete")
        else:
            self.status = "completed"
            events += self.output.ensure_answer() + self.output.close("completed")
        return [*events, {"type": f"response.{self.status}", "response": self.result()}]

    def fail(self, error: APIError) -> list[Event]:
        self.status, self.error = "failed", error
        return [*self.output.close("incomplete"), {"type": "response.failed", "response": self.result()}]

    async def whole(self, updates: AsyncGenerator[Update, None]) -> dict[str, Any]:
        async with aclosing(updates):
            async for update in updates:
                self.take(update)
        assert self.status != "in_progress", "the answer ended without its last update"
        return self.result()

    async def frames(self, updates: AsyncGenerator[Update, None]) -> AsyncGenerator[str, None]:
        async with aclosing(updates):
            async for update in updates:
                # not earlier: what is wrong with the request is still an HTTP status until then
                for event in [*self._opening(), *self.take(update)]:
                    yield self._frame(event)
        assert self.status != "in_progress", "the answer ended without its last update"

    def broken(self, error: APIError) -> str:
        """The last events of a stream that cannot go on."""
        return "".join(map(self._frame, [*self._opening(), *self.fail(error)]))

    def _opening(self) -> list[Event]:
        return [] if self.sent else [{"type": f"response.{name}", "response": self.result()} for name in ("created", "in_progress")]

    def _frame(self, event: Event) -> str:
        self.sent += 1
        return f"event: {event['type']}\n{data(event | {'sequence_number': self.sent - 1})}"

    def result(self) -> dict[str, Any]:
        """OpenAI's response object as things stand."""
        body, done = self.body, self.status != "in_progress"
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "completed_at": int(time.time()) if self.status == "completed" else None,
            "status": self.status,
            "background": False,
            "error": {"code": "server_error", "message": self.error.message} if self.error else None,
            "incomplete_details": {"reason": "max_output_tokens"} if self.status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": {},
            "model": body.model,
            "output": [dict(item) for item in self.output.items] if done else [],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
            "store": False,
            "temperature": body.temperature if body.temperature is not None else 1.0,
            "text": {"format": (body.text and body.text.format) or {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_p": body.top_p if body.top_p is not None else 1.0,
            "truncation": "disabled",
            "usage": self._usage(),
        }

    def _usage(self) -> dict[str, Any] | None:
        if self.last is None or self.last.usage is None:
            return None
        usage = self.last.usage
        return {
            "input_tokens": usage.prompt,
            "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": usage.prompt - usage.cached},
            "output_tokens": usage.completion,
            "output_tokens_details": {"reasoning_tokens": usage.reasoning},
            "total_tokens": usage.prompt + usage.completion,
            "jevons": self.ticket.extras(),
        }


def read(body: ResponseRequest, thinking: bool | None) -> tuple[Conversation, dict[str, Any]]:
    """The request as a conversation and sampling parameters; `thinking` is what the model's name says about it."""
    for name in STATEFUL:
        if getattr(body, name) not in (None, False):
            raise APIError(400, f"{name}: nothing is stored here; send the whole conversation as input", param=name)
    if body.store:
        raise APIError(400, "store: responses are not stored here; leave it out or send false", param="store")
    if body.truncation not in (None, "disabled"):
        raise APIError(400, "truncation: input is never shortened here; leave it out or send disabled", param="truncation")
    if body.top_logprobs:
        raise APIError(400, "top_logprobs: not given by responses; chat completions give them", param="top_logprobs")
    tools = _read_tools(body.tools)
    tool_choice: Any = body.tool_choice
    if isinstance(tool_choice, dict) and tool_choice.get("type") == "allowed_tools":
        if not isinstance(tool_choice.get("tools"), list):
            raise APIError(400, "tool_choice.tools: must be a list of the tools that may be called", param="tool_choice.tools")
        allowed = [tool.get("name") for tool in tool_choice["tools"] if isinstance(tool, dict)]
        tools, tool_choice = [tool for tool in tools if tool["function"]["name"] in allowed], tool_choice.get("mode")
    elif isinstance(tool_choice, dict):
        tool_choice = {"type": tool_choice.get("type"), "function": {"name": tool_choice.get("name")}}
    choice, tool_name = read_tool_choice(tool_choice, tools)
    switch = body.thinking
    if switch is not None:
        thinking = {"enabled": True, "disabled": False, "adaptive": None}[switch.type]
    elif body.reasoning is not None and body.reasoning.effort == "none":
        thinking = False
    conversation = Conversation(
        messages=_merge_system([*([Message("system", body.instructions)] if body.instructions else []), *read_input(body.input)]),
        tools=tools,
        tool_choice=choice,
        tool_name=tool_name,
        parallel=body.parallel_tool_calls is not False,
        thinking=thinking,
        thinking_budget=switch.budget_tokens if switch else None,
        effort=body.reasoning.effort if body.reasoning else None,
        template_kwargs=body.chat_template_kwargs or {},
        grammar=_read_format(body.text.format if body.text else None),
    )
    names = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed")
    params = {name: getattr(body, name) for name in names}
    return conversation, params | {"top_k": None if body.top_k is None else max(0, body.top_k), "max_tokens": body.max_output_tokens}


def read_input(value: str | list[dict[str, Any]]) -> list[Message]:
    """Items into messages. What one turn of the assistant was made of becomes one message again."""
    if isinstance(value, str):
        return [Message("user", value)]
    if not value:
        raise APIError(400, "input: must hold at least one item", param="input")
    messages: list[Message] = []
    reasoning, content, calls = "", "", list[dict[str, Any]]()

    def end_turn() -> None:
        nonlocal reasoning, content, calls
        if content or calls or reasoning:
            messages.append(Message("assistant", content, reasoning, tuple(calls)))
        reasoning, content, calls = "", "", []

    for i, item in enumerate(value):
        at = f"input[{i}]"
        kind = item.get("type", "message")
        role = item.get("role") if kind == "message" else None
        if kind == "reasoning":
            if content or calls:
                end_turn()
            reasoning += _parts(item.get("content") or item.get("summary"), f"{at}.content", ("reasoning_text", "summary_text"))
        elif kind == "function_call":
            function = {"name": _string(item, "name", at), "arguments": _string(item, "arguments", at)}
            calls.append({"id": _string(item, "call_id", at), "type": "function", "function": function})
        elif kind == "function_call_output":
            end_turn()
            messages.append(Message("tool", _parts(item.get("output"), f"{at}.output"), tool_call_id=_string(item, "call_id", at)))
        elif role == "assistant":
            if content or calls:
                end_turn()
            content = _parts(item.get("content"), f"{at}.content")
        elif role in ("user", "system", "developer"):
            end_turn()
            messages.append(Message("system" if role == "developer" else role, _parts(item.get("content"), f"{at}.content")))
        elif kind == "message":
            raise APIError(400, f"{at}.role: must be user, assistant, system or developer, is {role!r}", param=f"{at}.role")
        else:
            readable = "message, reasoning, function_call and function_call_output"
            raise APIError(400, f"{at}.type: {kind!r} cannot be read here, only {readable}", param=f"{at}.type")
    end_turn()
    return messages


def _merge_system(messages: list[Message]) -> list[Message]:
    """instructions and developer messages as one system turn: many templates have room for one only, at the beginning."""
    n = next((i for i, message in enumerate(messages) if message.role != "system"), len(messages))
    return [Message("system", "\n\n".join(m.content for m in messages[:n])), *messages[n:]] if n > 1 else messages


def _parts(content: Any, where: str, kinds: tuple[str, ...] = TEXT_PARTS) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise APIError(400, f"{where}: must be a string or a list of parts", param=where)
    check_parts(content, where, kinds)
    for j, part in enumerate(content):
        _string(part, "refusal" if part["type"] == "refusal" else "text", f"{where}[{j}]")
    return "".join(part["refusal" if part["type"] == "refusal" else "text"] for part in content)


def _string(item: dict[str, Any], name: str, where: str) -> str:
    if not isinstance(item.get(name), str):
        raise APIError(400, f"{where}.{name}: must be a string, is {item.get(name)!r:.80}", param=f"{where}.{name}")
    return item[name]


def _read_tools(tools: list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    """From the flat form to chat's."""
    for i, tool in enumerate(tools or []):
        if tool.get("type") != "function":
            at = f"tools[{i}].type"
            raise APIError(400, f"{at}: {tool.get('type')!r} does not run here, only function does", param=at)
    names = ("name", "description", "parameters", "strict")
    return read_tools([{"type": "function", "function": {n: tool[n] for n in names if tool.get(n) is not None}} for tool in tools or []])


def _read_format(format: dict[str, Any] | None) -> str | None:
    if format is not None and format.get("type") == "json_schema":
        format = {"type": "json_schema", "json_schema": {name: value for name, value in format.items() if name != "type"}}
    try:
        return grammar.from_response_format(format)
    except ValueError as error:
        raise refused(error, "text.format") from error
