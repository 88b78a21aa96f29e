"""Tasks: every worked solution is right and true line by line, splits are disjoint, verifiers withstand anything."""

import base64
import builtins
import gzip
import json
import pickle
import re
import subprocess
import sys
import time
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jevons.tasks.arithmetic import Arithmetic
from jevons.tasks.choice import chosen
from jevons.tasks.countdown import Countdown, evaluate
from jevons.tasks.extract import RULES, boxed, extract, write
from jevons.tasks.grade import Grader, check_gold
from jevons.tasks.pool import Pool
from jevons.tasks.task import TASKS, Problem, answer_text, get_task
from jevons.tasks.tool import calculate

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
    start = time.process_time()
    assert Countdown().verify(problem, reply) == score
    assert time.process_time() - start < 0.5


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
    for name in ("arithmetic", "countdown"):
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
        ("countdwn", {}, "did you mean countdown"),
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


# --- where an answer stands in a reply


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        ("<answer>42</answer>", "42"),
        ("<think>\n<answer>7</answer></think>\n<answer>\n42\n</answer> so", "42"),
        ("<answer>7</answer> no: <answer>42</answer>", "42"),
        ("\\boxed{7} <answer>42</answer>", "42"),
        ("It is $\\boxed{\\frac{1}{2}}$.", "\\frac{1}{2}"),
        ("\\boxed{7}, no, \\boxed {42}", "42"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{42", "\\boxed{42"),  # never ends: no box
        ("First.\nThe final answer is: **42**.", "42"),
        ("Answer: 3.5", "3.5"),
        ("So, the answer is $x+1$.", "x+1"),
        ("<think>42</think>", ""),
        ("<think>42", ""),
        ("", ""),
    ],
)
def test_extract(reply, found):
    assert extract(reply) == found


def test_extraction_rules_look_in_one_place():
    reply = "<answer>a</answer>\n\\boxed{b}\nAnswer: c"
    assert [extract(reply, rule) for rule in RULES] == ["a", "a", "b", "c", reply]
    assert [extract("one\ntwo", rule) for rule in RULES] == ["two", "", "", "two", "one\ntwo"]
    assert extract("1 2\n3 4", lines=True) == "1 2\n3 4"  # a grid has no last line
    for rule in RULES:
        assert extract(f"<think>hm</think>\n{write('42', rule)}", rule) == "42"


@settings(deadline=None)
@given(st.text() | st.lists(st.sampled_from(["\\boxed{", "{", "}", "\\", "<answer>", "</answer>", "a", "\n"]), max_size=40).map("".join))
def test_extraction_takes_any_text(reply):
    for rule in RULES:
        assert isinstance(extract(reply, rule), str)
    inside = boxed(f"\\boxed{{{reply}}}")
    assert inside == reply.strip() or "{" in reply or "}" in reply or "\\" in reply


# --- files of problems

GSM = {"question": "How many eggs?", "answer": "She has 6 * 7 = <<6*7=42>>1,042 eggs.\n#### 1,042"}
MATH = {"problem": "Half of one?", "solution": "It is $\\boxed{\\frac12}$.", "level": "Level 3", "type": "Algebra"}


def write_lines(path, records):
    text = "\n".join(record if isinstance(record, str) else json.dumps(record) for record in records)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def test_lines_are_split_shuffled_and_walked_through(tmp_path):
    records = [{"prompt": f"{i}?", "options": ["a", "b"], "question": f"{i}?", "answer": "AB"[i % 2]} for i in range(500)]
    task = get_task("choice", path=write_lines(tmp_path / "all.jsonl.gz", records))
    train, test = task.size("train"), task.size("test")
    assert train + test == 500 and 15 < test < 50 and task.skipped() == ()
    asked = [task.problem("train", i, seed=1).prompt for i in range(2 * train)]
    assert Counter(asked[:train]) == Counter(asked[train:]) and len({*asked}) == train and asked[:train] != asked[train:]
    assert asked[:train] != sorted(asked[:train]) and asked[0] != task.problem("train", 0, seed=2).prompt
    again = get_task("choice", path=str(tmp_path / "all.jsonl.gz"))
    assert [again.problem("train", i, seed=1).prompt for i in (5, 3, train + 7)] == [asked[5], asked[3], asked[train + 7]]
    tests = {task.problem("test", i, 0).prompt for i in range(test)}
    assert len(tests) == test and not tests & {*asked}
    # another instruction asks the same problems
    brief = get_task("choice", path=str(tmp_path / "all.jsonl.gz"), instruction="Letter?")
    assert {brief.problem("test", i, 0).prompt.split("\n")[0] for i in range(test)} == {prompt.split("\n")[0] for prompt in tests}


def test_a_test_file_keeps_its_problems_out_of_training(tmp_path):
    def record(i):
        return {"question": f"{i}?", "options": ["a", "b"], "answer": "A"}

    train = write_lines(tmp_path / "train.jsonl", map(record, range(40)))
    test = write_lines(tmp_path / "test.jsonl", map(record, range(35, 50)))
    task = get_task("choice", path=train, test_path=test)
    assert (task.size("train"), task.size("test")) == (35, 15)
    assert task.skipped() == tuple(f"{train}:{line}: also in {test}" for line in range(36, 41))
    only = get_task("choice", test_path=test)
    assert (only.size("train"), only.size("test")) == (0, 15)
    with pytest.raises(ValueError, match=r"no train problems in .*test.jsonl; name a file of them as path"):
        only.problem("train", 0, 0)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "is empty"),
        (["{"], r"all.jsonl:1: not JSON"),
        ([GSM, "", "nonsense"], r"all.jsonl:3: not JSON"),
        ([["a"], GSM], r"1 of 2 lines cannot be used:\n  .*all.jsonl:1: an object is needed, this is list"),
        ([{"text": "?"}, GSM], "no field problem or question or prompt with text in it; it has text"),
        ([{"question": "?"}, GSM], "no field answer with text in it; it has question"),
        ([{"question": "?", "answer": None}, GSM], "no field answer"),
        ([{"problem": "?", "solution": "It is 3."}, GSM], "the solution has no .boxed"),
    ],
)
def test_bad_lines_are_named(tmp_path, lines, message):
    task = get_task("math", test_path=write_lines(tmp_path / "all.jsonl", lines))
    with pytest.raises(ValueError, match=message):
        task.size("test")


