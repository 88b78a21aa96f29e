"""Reinforcement learning as a stage: it learns, it resumes to the bit, it refuses early what cannot work.

Everything runs on a model of a few thousand parameters that has seen some one-digit sums.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

import jevons.cli
from jevons.data.tokenizer import Tokenizer
from jevons.data.trajectory import Trajectory
from jevons.model.folder import load_model
from jevons.section import Rl
from jevons.stages import rl as stage
from jevons.stages.classroom import Classroom, Harvest
from jevons.stages.origin import make_trainer
from jevons.stages.rehearsal import times
from jevons.stages.rollout import Asked, Group
from jevons.stages.scorecard import summary
from jevons.tasks.task import get_task
from jevons.train import device
from jevons.train.policy import policy_loss

RECIPE = """
name = "tiny"
seed = 3
price_per_hour = 3600.0
device = "cpu"
dtype = "float32"

[model]
vocab_size = 320
hidden_size = 32
intermediate_size = 48
moe_intermediate_size = 16
num_hidden_layers = 2
num_attention_heads = 2
q_lora_rank = 16
kv_lora_rank = 16
qk_nope_head_dim = 8
qk_rope_head_dim = 8
v_head_dim = 8
n_routed_experts = 4
n_shared_experts = 1
num_experts_per_tok = 2
first_k_dense_replace = 1
num_nextn_predict_layers = 1
max_position_embeddings = 64

[prepare]
documents = 400
loss_on = "assistant"
processes = 1

[[prepare.tasks]]
task = "arithmetic"
options = { digits = 1, operations = "+", unworked = 1.0 }

[pretrain]
steps = 200
sequence_length = 64
batch_size = 8
lr = 1e-2
warmup_steps = 2

[rl]
steps = 5
problems = 4
group = 4
max_tokens = 8
lr = 1e-3
evaluate_every = 2
evaluate_problems = 4
sample_every = 2
save_every = 1

