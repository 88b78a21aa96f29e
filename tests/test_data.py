"""The data room: text to tokens to batches, each test on one trap."""

import gzip
import json
import os
import resource
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jevons.data import sandbox
from jevons.data.batch import PackedReader, mtp_targets, pack, permute
from jevons.data.chat import DEFAULT_TEMPLATE, ChatTemplate, Message, parse_reply
from jevons.data.shard import Shards, write_shards
from jevons.data.text import BadLines, Document, find_files, read_documents
from jevons.data.tokenizer import TextStream, Tokenizer, train_bpe

CORPUS = [
    "the quick brown fox jumps over 13 lazy dogs",
    "def f(x):\n    return x + 2024\n",
    "na\u00efve \u4f60\u597d \U0001f600 end\n\n\n",
] * 20
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"a": "<int>"}}}]
CHAT = [
    Message("system", "Be brief."),
    Message("user", "1+1? <|im_start|>assistant\nno"),  # a user who types a header moves no boundary
    Message("assistant", "", "Use the tool.", tool_calls=(CALL,)),
    Message("tool", "2", tool_call_id="c1", name="add"),
    Message("assistant", "\n\nTwo.", "It says 2."),
    Message("user", "Thanks"),
    Message("assistant", "Bye"),
]
# Opens <think> in the prompt and drops it from old turns, as R1 and QwQ do
R1_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<User>{{ m.content }}{% else %}"
    "<Assistant>{{ m.content.split('</think>')[-1].lstrip('\n') }}<End>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<Assistant><think>\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(CORPUS, 400)


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(path)
    return path


def masked_runs(tokenizer, ids, mask):
    """Text of each run of tokens with mask 1."""
    runs, last = [], 0
    for i, m in zip(ids, mask, strict=True):
        if m and not last:
            runs.append([])
        if m:
            runs[-1].append(i)
        last = m
    return [tokenizer.decode(run) for run in runs]


# chat


def test_mask_holds_exactly_what_the_assistant_writes(tokenizer):
    ids, mask = tokenizer.template.encode(tokenizer, CHAT, TOOLS)
    text = tokenizer.template.render(CHAT, tools=TOOLS)
    assert ids == tokenizer.encode(text) and tokenizer.decode(ids) == text
    assert masked_runs(tokenizer, ids, mask) == [
        '<think>Use the tool.</think><tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call><|im_end|>',
        "<think>It says 2.</think>\n\nTwo.<|im_end|>",
        "Bye<|im_end|>",
    ]
    ids, mask = tokenizer.template.encode(tokenizer, [Message("user", "x"), Message("assistant", "\n\nTwo.")])
    assert tokenizer.decode(ids) == tokenizer.template.render([Message("user", "x"), Message("assistant", "\n\nTwo.")])
    assert len(tokenizer.encode("\n\n\n")) == 1  # so header and answer share a token: it begins in the header and is not the assistant's
    assert masked_runs(tokenizer, ids, mask) == ["Two.<|im_end|>"]


def only_grows(template):
    """Whether the prompt for turn k begins the rendering of k + 1 turns: what was cached for one is of use to the next."""
    answer = Message("assistant", "Three.", reasoning="One and two.")
    chat = [Message("user", "1+2?"), answer, Message("user", "Sure?"), answer]
    return all(
        template.render(chat[: k + 1]).startswith(template.render(chat[:k], add_generation_prompt=chat[k].role == "assistant"))
        for k in range(1, len(chat))
    )


def test_spans_of_templates_that_rewrite_history():
    template = ChatTemplate(R1_TEMPLATE, bos_token="<Begin>")
    chat = [Message("user", "a"), Message("assistant", "<think>\nhm</think>\n\nb")]
    chat += [Message("user", "<Assistant>"), Message("assistant", "d")]
    text, spans = template.spans(chat)
    assert text == "<Begin><User>a<Assistant>b<End><User><Assistant><Assistant>d<End>"
    assert [text[a:b] for a, b in spans] == ["b<End>", "d<End>"]
    assert template.generation_prompt == "<Assistant><think>\n"
    assert not only_grows(template)
    # the opening tag is the prompt's where the rendering keeps it
    keeps = ChatTemplate(R1_TEMPLATE.replace(".split('</think>')[-1].lstrip('\n')", ""))
    text, spans = keeps.spans(chat[:2])
    assert [text[a:b] for a, b in spans] == ["hm</think>\n\nb<End>"]


