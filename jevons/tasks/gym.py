"""Any of the hundred generators of `reasoning-gym` (an optional package) as a task.

    [[rl.tasks]]
    task = "gym"
    options = { family = "chain_sum", config = { min_terms = 2, max_terms = 4 } }

A family makes problem n from n alone, so random access is given. Three things are not, and are made here. Some families walk through sets
of strings, whose order differs between processes: problems are made in a process where strings hash alike everywhere. Some make a number
of problems in advance: they are asked for few. And nine families grade an answer by handing it to Python's `eval` or a parser that does:
text of a model that calls a function other than a mathematical one is wrong before it gets there.

Scores are the family's own. Many give a little for an answer that is only well formed; unless `partial` is set, an answer is right or
wrong, right from `threshold` on.
"""

from __future__ import annotations

import base64
import dataclasses
import importlib
import inspect
import json
import pickle
import random
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from jevons.tasks.extract import check_rule, extract, write
from jevons.tasks.pool import Pool
from jevons.tasks.task import Problem, Split, draw, nearest
from jevons.tasks.tool import Equipped

INSTRUCTION = "Write your final answer, and nothing else, between <answer> and </answer>."
# Problems cost nothing but the time to make those of the wrong split, so a quarter are tests
TEST_SHARE = 4
IN_ADVANCE = {"acre", "gsm_symbolic", "list_functions", "word_ladder"}  # families with as many problems as they were asked for
FEW = 10
SECONDS = 120.0  # to make one problem
ALLOWED = {"sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh", "sec", "csc", "cot", "exp", "log", "ln", "sqrt", "Abs"}
ALLOWED |= {""}  # a parenthesis alone
CALLED = re.compile(r"([\w)]*)\s*\(")
HIDDEN = re.compile(r"[\\#'\"%@:\[\]{}]|\.\s*[^\W\d]|__")


