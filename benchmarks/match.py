"""Three models to compare: dense, mixture of experts, memory; alike but for where their sparse parameters are.

Problem: a mixture and a memory model are comparable only where both hold as many parameters and spend as many FLOPs on a token, and
each has its own knobs. Approach: width, depth, attention, vocabulary and context are common. The mixture fixes both targets: top 2 of N
routed experts in every block, whose width follows from the sparse parameters wanted. The memory model has a dense feed-forward in every
block and memory layers beside; how many keys (so rows) these have follows from the total, then the feed-forward's width from the
FLOPs. The dense model has the FLOPs alone. All counted by cost/arithmetic.py. Not done: searching over top-k, key and value widths:
these stand in the published model's proportions (arXiv 2411.12364, table 4 and released code: keys D/4 wide, values D/2, 42 rows a head).
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from dataclasses import dataclass
from typing import Any

from jevons.cost.arithmetic import forward_flops, parameters
from jevons.model.config import ModelConfig

MIXTURE = {"num_experts_per_tok": 2, "first_k_dense_replace": 0}
UNIT = 8  # widths are multiples of it: a row of whole 16 bytes


@dataclass(frozen=True)
class Shape:
    """What the three have in common, how much of it is sparse, and for what context FLOPs are counted."""

    common: dict[str, Any]  # ModelConfig's fields; model_type is a dense family
    mixture: dict[str, Any]  # what the mixture's family says otherwise
    experts: int
    sparse: int  # parameters in routed experts, at least
    context: int
    places: tuple[str, ...]  # of memory layers
    top_k: int = 42  # rows a head


def trio(shape: Shape) -> dict[str, ModelConfig]:
    """`dense`, `moe` and `memory`, matched within 1 %. ValueError where the shape has no such memory model."""
    common, D = shape.common, shape.common["hidden_size"]
    width = _whole(shape.sparse / (3 * D * shape.experts * common["num_hidden_layers"]), up=True)
    routed = {"n_routed_experts": shape.experts, "moe_intermediate_size": width, "intermediate_size": 2 * width}
    moe = ModelConfig(**common | MIXTURE | routed | shape.mixture)
    flops, total = forward_flops(moe, shape.context), parameters(moe).total
    table = {"memory_layers": shape.places, "memory_key_dim": D // 4, "memory_value_dim": D // 2, "memory_top_k": shape.top_k}
    feed = UNIT
    for _ in range(4):  # the two knobs hardly meet: keys cost some FLOPs, the feed-forward some parameters
        most = range(shape.top_k, 2**16)
        keys = most[bisect_left(most, total, key=lambda keys, feed=feed: parameters(_memory(common, table, feed, keys)).total)]
        feed = _feed(lambda width, keys=keys: _memory(common, table, width, keys), flops, shape.context)
    configs = {"dense": _with(common, _feed(lambda w: _with(common, w), flops, shape.context)), "moe": moe}
    configs["memory"] = _memory(common, table, feed, keys)
    check(configs, shape.context)
    return configs


def check(configs: dict[str, ModelConfig], context: int) -> None:
    """Whether they are matched: FLOPs of all three, parameters of the two sparse ones."""
    moe = configs["moe"]
    for name, config in configs.items():
        ratios = {"FLOPs": forward_flops(config, context) / forward_flops(moe, context)}
        if name == "memory":
            ratios["parameters"] = parameters(config).total / parameters(moe).total
        if off := [f"{100 * ratio - 100:+.1f} % {what}" for what, ratio in ratios.items() if abs(ratio - 1) > 0.01]:
            raise ValueError(f"{name}: {', '.join(off)} beside the mixture; change the sparse parameters, the number of experts or top_k")


def sparse_parameters(config: ModelConfig) -> int:
    """Those of which a token uses few: routed experts, or rows of values."""
    layers = sum(config.is_moe(i) for i in range(config.num_hidden_layers))
    experts = layers * config.n_routed_experts * 3 * config.hidden_size * config.moe_intermediate_size
    return experts + len(config.memory_layers) * config.memory_rows * config.memory_value_dim


def describe(config: ModelConfig, context: int) -> dict[str, Any]:
    """Its counts and its own knobs, for tables."""
    out = {"parameters": parameters(config).total, "sparse_parameters": sparse_parameters(config), "flops": forward_flops(config, context)}
    knobs = [("feed_forward", "intermediate_size")] if not config.n_routed_experts else []
    knobs += [("experts", "n_routed_experts"), ("expert_width", "moe_intermediate_size")] if config.n_routed_experts else []
    names = ("layers", "keys", "key_dim", "value_dim", "top_k", "heads") if config.memory_layers else ()
    return out | {name: getattr(config, field) for name, field in (*knobs, *((f"memory_{n}", f"memory_{n}") for n in names))}


def _whole(width: float, up: bool = False) -> int:
    return max(UNIT, (-(-int(width) // UNIT) if up else round(width / UNIT)) * UNIT)


def _with(common: dict[str, Any], width: int) -> ModelConfig:
    return ModelConfig(**common | {"intermediate_size": width})


def _memory(common: dict[str, Any], table: dict[str, Any], width: int, keys: int) -> ModelConfig:
    return dataclasses.replace(_with(common, width), **table, memory_keys=keys)


def _feed(make: Any, flops: float, context: int) -> int:
    """The feed-forward's width at which `make(width)` has these FLOPs, which are linear in it."""
    base, slope = forward_flops(make(UNIT), context), forward_flops(make(2 * UNIT), context) - forward_flops(make(UNIT), context)
    return _whole(UNIT + (flops - base) / slope * UNIT)


# At least 1 GB of sparse parameters in bf16, 32 experts as in the article's mixture; attention is GQA's form of multi-head attention
LARGE = Shape(
    common={
        "model_type": "qwen3", "vocab_size": 8192, "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8,
        "max_position_embeddings": 1024,
    },
    mixture={"model_type": "qwen3_moe", "scoring_func": "softmax", "topk_method": "greedy"},
    experts=32, sparse=2**29, context=64, places=("1:3", "4:6"),
)  # fmt: skip
# The scale of recipes/text.toml, and its attention
SMALL = Shape(
    common={
        "model_type": "deepseek_v3", "vocab_size": 8192, "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4,
        "q_lora_rank": 96, "kv_lora_rank": 64, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64,
        "max_position_embeddings": 512,
    },
    mixture={}, experts=32, sparse=17_000_000, context=256, places=("2:4",),
)  # fmt: skip
TINY = Shape(
    common={
        "model_type": "qwen3", "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
        "max_position_embeddings": 128,
    },
    mixture=LARGE.mixture, experts=16, sparse=600_000, context=32, places=("0:1",), top_k=8,
)  # fmt: skip
