"""Rotary position embeddings: frequencies, their long-context scalings, and the two ways to lay out a pair.

The frequencies follow Hugging Face's definitions of `default`, `linear`, `llama3` and `yarn` (YaRN: arXiv 2309.00071;
DeepSeek-V3's constants: SPEC of its released code). Two layouts exist and mixing them up is the usual porting bug:
Llama and Qwen rotate (x_j, x_{j+d/2}), DeepSeek's weights are trained for interleaved pairs (x_2j, x_2j+1). The
interleaved rotation writes its output in half-split order, for queries and keys alike, so scores do not change.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from jevons.model.config import ModelConfig

ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def _mscale(factor: float, weight: float = 1.0) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def inverse_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """(R/2,) fp32 angles per position, and the factor that multiplies cos and sin (not 1 for plain YaRN only)."""
    dim, base, scaling = config.rope_dim, config.rope_theta, config.rope_scaling or {}
    inverse = 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)
    kind = scaling.get("rope_type", "default")
    if kind == "default":
        return inverse, 1.0
    factor = scaling["factor"]
    if kind == "linear":
        return inverse / factor, 1.0
    original = scaling.get("original_max_position_embeddings") or config.max_position_embeddings
    if kind == "llama3":
        wavelength = 2 * math.pi / inverse
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        smooth = ((original / wavelength - low) / (high - low)).clamp(0, 1)
        return (1 - smooth) * inverse / factor + smooth * inverse, 1.0
    if kind == "yarn":

        def correction(rotations: float) -> float:
            return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

        low, high = correction(scaling.get("beta_fast") or 32), correction(scaling.get("beta_slow") or 1)
        if scaling.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        ramp = ((torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / max(high - low, 0.001)).clamp(0, 1)
        # DeepSeek's mscale and mscale_all_dim cancel here; their temperature goes into `softmax_scale`, squared
        magnitude = scaling.get("attention_factor")
        if magnitude is None:
            mscale, all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
            magnitude = _mscale(factor, mscale) / _mscale(factor, all_dim) if mscale and all_dim else _mscale(factor)
        return inverse / factor * ramp + inverse * (1 - ramp), magnitude
    raise ValueError(f"rope_scaling.rope_type: unknown {kind!r}; known: {', '.join(ROPE_TYPES)}")


def softmax_scale(config: ModelConfig) -> float:
    """1/sqrt(width of a query head), times YaRN's squared temperature for MLA (mscale_all_dim)."""
    scale = config.qk_head_dim**-0.5
    scaling = config.rope_scaling or {}
    if config.is_mla and scaling.get("rope_type", "default") != "default" and scaling.get("mscale_all_dim"):
        scale *= _mscale(scaling["factor"], scaling["mscale_all_dim"]) ** 2
    return scale


def rotate(x_TNR: Tensor, cos_TR: Tensor, sin_TR: Tensor, interleave: bool) -> Tensor:
    """Rotate (T, N, R) by per-token cos and sin of (T, R/2). Output in half-split order for both layouts."""
    cos, sin = cos_TR[:, None], sin_TR[:, None]
    if interleave:
        a, b = x_TNR[..., 0::2], x_TNR[..., 1::2]
    else:
        a, b = x_TNR.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