[[rl.tasks]]
task = "arithmetic"
options = { digits = 1, operations = "+", unworked = 1.0 }
"""
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["jevons.cli", "jevons.stages.life", "torch._dynamo", "sqlalchemy.dialects.sqlite"])


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(device, "measure_peak", lambda where, dtype: 1e11)
    monkeypatch.setenv("COLUMNS", "200")


def main(arguments) -> int:
    torch.set_num_threads(1)
    sys.argv, before = ["jevons", *map(str, arguments)], sys.argv
    try:
        jevons.cli.main()
    except SystemExit as left:
        return left.code or 0
    finally:
        sys.argv = before
    return 0


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """Runs with prepare and pretrain done; not to be changed."""
    root = tmp_path_factory.mktemp("pretrained")
    (root / "tiny.toml").write_text(RECIPE)
    for name in ("prepare", "pretrain"):
        assert main(["run", root / "tiny.toml", "--runs", root / "runs", "--stage", name]) == 0
    return root


@pytest.fixture(scope="module")
def finished(pretrained, tmp_path_factory):
    """The same with reinforcement learning, never stopped."""
    root = tmp_path_factory.mktemp("finished")
    shutil.copytree(pretrained / "runs", root / "runs")
    assert main(["run", pretrained / "tiny.toml", "--runs", root / "runs"]) == 0
    return root / "runs"


@pytest.fixture
def runs(pretrained, tmp_path):
    return Path(shutil.copytree(pretrained / "runs", tmp_path / "runs"))


def rows(runs: Path) -> list[dict]:
    found = [json.loads(line) for line in (runs / "tiny/metrics.jsonl").read_text().splitlines()]
    return [row for row in found if row["stage"] == "rl"]


TIMES = {"seconds", "money"}


def timeless(row: dict) -> dict:
    return {key: value for key, value in row.items() if not (key in TIMES or key.endswith(("_seconds", "_per_second")))}


def assert_ends_alike(runs: Path, finished: Path) -> None:
    for path in ("rl/model/model.safetensors", "rl/DONE.json"):
        assert (runs / "tiny" / path).read_bytes() == (finished / "tiny" / path).read_bytes(), path
    assert [timeless(row) for row in rows(runs)] == [timeless(row) for row in rows(finished)]
    assert {p.name for p in (runs / "tiny/rl").iterdir()} == {p.name for p in (finished / "tiny/rl").iterdir()}


def test_what_a_step_leaves(finished):
    steps = [row for row in rows(finished) if "reward" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5]
    for row in steps:
        assert row["reward"] == pytest.approx(row["reward_correct"]) == pytest.approx(row["accuracy"])
        assert (row["no_signal"] == 1) == (row["group_deviation"] == 0) and 0 <= row["unanswered"] <= 1 - row["accuracy"]
        assert "verifier_failures" not in row  # it runs here, and cannot fail
        assert 0 <= row["no_signal"] <= 1 and row["response_tokens"] <= 8 and row["lr"] == 1e-3
        if row["no_signal"] < 1:  # something was learned, from the sampler's own distribution
            assert row["mismatch_max"] < 1e-4 and row["ratio"] == pytest.approx(1, abs=1e-4) and row["entropy"] > 0
    assert min(row["handover_seconds"] for row in steps) < 0.01  # of one step at least: a busy machine may pause in another
    assert [row["step"] for row in rows(finished) if "held_out" in row] == [0, 2, 4, 5]
    samples = [row for row in rows(finished) if "sample" in row]
    assert [row["step"] for row in samples] == [2, 2, 4, 4, 5, 5] and all(row["sample"]["prompt"].endswith("=?") for row in samples)
    done = json.loads((finished / "tiny/rl/DONE.json").read_text())
    assert done["steps"] == 5 and done["answers"] == 80 and done["drawn"] > 80
    receipt = json.loads((finished / "tiny/receipt.json").read_text())
    (spent,) = [s for s in receipt["stages"] if s["stage"] == "rl"]
    assert spent["tokens"] == done["drawn"] <= spent["planned"]["tokens"] == 5 * 16 * 8


def test_killed_at_random_moments(runs, pretrained, finished):
    """SIGKILL at five moments of the stage, then to the end: the same rewards and weights."""
    rng = random.Random(5)
    kills = 0
    while kills < 5:
        process = FORK.Process(target=main, args=(["run", str(pretrained / "tiny.toml"), "--runs", str(runs)],))
        process.start()
        deadline = time.monotonic() + rng.uniform(0.2, 1.5)
        while time.monotonic() < deadline and process.is_alive():
            time.sleep(0.005)
        if not process.is_alive():
            break
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills += 1
    assert kills
    assert main(["run", pretrained / "tiny.toml", "--runs", runs]) == 0
    assert_ends_alike(runs, finished)


def test_killed_between_steps(runs, pretrained, finished, monkeypatch):
    """An exception after every step's checkpoint: each step is made by another process's state."""
    saved = stage.checkpoint.save

    def save(*arguments, **options):
        saved(*arguments, **options)
        raise RuntimeError("killed here")

    monkeypatch.setattr(stage.checkpoint, "save", save)
    for _ in range(5):
        with pytest.raises(RuntimeError, match="killed here"):
            main(["run", pretrained / "tiny.toml", "--runs", runs])
    monkeypatch.setattr(stage.checkpoint, "save", saved)
    assert main(["run", pretrained / "tiny.toml", "--runs", runs]) == 0
    assert_ends_alike(runs, finished)


@pytest.mark.parametrize("at", [0, 2, 3])
def test_stopped_while_sampling(runs, pretrained, finished, monkeypatch, at):
    """A signal does not wait for the step's end, which may be minutes away: what is sampled so far is drawn again."""
    watch = stage.watch

    def signalled(card, interrupt, step, drawn):
        if step == at and drawn > 4:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
        watch(card, interrupt, step, drawn)

    with monkeypatch.context() as patch:
        patch.setattr(stage, "watch", signalled)
        arguments = ["run", pretrained / "tiny.toml", "--runs", runs]
        assert main([*arguments, "rl.save_every=2"]) == 128 + signal.SIGTERM
    assert [p.name for p in (runs / "tiny/rl/checkpoints").glob("*")] == ([f"step-{at:08d}"] if at else [])
    assert main([*arguments, "rl.save_every=2"]) == 0
    for path in ("rl/model/model.safetensors", "rl/DONE.json"):
        assert (runs / "tiny" / path).read_bytes() == (finished / "tiny" / path).read_bytes(), path
    assert [timeless(row) for row in rows(runs)] == [timeless(row) for row in rows(finished)]


