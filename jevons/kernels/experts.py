"""Routed experts: every token through the K experts chosen for it, weighted and summed.

Problem: rows must be grouped by expert, and a Python loop over experts leaves most of the machine idle. Approach: sort
the (token, choice) pairs by expert, run one grouped product for gate and up and one for down, put the rows back in
order and add the K rows of each token. No capacity, no dropped tokens, no padding. The routing weight multiplies the
activation before the down projection (the product is linear), which is narrower than the output. Forward and backward
are written together so that only the inputs, the pre-activation and the sorting survive between them.
Not done: expert parallelism, which replaces the dispatch and leaves these products alone.

    x_TD --gather by expert--> x_MD --grouped--> [gate | up]_MF2 --silu*up*weight--> a_MF --grouped--> y_MD --sum K--> y_TD
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


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

    Torch's grouped product wants rows of whole 16 bytes, and bf16 on CUDA: other widths and dtypes take the loop.
    """
    ragged = any(width * x_TD.element_size() % 16 for width in down_EDF.shape[1:])
    if ragged or (x_TD.is_cuda and x_TD.dtype != torch.bfloat16):
        return experts_ref(x_TD, experts_TK, weights_TK, gate_up_EFD, down_EDF)
    return _Experts.apply(x_TD, experts_TK, weights_TK, gate_up_EFD, down_EDF)


def _swiglu(gate_up_MF: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gate, up = gate_up_MF.chunk(2, dim=-1)
    return gate, up, torch.sigmoid(gate), F.silu(gate) * up


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor) -> Tensor:
        T, K = experts_TK.shape
        E = gate_up_EFD.shape[0]
        sorted_M, order_M = experts_TK.reshape(-1).sort(stable=True)  # stable: the same sums in the same order every time
        # boundaries by search, not bincount: no host synchronisation and no atomics
        ends_E = torch.searchsorted(sorted_M, torch.arange(E, device=sorted_M.device), right=True).to(torch.int32)
        token_M = order_M // K
        inverse_M = torch.empty_like(order_M)
        inverse_M[order_M] = torch.arange(T * K, device=order_M.device)
        weight_M = weights_TK.reshape(-1)[order_M].to(x_TD.dtype)

        gate_up_MF = F.grouped_mm(x_TD[token_M], gate_up_EFD.transpose(1, 2), offs=ends_E)
        *_, activation_MF = _swiglu(gate_up_MF)
        y_MD = F.grouped_mm(activation_MF.mul_(weight_M[:, None]), down_EDF.transpose(1, 2), offs=ends_E)
        ctx.save_for_backward(x_TD, weights_TK, gate_up_EFD, down_EDF, gate_up_MF, weight_M, order_M, inverse_M, ends_E)
        return y_MD[inverse_M].view(T, K, -1).sum(1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (grad_TD,) = grads
        x_TD, weights_TK, gate_up_EFD, down_EDF, gate_up_MF, weight_M, order_M, inverse_M, ends_E = ctx.saved_tensors
        T, K = weights_TK.shape
        token_M = order_M // K
        grad_MD = grad_TD[token_M]
        gate_MF, up_MF, sigmoid_MF, activation_MF = _swiglu(gate_up_MF)

        grad_scaled_MF = F.grouped_mm(grad_MD, down_EDF, offs=ends_E)
        grad_down_EDF = F.grouped_mm(grad_MD.t(), activation_MF * weight_M[:, None], offs=ends_E)
        grad_weight_M = (grad_scaled_MF * activation_MF).sum(-1, dtype=torch.float32)
        grad_activation_MF = grad_scaled_MF.mul_(weight_M[:, None])
        grad_gate_MF = grad_activation_MF * up_MF * sigmoid_MF * (1 + gate_MF * (1 - sigmoid_MF))
        grad_up_MF = grad_activation_MF * gate_MF * sigmoid_MF
        grad_gate_up_MF = torch.cat((grad_gate_MF, grad_up_MF), dim=-1)
        grad_gate_up_EFD = F.grouped_mm(grad_gate_up_MF.t(), x_TD[token_M], offs=ends_E)
        grad_x_TD = F.grouped_mm(grad_gate_up_MF, gate_up_EFD, offs=ends_E)[inverse_M].view(T, K, -1).sum(1)
        grad_weights_TK = grad_weight_M[inverse_M].view(T, K).to(weights_TK.dtype)
        return grad_x_TD, None, grad_weights_TK, grad_gate_up_EFD, grad_down_EDF
