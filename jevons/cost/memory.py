"""Memory of training, counted from a configuration: weights, gradients, masters and moments, activations, logits, cache.

    training_memory(config, tokens=8192, micro_batches=4).total        bytes on one device
    smallest_change(trial, room, ...)                                  what makes a plan fit, the least first

Problem: runs die of memory an hour in, and sixteen bytes a parameter are only half of the answer. Approach: what the trainer holds,
tensor by tensor. Activations are what autograd saves in this model (model/, kernels/), layer by layer; tests/test_plan.py counts
them in real steps. At its highest, memory is that of the end of the forward pass or that of the end of the backward pass: gradients
appear while activations go, so both are never there in full.

Several devices are counted as if weights, gradients and optimizer were dealt out evenly (ZeRO, arXiv 1910.02054, and expert
parallelism): a bound, since this trainer has one device. What a process on a CPU has beside that is not counted but fitted: its own size
and the freed blocks that it keeps (docs/LOG.md). Not done: fragmentation on GPUs, buffers of communication, pipelines, activations in
other formats than the weights'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields

from jevons.cost.arithmetic import cache_bytes_per_token, memory_read, parameters
from jevons.model.config import ModelConfig

MOMENTS = 8  # bytes a parameter of AdamW's two, in fp32
CHUNK_ELEMENTS, CHUNK_ROWS = 2**22, 256  # logits at work in kernels/cross_entropy.py
KEPT_LOGITS, BLOCK_ELEMENTS = 2**29, 2**21  # in kernels/log_prob.py
PROCESS = {2: 0.6e9, 4: 0.37e9}  # bytes of a process itself on a CPU, by those of a scalar: in bf16 oneDNN keeps what it made
CONTEXT = 0.6e9  # of one with a GPU
KEPT = 0.5  # of activations and logits: freed blocks on a CPU that fit nothing later, where experts' rows differ from step to step
PADDING = 1.2  # rows that experts compute in bf16 on a CPU for one that they were given: kernels/experts.py fills groups up
TARGETS = ("attention", "mlp", "experts")


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, each part at its own highest; `reused` is what gradients take over from activations by then."""

    weights: float
    gradients: float
    moments: float  # AdamW's, and the fp32 masters
    activations: float
    logits: float  # of the loss, with the head's gradient in fp32
    cache: float = 0.0  # of keys and values
    other: float = 0.0  # the process or context itself, a second model
    freed: float = 0.0  # blocks that nobody uses and the process keeps
    reused: float = 0.0

    @property
    def total(self) -> float:
        return sum(getattr(self, f.name) for f in fields(self) if f.name != "reused") - self.reused


def training_memory(
    config: ModelConfig,
    *,
    tokens: float,
    dtype_bytes: int = 2,
    recompute: bool = False,
    micro_batches: int = 1,
    devices: int = 1,
    lora_rank: int | None = None,
    lora_targets: Sequence[str] = TARGETS,
    mtp: bool = True,
    loss: str = "cross_entropy",
    cpu: bool = False,
    cache: float = 0.0,
    other: float = 0.0,
) -> Memory:
    """What a step takes whose micro-batches have so many tokens on each device.

    `mtp`: whether modules for multi-token prediction are trained (where there are any). `loss`: cross_entropy (pretraining) or log_probs
    (fine-tuning, reinforcement learning). `cpu`: with the native kernels, which keep less. `cache` and `other` are added as they are.
    """
    counts = parameters(config)
    held = counts.total + counts.buffers + counts.mtp
    trained: float = counts.total + (counts.mtp if mtp else 0)
    if lora_rank is not None:
        trained = adapter_parameters(config, lora_rank, lora_targets)
        held += trained
    # rows of memory tables get gradients where they were looked up, and nowhere else
    table = 0 if lora_rank is not None or not config.memory_layers else _table(config)
    dense, touched = trained - table, memory_read(config, tokens) if table else 0
    # from the second micro-batch on sums are kept, in fp32, beside the gradients that the backward pass makes
    made, kept = (dense + touched) * dtype_bytes, (dense + touched) * 4 * (micro_batches > 1)
    depth = config.num_nextn_predict_layers if mtp else 0
    layers = [layer_activations(config, i, dtype_bytes, cpu=cpu, lora_rank=lora_rank) for i in range(config.num_hidden_layers + depth)]
    stream = config.hidden_size * dtype_bytes
    saved = len(layers) * stream + max(layers) if recompute else sum(layers)
    saved += (1 + depth) * _norm(config.hidden_size, dtype_bytes, cpu)  # before the head
    saved += depth * (2 * _norm(config.hidden_size, dtype_bytes, cpu) + 2 * stream)  # what a module joins
    activations = tokens * saved
    logits = _logits(config, tokens, dtype_bytes, loss, 1 + depth, head=lora_rank is None)
    # the loss is at work while all activations are there; later a layer's backward pass needs about what its forward pass saved
    logits = max(logits, tokens * max(layers))
    mixed = cpu and any(config.is_moe(layer) for layer in range(config.num_hidden_layers))
    return Memory(
        weights=held * dtype_bytes / devices,
        gradients=(made + kept) / devices,
        moments=trained * (MOMENTS + (4 if dtype_bytes < 4 else 0)) / devices,
        activations=activations,
        logits=logits,
        cache=cache,
        other=other,
        freed=KEPT * (activations + logits) * mixed,
        reused=min(made / devices, activations + logits),
    )


