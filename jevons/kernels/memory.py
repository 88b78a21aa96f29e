"""Rows of a table far larger than any cache, looked up and weighed: what a memory layer does after its scores.

Problem: a token reads some hundred rows of millions. Picked rows of all tokens laid out for torch's operators are gigabytes, a dense
gradient is the whole table, and an optimizer that walks through it moves hundreds of times what changed. Approach: three primitives that
read the rows they need and nothing else: `gather` (weighed rows summed into buckets), `dots` (each pick's product with its bucket, the way
back to its weight) and `scatter` (each touched row's sum of weighed buckets, the way back to the row); on a CPU native (native/memory.cpp),
elsewhere torch, some tokens at a time. The gradient of a table is a sparse tensor of its touched rows, sorted, each once, in the table's
dtype, summed in fp32. Autograd, the optimizer and clipping take it as it is: `add_rows` sums such gradients, `step_rows` is AdamW on the
touched rows of weights and moments.

Not done: a kernel for GPUs, and tables spread over devices.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from ctypes import c_double, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from jevons.kernels.compiler import load
from jevons.kernels.native import DTYPE, matrix
from jevons.kernels.quantize import PackedWeight

PIECE = 2**22  # picked elements at work where torch does it


def lookup(values_ZV: Tensor, rows_TX: Tensor, blocks_TX: Tensor, weights_TXC: Tensor, expansion: int) -> Tensor:
    """Picked rows, weighed and summed: (T, expansion * V) in the table's dtype.

    Each of T tokens picks X of Z rows; a row is cut into C equal shares, share c times weights[..., c], and added into bucket `blocks` of
    `expansion`. The gradient of `values_ZV` is sparse. IndexError for a row or bucket that is not there.
    """
    return _Lookup.apply(values_ZV, rows_TX, blocks_TX, weights_TXC, expansion)


def lookup_reference(values_ZV: Tensor, rows_TX: Tensor, blocks_TX: Tensor, weights_TXC: Tensor, expansion: int) -> Tensor:
    """The same in plain torch, all picked rows laid out; its gradient is dense."""
    wide = torch.promote_types(values_ZV.dtype, torch.float32)
    picked_TXCY = F.embedding(rows_TX, values_ZV).to(wide).unflatten(-1, (weights_TXC.shape[-1], -1))
    weighed_TXV = (picked_TXCY * weights_TXC.to(wide)[..., None]).flatten(2)
    out_TEV = weighed_TXV.new_zeros(len(rows_TX), expansion, values_ZV.shape[1])
    return out_TEV.scatter_add(1, blocks_TX[..., None].expand_as(weighed_TXV), weighed_TXV).flatten(1).to(values_ZV.dtype)


def project(values_ZV: Tensor, rows_TX: Tensor, x_TV: Tensor) -> Tensor:
    """Each picked row's product with its token's vector: (T, X), fp32 at least. The gradient of `values_ZV` is sparse."""
    return _Project.apply(values_ZV, rows_TX, x_TV)


def select(row_THNR: Tensor, column_THNR: Tensor, u_HR: Tensor, v_HR: Tensor, core_HRR: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The keys of both sides whose pairs score best, (T, H, M) each, the best first: M = top_k pairs (a, b) by row[a]' core column[b].

    They are looked for among the M best of each side by row u and column v. No gradient.
    """
    if not is_native(row_THNR):
        return select_reference(row_THNR, column_THNR, u_HR, v_HR, core_HRR, top_k)
    T, H, N, R = row_THNR.shape
    assert column_THNR.shape == row_THNR.shape and u_HR.shape == v_HR.shape == core_HRR.shape[:2] == (H, R) and 0 < top_k <= N
    sides = [x.detach().contiguous() for x in (row_THNR, column_THNR)]
    rule = [x.detach().float().contiguous() for x in (u_HR, v_HR, core_HRR)]
    a_THM, b_THM = (torch.empty(T, H, top_k, dtype=torch.int64) for _ in sides)
    load().functions.jevons_memory_select(
        *(x.data_ptr() for x in sides), DTYPE[row_THNR.dtype], T, H, N, R, *(x.data_ptr() for x in rule), top_k, a_THM.data_ptr(),
        b_THM.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return a_THM, b_THM


@torch.no_grad()
def select_reference(
    row_THNR: Tensor, column_THNR: Tensor, u_HR: Tensor, v_HR: Tensor, core_HRR: Tensor, top_k: int
) -> tuple[Tensor, Tensor]:
    """The same in plain torch."""
    wide = torch.promote_types(row_THNR.dtype, torch.float32)
    row_THNR, column_THNR, u_HR, v_HR, core_HRR = (x.to(wide) for x in (row_THNR, column_THNR, u_HR, v_HR, core_HRR))
    a_THM = (row_THNR * u_HR[:, None]).sum(-1).topk(top_k, dim=-1).indices
    b_THM = (column_THNR * v_HR[:, None]).sum(-1).topk(top_k, dim=-1).indices
    row_THMR, column_THMR = (x.gather(2, i[..., None].expand(*i.shape, x.shape[-1])) for x, i in ((row_THNR, a_THM), (column_THNR, b_THM)))
    best_THM = (row_THMR @ core_HRR @ column_THMR.mT).flatten(-2).topk(top_k, dim=-1).indices
    return a_THM.gather(-1, best_THM // top_k), b_THM.gather(-1, best_THM % top_k)


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values_ZV: Tensor, rows_TX: Tensor, blocks_TX: Tensor, weights_TXC: Tensor, expansion: int) -> Tensor:
        ctx.save_for_backward(values_ZV, rows_TX, blocks_TX, weights_TXC)
        return gather(values_ZV, rows_TX, blocks_TX, weights_TXC, expansion)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        values_ZV, rows_TX, blocks_TX, weights_TXC = ctx.saved_tensors
        grad_TY, grad_values, grad_weights = grads[0].contiguous(), None, None
        if ctx.needs_input_grad[0]:
            grad_values = scatter(values_ZV.shape, rows_TX, blocks_TX, weights_TXC, grad_TY)
        if ctx.needs_input_grad[3]:
            grad_weights = dots(values_ZV, rows_TX, blocks_TX, grad_TY, weights_TXC.shape[-1]).to(weights_TXC.dtype)
        return grad_values, None, None, grad_weights, None


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values_ZV: Tensor, rows_TX: Tensor, x_TV: Tensor) -> Tensor:
        ctx.save_for_backward(values_ZV, rows_TX, x_TV)
        return dots(values_ZV, rows_TX, None, x_TV.to(values_ZV.dtype).contiguous(), 1)[..., 0]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        values_ZV, rows_TX, x_TV = ctx.saved_tensors
        weights_TX1, grad_values, grad_x = grads[0][..., None], None, None
        if ctx.needs_input_grad[0]:
            grad_values = scatter(values_ZV.shape, rows_TX, None, weights_TX1, x_TV.to(values_ZV.dtype).contiguous())
        if ctx.needs_input_grad[2]:
            grad_x = gather(values_ZV, rows_TX, None, weights_TX1, 1).to(x_TV.dtype)
        return grad_values, None, grad_x


