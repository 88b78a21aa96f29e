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
