r"""The reward of an answer: named parts, each times its weight, added up.

    [[rl.rewards]]
    part = "correct"

    [[rl.rewards]]
    part = "length"
    weight = 0.2
    from_step = 100                     # Kimi k1.5: first without it
    options = { kind = "group" }

    correct      the verifier's score                                            0 to 1
    format       the reply is made of the tags, each on a line of its own        0 or 1      DeepSeek-R1 (arXiv 2501.12948)
    tags         the share of those tags that are there, once                    0 to 1      open-r1
    language     the share of words in the scripts that are wanted               0 to 1      DeepSeek-R1
    length       kind overlong: nothing until max - cache tokens, then down      -1 to 0     DAPO (arXiv 2503.14476)
                 kind group: short among the group's, right ones only above 0    -.5 to .5   Kimi k1.5 (arXiv 2501.12599)
                 kind cosine: short where right, long where wrong                by option   open-r1, after arXiv 2502.03373
    repetition   the share of n-grams that were there before, taken away         -1 to 0     open-r1
    finished     it ended by itself, not at the limit of tokens                  0 or 1

Everything but the first can be had without being right, so its weight should be small beside that one's.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from jevons.tasks.task import Problem, configured, nearest


@dataclass(frozen=True)
class Answer:
    """A graded reply. `tokens` counts what the model drew; `finished`: it ended by itself; `score`: the verifier's, 0 to 1."""

    problem: Problem
    text: str
    tokens: int
    finished: bool
    score: float


class Part(Protocol):
    def values(self, group: Sequence[Answer]) -> list[float]:
        """One value for each of a group's answers, which are all to one problem."""
        ...


class Rewards:
    """What a recipe's list of parts says: (part, weight, first step, options) each.

    ValueError for unknown parts, unknown options, bad values.
    """

    def __init__(self, parts: Sequence[tuple[str, float, int, Mapping[str, Any]]]) -> None:
        self._parts: dict[str, tuple[float, int, Part]] = {}
        for name, weight, first, options in parts:
            label, part = make_part(name, options)
            if label in self._parts:
                raise ValueError(f"reward {label}: is there twice; add up the weights")
            self._parts[label] = weight, first, part

    def rewards(self, group: Sequence[Answer], step: int) -> list[dict[str, float]]:
        """Of each answer its parts, weighted, or 0 where they do not count yet at this step; its reward is their sum."""
        columns = {
            label: [weight * value for value in part.values(group)] if step >= first else [0.0] * len(group)
            for label, (weight, first, part) in self._parts.items()
        }
        return [{label: column[i] for label, column in columns.items()} for i in range(len(group))]


@dataclass(frozen=True)
class Correct:
    def values(self, group: Sequence[Answer]) -> list[float]:
        return [answer.score for answer in group]


@dataclass(frozen=True)
class Finished:
    def values(self, group: Sequence[Answer]) -> list[float]:
        return [float(answer.finished) for answer in group]


@dataclass(frozen=True)
class Tags:
    """Each opening and closing tag counts once if it is there exactly once, at its end of a line; open-r1's tag count for R1's two."""

    tags: tuple[str, ...] = ("think", "answer")

    def __post_init__(self) -> None:
        if not self.tags or not all(re.fullmatch(r"\w+", tag) for tag in self.tags) or len({*self.tags}) < len(self.tags):
            raise ValueError(f"tags: must be different names of tags without their brackets, are {', '.join(self.tags) or 'none'}")

    def values(self, group: Sequence[Answer]) -> list[float]:
        return [self._present(answer.text) for answer in group]

    def _present(self, text: str) -> float:
        # newlines belong to a tag except at the two ends of the reply
        opened = [f"\n<{tag}>\n" for tag in self.tags]
        closed = [f"\n</{tag}>\n" for tag in self.tags]
        text = f"\n{text.strip()}\n"
        return sum(text.count(mark) == text.count(mark.strip()) == 1 for mark in opened + closed) / (2 * len(self.tags))


@dataclass(frozen=True)
class Format(Tags):
    """1 where the reply is the tags' blocks, in their order, and nothing else. Stricter than R1's expression: no tag may come twice."""

    def _present(self, text: str) -> float:
        marks = [mark for tag in self.tags for mark in (f"<{tag}>", f"</{tag}>")]
        if any(text.count(mark) != 1 for mark in marks):
            return 0.0
        pattern = "\n".join(rf"<{tag}>\n.*?\n</{tag}>" for tag in self.tags)
        return float(re.fullmatch(pattern, text.strip(), re.DOTALL) is not None)


WORD = re.compile(r"[^\W\d_]+")
# formulas, code, tags and commands are in no language; bounded, so that openings without an end do not make it slow
FORMULA = r"\$\$.{1,999}?\$\$|\$[^$\n]{1,999}\$|\\\[.{1,999}?\\\]|\\\(.{1,999}?\\\)|\\[a-zA-Z]+"
NO_LANGUAGE = re.compile(rf"```.*?(?:```|\Z)|`[^`\n]{{1,999}}`|{FORMULA}|</?\w+>", re.DOTALL)
SCRIPTS = ["latin", "cjk", "hiragana", "katakana", "hangul", "cyrillic", "greek", "arabic", "hebrew", "devanagari", "bengali", "tamil"]
SCRIPTS += ["telugu", "thai", "georgian", "armenian", "ethiopic", "khmer"]
UNSPACED = {"cjk", "hiragana", "katakana", "thai", "khmer"}  # written without spaces: every letter counts as a word


