"""From messages, tools and wishes about thinking to one Job: what chat, responses and Anthropic's messages have in common.

An endpoint reads its own fields into a `Conversation`; `to_job` renders the model's template and settles what depends on the model: whether
it thinks, how it writes tool calls, how much room is left. Wishes about thinking are made true rather than passed on and hoped for: where
the template has no switch, the prompt is primed with `<think>` or the opened tag is closed again.

Not done: images and other media, and tools that run on the server.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from anyio import to_thread

from jevons.data.chat import END_THINK, THINK, Message
from jevons.data.tokenizer import Tokenizer
from jevons.engine.sequence import SamplingParams, ThinkingBudget
from jevons.server import grammar
from jevons.server.error import APIError
from jevons.server.job import Job, Reply, ToolFormat
from jevons.server.parser import opens_thinking
from jevons.server.tool import detect_format

if TYPE_CHECKING:
    from jevons.server.service import Service

ToolChoice = Literal["none", "auto", "required"]

# DeepSeek's three levels, under the names that others use for them; "none" is OpenAI's for not thinking at all.
EFFORTS = {"none": "none", "minimal": "low", "low": "low", "medium": "high", "high": "high", "xhigh": "high", "max": "max", "ultra": "max"}
LOW_EFFORT_TOKENS = 1024  # the thinking budget of effort low; high and max leave the length to the model
BAN = -100.0  # added to a logit
LONG_TEXT = 1 << 14  # characters from which on rendering would hold up the event loop
LINE_AFTER_THINK = re.compile(rf"{THINK}(\\n|\n)")  # in a template's source, written in a string of it or as it is
RESERVED = ("messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token", "pad_token")


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """A chat request without its endpoint's dialect. `tools` have OpenAI's chat form; `grammar` is a source of server/grammar.py.

    thinking None leaves it to the template. `tool_name` is the one function that must be called; tool_choice is then "required".
    `prefix`: the last message is the assistant's, and the reply goes on from its end.
    """

    messages: Sequence[Message]
    tools: Sequence[dict[str, Any]] = ()
    tool_choice: ToolChoice = "auto"
    tool_name: str | None = None
    parallel: bool = True
    thinking: bool | None = None
    thinking_budget: int | None = None
    min_thinking: int | None = None
    effort: str | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    prefix: bool = False
    grammar: str | None = None


async def to_job(
    service: Service, conversation: Conversation, params: Mapping[str, Any], *, n: int = 1, stop: Sequence[str] = (), tenant: str = ""
) -> Job:
    """The engine's view of a conversation. `params` are SamplingParams' fields, None meaning the default; max_tokens' is all that fits.

    Raises APIError that names the field.
    """
    limits = service.limits
    if not 1 <= n <= limits.max_n:
        raise APIError(400, f"n: must be between 1 and {limits.max_n}, is {n}", param="n")
    _check_count("stop", stop, limits.max_stop)
    if any(len(text) > limits.max_stop_length for text in stop):
        raise APIError(400, f"stop: a string may have {limits.max_stop_length} characters at most", param="stop")
    prompt, thinking = await encode(service, conversation)
    longest = min(limits.max_prompt_tokens, service.engine_loop.max_length - 1)
    if len(prompt) > longest:
        message = f"messages: {len(prompt):,} tokens with the chat template, but at most {longest:,} fit; shorten the conversation"
        raise APIError(400, message, param="messages", code="context_length_exceeded")
    fields = {name: value for name, value in params.items() if value is not None}
    may_think = _wants_thinking(conversation) is not False
    if not may_think and (tag := service.tokenizer.raw.token_to_id(THINK)) is not None:  # a prompt without the tag does not keep it out
        fields["logit_bias"] = (*fields.get("logit_bias", ()), (tag, BAN))
    room = service.engine_loop.max_length - len(prompt)
    most = min(fields.get("max_tokens", limits.default_max_tokens or room), room)
    try:
        bounds = _budget(service.tokenizer, conversation, thinking)
        drawing = SamplingParams(**fields | {"max_tokens": most, "thinking": bounds})
    except ValueError as error:
        raise refused(error) from error
    tool_format = detect_format(service.tokenizer.chat_template) if _offered(conversation) else None
    schemas = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in conversation.tools}
    return Job(
        prompt=tuple(prompt),
        params=drawing,
        n=n,
        stop=tuple(stop),
        reply=Reply(thinking=thinking, may_think=may_think, tools=tool_format, schemas=schemas if tool_format else {}),
        grammar=_grammar(service.tokenizer, conversation, tool_format),
        tenant=tenant,
    )


async def encode(service: Service, conversation: Conversation) -> tuple[list[int], bool]:
    """The prompt's ids, and whether the reply begins inside of thinking."""
    _check_count("messages", conversation.messages, service.limits.max_messages)
    _check_count("tools", conversation.tools, service.limits.max_tools)
    size = sum(len(m.content) + len(m.reasoning) for m in conversation.messages) + len(str(conversation.tools))
    try:
        if size > LONG_TEXT:
            return await to_thread.run_sync(_encode, service.tokenizer, conversation)
        return _encode(service.tokenizer, conversation)
    except ValueError as error:
        raise refused(error, "messages") from error


