"""Lookups in a table: native, torch's and dense ones agree; gradients and optimizer steps touch what was looked up and nothing else."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from jevons.data.batch import pack
from jevons.engine.engine import Engine
from jevons.engine.memory import NativeMemory
from jevons.engine.packed import pack_model
from jevons.engine.sequence import SamplingParams
from jevons.kernels import compiler, memory, native
from jevons.kernels.memory import lookup, lookup_reference, project, rows_of, select, select_reference, sorted_rows
from jevons.kernels.quantize import HERE
from jevons.model.attend import Packed
from jevons.model.config import ModelConfig
from jevons.model.transformer import Transformer
from jevons.model.ultramem import Table
from jevons.train.loss import next_token
from jevons.train.optimizer import Optimizer
from jevons.train.trainer import Trainer, attention

BELOW = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}  # of the largest


@pytest.fixture(params=["native", "torch"])
def way(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(memory, "is_native", lambda x: False)
        monkeypatch.setattr(memory, "PIECE", 500)  # several pieces
    elif compiler.load().functions is None:
        pytest.skip(compiler.load().reason)


def close(got, want, dtype):
    """`want` is in fp64."""
    assert got.shape == want.shape
    assert float((got.detach().double() - want.detach()).abs().max()) <= BELOW[dtype] * float(want.detach().abs().max())


def exact(*tensors):
    return [x.detach().double().requires_grad_() for x in tensors]


def picks(T, X, Z, V, C, E, dtype, seed=0):
    g = torch.Generator().manual_seed(seed + T)
    values = torch.randn(Z, V, generator=g).to(dtype).requires_grad_()
    rows, blocks = torch.randint(Z, (T, X), generator=g), torch.randint(E, (T, X), generator=g)
    weights = torch.randn(T, X, C, generator=g, dtype=torch.promote_types(dtype, torch.float32)).requires_grad_()
    return values, rows, blocks, weights, torch.randn(T, E * V, generator=g).to(dtype)


@pytest.mark.parametrize("dtype", BELOW)
@pytest.mark.parametrize("T", [0, 1, 2, 5, 64])
def test_a_lookup_and_its_gradients_are_the_dense_reference(way, T, dtype):
    for X, Z, V, C, E in ((3, 100, 16, 2, 4), (9, 7, 33, 3, 1), (20, 50, 70, 2, 9)):  # few rows, so many a token picks twice
        values, rows, blocks, weights, push = picks(T, X, Z, V, C, E, dtype)
        leaves = exact(values, weights)
        want = lookup_reference(leaves[0], rows, blocks, leaves[1], E)
        dense = torch.autograd.grad(want, leaves, push.double())
        got = lookup(values, rows, blocks, weights, E)
        got.backward(push)
        assert got.dtype == dtype and values.grad.is_sparse and weights.grad.dtype == weights.dtype
        found = sorted_rows(values.grad)
        assert found.is_coalesced() and torch.equal(found.indices()[0], rows.unique()) and found.values().dtype == dtype
        for a, b in ((got, want), (found.to_dense(), dense[0]), (weights.grad, dense[1])) if T else ():
            close(a, b, dtype)


@pytest.mark.parametrize("dtype", BELOW)
def test_a_projection_and_its_gradients_are_the_dense_reference(way, dtype):
    values, rows, _, _, x = picks(17, 9, 20, 24, 1, 1, dtype)
    leaves = exact(values, x.requires_grad_())
    want = torch.einsum("txv,tv->tx", leaves[0][rows], leaves[1])
    got, push = project(values, rows, x), torch.rand(want.shape, generator=torch.Generator().manual_seed(0))
    gradients = torch.autograd.grad(got, (values, x), push.to(got.dtype))
    for a, b in zip((got, *gradients), (want, *torch.autograd.grad(want, leaves, push.double()))):
        close(a.to_dense() if a.is_sparse else a, b, dtype)


def test_a_token_is_looked_up_alike_whatever_is_beside_it_and_by_any_number_of_threads(way):
    values, rows, blocks, weights, _ = picks(64, 20, 500, 384, 2, 4, torch.float32)
    want, before = lookup(values, rows, blocks, weights, 4), torch.get_num_threads()
    assert torch.equal(torch.cat([lookup(values, rows[t : t + 1], blocks[t : t + 1], weights[t : t + 1], 4) for t in range(64)]), want)
    try:
        torch.set_num_threads(1)
        assert torch.equal(lookup(values, rows, blocks, weights, 4), want)
    finally:
        torch.set_num_threads(before)


def test_a_row_that_is_not_there_is_an_error(way):
    values, rows, blocks, weights, _ = picks(4, 5, 10, 8, 2, 4, torch.float32)
    for bad in (-1, 10):
        with pytest.raises(IndexError):
            lookup(values, torch.where(rows == rows[0, 0], bad, rows), blocks, weights, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 1, 5, 1, 5), (4, 2, 37, 2, 6), (6, 2, 1616, 2, 80), (2, 1, 300, 3, 1)])
def test_the_best_keys_are_found_as_torch_finds_them(shape, dtype):
    T, H, N, R, M = shape
    g = torch.Generator().manual_seed(N)
    row, column = (torch.randn(T, H, N, R, generator=g).to(dtype) for _ in range(2))
    u, v, core = torch.rand(H, R, generator=g), torch.randn(H, R, generator=g), torch.rand(H, R, R, generator=g)
    pairs = [torch.stack(found(row, column, u, v, core, M)) for found in (select, select_reference)]
    scores = []
    for a, b in pairs:
        assert int(a.max()) < N and all(len(set(zip(x, y))) == M for x, y in zip(a.flatten(0, 1).tolist(), b.flatten(0, 1).tolist()))
        left, right = (x.float().gather(2, i[..., None].expand(-1, -1, -1, R)) for x, i in ((row, a), (column, b)))
        scores.append(torch.einsum("thmr,hrs,thms->thm", left, core, right))
    close(scores[0], scores[1].double(), torch.float32)  # the same ones in the same order, but for ties
    assert dtype != torch.float32 or torch.equal(*pairs)


def test_scores_that_are_equal_or_no_numbers_still_choose_m_different_keys():
    T, H, N, R, M = 2, 1, 200, 2, 8
    for filled in (0.0, float("nan"), float("inf"), -float("inf")):
        row = torch.full((T, H, N, R), filled)
        row[1, 0, 5] = 1.0
        a, b = select(row, torch.ones(T, H, N, R), torch.ones(H, R), torch.ones(H, R), torch.eye(R).expand(H, R, R), M)
        for x, y in zip(a.flatten(0, 1).tolist(), b.flatten(0, 1).tolist()):
            assert len(set(zip(x, y))) == M and min(x + y) >= 0 and max(x + y) < N


# --- the optimizer on tables ---

CONFIG = ModelConfig(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    model_type="qwen3", head_dim=8, max_position_embeddings=128, memory_layers=("0:1", "1:2"), memory_keys=20, memory_key_dim=16,
    memory_value_dim=16, memory_top_k=4,
)  # fmt: skip


def made(config=CONFIG, dtype=torch.float32):
    model = Transformer(config)
    model.init_weights(torch.Generator().manual_seed(0))
    return model.to(dtype)


def text(rows, length=9, seed=0):
    g = torch.Generator().manual_seed(seed)
    documents = [torch.randint(61, (length + 1,), generator=g).numpy() for _ in range(rows)]
    return [pack([(d, np.ones(length + 1))]) for d in documents], pack([(d, np.ones(length + 1)) for d in documents])


def memories(model):
    return {i: layer.memory for i, layer in enumerate(model.model.layers) if layer.memory is not None}


def looked_up(model, batches):
    """The rows of each table that these batches' tokens pick."""
    found = {}
    for memory_layer in memories(model).values():
        look = memory_layer.look

        def watched(x, look=look, memory_layer=memory_layer):
            result = look(x)
            found.setdefault(memory_layer, []).append(result.rows_TX.flatten())
            return result

        memory_layer.look = watched
    with torch.no_grad():
        for batch in batches:
            model(batch.tokens_T, batch.positions_T, attention(batch, torch.device("cpu")))
    for memory_layer in memories(model).values():
        del memory_layer.look
    return {m: torch.cat(rows).unique() for m, rows in found.items()}


