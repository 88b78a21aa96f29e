"""Block-scaled FP8 weights, as DeepSeek-V3's checkpoints store them.

A weight of (out, in) in float8_e4m3fn carries one fp32 scale for each 128 x 128 block. The scales are named
`weight_scale_inv`, and all the same the weight is quantised value TIMES scale (DeepSeek-V3, README_WEIGHTS.md): a known
trap. Edges that are not multiples of the block have blocks of their own. Training in FP8 is not here yet.
"""

from __future__ import annotations

import torch
from torch import Tensor

E4M3_MAX = 448.0


def _spread(scale_ij: Tensor, shape: torch.Size, block: tuple[int, int]) -> Tensor:
    """One scale per block -> one per element, cut to `shape`."""
    return scale_ij.repeat_interleave(block[0], 0)[: shape[0]].repeat_interleave(block[1], 1)[:, : shape[1]]


def dequantize_blocks(weight_OI: Tensor, scale_ij: Tensor, dtype: torch.dtype, block: tuple[int, int] = (128, 128)) -> Tensor:
    """(out, in) float8 and its (ceil(out/128), ceil(in/128)) scales -> (out, in) in `dtype`. ValueError where the shapes disagree."""
    expected = tuple(-(-size // step) for size, step in zip(weight_OI.shape, block))
    if tuple(scale_ij.shape) != expected:
        shapes = f"{tuple(scale_ij.shape)}, a weight of {tuple(weight_OI.shape)} in {block} blocks needs {expected}"
        raise ValueError(f"weight_scale_inv has shape {shapes}")
    return (weight_OI.float() * _spread(scale_ij.float(), weight_OI.shape, block)).to(dtype)


def quantize_blocks(weight_OI: Tensor, block: tuple[int, int] = (128, 128)) -> tuple[Tensor, Tensor]:
    """(out, in) -> float8_e4m3fn and fp32 scales with `dequantize_blocks` as its inverse up to rounding.

    ValueError on inf or NaN: the cast to float8 saturates in torch 2.13, which would hide them.
    """
    if not torch.isfinite(weight_OI).all():
        raise ValueError("cannot quantise a weight that holds inf or NaN")
    rows, columns = weight_OI.shape
    padded = torch.nn.functional.pad(weight_OI.float(), (0, -columns % block[1], 0, -rows % block[0]))
    tiles = padded.view(padded.shape[0] // block[0], block[0], padded.shape[1] // block[1], block[1])
    scale_ij = tiles.abs().amax(dim=(1, 3)).clamp_min(1e-4) / E4M3_MAX
    scaled = weight_OI.float() / _spread(scale_ij, weight_OI.shape, block)
    return scaled.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale_ij
