"""Weights packed for the native products: bf16 as they are, or quantised to 8 or 4 bits.

Problem: a decoding step is bound by the bytes of the weights, so they should be few and lie in the order in which the
product reads them. Approach: tiles of 32 output rows, inside a tile K-major, 16 rows side by side for one vector register
(native/product.cpp draws the layout). int8: symmetric in groups of 128 along K, 8.1 bits a weight. int4: a scale and a
least value for each group of 32, 5 bits a weight; asymmetric because it halves the error on real weights, and with the
range of each group shrunk where that lowers its squared error. Everything here is plain torch; `unpack` says what a packed
weight means. Not done: calibration with activations (GPTQ, AWQ), which needs text.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

FORMATS = {"fp32": 0, "bf16": 1, "int8": 2, "int4": 3}
GROUP = {"fp32": 1, "bf16": 2, "int8": 128, "int4": 32}  # K is padded to a multiple
TILE = 32
SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8)  # shares of a group's range that int4 tries
CHUNK = 2**20  # weights quantised at a time


@dataclass
class PackedWeight:
    """One weight (N, K), or a stack of them where `stack` > 0 (experts, heads). With `swiglu`, gate and up of N rows each."""

    data: Tensor  # (stack or 1, tiles, bytes of a tile), uint8
    bias: Tensor | None  # (stack or 1, tiles, 32) fp32
    format: str
    N: int
    K: int
    stack: int
    swiglu: bool
    handle: Any = field(default=None, repr=False, compare=False)  # what kernels/native.py passes on

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def unpack(self) -> Tensor:
        """The weight that products with this mean, fp32: (stack,) (N, K), with `swiglu` (2N, K) and the gate first."""
        weight = _decode(self.data.flatten(0, 1), self.format)[..., : self.K]
        weight = weight.view(max(self.stack, 1), -1, self.K)
        if self.swiglu:
            halves = weight.unflatten(1, (-1, 2, 16)).transpose(1, 2).flatten(2, 3)[:, :, : self.N]
            weight = halves.flatten(1, 2)
        else:
            weight = weight[:, : self.N]
        return weight if self.stack else weight[0]


def pack(weight: Tensor, format: str, bias: Tensor | None = None) -> PackedWeight:
    """(N, K), or a stack (E, N, K), and its bias (E,) (N,) -> `format`. ValueError where a quantised weight is not finite."""
    check(format)
    stack = weight.shape[0] if weight.dim() == 3 else 0
    weight = weight.detach() if stack else weight.detach()[None]
    N = weight.shape[1]
    rows = F.pad(weight, (0, 0, 0, -N % TILE))
    if bias is not None:
        bias = F.pad(bias.detach().float().view(max(stack, 1), N), (0, -N % TILE)).unflatten(1, (-1, TILE))
    return PackedWeight(_encode_all(rows, format), bias, format, N, weight.shape[2], stack, False)


def pack_swiglu(gate: Tensor, up: Tensor, format: str, gate_bias: Tensor | None = None, up_bias: Tensor | None = None) -> PackedWeight:
    """Gate and up, (F, K) each or stacks of them, for one product that returns silu(gate x) * (up x). Biases: both or neither."""
    check(format)
    assert gate.shape == up.shape and (gate_bias is None) == (up_bias is None)
    stack = gate.shape[0] if gate.dim() == 3 else 0
    count, N, K = max(stack, 1), gate.shape[-2], gate.shape[-1]

    def interleave(a: Tensor, b: Tensor) -> Tensor:
        return torch.stack([F.pad(x, (0, 0, 0, -N % 16)).unflatten(1, (-1, 16)) for x in (a, b)], dim=2).flatten(1, 3)

    rows = interleave(gate.detach().view(count, N, K), up.detach().view(count, N, K))
    bias = None
    if gate_bias is not None and up_bias is not None:
        bias = interleave(*(x.detach().float().view(count, N, 1) for x in (gate_bias, up_bias))).view(count, -1, TILE)
    return PackedWeight(_encode_all(rows, format), bias, format, N, K, stack, True)


def pack_kv_b(w_kvb: Tensor, heads: int, nope: int, format: str) -> tuple[PackedWeight, PackedWeight]:
    """MLA's kv_b (N * (nope + V), C) as two stacks of one matrix a head: onto the query (C, nope), onto the output (V, C)."""
    w_NXC = w_kvb.view(heads, -1, w_kvb.shape[1])
    return pack(w_NXC[:, :nope].mT, format), pack(w_NXC[:, nope:], format)


def check(format: str) -> None:
    if format not in FORMATS:
        raise ValueError(f"weight format: unknown {format!r}; known: {', '.join(FORMATS)}")


