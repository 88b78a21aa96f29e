"""An exam: problems of a task, answered by a model, graded, and summed up.

The same problems for every model (they follow from the task, the split and the seed) and the same seeds for its answers, so two models can
be compared problem by problem, and a result can be had again. An exam that is stopped counts the problems that are answered whole; they are
those with the shortest replies, so its figures are no fair sample, and say that they are not complete.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from jevons.data.chat import Message
from jevons.data.tokenizer import Tokenizer
from jevons.engine.engine import Engine
from jevons.engine.sequence import GREEDY_BELOW, SamplingParams
from jevons.progress import Meter
from jevons.run import Interrupt
from jevons.stages.estimate import estimate, majority, pass_at
from jevons.stages.rollout import Asked, Group, Sampler
from jevons.tasks.grade import Grader
from jevons.tasks.task import Problem, Split, Task

BATCH = 64  # replies between two looks at whether grading is to stop
LEVELS = 6  # of difficulty in a table


@dataclass(frozen=True, kw_only=True)
class Exam:
    """What is asked and how it may be answered; `problems` are as many as the task has where it has fewer."""

    task: Task
    problems: int
    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 256
    max_turns: int = 1
    split: Split = "test"
    seed: int = 0
    system: str = ""
    seconds: float = 10.0  # that a verifier may take for one reply

    def __post_init__(self) -> None:
        if self.problems < 1:
            raise ValueError(f"problems: must be at least 1, is {self.problems}")
        if self.samples < 1:
            raise ValueError(f"samples: must be at least 1, is {self.samples}")
        if self.samples > 1 and self.temperature < GREEDY_BELOW:
            raise ValueError(
                f"temperature: at {self.temperature:g} all {self.samples} samples of a problem are the same; give 0.6 or so, or one sample"
            )
        _ = self.params  # which checks the rest
        if self.max_turns > 1 and not self.task.tools():
            raise ValueError(f"max_turns: {self.max_turns} turns need a task with tools, {self.task.name} has none")
        if self.task.size(self.split) == 0:
            raise ValueError(f"task {self.task.name}: the {self.split} split has no problems")

    @property
    def params(self) -> SamplingParams:
        return SamplingParams(max_tokens=self.max_tokens, temperature=self.temperature, top_p=self.top_p)

    def asked(self) -> list[Asked]:
        count = min(self.problems, self.task.size(self.split) or self.problems)
        task = Prefaced(self.task, self.system) if self.system else self.task
        return [Asked(task, self.task.problem(self.split, i, self.seed), (0, i)) for i in range(count)]


class Prefaced:
    """A task whose conversations begin with a system message."""

    def __init__(self, task: Task, system: str) -> None:
        self._task, self._system = task, system

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def messages(self, problem: Problem) -> tuple[Message, ...]:
        first, *rest = self._task.messages(problem)
        if first.role == "system":  # most templates allow one
            return Message("system", f"{self._system}\n\n{first.content}"), *rest
        return Message("system", self._system), first, *rest


@dataclass
class Sheet:
    """What came of an exam: its groups of answers in the order of the problems, scored."""

    exam: Exam
    groups: list[Group]
    failures: int = 0  # verifiers that hung or crashed; their answers count as wrong
    asked: int = 0
    seconds: float = 0.0  # of answering
    grading: float = 0.0  # seconds

    @property
    def stopped(self) -> bool:
        return len(self.groups) < self.asked

    @property
    def tokens(self) -> int:
        return sum(t.drawn for group in self.groups for t in group.trajectories)

    @property
    def rates(self) -> list[float]:
        """The share of right answers to each problem."""
        return [fmean(row) for row in self.right()]

    def right(self) -> list[list[bool]]:
        """By problem and sample. Partial credit is not right."""
        return [[score == 1.0 for score in group.scores] for group in self.groups]


def sit(exam: Exam, engine: Engine, tokenizer: Tokenizer, interrupt: Interrupt, title: str = "") -> Sheet:
    """Have a model answer an exam; when interrupted, as much of it as is answered and graded by then."""
    asked = exam.asked()
    sheet = Sheet(exam, [], asked=len(asked))
    name = title or exam.task.name
    start = time.perf_counter()
    with Meter(f"evaluate {name}", len(asked)) as meter:
        sampler = Sampler(engine, tokenizer, exam.params, exam.max_turns)
        for finished, drawn in sampler.stream(asked, exam.samples, (exam.seed, "evaluate")):
            sheet.groups += finished
            if interrupt.requested:
                break
            rate = drawn / (time.perf_counter() - start)
            meter.update(len(sheet.groups), f"{drawn:,} tokens  {rate:,.0f} tok/s")
    sheet.groups.sort(key=lambda group: group.asked.key)
    sheet.seconds = time.perf_counter() - start
    _grade(sheet, name, interrupt)
    sheet.grading = time.perf_counter() - start - sheet.seconds
    return sheet


def _grade(sheet: Sheet, name: str, interrupt: Interrupt) -> None:
    """Fill in the scores. Groups that are not graded when a stop is asked for (again) are dropped."""
    exam = sheet.exam
    already = interrupt.requested  # then what was answered is graded all the same
    size = max(1, BATCH // exam.samples)
    done: list[Group] = []
    replies = len(sheet.groups) * exam.samples
    meter = None if exam.task.trusted else Meter(f"grade {name}", len(sheet.groups))
    with Grader(exam.task, exam.seconds, limit=replies) as grader, meter or nullcontext():
        for at in range(0, len(sheet.groups), size):
            batch = sheet.groups[at : at + size]
            grades = iter(grader.grade([(group.asked.problem, text) for group in batch for text in group.texts]))
            for group in batch:
                group.scores = [next(grades).score for _ in group.texts]
            done += batch
            if meter:
                meter.update(len(done), "")
            if interrupt.requested and not already:
                break
        sheet.failures = grader.failures
    sheet.groups = done


def results(sheet: Sheet, examples: int) -> dict[str, Any]:
    """What a sheet says, ready for JSON. Shares are between 0 and 1, intervals hold 95 %. Needs at least one problem.

    `pass_at` and `majority` are there where there are several samples; `scores` by problem and sample.
    """
    exam, right, rates = sheet.exam, sheet.right(), sheet.rates
    accuracy = estimate(rates, exam.samples)
    trajectories = [t for group in sheet.groups for t in group.trajectories]
    out: dict[str, Any] = {
        "task": exam.task.name,
        "accuracy": accuracy.value,
        "low": accuracy.low,
        "high": accuracy.high,
        "problems": len(sheet.groups),
        "samples": exam.samples,
        "mean_tokens": fmean(t.drawn for t in trajectories),
        "unfinished": fmean(not t.finished for t in trajectories),
        "verifier_failures": sheet.failures,
    }
    if sheet.stopped:
        out["stopped"] = f"after {len(sheet.groups)} of {sheet.asked} problems, those with the shortest replies first"
    if (n := exam.samples) > 1:
        steps = sorted({*(2**i for i in range(n.bit_length()) if 2**i <= n), n})
        out["pass_at"] = {str(k): asdict(estimate([pass_at(n, sum(row), k) for row in right], n)) for k in steps}
        votes = [majority([exam.task.vote(g.asked.problem, text) for text in g.texts], row) for g, row in zip(sheet.groups, right)]
        out["majority"] = asdict(estimate(votes, n))
    problems = [group.asked.problem for group in sheet.groups]
    out["by_difficulty"], out["difficulty_problems"] = _parts(levels([problem.difficulty for problem in problems]), rates)
    if len(categories := sorted({problem.category for problem in problems})) > 1:
        named = {category: [problem.category == category for problem in problems] for category in categories}
        out["by_category"], out["category_problems"] = _parts(named, rates)
    out["scores"] = [[round(score, 4) for score in group.scores] for group in sheet.groups]
    out["examples"] = _examples(sheet, examples)
    return out


def levels(difficulties: Sequence[int]) -> dict[str, list[bool]]:
    """Which problems are of which level: each difficulty is one, or where there are many, each range of them that holds about as much."""
    known = sorted(set(difficulties))
    if len(known) > LEVELS:
        ranks = sorted(difficulties)
        starts = sorted({ranks[len(ranks) * i // LEVELS] for i in range(LEVELS)})
        ranges = [[d for d in known if start <= d and d < end] for start, end in zip(starts, [*starts[1:], known[-1] + 1])]
    else:
        ranges = [[difficulty] for difficulty in known]
    names = [str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in ranges]
    return {name: [r[0] <= d <= r[-1] for d in difficulties] for name, r in zip(names, ranges)}


def _parts(members: dict[str, list[bool]], rates: Sequence[float]) -> tuple[dict[str, float], dict[str, int]]:
    """Accuracy of parts of the problems, and how many problems each has."""
    parts = {name: [rate for rate, inside in zip(rates, those) if inside] for name, those in members.items()}
    return {name: fmean(part) for name, part in parts.items()}, {name: len(part) for name, part in parts.items()}


def _examples(sheet: Sheet, count: int) -> list[dict[str, Any]]:
    """The first right and the first wrong answers, one a problem of each kind, half of each where there are enough."""
    found: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for group in sheet.groups:
        problem, places = group.asked.problem, [score == 1.0 for score in group.scores]
        for correct in {True, False} & set(places):
            i = places.index(correct)
            example = {"prompt": problem.prompt, "reply": group.transcripts[i], "answer": problem.answer, "correct": correct}
            found[correct].append(example | {"difficulty": problem.difficulty, "unfinished": not group.trajectories[i].finished})
    right, wrong = found[True], found[False]
    take = min(len(wrong), max(count // 2, count - len(right)))
    return right[: count - take] + wrong[:take]