@dataclass(frozen=True)
class Gym(Equipped):
    """`config` are the family's own options: its difficulty. `difficulty` names what in its metadata, a number
    or something with a length, tells results apart."""

    family: str = ""
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    instruction: str = INSTRUCTION  # what every prompt ends with
    extract: str = "auto"  # where the answer is (tasks/extract.py)
    partial: bool = False
    threshold: float = 1.0
    difficulty: str = ""

    trusted: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rule(self.extract)
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold: must be above 0 and at most 1, is {self.threshold}")
        if self.partial and self.threshold != 1:
            raise ValueError("threshold: says what is right where there is no partial credit; give one of the two")
        families = _families()
        if self.family not in families:
            known = nearest(self.family, families) or f"; known: {', '.join(sorted(families))}"
            raise ValueError(f"family: unknown {self.family!r}{known}")
        _, kind = families[self.family]
        options = [field.name for field in dataclasses.fields(kind) if field.name not in ("seed", "size")]
        for option in self.config:
            if option not in options:
                raise ValueError(f"config: {self.family} has no {option!r}; it has {', '.join(options)}{nearest(option, options)}")
        try:
            self._configured(0)
        except Exception as error:  # what the families' own checks raise is of any kind
            raise ValueError(f"config: {self.family} refuses {self.config}: {type(error).__name__}: {error}") from error

    @property
    def name(self) -> str:
        return f"gym-{self.family}"

    def problem(self, split: Split, index: int, seed: int) -> Problem:
        source = f"{self.name}/{json.dumps(self.config, sort_keys=True)}"
        return draw(source, split, index, seed, self._make, share=TEST_SHARE)

    def _make(self, rng: random.Random) -> tuple[str, Problem]:
        made: dict[str, Any] | None = None
        while made is None:
            (outcome,) = self._makers.run([(rng.getrandbits(31),)])
            if outcome.failure is not None:
                raise ValueError(f"task {self.name}: making a problem failed: {outcome.failure}")
            made = outcome.value
        prompt = f"{made['question']}\n\n{self.instruction}" if self.instruction else made["question"]
        return made["question"], Problem(prompt, made["answer"], {"entry": made["entry"]}, made["difficulty"], self.family)

    @cached_property
    def _makers(self) -> Pool:
        return Pool(self.make, self.ready, SECONDS, processes=1)

    def make(self, number: int) -> dict[str, Any] | None:
        """Problem `number` of the family as plain data; `entry` is all that it knows of it, pickled: its scoring wants its own types.

        None for a problem whose answer must not be evaluated, such as an integral that the family itself could not solve.
        """
        if self.family in IN_ADVANCE:
            entry = self._created(number)[0]
        else:
            entry = self._dataset[number]
        sizes = {k: v if isinstance(v, int) else len(v) for k, v in entry["metadata"].items() if isinstance(v, (int, list, tuple, str))}
        if self.difficulty and self.difficulty not in sizes:
            raise ValueError(f"difficulty: {self.family} has no {self.difficulty!r} in its metadata; it has {', '.join(sizes)}")
        difficulty = sizes[self.difficulty] if self.difficulty else 0
        answer = "" if entry["answer"] is None else str(entry["answer"])
        if not self._harmless(answer):
            return None
        packed = base64.b64encode(pickle.dumps(entry)).decode()
        return {"question": entry["question"], "answer": answer, "entry": packed, "difficulty": difficulty}

    def ready(self) -> None:
        _ = self._dataset

    def gold(self, problem: Problem) -> str | None:
        # some families can tell right from wrong, but not what is right
        return write(problem.answer, self.extract) if problem.answer else None

    def verify(self, problem: Problem, reply: str) -> float:
        answer = self.vote(problem, reply)
        if not answer or not self._harmless(answer):
            return 0.0
        try:
            score = float(self._dataset.score_answer(answer=answer, entry=pickle.loads(base64.b64decode(problem.data["entry"]))))
        except Exception:  # of families that do not expect just any text; gold answers, checked before a run, say whether one works at all
            return 0.0
        return min(max(score, 0.0), 1.0) if self.partial else float(score >= self.threshold)

    def vote(self, problem: Problem, reply: str) -> str:
        return extract(reply, self.extract, lines="\n" in problem.answer)

    def _harmless(self, answer: str) -> bool:
        """Whether the family's scoring can be shown this text: it is not evaluated, or calls nothing when it is."""
        if re.search(r"(?<![\w.])eval\(", self._scoring):  # of lists, in which nothing is called
            return "(" not in answer
        if "parse_expr(" not in self._scoring:
            return True
        # no strings (functions evaluate them again), no attributes, nothing that hides which name is called
        return not HIDDEN.search(answer) and all(name in ALLOWED for name in CALLED.findall(answer))

    @cached_property
    def _scoring(self) -> str:
        return inspect.getsource(type(self._dataset).score_answer)

    @cached_property
    def _dataset(self) -> Any:
        return self._created(0)

    def _created(self, seed: int) -> Any:
        kind, _ = _families()[self.family]
        return kind(config=self._configured(seed))

    def _configured(self, seed: int) -> Any:
        _, kind = _families()[self.family]
        # TOML has lists only, some families' checks want the tuples of their defaults
        tuples = {field.name for field in dataclasses.fields(kind) if isinstance(field.default, tuple)}
        values = {key: tuple(value) if key in tuples and isinstance(value, list) else value for key, value in self.config.items()}
        config = kind(**values, seed=seed, size=FEW)
        if hasattr(config, "validate"):
            config.validate()
        return config

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def _families() -> dict[str, tuple[Any, Any]]:
    """Every family's classes of problems and of options; `composite`, which mixes others, is what a recipe's list of tasks does."""
    try:
        importlib.import_module("reasoning_gym")  # which fills the table
    except ModuleNotFoundError as error:
        raise ValueError("task gym: its problems need the package reasoning-gym: pip install 'jevons[reasoning]'") from error
    table = importlib.import_module("reasoning_gym.factory").DATASETS
    return {name: classes for name, classes in table.items() if name != "composite"}
