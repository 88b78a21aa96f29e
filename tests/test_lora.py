"""Low-rank adapters: without training they change nothing, merged they compute the same, and peft understands ours as we do peft's.

peft over transformers' models is the oracle. Dense models, mixtures and latent attention; all in fp32 on tiny models.
"""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from jevons.data.batch import pack
from jevons.engine.engine import Engine
from jevons.engine.sequence import SamplingParams
from jevons.model.attend import Packed
from jevons.model.folder import disk_tensors, load_model, save_model
from jevons.model.moe import Experts
from jevons.train import lora
from jevons.train.loss import next_token
from jevons.train.trainer import Trainer

FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe", "deepseek_v2", "deepseek_v3")
SIZES = {"rank": 4, "alpha": 8.0}  # rows of 16 bytes, so experts take the grouped path
TOKENS = torch.arange(40) * 7 % 90 + 3
DOCUMENTS = [(TOKENS[:25].tolist(), None), (TOKENS[25:].tolist(), None)]


def forward(model, tokens_T=TOKENS):
    positions_T = torch.arange(len(tokens_T))
    return model.logits(model(tokens_T, positions_T, Packed(torch.tensor([0, len(tokens_T)], dtype=torch.int32))).hidden_TD)


def adapted(model, seed=1, **options):
    """`model` with adapters that matter: B is random too."""
    lora.add_lora(model, **(SIZES | options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, adapter in lora.adapters(model):
            for _, _, b_DR in adapter.tensors():
                b_DR.copy_(torch.randn(b_DR.shape, generator=generator) * 0.05)
    return model


@pytest.fixture
def peft_(tmp_path):
    """`peft_(model, adapter)`: the model's logits by peft, which reads both from folders."""
    import peft
    import transformers

    def load(model_folder):
        return transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32, attn_implementation="eager")

    def logits(model_folder, adapter_folder):
        with_adapter = peft.PeftModel.from_pretrained(load(model_folder), adapter_folder)
        names = {n.replace(".default", "") for n, _ in with_adapter.named_parameters() if "lora_" in n}
        with torch.no_grad():
            return with_adapter(TOKENS[None]).logits[0], names

    logits.load = load
    return logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_adapter_changes_nothing_and_all_else_is_frozen(tiny_model, family):
    model, plain = tiny_model(family), tiny_model(family)
    lora.add_lora(model, **SIZES)
    assert torch.equal(forward(model), forward(plain))
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} <= {
        *("lora_A", "lora_B", "gate_up_A", "gate_up_B", "down_A", "down_B")
    }
    assert all(a.abs().max() > 0 and b.abs().max() == 0 for _, adapter in lora.adapters(model) for _, a, b in adapter.tensors())


@pytest.mark.parametrize("rank", [4, 3])  # 3: no whole 16 bytes, so experts are computed with their sums
@pytest.mark.parametrize("family", FAMILIES)
def test_merged_is_the_same(tiny_model, assert_close, family, rank):
    model = adapted(tiny_model(family), rank=rank)
    before, plain = forward(model), forward(tiny_model(family))
    assert (before - plain).abs().max() > 0.01 * plain.abs().max()
    names = {name for name, _ in tiny_model(family).named_parameters()}
    lora.merge(model)
    assert_close(forward(model), before)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == names and not lora.adapters(model)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_experts_have_the_gradient_of_their_sum(tiny_model, assert_close, family):
    grouped, summed = adapted(tiny_model(family)), adapted(tiny_model(family))
    for _, adapter in lora.adapters(summed):
        if isinstance(adapter, lora.LoraExperts):
            adapter.forward = lambda x, r, a=adapter: Experts.forward(a, x, r)
    for model in (grouped, summed):
        forward(model).square().sum().backward()
    theirs = dict(summed.named_parameters())
    checked = 0
    for name, parameter in grouped.named_parameters():
        if parameter.requires_grad:
            assert_close(parameter.grad, theirs[name].grad, 2e-5, message=name)
            checked += "gate_up_" in name or "down_" in name
        else:
            assert parameter.grad is None
    assert checked >= 8


