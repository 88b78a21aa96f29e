"""Addition, subtraction and short multiplication, worked as on paper: the task that a model of a few million parameters can learn.

The steps are made so that every token follows from a few others at fixed distances. The operands are restated, padded to equal
width (the only step that must find digits in a prompt of any length); then one line a column, right to left, each a true equation
of two digits and a carry whose result always has two digits: its last is the column's digit, its first the next carry.

    47+385=?    27*5=?      504-38=?
    047+385     027*5       504-038
    7+5+0=12    7*5+0=35    14-8-0=06
    4+8+1=13    2*5+3=13    10-3-1=06
    0+3+1=04    0*5+1=01    15-0-1=14
    0432        0135        466

A subtraction's column borrows its ten in advance: a result below 10 used it, and the next column pays 1. No separators stand
beside digits and each symbol stands alone, so that a tokenizer with one token a digit cuts every line the same way. Not done:
several phrasings of a prompt, long division, negative results.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import ClassVar

from jevons.data.chat import Message
from jevons.tasks.task import Problem, Split, Task, answer_text, draw

MAX_DIGITS = 12
NUMBER = re.compile(r"(?<![0-9.])-?[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?")


@dataclass(frozen=True)
class Arithmetic(Task):
    """Problems of up to `digits` digits an operand; a multiplication's second operand has one. Difficulty is the longer one's digits.

    `unworked` is the share of problems whose solution to learn from is the answer alone. A model that saw both kinds answers in both
    ways, and reinforcement learning finds out which of them pays.
    """

    digits: int = 3
    operations: str = "+-*"
    unworked: float = 0.0

    name: ClassVar[str] = "arithmetic"

    def __post_init__(self) -> None:
        if not 1 <= self.digits <= MAX_DIGITS:
            raise ValueError(f"digits: must be between 1 and {MAX_DIGITS}, is {self.digits}")
        if not self.operations or set(self.operations) - set("+-*"):
            raise ValueError(f"operations: must be some of the characters +-*, is {self.operations!r}")
        if not 0 <= self.unworked <= 1:
            raise ValueError(f"unworked: must be a share, 0 to 1, is {self.unworked}")

    def problem(self, split: Split, index: int, seed: int) -> Problem:
        return draw(f"{self.name}/{self.digits}/{self.operations}", split, index, seed, self._make)

    def _make(self, rng: random.Random) -> tuple[str, Problem]:
        operation = rng.choice(self.operations)
        a, b = self._operand(rng), rng.randrange(10) if operation == "*" else self._operand(rng)
        if operation == "-" and a < b:
            a, b = b, a
        answer = a + b if operation == "+" else a - b if operation == "-" else a * b
        problem = Problem(
            prompt=f"{a}{operation}{b}=?",
            answer=str(answer),
            data={"a": a, "b": b, "operation": operation},
            difficulty=max(len(str(a)), len(str(b))),
        )
        # 47+385 and 385+47 are one problem: the one must not be trained on where the other is a test
        first, second = (a, b) if operation == "-" else (max(a, b), min(a, b))
        return f"{first}{operation}{second}", problem

    def _operand(self, rng: random.Random) -> int:
        # lengths in proportion to themselves: mostly full width, yet 2+2 is asked often enough to be learned
        lengths = range(1, self.digits + 1)
        (length,) = rng.choices(lengths, weights=lengths)
        return rng.randrange(10 ** (length - 1) if length > 1 else 0, 10**length)

    def worked(self, problem: Problem) -> tuple[Message, ...]:
        if random.Random(problem.prompt).random() < self.unworked:
            return Message("user", problem.prompt), Message("assistant", problem.answer)
        a, b, operation = problem.data["a"], problem.data["b"], problem.data["operation"]
        width = max(self.digits, problem.difficulty)
        lines = _multiply(a, b, width) if operation == "*" else _add(a, b, width) if operation == "+" else _subtract(a, b, width)
        return Message("user", problem.prompt), Message("assistant", problem.answer, "\n".join(lines))

    def verify(self, problem: Problem, reply: str) -> float:
        """Grades the last number of the answer, which may have thousands separators but no leading zeros."""
        return float(self.vote(problem, reply) == problem.answer)

    def vote(self, problem: Problem, reply: str) -> str:
        numbers = NUMBER.findall(answer_text(reply))
        return numbers[-1].replace(",", "") if numbers else ""


def _columns(number: int, width: int) -> list[int]:
    """Digits from right to left, padded with zeros."""
    return [int(digit) for digit in reversed(f"{number:0{width}}")]


def _add(a: int, b: int, width: int) -> list[str]:
    lines, carry, written = [f"{a:0{width}}+{b:0{width}}"], 0, ""
    for x, y in zip(_columns(a, width), _columns(b, width)):
        result = f"{x + y + carry:02}"
        lines.append(f"{x}+{y}+{carry}={result}")
        carry, written = int(result[0]), result[1] + written
    return [*lines, f"{carry}{written}"]


def _multiply(a: int, b: int, width: int) -> list[str]:
    lines, carry, written = [f"{a:0{width}}*{b}"], 0, ""
    for x in _columns(a, width):
        result = f"{x * b + carry:02}"
        lines.append(f"{x}*{b}+{carry}={result}")
        carry, written = int(result[0]), result[1] + written
    return [*lines, f"{carry}{written}"]


def _subtract(a: int, b: int, width: int) -> list[str]:
    assert a >= b
    lines, borrow, written = [f"{a:0{width}}-{b:0{width}}"], 0, ""
    for x, y in zip(_columns(a, width), _columns(b, width)):
        result = f"{10 + x - y - borrow:02}"
        lines.append(f"1{x}-{y}-{borrow}={result}")
        borrow, written = 1 - int(result[0]), result[1] + written
    return [*lines, written]
