"""An answer's tokens into reasoning, content and calls: what the parsers say of a stream is what is true of the whole."""

import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jevons.data.chat import DEFAULT_TEMPLATE, Message, parse_reply
from jevons.data.tokenizer import END_OF_TEXT, SPECIAL_TOKENS, TURN_END, Tokenizer, train_bpe
from jevons.server.job import Reply
from jevons.server.parser import ReplyParser, opens_thinking
from jevons.server.stop import StopFinder
from jevons.server.tool import DS_AROUND, DS_CLOSE, DS_OPEN, DS_SEP, LONGEST_HEAD, CallReader, detect_format

REAL = Path(os.environ.get("JEVONS_REAL_MODEL") or "absent")
TAGS = ("<tool_call>", "</tool_call>", DS_OPEN, DS_CLOSE, *DS_AROUND, DS_SEP)
CORPUS = [
    '{"name": "add", "arguments": {"a": 1}}',
    "<function=add>\n<parameter=a>\n1\n</parameter>",
    "think na\u00efve \u4f60\u597d\n\n",
] * 9
FORMATS = ("hermes", "qwen3_coder", "deepseek_v3", "deepseek_v31")
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}, "s": {"type": "string"}, "o": {"type": ["object", "null"]}}}


@pytest.fixture(scope="module", params=["tags are tokens", "tags are text"])
def tokenizer(request):
    tags = (*SPECIAL_TOKENS, *TAGS) if request.param == "tags are tokens" else (END_OF_TEXT, TURN_END)
    return train_bpe(CORPUS, 256 + len(tags) + 90, special_tokens=tags)


@pytest.fixture(scope="module")
def with_tokens():
    return train_bpe(CORPUS, 370, special_tokens=(*SPECIAL_TOKENS, *TAGS))


def read(tokenizer, ids, **reply):
    """(reasoning, content, [(name, arguments)]) and the parser; checks what holds of every answer."""
    parser = ReplyParser(tokenizer, Reply(**reply))
    kinds, streamed = [], []
    for id in ids:
        streamed.append(parser.push(id))
        kinds.append(parser.kind)
    streamed.append(parser.finish())
    said, calls = {"reasoning": "", "content": ""}, []
    for piece in (piece for pieces in streamed for piece in pieces):
        if piece.kind != "call":
            assert piece.text and not piece.name
            said[piece.kind] += piece.text
        elif piece.name:
            assert re.fullmatch(r"call_\w{24}", piece.id) and piece.call == len(calls) and not piece.text
            calls.append([piece.name, ""])
        else:
            assert piece.text and piece.call == len(calls) - 1
            calls[-1][1] += piece.text
    assert parser.calls == len(calls) and parser.reasoning_tokens == kinds.count("reasoning")
    assert not any(token in said["content"] + said["reasoning"] for token in (TURN_END, END_OF_TEXT))
    return said["reasoning"], said["content"], [tuple(call) for call in calls], parser


def answer(tokenizer, text, **reply):
    return read(tokenizer, tokenizer.encode(text), **reply)[:3]


def write_call(format, name, arguments):
    if format == "hermes":
        return "<tool_call>\n" + json.dumps({"name": name, "arguments": arguments}) + "\n</tool_call>"
    if format == "qwen3_coder":
        text = {k: v if isinstance(v, str) else json.dumps(v) for k, v in arguments.items()}
        body = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in text.items())
        return f"<tool_call>\n<function={name}>\n{body}</function>\n</tool_call>"
    if format == "deepseek_v3":
        return f"{DS_OPEN}function{DS_SEP}{name}\n```json\n{json.dumps(arguments)}\n```{DS_CLOSE}"
    return f"{DS_OPEN}{name}{DS_SEP}{json.dumps(arguments, ensure_ascii=False)}{DS_CLOSE}"


def write_calls(format, calls):
    text = "\n".join(write_call(format, *call) for call in calls)
    return DS_AROUND[0] + text + DS_AROUND[1] if calls and format.startswith("deepseek") else text


# --------------------------------------------------------------------------------------------------------------------
# thinking


def test_thinking_and_content(tokenizer):
    assert answer(tokenizer, "<think>\nhm \u4f60</think>\n\n\u597d\n<|im_end|>") == ("hm \u4f60", "\u597d\n", [])
    assert answer(tokenizer, "\nhm</think>\n\nyes", thinking=True) == ("hm", "yes", [])
    assert answer(tokenizer, "\n<think>\nhm</think>yes", thinking=True) == ("hm", "yes", [])  # a second opening tag, as R1 writes
    assert answer(tokenizer, "<think>\n\n</think>\n\nyes") == ("", "yes", [])
    assert answer(tokenizer, "  plain\n") == ("", "  plain\n", [])
    assert answer(tokenizer, " \n ") == ("", " \n ", [])
    assert answer(tokenizer, "<think>a</think>b", plain=True) == ("", "<think>a</think>b", [])


