"""From logits to tokens, and to the log-probabilities that reinforcement learning and clients need.

Two log-probabilities are returned for each token: of the distribution that it was drawn from, and of the model's own. A
policy gradient that uses the wrong one of them is biased as soon as the temperature or a filter is not neutral.
Every token costs its sequence one uniform number from its own generator, which inverts the cumulative distribution, so what
it says does not depend on who else is in the batch, nor on whether a token was drafted (see engine/draft.py).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from jevons.engine.sequence import Alternatives, SamplingParams
from jevons.kernels import native, sampler

NUCLEUS = 1024  # candidates that top-p looks at first: sorting a whole vocabulary takes longer than a model's step


class Drawn(NamedTuple):
    """One entry per row: the token, its log-probability as drawn, in the model's own distribution, the best alternatives in that.

    And the support: ascending ids (int32) of the words that the token was drawn from, where the row's settings ask for it; None
    stands for all.
    """

    tokens: list[int]
    logps: list[float]
    raw_logps: list[float]
    logprobs: list[Alternatives]
    supports: list[Tensor | None]


def sampling_logps(logits_SW: Tensor, params: SamplingParams) -> Tensor:
    """Log-probabilities (S, W) of the distribution drawn from, -inf outside its support; fp32 logits in, temperature above 0.

    Temperature, then top-k, then top-p on the mass that top-k left, then min-p relative to the best (the order of
    transformers). Tokens exactly as likely as the last one kept are kept too, so the support never hangs on a sort's whim.
    """
    x_SW = (logits_SW - logits_SW.amax(-1, keepdim=True)) / params.temperature  # the best stands at 0: small temperatures cannot overflow
    if 0 < params.top_k < x_SW.shape[-1]:
        x_SW = _cut(x_SW, x_SW.topk(params.top_k).values[:, -1:])
    if params.top_p < 1:
        x_SW = _cut(x_SW, _nucleus_floor(x_SW, x_SW.logsumexp(-1, keepdim=True), params.top_p, NUCLEUS))
    if params.min_p > 0:
        x_SW = _cut(x_SW, math.log(params.min_p))
    return x_SW.log_softmax(-1)


def _cut(x_SW: Tensor, floor: Tensor | float) -> Tensor:
    return torch.where(x_SW < floor, -math.inf, x_SW)  # several times faster than masked_fill on the CPU


def _nucleus_floor(x_SW: Tensor, normaliser_S1: Tensor, top_p: float, candidates: int) -> Tensor:
    """The smallest logit (S, 1) of the fewest best tokens whose mass reaches top_p. Rows that need more candidates are sorted whole."""
    best_SX = x_SW.topk(min(candidates, x_SW.shape[-1])).values
    mass_SX = (best_SX - normaliser_S1).exp_().cumsum_(-1)
    kept_S1 = 1 + (mass_SX[:, :-1] < top_p).sum(-1, keepdim=True)
    floor_S1 = best_SX.gather(1, kept_S1 - 1)
    short_S = mass_SX[:, -1] < top_p
    if best_SX.shape[1] < x_SW.shape[1] and bool(short_S.any()):
        floor_S1[short_S] = _nucleus_floor(x_SW[short_S], normaliser_S1[short_S], top_p, x_SW.shape[1])
    return floor_S1


def sample(
    logits_SW: Tensor,
    params: Sequence[SamplingParams],
    uniforms: Sequence[float],
    allowed_SW: Tensor | None = None,
    *,
    use_native: bool | None = None,
) -> Drawn:
    """Draw one token a row, row i by the number uniforms[i] in [0, 1).

    `logits_SW` are the model's own; `allowed_SW`, where given, the same after penalties and grammars, from which tokens are
    drawn. Greedy rows take the argmax. `use_native`: whether kernels/sampler.py draws; None: where it can. Raises ValueError
    where logits are not finite, which only broken weights bring about.
    """
    logits_SW = logits_SW.float()
    allowed_SW = logits_SW if allowed_SW is None else allowed_SW
    if use_native is None:
        use_native = logits_SW.device.type == "cpu" and native.available()
    drawn = (_draw_natively if use_native else _draw)(logits_SW, allowed_SW, params, uniforms)
    if drawn is None:
        raise ValueError("the model's logits are not finite: its weights are broken, or overflow in this dtype")
    return Drawn(*drawn[:3], alternatives(logits_SW, [p.logprobs for p in params]), drawn[3])


Rows = tuple[list[int], list[float], list[float], list[Tensor | None]]  # tokens, log-probabilities, raw ones, supports


def _draw_natively(logits_SW: Tensor, allowed_SW: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> Rows | None:
    wishes = [sampler.Wish(0.0 if p.greedy else p.temperature, p.top_p, p.min_p, p.top_k, u) for p, u in zip(params, uniforms)]
    logits = logits_SW.contiguous()
    allowed = logits if allowed_SW is logits_SW else allowed_SW.contiguous()
    return sampler.draw(logits, allowed, wishes, [p.record_support for p in params])


def _draw(logits_SW: Tensor, allowed_SW: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> Rows | None:
    """The same in torch's operators. Rows with the same settings share their work."""
    normaliser_S = logits_SW.logsumexp(-1)
    if not bool(normaliser_S.isfinite().all()):
        return None
    groups: dict[tuple[float, ...], list[int]] = defaultdict(list)
    for row, p in enumerate(params):
        groups[() if p.greedy else (p.temperature, p.top_k, p.top_p, p.min_p)].append(row)
    tokens_S = torch.empty(len(params), dtype=torch.int64, device=logits_SW.device)
    logps_S = torch.zeros(len(params), device=logits_SW.device)
    supports: list[Tensor | None] = [None] * len(params)
    for key, rows in groups.items():
        where = slice(None) if len(rows) == len(params) else torch.tensor(rows, device=logits_SW.device)
        group_SW = allowed_SW[where]
        if not key:
            tokens_S[where] = group_SW.argmax(-1)
            continue
        logps_SW = sampling_logps(group_SW, params[rows[0]])
        token_S1 = _invert(logps_SW, [uniforms[row] for row in rows])
        tokens_S[where] = token_S1.squeeze(1)
        logps_S[where] = logps_SW.gather(1, token_S1).squeeze(1)
        if recorded := [i for i, row in enumerate(rows) if params[row].record_support]:
            for i, support in zip(recorded, _supports(logps_SW[recorded])):
                supports[rows[i]] = support
    tokens = tokens_S.tolist()
    for row, p in enumerate(params):
        if p.greedy and p.record_support:
            supports[row] = torch.tensor([tokens[row]], dtype=torch.int32)
    raw_logps_S = logits_SW.gather(1, tokens_S[:, None]).squeeze(1) - normaliser_S
    return tokens, logps_S.tolist(), raw_logps_S.tolist(), supports