def test_damaged_and_missing_files_are_named(tmp_path):
    write_lines(tmp_path / "all.jsonl.gz", [GSM] * 1000)
    (tmp_path / "cut.jsonl.gz").write_bytes((tmp_path / "all.jsonl.gz").read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"cut.jsonl.gz: damaged or cut short"):
        get_task("math", path=str(tmp_path / "cut.jsonl.gz")).size("train")
    with pytest.raises(ValueError, match=r"^task math: path: there is no file .*absent"):
        get_task("math", path=str(tmp_path / "absent.jsonl")).size("train")
    with pytest.raises(ValueError, match=r"^task math: test_path: there is no file .*absent"):
        get_task("math", path=str(tmp_path / "all.jsonl.gz"), test_path=str(tmp_path / "absent.jsonl")).size("test")


# --- mathematics


def test_mathematics_is_graded_by_value_and_bad_gold_answers_are_reported(tmp_path):
    more = [
        {"problem": "When?", "solution": "At $\\boxed{7:00}$."},  # read as a division by zero
        {"problem": "Where?", "answer": "(1,2)\\cup[3,\\infty)", "subject": "Precalculus", "level": 5, "solution": "There."},
        {"prompt": "Never?", "answer": "#### "},
        {"prompt": "A number?", "answer": 7},
    ]
    path = write_lines(tmp_path / "math.jsonl", [GSM, MATH, *more])
    task = get_task("math", test_path=path)
    assert task.skipped() == (f"{path}:3: its gold answer cannot be graded: '7:00'", f"{path}:5: the gold answer is empty")
    by_answer = {p.answer: p for p in (task.problem("test", i, 0) for i in range(task.size("test")))}
    eggs, half, where, seven = (by_answer[answer] for answer in ("1042", "\\frac12", "(1,2)\\cup[3,\\infty)", "7"))
    assert (eggs.difficulty, half.difficulty, half.category, where.difficulty, where.category) == (1, 3, "Algebra", 5, "Precalculus")
    user, assistant = task.worked(eggs)
    assert "<<" not in assistant.reasoning and assistant.content == "\\boxed{1042}" and user.content.endswith("\\boxed{}.")
    assert task.worked(seven) is None and task.messages(eggs) == (user,)
    check_gold(task)
    replies = ("<think>7</think>\\boxed{1,042}", "<answer>1042</answer>", "It is\n1042.", "\\boxed{(1,2)}", "\\boxed{\\dfrac12}")
    assert [task.vote(eggs, reply) for reply in replies] == ["1042", "1042", "1042", "(1,2)", "\\frac12"]
    cases = [
        (eggs, "\\boxed{1042}", 1),
        (eggs, "\\boxed{1,042}", 1),
        (eggs, "It makes 1,042 eggs.", 1),
        (eggs, "<answer>1042 eggs</answer>", 1),
        (eggs, "\\boxed{1042} or \\boxed{7}", 0),  # the last one counts
        (eggs, "1042 or 7", 0),
        (eggs, "<think>\\boxed{1042}</think>I do not know.", 0),
        (eggs, "<think>\\boxed{1042}", 0),
        (eggs, "", 0),
        (half, "\\boxed{0.5}", 1),
        (half, "<answer>$\\frac{2}{4}$</answer>", 1),
        (half, "The answer is 1/2.", 1),
        (half, "\\boxed{2}", 0),
        (where, "$\\boxed{[3,\\infty) \\cup (1,2)}$", 1),
        (where, "\\boxed{(1,2)}", 0),
        (seven, "\\boxed{9^{9^{9^{9}}}}", 0),  # never comes back
        (seven, "\\boxed{__import__('os')._exit(1)}", 0),
        (seven, "(" * 3000, 0),
    ]
    with Grader(task, timeout=5.0, processes=2) as grader:
        grades = grader.grade([(problem, reply) for problem, reply, _ in cases])
        assert [(reply, grade.score) for (_, reply, _), grade in zip(cases, grades)] == [(reply, score) for _, reply, score in cases]
        assert grader.failures == 1 and grades[-3].failure == "no answer within 5 s"

        near = st.lists(st.sampled_from([*"0123456789+-/()=., $x", "\\frac", "{", "}", "\\boxed{", "<answer>"]), max_size=40).map("".join)

        @settings(deadline=None, max_examples=30)
        @given(st.lists(st.text() | near, min_size=1, max_size=5))
        def take_any_text(replies):
            assert all(grade.score in (0, 1) for grade in grader.grade([(half, reply) for reply in replies]))

        take_any_text()


