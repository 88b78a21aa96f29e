"""What some answers say about a model (against enumeration and simulation), and `jevons eval` from its arguments to its page.

A random model solves nothing, so the task asked here calls a reply right by the sum of its characters: right and wrong come up everywhere,
the same for whoever looks.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import random
import re
import shutil
import signal
import sys
from dataclasses import dataclass
from statistics import fmean
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from rich.console import Console

import jevons.cli
from jevons.cost.ledger import Ledger
from jevons.data.chat import Message
from jevons.data.tokenizer import Tokenizer, train_bpe
from jevons.engine.engine import Engine
from jevons.model.config import ModelConfig
from jevons.model.folder import load_config, load_model, save_model
from jevons.model.transformer import Transformer
from jevons.progress import Meter
from jevons.run import Interrupt
from jevons.stages.estimate import difference, estimate, majority, pass_at, wilson
from jevons.stages.evaluate import show_results
from jevons.stages.exam import Exam, levels, results, sit
from jevons.stages.moment import show_moments
from jevons.stages.sample import answer
from jevons.tasks import task as tasks
from jevons.tasks.task import Problem, Task, answer_text, get_task


def lot(*key: object) -> int:
    return sum(map(ord, repr(key)))


@dataclass(frozen=True)
class Lottery(Task):
    """Replies are right by chance, but always the same ones; easy problems more often."""

    count: int = 0
    levels: int = 3

    name: ClassVar[str] = "lottery"

    def size(self, split):
        return self.count or None

    def problem(self, split, index, seed):
        return Problem(f"say {index} {seed}", "<anything>", {"index": index}, difficulty=1 + index % self.levels, category="ab"[index % 2])

    def gold(self, problem):
        return None

    def verify(self, problem, reply):
        return float(lot(reply, problem.data["index"]) % (1 + problem.difficulty) == 0)


@dataclass(frozen=True)
class Halves(Lottery):
    name: ClassVar[str] = "halves"

    def vote(self, problem, reply):
        return reply[:1]


class Refusing(Lottery):
    name: ClassVar[str] = "refusing"

    def gold(self, problem):
        return "never"

    def verify(self, problem, reply):
        return 0.0


# --- estimates ---


def test_pass_at_k_is_the_share_of_subsets_with_a_right_one():
    for samples in range(1, 8):
        for right, k in itertools.product(range(samples + 1), range(1, samples + 1)):
            subsets = list(itertools.combinations([i < right for i in range(samples)], k))
            assert pass_at(samples, right, k) == pytest.approx(fmean(any(s) for s in subsets))


def test_pass_at_k_has_no_bias():
    share, n, k = 0.3, 6, 4
    mean = sum(pass_at(n, sum(row), k) * share ** sum(row) * (1 - share) ** (n - sum(row)) for row in itertools.product((0, 1), repeat=n))
    assert mean == pytest.approx(1 - (1 - share) ** k)


@pytest.mark.parametrize(
    ("answers", "scores", "expected"),
    [
        (["4", "4", "5"], [1, 1, 0], 1.0),
        (["5", "4", "5"], [0, 1, 0], 0.0),
        (["4", "5"], [1, 0], 0.5),  # a tie: half the chance
        (["4", "5", "6", "4", "5"], [1, 0, 0, 1, 0], 0.5),
        (["a", "b", "c", "d"], [1, 0, 0, 0], 0.25),  # all different: their mean
        (["", "", "", "4"], [0, 0, 0, 1], 1.0),  # nothing said is no vote
        (["", ""], [0, 0], 0.0),
        (["x", "x", "y"], [1, 0, 0], 0.5),  # said alike, judged apart
    ],
)
def test_majority(answers, scores, expected):
    assert majority(answers, scores) == expected
    order = random.Random(0).sample(range(len(answers)), len(answers))
    assert majority([answers[i] for i in order], [scores[i] for i in order]) == expected


def test_wilson_holds_what_the_score_test_does_not_reject():
    # the interval is the set of shares p with |seen - p| <= z sqrt(p (1 - p) / n)
    for right, n in ((0, 10), (1, 10), (37, 200), (200, 200), (7, 7)):
        low, high = wilson(right / n, n)
        for p in (low, high):
            assert abs(right / n - p) == pytest.approx(1.959964 * (p * (1 - p) / n) ** 0.5, abs=1e-7)
        assert 0 <= low <= right / n <= high <= 1
    assert wilson(95 / 164, 164) == pytest.approx((0.5028, 0.6521), abs=2e-4)


def test_one_answer_a_problem_is_wilson_and_several_lie_between_the_extremes():
    row = [1.0] * 30 + [0.0] * 70
    assert (estimate(row).low, estimate(row).high) == wilson(0.3, 100)
    # every problem always or never solved: four answers to each say no more than one
    assert (estimate(row, samples=4).low, estimate(row, samples=4).high) == wilson(0.3, 100)
    alike = [0.25, 0.5, 0.25, 0.5] * 25  # answers that differ within problems: worth more than 100, less than 400
    width = estimate(alike, samples=4).high - estimate(alike, samples=4).low
    assert wilson(0.375, 400)[1] - wilson(0.375, 400)[0] <= width < wilson(0.375, 100)[1] - wilson(0.375, 100)[0]
    for sure in (0.0, 1.0):  # never certain
        assert estimate([sure] * 20, samples=8).high - estimate([sure] * 20, samples=8).low > 0.1


def test_intervals_hold_the_truth_19_times_in_20():
    rng = random.Random(1)
    hits = pairs = 0
    rounds, problems, samples = 600, 60, 4
    for _ in range(rounds):
        easy = [rng.betavariate(1, 2) for _ in range(problems)]  # mean 1/3 over all problems there are
        draw = lambda shift, easy=easy: [fmean(rng.random() < min(1, p + shift * (1 - p)) for _ in range(samples)) for p in easy]  # noqa: E731
        before, after = draw(0.0), draw(0.3)
        found, gain = estimate(before, samples), difference(before, after, samples)
        hits += found.low <= 1 / 3 <= found.high
        pairs += gain.low <= 0.3 * (1 - 1 / 3) <= gain.high
    assert 0.93 < hits / rounds < 0.985 and 0.93 < pairs / rounds < 0.995


def test_differences_are_narrower_where_problems_are_hard_for_both():
    a = [1.0] * 50 + [0.0] * 50
    b = [1.0] * 60 + [0.0] * 40
    mixed = b[::3] + b[1::3] + b[2::3]
    same, apart = difference(a, b), difference(a, mixed)
    assert same.value == pytest.approx(apart.value) == pytest.approx(0.1)
    assert same.high - same.low < apart.high - apart.low
    assert difference(b, a).low == pytest.approx(-same.high)
    both = difference([0.0] * 50, [0.0] * 50)
    assert both.value == 0 and both.low < 0 < both.high  # nobody solved any of fifty: that they are alike is not certain


# --- exams ---


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two tiny models with a chat template, that say other things."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = train_bpe(["say 0 1 2 3 4 5 6 7 8 9", "user assistant system be brief"] * 4, 300)
    fields = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 128, "initializer_range": 0.3}
    fields |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": tokenizer.size, "eos_token_id": tokenizer.eos_id}
    for seed, name in enumerate(("one", "two")):
        model = Transformer(ModelConfig(**fields, model_type="qwen2"))
        model.init_weights(torch.Generator().manual_seed(seed))
        save_model(model, root / name)
        tokenizer.save(root / name)
    return root


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """`lottery`, `halves` and `refusing` by name, as if they came with Jevons."""
    kinds = {kind.name: (__name__, kind.__name__) for kind in (Lottery, Halves, Refusing)}
    monkeypatch.setattr(tasks, "KINDS", tasks.KINDS | kinds)
    monkeypatch.setattr(tasks, "TASKS", (*tasks.TASKS, *kinds))
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def jevons_(capfd, monkeypatch, tmp_path):
    """`jevons_("eval", ...)` -> exit code, standard output, standard error; runs are kept in tmp_path/runs."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["jevons", *map(str, arguments), "--runs", str(tmp_path / "runs")])
        capfd.readouterr()
        code = 0
        try:
            jevons.cli.main()
        except SystemExit as left:
            code = left.code or 0
        return code, *capfd.readouterr()

    return call


