"""Keeping experts equally busy: the loss-free bias, and the sequence-wise loss beside it.

Loss-free (arXiv 2408.15664, DeepSeek-V3 2.1.2): after each step every router's correction bias moves a fixed amount
towards the experts that got less than the mean, counted over the whole step. It never goes through autograd and only
touches which experts are chosen. The sequence-wise loss is a small push against imbalance inside single documents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jevons.model.moe import Router, Routing


@torch.no_grad()
def update_bias(router: Router, loads_E: Tensor, speed: float) -> None:
    """bias += speed * sign(mean load - load); loads of the whole global batch. Routers without a bias are left alone."""
    if router.e_score_correction_bias is not None:
        loads_E = loads_E.float()
        router.e_score_correction_bias += speed * torch.sign(loads_E.mean() - loads_E)


def sequence_loss(routing: Routing, cu_seqlens: Tensor) -> Tensor:
    """sum over segments of (tokens in it) * sum_i f_i P_i (DeepSeek-V3 equations 17 to 20, without alpha).

    f_i = E / (K T) * how many of the segment's choices were expert i, counted on the experts really routed to (with bias);
    P_i = the segment's mean of s_i / sum_j s_j. 1 per token when balanced. Weighted by tokens so that it can be normalised by
    the global token count like every loss; for segments of one length that is the paper's mean over sequences.
    """
    T, K = routing.experts_TK.shape
    E = routing.scores_TE.shape[1]
    lengths_S = cu_seqlens.diff()
    segment_T = torch.repeat_interleave(torch.arange(len(lengths_S), device=lengths_S.device), lengths_S, output_size=T)
    share_TE = routing.scores_TE / routing.scores_TE.sum(-1, keepdim=True)
    probability_SE = share_TE.new_zeros(len(lengths_S), E).index_add(0, segment_T, share_TE)
    pairs = segment_T[:, None] * E + routing.experts_TK
    chosen_SE = torch.bincount(pairs.flatten(), minlength=probability_SE.numel()).view_as(probability_SE).to(share_TE.dtype)
    frequency_SE = chosen_SE * (E / K) / lengths_S[:, None].clamp_min(1)
    return (frequency_SE * probability_SE).sum()


def max_violation(loads_E: Tensor) -> Tensor:
    """MaxVio: largest load over the mean load, minus 1. 0 is perfect balance."""
    loads_E = loads_E.float()
    return loads_E.max() / loads_E.mean().clamp_min(1e-9) - 1