# --- multiple choice

OPTIONS = ["red", "green", "blue", "a matter of taste", "none", "six", "seven", "eight", "nine", "ten"]


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The answer is (C).", "C"),
        ("the answer is c.", "C"),
        ("The answer is **(C) blue**", "C"),
        ("**Answer:** C", "C"),
        ("Answer: (C)", "C"),
        ("Final answer is: $\\boxed{\\text{C}}$", "C"),
        ("<answer>C</answer>", "C"),
        ("<answer>(C) blue</answer>", "C"),
        ("\\boxed{C}", "C"),
        ("\\boxed{\\text{C}}", "C"),
        ("C", "C"),
        ("C. blue", "C"),
        ("(C)", "C"),
        ("C) blue", "C"),
        ("Option C", "C"),
        ("Let me see.\nThe correct answer to this is option C.", "C"),
        ("The answer is (A). No: the answer is (C).", "C"),
        ("So it must be (C)", "C"),
        ("blue", "C"),
        ("Blue.", "C"),
        ("The answer is a good one.", None),
        ("a matter of taste", "D"),
        ("The answer is (A) or (C).", None),
        ("The answer is A/C", None),
        ("It may be (A) and it may be (C)", None),
        ("The answer is (Z).", None),
        ("The answer is (K).", None),
        ("I", "I"),
        ("I think so.", None),
        ("A good question.", None),
        ("(A) red\n(B) green\n(C) blue\nWho knows.", None),
        ("", None),
    ],
)
def test_choice_is_read_in_many_forms(text, letter):
    assert chosen(text, OPTIONS) == letter