@dataclass(frozen=True)
class Language:
    """The share of words in `scripts`, by their letters' names in Unicode. A reply without words gets 0: silence is no language.

    Scripts are not languages: French passes for English. Japanese is `["hiragana", "katakana", "cjk"]`.
    """

    scripts: tuple[str, ...] = ("latin",)

    def __post_init__(self) -> None:
        if not self.scripts:
            raise ValueError(f"scripts: name at least one of {', '.join(SCRIPTS)}")
        for script in self.scripts:
            if script not in SCRIPTS:
                raise ValueError(f"scripts: unknown {script!r}; known: {', '.join(SCRIPTS)}{nearest(script, SCRIPTS)}")

    def values(self, group: Sequence[Answer]) -> list[float]:
        return [self._share(answer.text) for answer in group]

    def _share(self, text: str) -> float:
        counts = {True: 0, False: 0}
        for word in WORD.findall(NO_LANGUAGE.sub(" ", text)):
            last = ""
            for letter in word:
                script = script_of(letter)
                if script != last or script in UNSPACED:
                    counts[script in self.scripts] += 1
                last = script
        return counts[True] / max(1, sum(counts.values()))


def script_of(letter: str) -> str:
    """The script of a letter: the first word of its name in Unicode, in lower case; "" for those without a name."""
    name = unicodedata.name(letter, "")
    first = name.partition(" ")[0].lower()
    return {"fullwidth": "latin", "halfwidth": "katakana", "cjk": "cjk", "ideographic": "cjk"}.get(first, first)


@dataclass(frozen=True)
class Overlong:
    """DAPO's soft punishment: 0 up to `max` - `cache` tokens, from there down to -1 at `max`."""

    max: int
    cache: int

    def __post_init__(self) -> None:
        if not 0 < self.cache <= self.max:
            raise ValueError(f"cache: must be from 1 to max {self.max}, is {self.cache}")

    def values(self, group: Sequence[Answer]) -> list[float]:
        start = self.max - self.cache
        return [max(-1.0, min(0.0, (start - answer.tokens) / self.cache)) for answer in group]


@dataclass(frozen=True)
class GroupLength:
    """k1.5's: from +.5 for the shortest of the group to -.5 for the longest; wrong answers gain nothing by being short."""

    def values(self, group: Sequence[Answer]) -> list[float]:
        shortest, longest = min(a.tokens for a in group), max(a.tokens for a in group)
        if shortest == longest:
            return [0.0] * len(group)
        shares = [0.5 - (a.tokens - shortest) / (longest - shortest) for a in group]
        return [share if a.score == 1 else min(0.0, share) for share, a in zip(shares, group)]


@dataclass(frozen=True)
class Cosine:
    """Half a cosine over `max` tokens: right answers from `right_short` to `right_long`, wrong ones from `wrong_short` to `wrong_long`."""

    max: int
    right_short: float = 1.0
    right_long: float = 0.5
    wrong_short: float = -1.0
    wrong_long: float = -0.5

    def __post_init__(self) -> None:
        if self.max < 1:
            raise ValueError(f"max: must be at least 1, is {self.max}")
        if min(self.right_short, self.right_long) <= max(self.wrong_short, self.wrong_long):
            raise ValueError("right_short, right_long: both must be above wrong_short and wrong_long")

    def values(self, group: Sequence[Answer]) -> list[float]:
        out = []
        for answer in group:
            right = answer.score == 1
            short, long = (self.right_short, self.right_long) if right else (self.wrong_short, self.wrong_long)
            out.append(long + (short - long) * (1 + math.cos(math.pi * min(1.0, answer.tokens / self.max))) / 2)
        return out


@dataclass(frozen=True)
class Repetition:
    """Minus the share of `ngram`-grams of words that stood there before. In scripts without spaces a letter is a word."""

    ngram: int = 3

    def __post_init__(self) -> None:
        if self.ngram < 1:
            raise ValueError(f"ngram: must be at least 1, is {self.ngram}")

    def values(self, group: Sequence[Answer]) -> list[float]:
        return [self._new(answer.text) - 1 for answer in group]

    def _new(self, text: str) -> float:
        words = [piece for word in text.lower().split() for piece in ([word] if word.isascii() else UNSPACED_LETTER.split(word)) if piece]
        grams = list(zip(*(words[i:] for i in range(self.ngram))))
        return len({*grams}) / len(grams) if grams else 1.0


UNSPACED_LETTER = re.compile("([\u0e00-\u0e7f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff])")
PARTS: dict[str, type[Any]] = {
    "correct": Correct,
    "format": Format,
    "tags": Tags,
    "language": Language,
    "repetition": Repetition,
    "finished": Finished,
}
LENGTHS: dict[str, type[Any]] = {"overlong": Overlong, "group": GroupLength, "cosine": Cosine}


def make_part(name: str, options: Mapping[str, Any]) -> tuple[str, Part]:
    """The part of this name, and what to call it in results: lengths by their kind too."""
    kinds, label = PARTS, name
    if name == "length":
        kind = options.get("kind")
        if kind not in LENGTHS:
            raise ValueError(f"reward length: kind: must be {', '.join(LENGTHS)}, is {kind!r}{nearest(str(kind), LENGTHS)}")
        kinds, label, name = LENGTHS, f"length_{kind}", kind
        options = {key: value for key, value in options.items() if key != "kind"}
    if name not in kinds:
        known = [*PARTS, "length"]
        raise ValueError(f"reward: unknown part {name!r}; known: {', '.join(known)}{nearest(name, known)}")
    return label, configured(kinds[name], f"reward {label}", options)