def test_thinking_that_never_ends_stays_reasoning(tokenizer):
    assert answer(tokenizer, "on and on<|im_end|>", thinking=True) == ("on and on", "", [])
    assert answer(tokenizer, "<think>on </thin<|endoftext|>") == ("on </thin", "", [])
    assert answer(tokenizer, "call <tool_call>{}</tool_call>?", thinking=True, tools="hermes")[1:] == ("", [])


def test_tags_out_of_place_are_text(with_tokens):
    ten = "<think>" * 10
    assert answer(with_tokens, "Here: " + ten) == ("", "Here: " + ten, [])
    assert answer(with_tokens, "<think>a</think>b</think><think>c") == ("a", "b</think><think>c", [])
    letters = [id for c in "<think>no</think>" for id in with_tokens.encode(c)]
    assert read(with_tokens, letters)[:2] == ("", "<think>no</think>")  # letters, not the token


def test_one_piece_never_mixes():
    text = train_bpe(["x</think>y"] * 50, 330, special_tokens=(END_OF_TEXT, TURN_END))
    text.raw.add_tokens(["x</think>y"])  # a token across the border
    pieces = ReplyParser(text, Reply(thinking=True)).push(text.raw.token_to_id("x</think>y"))
    assert [(piece.kind, piece.text) for piece in pieces] == [("reasoning", "x"), ("content", "y")]


def test_state_comes_from_the_prompt(tokenizer):
    for text, expected in {"a<think>": True, "a<think>\n": True, "<think>a": False, "<think></think>\n": False, "": False}.items():
        assert opens_thinking(tokenizer, tokenizer.encode(text)) is expected, text
    # after a tool's result the model speaks, it does not think, unless the template says so
    turns = [Message("user", "q"), Message("tool", "a </think>", name="f")]
    prompt = tokenizer.encode(tokenizer.template.render(turns, add_generation_prompt=True))
    assert not opens_thinking(tokenizer, prompt)
    assert answer(tokenizer, "It is 2.", thinking=opens_thinking(tokenizer, prompt)) == ("", "It is 2.", [])


@settings(max_examples=150, deadline=None)
@given(ids=st.lists(st.integers(0, 369)), thinking=st.booleans())
@example(ids=list(range(370)), thinking=False)
@example(ids=[312, 312], thinking=False)
@example(ids=[312, 312], thinking=True)
def test_any_tokens_split_like_the_whole(with_tokens, ids, thinking):
    reasoning, content, calls, parser = read(with_tokens, ids, thinking=thinking)
    think, end = with_tokens.encode("<think></think>")
    specials = {id for id, token in with_tokens.raw.get_added_tokens_decoder().items() if token.special}
    seen = [id for id in ids if id not in specials]
    blank = next((i for i, id in enumerate(seen) if id == think or with_tokens.decode(seen[: i + 1]).strip()), len(seen))
    if thinking or seen[blank : blank + 1] == [think]:
        if not thinking:
            seen = seen[blank + 1 :]
        while think in seen and not with_tokens.decode(seen[: seen.index(think)]).strip("\n"):  # opened again before any thought
            seen = seen[seen.index(think) + 1 :]
        cut = seen.index(end) if end in seen else len(seen)
        expected = with_tokens.decode(seen[:cut]).lstrip("\n"), with_tokens.decode(seen[cut + 1 :]).lstrip("\n")
    else:
        expected = "", with_tokens.decode(seen)
    assert (reasoning, content, calls) == (expected[0], expected[1] if expected[1].strip() or not parser.reasoning_tokens else "", [])


def test_agrees_with_parse_reply(tokenizer):
    for text in ("<think>a</think>b", "a", "a<think>b</think>", "<think>a"):
        whole = parse_reply(text)
        assert answer(tokenizer, text)[:2] == (whole.reasoning, whole.content)


def test_kinds(with_tokens):
    ids = with_tokens.encode('<think>a</think>b<tool_call>{"name": "f", "arguments": {}}</tool_call><|im_end|>')
    parser, kinds = ReplyParser(with_tokens, Reply(tools="hermes")), []
    for id in ids:
        parser.push(id)
        kinds.append(parser.kind)
    assert kinds == ["reasoning"] * 3 + ["content"] + ["call"] * (len(ids) - 5) + ["content"]