@settings(deadline=None)
@given(st.text() | st.lists(st.sampled_from(["answer is ", *"ABCKI()}\n*", "\\boxed{", "or ", "red"]), max_size=30).map("".join))
def test_choice_takes_any_text(text):
    assert chosen(text, OPTIONS) in {None, *"ABCDEFGHIJ"}


def test_choice_has_mmlu_pros_fields(tmp_path):
    record = {"question": "What colour?", "options": OPTIONS, "answer": "C", "answer_index": 2, "category": "art", "cot_content": "A: Sky."}
    bad = [record | {"answer": "D"}, record | {"answer_index": 10}, record | {"options": ["one"]}, {"question": "?", "options": OPTIONS}]
    path = write_lines(tmp_path / "choice.jsonl", [record, *bad, record | {"question": "And?", "answer": None}, *[record] * 4])
    task = get_task("choice", test_path=path)
    assert [line.removeprefix(f"{path}:").split(":")[0] for line in task.skipped()] == ["2", "3", "4", "5"]
    assert "answer is D but answer_index 2 is C" in task.skipped()[0]
    check_gold(task)
    problem = task.problem("test", 0, 0)
    assert "(A) red\n(B) green\n" in problem.prompt and problem.prompt.endswith(task.instruction)
    assert (problem.answer, problem.difficulty, problem.category) == ("C", 10, "art")
    assert task.worked(problem)[1].reasoning == "Sky." and task.verify(problem, "<think>(C)</think>(B)") == 0


# --- reasoning-gym


@pytest.fixture(scope="module")
def sums():
    return get_task("gym", family="chain_sum", config={"min_terms": 2, "max_terms": 3, "max_digits": 2}, difficulty="num_terms")


def test_gym_problems_are_the_familys_by_index_and_split(sums):
    train = [sums.problem("train", i, seed=0) for i in range(60)]
    test = [sums.problem("test", i, seed=5) for i in range(60)]
    assert [sums.problem("train", i, seed=0) for i in (59, 3)] == [train[59], train[3]]
    assert not {p.prompt for p in train} & {p.prompt for p in test} and len({p.prompt for p in train}) > 50
    assert {p.difficulty for p in train} == {2, 3} and train[0].category == "chain_sum" and sums.name == "gym-chain_sum"
    assert all(p.prompt.endswith(sums.instruction) and json.loads(json.dumps(p.data)) == p.data for p in train)
    check_gold(sums)
    with pytest.raises(ValueError, match=r"chain_sum has no 'terms' in its metadata; it has .*num_terms"):
        get_task("gym", family="chain_sum", difficulty="terms").make(0)


def made(family, number=5, **options):
    task = get_task("gym", family=family, **options)
    problem = task.make(number)
    return task, Problem(problem["question"], problem["answer"], {"entry": problem["entry"]}, 0)


def test_gym_scores_are_the_familys(sums):
    problem = sums.problem("train", 0, 0)
    for form in ("{}", "<answer>{}</answer>", "\\boxed{{{}}}", "Answer: {}.", "<think>{}0</think>{}"):
        assert sums.verify(problem, form.format(*[problem.answer] * 2)) == 1, form
    for form in ("{}!", "1{}", "", "<think>{}", "<answer>{}"):
        assert sums.verify(problem, form.format(problem.answer)) == 0, form
    partial, problem = made("chain_sum", partial=True, extract="whole")
    assert partial.verify(problem, f"{problem.answer} or so") == pytest.approx(len(problem.answer) / (len(problem.answer) + 6))
    mild, problem = made("chain_sum", threshold=0.2, extract="whole")
    assert (mild.verify(problem, f"{problem.answer} or so"), mild.verify(problem, f"{problem.answer} {'or so' * 99}")) == (1, 0)
    grid, problem = made("sudoku")
    assert "\n" in problem.answer and grid.verify(problem, problem.answer) == 1


