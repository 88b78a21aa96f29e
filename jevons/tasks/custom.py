"""Problems and a verifier of your own: a file of JSON lines, and a Python function that grades.

    verifier = "grade.py:check"  or  "package.module:check"

    def check(problem: dict, reply: str) -> float:      # from 0 to 1
        return float(problem["answer"] in reply)

`problem` is the line of the file as it was read: `prompt`, `answer`, and whatever else stands in it. The function runs in processes of its
own, with a deadline: a reply on which it hangs or raises scores 0 and is counted (tasks/grade.py). It is your code, so nothing keeps it
from the files and the network; what it executes of a model's text it had better give to `jevons.tasks.sandbox.run_code`.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from jevons.tasks.lines import Lines, field
from jevons.tasks.task import Problem, nearest


@dataclass(frozen=True)
class Custom(Lines):
    """`right` says how a right reply is written, with {answer} in it: lines with an `answer` are graded on it before a run starts."""

    verifier: str = ""
    right: str = "{answer}"

    name: ClassVar[str] = "custom"
    trusted: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        place, colon, function = self.verifier.rpartition(":")
        if not colon or not place or not function.isidentifier():
            raise ValueError(f'verifier: must be "file.py:function" or "package.module:function", is {self.verifier!r}')

    def parse(self, record: dict[str, Any]) -> Problem:
        question = field(record, "prompt", "question", "problem")
        answer = "" if record.get("answer") is None else str(record["answer"])
        difficulty = record.get("difficulty")
        return Problem(
            self.prompt(question), answer, record, difficulty if type(difficulty) is int else 0, str(record.get("category") or "")
        )

    def gold(self, problem: Problem) -> str | None:
        return self.right.replace("{answer}", problem.answer) if problem.answer else None

    def ready(self) -> None:
        _ = self.function

    def verify(self, problem: Problem, reply: str) -> float:
        return self.function(problem.data, reply)

    @cached_property
    def function(self) -> Callable[[dict[str, Any], str], float]:
        """The verifier. ValueError where it cannot be imported, is no function, or does not take (problem, reply)."""
        place, _, name = self.verifier.rpartition(":")
        module = _load_file(Path(place)) if place.endswith(".py") else _load_module(place)
        if not hasattr(module, name):
            raise ValueError(f"verifier: {place} has no {name!r}{nearest(name, vars(module))}")
        function = getattr(module, name)
        if not callable(function):
            raise ValueError(f"verifier: {self.verifier} is not a function but {type(function).__name__}")
        try:
            inspect.signature(function).bind({}, "")
        except TypeError as error:
            raise ValueError(f"verifier: {self.verifier} must take (problem, reply): {error}") from error
        return function


def _load_file(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"verifier: there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent.resolve()))  # so that it can import what lies beside it
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"verifier: {path} cannot be imported: {type(error).__name__}: {error}") from error
    finally:
        sys.path.pop(0)
    return module


def _load_module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise ValueError(f"verifier: {name} cannot be imported: {type(error).__name__}: {error}") from error