def gather(values_ZV: Tensor, rows_TX: Tensor, blocks_TX: Tensor | None, weights_TXC: Tensor, expansion: int) -> Tensor:
    """(T, expansion * V); without `blocks` all goes into one bucket."""
    if not is_native(values_ZV):
        blocks_TX = torch.zeros_like(rows_TX) if blocks_TX is None else blocks_TX
        pieces = _pieces(rows_TX, values_ZV.shape[1])
        parts = [lookup_reference(values_ZV, rows_TX[p], blocks_TX[p], weights_TXC[p], expansion) for p in pieces]
        return torch.cat(parts) if parts else values_ZV.new_zeros(0, expansion * values_ZV.shape[1])
    out_TY = values_ZV.new_empty(len(rows_TX), expansion * values_ZV.shape[1])
    picks = (rows_TX.contiguous(), None if blocks_TX is None else blocks_TX.contiguous(), weights_TXC.float().contiguous())
    _check(
        load().functions.jevons_memory_gather(
            *_table(values_ZV), *(None if x is None else x.data_ptr() for x in picks), *weights_TXC.shape, expansion, out_TY.data_ptr(),
            torch.get_num_threads(),
        )
    )  # fmt: skip
    return out_TY


def dots(values_ZV: Tensor, rows_TX: Tensor, blocks_TX: Tensor | None, grad_TY: Tensor, shares: int) -> Tensor:
    """Each share of a picked row times the same place of its bucket in (T, E * V): (T, X, shares), fp32 at least."""
    V, (T, X) = values_ZV.shape[1], rows_TX.shape
    if not is_native(values_ZV):
        wide = torch.promote_types(values_ZV.dtype, torch.float32)
        parts = [
            (F.embedding(rows_TX[p], values_ZV).to(wide) * push_TXV.to(wide)).unflatten(-1, (shares, -1)).sum(-1)
            for p, push_TXV in _pushes(rows_TX, blocks_TX, grad_TY, V)
        ]
        return torch.cat(parts) if parts else torch.zeros(0, X, shares, dtype=wide, device=values_ZV.device)
    out_TXC = torch.empty(T, X, shares)
    rows_TX, blocks_TX = rows_TX.contiguous(), None if blocks_TX is None else blocks_TX.contiguous()
    assert grad_TY.is_contiguous() and grad_TY.dtype == values_ZV.dtype
    _check(
        load().functions.jevons_memory_dots(
            *_table(values_ZV), rows_TX.data_ptr(), None if blocks_TX is None else blocks_TX.data_ptr(), grad_TY.data_ptr(), T, X, shares,
            grad_TY.shape[1] // V, out_TXC.data_ptr(), torch.get_num_threads(),
        )
    )  # fmt: skip
    return out_TXC


