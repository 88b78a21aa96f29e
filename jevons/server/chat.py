"""POST /v1/chat/completions: OpenAI's chat with DeepSeek's thinking, context caching, chat prefix and usage.

Reads a request into a `Conversation` and writes what comes as one object or as chunks. DeepSeek's base URLs have no /v1, so the same
endpoint is at /chat/completions and, for prefix completion, at /beta/chat/completions.

Not done: media, OpenAI's server-side tools and storage.
"""

# no `from __future__ import annotations`: FastAPI could not read annotations that name a function's arguments

from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from typing import Annotated, Any, ClassVar, Literal

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field, WithJsonSchema

from jevons.server import grammar
from jevons.server.chunk import Choice, failure
from jevons.server.conversation import Conversation, read_messages, read_tool_choice, read_tools, refused, to_job
from jevons.server.document import WORK, list_of, object_of, responses
from jevons.server.error import APIError
from jevons.server.field import Body, Sampling, at_most, usage
from jevons.server.job import Job
from jevons.server.service import ModelAlias, Service
from jevons.server.stream import attended, data, stream
from jevons.server.ticket import Ticket
from jevons.server.vocabulary import Vocabulary

PATHS = ("/v1/chat/completions", "/chat/completions", "/beta/chat/completions", "/beta/v1/chat/completions")


def shaped(**schema: Any) -> WithJsonSchema:
    """A field that is read by code with better error messages than a union of models gives."""
    return WithJsonSchema(schema)


PART = object_of(["type", "text"], type={"const": "text"}, text="string")
CALL = object_of(["function"], id="string", type={"const": "function"}, function=object_of(["name"], name="string", arguments="string"))
TOOL = object_of(
    ["type", "function"],
    type={"const": "function"},
    function=object_of(["name"], name="string", description={}, parameters={}, strict={}),
)
CHOICE = object_of(type={"const": "function"}, function=object_of(name="string"))


class ChatMessage(Body):
    ignored: ClassVar[Mapping[str, str]] = {
        "refusal": "an echoed reply's field",
        "annotations": "an echoed reply's field",
        "audio": "an echoed reply's field",
        "parsed": "an echoed reply's field of openai's parse()",
        "function_call": "an echoed reply's field; replaced by tool_calls",
        "reasoning_details": "an echoed reply's field of other servers",
        "provider_specific_fields": "an echoed reply's field of LiteLLM",
    }
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[Any, shaped(anyOf=[{"type": "string"}, list_of(PART), {"type": "null"}])] = None
    name: str | None = None
    tool_calls: Annotated[Any, shaped(anyOf=[list_of(CALL), {"type": "null"}])] = None
    tool_call_id: str | None = None
    reasoning_content: str | None = Field(None, description="Thinking of an earlier reply; may be left out")
    reasoning: str | None = Field(None, description="The same under another name")
    prefix: bool | None = Field(None, description="Of a last assistant message: go on from its end")


class Thinking(Body):
    """`budget_tokens` is a maximum: past it the thinking is ended. Up to `min_tokens` it is not allowed to end."""

    type: Literal["enabled", "disabled"]
    budget_tokens: int | None = Field(None, ge=1)
    min_tokens: int | None = Field(None, ge=0)


