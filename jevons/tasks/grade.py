"""Grading: verifiers run where they can do no harm, on whatever a model wrote.

A verifier that hangs or crashes on one answer must not stop a run of hours: the answer scores 0 and is counted. One that does so all the
time must not be taken for a model that is always wrong: past a limit the run stops with the last failure. And before it starts, answers
that are known to be right must score 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from jevons.tasks.pool import PROCESSES, Outcome, Pool
from jevons.tasks.task import Problem, Split, Task

SHOWN = 5  # wrongly graded right answers in an error
NO_ANSWER = "<answer>I do not know.</answer>"


@dataclass(frozen=True)
class Grade:
    """`score` from 0 to 1, and why it is 0 where that is the verifier's fault rather than the answer's."""

    score: float
    failure: str | None = None


class Grader:
    """Grades answers to a task's problems: here where its verifier is trusted, else in processes with `timeout` seconds an answer.

    `failures` counts answers on which the verifier hung, crashed or raised; grading raises ValueError once there are more than `limit`.
    Making one raises ValueError where the verifier cannot be loaded. Close it, or use it as a context, to end its processes.
    """

    def __init__(self, task: Task, timeout: float = 10.0, limit: int = 100, processes: int = PROCESSES) -> None:
        self.task, self.limit, self.failures = task, limit, 0
        self._pool: Pool | None = None
        if task.trusted:
            task.ready()
            return
        self._pool = Pool(partial(score, task), task.ready, timeout, processes)
        try:
            self._pool.start()
        except ValueError as error:
            raise ValueError(f"task {task.name}: its verifier cannot be started: {error}") from error

    def grade(self, pairs: Sequence[tuple[Problem, str]]) -> list[Grade]:
        """Grades of (problem, reply) in their order."""
        calls = [(problem, reply) for problem, reply in pairs]
        outcomes = self._pool.run(calls) if self._pool else [_try(self.task, *call) for call in calls]
        failures = [outcome.failure for outcome in outcomes if outcome.failure is not None]
        self.failures += len(failures)
        if failures and self.failures > self.limit:
            raise ValueError(
                f"task {self.task.name}: its verifier hung or crashed on {self.failures} answers, more than the {self.limit} allowed "
                f"(rl.verifier_failures); the last: {failures[-1]}"
            )
        return [Grade(0.0 if o.failure is not None else o.value, o.failure) for o in outcomes]

    def close(self) -> None:
        if self._pool:
            self._pool.close()

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def score(task: Task, problem: Problem, reply: str) -> float:
    """What the verifier says, if it is a score."""
    value: Any = task.verify(problem, reply)
    if not hasattr(value, "__float__") or not 0 <= float(value) <= 1:  # false for nan too
        raise ValueError(f"it returned {value!r}, a score is a number from 0 to 1")
    return float(value)


def _try(task: Task, problem: Problem, reply: str) -> Outcome:
    try:
        return Outcome(score(task, problem, reply))
    except Exception as error:  # counted, and raised past the limit
        return Outcome(failure=f"{type(error).__name__}: {error}")


def check_gold(task: Task, count: int = 16, timeout: float = 10.0) -> None:
    """Grade the task's own right answers to `count` problems of each split; ValueError that lists those which do not score 1.

    Problems without a known answer are passed over. A verifier to which no answer at all is right too is refused as well.
    """
    splits: tuple[Split, ...] = ("train", "test")
    problems: list[Problem] = []
    for split in splits:
        size = task.size(split)
        problems += [task.problem(split, index, seed=0) for index in range(count if size is None else min(count, size))]
    pairs = [(problem, gold) for problem in problems if (gold := task.gold(problem)) is not None]
    with Grader(task, timeout, limit=len(pairs) + len(problems), processes=1) as grader:
        grades = grader.grade(pairs)
        anything = bool(problems) and all(grader.grade([(problem, NO_ANSWER)])[0].score == 1 for problem in problems)
    wrong = [(problem, gold, grade) for (problem, gold), grade in zip(pairs, grades) if grade.score != 1]
    if wrong:
        shown = "".join(
            f"\n  {problem.prompt[-200:]!r} answered {gold[-200:]!r}: {grade.failure or f'scores {grade.score:g}'}"
            for problem, gold, grade in wrong[:SHOWN]
        )
        raise ValueError(f"task {task.name}: {len(wrong)} of {len(pairs)} answers that are right by its own account do not score 1:{shown}")
    if anything:
        raise ValueError(f"task {task.name}: its verifier takes anything for right, even {NO_ANSWER!r}")
