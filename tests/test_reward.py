"""Rewards: the papers' numbers, formats that can be had only by keeping them, and parts that take any text, quickly."""

from __future__ import annotations

import itertools
import math
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jevons.section import Reward
from jevons.tasks.reward import LENGTHS, PARTS, Answer, Rewards
from jevons.tasks.task import Problem

PROBLEM = Problem("6*7=?", "42", {}, 1)
GOOD = "<think>\nSix sevens.\n</think>\n<answer>\n42\n</answer>"
OPTIONS = {"overlong": {"max": 100, "cache": 20}, "group": {}, "cosine": {"max": 100}}


def answer(text="", tokens=1, score=1.0, finished=True) -> Answer:
    return Answer(PROBLEM, text, tokens, finished, score)


def values(part, answers, **options) -> list[float]:
    rows = Rewards([(part, 1.0, 0, options)]).rewards(answers, 0)
    return [value for row in rows for value in row.values()]


def test_dapo_soft_overlong():
    lengths = [1, 16384, 17408, 18432, 20480, 20481, 10**6]
    rewards = values("length", [answer(tokens=n) for n in lengths], kind="overlong", max=20480, cache=4096)
    assert rewards == [0, 0, -0.25, -0.5, -1, -1, -1]
    assert all(math.copysign(1, reward) == 1 for reward in rewards[:2])  # 0, not -0


def test_k15_group_length():
    group = [answer(tokens=n, score=s) for n, s in zip([100, 200, 300, 500], [1, 1, 0, 0])]
    assert values("length", group, kind="group") == [0.5, 0.25, 0, -0.5]
    assert values("length", [answer(tokens=7)] * 3, kind="group") == [0, 0, 0]
    assert values("length", [answer(tokens=100, score=0.5), answer(tokens=200)], kind="group") == [0, -0.5]  # partly right is not right
    assert values("length", [answer(tokens=9)], kind="group") == [0]


def test_cosine_length():
    lengths = [0, 250, 500, 1000, 5000]
    right = values("length", [answer(tokens=n) for n in lengths], kind="cosine", max=1000)
    wrong = values("length", [answer(tokens=n, score=0.0) for n in lengths], kind="cosine", max=1000)
    assert right == pytest.approx([1, 0.5 + 0.5 * (1 + math.sqrt(0.5)) / 2, 0.75, 0.5, 0.5])
    assert wrong == pytest.approx([-1, -0.5 - 0.5 * (1 + math.sqrt(0.5)) / 2, -0.75, -0.5, -0.5])
    assert min(right) > max(wrong)


