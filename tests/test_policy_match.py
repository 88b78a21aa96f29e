"""Sampler = trainer: what a token was drawn at is what the trainer finds it at, whatever the engine did on the way."""

from __future__ import annotations

import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from jevons.data.tokenizer import Tokenizer
from jevons.data.trajectory import Lesson, Trajectory, pack_lessons
from jevons.engine.engine import Engine
from jevons.engine.sequence import Sample, SamplingParams
from jevons.kernels import native, processor
from jevons.model.config import MODEL_TYPES, ModelConfig
from jevons.model.folder import load_model
from jevons.model.transformer import Transformer
from jevons.train.loss import answer_token
from jevons.train.trainer import Trainer

BASE: dict[str, Any] = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
BASE |= {"max_position_embeddings": 256, "initializer_range": 0.2}
MLA = {"kv_lora_rank": 20, "qk_nope_head_dim": 8, "qk_rope_head_dim": 6, "v_head_dim": 10}
MOE = {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 16}
SOFTMAX = {"scoring_func": "softmax", "topk_method": "greedy"}
MEMORY = {"memory_layers": ("0:1",), "memory_keys": 12, "memory_key_dim": 8, "memory_value_dim": 16, "memory_top_k": 5}
TWO = {"memory_layers": ("0:1", "1:2"), "memory_pre_value_dim": 8, "memory_share_ratio": 0.75}
DEEP = {"n_shared_experts": 1, "first_k_dense_replace": 1}
CONFIGS = {
    "deepseek_v3": ModelConfig(
        **(BASE | MLA | MOE | DEEP), q_lora_rank=12, n_group=4, topk_group=2, routed_scaling_factor=2.5, num_nextn_predict_layers=1
    ),
    "deepseek_v3 dense": ModelConfig(**(BASE | MLA), q_lora_rank=12, num_nextn_predict_layers=1),
    "deepseek_v2": ModelConfig(**(BASE | MLA | MOE | SOFTMAX | DEEP), model_type="deepseek_v2", norm_topk_prob=False),
    "llama": ModelConfig(**BASE, model_type="llama", num_key_value_heads=2, attention_bias=True, mlp_bias=True),
    "llama memory": ModelConfig(**(BASE | MEMORY), model_type="llama", num_key_value_heads=2),
    "qwen3_moe memory": ModelConfig(
        **(BASE | MOE | SOFTMAX | MEMORY | TWO), model_type="qwen3_moe", num_key_value_heads=2, head_dim=8, memory_version="ultramem_v2"
    ),
    "qwen2": ModelConfig(**BASE, model_type="qwen2", num_key_value_heads=1, tie_word_embeddings=True),
    "qwen3": ModelConfig(**BASE, model_type="qwen3", num_key_value_heads=2, head_dim=16),
    "qwen3_moe": ModelConfig(**(BASE | MOE | SOFTMAX), model_type="qwen3_moe", num_key_value_heads=2, head_dim=8),
}
FILTERED = {"temperature": 0.7, "top_p": 0.9}


def made(config: ModelConfig, dtype: torch.dtype = torch.float32) -> Transformer:
    model = Transformer(config)
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms that matter
            if parameter.dim() == 1:
                parameter += torch.linspace(-0.1, 0.1, len(parameter))
    return model.to(dtype)


def replayed(config: ModelConfig) -> bool:
    """Whether the sampler chooses what the trainer can be made to choose again."""
    return bool(config.n_routed_experts or config.memory_layers)


def prompt(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(61), k=length)


def trajectory(text: list[int], *turns: Sample) -> Trajectory:
    """Turns of one conversation, the later ones with three tokens of somebody else's before them."""
    t = Trajectory(text, [], [], [], [], finished=False, version=0, supports=[])
    assert t.supports is not None
    for i, turn in enumerate(turns):
        for tokens, logps, own in (([1, 2, 3] * (i > 0), [0.0] * 3 * (i > 0), False), (turn.tokens, turn.logps, True)):
            t.tokens += tokens
            t.own += [own] * len(tokens)
            t.logps += logps
        t.raw_logps += [0.0] * 3 * (i > 0) + turn.raw_logps
        t.supports += [None] * 3 * (i > 0) + (turn.supports or [None] * len(turn.tokens))
        t.routes, t.picks = turn.routes, turn.picks
    return t


def scored(trainer: Trainer, found: list[Trajectory], temperature: float, *, replay: bool, raw: bool = False) -> torch.Tensor:
    """The trainer's log-probabilities of the tokens drawn, in the distribution drawn from or in the model's own."""
    if raw:
        found, temperature = [replace(t, supports=None) for t in found], 1.0
    batch = pack_lessons([Lesson(t, 1.0, 1.0) for t in found], temperature=temperature, share=not raw, replay=replay)
    return trainer.score([batch])[0][batch.weights_T > 0]