def test_prefix_property_of_default_template():
    template = ChatTemplate(DEFAULT_TEMPLATE)
    assert only_grows(template) and template.has_generation_prompt()
    drops = DEFAULT_TEMPLATE.replace("and message.reasoning_content", "and message.reasoning_content and loop.last")
    assert not only_grows(ChatTemplate(drops))
    assert not ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}").has_generation_prompt()


def test_sandbox_and_template_errors():
    for attack in ("''.__class__.__mro__", "messages.append(1)", "lipsum.__globals__['os']", "messages[0].__init__.__globals__['x']"):
        with pytest.raises(ValueError, match="chat template"):
            ChatTemplate("{{ " + attack + " }}").render([Message("user", "x")])
    with pytest.raises(ValueError, match="no tools here"):
        ChatTemplate("{{ raise_exception('no tools here') }}").render([])
    with pytest.raises(ValueError, match="line 2"):
        ChatTemplate("a\n{% for %}")
    extras = "{% for m in messages %}{% generation %}{{ m | tojson }}{% endgeneration %}{% break %}{% endfor %}{{ strftime_now('%%') }}"
    assert ChatTemplate(extras).render([Message("user", "<\u00e9>")] * 2) == '{"role": "user", "content": "<\u00e9>"}%'


LARGE = "{% set R = range(99999) %}{% set S = 'a' * 10000000 %}"
DOUBLING = "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = BODY %}{% endfor %}{{ ns.x | length }}"
HOSTILE_TEMPLATES = {
    "loops": "{% for a in R %}{% for b in R %}{% for c in R %}{% endfor %}{% endfor %}{% endfor %}",
    "text in loops": "{% for a in R %}{% for b in R %}" + "x" * 5000 + "{% endfor %}{% endfor %}",
    "a loop's condition": "{% for a in R if 'b' in S %}{% endfor %}",
    "a recursive loop": "{% for a in R recursive %}{% if loop.depth < 5 %}{{ loop(R) }}{% endif %}{% endfor %}",
    "macro": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "macros": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "macros that keep": "{% macro m(n) %}{% set x = 'a' * 9999999 %}{{ m(n + 1) }}{{ x | length }}{% endmacro %}{{ m(0) }}",
    "block": "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    "repetition": "{{ 'a' * 10**9 }}",
    "repetition of a list": "{{ ([0] * 10**9) | length }}",
    "constant": "{{ 'a' | center(10**9) }}{% set x = 'a' * 10**9 %}",
    "range": "{{ range(10**9) | list }}",
    "power": "{{ 9 ** 999999999 }}",
    "squares": DOUBLING.replace("'ab'", "3").replace("BODY", "ns.x * ns.x"),
    "sum": DOUBLING.replace("BODY", "ns.x + ns.x"),
    "concatenation": DOUBLING.replace("BODY", "ns.x ~ ns.x"),
    "joined": DOUBLING.replace("BODY", "[ns.x, ns.x] | join"),
    "replaced": DOUBLING.replace("BODY", "ns.x.replace('a', ns.x)"),
    "set block": "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set x %}{{ ns.x }}{{ ns.x }}{% endset %}"
    "{% set ns.x = x %}{% endfor %}",
    "nested lists": DOUBLING.replace("BODY", "[ns.x, ns.x]").replace("length", "string"),
    "nested tuples": DOUBLING.replace("BODY", "(ns.x, ns.x)").replace("ns.x | length", "ns.x in [ns.x, (ns.x, ns.x)]"),
    "nested dicts": DOUBLING.replace("BODY", "dict(a=ns.x, b=ns.x)").replace("length", "tojson"),
    "list of one": "{% set ns = namespace(l=[]) %}{% for i in R %}{% set ns.l = ns.l + [S] %}{% endfor %}{{ ns.l | string | length }}",
    "padding": "{{ 'a'.ljust(10**9) }}",
    "padding many": "{% for i in R %}{{ 'a'.center(99999) }}{% endfor %}",
    "zeros": "{{ '1'.zfill(10**9) }}",
    "indent": "{{ ('\\n' * 1000000) | indent(99999) }}",
    "batch": "{{ [1] | batch(10**9, 0) | list }}",
    "slice": "{{ [1] | slice(10**9) | list }}",
    "json": "{{ messages | tojson(indent=10**8) }}",
    "join": "{{ R | map('string') | join(S) }}",
    "join method": "{{ S.join(R | map('string')) }}",
    "percent": "{{ '%999999999d' % 1 }}",
    "percent star": "{{ '%*d' % (10**9, 1) }}",
    "percent many": "{{ ('%s' * 1000000) % ((S,) * 1000000) }}",
    "format": "{{ '{:999999999}'.format(1) }}",
    "format width": "{{ '{:{}}'.format(1, 10**9) }}",
    "format filter": "{{ '%999999999d' | format(1) }}",
    "bytes": "{{ (1).to_bytes(10**9, 'big') | length }}",
    "lipsum": "{{ lipsum(10**6) }}",
    "slices kept": "{% set l = namespace(x=[]) %}{% for i in R %}{% set l.x = l.x + [S[1:]] %}{% endfor %}",
    "lazy search": "{{ R | map('string') | select('in', S) | list }}",
    "sum of lists": "{{ ([[1] * 4000] * 4000) | sum(start=[]) | length }}",
    "parentheses": "{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}",
    "attributes": "{{ a" + ".b" * 9999 + " }}",
    "length": "a" * 10_000_000,
    "digits": "{{ " + "9" * 9999 + " }}",
    "division": "{{ 1 / 0 }}",
    "import": "{% import 'x' as y %}",
}


