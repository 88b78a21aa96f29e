"""Messages into text and tokens, and a model's reply back into a message.

A Hugging Face chat template is a program that strangers wrote, so it runs in jinja2's immutable sandbox, its time and memory bounded
(data/sandbox.py), with the same few extras that transformers gives it. Training needs more than the text: which tokens are the assistant's.
Rendering turn by turn and adding up lengths fails on templates that drop old reasoning (R1, QwQ, Qwen3), and tokenising turn by turn yields
other tokens than the sampler saw. So the conversation is rendered whole, once, and every message is located by rendering again with that
message's text replaced: what the two have in common before and after is not its text. The whole text is tokenised once and the mask read
off the tokens' offsets.

Not done: parsing tool calls out of replies (server/tool.py does).
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser

from jevons.data.sandbox import MAX_SOURCE, BoundedEnvironment

if TYPE_CHECKING:
    from jevons.data.tokenizer import Tokenizer

THINK, END_THINK = "<think>", "</think>"

# ChatML with the reasoning kept in every turn, so that a conversation only ever grows at its end: the engine's cached prefix stays valid
# and reinforcement learning sees the tokens that were sampled. Tools are described in the first system turn.
DEFAULT_TEMPLATE = r"""
{%- if tools %}
    {{- '<|im_start|>system\n' + (messages[0].content + '\n\n' if messages[0].role == 'system' else '') }}
    {{- 'You may call these functions, each call as <tool_call>{"name": ..., "arguments": {...}}</tool_call>:' }}
    {%- for tool in tools %}
        {{- '\n' + (tool | tojson) }}
    {%- endfor %}
    {{- '<|im_end|>\n' }}
{%- endif %}
{%- for message in (messages[1:] if tools and messages[0].role == 'system' else messages) %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if message.role == 'assistant' and message.reasoning_content %}
        {{- '<think>' + message.reasoning_content + '</think>' }}
    {%- endif %}
    {{- message.content or '' }}
    {%- for tool_call in message.tool_calls or [] %}
        {%- set function = tool_call.function or tool_call %}
        {{- '<tool_call>{"name": ' + (function.name | tojson) + ', "arguments": ' + (function.arguments | tojson) + '}</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation. `tool_calls` have OpenAI's form, `{"id", "type", "function": {"name", "arguments"}}`."""

    role: str
    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[dict[str, Any], ...] = ()
    tool_call_id: str = ""  # role "tool": the call that this answers
    name: str = ""  # role "tool": the function that answered

    @classmethod
    def from_dict(cls, data: Any) -> Message:
        """Read a message as datasets and API clients write it. Raises ValueError that names the field."""
        if not isinstance(data, dict):
            raise ValueError(f"a message must be an object with role and content, is {type(data).__name__}")
        if not isinstance(data.get("role"), str) or not data["role"]:
            raise ValueError(f"role: must be a non-empty string, is {data.get('role')!r}")
        calls = data.get("tool_calls") or []
        if not isinstance(calls, list):
            raise ValueError(f"tool_calls: must be a list, is {type(calls).__name__}")
        for call in calls:
            function = (call.get("function") or call) if isinstance(call, dict) else None
            if not isinstance(function, dict) or not isinstance(function.get("name"), str):
                raise ValueError('tool_calls: each must be {"function": {"name": ..., "arguments": ...}}')
        reasoning = "reasoning_content" if data.get("reasoning_content") is not None else "reasoning"
        return cls(
            role=data["role"],
            content=_text(data.get("content"), "content"),
            reasoning=_text(data.get(reasoning), reasoning),
            tool_calls=tuple(calls),
            tool_call_id=_text(data.get("tool_call_id"), "tool_call_id"),
            name=_text(data.get("name"), "name"),
        )

    def to_dict(self) -> dict[str, Any]:
        """The form that templates read. Reasoning goes under both names in use; empty optional fields are absent."""
        data: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.reasoning:
            data |= {"reasoning": self.reasoning, "reasoning_content": self.reasoning}
        if self.tool_calls:
            data["tool_calls"] = [_with_parsed_arguments(call) for call in self.tool_calls]
        if self.tool_call_id:
            data["tool_call_id"] = self.tool_call_id
        if self.name:
            data["name"] = self.name
        return data


class ChatTemplate:
    """A compiled Hugging Face chat template.

    Raises ValueError for a source that does not compile; rendering raises ValueError where the template refuses its messages or the sandbox
    refuses the template.
    """

    def __init__(self, source: str, *, bos_token: str = "", eos_token: str = "", pad_token: str = "") -> None:
        self.source = source
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token, "pad_token": pad_token}
        if len(source) > MAX_SOURCE:
            raise ValueError(f"chat template: must be at most {MAX_SOURCE} characters, is {len(source)}")
        environment = BoundedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        environment.add_filter("tojson", _tojson)
        environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        try:
            self._template = environment.from_string(source)
        except TemplateSyntaxError as error:
            raise ValueError(f"chat template, line {error.lineno}: {error.message}") from error
        except (RecursionError, MemoryError, SyntaxError, ValueError) as error:  # of the Python that jinja makes of it
            raise ValueError(f"chat template: cannot be compiled: {error}") from error
        self._environment = environment

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> str:
        """The conversation as text. `variables` (such as enable_thinking) reach the template as they are."""
        context = self._tokens | {"messages": [m.to_dict() for m in messages], "tools": list(tools) if tools else None, "documents": None}
        self._environment.begin()
        try:
            return self._template.render(context | {"add_generation_prompt": add_generation_prompt} | variables)
        except Exception as error:  # a template is a stranger's program: it may divide by zero or recurse as well as refuse its messages
            raise ValueError(f"chat template: {error}") from error

    def encode(
        self, tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None = None
    ) -> tuple[list[int], list[int]]:
        """Token ids of the rendered conversation and, for each, 1 where the assistant wrote it.

        The ids are those of the plain rendering. A token belongs to the assistant if its text begins in `spans`.
        """
        text, spans = self.spans(messages, tools)
        inside = bytearray(len(text) + 1)
        for start, end in spans:
            inside[start:end] = b"\1" * (end - start)
        ids, offsets = tokenizer.encode_offsets(text)
        return ids, [inside[start] for start, _ in offsets]

    def spans(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None = None) -> tuple[str, list[tuple[int, int]]]:
        """The rendered conversation and the character ranges in it that the assistant wrote.

        A range holds what the model must produce after the generation prompt: reasoning with its tags (less an opening tag that the prompt
        already gives), content, tool calls, and the end-of-turn token; not the whitespace that templates write after that. Renders once a
        message.
        """
        text = self.render(messages, tools=tools)
        mark = next(c for c in map(chr, range(0xE000, 0xF900)) if c not in text)
        bounds = []  # of each message's own text: [begin, end)
        for i, message in enumerate(messages):
            marked = replace(message, content=mark, reasoning=mark if message.reasoning else "")
            other = self.render([*messages[:i], marked, *messages[i + 1 :]], tools=tools)
            begin = _common_prefix(text, other)
            bounds.append((begin, max(begin, len(text) - _common_prefix(text[::-1], other[::-1]))))
        header, turn_end, spans = self.generation_prompt, self.turn_end, []
        for i, (begin, end) in enumerate(bounds):
            if messages[i].role != "assistant" or begin == len(text):  # the second: a template that leaves this message out
                continue
            # Searching only between the neighbours' own texts: a user who types "<|im_start|>assistant" moves no boundary
            after = bounds[i - 1][1] if i else 0
            before = bounds[i + 1][0] if i + 1 < len(bounds) else len(text)
            # Templates that open <think> in the generation prompt leave it out of old turns, hence prefixes of the header
            found = (text.rfind(header[:n], after, begin) for n in range(len(header), 0, -1))
            at = next((at for at in found if at >= 0), -1)
            start = begin if at < 0 else at + _common_prefix(text[at : at + len(header)], header)
            stop = text.find(turn_end, end, before)
            spans.append((start, end if stop < 0 else stop + len(turn_end)))
        return text, spans

    @cached_property
    def generation_prompt(self) -> str:
        """What the template writes to make the assistant speak; "" if it has nothing of the kind."""
        question = [Message("user", "Hi")]
        plain, prompt = self.render(question), self.render(question, add_generation_prompt=True)
        return prompt[len(plain) :] if prompt.startswith(plain) else ""

    def has_generation_prompt(self) -> bool:
        return bool(self.generation_prompt)

    @cached_property
    def turn_end(self) -> str:
        """What ends an assistant's turn, usually one special token; "" for templates without."""
        return self.render([Message("user", "Hi"), Message("assistant", "\ue000")]).rpartition("\ue000")[2].rstrip()


def parse_reply(text: str, *, opened: bool = False) -> Message:
    """Split a reply into reasoning and content.

    opened: the prompt already ended in `<think>`. Only a tag that opens the reply counts, so an answer about the tag stays an answer.
    Reasoning that never ends leaves content empty. Nothing is stripped: with DEFAULT_TEMPLATE the message renders back to the same text.
    """
    if not opened and not text.lstrip().startswith(THINK):
        return Message("assistant", text)
    body = text.lstrip().removeprefix(THINK) if text.lstrip().startswith(THINK) else text
    reasoning, _, content = body.partition(END_THINK)
    return Message("assistant", content, reasoning)


class _Generation(Extension):
    """`{% generation %}` marks the assistant's text for transformers; here it is transparent, since `spans` needs no marks."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _text(value: Any, field: str) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        for part in value:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise ValueError(f'{field}: only parts {{"type": "text", "text": ...}} are understood, got {str(part)[:80]}')
        return "".join(part["text"] for part in value)
    raise ValueError(f"{field}: must be a string or a list of text parts, is {type(value).__name__}")


def _with_parsed_arguments(call: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's clients send arguments as a JSON string, templates expect the object (else `tojson` would quote it twice)."""
    inner = call.get("function") or call
    if not isinstance(inner.get("arguments"), str):
        return call
    try:
        inner = inner | {"arguments": json.loads(inner["arguments"])}
    except (ValueError, RecursionError):  # a model's malformed call in the history is shown to it as it was
        return call
    return call | {"function": inner} if "function" in call else inner


def _common_prefix(a: str, b: str) -> int:
    return bisect_left(range(min(len(a), len(b))), True, key=lambda n: a[: n + 1] != b[: n + 1])


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    """jinja2's own filter escapes HTML characters, which models were not trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
