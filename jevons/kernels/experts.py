"""Routed experts: every token through the K experts chosen for it, weighted and summed.

Problem: rows must be grouped by expert, and a Python loop over experts leaves most of the machine idle. Approach: sort the (token, choice)
pairs by expert, run one grouped product for gate and up and one for down, put the rows back in order and add the K rows of each token. No
capacity, no dropped tokens. The routing weight multiplies the activation before the down projection (the product is linear), which is
narrower than the output. Forward and backward are written together so that only the inputs, the pre-activation and the sorting survive
between them. Not done: expert parallelism, which replaces the dispatch and leaves these products alone.

    x_TD --gather by expert--> x_XD --grouped--> [gate | up]_XF --silu*up*weight--> a_XF --grouped--> y_XD --sum K--> y_TD

X are rows sorted by expert, padding included where `Dispatch` adds some.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from jevons.kernels.fused import swiglu_backward
from jevons.kernels.pointwise import swiglu


def experts_ref(x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor) -> Tensor:
    """The plain loop over experts: gate_up_EFD is (E, 2F, D) with the gate first, down_EDF is (E, D, F). Returns (T, D)."""
    out_TD = torch.zeros_like(x_TD)
    for expert in range(gate_up_EFD.shape[0]):
        token, slot = torch.where(experts_TK == expert)
        if len(token):
            gate, up = F.linear(x_TD[token], gate_up_EFD[expert]).chunk(2, dim=-1)
            activation = F.silu(gate) * up * weights_TK[token, slot, None].to(x_TD.dtype)
            out_TD = out_TD.index_add(0, token, F.linear(activation, down_EDF[expert]))
    return out_TD


def experts(x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor) -> Tensor:
    """The same as `experts_ref`, by grouped products on CPU and GPU.

    Widths and dtypes that `can_group` refuses take the loop. Weights that are frozen get no gradient, and cost none.
    """
    if not can_group(x_TD, *down_EDF.shape[1:]):
        return experts_ref(x_TD, experts_TK, weights_TK, gate_up_EFD, down_EDF)
    return _Experts.apply(x_TD, experts_TK, weights_TK, gate_up_EFD, down_EDF)


def can_group(x_TD: Tensor, *widths: int) -> bool:
    """Torch's grouped product wants rows of whole 16 bytes, and bf16 on CUDA."""
    return not any(width * x_TD.element_size() % 16 for width in widths) and (not x_TD.is_cuda or x_TD.dtype == torch.bfloat16)