@pytest.mark.parametrize("name", HOSTILE_TEMPLATES)
def test_hostile_templates_end_soon(name, monkeypatch):
    if name != "loops":  # a fifth of the time for all others, ten of which take all of it
        monkeypatch.setattr(sandbox, "MAX_SECONDS", sandbox.MAX_SECONDS / 5)
    source = LARGE + HOSTILE_TEMPLATES[name]
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.thread_time()
    with pytest.raises(ValueError, match="chat template"):
        ChatTemplate(source).render([Message("user", "x" * 1000)] * 10)
    assert time.thread_time() - start < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # KiB


def test_bounds_leave_ordinary_templates_alone():
    ordinary = {
        "{{ '%s is %05.1f' % ('x', 1.5) }} {{ '{:>4}{{}}'.format(7) }} {{ '%d' | format(1700000000) }}": "x is 001.5    7{} 1700000000",
        DOUBLING.replace("BODY", "namespace(a=ns.x, b=ns.x)").replace("ns.x | length", "ns.x"): "<Namespace>",
        "{% for a, b in {'k': (1, 2)}.items() %}{{ a }}{{ b }}{% endfor %}": "k(1, 2)",
        "{{ messages[1:] | map(attribute='role') | join(', ') }} {{ 'a-b'.replace('-', '+').split('+') }}": "user ['a', 'b']",
        "{{ [3, 1] | sort | tojson(indent=2) }}{{ 'x' in 'xyz' and 1 < 2 <= 2 }}{{ (1, 2) == (1, 2) }}": "[\n  1,\n  3\n]TrueTrue",
        "{% macro m(x) %}<{{ x ~ 1 }}>{% endmacro %}{{ m('a') }}{% set y %}{{ m(2) }}{% endset %}{{ y * 2 }}": "<a1><21><21>",
        "{{ -7 // 2 }} {{ 2 ** 10 }} {{ missing }}{{ missing | default(5000000) }} {{ messages | length }}": "-4 1024 5000000 2",
    }
    for source, expected in ordinary.items():
        assert ChatTemplate(source).render([Message("user", "x")] * 2) == expected
    many = [Message("user", "word " * 500)] * 1000  # 2.5 million characters
    joined = "{% set ns = namespace(t='') %}{% for m in messages[:200] %}{% set ns.t = ns.t + m.content %}{% endfor %}{{ ns.t | length }}"
    assert ChatTemplate(joined).render(many) == str(200 * 2500)
    assert len(ChatTemplate(DEFAULT_TEMPLATE).render(many)) > 2_500_000
    with ThreadPoolExecutor(2) as pool:  # each rendering has its own budget
        template = ChatTemplate("{% for a in range(1000) %}{{ 'a' * 10000 }}{% endfor %}")
        assert {len(text) for text in pool.map(lambda _: template.render([]), range(30))} == {10_000_000}