ATTACKS = [
    "exec('import builtins; builtins.hit = True')",
    "(exec)('import builtins; builtins.hit = True')",
    "[exec][0]('import builtins; builtins.hit = True')",
    "[exec\\\n('import builtins; builtins.hit = True')]",
    "[exec #sin\n('import builtins; builtins.hit = True')]",
    "sqrt('exec%cimport builtins; builtins.hit = True)' % 40)",
    "().__class__.__base__.__subclasses__()",
    "sin . __class__ (1)",
    "(exec)((chr)(114)+(chr)(97))",
    "\uff45\uff58\uff45\uff43('import builtins; builtins.hit = True')",  # letters that Python takes for their plain ones
]


@pytest.mark.parametrize("family", ["countdown", "spiral_matrix", "simple_integration", "polynomial_multiplication"])
def test_answers_that_a_family_evaluates_call_nothing(family, monkeypatch):
    """These grade by eval."""
    monkeypatch.setattr(builtins, "hit", False, raising=False)
    task, problem = made(family)
    entry = pickle.loads(base64.b64decode(problem.data["entry"]))
    assert task.verify(problem, task.gold(problem)) == 1
    for attack in ATTACKS:
        assert task.verify(problem, f"<answer>{attack}</answer>") == 0 and not builtins.hit, attack
    task._dataset.score_answer(answer=ATTACKS[0], entry=entry)
    assert builtins.hit  # so the danger is real


near_numbers = st.lists(st.sampled_from([*"0123456789+-/() .,[]", "x", "<answer>", "</answer>", "\n"]), max_size=60).map("".join)


@settings(deadline=None, max_examples=40)
@given(st.text() | near_numbers | near_numbers.map("<answer>{}</answer>".format))
def test_gym_takes_any_text(reply):
    for family in ("chain_sum", "countdown", "spiral_matrix", "simple_equations"):
        task, problem = GYM.setdefault(family, made(family)) if family not in GYM else GYM[family]
        assert task.verify(problem, reply) in (0, 1)


GYM: dict = {}


def make_and_grade(family):
    """In a worker: a problem of a family, and the score of its answer."""
    task = get_task("gym", family=family)
    number = next(n for n in range(2**31 - 10, 2**31) if task.make(n))  # not every integral is solved
    _, problem = made(family, number)
    return [problem.prompt, problem.answer, task.verify(problem, task.gold(problem)) if problem.answer else None]


@pytest.mark.slow
def test_every_family_makes_the_same_problems_in_every_process_and_knows_its_answers():
    from jevons.tasks.gym import _families

    families = sorted(_families())
    first, second = (Pool(make_and_grade, seconds=60).run([(family,) for family in order]) for order in (families, families[::-1]))
    assert first == second[::-1]
    for family, outcome in zip(families, first):
        assert outcome.failure is None, f"{family}: {outcome.failure}"
        assert outcome.value[0] and outcome.value[2] in (1, None), (family, outcome.value)
    unknown = [family for family, outcome in zip(families, first) if outcome.value[2] is None]
    assert unknown == ["boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"]


# --- tools


def test_calculator():
    golden = {"2+3*4": "14", "7/2": "3.5", "1/3": "0.333333333333", "2**10": "1024", "2^10": "1024", "-(3-5)": "2", "0.1+0.2": "0.3"}
    golden |= {"10//3": "3", "10%3": "1", "-1/8": "-0.125", "2**-2": "0.25", "1e3": "1000", "1/0": "error: division by zero"}
    golden |= dict.fromkeys(["9**9**9", "*".join(["1e-300"] * 5)], "error: a number became too large")
    for text in ("2**0.5", "__import__('os')", "True+1", "", "(" * 200, "1e999", "'a'*9", "1 2", "x", "f(1)", "1;2", "1j"):
        golden[text] = "error: not an arithmetic expression"
    golden["1" * 300] = "error: longer than 256 characters"
    assert {expression: calculate(expression) for expression in golden} == golden


@settings(deadline=None)
@given(expressions)
def test_calculator_agrees_with_fractions(expression):
    try:
        value = eval(re.sub(r"([0-9]+)", r"Fraction(\1)", expression))
    except ZeroDivisionError:
        assert calculate(expression) == "error: division by zero"
        return
    shown = calculate(expression)
    assert shown == "error: longer than 256 characters" or abs(Fraction(shown) - value) <= Fraction(1, 10**12)


