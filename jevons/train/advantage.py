"""What an answer is compared with, and how the tokens of answers add up to one loss.

The advantage of an answer is its reward less the mean of its group, the answers to the same problem, over a standard deviation:

    grpo    of its group              GRPO, arXiv 2402.03300: groups that nearly always succeed or fail are scaled up
    dr      1                         Dr.GRPO, 2503.20783; V3.2 and k1.5 too
    batch   of all centred rewards    ScaleRL, 2510.13786

"Standard deviation" is the population's, divided by G and without an epsilon, as DeepSeek writes it. TRL takes the sample's, divided by
G - 1, plus 1e-4: 6 % smaller advantages at G = 8. Both are here, since published settings were found with either.

A loss is sum over tokens of token_weight x term, over the normaliser of the whole step:

    sample     mean over answers of the mean over their tokens         GRPO
    token      mean over all tokens: long answers weigh more           DAPO, 2503.14476
    constant   sum over tokens, over answers x longest allowed         Dr.GRPO: neither length nor batch changes what a token weighs

Groups whose rewards are all alike have no gradient. They may stay out of the batch, as long as the normaliser counts them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["grpo", "dr", "batch"]
Aggregation = Literal["sample", "token", "constant"]
ALIKE = 1e-6  # rewards nearer to each other differ by rounding, which dividing by their deviation would make a signal of


def has_signal(rewards: Sequence[float]) -> bool:
    """Whether a group's rewards differ, so that there is something to learn from it."""
    return max(rewards) - min(rewards) > ALIKE


def advantages(rewards_PG: Tensor, kind: Kind = "grpo", *, deviation: Literal["population", "sample"] = "population") -> Tensor:
    """(P, G) in fp32. Exactly 0 in a group whose rewards are alike."""
    rewards_PG = rewards_PG.double()
    centred_PG = rewards_PG - rewards_PG.mean(-1, keepdim=True)
    spread_P1 = rewards_PG.amax(-1, keepdim=True) - rewards_PG.amin(-1, keepdim=True)
    centred_PG = torch.where(spread_P1 > ALIKE, centred_PG, 0.0)
    if kind == "dr":
        return centred_PG.float()
    correction, epsilon = (0, 0.0) if deviation == "population" else (1, 1e-4)
    scale = centred_PG.std(-1 if kind == "grpo" else (0, 1), correction=correction, keepdim=True)
    return torch.where(scale > 0, centred_PG / (scale + epsilon), 0.0).float()


def token_weight(aggregation: Aggregation, length: int) -> float:
    """Of each of the tokens that the model drew itself in an answer that has `length` of them."""
    return 1.0 / max(length, 1) if aggregation == "sample" else 1.0


def normaliser(aggregation: Aggregation, lengths: Sequence[int], longest: int) -> float:
    """What a step's sum is divided by: `lengths` of all its answers, also of those left out, and the longest allowed."""
    if aggregation == "sample":
        return float(len(lengths))
    return float(sum(lengths)) if aggregation == "token" else float(len(lengths) * longest)
