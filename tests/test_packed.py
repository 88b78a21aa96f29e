"""Packed weights through the native kernels against the plain modules: the same text in fp32, the same model in fewer bits."""

from __future__ import annotations

import random
from functools import cache

import pytest
import torch

from jevons.engine.engine import Engine
from jevons.engine.packed import pack_model
from jevons.engine.sequence import Sample, SamplingParams
from jevons.kernels import native
from jevons.model.config import ModelConfig
from jevons.model.transformer import Transformer

pytestmark = pytest.mark.skipif(not native.available(), reason=native.reason() or "native kernels")

BASE = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "max_position_embeddings": 256}
BASE |= {"initializer_range": 0.2, "num_attention_heads": 4}
MLA = {"kv_lora_rank": 20, "qk_nope_head_dim": 8, "qk_rope_head_dim": 6, "v_head_dim": 10}
MOE = {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 16}
SOFTMAX = {"scoring_func": "softmax", "topk_method": "greedy"}
CONFIGS = {
    "deepseek_v3": ModelConfig(
        **(BASE | MLA | MOE), q_lora_rank=12, n_shared_experts=1, first_k_dense_replace=1, attention_bias=True, num_nextn_predict_layers=1
    ),
    "deepseek_v2": ModelConfig(
        **(BASE | MLA | MOE | SOFTMAX), model_type="deepseek_v2", n_shared_experts=1, first_k_dense_replace=1, norm_topk_prob=False
    ),
    "llama": ModelConfig(**BASE, model_type="llama", num_key_value_heads=2, head_dim=8, attention_bias=True, mlp_bias=True),
    "qwen2": ModelConfig(**BASE, model_type="qwen2", num_key_value_heads=1, tie_word_embeddings=True),
    "qwen3": ModelConfig(**BASE, model_type="qwen3", num_key_value_heads=2, head_dim=16),
    "qwen3_moe": ModelConfig(**(BASE | MOE | SOFTMAX), model_type="qwen3_moe", num_key_value_heads=4, head_dim=8),
}
PROMPTS = [random.Random(i).choices(range(61), k=n) for i, n in enumerate((30, 3, 17, 1, 45, 8))]


@cache
def plain(family: str) -> Transformer:
    return made(family)


def made(family: str, dtype: torch.dtype = torch.float32) -> Transformer:
    model = Transformer(CONFIGS[family])
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # biases that matter
            if name.endswith("bias"):
                parameter.copy_(torch.linspace(-0.1, 0.1, len(parameter)))
    return model.to(dtype).requires_grad_(False)