def _check_count(name: str, values: Sequence[Any], most: int) -> None:
    if len(values) > most:
        raise APIError(400, f"{name}: at most {most}, are {len(values)}", param=name)


def _offered(conversation: Conversation) -> bool:
    return bool(conversation.tools) and conversation.tool_choice != "none"


def _encode(tokenizer: Tokenizer, conversation: Conversation) -> tuple[list[int], bool]:
    template = tokenizer.template
    if template is None:
        raise ValueError("this model has no chat template; send text to /v1/completions")
    messages, last = list(conversation.messages), None
    if not messages:
        raise ValueError("must hold at least one message")
    if conversation.prefix:
        last = messages.pop()
        if last.role != "assistant" or last.tool_calls:
            raise ValueError("prefix: only a last message of role assistant, without tool_calls, can be continued")
    variables = dict(conversation.template_kwargs)
    if taken := sorted(variables.keys() & set(RESERVED)):
        raise APIError(400, f"chat_template_kwargs: {taken[0]} cannot be set here", param="chat_template_kwargs")
    wanted = _wants_thinking(conversation)
    if wanted is not None:
        variables = {"enable_thinking": wanted, "thinking": wanted} | variables  # Qwen3's name and DeepSeek-V3.1's
    if conversation.effort is not None:
        variables = {"reasoning_effort": _effort(conversation.effort)} | variables
    tools = conversation.tools if _offered(conversation) else None
    text = template.render(messages, tools=tools, add_generation_prompt=True, **variables)
    opened = text.rstrip().endswith(THINK)
    # the line breaks that models of this template were trained on
    opening, closing = (f"{THINK}\n", f"\n{END_THINK}\n\n") if LINE_AFTER_THINK.search(template.source) else (THINK, END_THINK)
    if last is not None and last.reasoning:
        text += ("" if opened else opening) + last.reasoning + (closing if last.content else "")
        opened = not last.content
    elif opened and (wanted is False or (last is not None and last.content)):
        text, opened = text + closing, False
    elif not opened and _primed(tokenizer, conversation) and not (last is not None and last.content):
        text, opened = text + opening, True
    prompt = tokenizer.encode(text + (last.content if last is not None else ""))
    return prompt, opened if last is not None and last.reasoning else opens_thinking(tokenizer, prompt)


def _effort(effort: str) -> str:
    if effort not in EFFORTS:
        raise APIError(400, f"reasoning_effort: {effort!r} is none of {', '.join(EFFORTS)}", param="reasoning_effort")
    return EFFORTS[effort]


def _wants_thinking(conversation: Conversation) -> bool | None:
    if conversation.thinking is None and conversation.effort is not None and _effort(conversation.effort) == "none":
        return False
    return conversation.thinking


def _primed(tokenizer: Tokenizer, conversation: Conversation) -> bool:
    """Whether to open `<think>` for a model that would else decide itself: where it was asked for. Models without the tag never think."""
    asked = conversation.thinking or bool(conversation.min_thinking)
    return asked and _wants_thinking(conversation) is not False and _thinks(tokenizer)


def _thinks(tokenizer: Tokenizer) -> bool:
    return tokenizer.raw.token_to_id(END_THINK) is not None


def _budget(tokenizer: Tokenizer, conversation: Conversation, opened: bool) -> ThinkingBudget | None:
    """The bounds on thinking, counted from where the prompt or the model opens it."""
    most, least = conversation.thinking_budget, conversation.min_thinking or 0
    if most is None and conversation.effort is not None and _effort(conversation.effort) == "low":
        most = max(LOW_EFFORT_TOKENS, least)
    if (most is None and not least) or not (opened or _thinks(tokenizer)) or _wants_thinking(conversation) is False:
        return None
    start = () if opened else tuple(tokenizer.encode(THINK))
    return ThinkingBudget(max_tokens=most, min_tokens=least, end_ids=tuple(tokenizer.encode(END_THINK)), start_ids=start)