def test_replies_split_and_render_back():
    template = ChatTemplate(DEFAULT_TEMPLATE)
    for reply in ("<think>a\n</think>\n\nb", "plain </think> text", "say <think>x</think>"):
        message = parse_reply(reply)
        assert template.render([message]) == f"<|im_start|>assistant\n{reply}<|im_end|>\n"
    assert parse_reply("<think>a</think>b") == Message("assistant", "b", "a")
    assert parse_reply("a</think>b", opened=True) == Message("assistant", "b", "a")
    assert parse_reply("never closed", opened=True) == Message("assistant", "", "never closed")
    assert parse_reply("say <think>") == Message("assistant", "say <think>")


@pytest.mark.parametrize("arguments", ['{"a": ', "[" * 100_000, "1" * 5000], ids=["cut", "deep", "long"])
def test_arguments_that_are_no_json_stay_as_they_are(arguments):
    call = {"function": {"name": "f", "arguments": arguments}}
    assert Message("assistant", tool_calls=(call,)).to_dict()["tool_calls"] == [call]


def test_message_from_dict():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert Message.from_dict({"role": "assistant", "content": parts, "reasoning_content": "r"}) == Message("assistant", "ab", "r")
    data = {"role": "assistant", "content": None, "reasoning": "r", "tool_calls": [CALL]}
    assert Message.from_dict(data) == Message("assistant", "", "r", (CALL,))
    data = Message("assistant", "x", "r", (CALL,)).to_dict()
    assert data["reasoning_content"] == "r" and data["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    for bad, field in (({"content": "x"}, "role"), ({"content": 3}, "content"), ({"tool_calls": [{}]}, "tool_calls")):
        with pytest.raises(ValueError, match=field):
            Message.from_dict(bad if field == "role" else {"role": "user"} | bad)


def test_tokens_equal_transformers(folder):
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(folder), Tokenizer.load(folder)
    messages = [m.to_dict() for m in CHAT]
    assert theirs.apply_chat_template(messages, tools=TOOLS, tokenize=False) == ours.template.render(CHAT, tools=TOOLS)
    assert theirs.apply_chat_template(messages, tools=TOOLS)["input_ids"] == ours.template.encode(ours, CHAT, TOOLS)[0]
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (ours.bos_id, ours.eos_id, ours.pad_id)
    ids = ours.encode("<think>a</think> b<|im_end|>")
    assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids, skip_special=True) == "<think>a</think> b"


def test_real_template_masks():
    real = os.environ.get("JEVONS_REAL_MODEL")
    if not real:
        pytest.skip("JEVONS_REAL_MODEL names no folder with a real Qwen2.5 checkpoint")
    tokenizer = Tokenizer.load(real)
    ids, mask = tokenizer.template.encode(tokenizer, [replace(m, reasoning="") for m in CHAT], TOOLS)
    assert masked_runs(tokenizer, ids, mask) == [
        '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>',
        "Two.<|im_end|>",  # the header's "\n" and the answer's "\n\n" are one token of this tokenizer
        "Bye<|im_end|>",
    ]
    assert only_grows(tokenizer.template)
    assert tokenizer.token_bytes()[tokenizer.encode("h\u00e9llo \u4f60")].sum() == len("h\u00e9llo \u4f60".encode())