@pytest.fixture(scope="module")
def engine(folders):
    return Engine(load_model(folders / "one", dtype=torch.float32), num_blocks=256, max_sequences=8), Tokenizer.load(folders / "one")


def examine(engine, **options):
    return sit(Exam(**{"task": Lottery(), "problems": 12, "max_tokens": 10} | options), *engine, Interrupt())


def test_results_count_what_the_verifier_says(engine):
    exam = {"samples": 4, "temperature": 1.0, "problems": 12}
    sheet = examine(engine, **exam)
    found = results(sheet, examples=6)
    scores = [[Lottery().verify(g.asked.problem, text) for text in g.texts] for g in sheet.groups]
    assert found["scores"] == scores and len(scores) == 12 and all(len(row) == 4 for row in scores)
    assert found["accuracy"] == found["pass_at"]["1"]["value"] == pytest.approx(fmean(map(fmean, scores)))
    assert list(found["pass_at"]) == ["1", "2", "4"] and found["pass_at"]["4"]["value"] == fmean(max(row) for row in scores)
    assert 0 < found["accuracy"] < found["pass_at"]["2"]["value"] < found["pass_at"]["4"]["value"] < 1
    assert found["majority"]["value"] == fmean(majority(list(map(answer_text, g.texts)), row) for g, row in zip(sheet.groups, scores))
    for level in "123":
        assert found["by_difficulty"][level] == fmean(fmean(scores[i]) for i in range(12) if 1 + i % 3 == int(level))
    assert found["difficulty_problems"] == {"1": 4, "2": 4, "3": 4} and found["category_problems"] == {"a": 6, "b": 6}
    answers = [t for group in sheet.groups for t in group.trajectories]
    assert found["mean_tokens"] == fmean(len(t.tokens) for t in answers) and found["unfinished"] == fmean(not t.finished for t in answers)
    wrong = [e for e in found["examples"] if not e["correct"]]
    assert len(found["examples"]) == 6 and len(wrong) == 3
    for example in found["examples"]:
        group = next(g for g in sheet.groups if g.asked.problem.prompt == example["prompt"])
        assert (Lottery().verify(group.asked.problem, example["reply"]) == 1.0) == example["correct"]
    assert "stopped" not in found and json.loads(json.dumps(found)) == found


