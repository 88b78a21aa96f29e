"""Causal attention inside segments of packed tokens (training), and over gathered cache rows (the engine).

Problem: packed tokens hold documents of any length, and a query must see the earlier tokens of its own document only.
Approach: segments of similar length are laid out as a padded (S, L) batch and go through torch's fused attention with its
causal flag. Padding stands at the end of a segment, so under a causal mask no real query ever sees it and no mask tensor is
needed. On the CPU the fused backward is made for long sequences and several times slower than plain products on short
documents, so for those it is written out: probabilities once more, then five batched products, a few megabytes at a time.
Not done: FlexAttention (no CPU backward) and varlen kernels (CUDA only, and they refuse MLA's V width).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

PLAIN_LENGTH = 1024  # up to here the written-out CPU backward is used: 5 ms against 30 at 45 x 75 tokens, docs/LOG.md for 512
CHUNK_SCORES = 2**20  # scores in flight in it: what the second-level cache holds


class Bucket(NamedTuple):
    """Segments laid out together: S rows of L slots.

    index_SL: which token stands in each slot (padding repeats some token). token_X, slot_X: the X real tokens and their
    slots. All three are None where the segments follow one another without gaps, so that a view is enough.
    """

    S: int
    L: int
    index_SL: Tensor | None
    token_X: Tensor | None
    slot_X: Tensor | None

    def spread(self, x_TNH: Tensor) -> Tensor:
        """(T, N, H) -> (S, N, L, H)."""
        x = x_TNH.unflatten(0, (self.S, self.L)) if self.index_SL is None else x_TNH[self.index_SL]
        return x.transpose(1, 2)

    def spread_zero(self, x_TNH: Tensor) -> Tensor:
        """The same with zeros as padding."""
        if self.index_SL is None:
            return self.spread(x_TNH)
        x = x_TNH.new_zeros(self.S * self.L, *x_TNH.shape[1:])
        x[self.slot_X] = x_TNH[self.token_X]
        return x.unflatten(0, (self.S, self.L)).transpose(1, 2)

    def collect(self, x_SNLH: Tensor, out_TNH: Tensor) -> None:
        """The inverse of `spread`, written into `out_TNH`."""
        x = x_SNLH.transpose(1, 2).flatten(0, 1)
        if self.index_SL is None:
            out_TNH.copy_(x)
        else:
            out_TNH[self.token_X] = x[self.slot_X]


def causal_attention_ref(q_SLNH: Tensor, k_SLMH: Tensor, v_SLMV: Tensor, scale: float) -> Tensor:
    """Plain causal attention in fp32: (S, L, N, H), (S, L, M, H), (S, L, M, V) -> (S, L, N, V); M divides N."""
    groups = q_SLNH.shape[2] // k_SLMH.shape[2]
    k, v = (x.repeat_interleave(groups, dim=2).float() for x in (k_SLMH, v_SLMV))
    score_SNLL = torch.einsum("slnh,smnh->snlm", q_SLNH.float(), k) * scale
    length = q_SLNH.shape[1]
    mask = torch.ones(length, length, dtype=torch.bool, device=q_SLNH.device).triu(1)
    probability = score_SNLL.masked_fill(mask, -math.inf).softmax(-1)
    return torch.einsum("snlm,smnv->slnv", probability, v).to(q_SLNH.dtype)


def segment_attention(q_TNH: Tensor, k_TMH: Tensor, v_TMV: Tensor, buckets: Sequence[Bucket], scale: float) -> Tensor:
    """Causal attention inside each segment: (T, N, H), (T, M, H), (T, M, V) -> (T, N, V); M divides N, V <= H.

    The buckets hold every token once. Equal to `causal_attention_ref` on each segment alone.
    """
    width, groups = v_TMV.shape[-1], q_TNH.shape[1] // k_TMH.shape[1]
    if width < q_TNH.shape[-1]:
        v_TMV = F.pad(v_TMV, (0, q_TNH.shape[-1] - width))  # fused attention wants one width; MLA's V is narrower
    if groups > 1:
        k_TMH, v_TMV = (x.repeat_interleave(groups, dim=1) for x in (k_TMH, v_TMV))
    if q_TNH.device.type == "cpu":
        return _CPUSegments.apply(q_TNH, k_TMH, v_TMV, buckets, scale)[..., :width]
    out_TNH = torch.empty_like(q_TNH)
    for bucket in buckets:
        q, k, v = (bucket.spread(x) for x in (q_TNH, k_TMH, v_TMV))
        out_SLNH = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(1, 2)
        if bucket.token_X is None:
            return out_SLNH.flatten(0, 1)[..., :width]
        out_TNH = out_TNH.index_copy(0, bucket.token_X, out_SLNH.flatten(0, 1)[bucket.slot_X])
    return out_TNH[..., :width]


class _CPUSegments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, buckets: Sequence[Bucket], scale: float) -> Tensor:
        out_TNH, normalisers = torch.empty_like(q_TNH), []
        for bucket in buckets:
            q, k, v = (bucket.spread(x) for x in (q_TNH, k_TNH, v_TNH))
            out, normaliser_SNL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale)
            bucket.collect(out, out_TNH)
            normalisers.append(normaliser_SNL)
        ctx.save_for_backward(q_TNH, k_TNH, v_TNH, out_TNH, *normalisers)
        ctx.buckets, ctx.scale = buckets, scale
        return out_TNH

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        q_TNH, k_TNH, v_TNH, out_TNH, *normalisers = ctx.saved_tensors
        results = [torch.empty_like(x) for x in (q_TNH, k_TNH, v_TNH)]
        for bucket, normaliser_SNL in zip(ctx.buckets, normalisers):
            q, k, v = (bucket.spread(x) for x in (q_TNH, k_TNH, v_TNH))
            grad = bucket.spread_zero(grads[0])  # a padding query must push on nothing
            if bucket.L > PLAIN_LENGTH:
                op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
                found = op(grad, q, k, v, bucket.spread(out_TNH), normaliser_SNL, 0.0, True, scale=ctx.scale)
            else:
                found = _plain_backward(grad, q, k, v, ctx.scale)
            for x, result in zip(found, results):
                bucket.collect(x, result)
        return *results, None, None


def _plain_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of causal attention, all (S, N, L, H); products in the inputs' dtype, the rest in fp32."""
    S, N, L, H = q.shape
    grads = (torch.empty(S, N, L, H, dtype=q.dtype), torch.empty(S, N, L, H, dtype=q.dtype), torch.empty(S, N, L, H, dtype=q.dtype))
    future_LL = torch.full((L, L), -math.inf).triu_(1)
    step = max(1, CHUNK_SCORES // (N * L * L))
    for start in range(0, S, step):
        rows = slice(start, start + step)
        q_, k_, v_, grad_ = (x[rows].reshape(-1, L, H) for x in (q, k, v, grad))
        # softmax again, not exp(score - saved log-sum-exp): rows must add up to 1 exactly, or what should cancel does not
        probability = torch.bmm(q_, k_.mT).float().mul_(scale).add_(future_LL).softmax(-1)
        weighted = torch.bmm(grad_, v_.mT).float().mul_(probability)
        score = weighted.addcmul_(probability, weighted.sum(-1, keepdim=True), value=-1).mul_(scale).to(q.dtype)
        pairs = ((score, k_), (score.mT, q_), (probability.to(q.dtype).mT, grad_))
        for result, (a, b) in zip(grads, pairs):
            torch.bmm(a, b, out=result[rows].view(-1, L, H))
    return grads


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