def tables(model):
    return {name: p for name, p in model.named_parameters() if name.endswith("values.weight")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_changes_the_rows_that_were_looked_up_and_no_others(way, dtype):
    model, (batches, _) = made(dtype=dtype), text(2)
    wanted = {f"model.layers.{i}.memory.values.weight": rows for i, rows in zip(memories(model), looked_up(model, batches).values())}
    trainer = Trainer(model)
    before = {n: p.detach().clone() for n, p in tables(model).items()}
    trainer.forward_backward(batches, next_token)
    for name, gradient in zip(trainer.optimizer.names, trainer.optimizer.gradients):
        assert gradient.is_sparse == (name in wanted)
        if gradient.is_sparse:
            rows, width = wanted[name], gradient.shape[1]
            assert torch.equal(gradient.indices()[0], rows) and 0 < len(rows) < len(gradient)
            assert gradient.values().nbytes == len(rows) * width * 4  # summed in fp32 over two micro-batches
    masters = {n: m.clone() for n, m in zip(trainer.optimizer.names, trainer.optimizer.masters) if n in wanted}
    pushed = {n: g.indices()[0][g.values().any(1)] for n, g in zip(trainer.optimizer.names, trainer.optimizer.gradients) if n in wanted}
    trainer.step(1e-2)
    state = trainer.optimizer.state()
    for name, rows in wanted.items():
        changed = {
            "parameter": tables(model)[name] != before[name],
            "master": state[f"master.{name}"] != masters[name],
            "first": state[f"exp_avg.{name}"] != 0,
            "second": state[f"exp_avg_sq.{name}"] != 0,
        }
        for what, where in changed.items():
            # no loss pushes on the last token's rows: they decay, in bf16 by less than what is rounded away
            touched = rows if what == "master" or (what == "parameter" and dtype == torch.float32) else pushed[name]
            assert torch.equal(where.any(1).nonzero().squeeze(1), touched) and len(pushed[name]) > 0.8 * len(rows), what
            assert int(where.sum()) > 0.9 * len(touched) * where.shape[1], what  # whole rows, but for what was rounded away


class Held(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.table, self.other = Table(9, 6), nn.Linear(6, 6, bias=False)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(3)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_where_every_row_is_touched_a_step_is_adamw_on_the_whole_table(way, dtype, assert_close):
    sparse, dense = Held(dtype), Held(dtype)
    a, b = Optimizer(sparse, clip=0.5), Optimizer(dense, clip=0.5)
    b.is_table = [False, False]
    for step in range(4):
        g = torch.Generator().manual_seed(step)
        for model in (sparse, dense):
            g.manual_seed(step)
            model.other.weight.grad = torch.randn(6, 6, generator=g).to(dtype)
            gradient = torch.randn(9, 6, generator=g).to(dtype)
            model.table.weight.grad = rows_of(torch.arange(9), gradient, gradient.shape) if model is sparse else gradient
        for optimizer in (a, b):
            optimizer.accumulate()
        assert_close(a.gradient_norm(), b.gradient_norm())
        for optimizer in (a, b):
            optimizer.step(1e-2, optimizer.gradient_norm())
    for name, got in a.state().items():
        assert_close(got, b.state()[name])
    assert_close(sparse.table.weight, dense.table.weight)


def test_a_table_that_no_token_looked_into_stands_still(way):
    model = Held(torch.float32)
    optimizer, before = Optimizer(model), model.table.weight.detach().clone()
    for _ in range(2):
        model.other.weight.grad = torch.ones(6, 6)
        optimizer.accumulate()
    optimizer.step(1e-2, optimizer.gradient_norm())
    assert torch.equal(model.table.weight, before) and not optimizer.state()["exp_avg.table.weight"].any()


def test_sums_over_micro_batches_equal_one_large_batch(way, assert_close):
    apart, whole = (Trainer(made()) for _ in range(2))
    batches, together = text(3)
    for trainer, parts in ((apart, batches), (whole, [together])):
        trainer.forward_backward(parts, next_token)
    assert_close(apart.optimizer.gradient_norm(), whole.optimizer.gradient_norm())
    for name, a, b in zip(apart.optimizer.names, apart.optimizer.gradients, whole.optimizer.gradients):
        assert a.is_sparse == b.is_sparse == (name in tables(apart.model))
        if a.is_sparse:
            assert torch.equal(a.indices(), b.indices())
        assert_close(a.to_dense(), b.to_dense())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_is_bit_identical(way, dtype, tmp_path):
    batches, _ = text(8)
    whole = Trainer(made(dtype=dtype))
    for i in range(4):
        whole.forward_backward(batches[2 * i : 2 * i + 2], next_token)
        whole.step(1e-2, 2.0)
        if i == 1:
            whole.save(tmp_path, {})
    resumed = Trainer(made(dtype=dtype))
    resumed.load(tmp_path)
    for i in (2, 3):
        resumed.forward_backward(batches[2 * i : 2 * i + 2], next_token)
        resumed.step(1e-2, 2.0)
    for (name, a), (_, b) in zip(whole.model.state_dict().items(), resumed.model.state_dict().items()):
        assert torch.equal(a, b), name
    for name, value in whole.optimizer.state().items():
        assert torch.equal(value, resumed.optimizer.state()[name]), name


# --- the engine ---

ENGINE = replace(CONFIG, memory_keys=24, memory_key_dim=12, memory_value_dim=20, memory_cores=4, memory_rank=3, memory_top_k=7)
NATIVE = pytest.mark.skipif(compiler.load().functions is None, reason=compiler.load().reason or "available")
PROMPTS = [random.Random(i).choices(range(61), k=n) for i, n in enumerate((30, 3, 17, 1, 45, 8))]


@NATIVE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_memory_layer_in_one_call_is_its_module(dtype):
    module = made(ENGINE, dtype).model.layers[0].memory
    run = NativeMemory(module, HERE)
    assert run.nbytes > module.values.weight.nbytes
    x = torch.randn(400, 32, generator=torch.Generator().manual_seed(5)).to(dtype)  # several blocks of tokens
    want, found = module(x), module.look(x).rows_TX
    whole = run(x)
    if dtype == torch.float32:
        assert float((whole - want).norm() / want.norm()) < 1e-5
        assert torch.equal(run.rows_TX.sort().values, found.sort().values)
    else:  # what is rounded may choose other rows: of most tokens the choice is the same, and then so is the output
        alike = (run.rows_TX.sort().values == found.sort().values).all(1)
        assert alike.float().mean() > 0.5 and float((whole - want)[alike].norm() / want[alike].norm()) < 1.5e-2
    for T in (1, 2, 3, 4, 7, 16, 33, 64):
        assert torch.equal(run(x[:T]), whole[:T]), T  # whatever is beside it


@NATIVE
@torch.no_grad()
def test_new_weights_are_seen_after_a_refresh():
    module = made(ENGINE).model.layers[0].memory
    run, x = NativeMemory(module, HERE), torch.randn(9, 32, generator=torch.Generator().manual_seed(5))
    before = run(x)
    for i, parameter in enumerate(module.parameters()):
        parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)), alpha=0.1)
    module.update_vectors()
    run.refresh()
    assert torch.equal(run(x), NativeMemory(module, HERE)(x)) and not torch.equal(run(x), before)


