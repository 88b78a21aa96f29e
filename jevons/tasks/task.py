"""Problems whose answers a program can grade: the ground that pretraining, RL and evaluation of reasoning share.

A task makes its problems from (split, index, seed), at random access and the same on every machine, so a resumed run or a second
process needs no state. Training and test problems are disjoint by construction: a hash of the problem itself, not of how it was
drawn, says to which split it belongs, and a draw of the wrong split is drawn again. Tasks with a fixed number of problems say how
many, and pass through all of them in a shuffled order, again and again.

A task is a frozen dataclass whose fields are its options, named by the recipe (`get_task`); making one checks the options and reads
no file. Not done: a registry that others add to; a verifier of one's own is the task `custom`.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib
import random
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from jevons.data.chat import Message

Split = Literal["train", "test"]
# name: module and class, imported when asked for, because some need packages that are not everybody's
KINDS = {
    "arithmetic": ("jevons.tasks.arithmetic", "Arithmetic"),
    "countdown": ("jevons.tasks.countdown", "Countdown"),
    "gym": ("jevons.tasks.gym", "Gym"),
    "math": ("jevons.tasks.math", "Math"),
    "choice": ("jevons.tasks.choice", "Choice"),
    "code": ("jevons.tasks.code", "Code"),
    "custom": ("jevons.tasks.custom", "Custom"),
}
TASKS = tuple(KINDS)
TEST_SHARE = 16  # one problem in so many is a test problem
MAX_DRAWS = 10_000


@dataclass(frozen=True)
class Problem:
    """A question and what its verifier needs to grade an answer to it."""

    prompt: str  # the user's words, whole
    answer: str  # one right answer, as a person would write it
    data: dict[str, Any]  # what the verifier needs, ready for JSON
    difficulty: int  # in the task's own unit
    category: str = ""  # what to tell results apart by, besides difficulty


class Task(Protocol):
    """A source of problems and their verifier. A class that inherits from this one has the answers of a task without more to say."""

    @property
    def name(self) -> str: ...

    @property
    def trusted(self) -> bool:
        """Whether `verify` may run in this process: it always ends soon, whatever it is given, and runs nobody else's code."""
        return True

    def size(self, split: Split) -> int | None:
        """How many problems a split has; None: as many as are asked for."""
        return None

    def skipped(self) -> tuple[str, ...]:
        """Problems of the source that cannot be graded and are left out, each as "file:line: why"."""
        return ()

    def notices(self) -> tuple[str, ...]:
        """What whoever uses this task should be told before it starts."""
        skipped = self.skipped()
        return (f"{self.name}: {len(skipped)} problems cannot be graded and are left out, such as {skipped[0]}",) if skipped else ()

    def problem(self, split: Split, index: int, seed: int) -> Problem:
        """The same arguments give the same problem, on any machine. ValueError where the split has none."""
        ...

    def messages(self, problem: Problem) -> tuple[Message, ...]:
        """The conversation to answer."""
        return (Message("user", problem.prompt),)

    def worked(self, problem: Problem) -> tuple[Message, ...] | None:
        """The prompt as a user's message, and an assistant's with the steps as `reasoning` and the answer as `content`.

        None where there is no worked solution to learn from.
        """
        return None

    def gold(self, problem: Problem) -> str | None:
        """A reply in the form that the task asks for, which must score 1; None where no right answer is known."""
        worked = self.worked(problem)
        if worked is None:
            return problem.answer
        reasoning, content = worked[-1].reasoning, worked[-1].content
        return f"<think>\n{reasoning}\n</think>\n\n{content}" if reasoning else content

    def ready(self) -> None:
        """Load what `verify` needs, in the process where it will run. ValueError where that cannot be had."""

    def verify(self, problem: Problem, reply: str) -> float:
        """1.0 for a right answer, 0.0 for a wrong one, between them where the task gives partial credit.

        Takes any text that a model can write. Of a trusted task it never raises; others run under `tasks/grade.py`.
        """
        ...

    def vote(self, problem: Problem, reply: str) -> str:
        """What a reply answers, written alike where it means the same: what majorities are counted by. "" is no answer."""
        return answer_text(reply)

    def tools(self) -> list[dict[str, Any]]:
        """Functions that a reply may call, as JSON schemas of OpenAI's form."""
        return []

    def call(self, problem: Problem, name: str, arguments: dict[str, Any]) -> str:
        """What a tool answers. A model's malformed call is answered with what is wrong with it, not raised."""
        return f"error: there is no tool {name!r}"

    def quick(self, name: str) -> bool:
        """Whether a call of this tool returns at once; others are made while the sampler goes on, several at a time."""
        return True


