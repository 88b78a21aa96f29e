"""Tasks: every worked solution is right and true line by line, splits are disjoint, verifiers withstand anything."""

import json
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jevons.tasks.arithmetic import Arithmetic
from jevons.tasks.countdown import Countdown, evaluate
from jevons.tasks.task import TASKS, Problem, answer_text, get_task

KINDS = [
    ("arithmetic", {}),
    ("arithmetic", {"digits": 1}),
    ("arithmetic", {"digits": 6, "operations": "-+"}),
    ("countdown", {}),
    ("countdown", {"numbers": 5, "largest": 25}),
]
every_task = pytest.mark.parametrize(("name", "options"), KINDS)
EQUATION = re.compile(r"[0-9]+(?:[-+*/][0-9]+)+=[0-9]+")


def is_true(equation: str) -> bool:
    """Whether an equation holds, by Python's own arithmetic. Its numbers may have leading zeros."""
    assert EQUATION.fullmatch(equation), equation
    left, right = re.sub(r"\b0+(?=[0-9])", "", equation).split("=")
    return eval(left) == int(right)


@every_task
def test_worked_solutions_are_right_and_true_line_by_line(name, options):
    task = get_task(name, **options)
    for split in ("train", "test"):
        for index in range(100):
            problem = task.problem(split, index, seed=3)
            user, assistant = task.worked(problem)
            assert (user.role, user.content, assistant.role) == ("user", problem.prompt, "assistant")
            assert task.worked(problem) == (user, assistant)
            assert task.verify(problem, assistant.content) == 1.0
            assert task.verify(problem, f"<think>\n{assistant.reasoning}\n</think>\n\n{assistant.content}") == 1.0
            assert task.verify(problem, f"<think>\n{assistant.reasoning}\n{assistant.content}") == 0.0  # never left its reasoning
            equations = [e for line in assistant.reasoning.split("\n") for e in line.split(";") if "=" in e]
            assert equations and all(is_true(e) for e in equations)


@every_task
def test_problems_are_deterministic_and_splits_disjoint(name, options):
    task = get_task(name, **options)
    train = [task.problem("train", index, seed=0) for index in range(1000)]
    test = [task.problem("test", index, seed=9) for index in range(150)]
    assert train[:50] == [get_task(name, **options).problem("train", index, seed=0) for index in range(50)]
    assert train[:50] != [task.problem("train", index, seed=1) for index in range(50)]
    assert json.loads(json.dumps(train[0].data)) == train[0].data

    def canonical(problem):
        if name == "countdown":
            return (tuple(sorted(problem.data["numbers"])), problem.data["target"])
        a, b, operation = problem.data["a"], problem.data["b"], problem.data["operation"]
        return (a, b, operation) if operation == "-" else (max(a, b), min(a, b), operation)

    assert not {canonical(p) for p in train} & {canonical(p) for p in test}
    if options.get("digits") != 1:
        assert len({canonical(p) for p in test}) > 75


def test_random_access_needs_no_state():
    task = Arithmetic()
    assert [task.problem("train", i, 0) for i in (7, 3, 7)] == [task.problem("train", i, 0) for i in (7, 3, 7)]
    assert task.problem("train", 1234567, 0).prompt == "192*5=?"  # a golden: the same problem in any process, on any machine


def test_arithmetic_lines_are_local():
    """Every line restates what it needs: its digits from the operands, its carry from the line before, its digit into the result."""
    task = Arithmetic(digits=4)
    for index in range(200):
        problem = task.problem("train", index, 5)
        a, b, operation = problem.data["a"], problem.data["b"], problem.data["operation"]
        assert eval(f"{a}{operation}{b}") == int(problem.answer)
        first, *columns, last = task.worked(problem)[1].reasoning.split("\n")
        assert first == f"{a:04}{operation}{b if operation == '*' else f'{b:04}'}"
        assert len(columns) == 4 and int(last) == int(problem.answer)
        assert last[-4:] == "".join(line[-1] for line in reversed(columns))
        carry = 0
        for place, line in enumerate(columns):
            x, y, given, result = re.fullmatch(r"(\d+)[-+*](\d)[-+](\d)=(\d\d)", line).groups()
            assert (x[-1], int(given)) == (f"{a:04}"[3 - place], carry)
            assert y == (str(b) if operation == "*" else f"{b:04}"[3 - place])
            carry = 1 - int(result[0]) if operation == "-" else int(result[0])


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("432", 1.0),
        ("47+385 = 432.", 1.0),
        ("The answer is \\boxed{432}", 1.0),
        ("<think>431</think>432", 1.0),
        ("<think>432</think>431", 0.0),
        ("432</think>", 0.0),
        ("0432", 0.0),
        ("-432", 0.0),
        ("432.0", 0.0),
        ("0.432", 0.0),
        ("4 32", 0.0),
        ("\u0664\u0663\u0662", 0.0),
        ("", 0.0),
        ("9" * 100_000, 0.0),
    ],
)
def test_arithmetic_verifier(reply, score):
    problem = Problem("47+385=?", "432", {"a": 47, "b": 385, "operation": "+"}, 3)
    assert Arithmetic().verify(problem, reply) == score


