"""Attention over gathered rows of a cache, and the plain reference of all causal attention."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_attention_ref(q_SLNH: Tensor, k_SLMH: Tensor, v_SLMV: Tensor, scale: float) -> Tensor:
    """Plain causal attention in fp32: (S, L, N, H), (S, L, M, H), (S, L, M, V) -> (S, L, N, V); M divides N."""
    groups = q_SLNH.shape[2] // k_SLMH.shape[2]
    k, v = (x.repeat_interleave(groups, dim=2).float() for x in (k_SLMH, v_SLMV))
    score_SNLL = torch.einsum("slnh,smnh->snlm", q_SLNH.float(), k) * scale
    length = q_SLNH.shape[1]
    mask = torch.ones(length, length, dtype=torch.bool, device=q_SLNH.device).triu(1)
    probability = score_SNLL.masked_fill(mask, -math.inf).softmax(-1)
    return torch.einsum("snlm,smnv->slnv", probability, v).to(q_SLNH.dtype)


def row_attention(q_SNH: Tensor, k_SCMH: Tensor, v_SCMV: Tensor, bias_SC: Tensor | None, scale: float) -> Tensor:
    """One query row a sequence over its cache rows: (S, N, H), (S, C, M, H), (S, C, M, V) -> (S, N, V).

    `bias_SC` is added to the scores, -inf where a row is padding, in the queries' dtype; None where nothing is padded. The
    heads of a group become query rows of one fused call: a tenth of the time of plain products, and keys are read once.
    """
    S, N, H = q_SNH.shape
    M = k_SCMH.shape[2]
    bias = None if bias_SC is None else bias_SC[:, None, None]  # a float bias: the CPU kernel is slow with a boolean mask
    q, k, v = q_SNH.reshape(S, M, N // M, H), k_SCMH.transpose(1, 2), v_SCMV.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale).reshape(S, N, -1)


def chunk_attention(q_LNH: Tensor, k_CMH: Tensor, v_CMV: Tensor, bias_LC: Tensor, scale: float) -> Tensor:
    """The last L tokens of one sequence over all its C: (L, N, H), (C, M, H), (C, M, V) -> (L, N, V), V at most H. `bias_LC` as above."""
    width = v_CMV.shape[-1]
    if width < q_LNH.shape[-1]:
        v_CMV = F.pad(v_CMV, (0, q_LNH.shape[-1] - width))
    q, k, v = (x.transpose(0, 1)[None] for x in (q_LNH, k_CMH, v_CMV))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias_LC, scale=scale, enable_gqa=k.shape[1] != q.shape[1])
    return out[0, ..., :width].transpose(0, 1)


def absorbed_attention(q_SNH: Tensor, cache_SCX: Tensor, bias_SC: Tensor | None, w_kvb: Tensor, v_width: int, scale: float) -> Tensor:
    """MLA's decode in latent space (DeepSeek-V2, section 2.1): queries (S, N, nope + R), cache rows [latent | rope key] -> (S, N, V).

    The key half of kv_b goes into the query, the value half onto the output, so that all heads share one key of width
    C + R and no cached token is ever expanded. `w_kvb` is (N * (nope + V), C), per head the nope key rows first.
    """
    N, latent = q_SNH.shape[1], w_kvb.shape[1]
    w_NXC = w_kvb.view(N, -1, latent)
    nope = w_NXC.shape[1] - v_width
    q_nope, q_pe = q_SNH.transpose(0, 1).split((nope, q_SNH.shape[-1] - nope), dim=-1)
    q_NSX = torch.cat((torch.bmm(q_nope, w_NXC[:, :nope]), q_pe), dim=-1)
    cache = cache_SCX[:, :, None]
    # the values are the keys' latent part; taking the whole row and cutting the output spares a copy
    out_SNC = row_attention(q_NSX.transpose(0, 1), cache, cache, bias_SC, scale)[..., :latent]
    return torch.bmm(out_SNC.transpose(0, 1), w_NXC[:, nope:].transpose(1, 2)).transpose(0, 1)