# --------------------------------------------------------------------------------------------------------------------
# tool calls

words = st.text("abc \u4f60\n", max_size=9)
values = st.fixed_dictionaries({}, optional={"a": st.integers(-99, 99), "s": st.text("ab\"\\{}\n\u4f60'", max_size=9)})
calls = st.lists(st.tuples(st.sampled_from(["add", "get_weather", "a-b.c"]), values), min_size=1, max_size=3)


@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=40, deadline=None)
@given(reasoning=words, content=words, calls=calls)
def test_written_calls_are_read_back(tokenizer, format, reasoning, content, calls):
    text = f"<think>\n{reasoning}</think>\n\n{content}{write_calls(format, calls)}\n<|im_end|>"
    names = {name: SCHEMA for name, _ in calls}
    got = answer(tokenizer, text, tools=format, schemas=names)
    assert got[0] == reasoning.lstrip("\n")
    assert got[1] == (content.lstrip("\n") if content.strip() else "")
    assert [(name, json.loads(arguments)) for name, arguments in got[2]] == calls


@pytest.mark.parametrize("format", FORMATS)
def test_calls_are_streamed(with_tokens, format):
    text = write_calls(format, [("add", {"s": "x" * 60, "a": 1})])
    parser = ReplyParser(with_tokens, Reply(tools=format, schemas={"add": SCHEMA}))
    pushed = [parser.push(id) for id in with_tokens.encode(text)]
    first = next(i for i, pieces in enumerate(pushed) if pieces)
    assert pushed[first][0].name == "add" and first < len(pushed) / 2
    assert sum(map(bool, pushed)) >= (3 if format == "qwen3_coder" else 10)


@pytest.mark.parametrize(
    "body",
    ["", "{", "hello", '{"name": 1, "arguments": {}}', '{"name": "f", "arguments": 5}', '{"arguments": {}}', "[" * 9999, "{" * 9999]
    + ['{"name": "\\ud800", "arguments": {}}', '{"name": "f", "arguments": "x"}', '{"name": ' + '"' * (2 * LONGEST_HEAD), "<function=>"],
)
@pytest.mark.parametrize("format", FORMATS)
def test_a_malformed_call_is_text(with_tokens, format, body):
    tags = (DS_OPEN, DS_CLOSE) if format.startswith("deepseek") else ("<tool_call>", "</tool_call>")
    for text in (f"a{tags[0]}{body}{tags[1]}", f"a{tags[0]}{body}"):
        assert answer(with_tokens, text, tools=format) == ("", text, [])


def test_unusual_calls(tokenizer):
    def hermes(body):
        return answer(tokenizer, f"<tool_call>{body}</tool_call>", tools="hermes")[2]

    assert hermes('{"arguments": {"a": 1}, "name": "f"}') == [("f", '{"a": 1}')]
    assert hermes('{"name": "f", "arguments": "{\\"a\\": 1}"}') == [("f", '{"a": 1}')]
    assert hermes('{"name": "f"}') == [("f", "{}")]
    assert hermes('{"name": "f", "parameters": {"a": "}"}, "id": 3}') == [("f", '{"a": "}"}')]
    assert hermes('{"name": "f", "arguments": {oops}}') == [("f", "{oops}")]  # cannot be taken back
    assert answer(tokenizer, '<tool_call>{"name": "f", "arguments": {"a": [1', tools="hermes")[2] == [("f", '{"a": [1')]  # cut by length
    twice = '<tool_call>{"name": "f", "arguments": {}}<tool_call>{"name": "g", "arguments": {}}</tool_call> and text'
    assert answer(tokenizer, twice, tools="hermes") == ("", " and text", [("f", "{}"), ("g", "{}")])


def test_coder_values_have_their_schemas_types(tokenizer):
    types = {
        "i": "integer",
        "n": "number",
        "b": "boolean",
        "s": "string",
        "l": "array",
        "sn": ["string", "null"],
        "si": ["string", "integer"],
    }
    f = {"f": {"properties": {key: {"type": kind} for key, kind in types.items()} | {"any": {"anyOf": []}}}}
    written = {"i": "7", "n": "1.5", "b": "True", "s": "7", "l": "[1]", "sn": "null", "si": "7", "any": "{}", "new": "7"}
    parsed = {"i": 7, "n": 1.5, "b": True, "s": "7", "l": [1], "sn": None, "si": 7, "any": {}, "new": "7"}
    for change in ({}, {"i": "x", "sn": "5"}, {"n": "NaN"}, {"l": "["}):
        text = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in (written | change).items())
        text = f"<tool_call><function=f>{text}</function></tool_call>"
        ((_, arguments),) = answer(tokenizer, text, tools="qwen3_coder", schemas=f)[2]
        assert json.loads(arguments) == parsed | change
    forgotten = "<tool_call><function=f><parameter=s>a\n<parameter=i>1</function></tool_call>"
    assert answer(tokenizer, forgotten, tools="qwen3_coder", schemas=f)[2] == [("f", '{"s": "a", "i": 1}')]