def test_answers_follow_from_the_seed_and_not_from_the_company(engine):
    exam = {"samples": 3, "temperature": 1.0}
    whole, again, few = (examine(engine, **exam, **more) for more in ({}, {}, {"problems": 4}))
    assert [g.texts for g in whole.groups] == [g.texts for g in again.groups]
    assert [g.texts for g in whole.groups[:4]] == [g.texts for g in few.groups]
    assert [g.texts for g in whole.groups] != [g.texts for g in examine(engine, **exam, seed=1).groups]
    assert len({text for g in whole.groups for text in g.texts}) > 12


def test_one_sample_at_temperature_0_is_the_greedy_answer(engine):
    greedy = examine(engine)
    cold = examine(engine, samples=3, temperature=2e-5)  # the limit, by drawing: all the same and the likeliest
    assert [g.texts * 3 for g in greedy.groups] == [g.texts for g in cold.groups]
    found, same = results(greedy, 0), results(cold, 0)
    assert "pass_at" not in found and found["accuracy"] == same["accuracy"] == same["pass_at"]["3"]["value"]
    assert (found["low"], found["high"]) == (same["low"], same["high"])  # three times the same answer is no more evidence


def test_a_task_may_say_what_a_reply_votes_for(engine):
    problem = Lottery().problem("test", 0, 0)
    assert Lottery().vote(problem, "<think>no</think> yes ") == "yes" and Lottery().vote(problem, "<think>no") == ""
    sum_, game = get_task("arithmetic"), get_task("countdown")
    assert sum_.vote(problem, "<think>7</think>so 1,234.") == "1234" and sum_.vote(problem, "none") == ""
    assert game.vote(problem, "well\n(3 + 5)*2") == "(3 + 5)*2"
    sheet = examine(engine, task=Halves(), samples=4, temperature=1.0)
    votes = [majority([text[:1] for text in g.texts], row) for g, row in zip(sheet.groups, sheet.right())]
    assert results(sheet, 0)["majority"]["value"] == fmean(votes)


def test_difficulties_are_levels_or_ranges_of_them():
    assert list(levels([3, 1, 3, 2])) == ["1", "2", "3"] and levels([3, 1, 3, 2])["3"] == [True, False, True, False]
    many = [i * i % 101 for i in range(300)]
    found = levels(many)
    assert len(found) == 6 and all(sum(column) == 1 for column in zip(*found.values()))  # every problem is in exactly one
    names = list(found)
    assert names[0].startswith("0-") and names[-1].endswith("-100") and all(30 <= sum(those) <= 70 for those in found.values())
    assert sum(map(sum, levels([1] * 95 + list(range(2, 12))).values())) == 105  # nearly all alike


