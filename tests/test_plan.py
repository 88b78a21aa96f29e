"""The planner: hardware by name, DeepSeek-V3's hours from its arithmetic, clear refusals."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import pytest
import tomli_w
import torch
from typer.testing import CliRunner

from jevons.cli import app
from jevons.cost.arithmetic import parameters, train_flops
from jevons.cost.hardware import Hardware, parse_cluster
from jevons.cost.memory import adapter_parameters, layer_activations, training_memory
from jevons.cost.published import published
from jevons.cost.training import adapter_flops, training_hours
from jevons.model.attend import Packed
from jevons.model.config import ModelConfig
from jevons.model.transformer import Transformer
from jevons.recipe import built_in, load
from jevons.stages.plan import Options, make_plan
from jevons.stages.pretrain import make_model
from jevons.train.lora import LoraExperts, adapters, add_lora

HARDWARE = Hardware.load()


@pytest.mark.parametrize(
    "text, name, count",
    [("8xH100", "H100", 8), ("h100", "H100", 1), ("2048 x H800", "H800", 2048), ("2xRTX4090", "RTX 4090", 2), ("4090", "RTX 4090", 1)],
)
def test_devices_as_people_write_them(text, name, count):
    cluster = parse_cluster(text, HARDWARE)
    assert (cluster.device.name, cluster.count) == (name, count)


@pytest.mark.parametrize(
    "text, said",
    [("8xH10", "did you mean H100?"), ("H100x8", "number first"), ("0xH100", "at least one"), ("", "8xH100"), ("Ascend 910", "are B200")],
)
def test_devices_that_are_none(text, said):
    with pytest.raises(ValueError, match=said.replace("?", r"\?")):
        parse_cluster(text, HARDWARE)


def test_own_devices_by_date(tmp_path):
    own = tmp_path / "own.toml"
    entry = 'name = "H100"\nmemory = 80\nbandwidth = 3350\nbf16 = 989.5\nsource = "contract"\n'
    now, later = (f"[[device]]\n{entry}on_demand = {p}\nvalid_from = {day}\n" for p, day in ((1.75, "2026-11-20"), (1, "2027-01-01")))
    own.write_text(now + later)
    assert Hardware.load(own, date(2026, 11, 27)).device("H100").on_demand == 1.75
    assert Hardware.load(own, date(2027, 2, 1)).device("H100").on_demand == 1
    own.write_text("[[device]]\nname = 'X'\n")
    with pytest.raises(ValueError, match=r"own.toml:\n  device.0.memory: Field required"):
        Hardware.load(own)


def test_the_hours_of_deepseek_v3():
    # arXiv 2412.19437, table 1: 2,664K H800-hours of pretraining, 2,788K in all, $5.576M at $2
    plan = make_plan("deepseek-v3", [], Options(on="2048xH800"))
    prepare, stage = plan.stages
    assert stage.device_hours == pytest.approx(2.664e6, rel=0.005)
    total = stage.device_hours + sum(a.device_hours for a in plan.additions)
    assert total == pytest.approx(2.788e6, rel=0.005)
    assert total * plan.on.device.on_demand == pytest.approx(5.576e6, rel=0.005)
    assert plan.total() == pytest.approx(total * 2 + prepare.money()) and prepare.money() < 1000
    assert not plan.shortages
    assert stage.seconds / 86400 / 14.8 == pytest.approx(3.7, rel=0.02)  # days a trillion tokens


def test_the_recipe_is_the_published_model():
    ours, theirs = load("deepseek-v3").config(), published("deepseek-v3")
    aside = ("max_position_embeddings", "rope_scaling", "initializer_range", "rms_norm_eps", "rope_theta", "bos_token_id", "eos_token_id")
    assert all(getattr(ours, name) == getattr(theirs, name) for name in ours.field_names() if name not in aside)


def test_hours_follow_share_and_devices():
    one = training_hours(3.6e18, 1e15, 0.5)
    assert one == pytest.approx(2.0)
    assert training_hours(3.6e18, 1e15, 0.25, 4) == pytest.approx(one / 2)
    with pytest.raises(ValueError, match="share"):
        training_hours(1, 1, 1.5)


BASE = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4, "num_hidden_layers": 3}
LATENT = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
SPARSE = {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1}
MODELS = {
    "qwen2": ModelConfig(model_type="qwen2", num_key_value_heads=2, head_dim=16, **BASE),
    "qwen3": ModelConfig(model_type="qwen3", num_key_value_heads=2, head_dim=32, **BASE),
    "latent": ModelConfig(**BASE, **LATENT),
    "mixture": ModelConfig(**BASE, **LATENT, **SPARSE),
}


def make(config: ModelConfig, rank: int | None) -> Transformer:
    model = Transformer(config)
    model.init_weights(torch.Generator().manual_seed(0))
    if rank:
        add_lora(model, rank=rank, alpha=8.0)
    return model


@pytest.mark.parametrize("rank", [None, 8])
@pytest.mark.parametrize("name", MODELS)
def test_activations_are_what_autograd_saves(name, rank):
    config, length, count = MODELS[name], 256, 4
    model = make(config, rank)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}  # held on to, so that no memory is used twice and counted once

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in weights:
            kept[place] = tensor
        return tensor

    tokens = torch.arange(length * count) * 7 % config.vocab_size
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model(tokens, torch.arange(length).repeat(count), Packed(torch.arange(count + 1) * length)).hidden_TD
    measured = sum(t.untyped_storage().nbytes() for t in kept.values()) / len(hidden)
    counted = sum(layer_activations(config, layer, 4, cpu=True, lora_rank=rank) for layer in range(config.num_hidden_layers))
    counted += config.hidden_size * 4  # the last norm
    # experts' padding depends on how even the router is, and nothing of the first norm is kept where nothing before it is trained
    assert counted == pytest.approx(measured, rel=0.06)


@pytest.mark.parametrize("targets", [("attention",), ("mlp",), ("experts",), ("attention", "mlp", "experts")])
def test_adapters_are_counted(targets):
    config = MODELS["mixture"]
    model = Transformer(config)
    add_lora(model, rank=8, alpha=8.0, targets=targets)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == adapter_parameters(config, 8, targets)
    share = config.num_experts_per_tok / config.n_routed_experts  # of the experts' adapters that a token meets
    counts = [(isinstance(a, LoraExperts), sum(p.numel() for p in a.parameters() if p.requires_grad)) for _, a in adapters(model)]
    sizes = [count * (share if routed else 1) for routed, count in counts]
    frozen = train_flops(config, 100) - 2 * parameters(config).active_without_embedding
    assert adapter_flops(config, 100, 8, targets) == pytest.approx(frozen + 6 * sum(sizes), rel=1e-9)


def test_memory_of_training_by_part():
    config = MODELS["mixture"]
    count = sum(p.numel() for p in Transformer(config).parameters())
    buffers = 2 * config.n_routed_experts
    one, more = (training_memory(config, tokens=512, micro_batches=n) for n in (1, 2))
    assert one.weights == 2 * (count + buffers) and one.gradients == 2 * count and one.moments == 12 * count  # masters and both moments
    assert more.gradients - one.gradients == 4 * count  # sums in fp32
    assert training_memory(config, tokens=512, dtype_bytes=4).moments == 8 * count  # fp32 weights are their own masters
    assert training_memory(config, tokens=1024).activations == 2 * one.activations
    assert training_memory(config, tokens=512, recompute=True).activations < 0.6 * one.activations
    assert training_memory(config, tokens=512, devices=4).moments == one.moments / 4
    lora = training_memory(config, tokens=512, lora_rank=8)
    assert lora.moments == 12 * adapter_parameters(config, 8) and lora.weights - one.weights == 2 * adapter_parameters(config, 8)
    for memory in (one, more, lora):
        assert max(memory.activations + memory.logits, memory.gradients) <= memory.total - memory.weights - memory.moments


# MiB that processes held at most after 24 steps or more on two kinds of AMD EPYC (docs/LOG.md)
HELD = [
    ("text", ["pretrain.batch_size=4", "dtype=bfloat16"], 1269),
    ("text", ["pretrain.batch_size=4", "dtype=float32"], 1105),
    ("text", ["pretrain.batch_size=4", "dtype=float32"], 1173),
    ("text", ["dtype=float32"], 1526),
    ("text", ["dtype=float32"], 1679),
    ("quickstart", ["dtype=bfloat16"], 634),
]


@pytest.mark.parametrize("name, changes, held", HELD)
def test_counted_memory_is_what_processes_held(name, changes, held):
    stage = next(s for s in make_plan(name, changes, Options(on="here")).stages if s.stage == "pretrain")
    assert stage.memory.total / 2**20 == pytest.approx(held, rel=0.1)


QUICK = {"today": date(2026, 11, 27)}


def test_v3_in_fp8_is_refused_on_eight_of_80_gb_and_what_would_do_is_named():
    plan = make_plan("deepseek-v3", [], Options(serve="8xH100", weights="fp8", **QUICK))
    found = plan.serving
    assert found.quote is None and "84.3 GB for weights" in found.problem
    would = {(q.device, q.devices, q.format) for q in found.alternatives}
    assert {("H200", 8, "fp8"), ("H800", 16, "fp8"), ("H100", 16, "fp8"), ("H100", 8, "int4")} <= would
    assert make_plan("deepseek-v3", [], Options(serve="8xH200", weights="fp8", **QUICK)).serving.quote.layout.devices == 8


def test_a_published_model_is_planned_for_serving():
    plan = make_plan("Qwen/Qwen2.5-7B-Instruct", [], Options(on="H100", **QUICK))
    assert plan.stages == () and plan.serving.quote.weights == pytest.approx(2 * 7_615_616_512, rel=1e-3)
    own = plan.comparison.own
    assert own.dollars == pytest.approx(24 * 2.50) and plan.comparison.bills[0].dollars > 0


def test_a_folder_is_read_without_its_weights(tmp_path):
    fields = {"model_type": "qwen2", "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(fields | {"num_attention_heads": 4}))
    assert make_plan(str(tmp_path), [], Options(on="L4", **QUICK)).config.hidden_size == 64
    tuned = make_plan("sft", [f"model.path={tmp_path}", "sft.sources=['nowhere']"], Options(on="L4"))
    assert [s.stage for s in tuned.stages] == ["sft"] and tuned.config.hidden_size == 64


LONG = ["pretrain.sequence_length=16384", "model.max_position_embeddings=16384"]
SHORT = [
    ("nano", ["pretrain.micro_batch_size=128"], "L4", "pretrain.micro_batch_size="),
    ("nano", ["pretrain.micro_batch_size=1", *LONG, "model.num_hidden_layers=40", "model.n_routed_experts=8"], "L4", "pretrain.recompute"),
    ("nano", ["model.num_hidden_layers=100", "pretrain.recompute=true"], "L4", "--on 4xL4"),
    ("sft", ["model.path=qwen2.5-3b", "sft.batch_size=128", "sft.micro_batch_tokens=8192"], "L4", "sft.micro_batch_tokens=2048"),
    ("text", ["pretrain.batch_size=1024"], "RTX 3090", "pretrain.micro_batch_size="),
]


@pytest.mark.parametrize("name, changes, on, change", SHORT)
def test_what_does_not_fit_fits_after_the_smallest_change(name, changes, on, change):
    (short,) = make_plan(name, changes, Options(on=on)).shortages
    assert short.needed > short.room >= short.change.memory and change in short.change.what
    where, _, more = short.change.what.partition("--on ")
    again = make_plan(name, [*changes, *where.split()], Options(on=more or on))
    assert not again.shortages
    stage = next(s for s in again.stages if s.stage == short.stage)
    assert stage.memory.total <= short.room
    if not more:
        assert stage.memory.total == pytest.approx(short.change.memory)


def test_reinforcement_learning_that_does_not_fit():
    tasks = "rl.tasks=[{task='arithmetic'}]"  # instead of reasoning-gym's, which take a second to load
    changes = ["model.path=qwen2.5-1.5b", "rl.max_tokens=1000", tasks]
    (short,) = make_plan("reason", changes, Options(on="L40S")).shortages
    assert short.change.what == "rl.micro_batch_tokens=4096"
    (large,) = make_plan("reason", ["model.path=qwen2.5-7b", tasks], Options(on="L40S")).shortages
    assert large.change.what == "rl.lora.rank=16"


def test_tokens_asked_for():
    assert make_plan("nano", [], Options(target_tokens="10B")).stages[1].tokens == pytest.approx(10e9, rel=1e-4)
    for wrong in ("10Q", "-1", "0", "B"):
        with pytest.raises(ValueError, match="--target-tokens"):
            make_plan("nano", [], Options(target_tokens=wrong))
    with pytest.raises(ValueError, match=r"no \[pretrain\]"):
        make_plan("sft", [], Options(target_tokens="1B"))


def test_money_of_a_machine_without_a_name_is_the_recipes():
    stage = make_plan("text", ["price_per_hour=3"], Options(on="here")).stages[1]
    assert stage.money() == pytest.approx(3 * stage.hours) or stage.on.device.name[:3] != "CPU"
    assert make_plan("text", ["price_per_hour=3"], Options()).stages[1].money() == pytest.approx(3 * stage.hours)
    assert make_plan("text", ["price_per_hour=3"], Options(on="H100")).stages[1].on.device.on_demand == 2.50


def test_a_budget_is_spent():
    plan = make_plan(None, [], Options(budget=500, on="8xH100"))
    assert plan.suggestion.best.hours * 8 * 2.50 == pytest.approx(500)
    with pytest.raises(ValueError, match="--budget"):
        make_plan(None, [], Options(budget=-5, on="8xH100"))


@pytest.mark.parametrize(
    "name, changes, options, said",
    [
        (None, [], {}, "name a recipe or a model"),
        (None, [], {"budget": float("nan")}, "--budget: must be above 0 dollars, is nan"),
        (None, [], {"budget": float("inf")}, "--budget"),
        (None, [], {"budget": 1e-4, "on": "H100"}, r"--budget 0.0001: too little for a model, \$0.0\d+ would do on H100"),
        (None, [], {"budget": 1e30, "on": "H100"}, r"--budget 1e\+30: more than can be planned, up to"),
        (None, [], {"budget": 5, "serve": "H100"}, "--serve: is about a model"),
        (None, [], {"budget": 5, "target_tokens": "1B"}, "--target-tokens: is about a model"),
        (None, [], {"budget": 5, "requests": 7}, "--requests: is about serving, which this plan leaves out; name a model"),
        ("nano", [], {"prompt": 100, "cached": 0}, "--prompt: is about serving, .* add --serve"),
        ("nano", [], {"on": ""}, "--on: devices are written 8xH100"),
        ("nano", ["plan.on=8xHX"], {}, "plan.on: no device 'HX'"),
        ("nano", [], {"serve": "8xH1000"}, "--serve: no device 'H1000'; did you mean H100?"),
        ("nano", [], {"hardware": Path("nowhere.toml")}, "--hardware nowhere.toml: no such file"),
        ("qwen2.5-7b", [], {"prices": Path("nowhere.toml")}, "--prices nowhere.toml: no such file"),
        ("qwen2.5-7b", [], {"share": 0.3}, "--share: is about training"),
        ("qwen2.5-7b", [], {"prompt": 0}, "--prompt: must be at least 1 token"),
        ("qwen2.5-7b", [], {"prompt": 10}, "--cached: must be a part of --prompt 10: give 0 to 9, is 1000"),
        ("qwen2.5-7b", [], {"output": 0}, "--output"),
        ("qwen2.5-7b", [], {"slowest": -1}, "--slowest: must be above 0 seconds, is -1"),
        ("qwen2.5-7b", [], {"requests": float("nan")}, "--requests"),
        ("qwen2.5-7b", [], {"prompt": 40_000}, "the model has 32,768 positions; give --prompt 26214 --cached 13107 --output 6553 or less"),
        ("nanno", [], {}, "did you mean nano?"),
        ("qwen2.5-7b", ["pretrain.steps=4"], {}, "leave pretrain.steps=4 away"),
        ("nano", [], {"share": 1.5}, "--share"),
        ("nano", [], {"on": "8xHX"}, "--on: no device 'HX'"),
        ("qwen2.5-7b", [], {"weights": "int3"}, "--weights: must be one of .*, is 'int3'"),
        ("qwen2.5-7b", [], {"cached": 2000}, "cached"),
        ("qwen2.5-7b", [], {"requests": 0}, "--requests"),
        ("sft", ["sft.documents=0"], {}, "sft.documents"),
        ("sft", ["model.path=nobody/nothing"], {}, "model.path"),
    ],
)
def test_mistakes_are_named(name, changes, options, said):
    with pytest.raises(ValueError, match=said.replace("?", r"\?")):
        make_plan(name, changes, Options(**options))


def test_a_recipe_that_only_prepares(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("word " * 2000)
    recipe = tmp_path / "mine.toml"
    model = tomllib.loads(built_in()["text"].read_text())["model"]
    recipe.write_text(tomli_w.dumps({"name": "mine", "model": model, "prepare": {"sources": [str(text)]}}))
    (stage,) = make_plan(str(recipe), [], Options(on="here")).stages
    assert stage.stage == "prepare" and stage.tokens == 2500 and stage.memory is None


@pytest.mark.parametrize(
    "arguments",
    [["deepseek-v3", "--serve", "8xH800", "--weights", "fp8"], ["quickstart", "--on", "8xH100"], ["qwen2.5-7b", "--on", "H100"]]
    + [["--budget", "500", "--on", "8xH100"], ["nano", "--on", "L4", "pretrain.micro_batch_size=128"]]
    + [["sft", "--budget", "30", "--on", "H100"]],
)
def test_a_plan_is_readable_in_80_columns(arguments, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    result = CliRunner().invoke(app, ["plan", *arguments, "--json", str(tmp_path / "plan.json")])
    assert result.exit_code == 0, result.output
    assert "\N{HORIZONTAL ELLIPSIS}" not in result.output and max(map(len, result.output.splitlines())) <= 80
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["device"]["memory"] and bool(written["stages"]) == (arguments[0] not in ("qwen2.5-7b", "--budget"))


def test_what_has_no_rent_is_planned_in_hours_and_buys_nothing(tmp_path):
    own = tmp_path / "own.toml"
    own.write_text('[[device]]\nname = "Own"\nmemory = 80\nbandwidth = 3350\nbf16 = 989.5\nsource = "here"\nvalid_from = 2026-01-01\n')
    plan = make_plan("nano", [], Options(on="8xOwn", hardware=own))
    assert plan.total() is None and plan.stages[1].device_hours > 1
    with pytest.raises(ValueError, match="--budget 5: no rent is known for Own"):
        make_plan(None, [], Options(on="8xOwn", hardware=own, budget=5))
    served = make_plan("qwen2.5-7b", [], Options(on="Own", hardware=own))
    assert served.serving.quote.price_output is None and served.comparison.own is None and served.comparison.bills


def test_the_usual_request_is_cut_to_the_models_positions():
    request = make_plan("quickstart", [], Options(serve="H100")).request
    assert request.prompt + request.output <= 512 and request.cached == request.prompt // 2
    shown = CliRunner().invoke(app, ["plan", "quickstart", "--serve", "H100"], env={"COLUMNS": "80"}).output
    assert "requests of 409 tokens in (204 cached), 102 out" in shown and "<0.001" in shown  # a price below what is shown is not nothing


def test_a_plan_is_written_or_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["plan", "nano", "--json", "-"])
    assert json.loads(result.stdout)["name"] == "nano" and not list(tmp_path.iterdir())
    for path in (str(tmp_path), "nowhere/plan.json"):
        with pytest.raises(ValueError, match=f"--json {path}: "):
            CliRunner().invoke(app, ["plan", "nano", "--json", path], catch_exceptions=False)


def test_planning_loads_no_torch_and_takes_less_than_a_second():
    code = (
        "import sys, time; start = time.process_time()\n"
        "from jevons.cli import app\n"
        "app(['plan', 'deepseek-v3', '--serve', '8xH800', '--weights', 'fp8', '--budget', '500'], standalone_mode=False)\n"
        "print(f'{time.process_time() - start:.2f} s', file=sys.stderr)\n"
        "assert not {'torch', 'numpy', 'tokenizers', 'transformers', 'sqlalchemy'} & set(sys.modules)\n"
        "assert time.process_time() - start < 2, 'a second, and as much again for a slow machine'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(done.stderr)


def test_a_model_that_no_memory_here_holds_is_refused_before_it_is_made():
    tokenizer = SimpleNamespace(bos_id=0, eos_id=1, pad_id=1)
    with pytest.raises(ValueError, match=r"model: 671,026,404,352 parameters need 2,\d+ GiB, .*`jevons plan deepseek-v3`"):
        make_model(load("deepseek-v3").settle("float32"), tokenizer, torch.device("cpu"))
