"""Log-probabilities of chosen words, and entropies, without the (tokens x vocabulary) matrix in fp32.

Problem: a policy gradient weighs a token by a function of its log-probability, or of its whole sample's, so unlike in cross_entropy.py no
gradient can be made before the forward pass is over. Words may have been drawn at a temperature and from a part of the vocabulary (top-p,
top-k): then probabilities are those of that distribution, over the support that the sampler recorded ("keep sampling mask", DeepSeek-V3.2,
arXiv 2512.02556), or ratios to the sampler's would be wrong from the first step on.

Approach: all tokens meet one block of words at a time, and each block's maximum, mass and moment are combined in the end. So the
head is read once and its gradient written once, and what is done to logits stays in the cache. The forward pass keeps its logits, as the
product left them, as far as KEPT_BYTES go: with them the backward pass has two products to make; without, it repeats the first. Where every
token has a support, only words of some support are multiplied at all. Logits are rounded as the sampler's are, to the weights' dtype.

Not done: logits in fp32 from weights in bf16, which torch's CPU product does not offer.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

BLOCK_ELEMENTS = 2**21  # logits at work, 8 MB in fp32; half and twice that are no faster
KEPT_BYTES = 2**29  # of logits kept for the backward pass: 1,766 tokens of 151,936 words in bf16
OUTSIDE = -1e30  # the logit of a word outside the support: finite, so that 0 times it is 0


class Support(NamedTuple):
    """Of each row the words that its target was drawn from, ids[offsets[i] : offsets[i + 1]], different ones; none stands for all."""

    ids: Tensor  # (N,) int32
    offsets: Tensor  # (T + 1,) int64

    def row(self) -> Tensor:
        """Which row each id belongs to, (N,)."""
        return torch.repeat_interleave(self.offsets.diff())

    def take(self, rows_R: Tensor) -> Support:
        """The supports of some rows, by their indices."""
        starts_R, lengths_R = self.offsets[:-1][rows_R], self.offsets.diff()[rows_R]
        taken = Support(self.ids, torch.cat((lengths_R.new_zeros(1), lengths_R.cumsum(0))))
        row_N = taken.row()
        moved_N = (starts_R - taken.offsets[:-1])[row_N]
        return taken._replace(ids=self.ids[torch.arange(len(row_N), device=row_N.device) + moved_N])


def log_probs_ref(
    hidden_TD: Tensor, head_WD: Tensor, targets_T: Tensor, temperature: float = 1.0, supports: Support | None = None
) -> tuple[Tensor, Tensor]:
    """Of each target its log-probability, and the entropy of the distribution that it stands in (nats, no gradient); (T,) in fp32."""
    logits_TW = _wide(hidden_TD @ head_WD.t()) / temperature
    if supports is not None:
        inside_TW = (supports.offsets.diff() == 0)[:, None].expand(logits_TW.shape).clone()
        inside_TW[supports.row(), supports.ids.long()] = True
        logits_TW = torch.where(inside_TW, logits_TW, -math.inf)
    logps_TW = logits_TW.log_softmax(-1)
    entropy_T = torch.special.entr(logps_TW.detach().exp()).sum(-1)
    return logps_TW.gather(1, targets_T[:, None]).squeeze(1), entropy_T


def log_probs(
    hidden_TD: Tensor, head_WD: Tensor, targets_T: Tensor, temperature: float = 1.0, supports: Support | None = None
) -> tuple[Tensor, Tensor]:
    """The same as `log_probs_ref`, block by block. Gradients reach hidden_TD and head_WD; targets must be in their supports."""
    assert temperature > 0 and hidden_TD.shape == (len(targets_T), head_WD.shape[1])
    if supports is not None and len(targets_T) and bool((supports.offsets.diff() > 0).all()):
        words_U, place = torch.cat((supports.ids.long(), targets_T)).unique(return_inverse=True)
        ids, targets_T = place.split((len(supports.ids), len(targets_T)))
        head_WD, supports = head_WD.index_select(0, words_U), supports._replace(ids=ids)
    keep = torch.is_grad_enabled() and (hidden_TD.requires_grad or head_WD.requires_grad)
    return _LogProbs.apply(hidden_TD, head_WD, targets_T, temperature, supports, KEPT_BYTES if keep else 0)


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, head_WD: Tensor, targets_T: Tensor, temperature: float, supports: Support | None, room: int
    ) -> tuple[Tensor, Tensor]:
        blocks = _Blocks(len(head_WD), targets_T, temperature, supports)
        sums: list[tuple[Tensor, Tensor, Tensor]] = []
        kept: list[Tensor] = []
        chosen_T = _wide(hidden_TD.new_empty(len(targets_T)))
        for i, words in enumerate(blocks.words):
            product_TB = hidden_TD @ head_WD[words].t()
            room -= product_TB.nbytes
            if room >= 0:
                kept.append(product_TB)
            logits_TB = blocks.logits(i, product_TB)
            rows, columns = blocks.targets(i)
            chosen_T[rows] = logits_TB[rows, columns]
            top_T1 = logits_TB.amax(-1, keepdim=True)
            below_TB = logits_TB.sub_(top_T1)
            p_TB = below_TB.exp()
            sums.append((top_T1.squeeze(1), p_TB.sum(-1), p_TB.mul_(below_TB).sum(-1)))
        top_BT, mass_BT, moment_BT = (torch.stack(parts) for parts in zip(*sums))
        best_T = top_BT.amax(0)
        below_BT = top_BT - best_T
        scale_BT = below_BT.exp()  # 0 of a block wholly outside
        mass_T = (mass_BT * scale_BT).sum(0)
        mean_T = ((moment_BT + mass_BT * below_BT) * scale_BT).sum(0) / mass_T  # of the logits, counted from the best
        entropy_T = mass_T.log() - mean_T
        normaliser_T = mass_T.log() + best_T
        ctx.save_for_backward(hidden_TD, head_WD, normaliser_T, *kept)
        ctx.blocks = blocks
        ctx.mark_non_differentiable(entropy_T)
        return chosen_T - normaliser_T, entropy_T

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        hidden_TD, head_WD, normaliser_T, *kept = ctx.saved_tensors
        blocks: _Blocks = ctx.blocks
        grad_hidden_TD = _wide(torch.zeros_like(hidden_TD)) if ctx.needs_input_grad[0] else None
        grad_head_WD = torch.empty_like(head_WD) if ctx.needs_input_grad[1] else None
        scale_T1 = -grads[0][:, None] / blocks.temperature
        for i, words in enumerate(blocks.words):
            product_TB = kept[i] if i < len(kept) else hidden_TD @ head_WD[words].t()
            # d logp / d logits = onehot - softmax, over the temperature
            grad_TB = blocks.logits(i, product_TB).sub_(normaliser_T[:, None]).exp_()
            grad_TB[blocks.targets(i)] -= 1
            grad_TB = grad_TB.mul_(scale_T1).to(hidden_TD.dtype)
            if grad_hidden_TD is not None:
                grad_hidden_TD += grad_TB @ head_WD[words]
            if grad_head_WD is not None:
                torch.mm(grad_TB.t(), hidden_TD, out=grad_head_WD[words])
        return None if grad_hidden_TD is None else grad_hidden_TD.to(hidden_TD.dtype), grad_head_WD, None, None, None, None


class _Blocks:
    """The vocabulary in blocks of words, and of each block the targets in it and the words that rows are restricted to."""

    def __init__(self, size: int, targets_T: Tensor, temperature: float, supports: Support | None) -> None:
        width = max(64, BLOCK_ELEMENTS // max(len(targets_T), 1))
        edges = torch.tensor([*range(0, size, width), size], device=targets_T.device)
        self.words = [slice(first, min(first + width, size)) for first in range(0, size, width)]
        self.temperature, self.restricted = temperature, supports is not None
        self._target_T, self._row_T = targets_T.sort()
        self._cut = torch.searchsorted(self._target_T, edges).tolist()
        if supports is not None:
            self._id_N, order_N = supports.ids.long().sort()
            self._row_N = supports.row()[order_N]
            self._support_cut = torch.searchsorted(self._id_N, edges).tolist()
            self._free_T1 = (supports.offsets.diff() == 0)[:, None]

    def targets(self, i: int) -> tuple[Tensor, Tensor]:
        """Rows whose targets are in block i, and their columns in it."""
        which = slice(*self._cut[i : i + 2])
        return self._row_T[which], self._target_T[which] - self.words[i].start

    def logits(self, i: int, product_TB: Tensor) -> Tensor:
        """Block i's logits in memory of their own: fp32, over the temperature, OUTSIDE where a row's support does not reach."""
        logits_TB = _wide(product_TB.clone() if product_TB.dtype.itemsize >= 4 else product_TB)
        if self.temperature != 1:
            logits_TB.div_(self.temperature)
        if self.restricted:
            which = slice(*self._support_cut[i : i + 2])
            inside_TB = self._free_T1.expand(logits_TB.shape).clone()
            inside_TB[self._row_N[which], self._id_N[which] - self.words[i].start] = True
            logits_TB = torch.where(inside_TB, logits_TB, OUTSIDE)
        return logits_TB


def _wide(x: Tensor) -> Tensor:
    """In fp32, or in fp64 where it is that already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
