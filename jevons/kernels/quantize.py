"""Weights packed for the native products: bf16 as they are, or quantised to 8 or 4 bits.

Problem: a decoding step is bound by the bytes of the weights, so they should be few and lie in the order in which the
product reads them. Approach: tiles of 32 output rows, inside a tile K-major, 16 rows side by side for one vector register
(native/product.cpp draws the layout). int8: symmetric in groups of 128 along K, 8.1 bits a weight. int4: a scale and a
least value for each group of 32, 5 bits a weight; asymmetric because it halves the error on real weights, and with the
range of each group shrunk where that lowers its squared error. native/encode.cpp packs (half a billion weights in seconds),
`unpack` in plain torch says what a packed weight means. The format "here" packs nothing: products read fp32 or bf16 weights
where they lie, a fifth slower than packed ones on huge pages, and see what a trainer changed there. Not done: calibration
with activations (GPTQ, AWQ), which needs text.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from jevons.kernels.compiler import load

FORMATS = {"fp32": 0, "bf16": 1, "int8": 2, "int4": 3}
GROUP = {"fp32": 1, "bf16": 2, "int8": 128, "int4": 32}  # K is padded to a multiple
TILE = 32
GROUP_BYTES = {"fp32": 128, "bf16": 128, "int8": 64 + 4096, "int4": 128 + 512}  # of 32 rows
HUGE = 2**21
HERE = "here"


@dataclass
class PackedWeight:
    """One weight (N, K), or a stack of them where `stack` > 0 (experts, heads). With `swiglu`, gate and up of N rows each."""

    data: Tensor  # (stack or 1, tiles, bytes of a tile), uint8; of weights where they lie the rows' addresses
    bias: Tensor | None  # (stack or 1, tiles, 32) fp32
    format: str
    N: int
    K: int
    stack: int
    swiglu: bool
    sources: list[Tensor] = field(default_factory=list, repr=False, compare=False)  # weights that stay where they lie
    read_bias: Callable[[], Tensor] | None = field(default=None, repr=False, compare=False)
    handle: Any = field(default=None, repr=False, compare=False)  # what kernels/native.py passes on

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def refresh(self) -> None:
        """Where weights stay in place: read the bias again, of which this is a copy."""
        if self.bias is not None and self.read_bias is not None:
            self.bias.copy_(self.read_bias().view_as(self.bias))

    def unpack(self) -> Tensor:
        """The weight that products with this mean, fp32: (stack,) (N, K), with `swiglu` (2N, K) and the gate first."""
        assert not self.sources, "not packed"
        weight = _decode(self.data.flatten(0, 1), self.format)[..., : self.K]
        weight = weight.view(max(self.stack, 1), -1, self.K)
        if self.swiglu:
            halves = weight.unflatten(1, (-1, 2, 16)).transpose(1, 2).flatten(2, 3)[:, :, : self.N]
            weight = halves.flatten(1, 2)
        else:
            weight = weight[:, : self.N]
        return weight if self.stack else weight[0]


def pack(weight: Tensor | Sequence[Tensor], format: str, bias: Tensor | Sequence[Tensor] | None = None) -> PackedWeight:
    """(N, K), or several one below the other, or a stack (E, N, K), and its bias (E,) (N,), or several -> `format`.

    ValueError where a quantised weight is not finite.
    """
    weights = [weight] if isinstance(weight, Tensor) else list(weight)
    biases = [bias] if isinstance(bias, Tensor) else list(bias or ())
    stack = weights[0].shape[0] if weights[0].dim() == 3 else 0
    rows = torch.cat([_addresses(w, 1) for w in weights], dim=1)
    N, padding = rows.shape[1], (0, -rows.shape[1] % TILE)

    def read() -> Tensor:
        return F.pad(torch.cat([b.detach().float().view(max(stack, 1), -1) for b in biases], dim=1), padding)

    return _encode(weights, F.pad(rows, padding), read if biases else None, format, N, stack, False)


def pack_swiglu(gate: Tensor, up: Tensor, format: str, gate_bias: Tensor | None = None, up_bias: Tensor | None = None) -> PackedWeight:
    """Gate and up, (F, K) each or stacks of them, for one product that returns silu(gate x) * (up x). Biases: both or neither."""
    assert gate.shape == up.shape and gate.dtype == up.dtype and (gate_bias is None) == (up_bias is None)
    stack, N = gate.shape[0] if gate.dim() == 3 else 0, gate.shape[-2]

    def interleave(a: Tensor, b: Tensor) -> Tensor:
        return torch.stack([x.unflatten(1, (-1, 16)) for x in (a, b)], dim=2).flatten(1)

    def read() -> Tensor:
        both = (F.pad(x.detach().float().view(max(stack, 1), N), (0, -N % 16)) for x in (gate_bias, up_bias) if x is not None)
        return interleave(*both)

    rows = interleave(_addresses(gate, 16), _addresses(up, 16))
    return _encode([gate, up], rows, None if gate_bias is None else read, format, N, stack, True)


def pack_kv_b(w_kvb: Tensor, heads: int, nope: int, format: str) -> tuple[PackedWeight, PackedWeight]:
    """MLA's kv_b (N * (nope + V), C) as two stacks of one matrix a head: onto the query (C, nope), onto the output (V, C)."""
    w_NXC = w_kvb.view(heads, -1, w_kvb.shape[1])
    return pack(w_NXC[:, :nope].mT.contiguous(), format), pack(w_NXC[:, nope:], format)