def test_thousands_separators():
    problem = Problem("999999+1=?", "1000000", {"a": 999999, "b": 1, "operation": "+"}, 6)
    assert Arithmetic(digits=6).verify(problem, "1,000,000") == 1.0
    assert Arithmetic(digits=6).verify(problem, "1,00,0000") == 0.0


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("(3+5)*2", 1.0),
        ("2*(5+3)", 1.0),
        ("some words\n( 3 + 5 ) * 2 = 16", 1.0),
        ("((((3))+5))*2", 1.0),
        ("(3+5)*2=17", 0.0),
        ("3*5+2", 0.0),
        ("8*2", 0.0),  # not the given numbers
        ("(3+5)*2*1", 0.0),
        ("16", 0.0),
        ("(3+5)*2)", 0.0),
        ("(3+5)(2)", 0.0),
        ("35+2", 0.0),
        ("+3+5*2", 0.0),
        ("3+-5*2", 0.0),
        ("03+5*2", 0.0),
        ("5**2**3", 0.0),
        ("9**9**9", 0.0),
        ("(" * 100_000, 0.0),
        ("(" * 100 + "3+5" + ")" * 100 + "*2", 1.0),
        ("3/0", 0.0),
        ("5/2*3", 0.0),  # does not divide exactly
        ("(\uff13+\uff15)*\uff12", 0.0),
        ("__import__('os')", 0.0),
        ("()", 0.0),
        ("=16", 0.0),
        ("", 0.0),
    ],
)
def test_countdown_verifier(reply, score):
    problem = Problem("Make 16 from 5 2 3.", "(3+5)*2", {"numbers": [5, 2, 3], "target": 16}, 3)
    start = time.perf_counter()
    assert Countdown().verify(problem, reply) == score
    assert time.perf_counter() - start < 0.5


expressions = st.recursive(
    st.integers(0, 99).map(str),
    lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner).map("".join) | inner.map(lambda e: f"({e})"),
    max_leaves=12,
)


@settings(deadline=None)
@given(expressions)
def test_evaluate_agrees_with_python(expression):
    evaluation = evaluate(expression)
    if evaluation is None:  # only a division can be at fault
        assert "/" in expression or len(expression) > 256
    else:
        assert evaluation.value == eval(expression.replace("/", "//"))
        assert list(evaluation.numbers) == [int(n) for n in re.findall("[0-9]+", expression)]


near_misses = st.lists(st.sampled_from([*"0123456789+-*/()=., \n", "<think>", "</think>", "16"]), max_size=300).map("".join)


@settings(deadline=None)
@given(st.text() | near_misses)
def test_verifiers_take_any_text(reply):
    for name in TASKS:
        task = get_task(name)
        assert task.verify(task.problem("test", 0, 0), reply) in (0.0, 1.0)


def test_countdown_answers_use_each_number_and_only_positive_steps():
    task = Countdown(numbers=4)
    for index in range(200):
        problem = task.problem("train", index, 1)
        evaluation = evaluate(problem.answer)
        assert sorted(evaluation.numbers) == sorted(problem.data["numbers"]) and 1 <= evaluation.value <= 100
        lines = task.worked(problem)[1].reasoning.split("\n")
        ends = [int(line.rsplit("=", 1)[1]) for line in lines]
        assert ends[-1] == problem.data["target"] and problem.data["target"] not in ends[:-1]


def test_answer_text():
    assert answer_text("a</think>b</think> c ") == "c"
    assert answer_text("<think>never closed 5") == ""
    assert answer_text(" plain ") == "plain"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sudoku", {}, "known: arithmetic, countdown"),
        ("arithmetic", {"digit": 3}, "known: digits, operations"),
        ("arithmetic", {"digits": 0}, "digits"),
        ("arithmetic", {"operations": "+%"}, "operations"),
        ("countdown", {"numbers": 1}, "numbers"),
        ("countdown", {"largest": 1}, "largest"),
        ("countdown", {"largest_target": 5}, "largest_target"),
    ],
)
def test_errors_name_what_is_known(name, options, message):
    with pytest.raises(ValueError, match=message):
        get_task(name, **options)


def test_split_is_checked():
    with pytest.raises(ValueError, match="split"):
        Arithmetic().problem("validation", 0, 0)
