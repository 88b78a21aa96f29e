"""The native kernels: products with packed weights, paged attention, experts, and the small steps between them.

Problem: one decoding step reads every weight once; torch's products reach half of the memory's speed at one row, and the
cores idle between dozens of small operators. Approach: C++ (native/*.cpp, compiled at first use by kernels/compiler.py) that makes a
decoder layer about five calls, with threads of its own and fp32 accumulation. A row's result does not depend on the rows beside it.
Activations are bf16, or fp32 with weights in fp32. Here are thin wrappers that check shapes and pass pointers. Where
`available` says no, `reason` says why. Not done: a backward pass of products.
"""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_int32, c_void_p
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from jevons.kernels.compiler import load
from jevons.kernels.quantize import FORMATS, PackedWeight

DTYPE = {torch.float32: 0, torch.bfloat16: 1}


class Norm(NamedTuple):
    """An RMSNorm as the kernels take it."""

    weight: Tensor  # (D,) fp32
    eps: float


def norm(module: nn.Module) -> Norm:
    """From a model's RMSNorm."""
    assert isinstance(module.weight, Tensor) and isinstance(module.eps, float)
    return Norm(module.weight.detach().float().contiguous(), module.eps)


class _Matrix(ctypes.Structure):
    _fields_ = (
        [("data", c_void_p), ("bias", c_void_p)]
        + [(name, c_int32) for name in ("format", "N", "K", "stack", "swiglu", "reserved")]
    )  # fmt: skip


def available() -> bool:
    """Whether the kernels can be used here; compiles them at the first question."""
    return load().functions is not None


def reason() -> str:
    """Why they cannot, or an empty string."""
    return load().reason


def matrix(weight: PackedWeight) -> Any:
    """The C struct of a packed weight, made once; it points into the tensors, which the weight keeps alive.

    In place the formats are 4 (fp32) and 5 (bf16).
    """
    if weight.handle is None:
        assert weight.data.is_contiguous() and (weight.bias is None or weight.bias.is_contiguous())
        bias = None if weight.bias is None else weight.bias.data_ptr()
        fields = (FORMATS[weight.format] + 4 * bool(weight.sources), weight.N, weight.K, max(weight.stack, 1), weight.swiglu, 0)
        weight.handle = ctypes.pointer(_Matrix(weight.data.data_ptr(), bias, *fields))
    return weight.handle


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _rows(x_TD: Tensor, width: int) -> tuple[int, int, int, int]:
    """Pointer, dtype, rows and stride, as most kernels take them."""
    assert x_TD.dim() == 2 and x_TD.shape[1] == width and x_TD.stride(1) == 1, (x_TD.shape, x_TD.stride(), width)
    return x_TD.data_ptr(), DTYPE[x_TD.dtype], x_TD.shape[0], x_TD.stride(0)


def _norm(norm: Norm | None, width: int) -> tuple[int | None, float]:
    if norm is None:
        return None, 0.0
    assert norm.weight.dtype == torch.float32 and norm.weight.shape == (width,) and norm.weight.is_contiguous()
    return norm.weight.data_ptr(), norm.eps