@pytest.mark.parametrize(
    "changes",
    [
        ["rl.kl_weight=0.01", "rl.reference_every=2"],
        ["rl.lora.rank=4", "rl.lora.alpha=8"],
        ["rl.no_signal=refill", "rl.sampling=prioritised", "rl.pool=20", "rl.loss=mirror", "rl.advantage=dr"],
        ["rl.updates=2", "rl.importance_cap=2.0", "rl.temperature=0.7", "rl.top_p=0.9", "rl.aggregation=token", "rl.clip_high=0.28"],
    ],
    ids=["reference", "lora", "refill", "updates"],
)
def test_every_way_resumes(runs, pretrained, tmp_path, changes, monkeypatch):
    other = shutil.copytree(runs, tmp_path / "other")
    arguments = ["run", pretrained / "tiny.toml", *changes, "--runs"]
    assert main([*arguments, other]) == 0
    saved = stage.checkpoint.save

    def save(*arguments, **options):
        saved(*arguments, **options)
        raise RuntimeError("killed here")

    with monkeypatch.context() as patch:
        patch.setattr(stage.checkpoint, "save", save)
        for _ in range(3):
            with pytest.raises(RuntimeError, match="killed here"):
                main([*arguments, runs])
    assert main([*arguments, runs]) == 0
    assert_ends_alike(runs, other)


# --- a step's arithmetic ---


@pytest.fixture(scope="module")
def folder(pretrained):
    return pretrained / "runs/tiny/pretrain/model"


def options(**changes) -> Rl:
    task = {"task": "arithmetic", "options": {"digits": 1, "operations": "+", "unworked": 1.0}}
    text = {"tasks": [task], "steps": 1, "problems": 3, "group": 4}
    return Rl.model_validate(text | {"max_tokens": 8} | changes)


@pytest.mark.parametrize("changes", [{}, {"temperature": 0.7, "top_p": 0.9}, {"replay_routes": False}, {"mtp_weight": 0.1}])
def test_the_first_step_is_on_policy(folder, changes):
    """Sampler and trainer give every token one probability, whatever the temperature and the nucleus: all ratios are 1."""
    o = options(**changes)
    model = load_model(folder, dtype=torch.float32)
    engine = stage.make_engine(model, Tokenizer.load(folder), o)
    classroom = Classroom(o, Tokenizer.load(folder), engine, seed=1)
    harvest = classroom.collect(0, 0.0, lambda drawn: None)
    assert harvest.kept
    learned = stage.learn(make_trainer(model, o, 0), harvest, o, policy_loss(o.objective), 0.0, None)
    ((_, norm),) = learned
    found = summary(learned)
    assert found["ratio"] == pytest.approx(1, abs=1e-5) and found["mismatch_max"] < 1e-5 and norm > 0