def test_no_more_problems_than_there_are(engine):
    assert results(examine(engine, task=Lottery(count=5)), 0)["problems"] == 5


def test_a_system_message_comes_first(engine):
    _, tokenizer = engine
    asked = Exam(task=Lottery(), problems=1, system="be brief").asked()[0]
    assert asked.task.messages(asked.problem) == (Message("system", "be brief"), Message("user", "say 0 0"))
    assert asked.task.name == "lottery" and asked.task.verify(asked.problem, "x") == Lottery().verify(asked.problem, "x")
    prompt = examine(engine, system="be brief").groups[0].trajectories[0].prompt
    assert tokenizer.decode(prompt).index("be brief") < tokenizer.decode(prompt).index("say 0 0")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 4}, "temperature: at 0 all 4 samples of a problem are the same"),
        ({"samples": 0}, "samples: must be at least 1"),
        ({"problems": 0}, "problems: must be at least 1"),
        ({"max_turns": 2}, "max_turns: 2 turns need a task with tools, lottery has none"),
    ],
)
def test_exams_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        Exam(**{"task": Lottery(), "problems": 3} | options)


# --- the stage of a recipe ---

STAGE = """
name = "gain"
device = "cpu"
dtype = "float32"
model = {{ path = "{folder}" }}

[evaluate]
problems = 12
samples = 3
temperature = 1.0
max_tokens = 8
"""
RL = """
[rl]
steps = 1

[[rl.tasks]]
task = "lottery"
options = { levels = 2 }
"""


def test_the_model_that_rl_began_with_sits_the_same_exam(folders, jevons_, tmp_path):
    (tmp_path / "gain.toml").write_text(STAGE.format(folder=folders / "one") + RL)
    run = tmp_path / "runs/gain"
    shutil.copytree(folders / "two", run / "rl/model")
    (run / "rl/DONE.json").write_text("{}")
    code, out, err = jevons_("run", tmp_path / "gain.toml")
    assert code == 0, err
    found = json.loads((run / "evaluate/results.json").read_text())
    assert found["model"] == "rl/model" and found["before"]["model"] == str(folders / "one") and "bits_per_byte" not in found
    (after,), (before,) = found["tasks"], found["before"]["tasks"]
    for folder, result in ((folders / "one", before), (folders / "two", after)):
        model = Engine(load_model(folder, dtype=torch.float32), max_sequences=64), Tokenizer.load(folder)
        sheet = examine(model, task=Lottery(levels=2), samples=3, temperature=1.0, max_tokens=8)
        assert results(sheet, 8) == {k: v for k, v in result.items() if k != "gain"}
    gain = difference(*([fmean(row) for row in result["scores"]] for result in (before, after)), 3)
    assert after["gain"] == dataclasses.asdict(gain)
    assert f"{before['accuracy']:.1%} before reinforcement learning: {100 * gain.value:+.1f} points" in out
    assert "&rarr;" in (run / "report.html").read_text()
    rows = Ledger(tmp_path / "runs/ledger.db").rows("gain")
    assert [r.stage for r in rows] == ["evaluate"] and rows[0].tokens == round(36 * (before["mean_tokens"] + after["mean_tokens"]))
    again = jevons_("run", tmp_path / "gain.toml", "--from", "evaluate", "evaluate.before_rl=false")
    assert again[0] == 0 and "before" not in json.loads((run / "evaluate/results.json").read_text())


def test_a_recipe_may_evaluate_and_do_nothing_else(folders, jevons_, tmp_path):
    (tmp_path / "gain.toml").write_text(STAGE.format(folder=folders / "one") + '[[evaluate.tasks]]\ntask = "lottery"\n')
    code, out, err = jevons_("run", tmp_path / "gain.toml")
    assert code == 0 and "of 12 held-out problems" in out, err
    assert json.loads((tmp_path / "runs/gain/evaluate/results.json").read_text())["model"] == str(folders / "one")
    for change, message in (
        ("evaluate.temperature=0", "evaluate.temperature: at 0 all 3 samples of a problem are the same"),
        ("evaluate.max_turns=2", "evaluate.max_turns: 2 turns need a task with tools"),
        ("evaluate.samples=0", "evaluate.samples: Input should be greater than or equal to 1"),
    ):
        code, _, err = jevons_("run", tmp_path / "gain.toml", change, "--from", "evaluate")
        assert code == 1 and message in err


