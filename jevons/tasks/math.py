r"""Word problems and competition mathematics from JSON lines, graded by whether the answer has the same value.

    {"question": ..., "answer": "She has 6 * 7 = <<6*7=42>>42 eggs.\n#### 42"}                      as GSM8K has them
    {"problem": ..., "solution": "... so it is $\\boxed{\\frac12}$.", "level": "Level 3", "type": "Algebra"}      as MATH has them
    {"question" or "prompt" or "problem": ..., "answer": "42"}                                      anything else

Equality of formulas is `math-verify`'s (an optional package): it reads LaTeX into a computer algebra system, which takes milliseconds or
for ever, so it runs in the processes of `tasks/pool.py` alone. Before any problem is used each gold answer must be readable and equal to
itself there; which are not is reported by line. Numbers and simple fractions need no such check, the rest take 1 to 20 ms each, once.

Not done: proofs, and answers with units that are converted.
"""

from __future__ import annotations

import importlib.util
import logging
import re
from dataclasses import dataclass
from typing import Any, ClassVar

from jevons.data.chat import Message
from jevons.tasks.extract import boxed, check_rule, extract, tagged, write
from jevons.tasks.lines import Lines, field
from jevons.tasks.pool import PROCESSES, Pool
from jevons.tasks.task import Problem, answer_text

# as DeepSeek-R1's model card asks it, so that models that were trained on these very words do what they know
INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
PLAIN = re.compile(r"-?(?:[0-9]+|[0-9]*\.[0-9]+|\\[dt]?frac\{[0-9]+\}\{[1-9][0-9]*\}|[0-9]+/[1-9][0-9]*)")
ANNOTATION = re.compile(r"<<.*?>>")  # a calculator's, inside GSM8K's solutions
LEVEL = re.compile(r"\d+")
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
TAIL = 4000  # characters of a reply without a box or a tag in which an answer is looked for
SECONDS = 10.0  # to read one gold answer


@dataclass(frozen=True)
class Math(Lines):
    """Difficulty is MATH's level, or the number of GSM8K's calculations; the category is MATH's subject."""

    instruction: str = INSTRUCTION
    extract: str = "auto"  # where the answer is (tasks/extract.py)

    name: ClassVar[str] = "math"
    trusted: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rule(self.extract)
        if importlib.util.find_spec("math_verify") is None:
            raise ValueError("task math: grading needs the package math-verify: pip install 'jevons[reasoning]'")

    def parse(self, record: dict[str, Any]) -> Problem:
        question = field(record, "problem", "question", "prompt")
        solution, difficulty = "", 0
        if isinstance(record.get("solution"), str):
            solution = record["solution"]
            given = record.get("answer")
            answer = field(record, "answer") if given is not None else boxed(solution)
            if answer is None:
                raise ValueError("no gold answer: the solution has no \\boxed{}")
        else:
            answer = field(record, "answer")
            if "####" in answer:
                solution, _, answer = answer.rpartition("####")
                difficulty = len(ANNOTATION.findall(solution))
                solution = ANNOTATION.sub("", solution).strip()
                answer = answer.strip().replace(",", "")
        if not answer.strip():
            raise ValueError("the gold answer is empty")
        if found := LEVEL.search(str(record.get("level", ""))):
            difficulty = int(found[0])
        category = record.get("type") or record.get("subject") or ""
        return Problem(self.prompt(question), answer.strip(), {"solution": solution} if solution else {}, difficulty, str(category))

    def gradable(self, problems: list[Problem]) -> list[str]:
        unsure = list({p.answer: None for p in problems if not PLAIN.fullmatch(p.answer)})
        pool = Pool(_readable, _load, SECONDS, min(PROCESSES, 1 + len(unsure) // 64))  # each takes a second to start
        outcomes = pool.run([(answer,) for answer in unsure])
        pool.close()
        bad = {answer for answer, outcome in zip(unsure, outcomes) if outcome.value is not True}
        return [f"its gold answer cannot be graded: {p.answer!r}" if p.answer in bad else "" for p in problems]

    def worked(self, problem: Problem) -> tuple[Message, ...] | None:
        if "solution" not in problem.data:
            return None
        answer = Message("assistant", self._written(problem.answer), problem.data["solution"])
        return Message("user", problem.prompt), answer

    def gold(self, problem: Problem) -> str:
        return self._written(problem.answer)

    def _written(self, answer: str) -> str:
        return write(answer, "boxed" if self.extract in ("auto", "whole", "line") else self.extract)

    def ready(self) -> None:
        _load()

    def verify(self, problem: Problem, reply: str) -> float:
        """1.0 where the answer in the tag or the box, else the last one in the text, equals the gold answer."""
        text = answer_text(reply)
        found = tagged(text) if self.extract in ("auto", "answer") else None
        if found is None and self.extract in ("auto", "boxed"):
            found = boxed(text)
        if found is None and self.extract in ("answer", "boxed"):
            return 0.0
        gold = read(f"\\boxed{{{problem.answer}}}")
        if found is None:
            text = text[-TAIL:] if self.extract != "line" else text[text.rfind("\n") + 1 :]
            return float(equal(gold, read(text)))
        inner = boxed(found) or found
        return float(equal(gold, read(f"\\boxed{{{inner}}}")) or (inner == found and equal(gold, read(found))))

    def vote(self, problem: Problem, reply: str) -> str:
        """The answer as it is written: formulas of one value in two forms are two answers to a majority."""
        return THOUSANDS.sub("", extract(reply, self.extract)).strip("$ ").replace("\\dfrac", "\\frac")


def _load() -> None:
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that nobody watches the time: the pool does
    import math_verify  # noqa: F401


def read(text: str) -> list[Any]:
    """What math-verify finds in a text: an expression and the words it came from, or nothing. May never return."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    found = parse(text, [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()], parsing_timeout=None)
    # 7:00 is read as a division by zero, which equals every other one
    return [] if any(not isinstance(part, str) and part.has(*_nowhere()) for part in found) else found


def equal(gold: list[Any], found: list[Any]) -> bool:
    """Whether what was found has the value of the gold answer. May never return."""
    from math_verify import verify

    return bool(gold) and bool(found) and bool(verify(gold, found, timeout_seconds=None))


def _nowhere() -> tuple[Any, ...]:
    import sympy

    return sympy.zoo, sympy.nan


def _readable(answer: str) -> bool:
    gold = read(f"\\boxed{{{answer}}}")
    return equal(gold, read(f"The answer is $\\boxed{{{answer}}}$."))
