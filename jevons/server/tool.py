"""Tool calls as models write them, read as they come.

    hermes        <tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>              Hermes, Qwen2.5, Qwen3, our own template
    qwen3_coder   <tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>
    deepseek_v3   <calls begin><call begin>function<sep>add\n```json\n{"a": 1}\n```<call end><calls end>              V3, R1
    deepseek_v31  <calls begin><call begin>add<sep>{"a": 1}<call end><calls end>                                     V3.1 and later

Every format is a pair of tags around a body; server/parser.py finds the tags, `CallReader` reads one body. The name is given out as soon as
it is sure that arguments follow, the arguments as they come: for the JSON formats the model's own characters, for qwen3_coder one parameter
at a time, since its values get their type from the tool's schema.

A body without a name that can be read is not a call: the caller shows it as text. What follows a name is the call's arguments even if it is
not JSON, since it cannot be taken back; clients are used to that.

Not done: calls written without their tags (small models do; tool_choice "required" makes them write the tags), several in one pair.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jevons.server.job import ToolFormat

DS_SEP = "<\uff5ctool\u2581sep\uff5c>"  # a full-width bar and a lower block: no one types it by accident
LONGEST_HEAD = 1024  # characters before the arguments, or of a parameter's tag: longer ones are not searched again and again


@dataclass(frozen=True)
class Syntax:
    """A format's tags, those around all calls, and what precedes the arguments in a body (its group is the name)."""

    open: str
    close: str
    head: re.Pattern[str]
    around: tuple[str, ...] = ()  # tags that carry no text of their own
    inside: tuple[str, ...] = ()  # tags that are part of a body


DS_OPEN, DS_CLOSE = "<\uff5ctool\u2581call\u2581begin\uff5c>", "<\uff5ctool\u2581call\u2581end\uff5c>"
DS_AROUND = ("<\uff5ctool\u2581calls\u2581begin\uff5c>", "<\uff5ctool\u2581calls\u2581end\uff5c>")
V3_HEAD = re.compile(rf"\s*\w+{DS_SEP}([^\n]+)\n\s*```(?:json)?\s*(?=\{{)")
V31_HEAD = re.compile(rf"\s*([^\n]+?){DS_SEP}\s*(?=\{{)")
HERMES_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)+")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
SYNTAX: dict[ToolFormat, Syntax] = {
    "hermes": Syntax("<tool_call>", "</tool_call>", HERMES_HEAD),
    "qwen3_coder": Syntax("<tool_call>", "</tool_call>", re.compile(r"\s*<function=([^>\n]+)>")),
    "deepseek_v3": Syntax(DS_OPEN, DS_CLOSE, V3_HEAD, DS_AROUND, (DS_SEP,)),
    "deepseek_v31": Syntax(DS_OPEN, DS_CLOSE, V31_HEAD, DS_AROUND, (DS_SEP,)),
}


def detect_format(template: str | None) -> ToolFormat | None:
    """The format in which a chat template writes the assistant's calls; None where it writes none that is known."""
    if template is None:
        return None
    if DS_OPEN in template:
        return "deepseek_v3" if "```json" in template else "deepseek_v31"
    if "<tool_call>" in template:
        return "qwen3_coder" if "<function=" in template else "hermes"
    return None


class CallReader:
    """One call's body. `name` is None until it is known; `push` and `close` return arguments, joined a JSON object's text."""

    def __init__(self, format: ToolFormat, schemas: Mapping[str, Any]) -> None:
        self.name: str | None = None
        self.raw = ""  # all of the body while the name is unknown
        self._format, self._schemas = format, schemas
        self._arguments: _Object | _Parameters = _Object()

    def push(self, text: str) -> str:
        if self.name is not None:
            return self._arguments.push(text)
        short = len(self.raw) <= LONGEST_HEAD
        self.raw += text
        head = SYNTAX[self._format].head.match(self.raw) if short else None
        if head is None or (name := self._read_name(head[1])) is None:
            return ""
        self.name = name
        if self._format == "qwen3_coder":
            self._arguments = _Parameters(self._schemas.get(name))
        return self._arguments.push(self.raw[head.end() :])

    def close(self) -> str:
        """What is still to be given out when the body ends. `name` stays None for a body that is no call."""
        if self.name is not None:
            return self._arguments.close()
        try:
            call = _json(self.raw) if self._format == "hermes" else {}
            arguments = call.get("arguments", call.get("parameters", {}))
            if isinstance(arguments, str):  # OpenAI's own form, which some models imitate
                arguments = _json(arguments)
            if isinstance(arguments, dict) and _is_text(call["name"]):
                text, self.name = json.dumps(arguments), call["name"]
                return text
        except MALFORMED:
            pass
        return ""

    def _read_name(self, text: str) -> str | None:
        try:
            name = _json(text) if self._format == "hermes" else text.strip()
        except MALFORMED:
            return None
        return name if _is_text(name) else None