R1 = re.compile(r"^<think>\n.*?\n</think>\n<answer>\n.*?\n</answer>$", re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize(
    ("text", "format_", "tags"),
    [
        (GOOD, 1, 1),
        (GOOD + "\n", 1, 1),
        ("<think>\n\n</think>\n<answer>\n42\n</answer>", 1, 1),
        (GOOD.replace("\n", ""), 0, 0),
        ("42", 0, 0),
        ("", 0, 0),
        ("<think>\nSix.\n</think>\n42", 0, 0.5),
        ("<think>\nSix.\n<answer>\n42\n</answer>", 0, 0.75),
        ("<answer>\n42\n</answer>\n<think>\nSix.\n</think>", 0, 1),  # all the tags, in the wrong order
        (GOOD + GOOD, 0, 0),
        (f"Sure!\n{GOOD}", 0, 1),
        (f"{GOOD}\nDone.", 0, 1),
        ("<think>\n<think>\nSix.\n</think>\n<answer>\n42\n</answer>", 0, 0.75),
    ],
)
def test_format_and_tags(text, format_, tags):
    assert values("format", [answer(text)]) == [format_]
    assert values("tags", [answer(text)]) == [tags]
    assert not format_ or R1.match(text.strip())


def test_other_tags():
    text = "<plan>\na\n</plan>\n<code>\nb\n</code>\n<result>\nc\n</result>"
    assert values("format", [answer(text), answer(GOOD)], tags=["plan", "code", "result"]) == [1, 0]
    assert values("tags", [answer(text), answer(text.replace("</code>", ""))], tags=["plan", "code", "result"]) == [1, pytest.approx(5 / 6)]


@pytest.mark.parametrize(
    ("text", "scripts", "share"),
    [
        ("Six times seven is 42.", ["latin"], 1),
        ("Six times 七", ["latin"], 2 / 3),
        ("六乘七", ["cjk"], 1),
        ("六乘七 is 四十二", ["cjk"], 6 / 7),
        ("Шесть times семь", ["cyrillic"], 2 / 3),
        ("Шесть times семь", ["cyrillic", "latin"], 1),
        ("ですから六", ["hiragana", "katakana", "cjk"], 1),
        ("여섯 곱하기 일곱", ["hangul"], 1),
        ("ستة في سبعة", ["arabic"], 1),
        ("因为 $x = \\frac{a}{b}$ 和 \\(y\\) 所以 \\boxed{42}", ["cjk"], 1),  # formulas are nobody's words
        ("```python\nprint(1)\n```\n六", ["cjk"], 1),
        ("<think>\n六\n</think>", ["cjk"], 1),
        ("naïve café", ["latin"], 1),
        ("m\u0456xed", ["latin"], 2 / 3),  # its second letter is Cyrillic: m, i, xed
        ("42", ["latin"], 0),
        ("", ["latin"], 0),
    ],
)
def test_language(text, scripts, share):
    assert values("language", [answer(text)], scripts=scripts) == [pytest.approx(share)]


def test_repetition():
    assert values("repetition", [answer("a b c d e"), answer("a b"), answer("")]) == [0, 0, 0]
    assert values("repetition", [answer("a b c a b c a b c")]) == [pytest.approx(3 / 7 - 1)]
    assert values("repetition", [answer("A a a a a")], ngram=1) == [pytest.approx(1 / 5 - 1)]
    assert values("repetition", [answer("六六六六六六")], ngram=1) == [pytest.approx(1 / 6 - 1)]  # no spaces between its words


def test_parts_are_weighted_by_name_and_their_sum_is_the_reward():
    parts = [("correct", 1.0, 0, {}), ("format", 0.5, 0, {}), ("finished", -0.25, 0, {}), ("length", 2.0, 0, {"kind": "group"})]
    rows = Rewards(parts).rewards([answer(GOOD, 10, 0.5), answer("42", 20, 1.0, finished=False)], 0)
    assert rows == [
        {"correct": 0.5, "format": 0.5, "finished": -0.25, "length_group": 0.0},
        {"correct": 1.0, "format": 0.0, "finished": 0.0, "length_group": -1.0},
    ]
    both = Rewards([("length", 1.0, 0, {"kind": kind} | OPTIONS[kind]) for kind in LENGTHS]).rewards([answer()], 0)
    assert both[0].keys() == {f"length_{kind}" for kind in LENGTHS}


@pytest.mark.parametrize(
    ("part", "options", "message"),
    [
        ("corect", {}, "reward: unknown part 'corect'; known: correct, .*; did you mean correct"),
        ("correct", {"weight": 2}, "reward correct: unknown option 'weight'; it has none"),
        ("format", {"tag": ["a"]}, "reward format: unknown option 'tag'; known: tags; did you mean tags"),
        ("format", {"tags": "think"}, "reward format: tags: must be list"),
        ("format", {"tags": ["think", 3]}, r"reward format: tags\[1\]: must be str, is 3"),
        ("tags", {"tags": ["<think>"]}, "without their brackets"),
        ("tags", {"tags": []}, "are none"),
        ("language", {"scripts": ["latn"]}, "unknown 'latn'; known: latin, .*; did you mean latin"),
        ("language", {"scripts": []}, "name at least one"),
        ("length", {}, "reward length: kind: must be overlong, group, cosine, is None"),
        ("length", {"kind": "groups"}, "did you mean group"),
        ("length", {"kind": "group", "max": 3}, "reward length_group: unknown option 'max'; it has none"),
        ("length", {"kind": "overlong", "max": 3}, "reward length_overlong: cache: is missing"),
        ("length", {"kind": "overlong", "max": 3, "cache": 4}, "cache: must be from 1 to max 3"),
        ("length", {"kind": "cosine", "max": 0}, "max: must be at least 1"),
        ("length", {"kind": "cosine", "max": 9, "right_long": -1}, "must be above"),
        ("repetition", {"ngram": 0}, "ngram: must be at least 1"),
    ],
)
def test_mistakes_are_named(part, options, message):
    with pytest.raises(ValueError, match=message):
        Rewards([(part, 1.0, 0, options)])
    with pytest.raises(ValueError, match=message):  # when a recipe is read, too
        Reward(part=part, options=options)


def test_a_part_may_count_from_a_later_step_on():
    """k1.5's penalty of length: trained without it first."""
    rewards = Rewards([("correct", 1.0, 0, {}), ("length", 2.0, 5, {"kind": "group"})])
    group = [answer(tokens=10), answer(tokens=30)]
    before, after = rewards.rewards(group, 4), rewards.rewards(group, 5)
    assert before == [{"correct": 1.0, "length_group": 0.0}] * 2
    assert after == [{"correct": 1.0, "length_group": 1.0}, {"correct": 1.0, "length_group": -1.0}]


def test_no_part_is_there_twice():
    with pytest.raises(ValueError, match="reward correct: is there twice"):
        Rewards([("correct", 1.0, 0, {}), ("correct", 2.0, 0, {})])


EVERY = [(part, 1.0, 0, {}) for part in PARTS] + [("length", 1.0, 0, {"kind": kind} | OPTIONS[kind]) for kind in LENGTHS]
pieces = ["<think>", "</think>", "<answer>", "</answer>", "\n", "$", "\\[", "\\(", "```", "`", "六", "é", "a ", "a", "1"]
texts = st.text() | st.lists(st.sampled_from(pieces), max_size=60).map("".join)


@settings(deadline=None)
@given(st.lists(st.builds(answer, texts, st.integers(0, 300), st.floats(0, 1), st.booleans()), min_size=1, max_size=5))
def test_any_group_has_finite_rewards_within_bounds(group):
    for row in Rewards(EVERY).rewards(group, 0):
        assert row.keys() == {*PARTS, *(f"length_{kind}" for kind in LENGTHS)}
        for name, value in row.items():
            low, high = {"length_group": (-0.5, 0.5), "length_cosine": (-1, 1)}.get(name, (0, 1))
            assert (-1 if name in ("repetition", "length_overlong") else low) <= value <= high, name


def test_long_texts_take_no_longer_than_they_are_long():
    start = time.process_time()
    for text in ("".join(pair) * 20_000 for pair in itertools.product(["<think>\n", "$a", "\\[", "`", "answer "], ["", " "])):
        Rewards(EVERY).rewards([answer(text)], 0)
    assert time.process_time() - start < 20