# --- the command ---


def test_several_models_in_one_table_file_and_page(folders, jevons_, tmp_path):
    file = tmp_path / "out.json"
    arguments = ["eval", folders / "one", folders / "two", "--task", "lottery", "--option", "levels=2", "--json", file]
    arguments += ["--dtype", "float32", "--problems", 10, "--samples", 3, "--temperature", 1, "--max-tokens", 8, "--price-per-hour", 3600]
    code, out, err = jevons_(*arguments)
    assert code == 0, err
    document = json.loads(file.read_text())
    one, two = document["models"]
    assert (one["model"], two["model"]) == ("one", "two")
    assert [document[key] for key in ("task", "options", "samples", "temperature")] == ["lottery", ["levels=2"], 3, 1.0]
    assert one["scores"] != two["scores"] and "gain" not in one
    gain = difference([fmean(row) for row in one["scores"]], [fmean(row) for row in two["scores"]], 3)
    assert two["gain"] == pytest.approx(dataclasses.asdict(gain))
    for entry in (one, two):
        shown = {"pass@1": entry["pass_at"]["1"], "pass@2": entry["pass_at"]["2"], "pass@3": entry["pass_at"]["3"]}
        for label, share in (shown | {"majority@3": entry["majority"]}).items():
            row = next(line for line in out.splitlines() if line.split()[:1] == [label])
            assert f"{share['value']:.1%} ({100 * share['low']:.1f} to {100 * share['high']:.1f})" in row
        assert entry["money"] == pytest.approx(entry["seconds"] + entry["grading_seconds"])
        assert f"{entry['model']}: {entry['tokens']:,} tokens in" in out and f"${entry['money']:.4f}" in out
        wrong = next(example for example in entry["examples"] if not example["correct"])
        assert wrong["prompt"] in out
    for part in ("10 test problems x 3 samples at temperature 1", "difficulty 2, 5 problems", "category b, 5 problems"):
        assert part in out
    assert f"results: {file}" in out and f"page:    {file.with_suffix('.html')}" in out
    page = file.with_suffix(".html").read_text()
    assert "<h1>lottery (levels=2)</h1>" in page and page.count('class="track"') == 2 and "pass@2" in page and "&lt;anything&gt;" in page
    assert not re.search(r"https?://|@import|url\(|\bsrc=|\bhref=", page)
    # the same question again gives the same document, but for time
    again = tmp_path / "again.json"
    assert jevons_(*[again if a == file else a for a in arguments])[0] == 0
    drop = {"seconds", "grading_seconds", "tokens_per_second", "money"}
    strip = lambda path: [{k: v for k, v in e.items() if k not in drop} for e in json.loads(path.read_text())["models"]]  # noqa: E731
    assert strip(again) == strip(file)
    rows = Ledger(tmp_path / "runs/ledger.db").rows()[:2]
    assert [(r.run, r.stage, r.tokens) for r in rows] == [("out one", "eval", one["tokens"]), ("out two", "eval", two["tokens"])]


def test_a_file_has_a_place_of_its_own_where_none_is_named(folders, jevons_, tmp_path):
    code, out, _ = jevons_("eval", folders / "one", "--task", "lottery", "--problems", 2, "--max-tokens", 4)
    (file,) = (tmp_path / "runs/evaluations").glob("lottery-*.json")
    assert code == 0 and f"results: {file}" in out and file.with_suffix(".html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "lotery"], r"task: unknown 'lotery'.*lottery"),
        (["--task", "lottery", "--option", "levels"], "--option levels: options look like digits=3"),
        (["--task", "lottery", "--option", "depth=3"], "task lottery: unknown option 'depth'; known: count, levels"),
        (["--task", "lottery", "--option", "levels=many"], "task lottery: levels: must be int, is 'many'"),
        (["--task", "lottery", "--samples", "4"], "temperature: at 0 all 4 samples of a problem are the same"),
        (["--task", "lottery", "--split", "dev"], "split: must be train or test, is 'dev'"),
        (["--task", "lottery", "--weights", "int3"], "--weights: must be one of"),
        (["--task", "lottery", "--dtype", "fp8"], "--dtype: must be auto, bfloat16 or float32"),
        (["--task", "lottery", "--json", "x.html"], "--json x.html: the page will have this name"),
        (["--task", "lottery", "--temperature", "-1"], "temperature"),
        (["--task", "refusing"], "answers that are right by its own account do not score 1"),
    ],
)
def test_bad_input_is_refused_before_a_model_is_loaded(folders, jevons_, monkeypatch, arguments, message):
    monkeypatch.setattr("jevons.stages.contest.load_engine", None)
    code, _, err = jevons_("eval", folders / "one", *arguments)
    assert code == 1 and re.search(message, err) and "Traceback" not in err


