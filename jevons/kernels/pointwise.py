"""RMSNorm and SwiGLU: on a CPU in training one native pass each way (kernels/fused.py), elsewhere torch's operators."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from jevons.kernels import fused


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension, computed in fp32 and rounded once."""
    if fused.usable(x):
        return fused.RMSNorm.apply(x.flatten(0, -2), weight, eps).view(x.shape)
    return F.rms_norm(x, weight.shape, weight, eps)


def swiglu(gate_XF: Tensor, up_XF: Tensor, scale_X1: Tensor | None = None) -> Tensor:
    """silu(gate) * up, times a factor for each row where that is given."""
    if fused.usable(gate_XF, up_XF):
        return fused.SwiGLU.apply(gate_XF, up_XF, scale_X1)
    out_XF = F.silu(gate_XF) * up_XF
    return out_XF if scale_X1 is None else out_XF * scale_X1
