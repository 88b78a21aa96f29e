"""The attention context: how one forward serves training, sampling and serving.

`Transformer.forward(tokens, positions, attend)` gets one of these and asks it for attention, layer by layer. A context
answers two calls, one for each kind of attention, and everything else (documents, caches, batches) is its own affair:

    attend.gqa(layer, q_TNH, k_TMH, v_TMH, scale) -> o_TNH
    attend.mla(layer, q_TNH, ckv_TC, kpe_TR, w_kvb, v_width, scale) -> o_TNV       (q is [nope | rope])

`Packed` below is the context of training and scoring: flat tokens, each seeing the earlier ones of its own document. `Shared` is
that of reinforcement learning: the samples of one prompt see it too, and it is computed once. The engine's `Paged` reads and writes
a cache.
"""

from __future__ import annotations

from functools import cached_property
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from jevons.kernels.segment import Bucket, Table, make_table, native_attention, segment_attention, usable


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

    `cu_seqlens` (S + 1,) are the segments' boundaries, from 0 to T, best given on the CPU; `device` is the tokens'. On a CPU
    one native kernel walks the segments; elsewhere they are grouped by length into power-of-two buckets and padded inside a
    bucket, so that the work is at most twice the true one and the number of kernel calls is the logarithm of the longest length.
    """

    def __init__(self, cu_seqlens: Tensor, device: torch.device | str | None = None) -> None:
        self.device = cu_seqlens.device if device is None else device
        self.bounds = cu_seqlens.to("cpu", torch.int64)
        self.prefix_S = torch.full((len(self.bounds) - 1,), -1)
        self.total = int(self.bounds[-1])

    @cached_property
    def table(self) -> Table:
        return make_table(self.bounds, self.prefix_S)

    @cached_property
    def buckets(self) -> list[Bucket]:
        """Segments of one prefix and of like length together."""
        lengths, buckets = self.bounds.diff(), []
        whole = lengths[lengths > 0]
        if len(whole) and bool((whole == whole[0]).all() and (self.prefix_S < 0).all()):
            return [Bucket(len(whole), int(whole[0]), None, None, None)]  # a view is enough
        for p in self.prefix_S.unique().tolist():  # -1 first: gradients of prefixes are added to those that they have by themselves
            prefix = slice(int(self.bounds[p]), int(self.bounds[p + 1])) if p >= 0 and lengths[p] else None
            exponent = torch.ceil(torch.log2(lengths.double())).clamp_min(4)  # 16 and shorter share a bucket
            mine = (self.prefix_S == p) & (lengths > 0)
            for e in exponent[mine].unique().tolist():
                start_S, length_S = (x[mine & (exponent == e)] for x in (self.bounds[:-1], lengths))
                column_L = torch.arange(int(length_S.max()))
                valid_SL = column_L < length_S[:, None]
                # padding repeats the segment's last token: any index will do, no real query looks there
                index_SL = start_S[:, None] + torch.minimum(column_L, length_S[:, None] - 1)
                slot_X = valid_SL.flatten().nonzero().squeeze(1)
                index_SL, token_X, slot_X = (x.to(self.device) for x in (index_SL, index_SL[valid_SL], slot_X))
                buckets.append(Bucket(len(start_S), len(column_L), index_SL, token_X, slot_X, prefix))
        return buckets

    def gqa(self, layer: int, q_TNH: Tensor, k_TMH: Tensor, v_TMV: Tensor, scale: float) -> Tensor:
        assert len(q_TNH) == self.total, (len(q_TNH), self.total)
        if usable(q_TNH, v_TMV):
            return native_attention(q_TNH, k_TMH, v_TMV, self.table, scale)
        return segment_attention(q_TNH, k_TMH, v_TMV, self.buckets, scale)

    def mla(self, layer: int, q_TNH: Tensor, ckv_TC: Tensor, kpe_TR: Tensor, w_kvb: Tensor, v_width: int, scale: float) -> Tensor:
        k_TNH, v_TNV = expand_latent(ckv_TC, kpe_TR, w_kvb, q_TNH.shape[1], v_width)
        return self.gqa(layer, q_TNH, k_TNH, v_TNV, scale)


class Shared(Packed):
    """The same, and a segment i with prefix_S[i] = p >= 0 also sees all of segment p, whose continuation it is.

    So the G samples of a prompt cost one reading of it, forward and backward. A prefix comes before what continues it and has no
    prefix itself.
    """

    def __init__(self, cu_seqlens: Tensor, prefix_S: Tensor, device: torch.device | str | None = None) -> None:
        super().__init__(cu_seqlens, device)
        self.prefix_S = prefix_S.to("cpu", torch.int64)
        assert bool((self.prefix_S < torch.arange(len(prefix_S))).all() and (self.prefix_S[self.prefix_S[self.prefix_S >= 0]] < 0).all()), (
            prefix_S
        )