def drawn(found: list[Trajectory], raw: bool = False) -> torch.Tensor:
    return torch.tensor([v for t in found for v, own in zip(t.raw_logps if raw else t.logps, t.own) if own])


def begin(text: list[int], turns: list[Sample]) -> list[int]:
    return text + trajectory(text, *turns).tokens


def sampled(engine: Engine, params: SamplingParams, prompts: list[list[int]], turns: int = 2) -> list[Trajectory]:
    """Four samples of each prompt, and further turns of each."""
    texts = [text for text in prompts for _ in range(4)]
    done: list[list[Sample]] = [[] for _ in texts]
    for turn in range(turns):
        begun = [begin(text, d) + [1, 2, 3] * (turn > 0) for text, d in zip(texts, done)]
        for d, sample in zip(done, engine.generate(begun, [replace(params, seed=turn * 100 + i) for i in range(len(texts))])):
            d.append(sample)
    return [trajectory(text, *d) for text, d in zip(texts, done)]


def test_every_family_is_here() -> None:
    assert {name.split()[0] for name in CONFIGS} == set(MODEL_TYPES)


needs_native = pytest.mark.skipif(not native.available(), reason=native.reason() or "native kernels")


@pytest.mark.parametrize(
    ("use_native", "filters"),
    [
        pytest.param(False, {}, id="torch-whole"),
        pytest.param(True, FILTERED, id="native-filtered", marks=needs_native),
        pytest.param(False, FILTERED, id="torch-filtered", marks=pytest.mark.slow),
        pytest.param(True, {}, id="native-whole", marks=[needs_native, pytest.mark.slow]),
    ],
)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_trainer_finds_what_the_sampler_drew_at(name: str, filters: dict[str, float], use_native: bool) -> None:
    """In fp32 to 1e-5: with shared prefixes and groups, prompts in chunks, preemption, drafts, and a second turn."""
    config = CONFIGS[name]
    model = made(config)
    engine = Engine(
        model,
        num_blocks=34,
        block_size=4,
        max_batch_tokens=19,
        max_sequences=8,
        draft="mtp" if config.num_nextn_predict_layers else "ngram",
        draft_rows=16,
        use_native=use_native,
    )
    params = SamplingParams(max_tokens=14, record_support=True, record_routes=replayed(config), **filters)  # type: ignore[arg-type]
    found = sampled(engine, params, [prompt(1, 27), prompt(2, 3) * 6])
    now = engine.snapshot()
    assert now["preemptions"] and now["prefix_hits"] and (now["drafted"] or engine.draft == "ngram")
    assert all(any(s is not None for s in t.supports or []) == bool(filters) for t in found)
    trainer = Trainer(model)
    for replay in (False, True) if replayed(config) else (False,):
        ratio = (scored(trainer, found, params.temperature, replay=replay) - drawn(found)).exp()
        torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=1e-5)
        torch.testing.assert_close(scored(trainer, found, 1.0, replay=replay, raw=True), drawn(found, raw=True), rtol=0, atol=1e-5)


def mismatch(trainer: Trainer, found: list[Trajectory], *, replay: bool) -> tuple[float, float, float]:
    """Mean and largest difference of the log-probabilities, and the mean of ratio - 1 - log ratio, an estimate of the KL divergence."""
    difference = scored(trainer, found, 1.0, replay=replay) - drawn(found)
    return difference.abs().mean().item(), difference.abs().max().item(), (difference.exp() - 1 - difference).mean().item()


def test_replay_does_not_widen_the_mismatch_in_bf16() -> None:
    wider = {"hidden_size": 64, "n_routed_experts": 16, "initializer_range": 0.1, "vocab_size": 300}
    config = ModelConfig(**(BASE | MLA | MOE | DEEP | wider), q_lora_rank=32)
    model = made(config, torch.bfloat16)
    found = sampled(Engine(model), SamplingParams(max_tokens=100, record_routes=True), [prompt(1, 30), prompt(2, 9)], turns=1)
    trainer = Trainer(model)
    without, replayed = (mismatch(trainer, found, replay=replay) for replay in (False, True))
    print(f"random MoE in bf16: mean, max, KL {without} without replay, {replayed} with")
    assert replayed[0] < without[0] < 0.05 and replayed[2] < without[2] < 0.01