def layer_activations(config: ModelConfig, layer: int, dtype_bytes: int = 2, *, cpu: bool = False, lora_rank: int | None = None) -> float:
    """Bytes a token that autograd saves in one decoder layer."""
    D, N, b = config.hidden_size, config.num_attention_heads, dtype_bytes
    saved = 2 * (_norm(D, b, cpu) + D * b)  # both norms, and what they give to the products after them
    if config.is_mla:
        assert config.kv_lora_rank is not None
        C, H, V = config.kv_lora_rank, config.qk_head_dim, config.v_head_dim
        saved += sum(_norm(rank, b, cpu) + rank * b for rank in (config.q_lora_rank, C) if rank)
        # values and output are padded to the queries' width for torch's GPU attention, and the output's own part copied
        saved += (2 * N * (H + V) if cpu else 4 * N * H + (N * V if V != H else 0)) * b
    else:
        M, H = config.num_key_value_heads, config.head_dim
        repeated = M if cpu else N  # torch's GPU attention gets keys and values for every head
        saved += (2 * N + 2 * repeated) * H * b
        if config.qk_norm:
            saved += _norm((N + M) * H, b, cpu)
    saved += 0 if cpu else 4 * N  # the softmax's normalisers
    if config.is_moe(layer):
        E, K, F = config.n_routed_experts, config.num_experts_per_tok, config.moe_intermediate_size
        rows = K * (PADDING if cpu and b < 4 else 1)
        saved += 4 * D + 4 * E + 20 * K  # the router's, in fp32
        saved += rows * (2 * F * b + 16 + b) + (3 if cpu else 4) * config.n_shared_experts * F * b
        if lora_rank is not None:  # plain products instead of one fused function: its rows, and what it makes of them in between
            saved += rows * (D + 3 * F + 3 * lora_rank) * b
    else:
        saved += (3 if cpu else 4) * config.intermediate_size * b  # gate, up, their product, on a GPU also the gate's SiLU
    if layer in config.memory_targets:
        picks = config.memory_heads * config.memory_top_k  # their indices, numbers of both sides, scores
        saved += picks * (32 + 4 * (2 * config.memory_rank + config.memory_cores)) + config.memory_expansion * config.memory_value_dim * b
    return saved


def _table(config: ModelConfig) -> int:
    """Scalars of the values of all memory layers."""
    tables = 1 if config.memory_shared else len(config.memory_layers)
    return tables * config.memory_rows * (config.memory_value_dim + config.memory_pre_value_dim)


def _norm(width: int, dtype_bytes: int, cpu: bool) -> float:
    """A norm's input, and on a GPU each row's scale."""
    return width * dtype_bytes + (0 if cpu else 4)


def _logits(config: ModelConfig, tokens: float, b: int, loss: str, heads: int, *, head: bool) -> float:
    """Of the loss at work, with the gradients that it holds: of hidden states and, where the `head` is trained, of it."""
    W, D = config.vocab_size, config.hidden_size
    hidden = tokens * D * b
    if loss == "log_probs":
        return hidden + min(tokens * W * b, KEPT_LOGITS) + 3 * 4 * BLOCK_ELEMENTS + head * W * D * b
    assert loss == "cross_entropy", loss
    rows = min(tokens, max(CHUNK_ROWS, CHUNK_ELEMENTS // W))
    working = max(rows * W * (8 + b) + head * W * D * b, head * W * D * (4 + b))  # a chunk, or the backward pass that scales the head's
    return heads * (hidden + head * 4 * W * D) + working


def adapter_parameters(config: ModelConfig, rank: int, targets: Iterable[str] = TARGETS, *, active: bool = False) -> int:
    """Of the low-rank adapters that train/lora.py adds, A (rank, in) and B (out, rank) each; `active`: those of one token."""
    D, N, total = config.hidden_size, config.num_attention_heads, 0
    if config.is_mla:
        assert config.kv_lora_rank is not None
        heads = N * config.qk_head_dim
        query = [(D, config.q_lora_rank), (config.q_lora_rank, heads)] if config.q_lora_rank else [(D, heads)]
        expand = N * (config.qk_nope_head_dim + config.v_head_dim)
        attention = [*query, (D, config.kv_lora_rank + config.qk_rope_head_dim), (config.kv_lora_rank, expand), (N * config.v_head_dim, D)]
    else:
        q, kv = N * config.head_dim, config.num_key_value_heads * config.head_dim
        attention = [(D, q), (D, kv), (D, kv), (q, D)]
    for layer in range(config.num_hidden_layers):
        total += rank * sum(a + b for a, b in attention) * ("attention" in targets)
        width = config.n_shared_experts * config.moe_intermediate_size if config.is_moe(layer) else config.intermediate_size
        total += rank * 3 * (D + width) * ("mlp" in targets and width > 0)
        if config.is_moe(layer) and "experts" in targets:
            experts = config.num_experts_per_tok if active else config.n_routed_experts
            total += rank * 3 * (D + config.moe_intermediate_size) * experts
    return total


def cache_memory(config: ModelConfig, sequences: float, context: float, limit: float = float("inf")) -> float:
    """Keys and values of so many sequences of this length, at most `limit` bytes."""
    return min(sequences * context * cache_bytes_per_token(config), limit)


@dataclass(frozen=True)
class Change:
    """What would make a plan fit, and the memory of a device then."""

    what: str
    memory: float


def smallest_change(trials: Iterable[tuple[str, Callable[[], Memory]]], room: float) -> Change | None:
    """The first of `trials` (what is changed, the memory then), which the caller puts in order of what they cost, that fits; else None."""
    for what, memory in trials:
        if (total := memory().total) <= room:
            return Change(what, total)
    return None