def same(a, b):
    assert a.tokens == b.tokens
    torch.testing.assert_close(torch.tensor(a.raw_logps), torch.tensor(b.raw_logps), rtol=1e-4, atol=1e-4)


def test_an_engine_with_native_memory_says_what_the_modules_say():
    model = made(ENGINE).requires_grad_(False)
    params = SamplingParams(max_tokens=12, seed=1, temperature=0.8)
    engine, plain = Engine(model), Engine(model, use_native=False)
    for version in (1, 2):
        want = plain.generate(PROMPTS, params)
        for got, expected in zip(engine.generate(PROMPTS, params), want):
            same(got, expected)
        small = Engine(model, max_batch_tokens=19, max_sequences=6, block_size=4, num_blocks=20)  # prompts in pieces, too little cache
        for got, expected in zip(small.generate(PROMPTS, params), want):
            same(got, expected)
        tokens = torch.tensor(PROMPTS[0] + want[0].tokens)  # the cache against all at once
        hidden = model(tokens, torch.arange(len(tokens)), Packed(torch.tensor([0, len(tokens)]))).hidden_TD
        logps = model.logits(hidden).log_softmax(-1)[len(PROMPTS[0]) - 1 : -1].gather(1, torch.tensor(want[0].tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(want[0].raw_logps), logps, rtol=1e-4, atol=1e-4)
        assert all(memory_layer.native is None for memory_layer in memories(model).values())
        with torch.no_grad():
            for i, parameter in enumerate(model.parameters()):
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)), alpha=0.02)
        for memory_layer in memories(model).values():
            memory_layer.update_vectors()
        engine.new_weights(version), plain.new_weights(version)


@pytest.mark.skipif(not native.available(), reason=native.reason() or "available")
@pytest.mark.parametrize("format", ["fp32", "bf16", "int8"])
def test_packed_weights_keep_their_tables(format):
    dtype = torch.float32 if format == "fp32" else torch.bfloat16
    packed, plain = (made(ENGINE, dtype).requires_grad_(False) for _ in range(2))
    size = pack_model(packed, format)
    assert size > sum(p.nbytes for p in tables(plain).values()) and all(torch.equal(p, tables(packed)[n]) for n, p in tables(plain).items())
    params = SamplingParams(max_tokens=8, temperature=0)
    ours, theirs = (Engine(m).generate(PROMPTS, params) for m in (packed, plain))
    for a, b in zip(ours, theirs):
        if format == "fp32":
            same(a, b)
        assert abs(a.raw_logps[0] - b.raw_logps[0]) < 0.3
