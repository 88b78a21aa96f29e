"""Causal attention over padded segments, and over gathered cache rows.

Problem: packed tokens hold documents of any length, and a query must see the earlier tokens of its own document only.
Approach: segments of similar length are laid out as a padded (S, L) batch and go through one
`scaled_dot_product_attention` with its causal flag. Padding stands at the end of a segment, so under a causal mask no
real query ever sees it and no mask tensor is needed. Not done: FlexAttention (no CPU backward) and varlen kernels
(CUDA only, and they refuse MLA's V width).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# CPU flash attention pays off past this length; below it plain batched products are faster, forward and backward
PLAIN_LENGTH = 1024


def causal_attention_ref(q_SLNH: Tensor, k_SLMH: Tensor, v_SLMV: Tensor, scale: float) -> Tensor:
    """Plain causal attention in fp32: (S, L, N, H), (S, L, M, H), (S, L, M, V) -> (S, L, N, V); M divides N."""
    groups = q_SLNH.shape[2] // k_SLMH.shape[2]
    k, v = (x.repeat_interleave(groups, dim=2).float() for x in (k_SLMH, v_SLMV))
    score_SNLL = torch.einsum("slnh,smnh->snlm", q_SLNH.float(), k) * scale
    length = q_SLNH.shape[1]
    mask = torch.ones(length, length, dtype=torch.bool, device=q_SLNH.device).triu(1)
    probability = score_SNLL.masked_fill(mask, -math.inf).softmax(-1)
    return torch.einsum("snlm,smnv->slnv", probability, v).to(q_SLNH.dtype)


def causal_attention(q_SLNH: Tensor, k_SLMH: Tensor, v_SLMV: Tensor, scale: float) -> Tensor:
    """The same as `causal_attention_ref`, by torch's fused attention. V narrower than H (MLA) is padded to it and cut again."""
    width = v_SLMV.shape[-1]
    if width < q_SLNH.shape[-1]:
        v_SLMV = F.pad(v_SLMV, (0, q_SLNH.shape[-1] - width))
    q, k, v = (x.transpose(1, 2) for x in (q_SLNH, k_SLMH, v_SLMV))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=k.shape[1] != q.shape[1])
    return out[..., :width].transpose(1, 2)


def masked_attention(q_SLNH: Tensor, k_SCMH: Tensor, v_SCMV: Tensor, mask_SLC: Tensor, scale: float) -> Tensor:
    """Attention over cache rows: queries (S, L, N, H), keys (S, C, M, H), values (S, C, M, V), True where a query may look.

    Grouped heads are folded into the query rows instead of repeating keys. Returns (S, L, N, V). Forward only in the engine.
    """
    S, L, N, H = q_SLNH.shape
    C, M, V = k_SCMH.shape[1], k_SCMH.shape[2], v_SCMV.shape[-1]
    rows = N // M
    q = q_SLNH.view(S, L, M, rows, H).permute(0, 2, 3, 1, 4).reshape(S, M, rows * L, H)
    score = torch.matmul(q, k_SCMH.permute(0, 2, 3, 1)).float().mul_(scale).view(S, M, rows, L, C)
    score.masked_fill_(~mask_SLC[:, None, None], -math.inf)
    probability = score.softmax(-1).to(v_SCMV.dtype).view(S, M, rows * L, C)
    out = torch.matmul(probability, v_SCMV.transpose(1, 2))
    return out.view(S, M, rows, L, V).permute(0, 3, 1, 2, 4).reshape(S, L, N, V)


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