class ChatBody(Sampling):
    ignored: ClassVar[Mapping[str, str]] = {
        "store": "nothing is stored",
        "metadata": "belongs to store",
        "service_tier": "there is one tier",
        "modalities": "replies are text",
        "audio": "replies are text",
        "prediction": "drafting is the engine's own affair",
        "verbosity": "no switch for it in open models",
        "prompt_cache_key": "every prompt is cached by its content",
        "prompt_cache_options": "every prompt is cached by its content",
        "prompt_cache_retention": "blocks stay until the room is needed",
        "safety_identifier": "see user_id",
        "web_search_options": "no tools run on the server",
        "moderation": "nothing is moderated",
        "functions": "replaced by tools",
        "function_call": "replaced by tool_choice",
    }
    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, description="As max_tokens, and comes first; thinking counts")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0)
    tools: Annotated[Any, shaped(anyOf=[list_of(TOOL), {"type": "null"}])] = None
    tool_choice: Annotated[Any, shaped(anyOf=[{"enum": ["none", "auto", "required", None]}, CHOICE])] = None
    parallel_tool_calls: bool | None = None
    response_format: Annotated[Any, shaped(anyOf=[object_of(["type"], type="string"), {"type": "null"}])] = Field(
        None, description="text, json_object or json_schema"
    )
    thinking: Thinking | None = None
    reasoning_effort: str | None = Field(None, description="none, minimal, low, medium, high, xhigh, max or ultra")
    chat_template_kwargs: dict[str, Any] | None = None

    def conversation(self, service: Service, alias: ModelAlias | None) -> Conversation:
        limits = service.limits
        at_most("messages", len(self.messages), limits.max_messages)
        prefix = bool(self.messages[-1].prefix)
        if wrong := [i for i, m in enumerate(self.messages[:-1]) if m.prefix]:
            at = f"messages[{wrong[0]}].prefix"
            raise APIError(400, f"{at}: only the last message can be continued", param=at)
        tools = read_tools(self.tools)
        at_most("tools", len(tools), limits.max_tools)
        choice, name = read_tool_choice(self.tool_choice, tools)
        wanted = self.thinking
        return Conversation(
            messages=read_messages([m.model_dump(exclude_none=True, exclude={"prefix"}) for m in self.messages]),
            tools=tools,
            tool_choice=choice,
            tool_name=name,
            parallel=self.parallel_tool_calls is not False,
            thinking=self._thinks(alias),
            thinking_budget=wanted.budget_tokens if wanted else None,
            min_thinking=wanted.min_tokens if wanted else None,
            effort=self.reasoning_effort,
            template_kwargs=self.chat_template_kwargs or {},
            prefix=prefix,
            grammar=self._grammar(),
        )

    def _thinks(self, alias: ModelAlias | None) -> bool | None:
        """Whether to think: as the request says, in whichever field, else as the model's name says, else as the template does."""
        if self.thinking is not None:
            return self.thinking.type == "enabled"
        for key in ("enable_thinking", "thinking"):
            if isinstance(value := (self.chat_template_kwargs or {}).get(key), bool):
                return value
        if self.reasoning_effort == "none":
            return False
        return alias.thinking if alias is not None else None

    def _grammar(self) -> str | None:
        try:
            source = grammar.from_response_format(self.response_format)
        except ValueError as error:
            raise refused(error, "response_format") from error
        if self.structured_outputs is None:
            return source
        if source is not None:
            raise APIError(400, "structured_outputs: response_format says another form", param="structured_outputs")
        return self.structured_outputs.source()

    def top(self, service: Service) -> int | None:
        """How many alternatives to show, None for no log-probabilities."""
        if not self.logprobs:
            if self.top_logprobs:
                raise APIError(400, "top_logprobs: needs logprobs: true", param="top_logprobs")
            return None
        most = service.limits.max_logprobs
        if self.top_logprobs and (self.top_logprobs > most or self.logprobs_mode == "sampled"):
            what = f"at most {most}" if self.top_logprobs > most else "the alternatives are the model's own; leave it out with sampled"
            raise APIError(400, f"top_logprobs: {what}", param="top_logprobs")
        return self.top_logprobs or 0


def router(service: Service, admit: Callable[..., Any]) -> APIRouter:
    api = APIRouter(tags=["chat"])
    vocabulary = Vocabulary(service.tokenizer)

    async def chat_completions(request: Request, body: ChatBody, ticket: Annotated[Ticket, Depends(admit)]) -> Response:
        alias = body.enter(service, ticket)
        top = body.top(service)
        drawing = body.drawing(service) | {"logprobs": top}
        if body.max_completion_tokens is not None:
            drawing["max_tokens"] = body.max_completion_tokens
        job = await to_job(
            service, body.conversation(service, alias), drawing, n=body.n or 1, stop=body.stops(service.limits), tenant=ticket.tenant
        )
        stop_ids = service.engine_loop.engine.stop_ids | set(job.params.stop_ids)
        choices = [
            Choice(j, vocabulary, stop_ids=stop_ids, opened=job.reply.thinking, top=top, sampled=body.logprobs_mode == "sampled")
            for j in range(job.n)
        ]
        head = body.head(ticket, "chatcmpl", "chat.completion")
        if body.stream:
            frames = _frames(service, job, ticket, choices, head | {"object": "chat.completion.chunk"}, body.wants_usage)
            return await stream(request, frames, failure=lambda error: data(failure(error)), keep_alive=service.limits.keep_alive)
        return JSONResponse(await attended(request, _whole(service, job, ticket, choices, head)))

    reply = object_of(id="string", object="string", created="integer", model="string", choices=list_of("object"), usage="object")
    for path in PATHS:
        api.post(path, responses=responses(reply, *WORK, stream=True), response_model=None, include_in_schema=path == PATHS[0])(
            chat_completions
        )
    return api


async def _whole(service: Service, job: Job, ticket: Ticket, choices: list[Choice], head: dict[str, Any]) -> dict[str, Any]:
    async with aclosing(service.answer([job], ticket)) as updates:
        async for update in updates:
            choices[update.choice].take(update)
    return head | {"choices": [choice.whole() for choice in choices], "usage": usage(ticket)}


async def _frames(
    service: Service, job: Job, ticket: Ticket, choices: list[Choice], head: dict[str, Any], wants_usage: bool
) -> AsyncGenerator[str, None]:
    """Chunks, then one with the usage and no choice if it was asked for, then the end mark."""
    blank = {"usage": None} if wants_usage else {}
    async with aclosing(service.answer([job], ticket)) as updates:
        async for update in updates:
            for chunk in choices[update.choice].chunks(update):
                yield data(head | {"choices": [chunk]} | blank)
    if wants_usage:
        yield data(head | {"choices": [], "usage": usage(ticket)})
    yield "data: [DONE]\n\n"
