"""Configurations of a wanted size: a dense model or a mixture of experts that a recipe's [model] can take as it is.

    dense(350e6, vocab_size=32768)                  about so many active parameters
    sparse(350e6, 4e9, vocab_size=32768)            and so many in all

Problem: scaling laws speak of parameters, recipes of widths and layers. Approach: a rule for the proportions that published models
keep to, and among the widths near it the one whose count, by cost/arithmetic.py, comes closest. Sizes count the output matrix and
not the input embedding, as FLOPs do. Not done: a search for the best proportions; losses hardly depend on them (arXiv 2001.08361).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

from jevons.cost.arithmetic import layer_parameters, parameters
from jevons.model.config import ModelConfig

TIED_BELOW = 2048  # hidden sizes up to which one matrix is embedding and head: Qwen2.5 ties up to 3B, which has this one
CHOSEN = 8  # experts a token, beside a shared one: DeepSeek-V3's
LEAST_EXPERTS = 2 * CHOSEN  # routed ones; with fewer there is little to choose
STEP = 32  # of all widths
WIDTHS = (*range(64, 512, 32), *range(512, 1024, 64), *range(1024, 4096, 128), *range(4096, 16384 + 1, 256))  # that are tried


def dense(active: float, *, vocab_size: int, max_position_embeddings: int = 4096) -> ModelConfig:
    """A model of Qwen3's family with about this many parameters. ValueError where the vocabulary alone is more."""

    def make(D: int, layers: int) -> ModelConfig:
        width = 128 if D >= 1024 else 64  # of a head; together they may be a little narrower than the model
        heads = max(1, D // width)
        return ModelConfig(
            model_type="qwen3",
            vocab_size=vocab_size,
            hidden_size=D,
            intermediate_size=_round(8 * D / 3),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=next(n for n in range(max(1, heads // 4), heads + 1) if heads % n == 0),
            head_dim=width,
            tie_word_embeddings=D <= TIED_BELOW,
            max_position_embeddings=max_position_embeddings,
        )

    return _closest(make, active, vocab_size)


def sparse(active: float, total: float, *, vocab_size: int, max_position_embeddings: int = 4096) -> ModelConfig:
    """A model of DeepSeek-V3's family: `active` parameters a token, `total` in all, as near as whole experts come."""

    def make(D: int, layers: int, experts: int = LEAST_EXPERTS) -> ModelConfig:
        wide = D >= 1536
        width = _round(D / 4)
        return ModelConfig(
            vocab_size=vocab_size,
            hidden_size=D,
            intermediate_size=(CHOSEN + 1) * width,
            moe_intermediate_size=width,
            num_hidden_layers=layers,
            first_k_dense_replace=1,
            num_attention_heads=max(1, D // (128 if wide else 64)),
            q_lora_rank=_round(D / 4 if wide else D / 2),
            kv_lora_rank=min(512, _round(D / 4)),
            qk_nope_head_dim=128 if wide else 64,
            qk_rope_head_dim=64 if wide else 32,
            v_head_dim=128 if wide else 64,
            n_routed_experts=experts,
            n_shared_experts=1,
            num_experts_per_tok=CHOSEN,
            tie_word_embeddings=D <= TIED_BELOW,
            max_position_embeddings=max_position_embeddings,
        )

    experts = LEAST_EXPERTS
    for _ in range(3):  # routers are active, so the number of experts and the width depend on each other, weakly
        near = _closest(functools.partial(make, experts=experts), active, vocab_size)
        held, more = (parameters(make(near.hidden_size, near.num_hidden_layers, n)).total for n in (LEAST_EXPERTS, LEAST_EXPERTS + 1))
        experts = max(LEAST_EXPERTS, round(LEAST_EXPERTS + (total - held) / (more - held)))
    return make(near.hidden_size, near.num_hidden_layers, experts)


def fields(config: ModelConfig) -> dict[str, Any]:
    """A recipe's [model]: all that differs from the defaults."""
    given = ((f, getattr(config, f.name)) for f in dataclasses.fields(config))
    return {f.name: value for f, value in given if f.default is dataclasses.MISSING or value != f.default}


def _round(width: float) -> int:
    return max(STEP, STEP * round(width / STEP))


def _layers(D: int) -> float:
    """As many as published models of this width have: one for 64 up to 2,048 (GPT-2: 12 of 768), from there on one for 128."""
    return D / 64 if D <= 2048 else 32 + (D - 2048) / 128


def _closest(make: Callable[[int, int], ModelConfig], active: float, vocab_size: int) -> ModelConfig:
    found = min(_near(make, active), key=lambda pair: pair[0], default=None)
    if found is not None:
        return found[1]
    if active > 1e9 and active > WIDTHS[-1] * vocab_size:
        raise ValueError(f"size: {active:.2g} parameters a token are more than the widest model tried, {WIDTHS[-1]:,}, reaches")
    raise ValueError(f"vocab_size: {vocab_size:,} rows leave nothing of {active:,.0f} parameters for layers; take a smaller vocabulary")


def _near(make: Callable[[int, int], ModelConfig], active: float) -> Iterator[tuple[float, ModelConfig]]:
    """Models of every width, each with the layers that bring it nearest, and how far off it is: proportions count from 2 % of size on."""
    for D in WIDTHS:
        least = make(D, 2)
        two, layer = parameters(least).active_without_embedding, layer_parameters(least, 1, active=True)
        layers = round(2 + (active - two) / layer)
        if layers < max(2.0, _layers(D) / 4):  # and wider ones have fewer still
            return
        if layers <= 2 * _layers(D) + 4:
            size = two + (layers - 2) * layer
            off = max(0.0, abs(math.log(size / active)) - 0.02)
            yield 20 * off + abs(math.log(layers / max(2.0, _layers(D)))), make(D, layers)