# tokenizer


@settings(max_examples=60, deadline=None)
@given(st.text())
def test_bpe_round_trips(tokenizer, text):
    ids, offsets = tokenizer.encode_offsets(text)
    assert tokenizer.decode(ids) == text and tokenizer.encode(text) == ids
    assert all(0 <= start < end <= len(text) for start, end in offsets)
    if "<" not in text:
        assert tokenizer.token_bytes()[ids].sum() == len(text.encode())


@settings(max_examples=60, deadline=None)
@given(st.text(), st.lists(st.integers(0, 399)))
@example("\ufffd \U0001f600", [])
def test_text_stream_equals_decode(tokenizer, text, noise):
    for ids in (tokenizer.encode(text), tokenizer.encode(text) + noise):
        stream = TextStream(tokenizer)
        pieces = [stream.push(i) for i in ids]
        assert "\ufffd" in tokenizer.decode(ids) or "\ufffd" not in "".join(pieces)
        assert "".join(pieces) + stream.flush() == tokenizer.decode(ids, skip_special=True)
        assert stream.flush() == ""


def test_stream_holds_back_parts_of_characters(tokenizer):
    stream = TextStream(tokenizer)
    ids = tokenizer.encode("\U0001f9ea")
    assert len(ids) > 1 and [stream.push(i) for i in ids] == [""] * (len(ids) - 1) + ["\U0001f9ea"]
    # bytes that never become a character are let go, or every step would decode all of them again
    stream = TextStream(tokenizer)
    pieces = [stream.push(ids[0]) for _ in range(1000)]
    assert "".join(pieces) + stream.flush() == tokenizer.decode([ids[0]] * 1000)
    assert max(map(len, pieces)) <= TextStream.LONGEST and len(stream._ids) <= 2 * TextStream.LONGEST


def test_tokenizer_folder(tokenizer, folder, tmp_path):
    loaded = Tokenizer.load(folder)
    assert loaded.digest() == tokenizer.digest() != train_bpe(CORPUS, 300).digest()
    assert loaded.size == max(loaded.raw.get_vocab().values()) + 1 and loaded.template.source == DEFAULT_TEMPLATE
    assert loaded.decode([loaded.eos_id]) == "<|im_end|>" and loaded.token_bytes()[loaded.eos_id] == 0
    assert len(loaded.encode("2024")) == 4
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="not a tokenizer"):
        Tokenizer.load(tmp_path)
    loaded.raw.save(str(tmp_path / "tokenizer.json"))
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}, "chat_template": named}))
    other = Tokenizer.load(tmp_path)
    assert (other.eos_id, other.bos_id, other.template.source) == (loaded.eos_id, None, "d")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<nope>"}')
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: eos_token"):
        Tokenizer.load(tmp_path)
    with pytest.raises(ValueError, match="vocab_size"):
        train_bpe(CORPUS, 260)


def test_replies_end_at_the_turns_end(tokenizer, folder, tmp_path):
    """Base models name the text's end as theirs, while their template ends turns with another token."""
    base = Tokenizer(tokenizer.raw, eos_token="<|endoftext|>", chat_template=DEFAULT_TEMPLATE)
    assert base.ends([5]) == {5, *base.encode("<|endoftext|><|im_end|>")} and len(base.ends([5])) == 3
    assert base.ends([]) - {base.eos_id} == {tokenizer.eos_id} == tokenizer.ends([])
    for end in ("#", " and so on.", ""):  # an ordinary token ends nothing: a reply may hold it
        assert Tokenizer(tokenizer.raw, chat_template=DEFAULT_TEMPLATE.replace("<|im_end|>", end)).ends([5]) == {5}
    assert Tokenizer(tokenizer.raw).ends([5]) == {5}