def test_groups_without_signal_are_left_out_and_counted(folder):
    """The gradient is that of a batch which holds them."""
    model = load_model(folder, dtype=torch.float32)
    o = options(aggregation="sample")
    asked = Asked(get_task("arithmetic"), get_task("arithmetic").problem("train", 0, 0), (0, 0))
    found = []
    for kept_only in (True, False):
        groups = []
        for p, rewards in enumerate(([1.0, 0.0], [1.0, 1.0], [0.0, 1.0])):
            sampled = [Trajectory([5, 6 + p], [7 + i, 8], [True, True], [-1.0, -1.0], [-1.0, -1.0], True, 0) for i in range(2)]
            groups.append(Group(asked, sampled, ["", ""], rewards, [{"correct": r} for r in rewards]))
        harvest = Harvest(groups, [groups[0], groups[2]] if kept_only else groups, 1.0, 1.0)
        trainer = make_trainer(model, o, 0)
        ((part, total),) = stage.lessons(harvest, o)
        assert len(part) == (4 if kept_only else 6) and total == 6
        trainer.forward_backward(stage.pack(part, o), policy_loss(o.objective), total)
        found.append([g.clone() for g in trainer.optimizer.gradients])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_a_pull_needs_no_signal():
    """Groups that agree are trained on where something else than their rewards pulls: a reference, or mirror descent's own policy."""
    asked = Asked(get_task("arithmetic"), get_task("arithmetic").problem("train", 0, 0), (0, 0))
    groups = []
    for p, rewards in enumerate(([1.0, 0.0], [1.0, 1.0])):
        sampled = [Trajectory([5, 6 + p], [7 + i, 8], [True, True], [-1.0, -1.0], [-1.0, -1.0], True, 0) for i in range(2)]
        groups.append(Group(asked, sampled, ["", ""], rewards, [{"correct": r} for r in rewards]))
    for changes, counts in (
        ({}, [2]),
        ({"kl_weight": 0.1}, [4]),
        ({"loss": "mirror"}, [2]),  # its pull is nothing yet
        ({"loss": "mirror", "updates": 2}, [2, 2]),
        ({"updates": 2}, [2, 0]),
    ):
        found = stage.lessons(Harvest(groups, groups[:1], 1.0, 1.0), options(problems=2, **changes))
        assert [len(part) for part, _ in found] == counts, changes


def test_mirror_descent_begins_each_step_with_a_new_optimizer(folder):
    """Trap 16: k1.5's every iteration is a problem of its own; the updates within one share their moments."""
    model = load_model(folder, dtype=torch.float32)
    asked = Asked(get_task("arithmetic"), get_task("arithmetic").problem("train", 0, 0), (0, 0))
    sampled = [Trajectory([5, 6], [7 + i, 8], [True, True], [-1.0, -1.0], [-1.0, -1.0], True, 0) for i in range(2)]
    group = Group(asked, sampled, ["", ""], [1.0, 0.0], [{"correct": 1.0}, {"correct": 0.0}])
    for changes, counts in (({"loss": "mirror"}, [2, 2]), ({"loss": "grpo"}, [2, 4])):
        o = options(problems=2, updates=2, **changes)
        trainer = make_trainer(model, o, 0)
        for expected in counts:
            stage.learn(trainer, Harvest([group, group], [group, group], 1.0, 1.0), o, policy_loss(o.objective), 1e-3, None)
            assert trainer.optimizer.steps == expected, changes


def test_refilled_batches_have_a_signal_in_every_group(folder):
    o = options(no_signal="refill", refill_rounds=20, problems=4)
    model = load_model(folder, dtype=torch.float32)
    classroom = Classroom(o, Tokenizer.load(folder), stage.make_engine(model, Tokenizer.load(folder), o), seed=1)
    harvest = classroom.collect(0, 0.0, lambda drawn: None)
    assert len(harvest.kept) == 4 and harvest.dropped > 0
    ((part, _),) = stage.lessons(harvest, o)
    assert len(part) == 16 and all(lesson.advantage != 0 for lesson in part)


# --- what is refused before it costs anything ---


