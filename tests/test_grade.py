"""Grading: right answers are right, and a verifier that hangs, crashes or lies is counted, survived and in the end refused."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from jevons.tasks import worker
from jevons.tasks.grade import NO_ANSWER, Grade, Grader, check_gold
from jevons.tasks.pool import Outcome, Pool
from jevons.tasks.task import Problem, Task, get_task

VERIFIER = """
import os, subprocess, sys, time

def check(problem, reply):
    if reply == "loop":
        while True: pass
    if reply == "deep":            # one operation of the interpreter's, in which no signal's handler runs
        return 10 ** 10 ** 8 % 7
    if reply == "exit": os._exit(7)
    if reply == "quit": sys.exit(0)
    if reply == "signal": os.kill(os.getpid(), 11)
    if reply == "raise": raise KeyError("lost")
    if reply == "eat": bytearray(1 << 40)
    if reply == "word": return "right"
    if reply == "nothing": return None
    if reply == "much": return 5.0
    if reply == "nan": return float("nan")
    if reply == "torch": return float("torch" in sys.modules)
    if reply == "print": print('{"value": 1.0}')
    if reply == "child":
        subprocess.Popen(["sleep", "1000"]); print("started"); time.sleep(1000)
    return float(reply == problem["answer"])

class Wrong: pass
constant = 3
def three(a, b, c): return 1.0
def lenient(problem, reply, *, strict=False, **more): return 1.0
"""
TRAPS = {
    "42": None,
    "loop": "no answer within 1 s",
    "exit": "exit code 7",
    "41": None,
    "quit": "SystemExit",
    "signal": "SIGSEGV",
    "raise": "KeyError: 'lost'",
    "eat": "MemoryError",
    "deep": "no answer within 1 s",
    "word": "it returned 'right', a score is a number from 0 to 1",
    "nothing": "it returned None",
    "much": "it returned 5.0",
    "nan": "it returned nan",
    "print": None,
    "torch": None,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("custom")
    (folder / "grade.py").write_text(VERIFIER)
    lines = [{"prompt": f"6*7? ({i})", "answer": "42", "note": [i]} for i in range(40)]
    (folder / "problems.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "broken.py").write_text("import nothing_of_this_name")
    (folder / "leaving.py").write_text("raise SystemExit(3)")
    return folder


def custom(folder: Path, function: str = "grade.py:check", **options) -> Task:
    return get_task("custom", path=f"{folder}/problems.jsonl", verifier=f"{folder}/{function}", **options)


def test_traps_are_counted_and_survived(folder):
    task = custom(folder)
    problem = task.problem("train", 0, 0)
    with Grader(task, timeout=1.0, processes=2) as grader:
        grades = grader.grade([(problem, reply) for reply in TRAPS])
        for (reply, failure), grade in zip(TRAPS.items(), grades):
            assert failure is None or failure in grade.failure, reply
            assert grade.score == float(reply == "42") and (grade.failure is None) == (failure is None), reply
        assert grader.failures == sum(failure is not None for failure in TRAPS.values())
        assert grader.grade([(problem, "42")]) == [Grade(1.0)]  # and it goes on
        assert grader.grade([]) == []


def test_past_the_limit_it_stops_with_the_last_failure(folder):
    task = custom(folder)
    problem = task.problem("train", 0, 0)
    with Grader(task, timeout=1.0, limit=3, processes=1) as grader:
        grader.grade([(problem, "raise"), (problem, "42"), (problem, "raise")])
        grader.grade([(problem, "raise")])
        with pytest.raises(ValueError, match=r"custom: its verifier hung or crashed on 4 answers, more than the 3 allowed .*exit code 7"):
            grader.grade([(problem, "exit")])


@dataclass(frozen=True)
class Raising(Task):
    name: ClassVar[str] = "raising"

    def problem(self, split, index, seed):
        return Problem(f"{index}?", str(index), {}, 0)

    def verify(self, problem, reply):
        if reply == "raise":
            raise RuntimeError("at fault")
        return 1.0 if reply == problem.answer and problem.answer != "3" else 0.25


def test_one_refused_non_answer_is_enough():
    """A verifier that hangs on what is no answer must not be waited for once a problem."""
    asked = []

    class Watched(Raising):
        def gold(self, problem):
            return problem.answer if problem.answer != "3" else None

        def verify(self, problem, reply):
            asked.append(reply)
            return super().verify(problem, reply)

    check_gold(Watched(), 8)
    assert asked.count(NO_ANSWER) == 1 and len(asked) == 15  # 2 x 7 right answers


def test_trusted_verifiers_run_here_and_are_counted_too():
    problem = Problem("?", "1", {}, 0)
    grader = Grader(Raising(), limit=1)
    grades = grader.grade([(problem, "raise"), (problem, "1"), (problem, "2")])
    assert grades == [Grade(0.0, "RuntimeError: at fault"), Grade(1.0), Grade(0.25)]
    with pytest.raises(ValueError, match=r"on 2 answers, more than the 1 allowed \(rl.verifier_failures\); the last: .*at fault"):
        grader.grade([(problem, "raise")])


def test_gold_answers_must_score_one(folder):
    check_gold(custom(folder))
    check_gold(custom(folder, right="{answer}"), 3)
    with pytest.raises(ValueError, match=r"2 of 10 answers that are right by its own account .*\n.*'3\?' answered '3': scores 0.25"):
        check_gold(Raising(), 5)
    with pytest.raises(ValueError, match="answered 'raise': KeyError: 'lost'"):
        check_gold(custom(folder, right="raise"), 2)
    with pytest.raises(ValueError, match="answered 'Answer: 42': scores 0"):
        check_gold(custom(folder, right="Answer: {answer}"), 2)
    with pytest.raises(ValueError, match="task custom: its verifier takes anything for right, even '<answer>I do not know"):
        check_gold(custom(folder, "grade.py:lenient"), 2)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("grade.py:chek", "has no 'chek'; did you mean check"),
        ("grade.py:constant", "is not a function but int"),
        ("grade.py:Wrong", "must take .problem, reply."),
        ("grade.py:three", "must take .problem, reply.: missing a required argument: 'c'"),
        ("absent.py:check", "there is no file"),
        ("broken.py:check", "cannot be imported: ModuleNotFoundError: No module named 'nothing_of_this_name'"),
        ("leaving.py:check", "SystemExit: 3"),
    ],
)
def test_a_verifier_that_cannot_be_used_is_refused_before_training(folder, function, message):
    with pytest.raises(ValueError, match=message):
        Grader(custom(folder, function))


def test_modules_are_found_where_this_process_finds_them(folder, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    task = get_task("custom", path=f"{folder}/problems.jsonl", verifier="grade:lenient")
    with Grader(task) as grader:
        assert grader.grade([(task.problem("test", 0, 0), "anything")]) == [Grade(1.0)]
    with pytest.raises(ValueError, match="verifier: nowhere cannot be imported"):
        Grader(get_task("custom", path=f"{folder}/problems.jsonl", verifier="nowhere:check"))


def test_outcomes_keep_their_order():
    with_index = [(i, i % 7) for i in range(300)]
    pool = Pool(divmod, processes=3)
    assert [o.value for o in pool.run([(a, b or 1) for a, b in with_index])] == [[*divmod(a, b or 1)] for a, b in with_index]
    assert pool.run([(1, 0)])[0].failure.startswith("ZeroDivisionError")
    for idle in pool._idle:  # killed between two calls, by whom it may be: no call's fault
        os.killpg(idle.process.pid, signal.SIGKILL)
        idle.process.wait()
    assert pool.run([(7, 2)]) == [Outcome([3, 1])]
    pool.close()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition, seconds: float = 60.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are read from /proc")
def test_what_a_verifier_started_ends_with_it(folder):
    task = custom(folder)
    grader = Grader(task, timeout=0.5, processes=1)
    session = grader._pool._idle[0].process.pid

    def group() -> list[int]:
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # of a process that ends just now
                after = stat.read_text().rpartition(")")[2].split()
                if int(after[2]) == session and after[0] != "Z":
                    found.append(int(stat.parent.name))
        return found

    assert group() == [session]
    assert "no answer" in grader.grade([(task.problem("train", 0, 0), "child")])[0].failure
    assert wait_until(lambda: not group())


ORPHAN = """
import sys
from jevons.tasks.grade import Grader
from jevons.tasks.task import get_task
task = get_task("custom", path=sys.argv[1] + "/problems.jsonl", verifier=sys.argv[1] + "/grade.py:check")
grader = Grader(task, timeout=1000.0, processes=1)
print(grader._pool._idle[0].process.pid, flush=True)
grader.grade([(task.problem("train", 0, 0), sys.argv[2])] * 10**6)
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are read from /proc")
def test_workers_do_not_outlive_their_parent(folder):
    with subprocess.Popen([sys.executable, "-c", ORPHAN, str(folder), "42"], stdout=subprocess.PIPE) as parent:
        pid = int(parent.stdout.readline())
        assert alive(pid)
        parent.kill()
    assert wait_until(lambda: not alive(pid))


def test_an_alarm_ends_a_call_that_nobody_ends(folder):
    """The worker alone, its parent gone: the kernel's alarm is deadly in the midst of one operation of the interpreter's."""
    code = "from jevons.tasks import worker; worker.GRACE = 0; worker.answer(lambda: 10 ** 10 ** 9, (), 0.5)"
    done = subprocess.run([sys.executable, "-c", code], timeout=60)
    assert done.returncode == -signal.SIGALRM and worker.GRACE > 0
