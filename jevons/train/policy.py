"""Policy-gradient losses: DeepSeek-R1's GRPO and its successors, as functions of the log-probabilities of sampled tokens.

For a token o_t of sample o, A the sample's advantage (train/advantage.py):

    r_t = pi(o_t) / pi_old(o_t)                                pi_old: what the sample was drawn from

    grpo     -min(r A, clip(r, 1 - low, 1 + high) A)           DeepSeekMath 2402.03300, R1 2501.12948; DAPO 2503.14476: high > low
    gspo     the same, with s = exp(mean_t log r_t) for r      Qwen 2507.18071: one ratio a sample
    cispo    -sg(min(r, 1 + high)) A log pi(o_t)               MiniMax-M1 2506.13585, ScaleRL 2510.13786: no token loses its gradient
    mirror   (A - tau sum_t log r_t)^2 / (2 tau)               Kimi k1.5 2501.12599: a sample's once, each of its n tokens an n-th

k1.5's gradient is A grad log pi(o) - tau / 2 grad (log pi(o) / pi_old(o))^2, upwards: REINFORCE and a pull back to the policy before.
Its square is divided by 2 tau here so that this, and not 2 tau times it, is the gradient, and learning rates mean the same for all kinds.
The sum over tokens in it is a sum. Where the advantage is r - tau log Z instead of r - mean, the minimum is pi_old exp(r / tau) / Z.

To which may come, sg being what has no gradient:

    two_sided       min(r, two_sided) for r where A < 0: clipping leaves that side open        INTELLECT-2 2505.07291
    kl_weight       + kl_weight k3, k3 = exp(d) - d - 1, d = log pi_ref - log pi               R1
    kl "unbiased"   + kl_weight r k3: its gradient is that of KL(pi || ref), k3's is not       DeepSeek-V3.2 2512.02556
    importance_cap  the policy's term times sg(min(w, cap)), w = pi_old / pi_sampler           truncated importance sampling
    importance_mode "mask": times sg(w), 0 outside [1 / cap, cap]                              IcePop
    sequence_mask   no policy term where A < 0 and mean_t log(pi_sampler / pi) > sequence_mask V3.2

pi_sampler is the sampler's log-probability in the distribution that it drew from, at its temperature and inside its top-p; pi_old the
trainer's at the sampler's weights where a batch brings it (`old_logps_T`), else the sampler's. Which tokens count, and how much, is
weights_T: a loss is the sum of weights_T times the tokens' terms, and the trainer divides.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from jevons.data.batch import Batch
from jevons.kernels.log_prob import Support, log_probs
from jevons.train.loss import Loss
from jevons.train.objective import Objective


def policy_loss(objective: Objective) -> Callable[[Tensor, Tensor, Batch], Loss]:
    """The loss of this objective, for `Trainer.forward_backward`.

    Batches need logps_T and advantages_T; samples_T where whole samples matter (gspo, mirror, sequence_mask), old_logps_T for
    importance_cap, ref_logps_T for kl_weight. Rows of weight 0 never reach the head.

    `stats` are sums over tokens, to be divided by "policy_tokens", and maxima: entropy; ratio, max_ratio; clipped_low, clipped_high
    (tokens that lost their gradient, or some of it, to a bound); kl_old (from pi_old) and kl (to the reference); masked (tokens without a
    policy term) and tis_clipped (whose w was out of bounds); and how far the trainer is from the sampler: mismatch (absolute difference
    of log-probabilities), max_mismatch, mismatch_kl. Where no old_logps_T tell, that is of the weights as they are now.
    """

    def loss(hidden_TD: Tensor, head_WD: Tensor, batch: Batch) -> Loss:
        rows, logps_R, entropy_R = target_logps(hidden_TD, head_WD, batch)
        now_R, sampler_R, advantage_R = logps_R.detach(), _field(batch, "logps_T", rows), _field(batch, "advantages_T", rows)
        old_R = sampler_R if batch.old_logps_T is None else batch.old_logps_T[rows]
        log_ratio_R = logps_R - old_R
        ratio_R = log_ratio_R.exp()

        if objective.kind == "grpo":
            term_R = -clipped(ratio_R, advantage_R, objective)
        elif objective.kind == "gspo":
            ratio_R = Samples(_field(batch, "samples_T", rows)).mean(log_ratio_R).exp()
            term_R = -clipped(ratio_R, advantage_R, objective)
        elif objective.kind == "cispo":
            term_R = -ratio_R.detach().clamp(max=objective.bounds[1]) * advantage_R * logps_R
        else:
            samples, tau = Samples(_field(batch, "samples_T", rows)), objective.tau
            term_R = (advantage_R - tau * samples.sum(log_ratio_R)).square() / (2 * tau * samples.length_R)

        stats = watch(objective, ratio_R.detach(), advantage_R) | {"entropy": entropy_R.sum(), "kl_old": k3(now_R, old_R).sum()}
        kept_R = torch.ones_like(now_R)
        if objective.importance_cap is not None:
            kept_R, outside_R = importance(objective, _field(batch, "old_logps_T", rows) - sampler_R)
            stats["tis_clipped"] = outside_R.sum()
        if objective.sequence_mask is not None:
            drift_R = Samples(_field(batch, "samples_T", rows)).mean(sampler_R - now_R)
            kept_R = kept_R * ~((advantage_R < 0) & (drift_R > objective.sequence_mask))
        term_R = term_R * kept_R
        stats["masked"] = (kept_R == 0).sum()

        if objective.kl_weight:
            k3_R = k3(_field(batch, "ref_logps_T", rows), logps_R)
            stats["kl"] = k3_R.detach().sum()
            term_R = term_R + objective.kl_weight * (log_ratio_R.exp() * k3_R if objective.kl == "unbiased" else k3_R)

        apart_R = (now_R if batch.old_logps_T is None else old_R) - sampler_R
        stats |= {"mismatch": apart_R.abs().sum(), "max_mismatch": _largest(apart_R.abs()), "mismatch_kl": k3(apart_R, 0 * apart_R).sum()}
        nll_T = torch.zeros_like(batch.weights_T).index_copy(0, rows, -now_R)
        return Loss((batch.weights_T[rows] * term_R).sum(), nll_T, stats)

    return loss


def target_logps(hidden_TD: Tensor, head_WD: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (R,) that count, and the log-probability and entropy of each, in the distribution that its target was drawn from."""
    rows = (batch.weights_T > 0).nonzero().squeeze(1)
    supports = None if batch.supports is None else Support(*batch.supports).take(rows)
    return rows, *log_probs(hidden_TD[rows], head_WD, batch.targets_T[rows], batch.temperature, supports)