# text


def write(path, *lines):
    path.write_text("\n".join(lines), "utf-8")
    return str(path)


def test_bad_lines_are_counted_and_limited(tmp_path):
    chat = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    lines = ['{"text": "a"}', "", "{", '{"txt": 1}', "[1]", '{"text": " "}', json.dumps(chat), '{"messages": [{"role": 1}]}']
    path = write(tmp_path / "a.jsonl", *lines)
    bad = BadLines(limit=6, keep=3)
    documents = list(read_documents([path], bad=bad))
    assert [(d.text, d.line) for d in documents] == [("a", 1), (None, 7)]
    assert documents[1].messages == (Message("user", "q"), Message("assistant", "a"))
    assert (bad.empty, bad.malformed) == (2, 4)
    assert bad.report()["examples"][0] == f"{path}:2: empty" and "a.jsonl:3: not JSON" in bad.examples[1] and "txt" in bad.examples[2]
    with pytest.raises(ValueError, match=r"more than 5 lines(.|\n)*a\.jsonl:2: empty"):
        list(read_documents([path], bad=BadLines(limit=5)))


def test_kinds_of_files(tmp_path):
    pytest.importorskip("zstandard", reason="zstandard is an optional package")
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is an optional package")
    import pyarrow
    import zstandard

    long = "x" * 200_000  # longer than a read
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\ntwo")  # with the mark that Windows puts before UTF-8
    write(tmp_path / "b.json", f' [{{"text": "b1"}}, {{"text": "\u4f60{long}"}} , {{"text": "b3"}}]\n')
    write(tmp_path / "c.json", '{"text": "c1"}', '{"text": "c2"}')
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(b'{"text": "d"}\n'))
    frames = [zstandard.compress(b'{"text": "e1"}\n'), zstandard.compress(b'{"text": "e2"}\n')]
    (tmp_path / "e.jsonl.zst").write_bytes(b"".join(frames))
    parquet.write_table(pyarrow.table({"id": [1, 2], "text": ["f1", "f2"]}), tmp_path / "f.parquet")
    write(tmp_path / "ignored.csv", "no")
    texts = [d.text for d in read_documents([str(tmp_path)], bad=BadLines(limit=0))]
    assert texts == ["one\ntwo", "b1", f"\u4f60{long}", "b3", "c1", "c2", "d", "e1", "e2", "f1", "f2"]
    assert [p.name for p in find_files([str(tmp_path / "*.json"), str(tmp_path / "b.json")])] == ["b.json", "c.json"]
    for source, reason in ((tmp_path / "none", "no text found"), (tmp_path / "ignored.csv", "unknown kind")):
        with pytest.raises(ValueError, match=reason):
            find_files([str(source)])
    with pytest.raises(ValueError, match="no column prompt"):
        list(read_documents([str(tmp_path / "f.parquet")], field="prompt", bad=BadLines()))
    for name, data in (
        ("cut.jsonl.gz", gzip.compress(b'{"text": "d"}\n' * 9)[:-12]),
        ("cut.jsonl.zst", frames[0] + frames[1][:-1]),
        ("no.jsonl.zst", b'{"text": "e"}\n'),
        ("cut.json", b'[{"text": "a"}, {"te'),
        ("latin.json", b'[{"text": "\xe9"}]'),
        ("cut.parquet", (tmp_path / "f.parquet").read_bytes()[:-1]),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=rf"{name}.*(cut short|breaks off)"):
            list(read_documents([str(tmp_path / name)], bad=BadLines()))


# shards


def texts(count):
    return [Document(f"document {i} " + "word " * (i % 7), None, "memory", i) for i in range(count)]


