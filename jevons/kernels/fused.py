"""What stands between a layer's products in training on a CPU: RMSNorm and SwiGLU, natively.

Problem: torch makes both of half a dozen operators, each a pass over memory, and autograd keeps what lies between them; in fp32 they took
a quarter of a small model's step. Approach: one native pass forward and one backward (native/pointwise.cpp), fp32 inside, rounded
once, that keep their inputs only. kernels/pointwise.py calls them where `usable` says so. Not done: joining them with the products.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jevons.kernels import native
from jevons.kernels.compiler import load

PIECE = 64  # rows whose gradients of a norm's weight are added up together; native/pointwise.cpp has it, too


def usable(*tensors: Tensor) -> bool:
    """Not where layers are being compiled: a native call would cut them in two."""
    if torch.compiler.is_compiling() or any(x.device.type != "cpu" or x.dim() < 2 or x.stride(-1) != 1 for x in tensors):
        return False
    return tensors[0].dtype in native.DTYPE and all(x.dtype == tensors[0].dtype for x in tensors) and native.available()


def swiglu_forward(gate_XF: Tensor, up_XF: Tensor, scale_X1: Tensor | None = None) -> Tensor:
    """silu(gate) * up, times a factor for each row."""
    out_XF = torch.empty(gate_XF.shape, dtype=gate_XF.dtype)
    load().functions.jevons_swiglu(*_pair(gate_XF, up_XF, scale_X1), out_XF.data_ptr(), torch.get_num_threads())
    return out_XF


def swiglu_backward(grad_XF: Tensor, gate_XF: Tensor, up_XF: Tensor, scale_X1: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Of `swiglu_forward` the gradients [gate | up] (X, 2F), the scale's own (X,) in fp32, and once more what the forward pass gave.

    Without a scale the latter two are empty. By torch where this is not `usable`.
    """
    if not usable(gate_XF, up_XF):
        return _swiglu_backward_ref(grad_XF, gate_XF, up_XF, scale_X1)
    grad_XF, (rows, width) = grad_XF.contiguous(), grad_XF.shape
    both = torch.empty(rows, 2 * width, dtype=grad_XF.dtype)
    scaled = 0 if scale_X1 is None else rows
    grad_scale_X, again_XF = torch.empty(scaled), torch.empty(scaled, width, dtype=grad_XF.dtype)
    load().functions.jevons_swiglu_backward(
        grad_XF.data_ptr(), *_pair(gate_XF, up_XF, scale_X1), both.data_ptr(), both[:, width:].data_ptr(), 2 * width,
        grad_scale_X.data_ptr(), again_XF.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return both, grad_scale_X, again_XF


def _swiglu_backward_ref(grad_XF: Tensor, gate: Tensor, up: Tensor, scale_X1: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    assert scale_X1 is not None
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    activation = silu * up
    grad_scale_X = (grad_XF * activation).sum(-1, dtype=torch.float32)
    grad_XF = grad_XF * scale_X1
    # d silu(g) / dg = sigmoid(g) + silu(g) (1 - sigmoid(g))
    slope = torch.addcmul(sigmoid, silu, 1 - sigmoid)
    return torch.cat((slope.mul_(up).mul_(grad_XF), grad_XF * silu), -1), grad_scale_X, activation.mul_(scale_X1)


def _pair(gate_XF: Tensor, up_XF: Tensor, scale_X1: Tensor | None) -> tuple[int | None, ...]:
    """Pointers and strides, dtype, rows, width, the scale's pointer."""
    assert gate_XF.shape == up_XF.shape and gate_XF.stride(1) == up_XF.stride(1) == 1 and gate_XF.dtype == up_XF.dtype
    assert scale_X1 is None or (scale_X1.numel() == len(gate_XF) and scale_X1.dtype == gate_XF.dtype and scale_X1.is_contiguous())
    strided = (gate_XF.data_ptr(), gate_XF.stride(0), up_XF.data_ptr(), up_XF.stride(0))
    return *strided, native.DTYPE[gate_XF.dtype], *gate_XF.shape, None if scale_X1 is None else scale_X1.data_ptr()


class SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_XF: Tensor, up_XF: Tensor, scale_X1: Tensor | None) -> Tensor:
        scale_X1 = None if scale_X1 is None else scale_X1.contiguous()
        ctx.save_for_backward(gate_XF, up_XF, scale_X1)
        return swiglu_forward(gate_XF, up_XF, scale_X1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        gate_XF, up_XF, scale_X1 = ctx.saved_tensors
        both_XF, grad_scale_X, _ = swiglu_backward(grads[0], gate_XF, up_XF, scale_X1)
        return *both_XF.chunk(2, dim=-1), None if scale_X1 is None else grad_scale_X[:, None].to(scale_X1.dtype)


class RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x_TD, weight_D)
        ctx.eps = eps
        return native.rms_norm(x_TD, native.Norm(weight_D.float().contiguous(), eps))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x_TD, weight_D = ctx.saved_tensors
        grad_TD, weight, (rows, width) = grads[0].contiguous(), weight_D.float().contiguous(), x_TD.shape
        grad_x_TD, sums = torch.empty(x_TD.shape, dtype=x_TD.dtype), torch.empty(-(-rows // PIECE), width)
        load().functions.jevons_rms_norm_backward(
            grad_TD.data_ptr(), x_TD.data_ptr(), x_TD.stride(0), native.DTYPE[x_TD.dtype], rows, width, weight.data_ptr(), ctx.eps,
            grad_x_TD.data_ptr(), sums.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return grad_x_TD, sums.sum(0).to(weight_D.dtype) if ctx.needs_input_grad[1] else None, None