def scatter(shape: torch.Size, rows_TX: Tensor, blocks_TX: Tensor | None, weights_TXC: Tensor, grad_TY: Tensor) -> Tensor:
    """The gradient of a table of this shape, sparse: of every touched row the sum over its picks of weight times bucket."""
    (Z, V), count = shape, rows_TX.numel()
    if not is_native(grad_TY):
        touched_U, index_TX = torch.unique(rows_TX, return_inverse=True)
        wide = torch.promote_types(grad_TY.dtype, torch.float32)
        sums_UV = torch.zeros(len(touched_U), V, dtype=wide, device=grad_TY.device)
        for p, push_TXV in _pushes(rows_TX, blocks_TX, grad_TY, V):
            shares_TXCY = push_TXV.to(wide).unflatten(-1, (weights_TXC.shape[-1], -1)) * weights_TXC[p].to(wide)[..., None]
            sums_UV.index_add_(0, index_TX[p].flatten(), shares_TXCY.flatten(2).flatten(0, 1))
        return rows_of(touched_U, sums_UV.to(grad_TY.dtype), shape)
    functions, threads = load().functions, torch.get_num_threads()
    rows_TX, blocks_TX = rows_TX.contiguous(), None if blocks_TX is None else blocks_TX.contiguous()
    weights_TXC = weights_TXC.float().contiguous()
    order = torch.empty(count, dtype=torch.int32)
    touched, starts = (torch.empty(count + i, dtype=torch.int64) for i in (0, 1))
    found = functions.jevons_memory_sort(rows_TX.data_ptr(), count, Z, order.data_ptr(), touched.data_ptr(), starts.data_ptr())
    sums_UV = grad_TY.new_empty(found, V)
    functions.jevons_memory_scatter(
        order.data_ptr(), starts.data_ptr(), found, None if blocks_TX is None else blocks_TX.data_ptr(), weights_TXC.data_ptr(),
        grad_TY.data_ptr(), DTYPE[grad_TY.dtype], *weights_TXC.shape, grad_TY.shape[1] // V, V, sums_UV.data_ptr(), threads,
    )  # fmt: skip
    return rows_of(touched[:found].clone(), sums_UV, shape)


def rows_of(rows_U: Tensor, sums_UV: Tensor, shape: torch.Size) -> Tensor:
    """A sparse tensor of rows, ascending and each once."""
    return torch.sparse_coo_tensor(rows_U[None], sums_UV, shape, is_coalesced=True, check_invariants=False)


