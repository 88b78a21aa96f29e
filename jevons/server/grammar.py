"""Structured output: what a client asks for, as a grammar that llguidance compiles, and as a mask over tokens that the engine draws under.

A grammar travels as llguidance's JSON (Job.grammar), made by the functions here from response_format, a regex, a list of choices, a grammar
or a list of tools. `GrammarFactory.compile` makes of it what the engine asks for each token. It holds from the end of thinking on: a model
that thinks does so freely, and the JSON begins after </think> and the line breaks that models write there.

Grammars are strangers' programs. llguidance bounds its own work (expressions, states, items a step) and fetches nothing. What it does not
bound is refused before: `multipleOf` with a large common multiple, which becomes that many states, and long GBNF, whose converter is
quadratic. White space between JSON's parts is bounded, or a model could write nothing else until its tokens are spent.

Not done: rolling back (speculative drafts need it; the engine does not draft under a grammar), and forced calls where the client asks for
several formats at once.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterator, Sequence
from fractions import Fraction
from typing import Any

import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import any_to_lark
from torch import Tensor

from jevons.data.chat import THINK
from jevons.data.tokenizer import Tokenizer
from jevons.server.job import Reply, ToolFormat
from jevons.server.parser import ReplyParser, added_token
from jevons.server.tool import DS_AROUND, DS_SEP, SYNTAX

WHITESPACE = {"whitespace_pattern": r"[ \n\t\r]{0,40}"}
MAX_MULTIPLE = 10_000  # of all multipleOf in a schema
MAX_GBNF = 8_000  # characters
TOOL_NAME = re.compile(r"[\w.:/-]{1,128}", re.ASCII)


def json_object() -> str:
    return json_schema({"type": "object"})


def json_schema(schema: Any) -> str:
    _check_multiples(schema)
    return _source(json_schema=_with_options(schema))


def from_response_format(value: Any) -> str | None:
    """OpenAI's response_format; None where it asks for text. A schema is held to whether strict is true or not."""
    kind = value.get("type") if isinstance(value, dict) else value
    if kind is None or kind == "text":
        return None
    if kind == "json_object":
        return json_object()
    if kind != "json_schema":
        raise ValueError(f"response_format: type must be text, json_object or json_schema, is {str(kind)[:80]!r}")
    wrapped = value.get("json_schema")
    if not isinstance(wrapped, dict) or "schema" not in wrapped:
        raise ValueError('response_format: json_schema must be {"name": ..., "schema": {...}}')
    return json_schema(wrapped["schema"])


def regex(pattern: str) -> str:
    return LLMatcher.grammar_from_regex(pattern)


def choice(options: Sequence[str]) -> str:
    if not options or not all(isinstance(option, str) and option for option in options):
        raise ValueError("choice: must be a list of at least one non-empty string")
    return _lark("start: " + " | ".join(_quoted(option) for option in options))


def grammar(text: str) -> str:
    """Lark as llguidance understands it, or GBNF (llama.cpp's), which has a rule `root ::=`."""
    if "multipleOf" in re.sub(r"\\u([0-9a-fA-F]{4})", lambda code: chr(int(code[1], 16)), text):
        raise ValueError("grammar: multipleOf is not allowed in a %json inside a grammar; send the schema as response_format")
    if "::=" not in text:
        return _lark(text)
    if len(text) > MAX_GBNF:
        raise ValueError(f"grammar: GBNF must be at most {MAX_GBNF} characters, is {len(text)}; write it in Lark's form")
    try:
        return _lark(any_to_lark(text))
    except Exception as error:  # the converter raises bare Exceptions
        raise ValueError(f"grammar: {str(error)[:300]}") from error


# --------------------------------------------------------------------------------------------------------------------
# tools