def test_targets(tiny_model):
    def paths(**options):
        model = tiny_model("deepseek_v3")
        lora.add_lora(model, **SIZES, **options)
        return {path.removeprefix("model.layers.") for path, _ in lora.adapters(model)}

    attention = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
    assert paths(targets=("attention",)) == {f"{i}.self_attn.{name}" for i in range(3) for name in attention}
    assert paths(targets=("experts",)) == {"1.mlp.experts", "2.mlp.experts"}
    shared = {f"{i}.mlp.shared_experts.{name}" for i in (1, 2) for name in lora.PROJECTIONS}
    assert paths(targets=("mlp",)) == shared | {f"0.mlp.{name}" for name in lora.PROJECTIONS}
    with pytest.raises(ValueError, match="this model has no experts"):
        lora.add_lora(tiny_model("llama"), **SIZES, targets=("experts",))
    with pytest.raises(ValueError, match="unknown 'router'; known: attention"):
        lora.add_lora(tiny_model("llama"), **SIZES, targets=("router",))


def test_multi_token_prediction_is_left_alone(tiny_model):
    model = tiny_model("deepseek_v3", num_nextn_predict_layers=1)
    lora.add_lora(model, **SIZES)
    assert not [path for path, _ in lora.adapters(model) if path.startswith("model.layers.3.")]


def test_rank_stabilised(tiny_model, assert_close):
    plain = adapted(tiny_model("llama"), alpha=8.0 / math.sqrt(4))
    assert_close(forward(adapted(tiny_model("llama"), rslora=True, alpha=2.0)), forward(plain))