def k3(ref: Tensor, logps: Tensor) -> Tensor:
    """exp(d) - d - 1 with d = ref - logps: never negative, and for tokens drawn from exp(logps) in the mean KL(logps || ref).

    J. Schulman, "Approximating KL divergence", 2020.
    """
    difference = ref - logps
    return difference.exp() - difference - 1


def clipped(ratio: Tensor, advantage: Tensor, objective: Objective) -> Tensor:
    """min(r A, clip(r) A): what a token gains, except where it has already moved further than the bounds in the direction that A asks for.

    With `two_sided` min(r, two_sided) A stands for r A where A < 0, so that a token that became many times likelier cannot weigh more.
    """
    open_ratio = ratio if objective.two_sided is None else torch.where(advantage < 0, ratio.clamp(max=objective.two_sided), ratio)
    return torch.minimum(open_ratio * advantage, ratio.clamp(*objective.bounds) * advantage)


def importance(objective: Objective, log_weight_R: Tensor) -> tuple[Tensor, Tensor]:
    """From log(pi_old / pi_sampler) the weights that correct for the sampler's numerics, and which of them were out of bounds."""
    assert objective.importance_cap is not None
    weight_R = log_weight_R.exp()
    if objective.importance_mode == "truncate":
        return weight_R.clamp(max=objective.importance_cap), weight_R > objective.importance_cap
    outside_R = (weight_R > objective.importance_cap) | (weight_R < 1 / objective.importance_cap)
    return weight_R.masked_fill(outside_R, 0.0), outside_R


def watch(objective: Objective, ratio_R: Tensor, advantage_R: Tensor) -> dict[str, Tensor]:
    """The ratios, and how many of them a bound acted on."""
    low, high = objective.bounds
    above_R = (ratio_R > high) & ((advantage_R > 0) | (objective.kind == "cispo"))
    if objective.two_sided is not None:
        above_R |= (ratio_R > objective.two_sided) & (advantage_R < 0)
    below_R = (ratio_R < low) & (advantage_R < 0)
    counts = {"clipped_low": below_R.sum(), "clipped_high": above_R.sum()}
    return {"policy_tokens": ratio_R.new_tensor(len(ratio_R)), "ratio": ratio_R.sum(), "max_ratio": _largest(ratio_R), **counts}


class Samples:
    """Sums and means over the tokens of each sample, given back to every one of its tokens."""

    def __init__(self, samples_R: Tensor) -> None:
        _, self._index_R, length_S = samples_R.unique(return_inverse=True, return_counts=True)
        self.length_R = length_S[self._index_R]

    def sum(self, x_R: Tensor) -> Tensor:
        return x_R.new_zeros(len(x_R)).index_add(0, self._index_R, x_R)[self._index_R]

    def mean(self, x_R: Tensor) -> Tensor:
        return self.sum(x_R) / self.length_R


def _field(batch: Batch, name: str, rows: Tensor) -> Tensor:
    values = getattr(batch, name)
    assert values is not None, f"the objective needs batch.{name}"
    return values[rows]


def _largest(x_R: Tensor) -> Tensor:
    return x_R.max() if len(x_R) else x_R.new_zeros(())