def same(a: Sample, b: Sample) -> None:
    assert a.tokens == b.tokens
    torch.testing.assert_close(torch.tensor(a.raw_logps), torch.tensor(b.raw_logps), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", CONFIGS)
def test_packed_fp32_says_what_the_modules_say(family: str) -> None:
    packed = made(family)
    before = sum(p.nbytes for p in packed.parameters())
    size = pack_model(packed, "fp32")
    assert size > before // 2 and all(p.numel() == 0 for n, p in packed.named_parameters() if n.endswith("_proj.weight"))
    for params in (SamplingParams(max_tokens=20, temperature=0), SamplingParams(max_tokens=20, seed=1, temperature=0.8, top_p=0.9)):
        want = Engine(plain(family), use_native=False).generate(PROMPTS, params)
        # in one go; in chunks beside tokens that grow; in a cache that is too small; read in place or gathered
        for options in ({}, {"max_batch_tokens": 19, "max_sequences": 6}, {"num_blocks": 20, "block_size": 4}):
            for got, expected in zip(Engine(packed, **options).generate(PROMPTS, params), want):  # type: ignore[arg-type]
                same(got, expected)
        for got, expected in zip(Engine(plain(family), use_native=True).generate(PROMPTS, params), want):
            same(got, expected)


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen2"])
def test_drafts_and_routes_work_with_packed_weights(family: str) -> None:
    packed = made(family)
    pack_model(packed, "fp32")
    params = SamplingParams(max_tokens=20, temperature=0)
    want = Engine(plain(family)).generate(PROMPTS, params)
    engine = Engine(packed, draft="mtp" if family == "deepseek_v3" else "ngram", draft_rows=32)
    for got, expected in zip(engine.generate(PROMPTS, params), want):
        same(got, expected)
    assert engine.drafted
    if family == "deepseek_v3":
        params = SamplingParams(max_tokens=5, temperature=0, record_routes=True)
        a, b = (Engine(model).generate(PROMPTS, params) for model in (plain(family), packed))
        assert all(torch.equal(x.routes, y.routes) for x, y in zip(a, b))  # type: ignore[arg-type]


def logps(model: Transformer, tokens: list[int]) -> torch.Tensor:
    [got] = Engine(model).generate([tokens], SamplingParams(max_tokens=1, prompt_logprobs=0))
    assert got.prompt_logprobs is not None
    return torch.tensor([p for p, _ in got.prompt_logprobs])


@pytest.mark.parametrize("family", CONFIGS)
def test_fewer_bits_are_nearly_the_same_model(family: str) -> None:
    tokens = random.Random(9).choices(range(61), k=120)
    exact = logps(plain(family), tokens)
    errors = {}
    for format in ("bf16", "int8", "int4"):
        model = made(family, torch.bfloat16)
        pack_model(model, format)
        errors[format] = (logps(model, tokens) - exact).abs().mean().item()
    spread = exact.std().item()
    assert errors["bf16"] < 0.1 * spread and errors["int8"] < 0.15 * spread and errors["int4"] < 0.6 * spread, (errors, spread)


def test_what_cannot_be_packed_says_why() -> None:
    with pytest.raises(ValueError, match="bfloat16"):
        pack_model(made("qwen2"), "int4")
    with pytest.raises(ValueError, match="known: fp32, bf16, int8, int4"):
        pack_model(made("qwen2"), "int3")
    packed = made("qwen2")
    pack_model(packed, "fp32")
    with pytest.raises(ValueError, match="load_weights"):
        Engine(packed).load_weights(plain("qwen2").named_parameters(), version=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", CONFIGS)
def test_weights_in_place_are_those_of_the_moment(family: str, dtype: torch.dtype) -> None:
    """Whatever a trainer writes into the modules is sampled from, bit for bit as by an engine made afterwards."""
    model, params = made(family, dtype), SamplingParams(max_tokens=8, seed=1)
    engine = Engine(model)
    old = engine.generate(PROMPTS, params)
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)).to(dtype), alpha=0.05)
    engine.new_weights(1)
    new = engine.generate(PROMPTS, params)
    want = Engine(model).generate(PROMPTS, params)
    assert [(s.tokens, s.logps) for s in new] == [(s.tokens, s.logps) for s in want] != [(s.tokens, s.logps) for s in old]


def test_modules_and_parameters_that_others_replace_are_noticed() -> None:
    model, params = made("deepseek_v3"), SamplingParams(max_tokens=8, temperature=0)
    engine, plain_engine, call = Engine(model), Engine(model, use_native=False), model.call_layer
    layer = model.model.layers[1]

    def check(native: bool) -> None:
        engine.new_weights(engine.version + 1)
        plain_engine.new_weights(plain_engine.version + 1)
        for got, expected in zip(engine.generate(PROMPTS, params), plain_engine.generate(PROMPTS, params)):
            same(got, expected)
        assert engine.runner._ready() == native and model.call_layer is call and model.rope_dtype is None

    check(True)
    layer.self_attn.o_proj.weight.data = torch.randn(32, 40) / 5  # another place in memory
    check(True)
    layer.mlp.experts.down_proj = torch.nn.Parameter(torch.randn_like(layer.mlp.experts.down_proj) / 5)
    check(True)
    projection = layer.self_attn.o_proj
    layer.self_attn.o_proj = torch.nn.Sequential(projection, torch.nn.Tanh())  # nothing that is known here
    check(False)
    layer.self_attn.o_proj = projection
    check(True)