def tool_calls(
    tokenizer: Tokenizer,
    format: ToolFormat,
    tools: Sequence[dict[str, Any]],
    *,
    required: bool,
    name: str | None = None,
    parallel: bool = True,
) -> str:
    """Calls of these tools (OpenAI's form) by their schemas.

    required, or a name: the reply is calls and nothing else. Otherwise it is text, and a call that is begun is held to its tool.
    """
    functions = [tool.get("function") or tool for tool in tools]
    if name is not None:
        functions = [function for function in functions if function.get("name") == name]
        if not functions:
            raise ValueError(f"tool_choice: no tool is named {str(name)[:80]!r}")
    if not functions:
        raise ValueError("tools: must hold at least one tool where a call is asked for")

    def tag(text: str) -> str:
        id = added_token(tokenizer, text)
        return _quoted(text) if id is None else f"<[{id}]>"

    rules: list[str] = []
    for i, function in enumerate(functions):
        called, schema = function.get("name"), function.get("parameters") or {"type": "object", "properties": {}}
        if not isinstance(called, str) or not TOOL_NAME.fullmatch(called):
            raise ValueError(f"tools: a name must be up to 128 letters, digits and _.:/-, is {str(called)[:80]!r}")
        if not isinstance(schema, dict) or schema.get("type", "object") != "object":
            raise ValueError(f"tools: the parameters of {called} must be a JSON schema of type object")
        _check_multiples(schema)
        rules += _body(format, f"body{i}", called, {"type": "object"} | schema, tag)
    syntax = SYNTAX[format]
    rules.append("body: " + " | ".join(f"body{i}" for i in range(len(functions))))
    rules.append(f"call: {tag(syntax.open)} body {tag(syntax.close)}")
    first, last = (tag(text) for text in DS_AROUND) if syntax.around else ('""', '""')
    more = r" (/\n?/ call)*" if parallel else ""
    calls = f"{first} call{more} {last}"
    if required or name is not None:
        rules.append(f"start: {calls}")
    elif added_token(tokenizer, syntax.open) is None:
        # tags in letters: text without one, or text up to the first and calls from there on
        begin = DS_AROUND[0] if syntax.around else syntax.open
        rest = f"call{more} {last}" if syntax.around else f"body {tag(syntax.close)}{more}"
        rules += [
            f"start: TEXT | head {rest}",
            f"TEXT: /(.|\\n)*/ & ~/(.|\\n)*{begin}(.|\\n)*/",
            f"head[suffix={_quoted(begin)}]: /(.|\\n)*/",
        ]
    else:
        rules += [f"start: TEXT ({calls})?", r"TEXT: /(.|\n)*/"]  # no special token is part of a text
    return _lark("\n".join(rules))


def _body(format: ToolFormat, rule: str, name: str, schema: dict[str, Any], tag: Any) -> list[str]:
    """Lark rules for what stands between the tags of a call."""
    arguments = f"%json {json.dumps(_with_options(schema))}"
    if format == "hermes":
        head = '{"name": ' + json.dumps(name) + ', "arguments": '
        return [f'{rule}: /\\n?/ {_quoted(head)} {arguments} "}}" /\\n?/']
    if format == "deepseek_v31":
        return [f"{rule}: {_quoted(name)} {tag(DS_SEP)} {arguments}"]
    if format == "deepseek_v3":
        return [f'{rule}: "function" {tag(DS_SEP)} {_quoted(name + chr(10) + "```json" + chr(10))} {arguments} {_quoted(chr(10) + "```")}']
    rules, members = [], []
    required = schema.get("required") or []
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    for i, (key, kind) in enumerate((schema.get("properties") or {}).items()):
        if not re.fullmatch(r"[^<>\n]+", key):
            raise ValueError(f"tools: {name} has a parameter that this format cannot write, {key[:80]!r}")
        kind = kind if isinstance(kind, dict) else {}
        begin, end = _quoted(f"<parameter={key}>\n"), _quoted("\n</parameter>\n")
        value = f"%json {json.dumps(_with_options(kind | shared))} {end}"
        if kind.get("type") == "string" and isinstance(kind.get("enum"), list):
            value = "(" + " | ".join(_quoted(str(option)) for option in kind["enum"]) + f") {end}"
        elif kind.get("type") == "string":
            rules.append(f"{rule}_{i}[suffix={end}]: /(.|\\n)*/")
            value = f"{rule}_{i}"
        members.append(f"({begin} {value})" + ("" if key in required else "?"))
    begin = _quoted(f"\n<function={name}>\n")
    return [f"{rule}: {begin} {' '.join(members)} {_quoted('</function>' + chr(10))}", *rules]


# --------------------------------------------------------------------------------------------------------------------
# the engine's side


