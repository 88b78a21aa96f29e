"""A recipe's life through the command line: what it leaves, how it goes on after every kind of stop, and what it says of bad input.

Everything runs on a tiny recipe. A run that was stopped (politely, by force, by a full disk, by a loss that is not finite) must end
in the very bytes of one that was never stopped.
"""

from __future__ import annotations

import errno
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path

import pytest
import torch
import typer.main
from safetensors import SafetensorError
from safetensors.torch import load_file

import jevons.cli
from jevons.cost.ledger import Ledger
from jevons.data.shard import write_shards
from jevons.data.text import Document
from jevons.data.tokenizer import Tokenizer, train_bpe
from jevons.engine.engine import Engine
from jevons.engine.sequence import SamplingParams
from jevons.model.folder import load_model
from jevons.recipe import load
from jevons.run import Interrupt
from jevons.stages import prepare, pretrain
from jevons.stages.dialogue import prompt_ids
from jevons.train import checkpoint, device, trainer

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
max_position_embeddings = 128

[prepare]
documents = 300
loss_on = "assistant"
processes = 1

[[prepare.tasks]]
task = "arithmetic"
options = { digits = 2, operations = "+" }

[pretrain]
steps = 20
sequence_length = 64
batch_size = 4
micro_batch_size = 2
lr = 1e-2
warmup_steps = 2
log_every = 2
evaluate_every = 10
evaluate_windows = 4
save_every = 4

