"""What a model costs, counted from its configuration alone: parameters, FLOPs, bytes.

Planner, trainer, engine and receipts all use these functions, so a plan and the receipt after it can differ only where the
run did. Parameters are exact. FLOPs follow the field's convention, which reproduces DeepSeek-V3's published 250 GFLOPs a
trained token: two for every active parameter except the input embedding (a lookup), plus the attention scores and their
weighted sum; softmax, activations and optimiser are left out, and recomputation is not counted (model FLOPs, not hardware's).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from jevons.model.config import ModelConfig


@dataclass(frozen=True)
class Parameters:
    """Parameter counts of a model; all but `mtp` are the main model's.

    Routers' correction biases are buffers, not trained by gradient. As in the counts published for DeepSeek-V3, `total` leaves
    them out (so that it is what a module's parameters sum to), while `active`, `mtp` and the functions below count them.
    """

    total: int
    active: int  # used for one token, with embedding and head
    active_without_embedding: int  # what one token multiplies with; a tied matrix stays in, because it is still the head
    embedding: int
    head: int  # 0 where it is the embedding
    buffers: int  # scalars of e_score_correction_bias in all layers
    mtp: int  # of all MTP modules, which share embedding and head with the main model

    @property
    def non_embedding(self) -> int:
        """Everything but input embedding and head, as model cards count it."""
        return self.total - self.embedding - self.head


def parameters(config: ModelConfig) -> Parameters:
    """Exact parameter counts of a configuration."""
    memory = config.memory_targets
    alike: dict[tuple[bool, bool], list[int]] = {}  # layers with the same parts: each kind is counted once
    for layer in range(config.num_hidden_layers):
        alike.setdefault((config.is_moe(layer), layer in memory), []).append(layer)
    modules = range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers)
    embedding = config.vocab_size * config.hidden_size
    head = 0 if config.tie_word_embeddings else embedding
    outside = embedding + head + config.hidden_size  # and the last norm
    active = outside + sum(len(layers) * layer_parameters(config, layers[0], active=True) for layers in alike.values())
    buffers = sum(len(layers) * correction_biases(config) for (moe, _), layers in alike.items() if moe)
    shared = config.memory_rows * (config.memory_value_dim + config.memory_pre_value_dim) if config.memory_shared else 0
    return Parameters(
        total=outside + shared + sum(len(layers) * layer_parameters(config, layers[0]) for layers in alike.values()) - buffers,
        active=active,
        active_without_embedding=active - head,  # one W * D matrix fewer; with a tied one it was counted once, as the head
        embedding=embedding,
        head=head,
        buffers=buffers,
        mtp=sum(mtp_parameters(config, layer) for layer in modules),
    )


def attention_parameters(config: ModelConfig) -> int:
    """One attention block's projections, biases and inner norms."""
    return _mla_parameters(config) if config.is_mla else _gqa_parameters(config)


def _gqa_parameters(config: ModelConfig) -> int:
    D, H = config.hidden_size, config.head_dim
    query, key_value = config.num_attention_heads * H, config.num_key_value_heads * H
    weights = D * query + 2 * D * key_value + query * D
    biases = config.qkv_bias * (query + 2 * key_value) + config.o_bias * D
    return weights + biases + config.qk_norm * 2 * H


def _mla_parameters(config: ModelConfig) -> int:
    assert config.kv_lora_rank is not None
    D, N, C, R = config.hidden_size, config.num_attention_heads, config.kv_lora_rank, config.qk_rope_head_dim
    bias = config.attention_bias  # on q_a, kv_a and o; never on the projections out of a latent, nor on an undivided q_proj
    if config.q_lora_rank is None:
        query = D * N * config.qk_head_dim
    else:
        rank = config.q_lora_rank
        query = D * rank + bias * rank + rank + rank * N * config.qk_head_dim
    latent = D * (C + R) + bias * (C + R) + C
    expand = C * N * (config.qk_nope_head_dim + config.v_head_dim)
    out = N * config.v_head_dim * D + bias * D
    return query + latent + expand + out


def swiglu_parameters(config: ModelConfig, width: int) -> int:
    """A dense feed-forward, or the shared experts, of this inner width: gate, up and down."""
    return 3 * config.hidden_size * width + config.mlp_bias * (2 * width + config.hidden_size)


def moe_parameters(config: ModelConfig, *, active: bool = False) -> int:
    """Router, routed experts (all, or those that one token uses) and shared experts, which are one SwiGLU."""
    experts = config.num_experts_per_tok if active else config.n_routed_experts
    router = config.n_routed_experts * config.hidden_size + correction_biases(config)
    routed = experts * 3 * config.hidden_size * config.moe_intermediate_size
    shared = swiglu_parameters(config, config.n_shared_experts * config.moe_intermediate_size) if config.n_shared_experts else 0
    return router + routed + shared


def correction_biases(config: ModelConfig) -> int:
    """Scalars of one router's e_score_correction_bias, the buffer of loss-free balancing."""
    return config.n_routed_experts if config.has_correction_bias else 0


def layer_parameters(config: ModelConfig, layer: int, *, active: bool = False) -> int:
    """One decoder layer with its two norms; `active` counts only what one token uses."""
    if config.is_moe(layer):
        feed_forward = moe_parameters(config, active=active)
    else:
        feed_forward = swiglu_parameters(config, config.intermediate_size)
    memory = memory_parameters(config, active=active) if layer in config.memory_targets else 0
    return attention_parameters(config) + feed_forward + memory + 2 * config.hidden_size


def memory_parameters(config: ModelConfig, *, active: bool = False) -> int:
    """One memory layer (model/ultramem.py) with its own table of values, or, if `active`, the rows that one token looks up.

    UltraMemV2's table belongs to no layer; `parameters` counts it once.
    """
    D, H, R, Y = config.hidden_size, config.memory_heads, config.memory_rank, config.memory_key_dim
    V, P = config.memory_value_dim, config.memory_pre_value_dim
    queries = 2 * R if config.memory_shared else 2
    search = D * queries * Y + 2 * Y + 2 * H * config.memory_side * R * Y + config.memory_cores * H * R * R
    project = D * P + (V if config.memory_shared else config.memory_expansion * V) * D
    rows = H * config.memory_top_k if active else 0 if config.memory_shared else config.memory_rows
    return search + project + rows * (V + P)


def memory_flops(config: ModelConfig) -> int:
    """Forward FLOPs of one token in one memory layer: query, keys, candidates, rows (an addition a value, as published), projection."""
    D, H, R, Y, M = config.hidden_size, config.memory_heads, config.memory_rank, config.memory_key_dim, config.memory_top_k
    V, P = config.memory_value_dim, config.memory_pre_value_dim
    query = 2 * D * (2 * R if config.memory_shared else 2) * Y
    keys = 2 * H * 2 * config.memory_side * Y * R
    candidates = 2 * H * M**2 * R**2 * config.memory_cores
    rows = M * H * (V + 2 * P)
    return query + keys + candidates + rows + 2 * (V if config.memory_shared else config.memory_expansion * V) * D + 2 * D * P


def distinct(drawn: float, among: int) -> float:
    """How many different ones are expected among `drawn` uniform draws: rows that a batch of tokens really reads, or experts."""
    return among * -math.expm1(drawn * math.log1p(-1 / among)) if among > 1 else float(drawn > 0)


def memory_read(config: ModelConfig, tokens: float) -> float:
    """Scalars of the tables that a step of this many tokens is expected to read in all memory layers, were rows chosen uniformly.

    Rows that several tokens chose are read once. Real choices are not uniform, so this is the most; measure where it matters.
    """
    rows = distinct(tokens * config.memory_heads * config.memory_top_k, config.memory_window)
    return len(config.memory_layers) * rows * (config.memory_value_dim + config.memory_pre_value_dim)


def mtp_parameters(config: ModelConfig, layer: int, *, active: bool = False) -> int:
    """One MTP module: eh_proj, the norms of embedding, hidden state and output, and a decoder layer."""
    D = config.hidden_size
    return 2 * D * D + 3 * D + layer_parameters(config, layer, active=active)


def attention_flops(config: ModelConfig, context: float, layers: int) -> float:
    """Scores and weighted sum of one token over `context` keys, per-head keys and values (not absorbed)."""
    value = config.v_head_dim if config.is_mla else config.head_dim
    return layers * 2 * config.num_attention_heads * (config.qk_head_dim + value) * context


def multiply_flops(config: ModelConfig) -> int:
    """Forward FLOPs of one token outside attention's scores: two for every active parameter, memory layers by their own count."""
    searched = len(config.memory_layers) * (memory_flops(config) - 2 * memory_parameters(config, active=True))
    return 2 * parameters(config).active_without_embedding + (searched if config.memory_layers else 0)


def forward_flops(config: ModelConfig, context: float, *, head: bool = True, mtp: bool = False) -> float:
    """Forward FLOPs of one token that attends to `context` keys on average.

    `head=False` leaves the output projection out; `mtp=True` adds the MTP modules, each with its own pass through the head.
    """
    head_flops = 2 * config.vocab_size * config.hidden_size
    flops = multiply_flops(config) + attention_flops(config, context, config.num_hidden_layers)
    if mtp:
        for module in range(config.num_nextn_predict_layers):
            flops += 2 * mtp_parameters(config, config.num_hidden_layers + module, active=True) + head_flops
            flops += attention_flops(config, context, 1)
    return flops if head else flops - head_flops * (1 + mtp * config.num_nextn_predict_layers)


def train_flops(config: ModelConfig, sequence_length: float, *, mtp: bool | None = None) -> float:
    """Training FLOPs of one token, forward and backward, in causal sequences of this length (mean context: half of it).

    `mtp=None` counts the MTP modules where the configuration has them. Published figures such as V3's 250 GFLOPs leave
    them out: pass False to compare.
    """
    if mtp is None:
        mtp = config.num_nextn_predict_layers > 0
    return 3 * forward_flops(config, sequence_length / 2, mtp=mtp)


def prefill_flops(config: ModelConfig, tokens: int, cached: int = 0) -> float:
    """FLOPs of reading a whole prompt of `tokens`, of which the first `cached` are taken from the cache.

    The head runs on the last token alone.
    """
    if not 0 <= cached < tokens:
        raise ValueError(f"cached: must be at least 0 and below tokens {tokens}, is {cached}")
    body = (tokens - cached) * forward_flops(config, (cached + tokens) / 2, head=False)
    return body + 2 * config.vocab_size * config.hidden_size


def decode_flops(config: ModelConfig, context: float, absorbed: bool = True) -> float:
    """FLOPs of generating one token over `context` cached tokens.

    MLA only: absorbed, queries meet the cached latents themselves (width C + R for scores, C for values); otherwise every
    step expands the whole context's latents into per-head keys and values first. GQA has one form, whichever is asked.
    """
    if not config.is_mla:
        return forward_flops(config, context)
    assert config.kv_lora_rank is not None
    N, C, R = config.num_attention_heads, config.kv_lora_rank, config.qk_rope_head_dim
    if absorbed:  # the absorbed projections cost what kv_b_proj does for one token, which the parameters' term already counts
        return multiply_flops(config) + config.num_hidden_layers * 2 * N * (C + R + C) * context
    expand = config.num_hidden_layers * 2 * C * N * (config.qk_nope_head_dim + config.v_head_dim) * context
    return forward_flops(config, context) + expand


def weight_bytes(config: ModelConfig, bytes_per_parameter: float, *, mtp: bool = False) -> float:
    """Memory of the weights in a format of this many bytes a parameter (0.5 for int4), without its scales."""
    counts = parameters(config)
    return (counts.total + (counts.mtp if mtp else 0)) * bytes_per_parameter


def cache_bytes_per_token(config: ModelConfig, bytes_per_scalar: float = 2) -> float:
    """Cache of one token over all layers: a latent and a shared rope key for MLA, keys and values for GQA."""
    if config.is_mla:
        assert config.kv_lora_rank is not None
        scalars = config.kv_lora_rank + config.qk_rope_head_dim
    else:
        scalars = 2 * config.num_key_value_heads * config.head_dim
    return config.num_hidden_layers * scalars * bytes_per_scalar