def get_task(name: str, **options: Any) -> Task:
    """The task of this name. Raises ValueError for an unknown name, an unknown option, a bad value or a package that is missing."""
    if name not in KINDS:
        raise ValueError(f"task: unknown {name!r}; known: {', '.join(TASKS)}{nearest(name, TASKS)}")
    module, kind = KINDS[name]
    return configured(getattr(importlib.import_module(module), kind), f"task {name}", options)


def configured(kind: type[Any], where: str, options: Mapping[str, Any]) -> Any:
    """A dataclass made of a recipe's options, which `where` names in errors: unknown, missing and mistyped ones are ValueErrors.

    An option whose name is also a method's has an underscore after it as a field: tools_.
    """
    hints = typing.get_type_hints(kind)
    fields = {field.name.rstrip("_"): field for field in dataclasses.fields(kind)}
    for option in options:
        if option not in fields:
            known = f"known: {', '.join(fields)}" if fields else "it has none"
            raise ValueError(f"{where}: unknown option {option!r}; {known}{nearest(option, fields)}")
    for option, field in fields.items():
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING and option not in options:
            raise ValueError(f"{where}: {option}: is missing")
    return kind(**{fields[k].name: _checked(f"{where}: {k}", hints[fields[k].name], v) for k, v in options.items()})


def _checked(where: str, hint: Any, value: Any) -> Any:
    """A value out of TOML as a field of this type holds it: whole numbers are decimals too, lists are tuples."""
    if hint is float and type(value) is int:
        return float(value)
    if typing.get_origin(hint) is tuple and isinstance(value, (list, tuple)):
        (item, _) = typing.get_args(hint)
        return tuple(_checked(f"{where}[{i}]", item, v) for i, v in enumerate(value))
    kind = typing.get_origin(hint) or hint
    if type(value) is not kind:
        raise ValueError(f"{where}: must be {'list' if kind is tuple else kind.__name__}, is {value!r}")
    return value


def nearest(name: str, known: Iterable[str]) -> str:
    """A phrase that ends an error about an unknown name: which one was probably meant, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=3)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def draw(
    source: str,
    split: Split,
    index: int,
    seed: int,
    make: Callable[[random.Random], tuple[str, Problem]],
    share: int = TEST_SHARE,
) -> Problem:
    """The problem at an index of a split. `make` draws a candidate and its canonical form, equal for problems that are the same.

    `source` names what is drawn from (task and options), so that two tasks with one seed do not share their random numbers.
    """
    check_split(split)
    rng = random.Random(f"{source}/{split}/{seed}/{index}")  # a string seeds through SHA-512: the same in every process
    for _ in range(MAX_DRAWS):
        canonical, problem = make(rng)
        if is_test(canonical, share) == (split == "test"):
            return problem
    raise ValueError(f"{source}: too few different problems for a {split} split; raise the difficulty")


def check_split(split: str) -> None:
    if split not in ("train", "test"):
        raise ValueError(f"split: must be train or test, is {split!r}")


def is_test(canonical: str, share: int = TEST_SHARE) -> bool:
    """Whether the problem of this canonical form belongs to the test split (one in `share`), whatever seed and options drew it."""
    return int.from_bytes(hashlib.blake2b(canonical.encode(), digest_size=8).digest(), "little") % share == 0


def answer_text(reply: str) -> str:
    """What a reply says after its reasoning: nothing where the reasoning was opened and never closed."""
    _, closed, content = reply.rpartition("</think>")
    if not closed and "<think>" in reply:
        return ""
    return content.strip()
