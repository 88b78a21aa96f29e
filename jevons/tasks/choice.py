r"""Multiple choice from JSON lines with MMLU-Pro's fields: `question`, `options`, `answer` (a letter) or `answer_index`, `category`.

The prompt asks for "The answer is (X)", and the grader takes the letter from there, from a tag or a box, or from the other places where
models put it; of several answers the last counts. Text after a letter decides whether it is an answer or a word: "the answer is a matter
of taste" names no option. Difficulty is the number of options.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

from jevons.data.chat import Message
from jevons.tasks.extract import boxed, last_line, tagged
from jevons.tasks.lines import Lines, field
from jevons.tasks.task import Problem, answer_text

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
INSTRUCTION = 'Think step by step, then end with "The answer is (X)", where X is the letter of the right option.'
OPENING = r"[\s:*_`$\"'(\[{]{0,9}(?:option|choice)?[\s:*_`$\"'(\[{]{0,9}(?:\\(?:boxed|text|textbf|mathrm|mathbf)\s?\{[\s(*]{0,9}){0,3}"
CLOSING = r"(?=[)\]}]|\s{0,9}(?:[.,:;!*_`$\"']|\Z|\n))"  # what may follow a letter that is not a word
VERB = r"(?:[^.\n()]{0,40}?\b(?:is|be)\b\s?:?|[\s*_]{0,9}[:=])"
STATED = re.compile(rf"\banswer{VERB}{OPENING}([A-Z]){CLOSING}", re.IGNORECASE)
ALTERNATIVE = re.compile(r"[)\]}*_`$\"'\s]*(?:\bor\b|\band\b|/|,)[\s*_`$\"'(\[{]*[A-Z](?![a-z])", re.IGNORECASE)
BRACKETED = re.compile(r"[(\[]([A-Z])[)\]]")
HEADED = re.compile(r"^[\s*_`]*(?:option\s+|choice\s+)?\(?([A-Z])(?:[).:*_`]|\s*$)", re.IGNORECASE)


@dataclass(frozen=True)
class Choice(Lines):
    """`path` and `test_path` as all tasks of lines have them."""

    instruction: str = INSTRUCTION

    name: ClassVar[str] = "choice"

    def parse(self, record: dict[str, Any]) -> Problem:
        question, options = field(record, "question", "prompt"), record.get("options")
        if not isinstance(options, list) or not 2 <= len(options) <= len(LETTERS):
            raise ValueError(f"options: must be a list of 2 to {len(LETTERS)}, is {str(options)[:60]}")
        letters = LETTERS[: len(options)]
        answer, index = record.get("answer"), record.get("answer_index")
        letter = answer.strip().strip("()").upper() if isinstance(answer, str) else None
        if index is not None:
            if type(index) is not int or not 0 <= index < len(options):
                raise ValueError(f"answer_index: must be from 0 to {len(options) - 1}, is {index!r}")
            if letter and letter != letters[index]:
                raise ValueError(f"answer is {letter} but answer_index {index} is {letters[index]}")
            letter = letters[index]
        if not letter or letter not in tuple(letters):
            raise ValueError(f"answer: must be a letter from A to {letters[-1]}, is {answer!r}")
        listed = "\n".join(f"({at}) {str(option).strip()}" for at, option in zip(letters, options))
        data: dict[str, Any] = {"options": [str(option) for option in options]}
        if isinstance(record.get("cot_content"), str) and record["cot_content"].strip():
            data["solution"] = record["cot_content"].removeprefix("A:").strip()
        return Problem(self.prompt(f"{question.strip()}\n\n{listed}"), letter, data, len(options), str(record.get("category") or ""))

    def worked(self, problem: Problem) -> tuple[Message, ...] | None:
        if "solution" not in problem.data:
            return None
        return Message("user", problem.prompt), Message("assistant", self.gold(problem), problem.data["solution"])

    def gold(self, problem: Problem) -> str:
        return f"The answer is ({problem.answer})."

    def verify(self, problem: Problem, reply: str) -> float:
        return float(self.vote(problem, reply) == problem.answer)

    def vote(self, problem: Problem, reply: str) -> str:
        return chosen(answer_text(reply), problem.data["options"]) or ""


def chosen(text: str, options: list[str]) -> str | None:
    """The letter that an answer names, None where it names none of these options, or two at once."""
    letters = LETTERS[: len(options)]
    if (inside := tagged(text)) is not None:
        text = inside
    if (inside := boxed(text)) is not None:
        text = re.sub(r"^\\(?:text|textbf|mathrm|mathbf)\s*\{(.*)\}$", r"\1", inside, flags=re.DOTALL)
    stated = list(STATED.finditer(text))
    if stated:
        letter = stated[-1][1].upper()
        return None if letter not in letters or ALTERNATIVE.match(text, stated[-1].end(1)) else letter
    ending = text.strip()[text.strip().rfind("\n") + 1 :]
    for pattern in (HEADED, BRACKETED):
        named = {letter.upper() for letter in pattern.findall(ending)}
        if named:
            (letter, *others) = named
            return letter if letter in letters and not others else None
    # the option itself, word for word
    line = last_line(text).rstrip(".").casefold()
    same = [letter for letter, option in zip(letters, options) if option.strip().rstrip(".").casefold() == line]
    return same[0] if len(same) == 1 else None
