"""The small parts that every block is made of."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from jevons.kernels.pointwise import rms_norm, swiglu


class RMSNorm(nn.Module):
    """x / rms(x) * weight, over the last dimension, computed in fp32 and rounded once.

    Hugging Face's modules round before the weight as well: in bf16 the two differ by that rounding, in fp32 not at all.
    """

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, width: int, inner: int, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x_TD), self.up_proj(x_TD)))