@pytest.mark.parametrize(
    "changes, complaint",
    [
        (["rl.temperature=0"], "rl.temperature: at 0 all samples of a group are the same"),
        (["rl.top_k=1"], "rl.top_k: at 1 all samples of a group are the same"),
        (["rl.max_tokens=60"], "rl.max_tokens: a prompt of"),
        (["rl.updates=3"], "rl.updates: 3 does not divide problems 4"),
        (["rl.sampling=curriculum"], "rl.pool: sampling 'curriculum' needs a fixed set of problems"),
        (["rl.max_turns=2"], "rl.max_turns: 2 turns need a task with tools, arithmetic has none"),
        (['rl.rewards=[{part="corect"}]'], "unknown part 'corect'; known: correct"),
        (['rl.tasks=[{task="arithmetik"}]'], "arithmetic"),
        (["rl.pool=2", "rl.sampling=prioritised"], "rl.problems: 4 are more than the pool of 2; lower it"),
        (["rl.lossy=1"], "rl.lossy: unknown key"),
        (["rl.loss=mirror", "rl.two_sided=4"], "rl.two_sided: has no meaning for mirror"),
        (["rl.kl=unbiased"], "rl.kl: 'unbiased' needs kl_weight"),
        (["rl.importance_mode=mask"], "rl.importance_mode: 'mask' needs importance_cap"),
        (["rl.tau=0.2"], "rl.tau: only mirror has it, the loss is grpo"),
        (["rl.refill_rounds=2"], "rl.refill_rounds: nothing is refilled with no_signal 'drop'"),
        (["rl.rewards=[{weight=0}]"], "rl.rewards: no part has a weight from the first step on"),
        (['rl.rewards=[{}, {part="finished", from_step=5}]'], "rl.rewards: finished would count from step 5 on, the last is 4"),
        (["rl.rewards=[{}, {weight=2}]"], "rl.rewards: correct is there twice; add up the weights"),
        (["rl.cache_gb=0.00001", "rl.max_tokens=40"], "rl.cache_gb: 1e-05 GiB hold 32 tokens, less than the"),
        (['rl.rewards=[{part="correct"}, {part="format"}]'], "ends its thinking with </think> within rl.max_tokens = 8"),
    ],
)
def test_bad_recipes(runs, pretrained, capfd, changes, complaint):
    assert main(["run", pretrained / "tiny.toml", *changes, "--runs", runs]) == 1
    assert complaint in capfd.readouterr().err
    assert not any(row for row in rows(runs) if "reward" in row) and not list((runs / "tiny").glob("rl/checkpoints/*"))


@pytest.mark.parametrize("when", ["next", "after pretraining"])
def test_a_verifier_that_fails_on_its_own_answers(runs, pretrained, tmp_path, capfd, when):
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps({"prompt": f"{i}+1=?", "answer": str(i + 1)}) + "\n" for i in range(60)))
    (tmp_path / "check.py").write_text("def never(problem, reply):\n    return 0.0\n")
    tasks = f'rl.tasks=[{{task="custom", options={{path="{tmp_path}/problems.jsonl", verifier="{tmp_path}/check.py:never"}}}}]'
    root = runs if when == "next" else tmp_path / "fresh"
    assert main(["run", pretrained / "tiny.toml", tasks, "--runs", root]) == 1
    assert "answers that are right by its own account do not score 1" in capfd.readouterr().err
    assert (root / "tiny/prepare").exists() == (when == "next")  # else nothing was begun


def test_the_longest_prompt_of_a_file_is_found(folder, tmp_path):
    """Wherever in the file it stands."""
    lines = [{"prompt": f"{i}+1=?" + " and so on" * (i in (150, 151, 152)), "answer": str(i + 1)} for i in range(200)]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "check.py").write_text("def check(problem, reply):\n    return float(reply == problem['answer'])\n")
    task = {"path": f"{tmp_path}/problems.jsonl", "verifier": f"{tmp_path}/check.py:check"}
    o = options(tasks=[{"task": "custom", "options": task}], max_tokens=2)
    model, tokenizer = load_model(folder, dtype=torch.float32), Tokenizer.load(folder)
    classroom = Classroom(o, tokenizer, stage.make_engine(model, tokenizer, o), seed=1)
    assert "and so on" in tokenizer.decode(classroom.longest)
    classroom.close()


def test_later_stages_tasks_are_looked_at_first(pretrained, tmp_path, capfd):
    (tmp_path / "problems.jsonl").write_text('{"prompt": "1+1=?", "answer": "2"}\n')
    (tmp_path / "check.py").write_text("def check(problem, reply):\n    return float(reply == problem['answer'])\n")
    task = f'{{task="custom", options={{path="{tmp_path}/problems.jsonl", verifier="{tmp_path}/check.py:check"}}}}'
    for changes, complaint in (
        ([f"sft.tasks=[{task}]", "sft.documents=1", "sft.sequence_length=64"], "sft.tasks: custom has no worked solutions to learn from"),
        ([f"evaluate.tasks=[{task}]"], "evaluate.tasks: custom has no test problems"),
    ):
        assert main(["run", pretrained / "tiny.toml", *changes, "--runs", tmp_path / "fresh"]) == 1
        assert complaint in capfd.readouterr().err and not (tmp_path / "fresh/tiny/prepare").exists()