def test_models_that_cannot_be_asked(folders, jevons_, tmp_path):
    code, _, err = jevons_("eval", tmp_path / "nowhere", "--task", "lottery")
    assert code == 1 and "nowhere: no such folder" in err
    (tmp_path / "empty").mkdir()
    code, _, err = jevons_("eval", folders / "one", tmp_path / "empty", "--task", "lottery")
    assert code == 1 and str(tmp_path / "empty") in err
    base = tmp_path / "base"
    base.mkdir()
    for file in (folders / "one").iterdir():
        if file.name != "chat_template.jinja":
            (base / file.name).write_bytes(file.read_bytes())
    config = json.loads((base / "tokenizer_config.json").read_text()) if (base / "tokenizer_config.json").exists() else {}
    config.pop("chat_template", None)
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    code, _, err = jevons_("eval", base, "--task", "lottery")
    assert code == 1 and f"{base}: the tokenizer has no chat template" in err


def test_control_c_leaves_with_what_is_known(folders, jevons_, tmp_path, monkeypatch):
    update, before = Meter.update, signal.getsignal(signal.SIGINT)

    def stop(self, done, text):
        if self.title == "evaluate one" and done >= 3:
            signal.raise_signal(signal.SIGINT)
            monkeypatch.setattr(Meter, "update", update)
        update(self, done, text)

    monkeypatch.setattr(Meter, "update", stop)
    file = tmp_path / "out.json"
    arguments = ["eval", folders / "one", folders / "two", "--task", "lottery", "--problems", 40, "--max-tokens", 30, "--concurrency", 4]
    code, out, _ = jevons_(*arguments, "--json", file)
    (entry,) = json.loads(file.read_text())["models"]
    assert code == 130 and 3 <= entry["problems"] == len(entry["scores"]) < 40
    assert f"stopped after {entry['problems']} of 40 problems" in out and "0 of 2 models have answered everything" in out
    assert "was stopped after" in file.with_suffix(".html").read_text()
    assert signal.getsignal(signal.SIGINT) is before


def test_brackets_are_no_markup(tmp_path):
    """Problems hold lists and tags, which rich would take for styles, or refuse."""
    text = "Sort [[3, 1], [2]] and [/INST] [red]"
    (tmp_path / "evaluate").mkdir()
    example = {"prompt": text, "reply": "[1]", "answer": "[/a] [1, 2]", "correct": False}
    result = {"task": "gym", "accuracy": 0.5, "low": 0.4, "high": 0.6, "problems": 9, "examples": [example]}
    (tmp_path / "evaluate/results.json").write_text(json.dumps({"tasks": [result]}))
    rows = [{"stage": s, "step": 1, "sample": {"prompt": text, "reply": "[/b]", "correct": False}} for s in ("sft", "rl")]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = SimpleNamespace(stage_folder=lambda stage: tmp_path / stage, metrics_path=tmp_path / "metrics.jsonl")
    console = Console(file=io.StringIO(), width=200)
    show_results(run, console)
    show_moments(run, console)
    printed = console.file.getvalue()
    assert printed.count(text) == 3 and "wrong, the answer is [/a] [1, 2]" in printed and "[/b]" in printed


def test_a_sample_has_memory_for_its_prompt(folders):
    """However long it is: a first question of thousands of tokens is no reason to stop a training run."""
    tokenizer = Tokenizer.load(folders / "one")
    model = Transformer(dataclasses.replace(load_config(folders / "one"), max_position_embeddings=8192))
    model.init_weights(torch.Generator().manual_seed(0))
    long, short = answer(model, tokenizer, [[5] * 5000, [6]], 4)
    assert isinstance(long, str) and isinstance(short, str)