@settings(deadline=None)
@given(st.text() | st.lists(st.sampled_from([*"0123456789+-*/%().e ", "**", "//"]), max_size=60).map("".join))
def test_calculator_takes_any_text(text):
    assert isinstance(calculate(text), str)


def test_tools_answer_calls_and_mistakes_in_words():
    task = get_task("gym", family="chain_sum", tools=["calculator", "python"])
    assert [tool["function"]["name"] for tool in task.tools()] == ["calculator", "python"]
    problem = Problem("?", "1", {}, 0)
    assert task.call(problem, "calculator", {"expression": "6*7"}) == "42"
    assert task.call(problem, "python", {"code": "print(6 * 7)"}).strip() == "42"
    assert "ZeroDivisionError" in task.call(problem, "python", {"code": "print('so far')\n1 / 0"})
    assert task.call(problem, "python", {"code": "1"}) == "(it printed nothing)"
    assert len(task.call(problem, "python", {"code": "print('a' * 10000)"})) < 4100
    assert task.call(problem, "calculator", {"x": 1}) == "error: calculator needs the argument 'expression', a string"
    assert task.call(problem, "calculator", []) == "error: calculator needs the argument 'expression', a string"
    assert task.call(problem, "search", {}) == "error: there is no tool 'search'; there is calculator, python"
    assert Arithmetic().tools() == [] and Arithmetic().call(problem, "python", {}) == "error: there is no tool 'python'"


# --- options


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("maths", {}, f"known: {', '.join(TASKS)}; did you mean math"),
        ("math", {}, "path: give the file of problems"),
        ("math", {"path": "a", "extract": "box"}, "extract: must be one of auto, answer, boxed"),
        ("math", {"path": "a", "tools": ["pyton"]}, "tools: unknown 'pyton'; known: python, calculator; did you mean python"),
        ("math", {"path": "a", "tools": "python"}, "task math: tools: must be list, is 'python'"),
        ("math", {"path": "a", "tools_": []}, "unknown option 'tools_'"),
        ("custom", {"path": "a"}, 'verifier: must be "file.py:function" or "package.module:function", is \'\''),
        ("custom", {"path": "a", "verifier": "grade.py"}, "verifier: must be"),
        ("gym", {}, "family: unknown ''; known: ab, acre"),
        ("gym", {"family": "chain_sums"}, "family: unknown 'chain_sums'; did you mean chain_sum"),
        ("gym", {"family": "composite"}, "family: unknown 'composite'"),
        ("gym", {"family": "chain_sum", "config": {"min_term": 2}}, "chain_sum has no 'min_term'; it has min_terms, .*; did you mean"),
        ("gym", {"family": "chain_sum", "config": {"seed": 2}}, "config: chain_sum has no 'seed'"),
        ("gym", {"family": "chain_sum", "config": {"min_terms": 0}}, "chain_sum refuses {'min_terms': 0}: AssertionError: min_terms must"),
        ("gym", {"family": "chain_sum", "threshold": 0}, "threshold: must be above 0"),
        ("gym", {"family": "chain_sum", "threshold": 0.5, "partial": True}, "give one of the two"),
        ("gym", {"family": "chain_sum", "threshold": "1"}, "threshold: must be float, is '1'"),
    ],
)
def test_options_of_the_other_tasks(name, options, message):
    with pytest.raises(ValueError, match=message):
        get_task(name, **options)


@pytest.mark.parametrize(
    ("package", "name", "options"), [("reasoning_gym", "gym", {"family": "chain_sum"}), ("math_verify", "math", {"path": "a"})]
)
def test_a_missing_package_is_named_with_its_extra(monkeypatch, package, name, options):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=r"pip install 'jevons\[reasoning\]'"):
        get_task(name, **options)


def test_making_a_task_reads_no_file_and_loads_no_torch():
    code = (
        "import sys; from jevons.tasks.task import get_task; from jevons.tasks.grade import Grader; import jevons.tasks.reward;"
        "get_task('math', path='absent'); get_task('choice', path='absent'); get_task('custom', path='absent', verifier='a:b');"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
