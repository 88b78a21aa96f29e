"""Problems out of JSON-lines files: what the tasks with fixed problem sets share.

Data sets come as one file, or as one for training and one for tests. From one file the test problems are those whose prompt's hash says so.
With two, a training problem that is also in the test file is left out. So are lines that cannot be graded, each with its number and
reason (`skipped`): a wrong gold answer would punish right ones. A file that is mostly such lines is an error. Files are read when the first
problem of their split is asked for.

An index walks through a shuffled order of the split, another one each time around, so the first hundred problems of a file sorted by
subject are of all subjects.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import random
import zlib
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from jevons.tasks.task import Problem, Split, check_split, is_test
from jevons.tasks.tool import Equipped

SHOWN = 5  # bad lines in an error


@dataclass(frozen=True)
class Row:
    file: str
    line: int  # from 1
    problem: Problem


@dataclass(frozen=True)
class Lines(Equipped):
    """Options that all such tasks have. `path` and `test_path` end in .jsonl or .json, or one of these and .gz."""

    path: str = ""  # problems to train on; without test_path, its test problems too
    test_path: str = ""
    instruction: str = ""  # what every prompt ends with

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.path and not self.test_path:
            raise ValueError("path: give the file of problems (JSON lines), or test_path alone where nothing is trained on")

    @abstractmethod
    def parse(self, record: dict[str, Any]) -> Problem:
        """The record as a problem. ValueError says why it is none."""

    def gradable(self, problems: list[Problem]) -> list[str]:
        """For each problem, why its gold answer cannot be graded, or "". For checks that are better made for all at once."""
        return [""] * len(problems)

    def size(self, split: Split) -> int:
        check_split(split)
        return len(self._split(split))

    def skipped(self) -> tuple[str, ...]:
        return (*self._trained[1], *self._tested[1])

    def problem(self, split: Split, index: int, seed: int) -> Problem:
        check_split(split)
        rows = self._split(split)
        if not rows:
            file = self.path or self.test_path
            raise ValueError(f"task {self.name}: there are no {split} problems in {file}; name a file of them as {_option(split)}")
        around, place = divmod(index, len(rows))
        return rows[self._order(split, seed, around)[place]].problem

    def prompt(self, question: str) -> str:
        return f"{question.strip()}\n\n{self.instruction}" if self.instruction else question.strip()

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # not the problems: workers are given theirs

    def _split(self, split: Split) -> list[Row]:
        return self._trained[0] if split == "train" else self._tested[0]

    @cached_property
    def _trained(self) -> tuple[list[Row], list[str]]:
        if not self.path:
            return [], []
        rows, skipped = self._read(self.path)
        if not self.test_path:
            return [row for row in rows if not is_test(self._question(row))], skipped
        held_out = {self._question(row) for row in self._tested[0]}
        both = [f"{row.file}:{row.line}: also in {self.test_path}" for row in rows if self._question(row) in held_out]
        return [row for row in rows if self._question(row) not in held_out], skipped + both

    @cached_property
    def _tested(self) -> tuple[list[Row], list[str]]:
        if self.test_path:
            return self._read(self.test_path)
        return [row for row in self._read(self.path)[0] if is_test(self._question(row))], []

    def _question(self, row: Row) -> str:
        """What tells problems apart, whatever the instruction."""
        return row.problem.prompt.removesuffix(self.instruction).strip()

    @cached_property
    def _read(self) -> Callable[[str], tuple[list[Row], list[str]]]:
        return lru_cache(2)(self._parsed)

    def _parsed(self, path: str) -> tuple[list[Row], list[str]]:
        if not Path(path).is_file():
            raise ValueError(f"task {self.name}: {'path' if path == self.path else 'test_path'}: there is no file {path}")
        rows, skipped = [], []
        for line, record in records(path):
            try:
                if not isinstance(record, dict):
                    raise ValueError(f"an object is needed, this is {type(record).__name__}")
                rows.append(Row(path, line, self.parse(record)))
            except ValueError as error:
                skipped.append((line, str(error)))
        reasons = self.gradable([row.problem for row in rows])
        skipped += [(row.line, reason) for row, reason in zip(rows, reasons) if reason]
        rows = [row for row, reason in zip(rows, reasons) if not reason]
        messages = [f"{path}:{line}: {reason}" for line, reason in sorted(skipped)]
        if not rows and not skipped:
            raise ValueError(f"task {self.name}: {path} is empty")
        if len(rows) <= len(skipped):
            shown = "".join(f"\n  {message}" for message in messages[:SHOWN])
            raise ValueError(f"task {self.name}: {path}: {len(skipped)} of {len(rows) + len(skipped)} lines cannot be used:{shown}")
        return rows, messages

    @cached_property
    def _order(self) -> Callable[[Split, int, int], list[int]]:
        return lru_cache(4)(self._shuffled)

    def _shuffled(self, split: Split, seed: int, around: int) -> list[int]:
        order = list(range(len(self._split(split))))
        random.Random(f"{self.name}/{split}/{seed}/{around}").shuffle(order)
        return order


def _option(split: Split) -> str:
    return "path" if split == "train" else "test_path"


def records(path: str) -> Iterator[tuple[int, Any]]:
    """Lines of a file with their numbers, empty ones left out. ValueError for a file that is cut short or not JSON lines."""
    line = 1
    with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as stream:
        try:
            for line, data in enumerate(stream, 1):
                if data.strip():
                    yield line, json.loads(data)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path}: damaged or cut short: {error}") from error
        except ValueError as error:
            raise ValueError(f"{path}:{line}: not JSON: {error}") from error


def field(record: dict[str, Any], *names: str) -> str:
    """The first of these fields that is there, as text. ValueError where none is."""
    for name in names:
        if isinstance(record.get(name), str) and record[name].strip():
            return record[name]
        if isinstance(record.get(name), (int, float)) and not isinstance(record[name], bool):
            return str(record[name])
    raise ValueError(f"no field {' or '.join(names)} with text in it; it has {', '.join(map(str, record))}"[:200])