class GrammarFactory:
    """Compiles sources for one tokenizer. W is the width of the model's logits, which may be more than the tokenizer's ids."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_ids: Collection[int], *, max_bytes: int = 65_536) -> None:
        self.tokenizer, self.vocab_size, self.max_bytes = tokenizer, vocab_size, max_bytes
        self._raw = LLTokenizer(tokenizer.raw.to_str(), n_vocab=vocab_size, eos_token=sorted(stop_ids) or None)
        self._limits = LLParserLimits(
            initial_lexer_fuel=500_000,
            step_lexer_fuel=100_000,
            step_max_items=10_000,
            max_grammar_size=200_000,
            max_lexer_states=20_000,
            verbose_errors=False,
        )
        self.think = added_token(tokenizer, THINK)
        breaks = {text: tokenizer.encode(text) for text in ("\n", "\n\n")}
        self.breaks = frozenset(ids[0] for text, ids in breaks.items() if len(ids) == 1 and tokenizer.decode(ids) == text)

    def compile(self, source: str, reply: Reply, *, may_think: bool = True) -> ThinkingGrammar:
        """Raises ValueError for a source that is too long, malformed, unsatisfiable or too complex.

        may_think: an answer that does not begin inside <think> may open it. llguidance lets other threads run meanwhile.
        """
        if (size := len(source.encode())) > self.max_bytes:
            raise ValueError(f"grammar: must be at most {self.max_bytes} bytes, is {size}")
        matcher = LLMatcher(self._raw, source, log_level=0, limits=self._limits)
        if not matcher.is_error():
            matcher.compute_bitmask()  # some limits show only now
        if matcher.is_error():
            raise ValueError(f"grammar: {matcher.get_error().partition('<state>')[0].strip()[:500]}")
        return ThinkingGrammar(self, matcher, reply, may_think)

    def bits(self, ids: Collection[int]) -> Tensor:
        words = torch.zeros((self.vocab_size + 31) // 32, dtype=torch.int64)
        for id in ids:
            words[id // 32] |= 1 << id % 32
        return words.to(torch.uint32).view(torch.int32)


class ThinkingGrammar:
    """The grammar of one answer: nothing until its thinking is over, then `matcher`. The engine's `Grammar` protocol."""

    def __init__(self, factory: GrammarFactory, matcher: LLMatcher, reply: Reply, may_think: bool) -> None:
        self._factory, self._matcher, self._reply = factory, matcher, reply
        self._parser = ReplyParser(factory.tokenizer, reply)
        self._active = reply.plain or not reply.thinking
        # What else may be drawn now: <think> first, one line break after </think>
        self._free: frozenset[int] = frozenset()
        if self._active and may_think and not reply.plain and factory.think is not None:
            self._free = frozenset([factory.think])

    def mask(self, words: Tensor) -> bool:
        if not self._active:
            return False
        assert words.dtype == torch.int32 and words.is_contiguous() and words.device.type == "cpu"
        self._matcher.unsafe_compute_mask_ptr(words.data_ptr(), words.numel() * 4)
        if self._free:
            words |= self._factory.bits(self._free)
        return True

    def accept(self, token: int) -> None:
        if not self._active:
            text = "".join(piece.text for piece in self._parser.push(token) if piece.kind == "content")
            if not self._parser.thinking:
                self._active, self._free = True, self._factory.breaks
                if text.strip():  # </think> was written in letters and its last token had more
                    self._matcher.try_consume_tokens(self._factory.tokenizer.encode(text))
            return
        free, self._free = self._free, frozenset()
        if token in free and self._matcher.validate_tokens([token]) == 0:
            if token == self._factory.think:
                self._active = False
                self._parser.push(token)
        else:
            self._matcher.consume_token(token)

    @property
    def done(self) -> bool:
        """Only the end is left; also where a limit of llguidance ended the grammar, since nothing can be said about what may follow."""
        return self._active and self._matcher.is_stopped()

    def clone(self) -> ThinkingGrammar:
        """The same grammar for another answer; nothing may have been accepted yet."""
        other = ThinkingGrammar(self._factory, self._matcher.deep_copy(), self._reply, bool(self._free))
        return other


# --------------------------------------------------------------------------------------------------------------------


def _source(**one: Any) -> str:
    return json.dumps({"grammars": [one]})


def _lark(text: str) -> str:
    return _source(lark_grammar=text)


def _quoted(text: str) -> str:
    """A literal of Lark, which are JSON's."""
    return json.dumps(text, ensure_ascii=False)


def _with_options(schema: Any) -> Any:
    return schema | {"x-guidance": WHITESPACE} if isinstance(schema, dict) else schema


def _check_multiples(schema: Any) -> None:
    if not isinstance(schema, (dict, bool)):
        raise ValueError(f"schema: must be a JSON schema, an object, is {type(schema).__name__}")
    values = list(_multiples(schema))
    if all(isinstance(value, (int, float)) and 1e-6 <= value <= MAX_MULTIPLE for value in values):
        fractions = [Fraction(str(value)) for value in values]
        scale = math.lcm(*(fraction.denominator for fraction in fractions))  # 0.01 and 3 are 1 and 300 hundredths
        if math.lcm(*(int(fraction * scale) for fraction in fractions)) <= MAX_MULTIPLE:
            return
    raise ValueError(f"schema: multipleOf must be at least 1e-6, and the common multiple of all of them at most {MAX_MULTIPLE}")


def _multiples(schema: Any) -> Iterator[Any]:
    stack = [schema]
    while stack:
        node = stack.pop()
        if isinstance(node, dict) and "multipleOf" in node and not isinstance(node["multipleOf"], (dict, list)):
            yield node["multipleOf"]
        stack += node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
