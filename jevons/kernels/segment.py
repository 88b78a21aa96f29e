"""Attention in training: causal inside segments of packed tokens, and to a segment that they continue.

Problem: packed tokens hold documents of any length, and a query must see the earlier tokens of its own document only; the samples of one
prompt see it in front of their own tokens. Approach: on a CPU one native call forward and one backward walk a table of segments
(native/segment.cpp): nothing is padded, scores and softmax are fp32. Elsewhere segments of similar length are laid out as a padded (S, L)
batch and go through torch's fused attention; padding stands at the end of a segment, so under a causal mask no real query ever sees it. The
fused CPU backward is made for long sequences and several times slower than plain products on short documents, so for those it is written
out: probabilities once more, then five batched products, a few megabytes at a time; query heads that share a key head are rows of one.
Not done: FlexAttention (no CPU backward) and varlen kernels (CUDA only, and they refuse MLA's V width).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from jevons.kernels import native
from jevons.kernels.compiler import load

PLAIN_LENGTH = 1024  # up to here the written-out CPU backward is used: 5 ms against 30 at 45 x 75 tokens, docs/LOG.md for 512
CHUNK_SCORES = 2**20  # scores in flight in it: what the second-level cache holds


class Table(NamedTuple):
    """Groups of segments that continue the same one: (prefix's start, its length or 0, first member, members), int64; the costliest first.

    members (X, 2) are start and length, none empty; a prefix is no member. Together they hold every token once.
    """

    groups: Tensor
    members: Tensor


def make_table(bounds: Tensor, prefix_S: Tensor) -> Table:
    """From segments' boundaries (S + 1,) and the segment that each continues, or -1; int64 on the CPU."""
    start_S, length_S, count = bounds[:-1], bounds.diff(), len(prefix_S)
    continues_S = prefix_S >= 0
    root_S = torch.where(continues_S, prefix_S, torch.arange(count))
    continued_S = torch.zeros(count, dtype=torch.bool).index_fill_(0, prefix_S[continues_S], True)
    member_X = ((length_S > 0) & ~continued_S).nonzero().squeeze(1)
    member_X = member_X[root_S[member_X].argsort(stable=True)]
    members_S = torch.bincount(root_S[member_X], minlength=count)
    prefix_length_S = length_S * continued_S
    seen_X = length_S[member_X] + prefix_length_S[root_S[member_X]]
    cost_S = (prefix_length_S**2).index_add(0, root_S[member_X], length_S[member_X] * seen_X)
    groups = torch.stack((start_S, prefix_length_S, members_S.cumsum(0) - members_S, members_S), dim=1)
    kept = cost_S.argsort(descending=True, stable=True)[: int((cost_S > 0).sum())]
    return Table(groups[kept].contiguous(), torch.stack((start_S[member_X], length_S[member_X]), dim=1).contiguous())


class Bucket(NamedTuple):
    """Segments laid out together: S rows of L slots.

    index_SL: which token stands in each slot (padding repeats some token). token_X, slot_X: the X real tokens and their
    slots. All three are None where the segments follow one another without gaps, so that a view is enough. `prefix`: P tokens,
    segments of an earlier bucket, that every row sees in front of its own.
    """

    S: int
    L: int
    index_SL: Tensor | None
    token_X: Tensor | None
    slot_X: Tensor | None
    prefix: slice | None = None

    def spread(self, x_TNH: Tensor) -> Tensor:
        """(T, N, H) -> (S, N, L, H)."""
        x = x_TNH if self.index_SL is None else x_TNH.index_select(0, self.index_SL.flatten())  # x[index] takes three times as long
        return x.unflatten(0, (self.S, self.L)).transpose(1, 2)

    def spread_zero(self, x_TNH: Tensor) -> Tensor:
        """The same with zeros as padding."""
        if self.token_X is None or self.slot_X is None:
            return self.spread(x_TNH)
        x = x_TNH.new_zeros(self.S * self.L, *x_TNH.shape[1:]).index_copy_(0, self.slot_X, x_TNH.index_select(0, self.token_X))
        return x.unflatten(0, (self.S, self.L)).transpose(1, 2)

    def spread_seen(self, x_TNH: Tensor) -> Tensor:
        """The same with the prefix in front: (S, N, P + L, H)."""
        own = self.spread(x_TNH)
        if self.prefix is None:
            return own
        return torch.cat((x_TNH[self.prefix].transpose(0, 1).expand(self.S, -1, -1, -1), own), dim=2)

    def collect(self, x_SNLH: Tensor, out_TNH: Tensor) -> None:
        """The inverse of `spread`, written into `out_TNH`."""
        x = x_SNLH.transpose(1, 2).flatten(0, 1)
        if self.token_X is None or self.slot_X is None:
            out_TNH.copy_(x)
        else:
            out_TNH.index_copy_(0, self.token_X, x.index_select(0, self.slot_X))

    def collect_seen(self, x_SNCH: Tensor, out_TNH: Tensor) -> None:
        """Gradients of what `spread_seen` gave: the rows' own tokens are written, the prefix's added to."""
        self.collect(x_SNCH[:, :, -self.L :], out_TNH)
        if self.prefix is not None:
            out_TNH[self.prefix] += x_SNCH[:, :, : -self.L].sum(0, dtype=torch.float32).transpose(0, 1).to(out_TNH.dtype)

    def bias(self, like: Tensor) -> Tensor | None:
        """(L, P + L) to be added to the scores: -inf for a row's future. None where the causal flag says it all."""
        if self.prefix is None:
            return None
        past = self.prefix.stop - self.prefix.start
        return torch.full((self.L, past + self.L), -math.inf, dtype=like.dtype, device=like.device).triu_(past + 1)


def segment_attention(q_TNH: Tensor, k_TMH: Tensor, v_TMV: Tensor, buckets: Sequence[Bucket], scale: float) -> Tensor:
    """Causal attention inside each segment and to its prefix: (T, N, H), (T, M, H), (T, M, V) -> (T, N, V); M divides N, V <= H.

    The buckets hold every token once. Equal to `causal_attention_ref` on each segment alone, or on prefix and segment.
    """
    width = v_TMV.shape[-1]
    if width < q_TNH.shape[-1]:
        v_TMV = F.pad(v_TMV, (0, q_TNH.shape[-1] - width))  # fused attention wants one width; MLA's V is narrower
    run = _CPUSegments.apply if q_TNH.device.type == "cpu" else _fused
    return run(q_TNH, k_TMH, v_TMV, buckets, scale)[..., :width]


def _fused(q_TNH: Tensor, k_TMH: Tensor, v_TMH: Tensor, buckets: Sequence[Bucket], scale: float) -> Tensor:
    if (groups := q_TNH.shape[1] // k_TMH.shape[1]) > 1:
        k_TMH, v_TMH = (x.repeat_interleave(groups, dim=1) for x in (k_TMH, v_TMH))
    out_TNH = torch.empty_like(q_TNH)
    for bucket in buckets:
        q, k, v, bias = bucket.spread(q_TNH), bucket.spread_seen(k_TMH), bucket.spread_seen(v_TMH), bucket.bias(q_TNH)
        out_SLNH = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=bias is None, scale=scale).transpose(1, 2)
        if bucket.token_X is None:
            return out_SLNH.flatten(0, 1)
        out_TNH = out_TNH.index_copy(0, bucket.token_X, out_SLNH.flatten(0, 1)[bucket.slot_X])
    return out_TNH


class _CPUSegments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_TNH: Tensor, k_TMH: Tensor, v_TMH: Tensor, buckets: Sequence[Bucket], scale: float) -> Tensor:
        out_TNH, normalisers = torch.empty_like(q_TNH), []
        for bucket in buckets:
            q, k, v, bias = bucket.spread(q_TNH), bucket.spread_seen(k_TMH), bucket.spread_seen(v_TMH), bucket.bias(q_TNH)
            op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
            out, normaliser_SNL = op(q, k, v, 0.0, bias is None, attn_mask=bias, scale=scale)
            bucket.collect(out, out_TNH)
            normalisers.append(normaliser_SNL)
        ctx.save_for_backward(q_TNH, k_TMH, v_TMH, out_TNH, *normalisers)
        ctx.buckets, ctx.scale = buckets, scale
        return out_TNH

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        q_TNH, k_TMH, v_TMH, out_TNH, *normalisers = ctx.saved_tensors
        results = [torch.empty_like(x) for x in (q_TNH, k_TMH, v_TMH)]
        for bucket, normaliser_SNL in zip(ctx.buckets, normalisers):
            q, k, v, bias = bucket.spread(q_TNH), bucket.spread_seen(k_TMH), bucket.spread_seen(v_TMH), bucket.bias(q_TNH)
            grad = bucket.spread_zero(grads[0])  # a padding query must push on nothing
            if bucket.L > PLAIN_LENGTH:
                op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
                groups = q.shape[1] // k.shape[1]
                k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
                out = bucket.spread(out_TNH)
                found = op(grad, q, k, v, out, normaliser_SNL, 0.0, bias is None, attn_mask=bias, scale=ctx.scale)
                found = (found[0], *(x.unflatten(1, (-1, groups)).sum(2) for x in found[1:]))
            else:
                found = _plain_backward(grad, q, k, v, ctx.scale)
            bucket.collect(found[0], results[0])
            bucket.collect_seen(found[1], results[1])
            bucket.collect_seen(found[2], results[2])
        return *results, None, None


