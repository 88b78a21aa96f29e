"""One decoding step's time, and the bytes that it touched, at growing batches, of one of benchmarks/match.py's models.

Problem: a step of a sparse model is as fast as its bytes, and which bytes depends on what a batch chose. Approach: the engine itself with
random weights, one token a sequence and step; a step is timed from outside, then what its routers and memory layers chose in it is
counted. Prompts are random tokens and so is what is drawn, as identical ones would make a mixture look good. "Warm" steps follow
one another; before a "cold" one something else is read that is larger than the processor's caches. Weights are touched whole but for
experts, rows of values and the embedding, of which what was chosen is; activations are not counted. Not done: prefill.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from match import sparse_parameters
from torch import Tensor, nn

from jevons.cost.arithmetic import cache_bytes_per_token, decode_flops
from jevons.engine.engine import Engine
from jevons.engine.memory import NativeMemory
from jevons.engine.packed import pack_model
from jevons.engine.sequence import SamplingParams
from jevons.kernels import native
from jevons.model.config import ModelConfig
from jevons.model.moe import Router, Routing
from jevons.model.transformer import Transformer
from jevons.model.ultramem import Lookup, UltraMem

PROMPT = 8  # tokens
COLD = 5  # steps
LEAST, MOST = 5, 200  # warm steps


class Chosen(NamedTuple):
    """What the last step chose, a tensor for each router and memory layer in order."""

    experts: list[Tensor]
    rows: list[Tensor]


def watch(model: Transformer) -> Chosen:
    """From now on, what a forward chooses. Whoever reads it clears it."""
    chosen = Chosen([], [])

    def routed(module: nn.Module, arguments: Any, routing: Routing) -> None:
        chosen.experts.append(routing.experts_TK)

    def looked(module: nn.Module, arguments: Any, out: Tensor) -> None:
        if isinstance(module.native, NativeMemory):  # then it is not asked to `look`
            chosen.rows.append(module.native.rows_TX)

    for module in model.modules():
        if isinstance(module, Router):
            module.register_forward_hook(routed)
        elif isinstance(module, UltraMem):
            module.register_forward_hook(looked)
            module.look = _kept(module.look, chosen.rows)  # type: ignore[method-assign]
    return chosen


def _kept(look: Any, rows: list[Tensor]) -> Any:
    def kept(x_TD: Tensor) -> Lookup:
        found = look(x_TD)
        rows.append(found.rows_TX)
        return found

    return kept


def unique(tensors: Sequence[Tensor]) -> list[int]:
    """How many different experts, or rows, each layer reads."""
    return [len(t.unique()) for t in tensors]


def expected_unique(config: ModelConfig, batch: int) -> float:
    """Of one layer, if tokens choose uniformly and independently: N (1 - (1 - k / N)^B)."""
    if config.memory_layers:
        among, each = config.memory_window, config.memory_heads * config.memory_top_k
    else:
        among, each = config.n_routed_experts, config.num_experts_per_tok
    return among * (1 - (1 - each / among) ** batch) if among else 0.0


def expert_bytes(config: ModelConfig, size: int) -> int:
    return 3 * config.hidden_size * config.moe_intermediate_size * size


def row_bytes(config: ModelConfig, size: int) -> int:
    return config.memory_value_dim * size


def make(config: ModelConfig, dtype: torch.dtype, seed: int) -> Transformer:
    """Random weights, drawn in the dtype that they stay in."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = Transformer(config)
    finally:
        torch.set_default_dtype(default)
    model.init_weights(torch.Generator().manual_seed(seed))
    return model