@pytest.mark.parametrize("family", ["qwen2", "deepseek_v3"])
def test_training_moves_adapters_alone(tiny_model, family):
    model = tiny_model(family)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    lora.add_lora(model, **SIZES)
    trainer = Trainer(model, bias_speed=0.0, weight_decay=0.1)
    losses = []
    for _ in range(8):
        losses.append(trainer.forward_backward([pack(DOCUMENTS)], next_token).loss)
        trainer.step(1e-2)
    assert losses[-1] < 0.97 * losses[0]
    for path, adapter in lora.adapters(model):
        kept = dict(adapter.base.named_parameters()) | dict(adapter.base.named_buffers())
        assert all(torch.equal(tensor, before[f"{path}.{name}"]) for name, tensor in kept.items())
        assert any(b.abs().max() > 0 for _, _, b in adapter.tensors()), path
    left = {name for name in before if not any(name.startswith(path + ".") for path, _ in lora.adapters(model))}
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in left)


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe", "deepseek_v3"])
def test_the_sampler_takes_the_adapters(tiny_model, assert_close, family):
    """The latent's expansion, which decoding absorbs, is read as a weight: it must be the adapted one."""
    samples = []
    for model in (adapted(tiny_model(family)), adapted(tiny_model(family)), tiny_model(family)):
        if not samples:
            lora.merge(model)
        params = SamplingParams(max_tokens=12, min_tokens=12, temperature=0)
        samples += Engine(model, num_blocks=32).generate([TOKENS[:20].tolist()], params)
    merged, with_adapters, plain = samples
    assert merged.tokens == with_adapters.tokens and len(merged.tokens) == 12
    assert_close(torch.tensor(with_adapters.raw_logps), torch.tensor(merged.raw_logps))
    assert abs(plain.raw_logps[0] - merged.raw_logps[0]) > 0.01


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::FutureWarning")  # peft's own, of what it fuses
@pytest.mark.parametrize("targets", [lora.TARGETS, ("attention",), ("mlp",), ("experts",)], ids=lambda t: "+".join(t))
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_reads_ours(tiny_model, assert_close, peft_, tmp_path, family, targets):
    if targets == ("experts",) and family not in lora.STACKED:
        pytest.skip("dense")
    if targets == ("mlp",) and family == "qwen3_moe":
        pytest.skip("all its layers are mixtures without shared experts")
    model = tiny_model(family)
    save_model(model, tmp_path / "model")
    adapted(model, targets=targets)
    lora.save_adapter(model, tmp_path / "adapter", base="somewhere/model")
    theirs, names = peft_(tmp_path / "model", tmp_path / "adapter")
    assert_close(theirs, forward(model), 2e-5)
    if not any("experts.base_layer" in name for name in names):  # then peft gives its own names to experts
        assert names == load_file(tmp_path / "adapter/adapter_model.safetensors").keys()
    fields = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (fields["r"], fields["lora_alpha"], fields["base_model_name_or_path"]) == (4, 8.0, "somewhere/model")


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe", "deepseek_v3"])
def test_ours_reads_pefts(tiny_model, assert_close, peft_, tmp_path, family):
    import peft

    save_model(tiny_model(family), tmp_path / "model")
    theirs = peft_.load(tmp_path / "model")
    attention = ["q_a_proj", "kv_b_proj", "o_proj"] if family == "deepseek_v3" else ["q_proj", "v_proj", "o_proj"]
    options = {"target_modules": [*attention, "gate_proj", "down_proj"]}
    if family in lora.STACKED:
        stacked = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        shared = [f"shared_experts.{name}.weight" for name in lora.PROJECTIONS] if family == "deepseek_v3" else []
        options = {"target_modules": attention, "target_parameters": stacked + shared}
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=8, use_rslora=True, init_lora_weights=False, **options)
    theirs = peft.get_peft_model(theirs, config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.mul_(0.3)
        expected = theirs(TOKENS[None]).logits[0]
    theirs.save_pretrained(tmp_path / "adapter")
    model = load_model(tmp_path / "model", dtype=torch.float32)
    lora.load_adapter(model, tmp_path / "adapter")
    assert_close(forward(model), expected, 2e-5)
    lora.save_adapter(model, tmp_path / "again")
    assert_close(peft_(tmp_path / "model", tmp_path / "again")[0], expected, 2e-5)


@pytest.mark.parametrize("family", ["qwen2", "deepseek_v3"])
def test_a_round_trip_is_exact(tiny_model, tmp_path, family):
    model = adapted(tiny_model(family))
    lora.save_adapter(model, tmp_path / "adapter")
    again = tiny_model(family)
    lora.load_adapter(again, tmp_path / "adapter")
    assert torch.equal(forward(again), forward(model))
    ours, theirs = dict(model.named_parameters()), dict(again.named_parameters())
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_merging_rounds_once(tiny_model):
    """In bf16 the sum is made in fp32: a merged weight is the nearest to the true one."""
    model = adapted(tiny_model("qwen3_moe")).bfloat16()
    exact = {}
    for path, adapter in lora.adapters(model):
        for below, a, b in adapter.tensors():
            exact[f"{path}{below}.weight"] = b.float() @ a.float() * 2.0
    base = {name: tensor.float() for name, tensor in disk_tensors(tiny_model("qwen3_moe").bfloat16())}
    lora.merge(model)
    for name, tensor in disk_tensors(model):
        assert torch.equal(tensor, (base[name] + exact.get(name, 0)).bfloat16()), name


def test_what_does_not_fit_is_named(tiny_model, tmp_path):
    model = adapted(tiny_model("deepseek_v3"))
    folder = tmp_path / "adapter"
    lora.save_adapter(model, folder)
    file = folder / "adapter_config.json"
    good = json.loads(file.read_text())

    def refuses(message, model=None, **changes):
        file.write_text(json.dumps(good | changes))
        model = model or tiny_model("deepseek_v3")
        with pytest.raises(ValueError, match=message):
            lora.load_adapter(model, folder)
        assert not lora.adapters(model)

    refuses("peft_type 'IA3' is not supported", peft_type="IA3")
    refuses("use_dora is not supported; merge", use_dora=True)
    refuses("rank_pattern is not supported", rank_pattern={"q_proj": 8})
    refuses("bias 'all'", bias="all")
    refuses("wrongly shaped for rank 8", r=8)
    refuses("the model has no model.layers.0.self_attn.kv_a_proj_with_mqa", tiny_model("llama"))
    refuses("the model has no model.layers.2", tiny_model("deepseek_v3", num_hidden_layers=2))
    (folder / "adapter_model.safetensors").unlink()
    refuses("adapter_model.safetensors: missing")
    file.unlink()
    with pytest.raises(ValueError, match=r"adapter_config\.json: missing"):
        lora.load_adapter(tiny_model("deepseek_v3"), folder)
