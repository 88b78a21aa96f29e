"""What was measured comes back as plans: profiles kept, matched and refused; plans that are simple sums; a stage measured and then run."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from random import Random

import pytest
import torch
from rich.console import Console

from jevons.cost import profile as profiles
from jevons.cost.arithmetic import forward_flops, train_flops
from jevons.cost.deployment import Deployment
from jevons.cost.ledger import Ledger
from jevons.cost.profile import Entry, Profile, signature
from jevons.kernels import processor
from jevons.model.folder import companions, save_model
from jevons.recipe import Recipe, parse
from jevons.stages import calibrate, forecast, life, pace, probe
from jevons.stages.plan import Options, make_plan
from jevons.stages.traffic import Traffic, serve_arguments
from jevons.train import device
from jevons.train.lora import adapters

pytestmark = pytest.mark.usefixtures("one_thread")

MODEL = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "model_type": "qwen2", "max_position_embeddings": 64,
}  # fmt: skip
SUMS = [{"task": "arithmetic", "options": {"digits": 1, "operations": "+", "unworked": 1.0}}]
VALUES = {
    "name": "tiny", "device": "cpu", "dtype": "float32", "price_per_hour": 3600.0, "model": MODEL,
    "prepare": {"documents": 200, "tasks": SUMS, "processes": 1},
    "pretrain": {"steps": 25, "sequence_length": 64, "batch_size": 4, "lr": 1e-3, "evaluate_every": 10, "sample_every": 5, "save_every": 7},
    "sft": {"tasks": SUMS, "documents": 100, "sequence_length": 48, "batch_size": 8, "epochs": 2.0, "save_every": 10},
    "rl": {"tasks": SUMS, "steps": 12, "problems": 2, "group": 4, "max_tokens": 8, "evaluate_every": 4, "evaluate_problems": 4},
    "evaluate": {"problems": 6, "max_tokens": 8, "concurrency": 4, "windows": 8},
}  # fmt: skip
PARTS = {"start": 1e3, "step": 1.0, "validation": 1e5, "sample": 1e7, "checkpoint": 1e9, "finish": 1e11, "memory": 7e8}


def recipe(**sections) -> Recipe:
    """VALUES with changes to sections, or without one: None."""
    values = {**VALUES, **{k: v if v is None else {**VALUES.get(k, {}), **v} for k, v in sections.items()}}
    return parse({k: v for k, v in values.items() if v is not None}, "tiny")


def entry(made: Recipe, stage: str, rates: dict[str, float]) -> Entry:
    return Entry(forecast.KIND[stage], signature(made.config()), forecast.shape(made, stage), rates, "2026-11-27 12:00:00")


def profile(*entries: Entry, **changes) -> Profile:
    values = {"device": "CPU", "processor": processor.name(), "torch": profiles.torch_version(), "threads": processor.threads()}
    values["measured"] = "2026-11-27 12:00:00"
    return Profile(**{**values, "peak_flops": {"float32": 1e11}, "bandwidth": 1e10, "base_memory": 10**8, "entries": entries, **changes})


def test_a_profile_comes_back(tmp_path):
    assert Profile.load(tmp_path) is None
    here = profile(entry(recipe(), "pretrain", PARTS))
    profile(device="GPU", measured="2026-11-26 12:00:00").save(tmp_path)
    here.save(tmp_path)
    assert Profile.load(tmp_path) == Profile.load(tmp_path, "CPU") == here  # the newest
    assert Profile.load(tmp_path, "GPU").device == "GPU"
    again = here.add(entry(recipe(), "pretrain", {**PARTS, "step": 2.0}), entry(recipe(), "rl", {}))
    assert [e.kind for e in again.entries] == ["train", "rl"] and again.entries[0].rates["step"] == 2.0  # in place of the old one
    (tmp_path / profiles.FILE).write_text("{}")
    with pytest.raises(ValueError, match="not a calibration of this version"):
        Profile.load(tmp_path)


@pytest.mark.parametrize("changes", [{"torch": "1.0"}, {"processor": "another"}])
def test_a_profile_of_another_machine_is_not_used(tmp_path, changes):
    old = profile(**changes)
    old.save(tmp_path)
    assert Profile.load(tmp_path) is None and next(iter(changes.values())) in old.stale()


def test_a_profile_of_other_threads_is_not_used(tmp_path, monkeypatch):
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    profile(device="CPU AMD, 1 threads").save(tmp_path)
    assert Profile.load(tmp_path).threads == 1 and not profiles.refused(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "2,1")  # by level of nesting, of which torch has one
    assert Profile.load(tmp_path) is None and "OMP_NUM_THREADS=1, here is OMP_NUM_THREADS=2" in profiles.refused(tmp_path)
    assert Profile.load(tmp_path, "CPU AMD, 1 threads") is not None  # a run knows what it computes with
    path = tmp_path / "tiny.toml"
    path.write_text(recipe().to_toml())
    assert "here is OMP_NUM_THREADS=2" in make_plan(str(path), [], Options(on="here", root=tmp_path)).stages[1].basis
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert Profile.load(tmp_path) is None
    profile(device="CPU AMD, 2 threads").save(tmp_path)
    assert Profile.load(tmp_path).device == "CPU AMD, 2 threads"
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # what torch chose there by itself
    assert Profile.load(tmp_path).device == "CPU AMD, 2 threads"


def test_a_plan_is_found_for_the_same_shape_alone():
    made = recipe()
    known = profile(entry(made, "pretrain", PARTS), entry(made, "rl", {}))
    config = made.config()
    known = known.add(entry(made, "sft", {}), entry(made, "evaluate", {}))
    same = recipe(
        pretrain={"steps": 400, "lr": 1e-2, "save_every": 100},
        rl={"steps": 3, "lr": 1e-5},
        sft={"documents": 30, "epochs": 1.0, "validation_share": 0.2, "lr": 1e-2},
        evaluate={"before_rl": False},
    )
    for stage in ("pretrain", "sft", "rl", "evaluate"):
        assert forecast.measured(same, stage, config, known) is not None
        assert forecast.measured(same, stage, config, None) is None
        assert forecast.measured(same, stage, dataclasses.replace(config, hidden_size=64), known) is None
    for change, words in (
        ({"pretrain": {"batch_size": 8}}, "batch_size 4, not 8"), ({"dtype": "bfloat16"}, "dtype float32, not bfloat16"),
        ({"prepare": {"documents": 200, "tasks": [{"task": "countdown"}]}}, "data.tasks "),
    ):  # fmt: skip
        other = parse({**VALUES, **{k: {**VALUES[k], **v} if isinstance(v, dict) else v for k, v in change.items()}}, "tiny")
        assert forecast.measured(other, "pretrain", config, known) is None
        assert words in forecast.reason(other, "pretrain", config, known)
    for stage, change, words in (
        ("rl", {"rl": {"group": 8}}, "group 4, not 8"), ("sft", {"sft": {"batch_size": 4}}, "batch_size 8, not 4"),
        ("evaluate", {"evaluate": {"problems": 7}}, "problems 6, not 7"),
        ("evaluate", {"pretrain": {"sequence_length": 32}}, "text 64, not 32"),
    ):  # fmt: skip
        other = recipe(**change)
        assert forecast.measured(other, stage, config, known) is None and words in forecast.reason(other, stage, config, known)


def test_signatures_tell_models_apart_and_not_their_tokens():
    config = recipe().config()
    assert signature(config) == signature(dataclasses.replace(config, bos_token_id=3, eos_token_id=(1, 2)))
    assert signature(config) != signature(dataclasses.replace(config, rope_theta=5e5))


@pytest.mark.parametrize(("every", "last", "count"), [(0, True, 1), (0, False, 0), (3, True, 3), (4, True, 3), (4, False, 2)])
def test_how_often_something_comes(every, last, count):
    done = [s for s in range(1, 10) if (every and s % every == 0) or (last and s == 9)]
    assert forecast.times(every, 9, last=last) == len(done) == count


def test_a_plan_of_pretraining_is_the_sum_of_its_parts():
    made = recipe()
    plan = forecast.forecast(made, "pretrain", made.config(), entry(made, "pretrain", PARTS))
    # 25 steps; validations at 0, 10, 20, 25; samples at 5, 10, .. 25; checkpoints at 7, 14, 21, 25
    assert plan.seconds == 1e3 + 25 + 4e5 + 5e7 + 4e9 + 1e11 == plan.money  # at a dollar a second
    assert plan.memory == 7e8 and plan.tokens == 25 * 4 * 64
    assert plan.flops == plan.tokens * train_flops(made.config(), 64)


RL = {**PARTS, "rollout": 1.0, "grading": 0.25, "training": 0.5, "update": 0.125, "held_out": 1e5}
RL |= {"groups": 14.0, "silent": 3.0, "prompt": 6.0, "answer": 4.0, "drawn": 16.0, "read": 6.0, "trained": 20.0, "memory": 5e8}


def test_a_plan_of_reinforcement_learning_is_the_sum_of_its_parts():
    made = recipe(rl={"sample_every": 5, "save_every": 0})
    plan = forecast.forecast(made, "rl", made.config(), entry(made, "rl", RL))
    # 12 steps of two groups, of which (3 + 1) / (14 + 2) agree, both in a sixteenth of the steps
    steps = 12 * (2 * 1.25 + 1.5 * 0.5 + 15 / 16 * 0.125)
    # measured at 0, 4, 8, 12; samples at 5, 10, 12; one checkpoint
    assert plan.seconds == steps + 1e3 + 4e5 + 3e7 + 1e9 + 1e11
    assert plan.tokens == 12 * 32 and plan.memory == 5e8
    sampled, trained = 22 * forward_flops(made.config(), 5.0), 20 * train_flops(made.config(), 10.0)
    assert plan.flops == pytest.approx(12 * (2 * sampled + 1.5 * trained))
    silent = recipe(rl={"sample_every": 0, "save_every": 0, "evaluate_every": 0})
    assert forecast.forecast(silent, "rl", made.config(), entry(silent, "rl", RL)).seconds == steps + 1e3 + 1e9 + 1e11


def test_groups_that_agree_are_left_out_or_replaced():
    made = recipe()
    assert forecast.silent_share({"groups": 0.0, "silent": 0.0}) == 0.5 and forecast.silent_share(RL) == 0.25
    assert forecast.group_counts(made.rl, 0.25) == (2, 1.5, 15 / 16)
    refilled = recipe(rl={"no_signal": "refill", "refill_rounds": 3})
    # 2 groups, half a one for those that agreed, an eighth for those of these
    assert forecast.group_counts(refilled.rl, 0.25) == (2.625, 2.625 * 0.75, 1 - 0.25**6)
    assert forecast.group_counts(recipe(rl={"kl_weight": 0.1}).rl, 0.25) == (2, 2, 1.0)  # the pull to the reference needs no signal
    words = forecast.drift(made, "rl", entry(made, "rl", RL))
    assert "25% of groups agree and are not trained on (3 of 14 did), answers of 4 tokens" in words
    assert "are replaced" in forecast.drift(refilled, "rl", entry(refilled, "rl", RL))


def test_how_groups_fall_out_as_planned():
    """Rounds of problems that agree by chance, against what is expected of them."""
    made, random = recipe(rl={"no_signal": "refill", "refill_rounds": 3, "problems": 4}).rl, Random(0)
    sampled = kept = trains = 0
    for _ in range(20_000):
        got = 0
        for _ in range(3):
            fresh = [random.random() >= 0.4 for _ in range(4 - got)]
            sampled, got = sampled + len(fresh), got + sum(fresh)
        kept, trains = kept + got, trains + (got > 0)
    seen = [n / 20_000 for n in (sampled, kept, trains)]
    assert seen == pytest.approx(forecast.group_counts(made, 0.4), rel=0.01)


def test_steps_that_warm_up_are_paid_once():
    times = [9.0, 5.0, 3.0, 2.0, 2.5, 1.5, 2.0, 2.0]
    step, warm = probe.steady(times)
    assert (step, warm) == (2.0, 11.0) and warm + len(times) * step == sum(times)  # so many steps are planned as they were
    assert probe.steady([3.0, 1.0]) == (1.0, 2.0)


@pytest.mark.parametrize(("pace", "count"), [(0.5, 50), (1.0, 25), (1.25, 24), (3.0, 15), (20.0, 3), (50.0, 2)])
def test_steps_are_measured_until_memory_has_grown_or_a_minute_is_near(pace, count, monkeypatch):
    monkeypatch.setattr(probe.Clock, "lap", lambda self: pace)
    taken = []
    probe._steps(taken.append, torch.device("cpu"))
    assert taken == list(range(count))


def test_seconds_of_an_update_are_a_line_in_its_tokens():
    found = probe.updates([(10, 9.0), (10, 3.0), (50, 7.0)])
    assert (found.token, found.fixed, found.warm) == pytest.approx((0.1, 2.0, 6.0))
    for many in ((10, 2.0), (50, 1.0), (50, 20.0)):  # as many tokens; no longer for more; more than in proportion
        found = probe.updates([(10, 3.0), (10, 2.0), many])
        assert found.fixed == 0.0 and found.token == pytest.approx((2.0 + many[1]) / (10 + many[0])) and found.warm == 1.0


def test_a_plan_of_fine_tuning_is_the_sum_of_its_parts():
    rates = {**PARTS, "tokenise": 1e13, "validation": 1e4, "kept": 0.8, "length": 30.0, "documents": 1000.0}
    made = recipe()
    plan = forecast.forecast(made, "sft", made.config(), entry(made, "sft", rates))
    # of 100 problems 80 have something to learn, and 5 more are held out: 20 steps of 8, 10 an epoch; loss at 0, 10, 20; saved at 10, 20
    assert plan.seconds == 1e3 + 105e13 + 20 + 3 * 5 * 1e4 + 2e7 + 2e9 + 1e11 and plan.tokens == 20 * 8 * 30
    assert plan.flops == plan.tokens * train_flops(made.config(), 30)
    text = recipe(sft={"tasks": (), "sources": ["chats.jsonl"], "documents": 0, "save_every": 0, "evaluate_every": 50})
    plan = forecast.forecast(text, "sft", made.config(), entry(text, "sft", rates))
    # of 1,000 chats 800 have something to learn, of which 40 are held out: 190 steps; loss at 0, 50, 100, 150, 190
    assert plan.seconds == 1e3 + 1000e13 + 190 + 5 * 40 * 1e4 + 2e7 + 1e9 + 1e11


def test_a_plan_of_an_evaluation_is_the_sum_of_its_parts():
    rates = {"start": 1.0, "answers": 10.0, "grading": 100.0, "text": 1e3, "memory": 5e8, "untrained": 1.0}
    rates |= {"drawn": 48.0, "read": 60.0, "prompt": 10.0, "answer": 8.0}
    made, once = recipe(), recipe(evaluate={"before_rl": False})
    plan, single = (forecast.forecast(r, "evaluate", r.config(), entry(r, "evaluate", rates)) for r in (made, once))
    assert single.seconds == 1111 and single.tokens == 48 and plan.seconds == 1222 and plan.tokens == 96 and plan.memory == 5e8
    assert plan.flops - single.flops == single.flops - forecast.text_flops(made, made.config())  # text is read once
    assert "answers of 8 tokens" in forecast.drift(made, "evaluate", entry(made, "evaluate", rates))
    assert not forecast.drift(made, "evaluate", entry(made, "evaluate", rates | {"untrained": 0.0}))


def test_a_plan_of_serving_goes_in_waves_and_fills_the_cache():
    config = recipe().config()
    per_token = 2 * 2 * 2 * 16 * 4  # layers, keys and values, heads, width, bytes
    rates = {"start": 10.0, "wave": 3.0, "requests": 4.0, "memory": 1e8, "cache": 20.0 * 30 * per_token, "scalar": 4.0}
    made = Entry("serve", signature(config), {"prompt": 20, "output": 10, "clients": 4}, rates, "")
    plan = forecast.serving(config, made, 9, 7200.0)
    assert plan.seconds == 10 + 3 * 3 and plan.money == 2 * plan.seconds and plan.tokens == 90
    assert plan.memory == 1e8 + 5 * 30 * per_token
    assert forecast.serving(config, made, 1000, 0.0).memory == 1e8 + 16 * 30 * per_token  # the whole cache, and no more
    with pytest.raises(ValueError, match="clients: 65 are more"):
        serve_arguments(Traffic(65, 1, 1), "bf16", "bfloat16", 1.0)


def test_a_peak_is_counted_from_when_it_was_forgotten():
    here = torch.device("cpu")
    if not device.RESET.exists():
        pytest.skip("only Linux counts anew")
    before = device.peak_memory(here)
    block = bytearray(2**27)
    high = device.peak_memory(here)
    del block
    assert device.forget_peak(here)
    assert high >= 2**27 and device.peak_memory(here) < high - 2**26 and before <= high


def test_what_earlier_stages_left_is_added_to_the_memory_of_the_next(tmp_path, monkeypatch):
    held = iter([300, 450, 450, 290])  # resident at the beginning of each stage
    monkeypatch.setattr(device, "forget_peak", lambda where: True)
    monkeypatch.setattr(device, "peak_memory", lambda where: next(held))
    carried = {}
    for stage in life.STAGES:
        monkeypatch.setitem(life.STAGES, stage, lambda run, recipe, interrupt, stage=stage: carried.update({stage: run.carried}))
    for name in ("look_ahead", "_needs", "show_moments", "show_results"):
        monkeypatch.setattr(life, name, lambda *a: None)
    monkeypatch.setattr(life, "write_report", lambda folder: folder)
    made = recipe(rl=None)
    path = tmp_path / "tiny.toml"
    path.write_text(made.to_toml())
    life.live(str(path), [], tmp_path)
    assert carried == {"prepare": 0, "pretrain": 150, "sft": 150, "evaluate": 0}
    plans = [forecast.forecast(made, "pretrain", made.config(), entry(made, "pretrain", PARTS), n) for n in (0, 150)]
    assert plans[1].memory - plans[0].memory == 150 and plans[1].seconds == plans[0].seconds


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return calibrate.some_text(recipe(), tmp_path_factory.mktemp("text"))


@pytest.fixture
def quick(monkeypatch):
    for where, name, value in (
        (probe, "SECONDS", 0.0), (probe, "STEPS", 3), (pace, "DECODED", 0.0), (pace, "BATCHES", (1, 4)), (pace, "READ", 16)
    ):  # fmt: skip
        monkeypatch.setattr(where, name, value)
    monkeypatch.setattr(device, "measure_peak", lambda where, dtype: 1e11)


@pytest.mark.parametrize("stage", ["pretrain", "sft", "evaluate"])
def test_a_stage_is_measured_before_its_model_is_there(stage, prepared, tmp_path, quick):
    made = recipe(rl=None)
    found = probe.measure(made.to_toml(), stage, None, prepared, tmp_path)
    assert (found.kind, found.model, found.shape) == (forecast.KIND[stage], signature(made.config()), forecast.shape(made, stage))
    assert all(rate > 0 for rate in found.rates.values()) and not list(tmp_path.iterdir())  # nothing is left behind
    json.dumps(dataclasses.asdict(found))
    plan = forecast.forecast(made, stage, made.config(), found)
    assert plan.memory == found.rates["memory"] > 10**8 and plan.seconds > found.rates["start"]
    if stage == "evaluate":  # two of its six problems are counted, not asked
        assert plan.tokens == 6 * 4 and found.rates["answer"] == 4 and found.rates["untrained"]
    if stage == "sft":
        assert plan.tokens == pytest.approx(25 * 8 * found.rates["length"], abs=1)  # a hundred twice, eight at a time


@pytest.mark.parametrize("documents", [3, 20])
def test_fine_tuning_of_fewer_steps_than_are_measured(documents, prepared, tmp_path, quick):
    made = recipe(rl=None, sft={"documents": documents, "epochs": 1.0})  # one step and two and a half; three are measured
    assert probe.measure(made.to_toml(), "sft", None, prepared, tmp_path).rates["step"] > 0


def test_adapters_are_merged_as_at_the_end_of_the_stage(prepared, tmp_path, quick, monkeypatch):
    seen, merge = [], probe.merge
    monkeypatch.setattr(probe, "merge", lambda model: seen.append(model) or merge(model))
    probe.measure(recipe(rl=None, sft={"lora": {"rank": 2}}).to_toml(), "sft", None, prepared, tmp_path)
    assert len(seen) == 1 and not list(adapters(seen[0]))


@pytest.mark.parametrize("rewards", [[{"part": "correct"}], [{"part": "language"}]])
def test_groups_that_agree_are_counted_in_the_runs_own_problems(rewards, prepared, tmp_path, quick, monkeypatch):
    monkeypatch.setattr(probe, "MOST", 1e9)
    monkeypatch.setattr(probe, "GROUPS", 10)
    made = recipe(rl={"rewards": rewards, "evaluate_every": 0, "sample_every": 0, "max_tokens": 12})
    files = companions(prepared / "tokenizer")
    save_model(probe.open_model(made, None, prepared, torch.device("cpu")), tmp_path / "model", companions=files)
    harvests, updates = [], []
    collect, learn = probe.Classroom.collect, probe.learn
    monkeypatch.setattr(probe.Classroom, "collect", lambda *a: harvests.append((a[1], collect(*a))) or harvests[-1][1])
    monkeypatch.setattr(probe, "learn", lambda *a: updates.append((len(a[1].groups), a[4])) or learn(*a))
    found = probe.measure(made.to_toml(), "rl", tmp_path / "model", prepared, tmp_path)
    rates = found.rates
    assert [step for step, _ in harvests] == [0, 1, 2, 3, 4] and rates["groups"] == 10  # steps of the run, of two problems each
    assert updates == [(1, 0.0), (1, 0.0), (2, 0.0)]  # which teach it nothing
    silent = sum(len(set(group.rewards)) == 1 for _, harvest in harvests for group in harvest.groups)
    assert rates["silent"] == silent and (silent < 10 if rewards[0]["part"] == "language" else silent == 10)  # new weights are never right
    tokens = [t.drawn for _, harvest in harvests for group in harvest.groups for t in group.trajectories]
    plan = forecast.forecast(made, "rl", made.config(), found)
    assert plan.tokens == pytest.approx(12 * 2 * 4 * sum(tokens) / len(tokens), abs=1)
    monkeypatch.setattr(probe, "GROUPS", 64)
    few = recipe(rl={"rewards": rewards, "evaluate_every": 0, "steps": 2, "warmup_steps": 0})
    harvests.clear()
    probe.measure(few.to_toml(), "rl", tmp_path / "model", prepared, tmp_path)
    assert len(harvests) == 2  # a run of two steps has no third


def test_a_served_plan_stands_on_what_was_measured(prepared, tmp_path, quick):
    made = recipe(rl=None)
    path = tmp_path / "tiny.toml"
    path.write_text(made.to_toml())
    found = pace.measure_engine(made.to_toml(), None, prepared, "bf16", 16, tmp_path)
    assert [(e.kind, e.shape.get("batch")) for e in found] == [("prefill", None), ("decode", 1), ("decode", 4)]
    seconds = {e.shape.get("batch"): e.rates["seconds"] for e in found}
    options = Options(on="here", serve="here", root=tmp_path, prompt=16, cached=0, output=8, slowest=1.0)
    before = make_plan(str(path), [], options)
    assert not before.serving.quote.measured and "defaults" in before.serving_basis
    profile(*found).save(tmp_path)
    quote = (after := make_plan(str(path), [], options)).serving.quote
    assert quote.measured and after.serving_basis.endswith(f"measured on this device, {found[-1].measured}")
    on = after.serving.cluster.device
    deployment = Deployment(made.config(), on).calibrated(Profile.load(tmp_path))
    for e in found[1:]:
        assert deployment.decode(e.shape["batch"], e.shape["context"]).seconds == pytest.approx(seconds[e.shape["batch"]])
    assert 16 / quote.prefill_tokens_per_second == pytest.approx(seconds[None], rel=0.2)  # of a whole chunk: the weights are read once
    other = make_plan(str(path), [], dataclasses.replace(options, weights="int8"))
    assert "measured with weights bf16, not int8" in other.serving_basis


def test_a_calibration_that_is_stopped_changes_nothing(tmp_path, monkeypatch):
    profile(entry(recipe(), "pretrain", PARTS)).save(tmp_path)
    before = (tmp_path / profiles.FILE).read_bytes()

    def stop(console, what, function, *arguments):
        if function is calibrate.measure:
            raise KeyboardInterrupt
        return {}

    monkeypatch.setattr(calibrate, "some_text", lambda recipe, aside: aside)

    monkeypatch.setattr(calibrate, "_apart", stop)
    with pytest.raises(KeyboardInterrupt):
        calibrate.calibrate(recipe(), tmp_path, Console(quiet=True))
    assert (tmp_path / profiles.FILE).read_bytes() == before


@pytest.mark.slow
def test_a_run_takes_what_calibration_said(tmp_path):
    """On a busy machine plans are off: the bounds are loose, and hold that nothing is left out or counted twice."""
    path = tmp_path / "tiny.toml"
    path.write_text(recipe(rl=None, pretrain={"steps": 200}, sft={"documents": 800}, evaluate={"problems": 64, "windows": 64}).to_toml())
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for words in (["plan", path, "--calibrate"], ["run", path]):
        command = [sys.executable, "-m", "jevons.cli", *words, "--runs", tmp_path]
        subprocess.run(command, check=True, env=environment, timeout=600)
    ledger = Ledger(tmp_path / "ledger.db")
    receipts = {row.stage: row for row in ledger.rows()}
    ledger.close()
    for stage in ("pretrain", "sft", "evaluate"):
        receipt = receipts[stage]
        assert receipt.planned is not None and receipt.memory is not None, stage
        least = 0.1 if stage == "evaluate" else 1 / 3  # a second of work
        assert least < receipt.seconds / receipt.planned.seconds < 3, stage
        # answers may end earlier than assumed; of so small a model memory is the process's own, and what earlier stages left in it
        assert receipt.tokens <= 2 * receipt.planned.tokens if stage == "evaluate" else receipt.tokens == receipt.planned.tokens
        assert receipt.planned.flops == pytest.approx(receipt.flops, rel=0.5 if stage == "evaluate" else 1e-3)
        assert abs(receipt.memory / receipt.planned.memory - 1) < (0.15 if stage == "pretrain" else 0.4)