def sorted_rows(gradient: Tensor) -> Tensor:
    """A sparse gradient with its rows ascending and each once; of what autograd has added up, in fp32, where it has.

    Autograd forgets that `scatter` leaves them so, and torch would sort them again.
    """
    rows_U = gradient._indices()[0]
    if bool((rows_U[1:] > rows_U[:-1]).all()):
        return rows_of(rows_U, gradient._values(), gradient.shape)
    return gradient.to(torch.promote_types(gradient.dtype, torch.float32)).coalesce()


def add_rows(a: Tensor, b: Tensor) -> Tensor:
    """The sum of two coalesced sparse tensors, in fp32."""
    (rows_a, values_a), (rows_b, values_b) = ((x.indices()[0].contiguous(), x.values().contiguous()) for x in (a, b))
    if not (is_native(values_a) and is_native(values_b)):
        rows_U = torch.unique(torch.cat((rows_a, rows_b)))
        sums_UV = torch.zeros(len(rows_U), *a.shape[1:], device=a.device)
        for rows, values in ((rows_a, values_a), (rows_b, values_b)):
            sums_UV.index_add_(0, torch.searchsorted(rows_U, rows), values.float())
        return rows_of(rows_U, sums_UV, a.shape)
    functions, V = load().functions, a.shape[1]
    rows_U, from_a, from_b = (torch.empty(len(rows_a) + len(rows_b), dtype=torch.int64) for _ in range(3))
    count = functions.jevons_memory_merge(
        rows_a.data_ptr(), len(rows_a), rows_b.data_ptr(), len(rows_b), rows_U.data_ptr(), from_a.data_ptr(), from_b.data_ptr()
    )
    sums_UV = torch.empty(count, V)
    functions.jevons_memory_add(
        values_a.data_ptr(), DTYPE[values_a.dtype], from_a.data_ptr(), values_b.data_ptr(), DTYPE[values_b.dtype], from_b.data_ptr(),
        count, V, sums_UV.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return rows_of(rows_U[:count].clone(), sums_UV, a.shape)


def step_rows(
    master: Tensor, gradient: Tensor, moments: tuple[Tensor, Tensor], rounded: Tensor | None, scale: float, keep: float, rate: float,
    betas: tuple[float, float], root: float, eps: float,
) -> None:  # fmt: skip
    """`native.adamw` on the rows that the coalesced sparse `gradient` names, and on no other; master and moments (Z, V) fp32."""
    rows_U, values_UV = gradient.indices()[0].contiguous(), gradient.values().contiguous()
    for x in (master, *moments):
        assert x.dtype == torch.float32 and x.shape == gradient.shape and x.is_contiguous()
    assert rounded is None or (rounded.dtype == torch.bfloat16 and rounded.shape == gradient.shape and rounded.is_contiguous())
    load().functions.jevons_adamw_rows(
        master.data_ptr(), values_UV.data_ptr(), DTYPE[values_UV.dtype], *(x.data_ptr() for x in moments),
        None if rounded is None else rounded.data_ptr(), rows_U.data_ptr(), *values_UV.shape, scale, keep, rate, *betas, root, eps,
        torch.get_num_threads(),
    )  # fmt: skip


@dataclass
class Layer:
    """A memory layer's weights as `run_layer` takes them; matrices in place, or packed where kernels/native.py is available."""

    query: PackedWeight  # (2 Y, D)
    row_keys: PackedWeight  # (H N, Y): for each key the sum of its R vectors, by u
    column_keys: PackedWeight  # by v
    out: PackedWeight  # (D, E V)
    norm_Y: Tensor
    core_HRR: Tensor  # the sum of:
    core_CHRR: Tensor
    keys_SHNRY: Tensor  # normed, of both sides S
    values_ZV: Tensor
    shuffle: Tensor  # (N * N,) int32: bucket * Z + row
    eps: float
    top_k: int
    expansion: int

    def __post_init__(self) -> None:
        """Check and make the C struct, which points into the tensors."""
        _, H, N, R, Y = self.keys_SHNRY.shape
        (Z, V), C, D, M, E = self.values_ZV.shape, len(self.core_CHRR), self.query.K, self.top_k, self.expansion
        assert (self.query.N, self.out.N, self.out.K) == (2 * Y, D, E * V) and M <= N and V % C == 0
        assert all((keys.N, keys.K) == (H * N, Y) for keys in (self.row_keys, self.column_keys))
        assert self.shuffle.dtype == torch.int32 and self.shuffle.shape == (N * N,) and self.norm_Y.shape == (Y,)
        assert self.norm_Y.dtype == self.core_HRR.dtype == self.core_CHRR.dtype == torch.float32
        assert self.core_CHRR.shape[1:] == self.core_HRR.shape == (H, R, R)
        tensors = (self.norm_Y, self.core_HRR, self.core_CHRR, self.keys_SHNRY, self.values_ZV, self.shuffle)
        assert all(x.is_contiguous() for x in tensors)
        self.handle = _Layer(
            *(ctypes.cast(matrix(x), c_void_p) for x in (self.query, self.row_keys, self.column_keys, self.out)),
            *(x.data_ptr() for x in tensors), DTYPE[self.keys_SHNRY.dtype], DTYPE[self.values_ZV.dtype],
            D, Y, H, N, R, M, C, E, V, Z, self.eps,
        )  # fmt: skip


class _Layer(ctypes.Structure):
    _fields_ = (
        [(name, c_void_p) for name in ("query", "row_keys", "column_keys", "out", "norm", "core", "cores", "keys", "values", "shuffle")]
        + [(name, c_int64) for name in ("keys_dtype", "values_dtype", "D", "Y", "H", "N", "R", "M", "C", "E", "V", "Z")]
        + [("eps", c_double)]
    )  # fmt: skip


def run_layer(x_TD: Tensor, layer: Layer) -> tuple[Tensor, Tensor]:
    """A memory layer of UltraMem's kind, whole: (T, D) -> (T, D), and the rows that were looked up (T, X).

    One call, in which scores are never more than 128 tokens'.
    """
    assert x_TD.shape[1] == layer.query.K and x_TD.stride(1) == 1 and x_TD.dtype == layer.values_ZV.dtype
    y_TD = torch.empty_like(x_TD, memory_format=torch.contiguous_format)
    rows_TX = torch.empty(len(x_TD), len(layer.core_HRR) * layer.top_k, dtype=torch.int64)
    _check(
        load().functions.jevons_memory_layer(
            ctypes.addressof(layer.handle), x_TD.data_ptr(), DTYPE[x_TD.dtype], len(x_TD), x_TD.stride(0), rows_TX.data_ptr(),
            y_TD.data_ptr(), torch.get_num_threads(),
        )
    )  # fmt: skip
    return y_TD, rows_TX


def is_native(x: Tensor) -> bool:
    """Whether the native functions take it: fp32 or bf16, on a CPU that has them."""
    return x.device.type == "cpu" and x.dtype in DTYPE and load().functions is not None


def _table(values_ZV: Tensor) -> tuple[int, int, int, int]:
    assert values_ZV.is_contiguous()
    return values_ZV.data_ptr(), DTYPE[values_ZV.dtype], *values_ZV.shape


def _check(good: int) -> None:
    if not good:
        raise IndexError("a memory layer looks up a row or bucket that its table does not have")


def _pieces(rows_TX: Tensor, width: int) -> Iterator[slice]:
    """Tokens, some at a time."""
    step = max(1, PIECE // max(1, rows_TX.shape[1] * width))
    return (slice(t, t + step) for t in range(0, len(rows_TX), step))


def _pushes(rows_TX: Tensor, blocks_TX: Tensor | None, grad_TY: Tensor, width: int) -> Iterator[tuple[slice, Tensor]]:
    """Some tokens and, for each of their picks, the gradient of its bucket (t, X, V)."""
    grad_TEV = grad_TY.unflatten(1, (-1, width))
    for p in _pieces(rows_TX, width):
        blocks = torch.zeros_like(rows_TX[p]) if blocks_TX is None else blocks_TX[p]
        yield p, grad_TEV[p].gather(1, blocks[..., None].expand(-1, -1, width))
