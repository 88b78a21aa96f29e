"""The attention context: how one forward serves training, sampling and serving.

`Transformer.forward(tokens, positions, attend)` gets one of these and asks it for attention, layer by layer. A context
answers two calls, one for each kind of attention, and everything else (documents, caches, batches) is its own affair:

    attend.gqa(layer, q_TNH, k_TMH, v_TMH, scale) -> o_TNH
    attend.mla(layer, q_TNH, ckv_TC, kpe_TR, w_kvb, v_width, scale) -> o_TNV       (q is [nope | rope])

`Packed` below is the context of training and scoring: flat tokens, each seeing the earlier ones of its own document.
The engine's `Paged` reads and writes a cache.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from jevons.kernels.attention import Bucket, segment_attention


class Attend(Protocol):
    """What an attention context answers; `layer` is the global layer index, MTP modules counted on."""

    def gqa(self, layer: int, q_TNH: Tensor, k_TMH: Tensor, v_TMH: Tensor, scale: float) -> Tensor: ...

    def mla(self, layer: int, q_TNH: Tensor, ckv_TC: Tensor, kpe_TR: Tensor, w_kvb: Tensor, v_width: int, scale: float) -> Tensor: ...


def expand_latent(ckv_TC: Tensor, kpe_TR: Tensor, w_kvb: Tensor, heads: int, v_width: int) -> tuple[Tensor, Tensor]:
    """MLA's keys and values from the latent: (T, C), (T, R) -> k (T, N, nope + R), v (T, N, V).

    Rows of kv_b per head: first the nope key rows, then the value rows. The rope key is one head shared by all.
    """
    kv_TNX = F.linear(ckv_TC, w_kvb).view(len(ckv_TC), heads, -1)
    k_nope, v = kv_TNX.split((kv_TNX.shape[-1] - v_width, v_width), dim=-1)
    return torch.cat((k_nope, kpe_TR[:, None].expand(-1, heads, -1)), dim=-1), v


class Packed:
    """Causal attention inside each segment of flat tokens.

    `cu_seqlens` (S + 1,) are the segments' boundaries, from 0 to T, best given on the CPU; `device` is the tokens'.
    Segments are grouped by length into power-of-two buckets and padded inside a bucket, so that the work is at most twice
    the true one and the number of kernel calls is the logarithm of the longest length; segments of one length need no copy.
    """

    def __init__(self, cu_seqlens: Tensor, device: torch.device | str | None = None) -> None:
        device = cu_seqlens.device if device is None else device
        bounds = cu_seqlens.to("cpu", torch.int64)
        starts, lengths = bounds[:-1], bounds.diff()
        keep = lengths > 0
        starts, lengths = starts[keep], lengths[keep]
        self.total = int(bounds[-1])
        self.buckets: list[Bucket] = []
        if len(lengths) and bool((lengths == lengths[0]).all()):
            self.buckets.append(Bucket(len(lengths), int(lengths[0]), None, None, None))
            return
        exponent = torch.ceil(torch.log2(lengths.double())).long().clamp_min(4)  # 16 and shorter share a bucket
        for e in exponent.unique().tolist():
            start_S, length_S = starts[exponent == e], lengths[exponent == e]
            column_L = torch.arange(int(length_S.max()))
            valid_SL = column_L < length_S[:, None]
            # padding repeats the segment's last token: any index will do, no real query looks there
            index_SL = start_S[:, None] + torch.minimum(column_L, length_S[:, None] - 1)
            slot_X = valid_SL.flatten().nonzero().squeeze(1)
            indices = (x.to(device) for x in (index_SL, index_SL[valid_SL], slot_X))
            self.buckets.append(Bucket(len(start_S), len(column_L), *indices))

    def gqa(self, layer: int, q_TNH: Tensor, k_TMH: Tensor, v_TMH: Tensor, scale: float) -> Tensor:
        assert len(q_TNH) == self.total, (len(q_TNH), self.total)
        return segment_attention(q_TNH, k_TMH, v_TMH, self.buckets, scale)

    def mla(self, layer: int, q_TNH: Tensor, ckv_TC: Tensor, kpe_TR: Tensor, w_kvb: Tensor, v_width: int, scale: float) -> Tensor:
        k_TNH, v_TNV = expand_latent(ckv_TC, kpe_TR, w_kvb, q_TNH.shape[1], v_width)
        return self.gqa(layer, q_TNH, k_TNH, v_TNV, scale)
