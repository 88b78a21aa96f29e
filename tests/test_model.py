"""Model: the same numbers as transformers in every family, the same files in and out, published counts and goldens, clear errors.

Transformers is the oracle here and nowhere in the package; without it the parity tests are skipped and the rest still runs.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy

from jevons.cost.arithmetic import parameters
from jevons.cost.published import published
from jevons.kernels.fp8 import dequantize_blocks, quantize_blocks
from jevons.model.attend import Packed
from jevons.model.config import ModelConfig
from jevons.model.family import from_hf, to_hf
from jevons.model.folder import disk_tensors, load_config, load_model, locate, resolve, save_model
from jevons.model.moe import Router
from jevons.model.rope import inverse_frequencies, softmax_scale
from jevons.model.transformer import Transformer

YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}

# every family, and every switch that its config.json has: name -> (model_type, changes)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "v3": ("deepseek_v3", {}),
    "v3-no-q-lora": ("deepseek_v3", {"q_lora_rank": None}),
    "v3-yarn": ("deepseek_v3", {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}}),
    "v3-half-split-rope": ("deepseek_v3", {"rope_interleave": False}),
    "v3-attention-bias": ("deepseek_v3", {"attention_bias": True}),
    "v3-one-group": ("deepseek_v3", {"n_group": 1, "topk_group": 1, "norm_topk_prob": False}),
    "v3-odd-widths": ("deepseek_v3", {"hidden_size": 36, "moe_intermediate_size": 15, "n_shared_experts": 3}),
    "v2": ("deepseek_v2", {}),
    "v2-yarn": ("deepseek_v2", {"rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}}),
    "v2-lite": ("deepseek_v2", {"q_lora_rank": None, "topk_method": "greedy", "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-yarn": ("qwen2", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}}),
    "qwen3": ("qwen3", {}),
    "qwen3-moe": ("qwen3_moe", {"norm_topk_prob": False}),
    "qwen3-moe-normalised": ("qwen3_moe", {"norm_topk_prob": True, "mlp_only_layers": [0]}),
    "qwen3-moe-every-second": ("qwen3_moe", {"decoder_sparse_step": 2, "num_hidden_layers": 4}),
    "llama": ("llama", {}),
    "llama-tied-biases": ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama3-rope": ("llama", {"rope_theta": 5e5, "rope_scaling": LLAMA3}),
    "llama-linear-rope": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
}


class Case(NamedTuple):
    fields: dict[str, Any]
    config: ModelConfig
    theirs: Any  # transformers' model
    folder: Path  # where transformers saved it


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory, tiny_fields, randomize):
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model_type, changes = CASES[request.param]
    fields = tiny_fields(model_type, **changes)
    theirs_config = transformers.AutoConfig.for_model(**fields)
    theirs = transformers.AutoModelForCausalLM.from_config(theirs_config, dtype=torch.float32, experts_implementation="eager")
    theirs = randomize(theirs).eval()
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    return Case(fields, from_hf(fields), theirs, folder)


def tokens_SL(sequences: int = 2, length: int = 24, vocabulary: int = 97) -> torch.Tensor:
    return torch.randint(vocabulary, (sequences, length), generator=torch.Generator().manual_seed(1))


def forward(model: Transformer, x_SL: torch.Tensor) -> torch.Tensor:
    """Hidden states (S, L, D) of equal sequences."""
    S, L = x_SL.shape
    return model(x_SL.flatten(), torch.arange(L).repeat(S), Packed(torch.arange(S + 1) * L)).hidden_TD.view(S, L, -1)


def disk(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder by its name."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same_disk(ours: Path, theirs: Path) -> None:
    ours_tensors, theirs_tensors = disk(ours), disk(theirs)
    assert ours_tensors.keys() == theirs_tensors.keys()
    for name, tensor in theirs_tensors.items():
        assert ours_tensors[name].dtype == tensor.dtype and torch.equal(ours_tensors[name], tensor), name


# --- transformers agrees, in both directions ---


def test_logits_and_all_gradients_agree(case, assert_close):
    ours = load_model(case.folder, dtype=torch.float32)
    x_SL = tokens_SL()
    expected = case.theirs(x_SL, labels=x_SL)
    logits_SLW = ours.logits(forward(ours, x_SL))
    assert_close(logits_SLW, expected.logits, message="logits")

    case.theirs.zero_grad()
    expected.loss.backward()
    cross_entropy(logits_SLW[:, :-1].flatten(0, 1), x_SL[:, 1:].flatten()).backward()
    theirs, mine = dict(case.theirs.named_parameters()), dict(ours.named_parameters())
    assert mine.keys() == theirs.keys()
    for name, parameter in theirs.items():
        assert_close(mine[name].grad, parameter.grad, message=name)


def test_what_is_saved_here_loads_in_transformers(case, tmp_path):
    import transformers

    save_model(load_model(case.folder, dtype=torch.float32), tmp_path / "ours", shard_bytes=20_000)
    assert (tmp_path / "ours" / "model.safetensors.index.json").is_file()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", experts_implementation="eager").eval()
    assert again.dtype == torch.float32 and type(again) is type(case.theirs)
    x_SL = tokens_SL()
    with torch.no_grad():
        assert torch.equal(again(x_SL).logits, case.theirs(x_SL).logits)


@pytest.mark.parametrize("shard_bytes", [20_000, 10**9])
def test_load_and_save_keep_every_tensor_bit_for_bit(case, tmp_path, shard_bytes):
    save_model(load_model(case.folder, dtype=torch.float32), tmp_path / "ours", shard_bytes=shard_bytes)
    assert_same_disk(tmp_path / "ours", case.folder)
    again = load_model(tmp_path / "ours", dtype=torch.float32)
    save_model(again, tmp_path / "ours")  # over the folder that it is mapped from
    assert_same_disk(tmp_path / "ours", case.folder)


def test_config_json_means_the_same_to_transformers(case, tmp_path):
    import transformers

    assert from_hf(to_hf(case.config)) == case.config
    assert load_config(case.folder) == case.config  # rope_parameters and other spellings of transformers 5
    (tmp_path / "config.json").write_text(json.dumps(to_hf(case.config, "float32")))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(theirs) is type(case.theirs.config) and theirs.dtype == torch.float32
    assert theirs.architectures == [type(case.theirs).__name__]
    for name, value in case.fields.items():
        if not name.startswith("rope_"):
            assert getattr(theirs, name) == value, name
    rope = {k: v for k, v in case.theirs.config.rope_parameters.items() if k != "type"}  # the older name of rope_type
    assert theirs.rope_parameters == rope  # rope_theta and rope_scaling in one


@pytest.mark.parametrize("depth", [1, 2])
def test_mtp_agrees_with_transformers(tmp_path, tiny_model, assert_close, depth):
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_layers import MtpModel

    ours = tiny_model(num_nextn_predict_layers=depth)
    save_model(ours, tmp_path / "model")
    main = transformers.DeepseekV3ForCausalLM.from_pretrained(tmp_path / "model").eval()
    main._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{3 + i}.*" for i in range(depth)]  # which tensors are MTP's: 61 in V3
    module = MtpModel.from_pretrained(main).eval()

    x_SL = tokens_SL(1)
    length = x_SL.shape[1] - depth
    positions = torch.arange(length)
    hidden_TD, attend = forward(ours, x_SL)[0, :length], Packed(torch.tensor([0, length]))
    expected = main.model(x_SL).last_hidden_state[:, :length]  # after the final norm
    for i in range(depth):
        next_T = x_SL[0, i + 1 : i + 1 + length]
        hidden_TD = ours.mtp(hidden_TD, next_T, positions, attend, depth=i).hidden_TD
        expected = module.forward_layer(i, expected, positions[None], None, input_ids=next_T[None])
        assert_close(ours.logits(hidden_TD), module._project_to_logits(expected)[0])


# --- folders ---


def test_mtp_modules_survive_with_their_copies_of_embedding_and_head(tmp_path, tiny_model):
    model = tiny_model(num_nextn_predict_layers=1)
    save_model(model, tmp_path / "a")
    tensors = disk(tmp_path / "a")
    assert torch.equal(tensors["model.layers.3.embed_tokens.weight"], model.model.embed_tokens.weight)
    assert torch.equal(tensors["model.layers.3.shared_head.head.weight"], model.lm_head.weight)
    save_model(load_model(tmp_path / "a", dtype=torch.float32), tmp_path / "b")
    assert_same_disk(tmp_path / "b", tmp_path / "a")

    without = load_model(tmp_path / "a", dtype=torch.float32, mtp=False)
    assert without.config.num_nextn_predict_layers == 0 and len(without.model.layers) == 3
    # a file without the copies loads too, and one whose config.json promises a module that it lacks (transformers writes such)
    for gone, depth in ((("layers.3.embed", "head.head"), 1), (("layers.3.",), 0)):
        rest = {name: tensor for name, tensor in tensors.items() if not any(part in name for part in gone)}
        save_file(rest, tmp_path / "a" / "model.safetensors")
        assert load_model(tmp_path / "a").config.num_nextn_predict_layers == depth


def test_loading_casts_weights_but_not_router_biases(tmp_path, tiny_model):
    model = tiny_model()
    save_model(model, tmp_path / "model")
    loaded = load_model(tmp_path / "model", dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    for i, router in loaded.routers.items():
        assert torch.equal(router.e_score_correction_bias, model.routers[i].e_score_correction_bias)


def test_training_a_loaded_model_leaves_its_file_alone(tmp_path, tiny_model):
    save_model(tiny_model(), tmp_path / "model")
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    loaded = load_model(tmp_path / "model", dtype=torch.float32)  # parameters are the file's pages, mapped privately
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.add_(1.0)
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before


def test_companions_travel_and_a_tied_head_stays_tied(tmp_path, tiny_model):
    (tmp_path / "tokenizer.json").write_text("{}")
    save_model(tiny_model("qwen2", tie_word_embeddings=True, eos_token_id=[5, 6]), tmp_path / "m", companions=[tmp_path / "tokenizer.json"])
    assert (tmp_path / "m" / "tokenizer.json").read_text() == "{}"
    assert json.loads((tmp_path / "m" / "generation_config.json").read_text()) == {"bos_token_id": 1, "eos_token_id": [5, 6]}
    assert "lm_head.weight" not in disk(tmp_path / "m")
    model = load_model(tmp_path / "m")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.eos_token_ids == (5, 6)


def test_kimi_k2_is_a_deepseek_v3(tiny_fields):
    fields = tiny_fields("deepseek_v3", n_group=1, topk_group=1)
    assert from_hf(fields | {"model_type": "kimi_k2"}) == from_hf(fields)


@pytest.mark.parametrize("model_type", ["deepseek_v3", "qwen3_moe", "llama"])
def test_initial_weights(tiny_model, model_type):
    biases = {"attention_bias": True, "initializer_range": 0.006}
    first, second = (tiny_model(model_type, seed, **biases) for seed in (1, 2))
    for model in (first, second):
        model.init_weights(torch.Generator().manual_seed(0))
    for (name, parameter), other in zip(first.named_parameters(), second.parameters()):
        assert torch.equal(parameter, other), name  # a function of the generator alone
        if parameter.dim() > 1:
            assert parameter.std().item() == pytest.approx(0.006, rel=0.15), name
        else:
            assert parameter.eq(1.0 if "norm" in name else 0.0).all(), name
    assert all(buffer.eq(0).all() for buffer in first.buffers())


def test_which_layers_are_sparse(tiny_fields):
    # moe_layer_freq is a field of DeepSeek's own code and of vLLM, which transformers does not know
    config = from_hf(tiny_fields("deepseek_v3", num_hidden_layers=6, first_k_dense_replace=1, moe_layer_freq=2))
    assert [config.is_moe(i) for i in range(7)] == [False, False, True, False, True, False, True]


# --- any configuration ---


@st.composite
def configs(draw) -> ModelConfig:
    """Small configurations of every family, all switches drawn."""
    model_type = draw(st.sampled_from(["deepseek_v3", "deepseek_v2", "qwen2", "qwen3", "qwen3_moe", "llama"]))
    layers, heads, size, flag = draw(st.integers(1, 4)), draw(st.sampled_from([2, 4])), st.integers(1, 9), st.booleans()
    fields: dict[str, Any] = {
        "model_type": model_type,
        "vocab_size": draw(st.integers(3, 40)),
        "hidden_size": heads * 2 * draw(size),
        "intermediate_size": draw(size),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "tie_word_embeddings": draw(flag),
        "rope_scaling": draw(st.sampled_from([None, {"rope_type": "linear", "factor": 2.0}, LLAMA3, YARN])),
    }
    if model_type != "qwen2":
        fields["attention_bias"] = draw(flag)
    if model_type == "llama":
        fields["mlp_bias"] = draw(flag)
    if model_type.startswith("deepseek"):
        fields |= {"q_lora_rank": draw(st.none() | size), "kv_lora_rank": draw(size), "v_head_dim": draw(size)}
        fields |= {"qk_nope_head_dim": draw(size), "qk_rope_head_dim": 2 * draw(size)}
    else:
        fields |= {"num_key_value_heads": draw(st.sampled_from([1, 2])), "head_dim": 2 * draw(size)}
    if model_type.startswith("deepseek") or model_type == "qwen3_moe":
        fields |= {"n_routed_experts": 4, "num_experts": 4, "num_experts_per_tok": draw(st.integers(1, 2))}
        fields |= {"moe_intermediate_size": draw(size), "norm_topk_prob": draw(flag)}
    if model_type.startswith("deepseek"):
        fields |= {"n_shared_experts": draw(st.integers(0, 2)), "first_k_dense_replace": draw(st.integers(0, layers))}
        fields |= {"n_group": draw(st.sampled_from([1, 2])), "topk_group": 1, "moe_layer_freq": draw(st.integers(1, 2))}
    if model_type == "deepseek_v3":
        fields |= {"num_nextn_predict_layers": draw(st.integers(0, 2)), "rope_interleave": draw(flag)}
    if model_type == "qwen3_moe":
        fields |= {"decoder_sparse_step": draw(st.integers(1, 2)), "mlp_only_layers": draw(st.sampled_from([[], [0]]))}
    return from_hf(fields)


def meta(config: ModelConfig) -> Transformer:
    with torch.device("meta"):
        return Transformer(config)


def count(model: Transformer) -> tuple[int, int, int, int]:
    """Scalars in parameters and in buffers, of the main model and of its MTP modules. Shared ones count once."""
    sums = [0, 0, 0, 0]
    module = tuple(f"model.layers.{i}." for i in range(model.config.num_hidden_layers, len(model.model.layers)))
    for kind, named in enumerate((model.named_parameters(), model.named_buffers())):
        for name, tensor in named:
            sums[2 * name.startswith(module) + kind] += tensor.numel()
    return sums[0], sums[1], sums[2], sums[3]


def assert_counts_agree(config: ModelConfig) -> None:
    counted = parameters(config)
    total, buffers, mtp, mtp_buffers = count(meta(config))
    assert (counted.total, counted.buffers, counted.mtp) == (total, buffers, mtp + mtp_buffers)


@settings(max_examples=80, deadline=None)
@given(configs())
def test_any_configuration(config):
    assert from_hf(to_hf(config)) == config
    assert_counts_agree(config)
    # the files hold every parameter exactly once, plus the MTP modules' copies: each name leads back to its place
    model = meta(config)
    slots = dict(model.named_parameters()) | dict(model.named_buffers())
    sizes = dict.fromkeys(slots, 0)
    for name, tensor in disk_tensors(model):
        if target := locate(name, config):
            assert slots[target[0]][target[1]].shape == tensor.shape
            sizes[target[0]] += tensor.numel()
    assert sizes == {name: tensor.numel() for name, tensor in slots.items()}


# --- published models, counted without memory ---

V3, V2, V2_LITE = published("deepseek-v3"), published("deepseek-v2"), published("deepseek-v2-lite")
PUBLISHED = {
    "deepseek-v3": 671_026_404_352,
    "deepseek-v2": 235_741_434_880,
    "deepseek-v2-lite": 15_706_484_224,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name):
    config = published(name)
    counts = count(meta(config))
    assert counts[0] == PUBLISHED[name]
    # V3's published 11,610,068,224 of the MTP module counts its router's 256 biases
    assert counts[1:] == ((14_848, 11_610_068_224 - 256, 256) if name == "deepseek-v3" else (0, 0, 0))
    assert_counts_agree(config)


# --- goldens: YaRN, routers ---


def test_yarn_frequencies_of_deepseek():
    inverse, magnitude = inverse_frequencies(V3)
    golden = {10: 0.0562341, 11: 0.0390069, 16: 0.0055, 22: 1.778279e-4, 23: 3.3338e-5, 31: 3.3338e-6}
    assert {j: inverse[j].item() for j in golden} == pytest.approx(golden, rel=1e-4)  # the goldens have five figures
    assert magnitude == 1.0  # mscale and mscale_all_dim cancel in cos and sin ...
    assert softmax_scale(V3) == pytest.approx(0.1352337789, rel=1e-9)  # ... and enter here, squared
    assert softmax_scale(V2) == pytest.approx(0.1147213868, rel=1e-9)
    assert softmax_scale(replace(V3, rope_scaling=None)) == pytest.approx(192**-0.5)


def route(fields: dict[str, Any], logits: list[float], bias: dict[int, float] | float = 0.0) -> dict[int, float]:
    """expert -> weight of one token whose router logits are given."""
    config = from_hf(fields | {"hidden_size": 1, "n_routed_experts": len(logits)})
    router = Router(config, layer=1)
    with torch.no_grad():
        router.weight.copy_(torch.tensor(logits)[:, None])
        if router.e_score_correction_bias is not None:
            router.e_score_correction_bias.fill_(bias if isinstance(bias, float) else 0.0)
            for expert, value in bias.items() if isinstance(bias, dict) else ():
                router.e_score_correction_bias[expert] = value
    routing = router(torch.ones(1, 1))
    assert routing.loads_E().tolist() == [int(e in routing.experts_TK) for e in range(len(logits))]
    return dict(zip(routing.experts_TK[0].tolist(), routing.weights_TK[0].tolist()))


GOLDEN_LOGITS = [2, -1, 0.1, 1, 0.6, 0.4, -2, 3, -3, -3.1, -2.9, -2.8, 1.1, 1.5, -0.5, 0.2]
PLAIN = {0: 0.685961, 3: 0.569345, 4: 0.502834, 7: 0.741860}


@pytest.mark.parametrize(
    ("bias", "golden"),
    [
        pytest.param(0.0, PLAIN, id="A-no-bias"),
        # 7 loses its place, 8 and 9 win theirs, and are weighed by their own small scores: the bias only selects
        pytest.param({7: -1.0, 8: 0.9, 9: 0.95}, {0: 1.293472, 3: 1.073578, 8: 0.069646, 9: 0.063304}, id="B-bias-selects-only"),
        # every biased score is negative: a mask of 0 instead of -inf would pick four masked experts
        pytest.param(-2.0, PLAIN, id="C-mask-is-minus-infinity"),
    ],
)
def test_v3_router(tiny_fields, bias, golden):
    fields = tiny_fields("deepseek_v3", n_group=4, topk_group=2, num_experts_per_tok=4, routed_scaling_factor=2.5)
    assert route(fields, GOLDEN_LOGITS, bias) == pytest.approx(golden, abs=1e-6)


def test_a_group_counts_as_its_best_in_v2_and_as_its_two_best_in_v3(tiny_fields):
    logits = [3.0, -5.0, 2.0, 1.9]
    share = torch.tensor(logits).softmax(0)
    v2 = route(tiny_fields("deepseek_v2", n_group=2, topk_group=1, num_experts_per_tok=2), logits)
    assert v2 == pytest.approx({0: 16 * share[0].item(), 1: 16 * share[1].item()})  # softmax over all, not renormalised, times 16
    assert set(route(tiny_fields("deepseek_v3", n_group=2, topk_group=1, num_experts_per_tok=2), logits)) == {2, 3}


# --- block-scaled FP8 ---


def test_fp8_checkpoint_loads_as_its_dequantised_self(tmp_path, tiny_model):
    # widths that no block divides; embedding, head, norms and router stay in high precision, as in DeepSeek's files
    model = tiny_model(hidden_size=160, intermediate_size=200, moe_intermediate_size=136)
    save_model(model, tmp_path / "model")
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in disk(tmp_path / "model").items():
        if name.endswith("_proj.weight") or "_proj_with_mqa" in name:
            stored[name], stored[f"{name}_scale_inv"] = quantize_blocks(tensor)
        else:
            stored[name] = tensor
    save_file(stored, tmp_path / "model" / "model.safetensors")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))

    for name, tensor in disk_tensors(load_model(tmp_path / "model", dtype=torch.float32)):
        expected = stored[name].float()
        if (scale := stored.get(f"{name}_scale_inv")) is not None:
            for i, row in enumerate(scale):
                for j, s in enumerate(row):
                    expected[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)] *= s
        assert torch.equal(tensor, expected), name

    stored["model.layers.0.mlp.up_proj.weight_scale_inv"] = torch.ones(1, 1)
    save_file(stored, tmp_path / "model" / "model.safetensors")
    with pytest.raises(ValueError, match=r"up_proj\.weight_scale_inv is \(1, 1\), config\.json makes it \(2, 2\)"):
        load_model(tmp_path / "model")


def test_fp8_scale_inv_multiplies():
    weight = torch.full((3, 5), 2.0).to(torch.float8_e4m3fn)
    assert dequantize_blocks(weight, torch.tensor([[3.0]]), torch.float32).eq(6.0).all()


def test_fp8_error_is_the_published_one():
    # 2.65 % of the Frobenius norm: three mantissa bits, uniform over a binade
    w = torch.randn(700, 500, generator=torch.Generator().manual_seed(0))
    quantised, scale = quantize_blocks(w)
    assert quantised.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32 and scale.shape == (6, 4)
    error = (dequantize_blocks(quantised, scale, torch.float32) - w).norm() / w.norm()
    assert error.item() == pytest.approx(0.0265, abs=0.0005)
    # an outlier spoils its own block alone
    w[0, 0] = 1e6
    restored = dequantize_blocks(*quantize_blocks(w), torch.float32)
    assert ((restored - w)[128:].norm() / w[128:].norm()).item() == pytest.approx(0.0265, abs=0.0005)
    with pytest.raises(ValueError, match="inf or NaN"):
        quantize_blocks(w * math.inf)


# --- mistakes: each error names the file or field, and all of them at once ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt9"}, r"unknown model_type 'gpt9'; known: deepseek_v3, .*llama, kimi_k2"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"use_sliding_window": True}, "sliding windows"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding windows"),
        ({"rope_scaling": {"type": "longrope"}}, "rope_type 'longrope' is not supported; known: default, linear, yarn, llama3"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_type 'yarn' needs 'factor'"),
        ({"hidden_size": None}, "missing field 'hidden_size'"),
        ({"kv_lora_rank": None}, "missing field 'kv_lora_rank'"),
        ({"v_head_dim": 0}, "v_head_dim: must be at least 1"),
        ({"vocab_size": 0}, "vocab_size: must be at least 1, is 0"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim: rotary width must be even"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok: must be between 1 and n_routed_experts 8, is 9"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok: 5 is more than the experts in topk_group 2 groups"),
        ({"n_group": 3}, "n_group: 3 does not divide n_routed_experts 8"),
        ({"n_group": 8, "topk_group": 8}, "n_group: noaux_tc scores a group by its two best"),
        ({"topk_group": 5}, "topk_group: must be between 1 and n_group 4, is 5"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_config_json_names_file_and_field(tmp_path, tiny_fields, changes, message):
    (tmp_path / "config.json").write_text(json.dumps(tiny_fields("deepseek_v3") | changes))
    with pytest.raises(ValueError, match=rf"{tmp_path}/config\.json: (.* )?{message}"):
        load_config(tmp_path)


def test_heads_that_do_not_group(tiny_fields):
    with pytest.raises(ValueError, match="num_key_value_heads: 3 does not divide 4"):
        from_hf(tiny_fields("llama", num_key_value_heads=3))


@pytest.mark.parametrize(
    ("model_type", "changes", "field"),
    [
        ("qwen2", {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 8}, "n_routed_experts=8"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling="),  # the key is rope_type
        ("llama", {"num_nextn_predict_layers": 1}, "num_nextn_predict_layers=1"),
        ("deepseek_v3", {}, "kv_lora_rank"),
    ],
)
def test_what_a_family_cannot_express_is_not_written(model_type, changes, field):
    config = ModelConfig(
        model_type=model_type,
        vocab_size=9,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        **changes,
    )
    with pytest.raises(ValueError, match=field):
        to_hf(config)


@pytest.fixture
def saved(tmp_path, tiny_model) -> Path:
    save_model(tiny_model(), tmp_path / "model", shard_bytes=200_000)
    return tmp_path / "model"


def test_missing_files(tmp_path, saved):
    with pytest.raises(ValueError, match=r"config\.json: missing"):
        load_model(tmp_path)
    first = min(saved.glob("*.safetensors"))
    content = first.read_bytes()
    first.write_bytes(content[:-100])
    with pytest.raises(ValueError, match=f"{first.name}: truncated or corrupt"):
        load_model(saved)
    first.unlink()
    with pytest.raises(ValueError, match=f"the index names files that are missing: {first.name}"):
        load_model(saved)
    for file in [*saved.glob("*.safetensors"), saved / "model.safetensors.index.json"]:
        file.unlink()
    (saved / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(ValueError, match=r"no \*\.safetensors \(pickled \.bin"):
        load_model(saved)
    (saved / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not JSON"):
        load_model(saved)


def test_all_that_does_not_fit_is_listed_at_once(tmp_path, saved):
    tensors = disk(saved)
    del tensors["model.layers.0.mlp.up_proj.weight"], tensors["model.layers.1.mlp.experts.3.down_proj.weight"]
    tensors["model.norm.weight"] = torch.ones(65)
    tensors["model.layers.0.mlp.side_proj.weight"] = torch.ones(2, 2)
    tensors["model.layers.1.mlp.experts.8.up_proj.weight"] = torch.ones(2, 2)
    for file in [*saved.glob("*.safetensors"), saved / "model.safetensors.index.json"]:
        file.unlink()
    save_file(tensors, saved / "model.safetensors")
    with pytest.raises(ValueError) as error:
        load_model(saved)
    assert str(error.value).splitlines() == [
        f"{saved}: the weights do not fit config.json:",
        "  unexpected: model.layers.0.mlp.side_proj.weight",
        "  unexpected: model.layers.1.mlp.experts.8.up_proj.weight",
        "  wrongly shaped: model.norm.weight is (65,), config.json makes it (64,)",
        "  missing: model.layers.0.mlp.up_proj.weight",
        "  missing: some experts of model.layers.1.mlp.experts.down_proj",
    ]


def test_neither_a_folder_nor_a_hub_name():
    with pytest.raises(ValueError, match=r"\./nowhere: no such folder"):
        resolve("./nowhere")
