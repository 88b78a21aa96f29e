"""A conversation with tools, kept as the tokens that were drawn.

The usual way, to append messages and render the conversation again, makes other tokens than the model drew: it writes a call's arguments
its own way, drops old reasoning, merges tokens across the seam. A policy gradient on those trains on what nobody sampled. Here a
conversation only grows: what the model drew stays, and what the template would write between its turn's end and its next turn is tokenised
alone and appended.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from jevons.data.chat import ChatTemplate, Message
from jevons.data.tokenizer import Tokenizer
from jevons.server.job import Reply
from jevons.server.parser import ReplyParser
from jevons.server.tool import detect_format


def template_of(tokenizer: Tokenizer) -> ChatTemplate:
    """The tokenizer's chat template, able to make the assistant speak. ValueError where it is not."""
    if tokenizer.template is None:
        raise ValueError("the tokenizer has no chat template, so problems cannot be asked; give the model folder a chat_template.jinja")
    if not tokenizer.template.has_generation_prompt():
        raise ValueError("the chat template has no generation prompt: with add_generation_prompt it must write what begins a reply")
    return tokenizer.template


def check_tools(tokenizer: Tokenizer) -> None:
    """ValueError for a chat template that does not tell the model of tools, or in which its calls would not be found."""
    template = template_of(tokenizer)
    probe = {"type": "function", "function": {"name": "probe", "description": "", "parameters": {"type": "object", "properties": {}}}}
    if '"probe"' not in template.render([Message("user", "Hi")], tools=[probe]):
        raise ValueError("the chat template does not write tools, so the model cannot know of them; give it another, or max_turns = 1")
    if detect_format(template.source) is None:
        raise ValueError("the chat template writes calls in a form that is not known here (server/tool.py has them); give max_turns = 1")


def prompt_ids(tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> list[int]:
    """A conversation as the model expects it, up to where its reply begins."""
    return tokenizer.encode(template_of(tokenizer).render(messages, tools=tools or None, add_generation_prompt=True))


def read_reply(tokenizer: Tokenizer, tokens: Sequence[int], *, opened: bool, tools: Sequence[dict[str, Any]]) -> Message:
    """A drawn turn as a message: reasoning, content and calls. `opened`: the prompt ended inside <think>."""
    template = tokenizer.template
    schemas = {tool["function"]["name"]: tool["function"].get("parameters", {}) for tool in tools}
    format = detect_format(template.source if template else None)
    parser = ReplyParser(tokenizer, Reply(thinking=opened, tools=format if tools else None, schemas=schemas))
    text = {"reasoning": "", "content": ""}
    calls: dict[int, dict[str, Any]] = {}
    for piece in [piece for token in tokens for piece in parser.push(token)] + parser.finish():
        if piece.kind != "call":
            text[piece.kind] += piece.text
            continue
        call = calls.setdefault(piece.call, {"id": f"call{piece.call:05d}", "type": "function", "function": {"name": "", "arguments": ""}})
        call["function"]["name"] += piece.name
        call["function"]["arguments"] += piece.text
    return Message("assistant", text["content"], text["reasoning"], tuple(calls.values()))


def arguments(call: dict[str, Any]) -> dict[str, Any] | None:
    """A call's arguments; None where they are no JSON object."""
    try:
        value = json.loads(call["function"]["arguments"] or "{}")
    except json.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None


def bridge(template: ChatTemplate, messages: Sequence[Message], reply: Message, results: Sequence[Message], tools: Any) -> str:
    """What the template writes from the end of the reply's last token on, up to where the next reply begins.

    Reasoning plays no part in that, and is what templates rewrite in older turns, so it is left out on both sides. ValueError for a
    template that rewrites older turns all the same.
    """
    plain = Message("assistant", reply.content, tool_calls=reply.tool_calls)
    before = template.render([*messages, plain], tools=tools)
    after = template.render([*messages, plain, *results], tools=tools, add_generation_prompt=True)
    if not after.startswith(before):
        raise ValueError("the chat template rewrites earlier turns when messages follow, so several turns cannot be learned from")
    end = template.turn_end
    at = before.rfind(end) if end else -1
    return (before[at + len(end) :] if at >= 0 else "") + after[len(before) :]