class Dispatch:
    """Where each (token, choice) pair goes: rows grouped by expert, each group possibly padded.

    Groups follow one another without padding and no host wait, except in bf16 on the CPU. There a new row count costs oneDNN a millisecond
    of code generation, ten times the product itself, so groups are padded to a multiple of 32 rows; and where the experts are busy enough
    alike, to one common size, since a batched product is twice as fast as a grouped one (in fp32 MKL generates nothing and gains nothing
    by a batch). A padding row repeats token 0 with weight 0, and everything it touches is multiplied by its weight.
    """

    ALIGNMENT = 32
    WASTE = 1.4  # a batched product may do this much more work than the grouped one it replaces

    def __init__(self, experts_TK: Tensor, weights_TK: Tensor, num_experts: int, dtype: torch.dtype) -> None:
        T, K = experts_TK.shape
        M, device = T * K, experts_TK.device
        flat_M = experts_TK.reshape(-1)
        order_M = flat_M.argsort(stable=True)  # stable: the same sums in the same order every time
        sorted_M = flat_M[order_M]
        # boundaries by search, not bincount: no host wait and no atomics
        ends_E = torch.searchsorted(sorted_M, torch.arange(num_experts, device=device), right=True)
        self.batched, rows, row_M = False, M, torch.arange(M, device=device)
        if device.type == "cpu" and dtype.itemsize < 4 and 16 * num_experts <= M:
            counts_E = ends_E.diff(prepend=ends_E.new_zeros(1))
            padded_E = (counts_E + self.ALIGNMENT - 1) // self.ALIGNMENT * self.ALIGNMENT
            largest = int(padded_E.max())
            self.batched = largest * num_experts <= self.WASTE * int(padded_E.sum())
            if self.batched:
                padded_E = torch.full_like(padded_E, largest)
            row_M = row_M + (padded_E.cumsum(0) - padded_E - ends_E + counts_E)[sorted_M]
            ends_E = padded_E.cumsum(0)
            rows = int(ends_E[-1])
        self.ends_E, self.num_experts = ends_E.to(torch.int32), num_experts
        self.row_M = torch.empty_like(order_M)  # pair -> row
        self.row_M[order_M] = row_M
        self.token_X = torch.zeros(rows, dtype=torch.int64, device=device)  # row -> token
        self.token_X[row_M] = order_M // K
        self.weight_X1 = torch.zeros(rows, 1, dtype=dtype, device=device)
        self.weight_X1[row_M, 0] = weights_TK.reshape(-1)[order_M].to(dtype)

    def product(self, x_XA: Tensor, w_EAB: Tensor) -> Tensor:
        """Each group's rows times its expert's matrix."""
        if self.batched:
            return torch.bmm(x_XA.unflatten(0, (self.num_experts, -1)), w_EAB).flatten(0, 1)
        return F.grouped_mm(x_XA, w_EAB, offs=self.ends_E)

    def outer(self, y_XB: Tensor, x_XA: Tensor) -> Tensor:
        """Each group's y^T x: the gradient (E, B, A) of a weight."""
        if self.batched:
            y_EXB, x_EXA = (z.unflatten(0, (self.num_experts, -1)) for z in (y_XB, x_XA))
            return torch.bmm(y_EXB.transpose(1, 2), x_EXA)
        return F.grouped_mm(y_XB.t(), x_XA, offs=self.ends_E)

    def gather(self, x_TD: Tensor) -> Tensor:
        """Each row's token. Whole rows at once: indexing by a tensor takes four times as long on a CPU."""
        return F.embedding(self.token_X, x_TD)

    def combine(self, y_XD: Tensor, K: int) -> Tensor:
        """Add the K rows of each token, (T, K, D) never being there."""
        return F.embedding_bag(self.row_M.view(-1, K), y_XD, mode="sum")


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor) -> Tensor:
        go = Dispatch(experts_TK, weights_TK, gate_up_EFD.shape[0], x_TD.dtype)
        gate_up_XF = go.product(go.gather(x_TD), gate_up_EFD.transpose(1, 2))
        gate, up = gate_up_XF.chunk(2, dim=-1)
        y_XD = go.product(swiglu(gate, up, go.weight_X1), down_EDF.transpose(1, 2))
        ctx.save_for_backward(x_TD, weights_TK, gate_up_EFD, down_EDF, gate_up_XF)
        ctx.go = go
        return go.combine(y_XD, weights_TK.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x_TD, weights_TK, gate_up_EFD, down_EDF, gate_up_XF = ctx.saved_tensors
        go, K = ctx.go, weights_TK.shape[1]
        grad_XD = go.gather(grads[0])
        gate, up = gate_up_XF.chunk(2, dim=-1)
        grad_gate_up_XF, grad_weight_X, scaled_XF = swiglu_backward(go.product(grad_XD, down_EDF), gate, up, go.weight_X1)
        grad_weights_TK = grad_weight_X[go.row_M].unflatten(0, (-1, K)).to(weights_TK.dtype)
        grad_down_EDF = go.outer(grad_XD, scaled_XF) if ctx.needs_input_grad[4] else None
        grad_gate_up_EFD = go.outer(grad_gate_up_XF, go.gather(x_TD)) if ctx.needs_input_grad[3] else None
        return go.combine(go.product(grad_gate_up_XF, gate_up_EFD), K), None, grad_weights_TK, grad_gate_up_EFD, grad_down_EDF
