"""Losses: pure functions of hidden states, head weights and a batch.

What pretraining, fine-tuning and distillation differ in are the arrays a Batch carries and which of these is passed to
`Trainer.forward_backward`. A loss returns a sum over tokens; the trainer divides by the global token count.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from jevons.data.batch import Batch
from jevons.kernels.cross_entropy import cross_entropy


class Loss(NamedTuple):
    """The sum to differentiate, (), and the per-token negative log-likelihoods it was made of, (T,)."""

    total: Tensor
    nll_T: Tensor


def next_token(hidden_TD: Tensor, head_WD: Tensor, batch: Batch) -> Loss:
    """Weighted cross-entropy of each token's target."""
    return Loss(*cross_entropy(hidden_TD, head_WD, batch.targets_T, batch.weights_T))
