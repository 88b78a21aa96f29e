"""Native kernels against torch: products in every format, blocks of a layer, attention over block tables."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from jevons.kernels import adamw, compiler, native, processor
from jevons.kernels.attention import absorbed_attention, causal_attention_ref, row_attention
from jevons.kernels.experts import experts_ref
from jevons.kernels.quantize import FORMATS, pack, pack_kv_b, pack_swiglu
from jevons.model.rope import rotate

pytestmark = pytest.mark.skipif(not native.available(), reason=native.reason() or "available")
# relative error of a product: rounding of sums; of inputs to bf16; of inputs to 8 bits in a group of 128 or 32
CLOSE = {"fp32": 1e-6, "bf16": 4e-3, "int8": 1.2e-2, "int4": 1e-2}
ROUNDING = {"fp32": 1e-6, "bf16": 2e-3, "int8": 1e-2, "int4": 0.12}


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def of(format):
    return torch.float32 if format == "fp32" else torch.bfloat16


def error(got, want):
    return float((got.float() - want.float()).norm() / want.float().norm())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", [(1, 1), (32, 128), (45, 130), (96, 300), (3, 40, 70)])
def test_unpack_is_the_weight_up_to_rounding(format, shape):
    weight = draw(*shape)
    packed = pack(weight, format)
    assert packed.unpack().shape == weight.shape
    assert error(packed.unpack(), weight) <= ROUNDING[format]
    swiglu = pack_swiglu(weight, weight.neg(), format)
    assert torch.allclose(swiglu.unpack(), torch.cat((packed.unpack(), pack(weight.neg(), format).unpack()), dim=-2))


def test_int4_is_no_worse_than_rounding_to_nearest():
    weight = draw(64, 512)
    groups = weight.view(64, -1, 32)
    low, step = groups.amin(-1, keepdim=True), (groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)) / 15
    nearest = ((groups - low) / step).round() * step + low
    assert error(pack(weight, "int4").unpack(), weight) < 0.97 * error(nearest.view_as(weight), weight)


def test_pack_names_what_is_wrong():
    with pytest.raises(ValueError, match="int5"):
        pack(draw(4, 4), "int5")
    with pytest.raises(ValueError, match="inf or NaN"):
        pack(torch.full((4, 4), torch.inf), "int8")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("T", [1, 2, 3, 5, 8, 13, 14, 15, 29, 32, 70, 300])
def test_product_with_packed_is_product_with_unpacked(format, T):
    for N, K in ((64, 256), (45, 130), (33, 61)):
        x, bias, residual = draw(T, K, dtype=of(format)), draw(N), draw(T, N, dtype=of(format), seed=1)
        packed = pack(draw(N, K, seed=2), format, bias)
        want = F.linear(x.double(), packed.unpack().double(), bias.double()) + residual.double()
        got = native.linear(x, packed, residual=residual, threads=2)
        assert got.dtype == x.dtype and error(got, want) <= CLOSE[format]
        assert torch.equal(got, native.linear(x, packed, residual=residual, threads=1))
        assert torch.equal(got[-1:], native.linear(x[-1:], packed, residual=residual[-1:]))  # whatever the batch
        in_place = residual.clone()
        assert native.linear(x, packed, residual=in_place, out=in_place) is in_place and torch.equal(in_place, got)
        logits = native.linear(x, packed, dtype=torch.float32)
        assert error(logits, F.linear(x.double(), packed.unpack().double(), bias.double())) <= CLOSE[format]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T", [1, 4, 6, 7, 8, 13, 14, 15, 32, 70])
def test_product_with_weights_where_they_lie(dtype, T):
    format = "fp32" if dtype == torch.float32 else "bf16"
    for N, K in ((64, 256), (45, 130), (33, 61), (40, 5001)):  # the last in several stretches
        x, a, b, residual = draw(T, K, dtype=dtype), draw(N, K, seed=2, dtype=dtype), draw(7, K, dtype=dtype), draw(T, N + 7, dtype=dtype)
        bias = [draw(N), draw(7, dtype=dtype)]
        here = pack([a, b], "here", bias)
        for change in (0.0, 1.0):  # what changes in place is seen; biases are copies
            a += change
            bias[0] += change
            here.refresh()
            want = F.linear(x.double(), torch.cat((a, b)).double(), torch.cat(bias).double()) + residual.double()
            got = native.linear(x, here, residual=residual, threads=2)
            assert error(got, want) <= CLOSE[format]
        assert torch.equal(got, native.linear(x, here, residual=residual, threads=1))
        assert torch.equal(got[-1:], native.linear(x[-1:], here, residual=residual[-1:]))
        up, bias = draw(N, K, dtype=dtype, seed=3), [draw(N), draw(N, seed=1)]
        swiglu = native.linear(x, pack_swiglu(a, up, "here", *bias))
        gate, value = (F.linear(x.double(), w.double(), b.double()) for w, b in zip((a, up), bias))
        assert error(swiglu, F.silu(gate) * value) <= CLOSE[format]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_where_they_lie(dtype):
    E, D, inner, T = 5, 40, 24, 9
    x, gate_up, down = draw(T, D, dtype=dtype), draw(E, 2 * inner, D, dtype=dtype), draw(E, D, inner, dtype=dtype)
    chosen, weights = draw(T, E).topk(2).indices, draw(T, 2)
    here = pack_swiglu(*gate_up.chunk(2, dim=1), "here"), pack(down, "here")
    want = experts_ref(x.double(), chosen, weights.double(), gate_up.double(), down.double())
    assert error(native.moe(x, chosen, weights, *here), want) <= 3 * CLOSE["fp32" if dtype == torch.float32 else "bf16"]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("T", [1, 5, 37])
def test_mlp(format, T):
    for D, inner in ((64, 96), (50, 37)):
        x, dtype = draw(T, D, dtype=of(format)), of(format)
        gate, up = draw(inner, D, seed=1) / D**0.5, draw(inner, D, seed=2) / D**0.5
        gate_up, down = pack_swiglu(gate, up, format, draw(inner), draw(inner, seed=5)), pack(draw(D, inner, seed=3), format)
        weight = draw(D, seed=4)
        normed = F.rms_norm(x.double(), (D,), weight.double(), 1e-6)
        g, u = (F.linear(normed, gate_up.unpack().double()) + torch.cat((draw(inner), draw(inner, seed=5)))).chunk(2, -1)
        want = F.linear(F.silu(g) * u, down.unpack().double()) + x.double()
        got = native.mlp(x, gate_up, down, norm=native.Norm(weight, 1e-6), residual=x, threads=2)
        assert got.dtype == dtype and error(got, want) <= 2 * CLOSE[format]
        assert torch.equal(got[-1:], native.mlp(x[-1:], gate_up, down, norm=native.Norm(weight, 1e-6), residual=x[-1:]))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("T", [1, 3, 40])
def test_moe(format, T):
    E, K, D, inner = 6, 2, 64, 40
    x, residual = draw(T, D, dtype=of(format)), draw(T, D, dtype=of(format), seed=1)
    gate_up = pack_swiglu(draw(E, inner, D) / 8, draw(E, inner, D, seed=1) / 8, format)
    down = pack(draw(E, D, inner, seed=2), format)
    scores = draw(T, E, seed=3).softmax(-1)
    weights, experts = scores.topk(K, dim=-1)
    want = experts_ref(x.double(), experts, weights.double(), gate_up.unpack().double(), down.unpack().double()) + residual.double()
    got = native.moe(x, experts, weights, gate_up, down, residual=residual, threads=2)
    assert error(got, want) <= 2 * CLOSE[format]
    assert torch.equal(got, native.moe(x, experts, weights, gate_up, down, residual=residual, threads=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [8, 64, 130])
def test_rms_norm(dtype, width):
    x, weight = draw(9, width, dtype=dtype), draw(width, seed=1)
    want = F.rms_norm(x.double(), (width,), weight.double(), 1e-5)
    assert error(native.rms_norm(x, native.Norm(weight, 1e-5)), want) <= (1e-6 if dtype == torch.float32 else 3e-3)


def context(lengths, block):
    """Block tables of sequences in a shuffled pool, and each sequence's slots in order."""
    counts = [-(-n // block) for n in lengths]
    order = torch.randperm(sum(counts) + 3, generator=torch.Generator().manual_seed(0)).tolist()
    tables = torch.zeros(len(lengths), max(counts) + 1, dtype=torch.int32)
    slots = []
    for i, (n, count) in enumerate(zip(lengths, counts)):
        mine = [order.pop() for _ in range(count)]
        tables[i, :count] = torch.tensor(mine)
        slots.append(torch.tensor([mine[t // block] * block + t % block for t in range(n)]))
    return tables, torch.tensor(lengths, dtype=torch.int32), slots, (sum(counts) + 3) * block


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("N", "M", "H"), [(14, 2, 64), (4, 4, 16), (12, 1, 20), (2, 1, 128)])
def test_paged_gqa_is_row_attention(dtype, N, M, H):
    lengths, tolerance = [1, 7, 16, 33, 256, 257, 700], 1e-6 if dtype == torch.float32 else 4e-3
    tables, counts, slots, total = context(lengths, 16)
    keys, values = (draw(total, M, H, dtype=dtype, seed=i) for i in (0, 1))
    unused = torch.ones(total, dtype=torch.bool)
    unused[torch.cat(slots)] = False
    keys[unused], values[unused] = torch.nan, torch.nan  # memory that nobody may read
    q = draw(len(lengths), N + 3, H, dtype=dtype, seed=2)[:, :N]
    got = native.paged_gqa(q, keys, values, tables, counts, 16, H**-0.5, threads=2)
    assert torch.equal(got, native.paged_gqa(q, keys, values, tables, counts, 16, H**-0.5, threads=1))
    for i, slot in enumerate(slots):
        want = row_attention(q[i : i + 1].float(), keys[slot].float()[None], values[slot].float()[None], None, H**-0.5)
        assert error(got[i : i + 1], want) <= tolerance
        alone = native.paged_gqa(q[i : i + 1], keys, values, tables[i : i + 1], counts[i : i + 1], 16, H**-0.5)
        assert torch.equal(alone[0], got[i])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("N", "nope", "rope", "V", "C"), [(3, 16, 8, 24, 40), (12, 64, 64, 64, 512)])
def test_paged_mla_is_absorbed_attention(format, N, nope, rope, V, C):
    lengths, dtype = [1, 5, 32, 300], of(format)
    tables, counts, slots, total = context(lengths, 8)
    memory = draw(total, C + rope, dtype=dtype)
    q, w_kvb = draw(4, N, nope + rope, dtype=dtype), draw(N * (nope + V), C, seed=1) / C**0.5
    w_key, w_value = pack_kv_b(w_kvb, N, nope, format)
    meant = torch.cat((w_key.unpack().mT, w_value.unpack()), dim=1).flatten(0, 1)
    scale = (nope + rope) ** -0.5
    got = native.paged_mla(q, memory, tables, counts, 8, w_key, w_value, scale, threads=2)
    assert torch.equal(got, native.paged_mla(q, memory, tables, counts, 8, w_key, w_value, scale, threads=1))
    for i, slot in enumerate(slots):
        want = absorbed_attention(q[i : i + 1].float(), memory[slot].float()[None], None, meant, V, scale)
        assert error(got[i : i + 1], want) <= 2 * CLOSE[format]


@pytest.mark.parametrize(
    "C, L, N, M, H, V", [(77, 77, 4, 4, 128, 64), (200, 33, 6, 2, 24, 24), (130, 130, 3, 3, 40, 100), (65, 1, 4, 2, 16, 16)]
)
def test_causal_is_causal_attention(C, L, N, M, H, V):
    q, k, v = (draw(C, heads, width, dtype=torch.bfloat16, seed=i) for i, (heads, width) in enumerate(((N, H), (M, H), (M, V))))
    want = causal_attention_ref(q[None], k[None], v[None], H**-0.5)[0, -L:]
    got = native.causal(q[-L:], k, v, H**-0.5, context=C)
    assert error(got, want) < 5e-3
    assert torch.equal(got, native.causal(q[-L:], k, v, H**-0.5, context=C, threads=1))
    if L > 1:  # a query's result is its own
        assert torch.equal(got[-1:], native.causal(q[-1:], k, v, H**-0.5, context=C)[-1:])
    # in blocks in any order, and nobody reads what nobody wrote
    blocks = -(-C // 8)
    table = torch.randperm(blocks + 3, generator=torch.Generator().manual_seed(C))[:blocks].int()
    slots = torch.tensor([int(table[t // 8]) * 8 + t % 8 for t in range(C)])
    keys, values = (torch.full(((blocks + 3) * 8, *x.shape[1:]), torch.nan, dtype=torch.bfloat16) for x in (k, v))
    keys[slots], values[slots] = k, v
    assert torch.equal(got, native.causal(q[-L:], keys, values, H**-0.5, context=C, table=table, block_size=8))


def angles(T, R):
    angle = torch.arange(T)[:, None] * torch.linspace(0.1, 1, R // 2)
    return angle.cos().contiguous(), angle.sin().contiguous()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("normed", [False, True])
def test_gqa_project(format, normed):
    T, D, N, M, H = 11, 64, 4, 2, 24
    x, weight, dtype = draw(T, D, dtype=of(format)), draw(D, seed=1), of(format)
    packed = pack(draw((N + 2 * M) * H, D, seed=2) / 8, format, draw((N + 2 * M) * H))
    cos, sin = angles(T, H)
    slots = torch.randperm(30)[:T]
    keys, values = torch.zeros(30, M, H, dtype=dtype), torch.zeros(30, M, H, dtype=dtype)
    norms = [native.Norm(draw(H, seed=i), 1e-6) if normed else None for i in (3, 4)]
    q, k, v = native.gqa_project(
        x, packed, norm=native.Norm(weight, 1e-6), heads=N, kv_heads=M, cos=cos, sin=sin, keys=keys, values=values, slots=slots,
        q_norm=norms[0], k_norm=norms[1], threads=2,
    )  # fmt: skip
    made = F.linear(F.rms_norm(x.double(), (D,), weight.double(), 1e-6), packed.unpack().double(), draw((N + 2 * M) * H).double())
    want = list(made.view(T, -1, H).split((N, M, M), dim=1))
    for i in (0, 1):
        if normed:
            want[i] = F.rms_norm(want[i], (H,), norms[i].weight.double(), 1e-6)
        want[i] = rotate(want[i], cos.double(), sin.double(), False)
    for a, b in zip((q, k, v), want):
        assert error(a, b) <= 2 * CLOSE[format]
    assert torch.equal(keys[slots], k) and torch.equal(values[slots], v)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("lora", [0, 36])
@pytest.mark.parametrize("interleave", [False, True])
def test_mla_project(format, lora, interleave):
    T, D, N, nope, rope, C = 6, 64, 3, 16, 8, 40
    x, dtype = draw(T, D, dtype=of(format)), of(format)
    norm, q_norm, kv_norm = native.Norm(draw(D, seed=1), 1e-6), native.Norm(draw(36, seed=2), 1e-6), native.Norm(draw(C, seed=3), 1e-6)
    first = lora or N * (nope + rope)
    w_a = pack(draw(first + C + rope, D, seed=4) / 8, format)
    w_q_b = pack(draw(N * (nope + rope), lora, seed=5) / 6, format) if lora else None
    cos, sin = angles(T, rope)
    slots, memory = torch.randperm(20)[:T], torch.zeros(20, C + rope, dtype=dtype)
    q, row = native.mla_project(
        x, w_a, w_q_b, norm=norm, q_norm=q_norm if lora else None, kv_norm=kv_norm, heads=N, nope=nope, rope=rope, latent=C,
        interleave=interleave, cos=cos, sin=sin, memory=memory, slots=slots, threads=2,
    )  # fmt: skip
    made = F.linear(F.rms_norm(x.double(), (D,), norm.weight.double(), 1e-6), w_a.unpack().double())
    a, latent, key = made.split((first, C, rope), dim=-1)
    if w_q_b is not None:
        a = F.linear(F.rms_norm(a, (lora,), q_norm.weight.double(), 1e-6), w_q_b.unpack().double())
    q_nope, q_pe = a.view(T, N, -1).split((nope, rope), dim=-1)
    want_q = torch.cat((q_nope, rotate(q_pe, cos.double(), sin.double(), interleave)), dim=-1)
    latent = F.rms_norm(latent, (C,), kv_norm.weight.double(), 1e-6)
    want_row = torch.cat((latent, rotate(key[:, None], cos.double(), sin.double(), interleave)[:, 0]), dim=-1)
    assert error(q, want_q) <= 2 * CLOSE[format] and error(row, want_row) <= 2 * CLOSE[format]
    assert torch.equal(memory[slots], row)


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_a_compiler_that_fails_is_reported(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", script(tmp_path / "broken", 'case "$1" in --version) echo 1;; *) echo "no such flag" >&2; exit 1;; esac'))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.warns(UserWarning, match="no such flag"):
        loaded = compiler.load.__wrapped__()
    assert loaded.functions is None and "no such flag" in loaded.reason
    assert [p.name for p in (tmp_path / "jevons" / "native").iterdir()] == []


def test_without_a_compiler_the_reason_says_so(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    loaded = compiler.load.__wrapped__()
    assert loaded.functions is None and "C++ compiler" in loaded.reason


def test_several_threads_call_at_once():
    x, packed = draw(8, 256, dtype=torch.bfloat16), pack(draw(512, 256, seed=1), "int8")
    want = native.linear(x, packed, threads=2)
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda _: native.linear(x, packed, threads=2), range(400)):
            assert torch.equal(got, want)


def test_a_forked_child_computes_too():
    x, packed = draw(8, 256, dtype=torch.bfloat16), pack(draw(512, 256, seed=1), "bf16")
    want = native.linear(x, packed, threads=2)
    child = os.fork()
    if child == 0:  # the parent's workers do not exist here
        os._exit(0 if torch.equal(native.linear(x, packed, threads=2), want) else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 70, 40_000])  # less than a vector, some and a rest, more than a piece
def test_adamw_in_one_pass_is_torchs(dtype, count, monkeypatch):
    rates, results = adamw.Rates(1e-2, 0.9, 0.99, 1e-8, 0.1), []
    for here in (True, False):
        monkeypatch.setattr(native, "available", lambda here=here: here)
        parameter = draw(count, dtype=dtype)
        master, moments = parameter.float(), (torch.zeros(count), torch.zeros(count))
        for step in (1, 2, 3):
            gradient = draw(count, dtype=dtype, seed=step)
            assert float(adamw.total_norm([gradient, gradient])) == pytest.approx(float(gradient.double().norm()) * 2**0.5, rel=1e-5)
            adamw.adamw_step(master, gradient, moments, parameter, rates, step=step, scale=torch.tensor(0.3))
        assert torch.equal(parameter, master.to(dtype))
        results.append([master, *moments])
    for got, want in zip(*results):
        assert error(got, want) < 1e-6


def test_adamw_and_norms_do_not_depend_on_threads():
    gradient, results = draw(100_001), []
    for threads in (1, 2, 3):
        master, moments = draw(100_001, seed=1), (torch.zeros(100_001), torch.zeros(100_001))
        native.adamw(master, gradient, moments, None, 1.0, 1.0, 0.1, (0.9, 0.99), 0.1, 1e-8, threads=threads)
        results.append((native.squares(gradient, threads=threads), master, *moments))
    for other in results[1:]:
        assert other[0] == results[0][0] and all(torch.equal(a, b) for a, b in zip(other[1:], results[0][1:]))


@pytest.mark.slow
def test_with_avx2_alone_too():
    # where a processor has AVX-512, everything again without it, as most laptops are
    if not set(compiler.WIDE) <= set(processor.flags() or ()):
        pytest.skip("this processor's native kernels are those already")
    code = """
import sys, pytest
from jevons.kernels import native, processor
flags = [flag for flag in processor.flags() if not flag.startswith("avx512")]
processor.flags = lambda: flags
assert native.available(), native.reason()
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-m", "not slow", *sys.argv[1:]]))
"""
    files = [Path(__file__).parent / f"test_{name}.py" for name in ("native", "packed", "memory", "prefix")]
    done = subprocess.run([sys.executable, "-c", code, *map(str, files)], capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