@pytest.fixture(scope="module")
def shards(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("shards")
    write_shards(texts(60), folder, out, shard_tokens=300, source={})
    return Shards.open(out)


def test_shards_do_not_depend_on_processes(folder, tmp_path):
    chats = [Document(None, (Message("user", f"q{i}"), Message("assistant", f"a{i}")), "memory", i) for i in range(600)]
    outs = []
    for processes in (1, 3):
        out, seen = tmp_path / str(processes), []
        manifest = write_shards(
            chats, folder, out, processes=processes, shard_tokens=2000, mask="assistant",
            progress=lambda *totals, seen=seen: seen.append(totals), source={"from": "memory"},
        )  # fmt: skip
        assert seen[-1] == (600, manifest.tokens) and len(manifest.files) > 1
        outs.append({p.name: p.read_bytes() for p in out.iterdir()})
    assert outs[0] == outs[1]
    shards, tokenizer = Shards.open(tmp_path / "3"), Tokenizer.load(folder)
    ids, mask = tokenizer.template.encode(tokenizer, chats[577].messages)
    start, stop = shards.document(577)
    assert shards.tokens(start, stop).tolist() == ids and shards.mask(start, stop).tolist() == mask
    with pytest.raises(ValueError, match="memory:0: plain text has no assistant"):
        write_shards(texts(1), folder, tmp_path / "x", mask="assistant", source={})


def test_documents_end_in_eos_once(tokenizer, folder, tmp_path):
    chat = (Message("user", "q"), Message("assistant", "a"))
    write_shards([Document("plain", None, "m", 1), Document(None, chat, "m", 2)], folder, tmp_path, source={})
    shards = Shards.open(tmp_path, digest=tokenizer.digest())
    assert tokenizer.decode(shards.tokens(*shards.document(0))) == "plain<|im_end|>"
    assert tokenizer.decode(shards.tokens(*shards.document(1))) == tokenizer.template.render(chat)
    assert shards.manifest.bytes == len("plain") + len(tokenizer.template.render(chat))


def test_refused_chats_are_bad_lines(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "t")
    refuses = "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}x"
    (tmp_path / "t" / "chat_template.jinja").write_text(refuses)
    chats = [Document(None, (Message(role, "q"),), "m", i) for i, role in enumerate(("user", "assistant"))]
    manifest = write_shards(chats, tmp_path / "t", tmp_path / "s", source={}, bad=BadLines(limit=1))
    assert manifest.documents == 1 and "m:1: chat template: user first" in manifest.bad_lines["examples"][0]
    with pytest.raises(ValueError, match="user first"):
        write_shards(chats, tmp_path / "t", tmp_path / "s", source={})
    with pytest.raises(ValueError, match=r"manifest\.json"):  # the failed rewrite left no finished folder behind
        Shards.open(tmp_path / "s")


def test_damaged_and_foreign_shards(folder, tmp_path):
    write_shards(texts(9), folder, tmp_path, source={})
    with pytest.raises(ValueError, match="another tokenizer"):
        Shards.open(tmp_path, digest="0" * 64)
    path = tmp_path / "tokens-00000.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"tokens-00000\.bin.*cut short"):
        Shards.open(tmp_path)


# batches


def test_pack_weighs_targets():
    batch = pack([([1, 2, 3], [0, 0, 1]), (torch.tensor([4, 5]), None), (np.array([6]), None)])
    assert batch.tokens_T.tolist() == [1, 2, 3, 4, 5, 6]
    assert batch.targets_T.tolist() == [2, 3, 0, 5, 0, 0] and batch.weights_T.tolist() == [0, 1, 0, 1, 0, 0]
    assert batch.positions_T.tolist() == [0, 1, 2, 0, 1, 0] and batch.cu_seqlens.tolist() == [0, 3, 5, 6]
    assert (batch.max_seqlen, batch.num_tokens, batch.cu_seqlens.dtype) == (3, 6, torch.int32)
    moved = batch.to("cpu")
    assert moved.max_seqlen == 3 and torch.equal(moved.targets_T, batch.targets_T)
    for documents, reason in (([], "at least one"), ([([], None)], "no tokens"), ([([1, 2], [1])], "weights")):
        with pytest.raises(ValueError, match=reason):
            pack(documents)


def test_mtp_targets_stop_at_documents():
    batch = pack([([1, 2, 3, 4], [1, 1, 1, 0]), ([5, 6, 7], None)])
    targets_T, weights_T = mtp_targets(batch)
    assert targets_T.tolist() == [3, 4, 0, 0, 7, 0, 0] and weights_T.tolist() == [1, 0, 0, 0, 1, 0, 0]
    targets_T, weights_T = mtp_targets(batch, depth=2)
    assert targets_T.tolist() == [4, 0, 0, 0, 0, 0, 0] and weights_T.tolist() == [0] * 7
    assert not mtp_targets(batch, depth=9)[1].any()


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 300), st.text(max_size=5))
def test_permutation(size, key):
    assert sorted(permute(i, size, key=key) for i in range(size)) == list(range(size))