class _Object:
    """Passes one JSON object on and drops what follows it."""

    def __init__(self) -> None:
        self._depth, self._quoted, self._escaped, self._ended = 0, False, False, False

    def push(self, text: str) -> str:
        if self._ended:
            return ""
        for i, c in enumerate(text):
            if self._quoted:
                if self._escaped:
                    self._escaped = False
                elif c == "\\":
                    self._escaped = True
                elif c == '"':
                    self._quoted = False
            elif c == '"':
                self._quoted = True
            elif c in "{[":
                self._depth += 1
            elif c in "]}":
                self._depth -= 1
                if self._depth == 0:
                    self._ended = True
                    return text[: i + 1]
        return text

    def close(self) -> str:
        return ""


class _Parameters:
    """Turns <parameter=KEY>VALUE</parameter>, repeated, into a JSON object's text, one parameter at a time."""

    OPEN = re.compile(r"<parameter=([^>\n]*)>")
    END = re.compile(r"</parameter>|(?=<parameter=)|(?=</function>)")  # the later two: a closing tag was forgotten

    def __init__(self, schema: Any) -> None:
        properties = schema.get("properties") if isinstance(schema, dict) else None
        self._properties = properties if isinstance(properties, dict) else {}
        self._text, self._searched, self._keys = "", 0, set[str]()

    def push(self, text: str) -> str:
        self._text += text
        parts: list[str] = []
        while opened := self.OPEN.search(self._text):
            # Only new text is searched, with room for a tag that was cut: a long value costs its length once
            end = self.END.search(self._text, max(opened.end(), self._searched - len("</parameter>")))
            if end is None:
                self._searched = len(self._text)
                return "".join(parts)
            parts.append(self._member(opened[1], self._text[opened.end() : end.start()]))
            self._text, self._searched = self._text[end.end() :], 0
        at = self._text.rfind("<parameter=")  # between parameters: all that may still matter is a tag that was cut
        self._text = self._text[at if at >= 0 else -len("<parameter=") :][:LONGEST_HEAD]
        return "".join(parts)

    def close(self) -> str:
        opened = self.OPEN.search(self._text)
        last = self._member(opened[1], self._text[opened.end() :]) if opened else ""
        return last + ("}" if self._keys else "{}")

    def _member(self, key: str, value: str) -> str:
        key = key.strip()
        if key in self._keys:  # JSON has no place for a second one
            return ""
        start = ", " if self._keys else "{"
        self._keys.add(key)
        value = value.removeprefix("\n").removesuffix("\n")  # the format's, not the value's
        return f"{start}{json.dumps(key)}: {_typed(value, self._properties.get(key))}"


TYPES: dict[type, set[str]] = {bool: {"boolean"}, int: {"integer", "number"}, float: {"number"}, str: {"string"}}
TYPES |= {dict: {"object"}, list: {"array"}, type(None): {"null"}}
PYTHON = {"True": "true", "False": "false", "None": "null"}  # models write these too


def _typed(text: str, schema: Any) -> str:
    """A value as JSON: what the schema wants if the text is that, else a string. Without a schema it is a string."""
    wanted = schema.get("type") if isinstance(schema, dict) else "string"
    wanted = set(wanted) if isinstance(wanted, list) else {wanted}  # {None}: anyOf and its like, anything goes
    try:
        value = _json(json_text := PYTHON.get(text.strip(), text.strip()))
    except MALFORMED:
        return json.dumps(text)
    if "string" in wanted and ("string" in TYPES[type(value)] or not TYPES[type(value)] & wanted):
        return json.dumps(text)
    return json_text


MALFORMED = (ValueError, TypeError, KeyError, AttributeError, RecursionError)  # a model's text may be anything


def _json(text: str) -> Any:
    return json.loads(text, parse_constant=_refuse)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _is_text(name: Any) -> bool:
    """Whether it is a name that can be sent: a lone surrogate, which JSON can write as an escape, cannot."""
    return isinstance(name, str) and bool(name.strip()) and not re.search("[\ud800-\udfff]", name)
