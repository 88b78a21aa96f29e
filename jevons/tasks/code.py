"""Programs to write, graded by tests: JSON lines with HumanEval's fields or MBPP's.

    {"task_id", "prompt": "def f(x):\\n    '''...'''\\n", "entry_point": "f", "canonical_solution", "test": "def check(candidate): ..."}
    {"task_id", "text" or "prompt", "code", "test_list": ["assert f(1) == 2"], "test_setup_code" or "test_imports", "challenge_test_list"}

The code is looked for in the reply's code blocks, and runs in `tasks/sandbox.py`, apart from its tests. Before any problem is used its own
solution must pass there; which do not is reported by line. A model that is rewarded for passing tests that it was shown learns to write
down their answers: show fewer (`shown`), or grade by the challenge tests too.

Not done: other languages, packages besides Python's own, tests that pass functions to the code or look at what it did to its arguments.
"""

from __future__ import annotations

import ast
import builtins
import os
import re
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar

from jevons.data.chat import Message
from jevons.tasks.extract import tagged
from jevons.tasks.lines import Lines, field
from jevons.tasks.sandbox import Limits, gaps, protections, run_tests
from jevons.tasks.task import Problem

COMPLETE = """Complete this Python function. Answer with the whole function in one code block, together with the imports that it needs.

```python
{prompt}```"""
WRITE = """{text}

Answer with the whole program in one code block, together with the imports that it needs. It must pass these tests:

```python
{tests}
```"""
BLOCK = re.compile(r"```(?:python|py)?[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL)
GOLD_SECONDS = 60.0  # a busy machine must not leave out a problem that an idle one takes


@dataclass(frozen=True)
class Code(Lines):
    """`seconds` must be less than the grader's own. Difficulty is the lines of the known solution; the category is the data set's kind."""

    shown: int = 3  # of MBPP's tests, in the prompt
    challenge: bool = False  # grade by MBPP's challenge tests too, which are never shown
    seconds: float = 6.0
    memory_mb: int = 1024

    name: ClassVar[str] = "code"
    trusted: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shown < 1:
            raise ValueError(f"shown: must be at least 1, for the tests say what the function is called; is {self.shown}")
        _ = self._limits

    def notices(self) -> tuple[str, ...]:
        return (*super().notices(), *gaps())

    @property
    def _limits(self) -> Limits:
        return Limits(seconds=self.seconds, memory_mb=self.memory_mb)

    def parse(self, record: dict[str, Any]) -> Problem:
        if "test_list" in record:
            return self._mbpp(record)
        prompt, entry, test = field(record, "prompt"), field(record, "entry_point"), field(record, "test")
        if f"def {entry}(" not in prompt:
            raise ValueError(f"prompt: has no function {entry}, which entry_point names")
        solution = record.get("canonical_solution") or ""
        data = {"prompt": prompt, "entry": entry, "setup": head(prompt, entry), "tests": f"{test}\ncheck({entry})\n", "names": [entry]}
        answer = prompt + solution if solution else ""
        return Problem(self.prompt(COMPLETE.format(prompt=prompt)), answer, data, _lines(solution), "humaneval")

    def _mbpp(self, record: dict[str, Any]) -> Problem:
        tests, challenge = _texts(record, "test_list"), _texts(record, "challenge_test_list")
        if not tests:
            raise ValueError("test_list: is empty")
        setup = "\n".join([*_texts(record, "test_imports"), str(record.get("test_setup_code") or "").replace("\r\n", "\n")])
        solution = str(record.get("code") or "").replace("\r\n", "\n")
        names = _names(setup, tests + challenge, solution)
        prompt = WRITE.format(text=field(record, "text", "prompt").strip(), tests="\n".join(tests[: self.shown]))
        # what the solution and the tests both import, the tests say nothing about
        imports = [f"import {name}" for name in names if name in sys.stdlib_module_names]
        data = {
            "setup": "\n".join([*imports, setup]),
            "tests": "\n".join(tests + challenge if self.challenge else tests),
            "names": [name for name in names if name not in sys.stdlib_module_names],
        }
        return Problem(self.prompt(prompt), solution, data, _lines(solution), "mbpp")

    def gradable(self, problems: list[Problem]) -> list[str]:
        known = [problem for problem in problems if problem.answer]
        limits = Limits(seconds=GOLD_SECONDS, memory_mb=self.memory_mb)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            results = list(pool.map(lambda p: _run(p, p.answer, limits), known))
        failed = {id(problem): result.reason for problem, result in zip(known, results) if not result.ok}
        return [f"its own solution does not pass: {failed[id(p)]}" if id(p) in failed else "" for p in problems]

    def worked(self, problem: Problem) -> tuple[Message, ...] | None:
        gold = self.gold(problem)
        return (Message("user", problem.prompt), Message("assistant", gold)) if gold else None

    def gold(self, problem: Problem) -> str | None:
        return f"```python\n{problem.answer.rstrip()}\n```" if problem.answer else None

    def ready(self) -> None:
        try:
            protections()
        except OSError as error:
            raise ValueError(f"task code: {error}") from error

    def verify(self, problem: Problem, reply: str) -> float:
        """1.0 where the reply's code passes all tests."""
        _, closed, text = reply.rpartition("</think>")
        if not closed and "<think>" in reply:
            return 0.0
        return float(_run(problem, code_of(problem.data, text), self._limits).ok)


def _run(problem: Problem, code: str, limits: Limits) -> Any:
    return run_tests(code, problem.data["tests"], problem.data["names"], setup=problem.data["setup"], limits=limits)


def code_of(data: dict[str, Any], text: str) -> str:
    """The program in an answer to a problem with this data."""
    inside = tagged(text)
    if inside is not None:
        text = inside
    if "entry" in data:
        return complete(data["prompt"], data["entry"], text)
    return _block(text, data["names"])


def complete(prompt: str, entry: str, text: str) -> str:
    """HumanEval's function out of an answer, whole or its body alone, after what the prompt has before it, such as imports and helpers."""
    code = _block(text, [entry])
    if f"def {entry}(" not in code:
        return prompt + code
    return f"{head(prompt, entry)}\n{code}"


def head(prompt: str, entry: str) -> str:
    return prompt[: prompt.rindex(f"def {entry}(")]


def _block(text: str, names: Iterable[str]) -> str:
    """The first code block that defines one of the names, else the first; the text where it has none."""
    blocks = BLOCK.findall(text) or [text]
    heads = [f"{kind} {name}{end}" for name in names for kind, end in (("def", "("), ("class", ""))]
    return next((block for block in blocks if any(head in block for head in heads)), blocks[0])


def _texts(record: dict[str, Any], name: str) -> list[str]:
    value = record.get(name) or []
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ValueError(f"{name}: must be a list of strings, is {str(value)[:60]}")
    return value


def _names(setup: str, tests: list[str], solution: str) -> list[str]:
    """What tests take from the tested code: names that neither they nor Python define, or that the solution defines anew."""
    used, own = _names_in("\n".join([setup, *tests]), "test_list")
    try:
        _, defined = _names_in(solution, "code", top=True)
    except ValueError:
        defined = set()  # the solution is run and reported later
    names = {name for name in used - own if name in defined or not hasattr(builtins, name)}
    if not names:
        raise ValueError("test_list: calls nothing that is not Python's")
    return sorted(names)


def _names_in(source: str, where: str, *, top: bool = False) -> tuple[set[str], set[str]]:
    """Names that a program uses and names that it defines, with `top` only at its top level."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # what ast.parse raises for text that is no program
        raise ValueError(f"{where}: is not Python: {error}") from None
    nodes = tree.body if top else list(ast.walk(tree))
    used = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    own = {node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    own |= {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    own |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    own |= {(a.asname or a.name).partition(".")[0] for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom)) for a in node.names}
    return used, own


def _lines(code: str) -> int:
    return sum(bool(line.strip()) for line in code.splitlines())