def test_replayed_picks_narrow_the_mismatch_in_bf16() -> None:
    """A memory layer's choice is as discontinuous as a router's: rounded otherwise, a token reads other rows."""
    memory = {"memory_layers": ("0:1", "1:2"), "memory_keys": 64, "memory_key_dim": 16, "memory_value_dim": 32, "memory_top_k": 16}
    config = ModelConfig(
        **(BASE | memory | {"hidden_size": 64, "initializer_range": 0.1, "vocab_size": 300}), model_type="llama", num_key_value_heads=2
    )
    model = made(config, torch.bfloat16)
    found = sampled(Engine(model), SamplingParams(max_tokens=100, record_routes=True), [prompt(1, 30), prompt(2, 9)], turns=1)
    trainer = Trainer(model)
    without, replayed = (mismatch(trainer, found, replay=replay) for replay in (False, True))
    print(f"random memory layers in bf16: mean, max, KL {without} without replay, {replayed} with")
    assert replayed[0] < 0.5 * without[0] and replayed[2] < 0.2 * without[2]


@pytest.mark.parametrize("name", ["llama memory", "qwen3_moe memory"])
def test_replayed_picks_are_looked_up_and_scored_anew(name: str) -> None:
    """After the weights moved the rows are still the sampler's, and the gradient is that of the weights as they are now."""
    model = made(CONFIGS[name])
    found = sampled(Engine(model), SamplingParams(max_tokens=12, record_routes=True), [prompt(1, 9)], turns=1)
    trainer = Trainer(model, mtp_weight=0)
    memories = trainer.memories
    with torch.no_grad():
        for memory in memories:
            memory.keys += torch.randn(memory.keys.shape, generator=torch.Generator().manual_seed(1))
            memory.update_vectors()
    looked: list[torch.Tensor] = []
    for memory in memories:
        look = memory.look
        memory.look = lambda x, look=look: looked.append(look(x).picks_TX) or look(x)  # type: ignore[method-assign, misc]
    batch = pack_lessons([Lesson(t, 1.0, 1.0) for t in found])
    assert batch.picks_TLX is not None and batch.picks_TLX.dtype == torch.int32 and not batch.picks_TLX.is_inference()
    trainer.forward_backward([batch], answer_token)
    assert all(torch.equal(picks, batch.picks_TLX[:, i].long()) for i, picks in enumerate(looked))
    gradients = [parameter.abs().sum() for parameter in trainer.optimizer.gradients]
    looked.clear()
    trainer.optimizer.clear()
    trainer.forward_backward([pack_lessons([Lesson(t, 1.0, 1.0) for t in found], replay=False)], answer_token)
    assert not any(torch.equal(picks, batch.picks_TLX[:, i].long()) for i, picks in enumerate(looked))  # nothing of it is left
    assert all(memory.replayed_TX is None for memory in memories) and sum(gradients) > 0


@pytest.mark.parametrize("recompute", [False, True])
def test_replay_holds_through_the_backward_pass(recompute: bool) -> None:
    """Layers that are computed again for their gradients look up the same rows, so the gradients are the same."""
    model = made(CONFIGS["llama memory"])
    found = sampled(Engine(model), SamplingParams(max_tokens=12, record_routes=True), [prompt(1, 9)], turns=1)
    for t in found:
        assert t.picks is not None
        t.picks = t.picks.flip(0).contiguous()  # not what the model itself would choose
    results = []
    for again in (False, recompute):
        trainer = Trainer(model, mtp_weight=0, recompute=again)
        trainer.forward_backward([pack_lessons([Lesson(t, 1.0, 1.0) for t in found])], answer_token)
        results.append([g.to_dense() if g.is_sparse else g for g in trainer.optimizer.gradients])
        model.call_layer = lambda layer, *arguments: layer(*arguments)
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_mismatch_of_a_real_model_in_bf16() -> None:
    if "JEVONS_REAL_MODEL" not in os.environ:
        pytest.skip("JEVONS_REAL_MODEL is not set")
    if not processor.multiplies_bf16():
        pytest.skip("this processor emulates bf16, which would take a quarter of an hour")
    folder = Path(os.environ["JEVONS_REAL_MODEL"])
    model, tokenizer = load_model(folder), Tokenizer.load(folder)
    questions = "What is 17 * 23?", "Write a haiku about the sea."
    prompts = [tokenizer.encode(f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n") for q in questions]
    trainer = Trainer(model)
    for use_native in (False, True) if native.available() else (False,):
        found = sampled(Engine(model, use_native=use_native), SamplingParams(max_tokens=96), prompts, turns=1)
        measured = mismatch(trainer, found, replay=False)
        print(f"{'native' if use_native else 'torch'}, bf16: mean, max, KL {measured}")
        assert measured[0] < 0.05 and measured[2] < 0.01
