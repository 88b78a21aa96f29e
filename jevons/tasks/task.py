"""Problems whose answers a program can grade: the ground that pretraining, RL and evaluation of reasoning share.

A task makes its problems from (split, index, seed), at random access and the same on every machine, so a resumed run or a second
process needs no state. Training and test problems are disjoint by construction: a hash of the problem itself, not of how it was
drawn, says to which split it belongs, and a draw of the wrong split is drawn again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from jevons.data.chat import Message

Split = Literal["train", "test"]
TASKS = ("arithmetic", "countdown")
TEST_SHARE = 16  # one problem in so many is a test problem
MAX_DRAWS = 10_000


@dataclass(frozen=True)
class Problem:
    """A question and what its verifier needs to grade an answer to it."""

    prompt: str
    answer: str  # one right answer, as a person would write it
    data: dict[str, Any]  # what the verifier needs, ready for JSON
    difficulty: int  # in the task's own unit


class Task(Protocol):
    """A source of problems, each with a worked solution and a verifier."""

    @property
    def name(self) -> str: ...

    def problem(self, split: Split, index: int, seed: int) -> Problem:
        """The same arguments give the same problem, on any machine."""
        ...

    def worked(self, problem: Problem) -> tuple[Message, ...]:
        """The prompt as a user's message, and an assistant's with the steps as `reasoning` and the answer as `content`."""
        ...

    def verify(self, problem: Problem, reply: str) -> float:
        """1.0 for a right answer, else 0.0. Takes any text that a model can write, and never raises."""
        ...


def get_task(name: str, **options: Any) -> Task:
    """The task of this name. Raises ValueError for an unknown name, an unknown option or a bad value."""
    from jevons.tasks.arithmetic import Arithmetic  # here, because tasks import Problem from this file
    from jevons.tasks.countdown import Countdown

    kinds: dict[str, type[Arithmetic] | type[Countdown]] = {"arithmetic": Arithmetic, "countdown": Countdown}
    assert tuple(kinds) == TASKS
    if name not in kinds:
        raise ValueError(f"task: unknown {name!r}; known: {', '.join(TASKS)}")
    known = {field.name: type(field.default) for field in dataclasses.fields(kinds[name])}
    for option, value in options.items():
        if option not in known:
            raise ValueError(f"task {name}: unknown option {option!r}; known: {', '.join(known)}")
        if type(value) is not known[option]:
            raise ValueError(f"task {name}: {option}: must be {known[option].__name__}, is {value!r}")
    return kinds[name](**options)


def draw(source: str, split: Split, index: int, seed: int, make: Callable[[random.Random], tuple[str, Problem]]) -> Problem:
    """The problem at an index of a split. `make` draws a candidate and its canonical form, equal for problems that are the same.

    `source` names what is drawn from (task and options), so that two tasks with one seed do not share their random numbers.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split: must be train or test, is {split!r}")
    rng = random.Random(f"{source}/{split}/{seed}/{index}")  # a string seeds through SHA-512: the same in every process
    for _ in range(MAX_DRAWS):
        canonical, problem = make(rng)
        if is_test(canonical) == (split == "test"):
            return problem
    raise ValueError(f"{source}: too few different problems for a {split} split; raise the difficulty")


def is_test(canonical: str) -> bool:
    """Whether the problem of this canonical form belongs to the test split, whatever seed and options drew it."""
    return int.from_bytes(hashlib.blake2b(canonical.encode(), digest_size=8).digest(), "little") % TEST_SHARE == 0


def answer_text(reply: str) -> str:
    """What a reply says after its reasoning: nothing where the reasoning was opened and never closed."""
    _, closed, content = reply.rpartition("</think>")
    if not closed and "<think>" in reply:
        return ""
    return content.strip()