def _invert(logps_SW: Tensor, uniforms: Sequence[float]) -> Tensor:
    """Tokens (S, 1) by inverse cumulative distribution. In fp64: fp32's steps near 1 are as coarse as a big vocabulary's tail."""
    cumulative_SW = logps_SW.exp().cumsum(-1, dtype=torch.float64)
    threshold_S1 = torch.tensor(uniforms, dtype=torch.float64, device=logps_SW.device)[:, None] * cumulative_SW[:, -1:]
    # right=True: the first entry above the threshold, so a token of probability 0 is never drawn, not even at 0.0
    return torch.searchsorted(cumulative_SW, threshold_S1, right=True)


def _supports(logps_SW: Tensor) -> list[Tensor | None]:
    """Ids of the words that are not cut, for each row; None where none is."""
    kept_SW = logps_SW > -math.inf
    counts = kept_SW.sum(-1).tolist()
    pieces = kept_SW.nonzero()[:, 1].to("cpu", torch.int32).split(counts)
    return [None if count == logps_SW.shape[1] else piece for count, piece in zip(counts, pieces)]


def alternatives(logits_SW: Tensor, wanted: Sequence[int]) -> list[Alternatives]:
    """The wanted[i] likeliest tokens of each row with their log-probabilities."""
    out: list[Alternatives] = [[] for _ in wanted]
    for row, count in enumerate(wanted):
        if count:
            best = logits_SW[row].topk(min(count, logits_SW.shape[1]))
            out[row] = list(zip(best.indices.tolist(), (best.values - logits_SW[row].logsumexp(-1)).tolist()))
    return out
