"""Countdown: reach a target with the given numbers, each used exactly once, by + - * and exact division.

Answers are many and easy to check but must be searched for, so it is the smallest task on which RL can improve a search. A problem
is made backwards, from a random expression, so it can always be solved with positive whole numbers. The worked solution shows
a short search, one try a line, each step a true equation, and stops at the line that ends in the target:

    Make 16 from 5 2 3.
    5*2=10;10+3=13
    3+5=8;8*2=16          and the answer (3+5)*2

The verifier reads the expression itself (shunting-yard: no eval, no recursion, bounded length). Not done: tasks where a
number may be left out, and a search that prunes.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import ClassVar

from jevons.data.chat import Message
from jevons.tasks.task import Problem, Split, Task, answer_text, draw

MAX_NUMBERS = 8
MAX_EXPRESSION = 256  # characters
MAX_TRIES = 2  # failed ones, in a worked solution
PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}
TOKEN = re.compile(r"[0-9]+|[-+*/()]")


@dataclass(frozen=True)
class Countdown(Task):
    """Problems with `numbers` numbers from 1 to `largest` and a target from 1 to `largest_target`. Difficulty is `numbers`."""

    numbers: int = 3
    largest: int = 10
    largest_target: int = 100

    name: ClassVar[str] = "countdown"

    def __post_init__(self) -> None:
        if not 2 <= self.numbers <= MAX_NUMBERS:
            raise ValueError(f"numbers: must be between 2 and {MAX_NUMBERS}, is {self.numbers}")
        if not 2 <= self.largest <= 1000:
            raise ValueError(f"largest: must be between 2 and 1000, is {self.largest}")
        if not self.largest <= self.largest_target <= 10_000:
            raise ValueError(f"largest_target: must be between largest {self.largest} and 10000, is {self.largest_target}")

    def problem(self, split: Split, index: int, seed: int) -> Problem:
        return draw(f"{self.name}/{self.numbers}/{self.largest}/{self.largest_target}", split, index, seed, self._make)

    def _make(self, rng: random.Random) -> tuple[str, Problem]:
        while True:
            numbers = [rng.randint(1, self.largest) for _ in range(self.numbers)]
            target, expression = _combine(numbers, rng)
            if target <= self.largest_target:
                break
        prompt = f"Make {target} from {' '.join(map(str, numbers))}."
        problem = Problem(prompt, expression, {"numbers": numbers, "target": target}, self.numbers)
        return f"{sorted(numbers)}={target}", problem

    def worked(self, problem: Problem) -> tuple[Message, ...]:
        rng = random.Random(problem.prompt)
        tries = [_combine(problem.data["numbers"], rng) for _ in range(rng.randint(0, MAX_TRIES))]
        expressions = [expression for value, expression in tries if value != problem.data["target"]]
        lines = []
        for expression in [*dict.fromkeys(expressions), problem.answer]:
            evaluation = evaluate(expression)
            assert evaluation is not None
            lines.append(";".join(evaluation.steps))
        return Message("user", problem.prompt), Message("assistant", problem.answer, "\n".join(lines))

    def verify(self, problem: Problem, reply: str) -> float:
        """Grades the last line of the answer: an expression, or an equation that ends in the target."""
        left, equals, right = self.vote(problem, reply).partition("=")
        if equals and right.strip() != str(problem.data["target"]):
            return 0.0
        evaluation = evaluate(left)
        if evaluation is None:
            return 0.0
        return float(evaluation.value == problem.data["target"] and sorted(evaluation.numbers) == sorted(problem.data["numbers"]))

    def vote(self, problem: Problem, reply: str) -> str:
        text = answer_text(reply)
        return text[text.rfind("\n") + 1 :]


def _combine(numbers: list[int], rng: random.Random) -> tuple[int, str]:
    """A random expression with all numbers in which every step is a positive whole number: (value, expression)."""
    terms = [(number, str(number), 3) for number in numbers]  # value, text, precedence of its outermost operator
    while len(terms) > 1:
        a = terms.pop(rng.randrange(len(terms)))
        b = terms.pop(rng.randrange(len(terms)))
        operators = "+*" + "-" * (a[0] > b[0]) + "/" * (b[0] > 1 and a[0] % b[0] == 0)
        terms.append(_join(a, rng.choice(operators), b))
    return terms[0][:2]


def _join(a: tuple[int, str, int], operator: str, b: tuple[int, str, int]) -> tuple[int, str, int]:
    precedence = PRECEDENCE[operator]
    left = f"({a[1]})" if a[2] < precedence else a[1]
    right = f"({b[1]})" if b[2] < precedence or (b[2] == precedence and operator in "-/") else b[1]
    value = _apply(a[0], operator, b[0])
    assert value is not None
    return value, f"{left}{operator}{right}", precedence


@dataclass(frozen=True)
class Evaluation:
    value: int
    numbers: tuple[int, ...]  # as written, left to right
    steps: tuple[str, ...]  # each operation as an equation, in the order of evaluation


def evaluate(expression: str) -> Evaluation | None:
    """The value of an arithmetic expression of whole numbers, + - * / and parentheses; None where it is not one.

    Not one, too: divisions that leave a remainder, signs without a left operand, numbers with leading zeros, and
    anything longer than 256 characters.
    """
    if len(expression) > MAX_EXPRESSION:
        return None
    tokens = TOKEN.findall(expression)
    if "".join(tokens) != expression.replace(" ", ""):
        return None
    numbers: list[int] = []
    values: list[int] = []
    operators: list[str] = []
    steps: list[str] = []

    def reduce() -> bool:
        b, a, operator = values.pop(), values.pop(), operators.pop()
        value = _apply(a, operator, b)
        if value is None:
            return False
        steps.append(f"{a}{operator}{b}={value}")
        values.append(value)
        return True

    wants_operand = True
    for token in tokens:
        if (token not in PRECEDENCE and token != ")") != wants_operand:
            return None
        if token == "(":
            operators.append(token)
        elif token == ")":
            while operators and operators[-1] != "(":
                if not reduce():
                    return None
            if not operators:
                return None
            operators.pop()
        elif token in PRECEDENCE:
            while operators and operators[-1] != "(" and PRECEDENCE[operators[-1]] >= PRECEDENCE[token]:
                if not reduce():
                    return None
            operators.append(token)
            wants_operand = True
        else:
            if token[0] == "0" and token != "0":
                return None
            values.append(int(token))
            numbers.append(int(token))
            wants_operand = False
    if wants_operand or "(" in operators:
        return None
    while operators:
        if not reduce():
            return None
    return Evaluation(values[0], tuple(numbers), tuple(steps))


def _apply(a: int, operator: str, b: int) -> int | None:
    match operator:
        case "+":
            return a + b
        case "-":
            return a - b
        case "*":
            return a * b
        case _:
            return a // b if b and a % b == 0 else None