def _grammar(tokenizer: Tokenizer, conversation: Conversation, tool_format: ToolFormat | None) -> str | None:
    if not _offered(conversation):
        return conversation.grammar
    if tool_format is None:
        raise APIError(400, "tools: this model's chat template has no tool calls that can be read", param="tools")
    required = conversation.tool_choice == "required"
    strict = any(tool["function"].get("strict") for tool in conversation.tools)
    if required or ((strict or not conversation.parallel) and conversation.grammar is None):
        tools = [tool if required or tool["function"].get("strict") else _loose(tool) for tool in conversation.tools]
        one = conversation.tool_name  # a function that is named is called once, as with OpenAI
        try:
            return grammar.tool_calls(
                tokenizer, tool_format, tools, required=required, name=one, parallel=conversation.parallel and one is None
            )
        except ValueError as error:
            raise refused(error, "tools") from error
    if conversation.grammar is not None:
        message = "response_format: with tools on offer the reply cannot be held to a format; send tool_choice none or no tools"
        raise APIError(400, message, param="response_format")
    return None


def _loose(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool whose arguments may be any object, as those not marked strict."""
    return tool | {"function": tool["function"] | {"parameters": {"type": "object"}}}


def read_messages(value: Any, where: str = "messages") -> list[Message]:
    """OpenAI's messages. Raises APIError that names the message and its field; developer is another name for system."""
    if not isinstance(value, list) or not value:
        raise APIError(400, f"{where}: must be a list of at least one message", param=where)
    messages = []
    for i, data in enumerate(value):
        if isinstance(data, dict):
            check_parts(data.get("content"), f"{where}[{i}].content")
            data = data | {"role": "system"} if data.get("role") == "developer" else data
        try:
            message = Message.from_dict(data)
        except ValueError as error:
            name = str(error).partition(":")[0]
            at = f"{where}[{i}].{name}" if name.isidentifier() else f"{where}[{i}]"
            raise APIError(400, f"{where}[{i}]{'.' if name.isidentifier() else ': '}{error}", param=at) from error
        if message.role not in ("system", "user", "assistant", "tool"):
            at = f"{where}[{i}].role"
            raise APIError(400, f"{at}: must be system, developer, user, assistant or tool, is {message.role!r}", param=at)
        messages.append(message)
    return messages


def check_parts(content: Any, where: str, kinds: Sequence[str] = ("text",)) -> None:
    """Refuse parts of a message that are not text, by name."""
    for j, part in enumerate(content if isinstance(content, list) else []):
        at = f"{where}[{j}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in kinds:
            raise APIError(400, f"{at}: a part of type {kind!r} cannot be read; this model reads {', '.join(kinds)} only", param=at)


def read_tools(value: Any, where: str = "tools") -> list[dict[str, Any]]:
    """OpenAI chat's tools, checked as far as templates and grammars rely on them."""
    if value is None:
        return []
    if not isinstance(value, list):
        raise APIError(400, f"{where}: must be a list", param=where)
    names = set()
    for i, tool in enumerate(value):
        at = f"{where}[{i}]"
        if not isinstance(tool, dict) or tool.get("type") != "function" or not isinstance(tool.get("function"), dict):
            raise APIError(400, f'{at}: must be {{"type": "function", "function": {{"name": ...}}}}; other tools do not run here', param=at)
        name, parameters = tool["function"].get("name"), tool["function"].get("parameters")
        if not isinstance(name, str) or not name or name in names:
            raise APIError(400, f"{at}.function.name: must be a string of its own, is {name!r}", param=f"{at}.function.name")
        if parameters is not None and not isinstance(parameters, dict):
            raise APIError(400, f"{at}.function.parameters: must be a JSON schema", param=f"{at}.function.parameters")
        names.add(name)
    return value


def read_tool_choice(value: Any, tools: Sequence[dict[str, Any]]) -> tuple[ToolChoice, str | None]:
    """OpenAI chat's tool_choice: how tools are to be used, and the one function that was named."""
    if value is None or value in ("none", "auto"):
        return value or "auto", None
    names = [tool["function"]["name"] for tool in tools]
    if value == "required":
        name = None
    else:
        inner = value.get("function") if isinstance(value, dict) and value.get("type") == "function" else None
        name = inner.get("name") if isinstance(inner, dict) else None
        if name not in names:
            known = ", ".join(names) or "none given"
            message = f"tool_choice: must be none, auto, required or a function of tools ({known}), is {str(value)[:80]}"
            raise APIError(400, message, param="tool_choice")
    if not names:
        raise APIError(400, "tool_choice: required, but no tools are given", param="tool_choice")
    return "required", name


def read_stop(value: Any, where: str = "stop") -> tuple[str, ...]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise APIError(400, f"{where}: must be a string or a list of strings, none empty", param=where)
    return tuple(stops)


def refused(error: ValueError, where: str | None = None) -> APIError:
    """A 400 from a ValueError, whose message begins with the field's name where there is one."""
    message, name = str(error), str(error).partition(":")[0]
    if where is not None and not message.startswith(where):
        message = f"{where}: {message}"
    return APIError(400, message, param=where or (name if name.isidentifier() else None))