def test_only_rewards_for_thinking_ask_for_its_end(folder):
    """Tags of other names do not, and a reply that ended its thinking is enough."""
    model, tokenizer = load_model(folder, dtype=torch.float32), Tokenizer.load(folder)
    asked = Asked(get_task("arithmetic"), get_task("arithmetic").problem("train", 0, 0), (0, 0))
    for tags, texts, refused in (
        (["think", "answer"], ["7", "8"], True),
        (["answer"], ["7", "8"], False),
        (["think", "answer"], ["7", "a</think>8"], False),
        (["answer"], ["<think>7", "<think>8"], True),  # the template opened it
    ):
        o = options(rewards=[{"part": "correct"}, {"part": "format", "options": {"tags": tags}}])
        classroom = Classroom(o, tokenizer, stage.make_engine(model, tokenizer, o), seed=1)
        if not refused:
            classroom.check_thinking([Group(asked, [], texts)])
            continue
        with pytest.raises(ValueError, match="none can be " + ("right" if "<think>7" in texts else "rewarded by format")):
            classroom.check_thinking([Group(asked, [], texts)])


def test_rewards_follow_the_step(folder):
    """A part with from_step: nothing before it, what it is worth from there on."""
    o = options(rewards=[{"part": "correct"}, {"part": "finished", "from_step": 1}], steps=2)
    model, tokenizer = load_model(folder, dtype=torch.float32), Tokenizer.load(folder)
    classroom = Classroom(o, tokenizer, stage.make_engine(model, tokenizer, o), seed=1)
    found = [classroom.collect(step, 0.0, lambda drawn: None) for step in range(2)]
    late = [sum(part["finished"] for group in harvest.groups for part in group.parts) for harvest in found]
    assert late[0] == 0 < late[1]


def test_how_often():
    """Every so many steps and after the last; what is planned is what the stage does."""
    for every, steps in ((0, 7), (1, 7), (3, 7), (7, 7), (9, 7)):
        done = sum(stage.due(every, step) or (step == steps and every > 0) for step in range(1, steps + 1))
        assert times(every, steps) == done


def test_a_template_that_cannot_ask(runs, pretrained, capfd):
    template = runs / "tiny/pretrain/model/chat_template.jinja"
    template.write_text(template.read_text().replace("add_generation_prompt", "never"))
    assert main(["run", pretrained / "tiny.toml", "--runs", runs]) == 1
    assert "the chat template has no generation prompt" in capfd.readouterr().err


@pytest.mark.slow
def test_a_digit_sum_is_learned_from_rewards_alone(pretrained, tmp_path):
    """SPEC 2.5 (4): a model that guesses gains at least 30 points within minutes on one processor.

    It has seen half as many sums as the others here, which answer every second one before they begin.
    """
    runs, changes = tmp_path / "runs", ["pretrain.steps=100", "rl.steps=500", "rl.problems=8", "rl.group=16", "rl.lr=1e-3"]
    arguments = ["run", pretrained / "tiny.toml", *changes, "rl.evaluate_every=500", "rl.save_every=0", "--runs", runs]
    assert main([*arguments, "--stage", "prepare"]) == main([*arguments, "--stage", "pretrain"]) == 0
    start = time.process_time()
    assert main(arguments) == 0
    assert time.process_time() - start < 120
    steps = [row["accuracy"] for row in rows(runs) if "accuracy" in row]
    first, last = sum(steps[:10]) / 10, sum(steps[-10:]) / 10
    print(f"accuracy while training: {first:.1%} -> {last:.1%}")
    assert last > first + 0.3
