"""Losses: pure functions of hidden states, head weights and a batch.

What pretraining, fine-tuning and distillation differ in are the arrays a Batch carries and which of these is passed to
`Trainer.forward_backward`. A loss returns a sum over tokens; the trainer divides by the global token count.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from jevons.data.batch import Batch
from jevons.kernels.cross_entropy import cross_entropy
from jevons.kernels.log_prob import log_probs


@dataclass
class Loss:
    """The sum to differentiate, (), and the per-token negative log-likelihoods it was made of, (T,), detached.

    `stats` are numbers to watch, () each: the trainer adds them up over micro-batches, or takes the largest where a name begins
    with "max_".
    """

    total: Tensor
    nll_T: Tensor
    stats: dict[str, Tensor] = field(default_factory=dict)


def next_token(hidden_TD: Tensor, head_WD: Tensor, batch: Batch) -> Loss:
    """Weighted cross-entropy of each token's target."""
    return Loss(*cross_entropy(hidden_TD, head_WD, batch.targets_T, batch.weights_T))


def answer_token(hidden_TD: Tensor, head_WD: Tensor, batch: Batch) -> Loss:
    """`next_token` where many weights are 0: the head sees only the tokens that count. Of the others nll_T is 0."""
    rows = batch.weights_T.nonzero().squeeze(1)
    logps, _ = log_probs(hidden_TD[rows], head_WD, batch.targets_T[rows])
    nll_T = logps.new_zeros(len(hidden_TD)).index_copy(0, rows, -logps.detach())
    return Loss(-(logps * batch.weights_T[rows]).sum(), nll_T)
