"""Structured output: whatever is drawn under a mask is what was asked for, and a hostile grammar is refused or harmless."""

import json
import random
import re
import time
from enum import Enum

import jsonschema
import numpy as np
import pytest
import torch
from pydantic import BaseModel

from jevons.data.tokenizer import SPECIAL_TOKENS, train_bpe
from jevons.server import grammar
from jevons.server.grammar import GrammarFactory
from jevons.server.job import Reply
from jevons.server.parser import ReplyParser
from jevons.server.tool import DS_AROUND, DS_CLOSE, DS_OPEN, DS_SEP

TAGS = ("<tool_call>", "</tool_call>", DS_OPEN, DS_CLOSE, *DS_AROUND, DS_SEP)
FORMATS = ("hermes", "qwen3_coder", "deepseek_v3", "deepseek_v31")
SECONDS = 2.0


class Colour(Enum):
    RED = "red"
    BLUE = 'dark "blue"\n'


class Part(BaseModel):
    name: str
    colour: Colour
    count: int | None = None


class Order(BaseModel):
    id: int
    parts: list[Part]
    first: Part
    paid: bool
    note: str | None


SCHEMAS = [
    Order.model_json_schema(),
    {
        "type": "object",
        "properties": {"a": {"type": "number", "minimum": 0, "maximum": 9}},
        "required": ["a"],
        "additionalProperties": False,
    },
    {"type": "array", "items": {"enum": [1, "x", None, True]}, "minItems": 1, "maxItems": 3},
    {"type": "string", "pattern": "^[a-f]{2,5}$"},
    {"anyOf": [{"type": "integer", "multipleOf": 7}, {"const": "none"}]},
    {"$ref": "#/$defs/t", "$defs": {"t": {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#/$defs/t"}, {"type": "null"}]}}}}},
]
TOOLS = [
    {"type": "function", "function": {"name": "add", "parameters": SCHEMAS[0]}},
    {"type": "function", "function": {"name": "now"}},
    {
        "type": "function",
        "function": {
            "name": "find",
            "parameters": {
                "type": "object",
                "properties": {"q": {"type": "string"}, "n": {"type": "integer"}, "how": {"type": "string", "enum": ["fast", "slow"]}},
                "required": ["q"],
                "additionalProperties": False,
            },
        },
    },
]


@pytest.fixture(scope="module")
def factory():
    # more logits than ids, as published models have; the tags are of both kinds, special and not
    tokenizer = train_bpe(['{"name": "add", "a": [1, 2]}\n\n\n\nred <think>'] * 9, 360, special_tokens=(*SPECIAL_TOKENS, *TAGS))
    return GrammarFactory(tokenizer, tokenizer.size + 37, [tokenizer.eos_id, tokenizer.bos_id])


def allowed(factory, held):
    words = torch.zeros((factory.vocab_size + 31) // 32, dtype=torch.int32)
    if not held.mask(words):
        return None
    bits = np.unpackbits(words.numpy().view(np.uint8), bitorder="little")
    assert not bits[factory.tokenizer.size :].any()  # ids that no token has
    return np.flatnonzero(bits).tolist()


def draw(factory, held, seed, endings=('"', "}", "]"), limit=150):
    """Tokens drawn evenly among the allowed; past the limit, the stop token or what ends strings soonest. Without the stop token."""
    stops = [factory.tokenizer.eos_id, factory.tokenizer.bos_id]
    closings, closing = [factory.tokenizer.encode(text) for text in endings], []
    ids, chance = [], random.Random(seed)
    while not held.done:
        choices = set(allowed(factory, held))
        if len(ids) > limit:
            closing = closing or next((ids for ids in [stops[:1], *closings] if ids[0] in choices), [])
        token = closing[0] if closing and closing[0] in choices else chance.choice(sorted(choices))
        closing = closing[1:]
        held.accept(token)
        if token in stops:
            assert held.done
            break
        ids.append(token)
        assert len(ids) < 3000
    return ids


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: str(schema.get("title") or schema)[:30])
def test_drawn_json_is_valid(factory, schema):
    source = grammar.from_response_format({"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
    for seed in range(8):
        text = factory.tokenizer.decode(draw(factory, factory.compile(source, Reply(), may_think=False), seed))
        jsonschema.validate(json.loads(text), schema)
    if schema is SCHEMAS[0]:
        Order.model_validate_json(text)


def test_other_grammars(factory):
    ask = {
        grammar.json_object(): lambda text: isinstance(json.loads(text), dict),
        grammar.regex(r"[a-c]+\d{2}(x|yz)?"): re.compile(r"[a-c]+\d{2}(x|yz)?").fullmatch,
        grammar.choice(["yes", "no\n", 'a "b" \\ \u4f60']): lambda text: text in ("yes", "no\n", 'a "b" \\ \u4f60'),
        grammar.grammar('start: "(" X ")"\nX: /[xy]{1,3}/'): re.compile(r"\([xy]{1,3}\)").fullmatch,
        grammar.grammar('root ::= "(" [xy]+ ")"'): re.compile(r"\([xy]+\)").fullmatch,
    }
    for source, holds in ask.items():
        texts = [factory.tokenizer.decode(draw(factory, factory.compile(source, Reply(plain=True)), seed)) for seed in range(8)]
        assert all(holds(text) for text in texts), texts
        assert len(set(texts)) > 1


def test_json_begins_after_thinking(factory):
    tokenizer = factory.tokenizer
    think, end = tokenizer.encode("<think></think>")
    breaks, nonsense = tokenizer.encode("\n\n"), tokenizer.encode("well")
    braces = set(allowed(factory, factory.compile(grammar.json_object(), Reply(), may_think=False)))
    source = grammar.json_object()
    assert len(breaks) == 1 and all(tokenizer.decode([id])[0] == "{" for id in braces)
    for opened in (True, False):
        held = factory.compile(source, Reply(thinking=opened))
        if not opened:
            assert set(allowed(factory, held)) == {think, *braces}
            held.accept(think)
        for token in nonsense:
            assert allowed(factory, held) is None and not held.done
            held.accept(token)
        held.accept(end)
        assert set(allowed(factory, held)) == {*braces, *factory.breaks}
        held.accept(breaks[0])
        assert set(allowed(factory, held)) == braces
        ids = [end, *breaks, *draw(factory, held, 1)]
        parser = ReplyParser(tokenizer, Reply(thinking=True))
        pieces = [piece for id in ids for piece in parser.push(id)] + parser.finish()
        assert isinstance(json.loads("".join(piece.text for piece in pieces)), dict) and {piece.kind for piece in pieces} == {"content"}


def test_thinking_in_letters():
    # a tokenizer without the tags: the end of thinking is found in the text
    tokenizer = train_bpe(["ab"] * 9, 270, special_tokens=SPECIAL_TOKENS[:3])
    factory = GrammarFactory(tokenizer, tokenizer.size, [tokenizer.eos_id])
    held = factory.compile(grammar.choice(["x"]), Reply(thinking=True))
    for id in tokenizer.encode("a <b></think>"):
        assert allowed(factory, held) is None
        held.accept(id)
    assert set(allowed(factory, held)) == {*tokenizer.encode("x"), *factory.breaks}


def test_a_clone_is_its_own(factory):
    first = factory.compile(grammar.choice(["ab", "cd"]), Reply(), may_think=False)
    other = first.clone()
    first.accept(factory.tokenizer.encode("c")[0])
    assert len(allowed(factory, other)) > len(allowed(factory, first))


@pytest.mark.parametrize("format", FORMATS)
def test_forced_calls_are_calls(factory, format):
    schemas = {tool["function"]["name"]: tool["function"].get("parameters", {}) for tool in TOOLS}

    def read(ids):
        parser = ReplyParser(factory.tokenizer, Reply(tools=format, schemas=schemas))
        pieces = [piece for id in ids for piece in parser.push(id)] + parser.finish()
        calls = [[piece.name, ""] for piece in pieces if piece.name]
        for piece in pieces:
            if piece.kind == "call":
                calls[piece.call][1] += piece.text
        for name, arguments in calls:
            jsonschema.validate(json.loads(arguments), schemas[name])
        return calls, "".join(piece.text for piece in pieces if piece.kind == "content")

    endings = ("\n</parameter>\n",) if format == "qwen3_coder" else ('"', "}", "]")
    counts, names = set(), set()
    source = grammar.tool_calls(factory.tokenizer, format, TOOLS, required=True)
    for seed in range(10):
        calls, text = read(draw(factory, factory.compile(source, Reply(tools=format), may_think=False), seed, endings))
        assert calls and not text
        counts.add(len(calls))
        names |= {name for name, _ in calls}
    assert len(counts) > 1 and names == set(schemas)
    for seed in range(3):
        source = grammar.tool_calls(factory.tokenizer, format, TOOLS, required=False, name="find", parallel=False)
        calls, text = read(draw(factory, factory.compile(source, Reply(tools=format), may_think=False), seed, endings))
        assert [name for name, _ in calls] == ["find"] and not text
    # free text, but a call that is begun is one of these
    source = grammar.tool_calls(factory.tokenizer, format, TOOLS[1:2], required=False)
    held = factory.compile(source, Reply(tools=format), may_think=False)
    opening = factory.tokenizer.encode(DS_AROUND[0] if format.startswith("deepseek") else "<tool_call>")
    for id in [*factory.tokenizer.encode("hi"), *opening]:
        assert {id, factory.tokenizer.eos_id} <= set(allowed(factory, held))
        held.accept(id)
    calls, _ = read([*opening, *draw(factory, held, 0)])
    assert {name for name, _ in calls} == {"now"}


def nested(depth):
    schema = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def doubling(keyword, depth=25):
    refs = {f"d{i}": {keyword: [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(depth)}
    return {"$ref": "#/$defs/d0", "$defs": refs | {f"d{depth}": {"type": "string"}}}


HOSTILE = {
    "deep": nested(400),
    "long string": {"type": "string", "minLength": 10**9},
    "long array": {"type": "array", "items": {"type": "integer"}, "minItems": 10**9},
    "large enum": {"enum": [f"value{i}" for i in range(4000)]},
    "many properties": {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(2000)}},
    "anyOf": doubling("anyOf"),
    "allOf": doubling("allOf"),
    "oneOf": doubling("oneOf"),
    "cross product": {"allOf": [{"anyOf": [{"properties": {f"k{i}{j}": {"type": "string"}}} for j in range(8)]} for i in range(8)]},
    "itself": {"$ref": "#"},
    "remote": {"$ref": "http://localhost:1/schema"},
    "pattern": {"type": "string", "pattern": "^((a+)+)+$"},
    "pattern's states": {"type": "string", "pattern": "^(.*a.{200}){20}$"},
    "pattern's repeats": {"type": "string", "pattern": "^((a{0,1000}){0,1000}){0,1000}$"},
    "multiple": {"type": "integer", "multipleOf": 999_983},
    "multiples": {"allOf": [{"type": "integer", "multipleOf": 97}, {"multipleOf": 89}, {"multipleOf": 83}]},
    "tiny multiple": {"type": "number", "multipleOf": 1e-300},
}
HOSTILE_GRAMMARS = {
    "ambiguous": 'start: a\na: a a | "a" |',
    "rules": "\n".join(["start: r0", *(f"r{i}: r{i + 1} r{i + 1} | r{i + 1}" for i in range(2000)), 'r2000: "a" |']),
    "terminals": "\n".join(["start: A0", *(f"A{i}: A{i + 1} A{i + 1}" for i in range(40)), 'A40: "a"']),
    "parentheses": "start: " + "(" * 20_000 + '"a"' + ")" * 20_000,
    "difference": "start: A\nA: /(.*a.{30})/ & ~/(.*b.{30})/",
    "gbnf": "\n" * 60_000 + 'root ::= "a"',
    "deep gbnf": "root ::= " + "(" * 3000 + '"a"' + ")" * 3000,
    "hidden multiple": 'start: %json {"type": "integer", "\\u006dultipleOf": 999983}',
}


@pytest.mark.parametrize("name", [*HOSTILE, *HOSTILE_GRAMMARS])
def test_hostile_grammars_end_soon(factory, name):
    start = time.process_time()
    try:
        source = grammar.json_schema(HOSTILE[name]) if name in HOSTILE else grammar.grammar(HOSTILE_GRAMMARS[name])
        held = factory.compile(source, Reply(), may_think=False)
        chance = random.Random(0)
        for _ in range(50):
            if held.done:
                break
            held.accept(chance.choice(allowed(factory, held)))
    except ValueError as error:
        assert str(error)
    assert time.process_time() - start < SECONDS


def test_errors_say_what_is_wrong(factory):
    def fails(match, make):
        with pytest.raises(ValueError, match=match):
            factory.compile(make(), Reply())

    fails("65536 bytes, is 7", lambda: grammar.json_schema({"const": "x" * 70_000}))
    fails("look-ahead", lambda: grammar.regex("(?=a)b"))
    fails('unknown name: "b"', lambda: grammar.grammar("start: b"))
    fails("unsatisfiable", lambda: grammar.json_schema({"type": "object", "properties": {"a": False}, "required": ["a"]}))
    fails("choice", lambda: grammar.choice([]))
    fails("multipleOf", lambda: grammar.json_schema({"multipleOf": "x"}))
    fails("must be a JSON schema", lambda: grammar.json_schema([1]))
    fails("response_format: type", lambda: grammar.from_response_format({"type": "xml"}))
    fails("response_format: json_schema", lambda: grammar.from_response_format({"type": "json_schema"}))
    fails("no tool is named 'x'", lambda: grammar.tool_calls(factory.tokenizer, "hermes", TOOLS, required=True, name="x"))
    fails("a name must be", lambda: grammar.tool_calls(factory.tokenizer, "hermes", [{"name": 'a"b'}], required=True))
    fails("at least one tool", lambda: grammar.tool_calls(factory.tokenizer, "hermes", [], required=True))
    assert grammar.from_response_format(None) is None and grammar.from_response_format({"type": "text"}) is None