def _out(x: Tensor, shape: tuple[int, ...], out: Tensor | None, residual: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    assert residual is None or (residual.shape == shape and residual.is_contiguous() and residual.dtype == x.dtype)
    if out is None:
        return torch.empty(shape, dtype=dtype or x.dtype)
    assert out.shape == shape and out.is_contiguous() and out.dtype == (dtype or x.dtype)
    return out


def linear(
    x_TD: Tensor,
    weight: PackedWeight,
    *,
    norm: Norm | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    dtype: torch.dtype | None = None,
    threads: int = 0,
) -> Tensor:
    """norm(x) W^T + bias + residual, (T, N); silu(gate) * up where the weight holds both. `residual` may be `out`."""
    assert weight.stack == 0
    y = _out(x_TD, (x_TD.shape[0], weight.N), out, residual, dtype)
    load().functions.jevons_linear(
        matrix(weight), *_rows(x_TD, weight.K), *_norm(norm, weight.K), y.data_ptr(), DTYPE[y.dtype], weight.N,
        _pointer(residual), weight.N, threads or torch.get_num_threads(),
    )  # fmt: skip
    return y


def mlp(
    x_TD: Tensor,
    gate_up: PackedWeight,
    down: PackedWeight,
    *,
    norm: Norm | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    threads: int = 0,
) -> Tensor:
    """down(silu(gate) * up) of norm(x), plus the residual. `out` may be `x_TD` or the residual."""
    assert gate_up.swiglu and gate_up.N == down.K and not gate_up.stack and not down.stack
    y = _out(x_TD, (x_TD.shape[0], down.N), out, residual)
    load().functions.jevons_mlp(
        matrix(gate_up), matrix(down), *_rows(x_TD, gate_up.K), *_norm(norm, gate_up.K), y.data_ptr(), _pointer(residual),
        threads or torch.get_num_threads(),
    )  # fmt: skip
    return y


def moe(
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    gate_up: PackedWeight,
    down: PackedWeight,
    *,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    threads: int = 0,
) -> Tensor:
    """Each token through its K experts, weighted and summed, plus the residual. Reads the chosen experts' weights only."""
    assert gate_up.swiglu and gate_up.N == down.K and gate_up.stack == down.stack > 0
    assert experts_TK.dtype == torch.int64 and weights_TK.dtype == torch.float32 and experts_TK.shape == weights_TK.shape
    assert experts_TK.shape[0] == x_TD.shape[0] and experts_TK.is_contiguous() and weights_TK.is_contiguous()
    y = _out(x_TD, (x_TD.shape[0], down.N), out, residual)
    load().functions.jevons_moe(
        matrix(gate_up), matrix(down), *_rows(x_TD, gate_up.K), experts_TK.data_ptr(), weights_TK.data_ptr(), experts_TK.shape[1],
        y.data_ptr(), _pointer(residual), threads or torch.get_num_threads(),
    )  # fmt: skip
    return y


def rms_norm(x_TD: Tensor, norm: Norm, *, threads: int = 0) -> Tensor:
    """As model/layer.py's, in one pass."""
    width = x_TD.shape[1]
    y = torch.empty(x_TD.shape, dtype=x_TD.dtype)
    pointer, dtype, rows, stride = _rows(x_TD, width)
    load().functions.jevons_rms_norm(
        pointer, dtype, rows, stride, width, *_norm(norm, width), y.data_ptr(), threads or torch.get_num_threads()
    )
    return y


def _turns(cos_TR: Tensor, sin_TR: Tensor, rows: int, width: int) -> tuple[int, int]:
    for x in (cos_TR, sin_TR):
        assert x.dtype == torch.float32 and x.shape == (rows, width // 2) and x.is_contiguous(), (x.dtype, x.shape)
    return cos_TR.data_ptr(), sin_TR.data_ptr()


def _memory(cache: Tensor, width: int, dtype: torch.dtype) -> int:
    assert cache.is_contiguous() and cache.dtype == dtype and cache.stride(0) == width, (cache.shape, cache.dtype, width)
    return cache.data_ptr()


def _slots(slots_T: Tensor, rows: int) -> int:
    assert slots_T.dtype == torch.int64 and slots_T.shape == (rows,) and slots_T.is_contiguous()
    return slots_T.data_ptr()


def gqa_project(
    x_TD: Tensor,
    w_qkv: PackedWeight,
    *,
    norm: Norm,
    heads: int,
    kv_heads: int,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    q_norm: Norm | None = None,
    k_norm: Norm | None = None,
    threads: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys, values (T, N | M | M, H) of norm(x), normed per head and rotated; keys and values are in the cache at `slots` too.

    cos and sin are (T, H/2) in fp32. The three are views of one tensor.
    """
    T, width = x_TD.shape[0], w_qkv.N // (heads + 2 * kv_heads)
    assert width * (heads + 2 * kv_heads) == w_qkv.N and (q_norm is None) == (k_norm is None)
    assert q_norm is None or k_norm is None or q_norm.eps == k_norm.eps
    qkv = torch.empty(T, heads + 2 * kv_heads, width, dtype=x_TD.dtype)
    q_weight, eps = _norm(q_norm, width)
    load().functions.jevons_gqa_project(
        matrix(w_qkv), *_rows(x_TD, w_qkv.K), *_norm(norm, w_qkv.K), qkv.data_ptr(), heads, kv_heads, q_weight,
        _norm(k_norm, width)[0], eps, *_turns(cos, sin, T, width), _memory(keys, kv_heads * width, x_TD.dtype),
        _memory(values, kv_heads * width, x_TD.dtype),
        _slots(slots, T), threads or torch.get_num_threads(),
    )  # fmt: skip
    q, k, v = torch.split_with_sizes(qkv, (heads, kv_heads, kv_heads), dim=1)
    return q, k, v


def mla_project(
    x_TD: Tensor,
    w_a: PackedWeight,
    w_q_b: PackedWeight | None,
    *,
    norm: Norm,
    q_norm: Norm | None,
    kv_norm: Norm,
    heads: int,
    nope: int,
    rope: int,
    latent: int,
    interleave: bool,
    cos: Tensor,
    sin: Tensor,
    memory: Tensor,
    slots: Tensor,
    threads: int = 0,
) -> tuple[Tensor, Tensor]:
    """Queries (T, N, nope + R) and cache rows [latent | rope key] (T, C + R) of norm(x); the rows are in the cache at `slots` too.

    `w_a` holds q_a and kv_a one below the other, or q itself and kv_a with no `w_q_b`. cos and sin are (T, R/2) in fp32.
    """
    T, first = x_TD.shape[0], w_a.N - latent - rope
    assert (w_q_b is None) == (q_norm is None) and (w_q_b.N if w_q_b else first) == heads * (nope + rope)
    assert (w_q_b is None or first == w_q_b.K) and (q_norm is None or q_norm.eps == kv_norm.eps)
    q = torch.empty(T, heads, nope + rope, dtype=x_TD.dtype)
    row = torch.empty(T, latent + rope, dtype=x_TD.dtype)
    load().functions.jevons_mla_project(
        matrix(w_a), None if w_q_b is None else matrix(w_q_b), *_rows(x_TD, w_a.K), *_norm(norm, w_a.K), _norm(q_norm, first)[0],
        *_norm(kv_norm, latent), q.data_ptr(), row.data_ptr(), heads, nope, rope, latent, interleave, *_turns(cos, sin, T, rope),
        _memory(memory, latent + rope, x_TD.dtype), _slots(slots, T), threads or torch.get_num_threads(),
    )  # fmt: skip
    return q, row


def _context(q: Tensor, tables: Tensor, lengths: Tensor, block_size: int) -> tuple[int, int, int, int]:
    assert tables.dtype == lengths.dtype == torch.int32 and tables.stride(1) == 1 and lengths.is_contiguous()
    assert tables.shape[0] == lengths.shape[0] == q.shape[0] and q.stride()[1:] == (q.shape[2], 1)
    return tables.data_ptr(), tables.stride(0), lengths.data_ptr(), block_size


def paged_gqa(
    q_SNH: Tensor, keys: Tensor, values: Tensor, tables: Tensor, lengths: Tensor, block_size: int, scale: float, *, threads: int = 0
) -> Tensor:
    """One query row of each sequence over its cached tokens (lengths >= 1, the new token among them) -> (S, N, V).

    keys and values are (slots, M, H | V); tables (S, B) and lengths (S,) int32. q may be a view with a stride between sequences.
    """
    S, N, width = q_SNH.shape
    M, V = keys.shape[1], values.shape[2]
    out = torch.empty(S, N, V, dtype=q_SNH.dtype)
    load().functions.jevons_paged_gqa(
        q_SNH.data_ptr(), q_SNH.stride(0), _memory(keys, M * width, q_SNH.dtype), _memory(values, M * V, q_SNH.dtype), DTYPE[q_SNH.dtype],
        S, N, M, width, V, *_context(q_SNH, tables, lengths, block_size), scale, out.data_ptr(), threads or torch.get_num_threads(),
    )  # fmt: skip
    return out


def paged_mla(
    q_SNX: Tensor,
    memory: Tensor,
    tables: Tensor,
    lengths: Tensor,
    block_size: int,
    w_key: PackedWeight,
    w_value: PackedWeight,
    scale: float,
    *,
    threads: int = 0,
) -> Tensor:
    """MLA's decode in latent space: queries (S, N, nope + R) over cache rows (slots, C + R) -> (S, N, V). Weights by `pack_kv_b`."""
    S, N, width = q_SNX.shape
    nope, latent = w_key.K, w_key.N
    assert w_key.stack == w_value.stack == N and latent == w_value.K
    out = torch.empty(S, N, w_value.N, dtype=q_SNX.dtype)
    load().functions.jevons_paged_mla(
        q_SNX.data_ptr(), q_SNX.stride(0), _memory(memory, latent + width - nope, q_SNX.dtype), DTYPE[q_SNX.dtype], S, N,
        nope, width - nope, *_context(q_SNX, tables, lengths, block_size), matrix(w_key), matrix(w_value), scale, out.data_ptr(),
        threads or torch.get_num_threads(),
    )  # fmt: skip
    return out


def causal(
    q_LNH: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    *,
    context: int,
    table: Tensor | None = None,
    block_size: int = 1,
    threads: int = 0,
) -> Tensor:
    """The last L of a sequence's `context` tokens over all of them, causal: (L, N, H) -> (L, N, V). bf16, H even.

    keys (X, M, H) and values (X, M, V) are rows of the context in order, or slots that the blocks of `table` (int32) name.
    """
    L, N, width = q_LNH.shape
    M, V = keys.shape[1], values.shape[2]
    assert q_LNH.dtype == keys.dtype == values.dtype == torch.bfloat16 and width % 2 == 0 and N % M == 0 and 0 < L <= context
    for x in (q_LNH, keys, values):
        assert x.stride()[1:] == (x.shape[2], 1), x.stride()
    if table is None:
        assert len(keys) >= context and len(values) >= context
    else:
        assert table.dtype == torch.int32 and table.is_contiguous() and len(table) * block_size >= context
    out = torch.empty(L, N, V, dtype=torch.bfloat16)
    load().functions.jevons_causal(
        q_LNH.data_ptr(), q_LNH.stride(0), keys.data_ptr(), keys.stride(0), values.data_ptr(), values.stride(0), L, context, N, M, width,
        V, _pointer(table), block_size, scale, out.data_ptr(), threads or torch.get_num_threads(),
    )  # fmt: skip
    return out


def squares(x: Tensor, *, threads: int = 0) -> float:
    """The sum of squares of all elements."""
    x, total = x.contiguous(), c_double()
    load().functions.jevons_squares(x.data_ptr(), DTYPE[x.dtype], x.numel(), ctypes.addressof(total), threads or torch.get_num_threads())
    return total.value


def adamw(
    master: Tensor,
    gradient: Tensor,
    moments: tuple[Tensor, Tensor],
    rounded: Tensor | None,
    scale: float,
    keep: float,
    rate: float,
    betas: tuple[float, float],
    root: float,
    eps: float,
    *,
    threads: int = 0,
) -> None:
    """A step of kernels/adamw.py in one pass over memory; `rounded` gets the new weights in bf16.

    keep is what weight decay leaves, rate the learning rate over the first moment's correction, root that of the second's.
    """
    gradient = gradient.contiguous()
    for x in (master, *moments):
        assert x.dtype == torch.float32 and x.shape == master.shape and x.is_contiguous()
    assert gradient.shape == master.shape
    assert rounded is None or (rounded.dtype == torch.bfloat16 and rounded.shape == master.shape and rounded.is_contiguous())
    load().functions.jevons_adamw(
        master.data_ptr(), gradient.data_ptr(), DTYPE[gradient.dtype], *(x.data_ptr() for x in moments), _pointer(rounded),
        master.numel(), scale, keep, rate, *betas, root, eps, threads or torch.get_num_threads(),
    )  # fmt: skip