@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=60, deadline=None)
@given(
    data=st.lists(
        st.sampled_from(
            [*TAGS, "<think>", "</think>", "<function=f>", "<parameter=a>", "</parameter>", "</function>", '{"name": "f", "arguments": ']
            + ["{", "}", '"', "\\", "\n", "\nf\n```json\n", "x", "\u4f60", "\ufffd", "<", "tool_call>", " "]
        )
    )
)
def test_no_text_breaks_a_parser(tokenizer, format, data):
    reasoning, content, calls = answer(tokenizer, "".join(data), tools=format, schemas={"f": SCHEMA})
    assert len(reasoning + content) <= len("".join(data))
    for _, arguments in calls:
        arguments.encode()


def test_what_is_held_back_is_bounded():
    # else every token would be searched again with all before it, and one long answer would keep the server busy
    for body in ("x", "<parameter=", "<parameter=k", "\n"):
        reader = CallReader("qwen3_coder", {})
        assert reader.push("<function=f>") == "" and reader.name == "f"
        assert all(reader.push(body) == "" for _ in range(3000))
        assert len(reader._arguments._text) <= LONGEST_HEAD and reader.close() == "{}"
    reader = CallReader("qwen3_coder", {})
    value = [reader.push(text) for text in ["<function=f><parameter=k>", *["long "] * 3000, "</para", "meter>"]]
    assert json.loads(value[-1] + reader.close()) == {"k": "long " * 3000} and not any(value[:-1])


def test_formats_are_read_off_templates():
    assert detect_format(None) is None and detect_format("{{ messages[0].content }}") is None
    assert detect_format(DEFAULT_TEMPLATE) == "hermes"
    assert detect_format("<tool_call>\\n<function=' + name") == "qwen3_coder"
    assert detect_format(f"{DS_OPEN}' + type + '{DS_SEP}' + name + '\\n```json\\n") == "deepseek_v3"
    assert detect_format(f"{DS_OPEN}' + name + '{DS_SEP}' + arguments") == "deepseek_v31"


@pytest.mark.skipif(not REAL.exists(), reason="needs the real tokenizer")
def test_a_real_tokenizer():
    tokenizer = Tokenizer.load(REAL)
    assert detect_format(tokenizer.chat_template) == "hermes"
    calls = [("get_weather", {"city": "Z\u00fcrich \u4f60\u597d"}), ("add", {"a": 1, "b": [1, {"c": "}"}]})]
    text = "Let me see.\n" + write_calls("hermes", calls) + "<|im_end|>"
    _, content, read_back = answer(tokenizer, text, tools="hermes")
    assert content == "Let me see.\n" and [(name, json.loads(arguments)) for name, arguments in read_back] == calls
    # no <think> among its tokens: found in the text, however it was cut
    for thinking in (False, True):
        text = "<think>"[: 0 if thinking else None] + "\nHm, <b>.</b></think>\n\nYes <think>"
        assert answer(tokenizer, text, thinking=thinking) == ("Hm, <b>.</b>", "Yes <think>", [])
    assert opens_thinking(tokenizer, tokenizer.encode("<|im_start|>assistant\n<think>\n"))


# --------------------------------------------------------------------------------------------------------------------
# stop strings


@settings(max_examples=300, deadline=None)
@given(pieces=st.lists(st.text("abc", max_size=4)), stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=4))
@example(pieces=["a", "ab", "c"], stops=["abc"])
@example(pieces=["abc"], stops=["abcd", "bc", "c"])
def test_stop_strings_are_found_as_in_the_whole(pieces, stops):
    whole, finder, released, matched = "".join(pieces), StopFinder(stops), "", None
    for piece in pieces:
        text, matched = finder.push(piece)
        released += text
        if matched:
            break
        assert not any(whole.find(stop, 0, len(released)) >= 0 for stop in stops)
    ends = [(whole.find(stop) + len(stop), whole.find(stop), stop) for stop in stops if stop in whole]
    if ends:
        assert (released, matched) == (whole[: min(ends)[1]], min(ends)[2])
    else:
        assert (released + finder.flush(), matched) == (whole, None)