def check(format: str) -> None:
    if format not in FORMATS:
        raise ValueError(f"weight format: unknown {format!r}; known: {', '.join(FORMATS)}")


def _addresses(weight: Tensor, multiple: int) -> Tensor:
    """Where each row of (E,) (N, K) lies in memory, (E or 1, N padded with 0)."""
    assert weight.stride(-1) == 1 and weight.dtype in (torch.float32, torch.bfloat16), (weight.stride(), weight.dtype)
    size = weight.element_size()
    address = weight.data_ptr() + torch.arange(weight.shape[-2])[None] * (weight.stride(-2) * size)
    if weight.dim() == 3:
        address = address + torch.arange(weight.shape[0])[:, None] * (weight.stride(0) * size)
    return F.pad(address, (0, -weight.shape[-2] % multiple))


def _encode(
    sources: list[Tensor], rows: Tensor, read_bias: Callable[[], Tensor] | None, format: str, N: int, stack: int, swiglu: bool
) -> PackedWeight:
    bias = None if read_bias is None else read_bias().view(max(stack, 1), -1, TILE).contiguous()
    if format == HERE:
        rows = torch.where(rows == 0, sources[0].data_ptr(), rows).flatten()  # what is read as padding is thrown away
        data = torch.cat((rows, rows[-1:].expand(TILE))).contiguous()
        format = "fp32" if sources[0].dtype == torch.float32 else "bf16"
        return PackedWeight(data, bias, format, N, sources[0].shape[-1], stack, swiglu, sources, read_bias)
    check(format)
    library, reason = load()
    assert library is not None, reason
    K, tiles = sources[0].shape[-1], rows.numel() // TILE
    data = _memory(tiles * -(-K // GROUP[format]) * GROUP_BYTES[format])
    dtype = int(sources[0].dtype == torch.bfloat16)
    rows = rows.contiguous()
    if not library.jevons_encode(FORMATS[format], dtype, rows.data_ptr(), tiles, K, data.data_ptr(), torch.get_num_threads()):
        raise ValueError("cannot quantise a weight that holds inf or NaN")
    return PackedWeight(data.view(max(stack, 1), tiles // max(stack, 1), -1), bias, format, N, K, stack, swiglu)


def _memory(size: int) -> Tensor:
    """Bytes, on huge pages where they are many: a stream of weights is read up to 1.4 times as fast from those."""
    if size < HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8)
    region = mmap.mmap(-1, size + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    region.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(region, dtype=torch.uint8)
    start = -whole.data_ptr() % HUGE
    return whole[start : start + size]


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