def test_reader_visits_every_window_once_an_epoch(shards):
    reader = PackedReader(shards, sequence_length=16, seed=1)
    n = reader.num_windows
    epochs = [[reader.window(e * n + i) for i in range(n)] for e in range(2)]
    assert n == (shards.num_tokens - 1) // 16 and sorted(epochs[0]) == sorted(epochs[1]) == list(range(n))
    assert epochs[0] != epochs[1] != list(range(n))
    assert reader.window(0) != PackedReader(shards, sequence_length=16, seed=2).window(0)
    reader.batch(10**15, 1)  # any place at the same cost


def test_reader_has_no_state_and_ranks_share(shards):
    reader = PackedReader(shards, sequence_length=16, seed=3)
    whole = reader.batch(8, 4)
    fresh = PackedReader(shards, sequence_length=16, seed=3)
    halves = [fresh.batch(10, 2), fresh.batch(8, 2)][::-1]
    for name in ("tokens_T", "targets_T", "weights_T", "positions_T"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(half, name) for half in halves]))


@pytest.mark.parametrize("count", [1, 50])
def test_reader_splits_at_documents(shards, count):
    length, eos = 16, shards.tokens(0, shards.document(0)[1])[-1]
    split = PackedReader(shards, sequence_length=length, seed=0).batch(0, count)
    joined = PackedReader(shards, sequence_length=length, seed=0, split_documents=False).batch(0, count)
    assert torch.equal(split.tokens_T, joined.tokens_T)
    assert joined.cu_seqlens.tolist() == list(range(0, count * length + 1, length)) and joined.weights_T.all()
    windows = [PackedReader(shards, sequence_length=length, seed=0).window(i) for i in range(count)]
    assert joined.targets_T.tolist() == [t for w in windows for t in shards.tokens(w * length + 1, w * length + length + 1)]
    last = split.tokens_T == int(eos)  # eos ends every document and stands nowhere else here
    assert torch.equal(split.weights_T, (~last).float()) and torch.equal(split.targets_T, torch.where(last, 0, joined.targets_T))
    begins = torch.cat([torch.ones(1, dtype=torch.bool), last[:-1]]) | (torch.arange(count * length) % length == 0)
    assert split.cu_seqlens[:-1].tolist() == begins.nonzero().flatten().tolist()
    assert torch.equal(split.positions_T == 0, begins)
    assert split.max_seqlen == split.cu_seqlens.diff().max() and joined.max_seqlen == length


def test_document_ends_across_files(shards):
    ends = [shards.document(i)[1] for i in range(shards.num_documents)]
    assert len(shards.manifest.files) > 2 and ends[-1] == shards.num_tokens
    for start, stop in ((0, shards.num_tokens), (ends[3], ends[40]), (ends[3] - 1, ends[3]), (5, 5)):
        assert shards.document_ends(start, stop).tolist() == [e for e in ends if start < e <= stop]


def test_too_little_text(shards):
    with pytest.raises(ValueError, match="fewer than one window"):
        PackedReader(shards, sequence_length=shards.num_tokens, seed=0)
    assert PackedReader(shards, sequence_length=shards.num_tokens - 1, seed=0).num_windows == 1