def _plain_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of causal attention: (S, N, L, H) of queries that are the last L of (S, M, C, H) keys and values. Scores
    and what is done to them in fp32, the other products in the inputs' dtype.
    """
    (S, N, L, H), (M, C) = q.shape, k.shape[1:3]
    grads = (torch.empty(S, N, L, H, dtype=q.dtype), torch.empty(S, M, C, H, dtype=q.dtype), torch.empty(S, M, C, H, dtype=q.dtype))
    future_LC = torch.full((L, C), -math.inf).triu_(C - L + 1)
    step = max(1, CHUNK_SCORES // (N * L * C))
    for start in range(0, S, step):
        rows = slice(start, start + step)
        q_, grad_ = (x[rows].reshape(-1, N // M * L, H) for x in (q, grad))
        k_, v_ = (x[rows].reshape(-1, C, H) for x in (k, v))
        # softmax again, not exp(score - saved log-sum-exp): rows must add up to 1 exactly, or what should cancel does not
        score = torch.bmm(q_.float(), k_.float().mT).mul_(scale)  # in bf16 scores of 1,000, as Qwen2.5 has, would be off by 4
        score.unflatten(1, (-1, L)).add_(future_LC)
        probability = score.softmax(-1)
        weighted = torch.bmm(grad_, v_.mT).float().mul_(probability)
        score = weighted.addcmul_(probability, weighted.sum(-1, keepdim=True), value=-1).mul_(scale).to(q.dtype)
        pairs = ((score, k_), (score.mT, q_), (probability.to(q.dtype).mT, grad_))
        for result, (a, b) in zip(grads, pairs):
            torch.bmm(a, b, out=result[rows].view(-1, a.shape[1], H))
    return grads


def usable(q_TNH: Tensor, v_TMV: Tensor) -> bool:
    """Not where layers are being compiled: a native call would cut them in two."""
    whole = q_TNH.dtype == torch.float32 or q_TNH.shape[-1] % 2 == v_TMV.shape[-1] % 2 == 0  # bf16 goes in pairs
    here = not torch.compiler.is_compiling() and q_TNH.device.type == "cpu" and q_TNH.dtype in native.DTYPE
    return here and whole and native.available()


def native_attention(q_TNH: Tensor, k_TMH: Tensor, v_TMV: Tensor, table: Table, scale: float) -> Tensor:
    """(T, N, H), (T, M, H), (T, M, V) -> (T, N, V), all bf16 or all fp32, on the CPU; M divides N."""
    return _Segments.apply(q_TNH, k_TMH, v_TMV, table, scale)


class _Segments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        (q, k, v), (table, scale) = (_rows(x) for x in arguments[:3]), arguments[3:]
        ctx.save_for_backward(q, k, v)
        ctx.table, ctx.scale = table, scale
        out = q.new_empty(len(q), q.shape[1], v.shape[2])
        load().functions.jevons_segments(*_strided(q, k, v), *_sizes(q, k, v, table), scale, out.data_ptr(), torch.get_num_threads())
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        grad = _rows(grads[0])
        out = [torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v)]
        load().functions.jevons_segments_backward(
            *_strided(grad, q, k, v), *_sizes(q, k, v, ctx.table), ctx.scale, *(x.data_ptr() for x in out), torch.get_num_threads()
        )
        return *out, None, None


def _rows(x_TNH: Tensor) -> Tensor:
    """Heads side by side; tokens may lie apart, by an even number of elements."""
    return x_TNH if x_TNH.stride()[1:] == (x_TNH.shape[2], 1) and x_TNH.stride(0) % 2 == 0 else x_TNH.contiguous()


def _strided(*tensors: Tensor) -> list[int]:
    return [native.DTYPE[tensors[0].dtype], *(y for x in tensors for y in (x.data_ptr(), x.stride(0)))]


def _sizes(q: Tensor, k: Tensor, v: Tensor, table: Table) -> tuple[int, ...]:
    assert q.shape[1] % k.shape[1] == 0 and k.shape[1] == v.shape[1] and q.shape[2] == k.shape[2] and len(q) == len(k) == len(v)
    shape = (q.shape[1], k.shape[1], q.shape[2], v.shape[2])
    return *shape, table.groups.data_ptr(), len(table.groups), table.members.data_ptr()