def measure(
    config: ModelConfig, batches: Sequence[int], *, dtype: torch.dtype, seconds: float, flush: int, plain: bool = False, seed: int = 0
) -> dict[str, Any]:
    """By batch: warm and cold milliseconds a step, what was chosen, bytes touched. Each batch gets some `seconds` of warm steps.

    `flush` bytes are read before each cold step; bf16 weights are packed where the native kernels are there, and nothing native runs if
    `plain`.
    """
    model, size = make(config, dtype, seed), dtype.itemsize
    dense = sum(p.numel() for p in model.parameters()) - sparse_parameters(config) - config.vocab_size * config.hidden_size
    packed = dtype == torch.bfloat16 and native.available() and not plain
    if packed:
        pack_model(model, "bf16")
    chosen, rng = watch(model), random.Random(seed)
    engine = Engine(
        model, max_batch_tokens=PROMPT * max(batches), max_sequences=max(batches), share_prefixes=False, stop_ids=(),
        use_native=False if plain else None,
    )  # fmt: skip
    other = torch.ones(flush // 4)
    rows = {}
    room = config.max_position_embeddings - PROMPT  # the first token comes with the prompt, and each kind of step warms up with one
    for batch in batches:
        for _ in range(batch):
            prompt = [rng.randrange(config.vocab_size) for _ in range(PROMPT)]
            engine.submit(prompt, SamplingParams(max_tokens=room, seed=rng.randrange(2**31)))
        engine.step()
        times: dict[str, list[float]] = {"warm": [], "cold": []}
        counts, bytes_ = [], []
        for kind, most, limit in (("warm", min(MOST, room - COLD - 4), seconds), ("cold", COLD, seconds)):
            _timed(engine, batch)  # the first one warms up
            while len(times[kind]) < (LEAST if kind == "warm" else 1) or (len(times[kind]) < most and sum(times[kind]) < limit):
                if kind == "cold":
                    other.sum()
                chosen.experts.clear(), chosen.rows.clear()
                times[kind].append(_timed(engine, batch))
                counts.append((unique(chosen.experts), unique(chosen.rows)))
                context = statistics.mean(s.computed for s in engine.scheduler.running)
                cache = batch * context * cache_bytes_per_token(config, size)
                parts = {"dense": (dense + batch * config.hidden_size) * size, "cache": cache}
                parts["experts"] = sum(counts[-1][0]) * expert_bytes(config, size)
                parts["rows"] = sum(counts[-1][1]) * row_bytes(config, size)
                bytes_.append(parts)
        engine.abort_all()
        mean = {part: statistics.mean(b[part] for b in bytes_) for part in bytes_[0]}
        picked = [statistics.mean(e or r or [0]) for e, r in counts]
        rows[str(batch)] = {
            "median": 1e3 * statistics.median(times["warm"]),
            "p90": 1e3 * _p90(times["warm"]),
            "cold": 1e3 * statistics.median(times["cold"]),
            "steps": len(times["warm"]),
            "unique": statistics.mean(picked),
            "expected_unique": expected_unique(config, batch),
            "bytes": {"total": sum(mean.values()), **mean},
            "flops": batch * decode_flops(config, PROMPT + context / 2),
        }
    return {"batches": rows, "packed": packed}


def _timed(engine: Engine, batch: int) -> float:
    start = time.perf_counter()
    events = engine.step()
    seconds = time.perf_counter() - start
    assert len(events) == batch, (len(events), batch)
    return seconds


def _p90(times: Sequence[float]) -> float:
    return sorted(times)[min(len(times) - 1, int(0.9 * len(times)))]


def pin(threads: int) -> None:
    """This process on the first `threads` processors that it may use, with as many threads."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    torch.set_num_threads(threads)


def machine(dtype: torch.dtype, row: int, table: int) -> dict[str, float]:
    """Best of five: bytes/s that the threads read of `table` bytes, in order, and in rows of `row` bytes at random."""
    whole = torch.ones(table // 4)
    values = torch.ones(table // row, row // dtype.itemsize, dtype=dtype)
    picks = torch.randint(len(values), (50_000,))
    out = torch.empty(len(picks), values.shape[1], dtype=dtype)
    read = min(_seconds(whole.sum) for _ in range(5))
    gather = min(_seconds(lambda: torch.index_select(values, 0, picks, out=out)) for _ in range(5))
    return {"bandwidth": whole.nbytes / read, "gather": out.nbytes / gather}


def _seconds(f: Any) -> float:
    start = time.perf_counter()
    f()
    return time.perf_counter() - start