[evaluate]
problems = 4
max_tokens = 24
"""
FORK = multiprocessing.get_context("forkserver")  # children of a clean process that has torch loaded: killing one costs no start
FORK.set_forkserver_preload(["jevons.cli", "jevons.stages.life", "torch._dynamo", "sqlalchemy.dialects.sqlite"])
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(device, "measure_peak", lambda where, dtype: 1e11)
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def jevons_(capfd, monkeypatch):
    """`jevons_(*arguments)` -> exit code, standard output, standard error; in this process."""

    def call(*arguments) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main(arguments)
        return code, *capfd.readouterr()

    return call


def main(arguments) -> int:
    sys.argv, before = ["jevons", *map(str, arguments)], sys.argv
    try:
        jevons.cli.main()
    except SystemExit as left:
        return left.code or 0
    finally:
        sys.argv = before
    return 0


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of runs after one uninterrupted run, by the console script; not to be changed."""
    root = tmp_path_factory.mktemp("finished")
    (root / "tiny.toml").write_text(RECIPE)
    command = [sys.executable, "-m", "jevons.cli", "run", str(root / "tiny.toml"), "--runs", str(root / "runs")]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (root / "output.txt").write_text(done.stdout)
    return root


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the finished runs, to be changed."""
    return Path(shutil.copytree(finished / "runs", tmp_path / "runs"))


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def kinds(run: Path) -> list[tuple]:
    """What each row is about; a row that a resumed run wrote again would stand here twice."""
    return [(r["stage"], r["step"], *sorted(r.keys() - {"stage", "step"}), r.get("sample", {}).get("prompt")) for r in rows(run)]


def spent(root: Path) -> dict[str, float]:
    ledger = Ledger(root / "ledger.db")
    try:
        return {r.stage: r.seconds for r in ledger.rows("tiny")}
    finally:
        ledger.close()


def content(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(folder.rglob("*")) if p.is_file()}


def assert_ends_alike(run: Path, finished: Path) -> None:
    """The same weights to the bit, the same metrics but for times, nothing left over."""
    other = finished / "runs/tiny"
    for path in ("pretrain/model/model.safetensors", "pretrain/model/config.json", "evaluate/results.json", "recipe.toml"):
        assert (run / path).read_bytes() == (other / path).read_bytes(), path
    assert kinds(run) == kinds(other)
    for row, expected in zip(rows(run), rows(other)):
        for key in ("loss", "grad_norm", "validation_loss", "lr", "tokens", "sample"):
            assert row.get(key) == expected.get(key), (row, key)
    assert {p.relative_to(run) for p in run.rglob("*")} == {p.relative_to(other) for p in other.rglob("*")}


# --- one run ---


def test_what_a_run_leaves(finished):
    run = finished / "runs/tiny"
    assert {p.name for p in run.iterdir()} == {
        *("recipe.toml", "environment.json", "metrics.jsonl", "receipt.json", "report.html", "prepare", "pretrain", "evaluate")
    }
    assert {p.name for p in (run / "pretrain").iterdir()} == {"DONE.json", "model"}
    assert {p.name for p in (run / "pretrain/model").iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    }
    assert load(str(run / "recipe.toml")) == load(str(finished / "tiny.toml"))
    environment = json.loads((run / "environment.json").read_text())
    assert environment["torch"] == torch.__version__ and "CPU" in environment["device"] and len(environment["run_id"]) == 32
    weights = load_file(run / "pretrain/model/model.safetensors")
    counted = {k: w for k, w in weights.items() if ".layers.2." not in k and not k.endswith("_bias")}  # not MTP, as DeepSeek counts
    assert environment["parameters"] == sum(w.numel() for w in counted.values())
    page = (run / "report.html").read_text()
    assert "tiny" in page and "arithmetic" in page
    output = (finished / "output.txt").read_text()
    for part in ("prepare -> pretrain -> evaluate", "of 4 held-out problems", "bits per byte", str(run / "report.html"), "jevons chat"):
        assert part in output


def test_metrics(finished):
    found = rows(finished / "runs/tiny")
    assert len(set(kinds(finished / "runs/tiny"))) == len(found)
    losses = {r["step"]: r["loss"] for r in found if "loss" in r}
    assert list(losses) == list(range(2, 21, 2)) and losses[20] < 0.8 * losses[2]
    bits = {r["step"]: r["bits_per_byte"] for r in found if "bits_per_byte" in r}
    assert list(bits) == [0, 10, 20] and bits[20] < bits[10] < bits[0]
    assert [r["tokens"] for r in found if "tokens" in r] == [step * 4 * 64 for step in losses]
    money = [r["money"] for r in found if "money" in r]
    assert money == sorted(money) and money == pytest.approx([r["seconds"] for r in found if "money" in r])  # a dollar a second
    assert all(r.keys() >= {"lr", "grad_norm", "mtp_loss", "balance_loss", "max_violation"} for r in found if "loss" in r)
    for loads in (r["loads"] for r in found if "loads" in r):
        assert len(loads) == 2 and all(sum(layer) == pytest.approx(1, abs=1e-4) for layer in loads)  # a layer and the MTP module
    samples = [r["sample"] for r in found if "sample" in r]
    assert len(samples) == 2 and all(re.fullmatch(r"\d+\+\d+=\?", s["prompt"]) for s in samples)


def test_receipt_adds_up(finished):
    receipt = json.loads((finished / "runs/tiny/receipt.json").read_text())
    stages = {s["stage"]: s for s in receipt["stages"]}
    assert list(stages) == ["prepare", "pretrain", "evaluate"]
    for key in ("seconds", "money", "device_hours"):
        assert receipt["total"][key] == pytest.approx(sum(s[key] for s in stages.values()))
    for stage in stages.values():
        assert stage["money"] == pytest.approx(stage["seconds"]) and stage["finished"] > stage["started"]
    assert stages["pretrain"]["tokens"] == stages["pretrain"]["planned"]["tokens"] == 20 * 4 * 64
    assert stages["pretrain"]["flops"] == pytest.approx(stages["pretrain"]["planned"]["flops"]) and stages["pretrain"]["flops"] > 1e8
    manifests = [json.loads((finished / f"runs/tiny/prepare/{s}/manifest.json").read_text()) for s in ("train", "validation")]
    assert stages["prepare"]["tokens"] == sum(m["tokens"] for m in manifests)
    assert [m["documents"] for m in manifests] == [300, 3]
    assert spent(finished / "runs") == {name: s["seconds"] for name, s in stages.items()}


def test_the_tokenizers_training_is_paid_for(tmp_path, recipe, jevons_, monkeypatch):
    def slow(*arguments):
        time.sleep(0.5)
        return train_bpe(*arguments)

    monkeypatch.setattr(prepare, "train_bpe", slow)
    assert jevons_("run", recipe, "--runs", tmp_path, "--stage", "prepare")[0] == 0
    assert spent(tmp_path)["prepare"] > 0.5


def test_a_second_run_does_nothing(copy, recipe, jevons_):
    run = copy / "tiny"
    before = {stage: content(run / stage) for stage in ("prepare", "pretrain", "evaluate")}
    metrics, receipt = (run / "metrics.jsonl").read_bytes(), (run / "receipt.json").read_bytes()
    code, out, _ = jevons_("run", recipe, "--runs", copy)
    assert code == 0 and "of 4 held-out problems" in out
    assert {stage: content(run / stage) for stage in before} == before
    assert (run / "metrics.jsonl").read_bytes() == metrics and (run / "receipt.json").read_bytes() == receipt


def test_one_stage_at_a_time(tmp_path, recipe, jevons_, finished):
    code, _, err = jevons_("run", recipe, "--runs", tmp_path, "--stage", "evaluate")
    assert code == 1 and "--stage evaluate: prepare, pretrain must run first" in err
    for stage in ("prepare", "pretrain", "evaluate"):
        assert jevons_("run", recipe, "--runs", tmp_path, "--stage", stage)[0] == 0
        assert (tmp_path / "tiny" / stage / "DONE.json").exists()
        assert (tmp_path / "tiny/evaluate").exists() == (stage == "evaluate")
    assert_ends_alike(tmp_path / "tiny", finished)
    code, _, err = jevons_("run", recipe, "--runs", tmp_path, "--stage", "sft")
    assert code == 1 and "--stage sft: the recipe's stages are prepare, pretrain, evaluate" in err


def test_from_starts_over_there(copy, recipe, jevons_, finished):
    run, before = copy / "tiny", spent(copy)
    prepared = content(run / "prepare")
    assert jevons_("run", recipe, "--runs", copy, "--from", "pretrain")[0] == 0
    assert content(run / "prepare") == prepared
    assert (run / "pretrain/DONE.json").stat().st_mtime > (finished / "runs/tiny/pretrain/DONE.json").stat().st_mtime
    assert_ends_alike(run, finished)
    after = spent(copy)  # what was thrown away has been paid for all the same
    assert after["prepare"] == before["prepare"] and after["pretrain"] > before["pretrain"] and after["evaluate"] > before["evaluate"]
    # with other values of what starts over
    assert jevons_("run", recipe, "--runs", copy, "--from", "pretrain", "pretrain.steps=6")[0] == 0
    assert max(r["step"] for r in rows(run)) == 6 and len(set(kinds(run))) == len(rows(run))
    code, _, err = jevons_("run", recipe, "--runs", copy, "--from", "rl")
    assert code == 1 and "--from rl: the recipe's stages are prepare, pretrain, evaluate" in err


def test_another_recipe_in_the_same_folder(copy, recipe, jevons_):
    before = content(copy / "tiny")
    code, _, err = jevons_("run", recipe, "--runs", copy, "pretrain.lr=0.5", "model.hidden_size=48", "evaluate.problems=5")
    assert code == 1 and "belongs to another recipe" in err and "choose another name" in err
    lines = ["evaluate.problems: was 4, now 5", "model.hidden_size: was 32, now 48", "pretrain.lr: was 0.01, now 0.5"]
    assert [line.strip() for line in err.splitlines()[1:4]] == lines
    # refusing must come before throwing away
    code, _, err = jevons_("run", recipe, "--runs", copy, "--from", "pretrain", "prepare.documents=400")
    assert code == 1 and "prepare.documents: was 300, now 400" in err
    assert content(copy / "tiny") == before
    # what an hour costs may change, and so may a stage that has not begun
    shutil.rmtree(copy / "tiny/evaluate")
    assert jevons_("run", recipe, "--runs", copy, "price_per_hour=1", "evaluate.problems=5")[0] == 0
    assert json.loads((copy / "tiny/evaluate/results.json").read_text())["tasks"][0]["problems"] == 5


# --- being stopped ---


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_next_run_finishes(number, tmp_path, recipe, jevons_, monkeypatch, finished):
    def step(*arguments):
        if arguments[3] == 6:
            signal.raise_signal(number)
        return train_step(*arguments)

    train_step, before = pretrain.train_step, signal.getsignal(number)
    monkeypatch.setattr(pretrain, "train_step", step)
    code, out, err = jevons_("run", recipe, "--runs", tmp_path)
    assert code == 128 + number
    assert "saved after step 7 of 20; the same command continues" in out and number.name in err
    assert checkpoint.newest(tmp_path / "tiny/pretrain/checkpoints").name == "step-00000007"
    assert (tmp_path / "tiny/report.html").exists() and not (tmp_path / "tiny/pretrain/DONE.json").exists()
    monkeypatch.setattr(pretrain, "train_step", train_step)
    code, out, _ = jevons_("run", recipe, "--runs", tmp_path)
    assert code == 0 and "continuing from step-00000007" in out
    assert_ends_alike(tmp_path / "tiny", finished)
    assert signal.getsignal(number) == before


def test_a_signal_in_the_midst_of_a_message(monkeypatch, capfd):
    end, start = os.pipe()
    stream = open(start, "w")  # noqa: SIM115
    monkeypatch.setattr(sys, "stderr", stream)

    def signal_and_read():
        time.sleep(0.2)  # until the pipe is full
        os.kill(os.getpid(), signal.SIGTERM)
        while os.read(end, 65536):
            pass

    with Interrupt() as interrupt:
        reader = threading.Thread(target=signal_and_read)
        reader.start()
        stream.write("x" * 10**6)
        stream.close()
        reader.join()
    os.close(end)
    assert interrupt.signal == signal.SIGTERM and "SIGTERM: saving after this step" in capfd.readouterr().err


def test_a_signal_while_preparing_or_evaluating(tmp_path, recipe, jevons_, monkeypatch, finished):
    from jevons.progress import Meter

    update = Meter.update
    for title, words in (("prepare validation", "stopped while preparing"), ("evaluate arithmetic", "stopped while evaluating")):

        def stop(self, done, text, title=title):
            if self.title == title:
                signal.raise_signal(signal.SIGTERM)
            update(self, done, text)

        monkeypatch.setattr(Meter, "update", stop)
        if title.startswith("prepare"):  # its progress is told once a chunk: ask for two
            monkeypatch.setattr("jevons.data.shard._chunks", lambda documents: ([d] for d in documents))
        code, out, _ = jevons_("run", recipe, "--runs", tmp_path)
        assert code == 143 and words in out
        monkeypatch.undo()
        monkeypatch.setattr(device, "measure_peak", lambda where, dtype: 1e11)
    assert jevons_("run", recipe, "--runs", tmp_path)[0] == 0
    assert_ends_alike(tmp_path / "tiny", finished)


MUTATIONS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir")


def attempt(arguments, counter, fatal):
    """In a process of its own: run, and die by SIGKILL just before the `fatal`-th change to the disk."""
    torch.set_num_threads(1)
    device.measure_peak = lambda where, dtype: 1e11
    import jevons.run

    jevons.run.LEDGER_SECONDS = 0.0  # the rows of a run that is over in a second

    def hook(event, values):
        writes = event == "open" and isinstance(values[1], str) and set(values[1]) & set("wax")
        if event in MUTATIONS or writes:
            counter.value += 1
            if counter.value == fatal:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    sys.exit(main(arguments))


def start(arguments, fatal=0):
    counter = FORK.Value("l", 0, lock=False)
    process = FORK.Process(target=attempt, args=(arguments, counter, fatal))
    process.start()
    process.counter = counter
    return process


def check_after_kill(root: Path, before: dict[str, float], save_every: int, steps: int = 20) -> dict[str, float]:
    """At most one interval is lost, the newest checkpoint opens, time spent only grows."""
    run = root / "tiny"
    metrics = run / "metrics.jsonl"
    whole = [json.loads(line) for line in metrics.read_text().splitlines(keepends=True) if line.endswith("\n")] if metrics.exists() else []
    done = (run / "pretrain/DONE.json").exists()
    found = checkpoint.newest(run / "pretrain/checkpoints")
    saved = steps if done else int(found.name.removeprefix("step-")) if found else 0
    reached = max((r["step"] for r in whole if "loss" in r), default=0)
    assert reached - saved <= save_every
    if done or found:
        load_model(run / "pretrain/model" if done else found)
    now = spent(root) if (root / "ledger.db").exists() else {}
    assert all(now[stage] >= seconds for stage, seconds in before.items()), (before, now)
    return now


KILLS = ["pretrain.save_every=2", "pretrain.log_every=1"]
BRIEF = [*KILLS, "pretrain.steps=6", "pretrain.evaluate_every=3"]  # three checkpoints: one more than are kept


def whole(recipe, root, changes):
    """An uninterrupted run: what it leaves and how many changes to the disk it makes."""
    process = start(["run", recipe, "--runs", root / "runs", *changes])
    process.join()
    assert process.exitcode == 0
    return root, process.counter.value


@pytest.fixture(scope="module")
def often(finished, tmp_path_factory):
    root, changes = whole(finished / "tiny.toml", tmp_path_factory.mktemp("often"), KILLS)
    weights = "tiny/pretrain/model/model.safetensors"
    assert (root / "runs" / weights).read_bytes() == (finished / "runs" / weights).read_bytes()  # saving changes nothing
    return root, changes


@pytest.fixture(scope="module")
def brief(finished, tmp_path_factory):
    return whole(finished / "tiny.toml", tmp_path_factory.mktemp("brief"), BRIEF)


def test_killed_at_random_moments(often, recipe, tmp_path):
    uninterrupted, changes = often
    rng, before, killed = random.Random(5), {}, 0
    arguments = ["run", recipe, "--runs", tmp_path / "runs", *KILLS]
    for _ in range(5):
        process = start(arguments)
        reached = rng.randrange(changes // 3)  # so that a slow machine, too, comes somewhere
        while process.is_alive() and process.counter.value < reached:
            time.sleep(0.001)
        process.join(rng.uniform(0, 0.05))
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        before = check_after_kill(tmp_path / "runs", before, 2)
    assert killed >= 3
    process = start(arguments)
    process.join()
    assert process.exitcode == 0
    check_after_kill(tmp_path / "runs", before, 2)
    assert_ends_alike(tmp_path / "runs/tiny", uninterrupted)


def killed_before_changes(points, uninterrupted, recipe, root, changes, steps):
    before = {}
    arguments = ["run", recipe, "--runs", root, *changes]
    for fatal in points:
        process = start(arguments, fatal)
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        before = check_after_kill(root, before, 2, steps)
    process = start(arguments)
    process.join()
    assert process.exitcode == 0
    check_after_kill(root, before, 2, steps)
    assert_ends_alike(root / "tiny", uninterrupted)


def test_killed_between_two_changes_to_the_disk(often, recipe, tmp_path):
    # a kill at a random time rarely hits the few moments that matter: when a checkpoint appears, an old one goes, a stage ends
    uninterrupted, changes = often
    killed_before_changes(random.Random(0).sample(range(1, changes // 2), 5), uninterrupted, recipe, tmp_path / "runs", KILLS, 20)


@pytest.mark.slow
def test_killed_before_any_change_to_the_disk(brief, recipe, tmp_path):
    uninterrupted, changes = brief
    for fatal in range(changes, 0, -7):
        killed_before_changes([fatal], uninterrupted, recipe, tmp_path / str(fatal), BRIEF, 6)
        shutil.rmtree(tmp_path / str(fatal))


@pytest.mark.slow
def test_started_over_and_killed(brief, recipe, tmp_path):
    # --from must not leave a stage that counts as done and stands on nothing
    uninterrupted, _ = brief
    arguments = ["run", recipe, "--runs", tmp_path / "runs", *BRIEF]
    for fatal in range(1, 60, 3):
        shutil.copytree(uninterrupted / "runs", tmp_path / "runs")
        process = start([*arguments, "--from", "prepare"], fatal)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        process = start(arguments)
        process.join()
        assert process.exitcode == 0, fatal
        assert_ends_alike(tmp_path / "runs/tiny", uninterrupted)
        shutil.rmtree(tmp_path / "runs")


def test_a_torn_row_is_dropped(copy, recipe, jevons_, finished):
    run = copy / "tiny"
    shutil.rmtree(run / "pretrain")
    shutil.rmtree(run / "evaluate")
    (run / "pretrain").mkdir()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "pretrain", "step": 20, "sample": {"prompt": "1+1=?", "reply": ""}')  # ends like a whole one
    assert jevons_("run", recipe, "--runs", copy)[0] == 0
    assert_ends_alike(run, finished)


def write_without_end(folder):
    documents = (Document("to be or not to be " * 20, None, "x", i) for i in range(10**9))
    write_shards(documents, folder / "tokenizer", folder / "shards", processes=2, source={})


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="children are read from /proc")
def test_workers_leave_stopping_to_their_parent(tmp_path):
    train_bpe(["to be or not to be"], 300).save(tmp_path / "tokenizer")
    process = FORK.Process(target=write_without_end, args=(tmp_path,))
    process.start()

    def workers() -> list[int]:
        children = map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
        return [c for c in children if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]

    def wait(condition) -> None:
        end = time.monotonic() + 120
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.02)

    wait(lambda: len(workers()) == 2)
    found = workers()
    for worker in found:  # a Ctrl-C in the terminal, at once and after a while
        os.kill(worker, signal.SIGINT)
    wait(lambda: all(Path(f"/proc/{worker}/task").exists() and len(list(Path(f"/proc/{worker}/task").iterdir())) > 1 for worker in found))
    for worker in found:
        os.kill(worker, signal.SIGINT)
    time.sleep(0.2)
    assert process.is_alive() and workers() == found
    process.kill()  # and nobody is left behind by a kill
    wait(lambda: not any(Path(f"/proc/{worker}").exists() for worker in found))


# --- what goes wrong ---


def test_a_loss_that_is_not_finite(tmp_path, recipe, jevons_, monkeypatch, finished):
    build = pretrain.build

    def spike(*arguments, **options):
        class Schedule:
            def at(self, step):
                return 1e30 if step == 11 else build(*arguments, **options).at(step)

        return Schedule()

    monkeypatch.setattr(pretrain, "build", spike)
    code, _, err = jevons_("run", recipe, "--runs", tmp_path, "pretrain.save_every=5")
    assert code == 1 and "Traceback" not in err
    assert "pretrain step 13, windows 48 to 51 (lr " in err and re.search(r"(micro-batch 0|norm) is (nan|inf)", err)
    assert "Nothing was saved over the last good checkpoint" in err
    found = checkpoint.newest(tmp_path / "tiny/pretrain/checkpoints")
    assert found is not None and found.name == "step-00000010"
    assert all(p.isfinite().all() for p in load_model(found).parameters())
    monkeypatch.setattr(pretrain, "build", build)
    assert jevons_("run", recipe, "--runs", tmp_path, "pretrain.save_every=5")[0] == 0
    weights = "pretrain/model/model.safetensors"
    assert (tmp_path / "tiny" / weights).read_bytes() == (finished / "runs/tiny" / weights).read_bytes()


def test_a_learning_rate_beyond_reason(tmp_path, recipe, jevons_):
    code, _, err = jevons_("run", recipe, "--runs", tmp_path, "pretrain.lr=1e30", "pretrain.warmup_steps=0")
    assert code == 1 and err.startswith("error: pretrain step 2, windows 4 to 7 (lr ") and "lower pretrain.lr" in err


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
HIDDEN = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")  # as safetensors says it


@pytest.mark.parametrize("error", [pytest.param(FULL, id="OSError"), pytest.param(HIDDEN, id="SafetensorError", marks=pytest.mark.slow)])
@pytest.mark.parametrize("which", ["state", "model"])
def test_a_full_disk(error, which, tmp_path, recipe, jevons_, monkeypatch, finished):
    module = trainer if which == "state" else sys.modules["jevons.model.folder"]
    save_file, saved = module.save_file, []

    def full(tensors, path, **options):
        saved.append(path)
        if len(saved) == 3:
            path.write_bytes(b"half")
            raise error
        save_file(tensors, path, **options)

    monkeypatch.setattr(module, "save_file", full)
    code, _, err = jevons_("run", recipe, "--runs", tmp_path)
    assert code == 1 and "Traceback" not in err
    assert "No space left on device" in err and (error is FULL or "step-00000012" in err)
    assert "The disk is full; nothing that was saved before is lost." in err
    left = tmp_path / "tiny/pretrain/checkpoints"
    assert sorted(p.name for p in left.iterdir()) == ["step-00000004", "step-00000008"]
    monkeypatch.setattr(module, "save_file", save_file)
    assert jevons_("run", recipe, "--runs", tmp_path)[0] == 0
    assert_ends_alike(tmp_path / "tiny", finished)


WORDS = ["".join(random.Random(i).choices("abcdefghijklmnopqrstuvwxyz", k=6)) for i in range(200)]
TEXTS = [f"The sum of {a} and {b} is {a + b}, and their product is {a * b}.\n" for a in range(20) for b in range(20)]


def text_recipe(folder: Path, lines: list[str]) -> list[str]:
    """Arguments that make the recipe read lines of text."""
    (folder / "text.jsonl").write_text("".join(f"{line}\n" for line in lines))
    source = json.dumps(str(folder / "text.jsonl"))
    return [f"prepare.sources=[{source}]", "prepare.tasks=[]", "prepare.documents=0", "prepare.loss_on=all", "prepare.validation_share=0.1"]


def test_text_is_learned(tmp_path, recipe, jevons_):
    arguments = text_recipe(tmp_path, [json.dumps({"text": t}) for t in TEXTS])
    code, out, err = jevons_("run", recipe, "--runs", tmp_path / "runs", "dtype=bfloat16", *arguments)
    assert code == 0, err
    run = tmp_path / "runs/tiny"
    bits = [r["bits_per_byte"] for r in rows(run) if "bits_per_byte" in r]
    assert bits[-1] < 0.75 * bits[0] < 8 and f"{json.loads((run / 'evaluate/results.json').read_text())['bits_per_byte']:.3f} bits" in out
    samples = [r["sample"] for r in rows(run) if "sample" in r]
    assert len(samples) == 2 and all(any(t.startswith(s["prompt"]) for t in TEXTS) for s in samples)
    weights = load_file(run / "pretrain/model/model.safetensors")
    for name, tensor in weights.items():  # a bf16 model, but for the biases of its routers
        assert tensor.dtype == (torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16), name
    biases = torch.stack([w for name, w in weights.items() if name.endswith("e_score_correction_bias")])
    torch.testing.assert_close(biases, (biases * 1000).round() / 1000, rtol=0, atol=1e-6)  # 20 moves of 0.001, none rounded
    assert biases.abs().max() > 0.005
    # no document stands in both splits
    tokenizer = Tokenizer.load(run / "prepare/tokenizer")
    documents = {}
    for split in ("train", "validation"):
        manifest = json.loads((run / f"prepare/{split}/manifest.json").read_text())
        tokens = torch.frombuffer(bytearray((run / f"prepare/{split}/tokens-00000.bin").read_bytes()), dtype=torch.uint16)
        documents[split] = set(tokenizer.decode(tokens.tolist()).split("<|im_end|>")) - {""}
        assert manifest["documents"] == len(documents[split])
    assert not documents["train"] & documents["validation"]
    assert documents["train"] | documents["validation"] == set(TEXTS)


def test_of_a_few_books_one_is_held_out(tmp_path, recipe, jevons_):
    for i in range(5):  # of which a share of 1 % would be none
        (tmp_path / f"{i}.txt").write_text("".join(TEXTS[80 * i : 80 * (i + 1)]))
    arguments = [*text_recipe(tmp_path, []), f"prepare.sources=['{tmp_path}/*.txt']", "prepare.validation_share=0.00001"]
    code, _, err = jevons_("run", recipe, "--runs", tmp_path / "runs", "--stage", "prepare", *arguments)
    assert code == 0, err
    folder = tmp_path / "runs/tiny/prepare"
    counts = [json.loads((folder / split / "manifest.json").read_text())["documents"] for split in ("train", "validation")]
    assert counts == [4, 1]


def test_bad_lines_are_reported_with_their_numbers(tmp_path, recipe, jevons_):
    lines = [json.dumps({"text": t}) for t in TEXTS]
    for number, line in {4: "", 9: '{"text": ', 17: '{"[/bold]": 1}', 30: '{"text": 5}'}.items():
        lines.insert(number - 1, line)
    arguments = [*text_recipe(tmp_path, lines), "--runs", tmp_path / "runs", "--stage", "prepare"]
    code, out, err = jevons_("run", recipe, *arguments)
    assert code == 0, err
    assert "4 bad lines left out" in out
    path = tmp_path / "text.jsonl"
    for reason in (":4: empty", ":9: not JSON: ", ":17: no field 'text' or 'messages'; it has [/bold]", ":30: text: must be a string"):
        assert f"{path}{reason}" in out
    manifest = json.loads((tmp_path / "runs/tiny/prepare/train/manifest.json").read_text())
    assert manifest["bad_lines"]["malformed"] == 3 and manifest["bad_lines"]["empty"] == 1
    code, _, err = jevons_("run", recipe, *arguments, "name=strict", "prepare.bad_lines=3")
    assert code == 1 and err.startswith("error: more than 3 lines are bad (1 empty, 3 malformed), the first:") and f"{path}:9: " in err


@pytest.mark.parametrize(
    "lines, changes, complaint",
    [
        (None, ["prepare.sources=['nowhere.jsonl']"], "nowhere.jsonl: no text found there"),
        (TEXTS[:1], ["prepare.field=body"], "no documents to write"),
        (TEXTS[:1], [], "none of their documents fell into train; give more documents (a .txt file is one)"),
        (TEXTS[:2], ["prepare.loss_on=assistant"], ": plain text has no assistant"),
        (TEXTS[:40], ["pretrain.sequence_length=128", "pretrain.batch_size=2", "prepare.validation_share=0.49"], None),
        (TEXTS[:12], ["pretrain.sequence_length=128", "prepare.validation_share=0.49"], "prepare more text or shorten sequence_length"),
        (TEXTS, ["model.vocab_size=200"], "vocab_size: must be at least 256 + 5"),
    ],
)
def test_text_that_will_not_do(lines, changes, complaint, tmp_path, recipe, jevons_):
    arguments = text_recipe(tmp_path, [json.dumps({"text": t}) for t in lines or []])
    code, _, err = jevons_("run", recipe, "--runs", tmp_path / "runs", *arguments, *changes)
    assert (code, err) == (0, "") if complaint is None else code == 1 and err.startswith("error: ") and complaint in err, err


def test_tokenizer_and_model_must_fit(tmp_path, recipe, jevons_, copy):
    train_bpe(WORDS * 2, 400).save(tmp_path / "large")
    code, _, err = jevons_("run", recipe, "--runs", tmp_path / "new", f"prepare.tokenizer={tmp_path / 'large'}")
    assert code == 1 and "model.vocab_size: 320 is less than the tokenizer's " in err
    # nothing of it is worth keeping, so the next try may be another recipe
    code, _, err = jevons_("run", recipe, "--runs", tmp_path / "new", f"prepare.tokenizer={tmp_path / 'none'}")
    assert code == 1 and "none/tokenizer.json: no such file" in err
    # shards that another tokenizer wrote are other text
    train_bpe(TEXTS, 300).save(copy / "tiny/prepare/tokenizer")
    shutil.rmtree(copy / "tiny/pretrain")
    code, _, err = jevons_("run", recipe, "--runs", copy)
    assert code == 1 and "written with another tokenizer" in err


def further(recipe: Path, model: Path) -> Path:
    """The recipe with [model] replaced by a path."""
    text = re.sub(r"\[model\].*?\n\[prepare\]", f"[model]\npath = {json.dumps(str(model))}\n\n[prepare]", recipe.read_text(), flags=re.S)
    recipe.write_text(text)
    return recipe


def test_a_model_is_trained_further(tmp_path, recipe, jevons_, finished):
    model = finished / "runs/tiny/pretrain/model"
    path = further(recipe, model)
    changes = ["pretrain.steps=4", "pretrain.lr=1e-4", "pretrain.warmup_steps=0"]
    assert jevons_("run", path, "--runs", tmp_path, *changes)[0] == 0
    before = [r["validation_loss"] for r in rows(finished / "runs/tiny") if "validation_loss" in r][-1]
    losses = [r["validation_loss"] for r in rows(tmp_path / "tiny") if "validation_loss" in r]
    assert losses[0] == pytest.approx(before, rel=1e-6) and losses[-1] < losses[0]  # the same tokenizer, the same weights
    assert (tmp_path / "tiny/pretrain/model/tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    # what no loss reaches stays as it was: weight decay would shrink it
    assert jevons_("run", path, "--runs", tmp_path, "name=still", *changes, "pretrain.mtp_weight=0")[0] == 0
    old, new = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "still/pretrain/model"))
    own = [name for name in new if re.match(r"model\.layers\.2\.(mlp|self_attn|eh_proj)", name)]  # others are the main model's
    assert own and all(new[name].equal(old[name]) for name in own) and not new["lm_head.weight"].equal(old["lm_head.weight"])
    train_bpe(WORDS * 2, 400).save(tmp_path / "large")
    code, _, err = jevons_("run", path, "--runs", tmp_path, "name=b", f"prepare.tokenizer={tmp_path / 'large'}", *changes)
    assert code == 1 and "the model's embedding 320" in err
    code, _, err = jevons_("run", path, "--runs", tmp_path, "name=c", "pretrain.sequence_length=129", *changes)
    assert code == 1 and "pretrain.sequence_length: 129 is more than the model's 128 positions" in err
    code, _, err = jevons_("run", path, "--runs", tmp_path, "name=d", "model.path=nowhere")
    assert code == 1 and "nowhere: no such folder, and not a hub name" in err


def test_bad_commands(tmp_path, recipe, jevons_):
    code, _, err = jevons_("run", "quickstrat")
    assert code == 1 and err.startswith("error: quickstrat: no such recipe file")
    code, _, err = jevons_("run", recipe, "--runs", tmp_path, "pretrain.stpes=3")
    assert code == 1 and err == f"error: {recipe}: pretrain.stpes: unknown key; did you mean 'steps'?\n"
    assert not (tmp_path / "tiny").exists()
    assert jevons_("run")[0] == 2 and jevons_("runn")[0] == 2
    code, _, err = jevons_("chat", tmp_path, "-p", "hi")
    assert code == 1 and "tokenizer.json: no such file" in err
    code, _, err = jevons_("report", tmp_path)
    assert code == 1 and "not a run's folder" in err
    code, _, err = jevons_("receipt", "--runs", tmp_path / "none")
    assert code == 1 and "no ledger" in err
    if not torch.cuda.is_available():
        code, _, err = jevons_("run", recipe, "--runs", tmp_path, "device=cuda")
        assert code == 1 and "torch sees no GPU" in err


# --- the other verbs ---


def test_chat(finished, jevons_):
    (sample, other) = [r["sample"] for r in rows(finished / "runs/tiny") if "sample" in r]
    options = ["--dtype", "float32", "--max-tokens", "64", "-p", sample["prompt"]]
    code, out, err = jevons_("chat", finished / "runs/tiny", *options)
    assert code == 0, err
    assert sample["reply"] and out.replace("\n", "") == sample["reply"].replace("\n", "")  # what it wrote in training
    code, out, _ = jevons_("chat", finished / "runs/tiny", *options, "--prompt", other["prompt"], "--system", "Add.")
    assert code == 0 and len(out.strip()) > 0
    code, _, err = jevons_("chat", finished / "runs/tiny", "--dtype", "int8")
    assert code == 1 and "--dtype: must be auto, bfloat16 or float32, is 'int8'" in err


def test_chat_reads_lines_without_a_terminal(finished):
    command = [sys.executable, "-m", "jevons.cli", "chat", str(finished / "runs/tiny"), "--max-tokens", "3"]
    done = subprocess.run(command, env=ENVIRONMENT, input="1+1=?\n\n/new\n2+2=?\n/quit\n3+3=?\n", capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and 1 <= len(done.stdout.splitlines()) <= 8


CONVERSATION = [
    {"role": "system", "content": "Add."},
    {"role": "user", "content": "1+2=?"},
    {"role": "assistant", "content": "3", "reasoning_content": "1+2=03"},
    {"role": "user", "content": "And <think> 4?"},
]


def test_export_opens_in_transformers(finished, tmp_path, jevons_):
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    out = tmp_path / "exported"
    code, printed, err = jevons_("export", finished / "runs/tiny", out, "--dtype", "float32")
    assert code == 0 and printed.strip().replace("\n", "") == str(out), err
    code, _, err = jevons_("export", finished / "runs/tiny", out)
    assert code == 1 and "exists already" in err

    tokenizer, theirs = Tokenizer.load(out), transformers.AutoTokenizer.from_pretrained(out)
    from jevons.data.chat import Message

    messages = [Message.from_dict(m) for m in CONVERSATION]
    for prompt in (False, True):
        text = tokenizer.template.render(messages, add_generation_prompt=prompt)
        assert theirs.apply_chat_template(CONVERSATION, add_generation_prompt=prompt, tokenize=False) == text
        ids = theirs.apply_chat_template(CONVERSATION, add_generation_prompt=prompt, tokenize=True, return_dict=False)
        assert list(ids) == tokenizer.encode(text)
    assert (theirs.eos_token_id, theirs.bos_token_id, theirs.pad_token_id) == (tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id)

    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    engine = Engine(load_model(out, dtype=torch.float32, mtp=False))
    for question in ("1+2=?", "78+7=?", "99+99=?"):
        ids = prompt_ids(tokenizer, [Message("user", question)])
        (ours,) = engine.generate([ids], SamplingParams(max_tokens=30, temperature=0))
        made = model.generate(torch.tensor([ids]), max_new_tokens=30, do_sample=False)[0, len(ids) :]
        assert tokenizer.decode(ours.tokens) == theirs.decode(made) and ours.tokens == made.tolist()
    # without MTP modules, and in the usual dtype
    assert jevons_("export", finished / "runs/tiny", tmp_path / "bare", "--no-mtp")[0] == 0
    bare = load_file(tmp_path / "bare/model.safetensors")
    assert not any(".layers.2." in name for name in bare) and bare["lm_head.weight"].dtype == torch.bfloat16


def test_receipt_and_report(copy, jevons_):
    code, out, _ = jevons_("receipt", copy / "tiny")
    assert code == 0 and all(word in out for word in ("prepare", "pretrain", "planned", "evaluate", "total", "5.12K"))
    assert jevons_("receipt", "--runs", copy)[1] == out == jevons_("receipt", "tiny", "--runs", copy)[1]
    code, _, err = jevons_("receipt", "other", "--runs", copy)
    assert code == 1 and re.search(r"other: no such run in .*; there are tiny\n", err)
    (copy / "tiny/report.html").unlink()
    code, out, _ = jevons_("report", copy / "tiny")
    assert code == 0 and out.replace("\n", "") == str(copy / "tiny/report.html") and (copy / "tiny/report.html").exists()


@pytest.mark.parametrize("verb", sorted(typer.main.get_command(jevons.cli.app).commands))
def test_help_mentions_every_argument(verb, jevons_):
    code, out, _ = jevons_(verb, "--help")
    assert code == 0
    plain = re.sub(r"\x1b\[[0-9;]*m", "", out)
    for parameter in typer.main.get_command(jevons.cli.app).commands[verb].params:
        if parameter.name == "help":
            continue
        named = [*parameter.opts, *parameter.secondary_opts] if parameter.param_type_name == "option" else [parameter.name]
        assert all(name.lower() in plain.lower() for name in named), parameter.name
        assert parameter.help and parameter.help.split()[0] in plain, f"{verb} {parameter.name}: say what it is"
    assert verb in jevons_("--help")[1]


def test_import_does_not_wait_for_torch():
    code = "import sys, time; t = time.process_time(); import jevons.cli; print(time.process_time() - t, 'torch' in sys.modules)"
    lines = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() for _ in range(3)]
    assert min(float(seconds) for seconds, _ in lines) < 0.3
    assert {loaded for _, loaded in lines} == {"False"}


@pytest.mark.parametrize("verb", [["run", "quickstart"], ["quickstart"]])
def test_a_mistake_in_a_recipe_is_told_before_torch_is_loaded(verb):
    code = "import sys; from jevons.cli import app\ntry: app()\nexcept ValueError as error: print(error, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *verb, "sft.steps=3"], capture_output=True, text=True, check=True)
    assert "sft.steps: unknown key" in done.stdout and done.stdout.endswith("False\n")


def test_a_wrong_name_of_a_run_is_not_asked_of_the_hub(copy, jevons_):
    for verb in (["chat", copy / "tinny", "-p", "hi"], ["export", copy / "tinny", copy / "out"]):
        code, _, err = jevons_(*verb)
        assert code == 1 and re.search(r"tinny: no such run; .* has tiny\n", err)


def test_a_recipe_is_saved_as_it_was_run(finished):
    values = tomllib.loads((finished / "runs/tiny/recipe.toml").read_text())
    assert values["pretrain"]["clip"] == 1.0 and values["prepare"]["tasks"][0]["share"] == 1.0
    assert math.isclose(values["pretrain"]["lr"], 1e-2)


def test_two_processes_cannot_work_on_one_run(recipe, jevons_, tmp_path):
    holder = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", holder, tmp_path / ".tiny.lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        code, _, err = jevons_("run", recipe, "--runs", tmp_path)
        assert code == 1 and "another process is working on this run" in err
        other.stdin.close()