def _encode_all(rows: Tensor, format: str) -> Tensor:
    """(E, N, K), N in whole tiles -> (E, tiles, bytes)."""
    stack, N, K = rows.shape
    tiles = rows.reshape(-1, TILE, K)
    padding = -K % GROUP[format]
    step = max(1, CHUNK // (TILE * K))
    first = _encode(F.pad(tiles[:1], (0, padding)), format)
    data = torch.empty(len(tiles), first.shape[1], dtype=torch.uint8)
    for i in range(0, len(tiles), step):
        data[i : i + step] = _encode(F.pad(tiles[i : i + step], (0, padding)), format)
    return data.view(stack, N // TILE, -1)


def _bytes(*parts: Tensor) -> Tensor:
    return torch.cat([x.contiguous().view(torch.uint8).flatten(2) for x in parts], dim=-1)


def _encode(w: Tensor, format: str) -> Tensor:
    """(tiles, 32, K) -> (tiles, bytes)."""
    tiles, _, K = w.shape
    if format == "fp32":
        return w.float().transpose(1, 2).contiguous().view(torch.uint8).flatten(1)
    if format == "bf16":
        return w.bfloat16().view(tiles, 32, K // 2, 2).transpose(1, 2).contiguous().view(torch.uint8).flatten(1)
    w_TNGk = w.float().unflatten(2, (-1, GROUP[format]))
    if not torch.isfinite(w_TNGk).all():
        raise ValueError("cannot quantise a weight that holds inf or NaN")
    if format == "int8":
        scale = (w_TNGk.abs().amax(-1) / 127).bfloat16()
        q = (w_TNGk / _nonzero(scale)).round_().clamp_(-127, 127).add_(128).to(torch.uint8)
        quads = q.unflatten(-1, (32, 4)).permute(0, 2, 3, 1, 4)
        return _bytes(scale.transpose(1, 2), quads).flatten(1)
    scale, least, q = _fit(w_TNGk)
    quads = q.to(torch.uint8).unflatten(-1, (8, 4)).permute(0, 2, 3, 1, 4)
    low, high = quads.split(16, dim=3)
    return _bytes(scale.transpose(1, 2), least.transpose(1, 2), low | high << 4).flatten(1)


def _nonzero(scale: Tensor) -> Tensor:
    scale = scale.float()[..., None]
    return torch.where(scale == 0, 1.0, scale)


def _fit(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Groups (..., 32) -> bf16 scales and least values and the codes 0..15, the range with the lowest squared error of those tried."""
    low, high = w.amin(-1), w.amax(-1)
    middle, half = (low + high) / 2, (high - low) / 2
    best: tuple[Tensor, Tensor, Tensor] | None = None
    lowest = torch.empty(0)
    for share in SHRINK:
        scale, least = (half * (2 * share / 15)).bfloat16(), (middle - half * share).bfloat16()
        start, step = least.float()[..., None], _nonzero(scale)
        q = (w - start).div_(step).round_().clamp_(0, 15)
        error = (q * step).add_(start).sub_(w).square_().sum(-1)
        if best is None:
            best, lowest = (scale, least, q), error
            continue
        better = error < lowest
        lowest = torch.where(better, error, lowest)
        scale, least = torch.where(better, scale, best[0]), torch.where(better, least, best[1])
        best = scale, least, torch.where(better[..., None], q, best[2])
    assert best is not None
    return best


def _decode(data: Tensor, format: str) -> Tensor:
    """(tiles, bytes) -> (tiles, 32, K) fp32."""
    tiles = len(data)
    if format == "fp32":
        return data.view(torch.float32).view(tiles, -1, 32).transpose(1, 2).contiguous()
    if format == "bf16":
        return data.view(torch.bfloat16).view(tiles, -1, 32, 2).transpose(1, 2).flatten(2).float()
    head = 64 if format == "int8" else 128
    groups = data.view(tiles, -1, head + (4096 if format == "int8" else 512))
    scale_TGN = groups[..., :64].contiguous().view(torch.bfloat16).float()
    codes = groups[..., head:]
    if format == "int8":
        q = codes.reshape(tiles, -1, 32, 32, 4).float() - 128
        w = q * scale_TGN[:, :, None, :, None]
    else:
        packed = codes.reshape(tiles, -1, 8, 16, 4)
        q = torch.cat((packed & 15, packed >> 4), dim=3).float()
        least_TGN = groups[..., 64:128].contiguous().view(torch.bfloat16).float()
        w = q * scale_TGN[:, :, None, :, None] + least_TGN[:, :, None, :, None]
    return w.permute(0, 3, 1, 2, 4).flatten(2)
