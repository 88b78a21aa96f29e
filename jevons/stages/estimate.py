"""What some answers to some problems say about a model, and how far to trust it.

Two things are drawn by chance: the problems, and the answers to each. Answers to one problem resemble each other, so a thousand answers to
fifty problems are worth less than a thousand problems. So the standard error is taken over problems (clustered, as in arXiv
2411.00640), and turned into an interval by Wilson's score formula (E. B. Wilson, 1927) for as many independent trials as have that
standard error: unlike the usual mean +- 1.96 errors it stays between 0 and 1, and never claims certainty where all answers are right.
With one answer a problem it is Wilson's own. Models that answered the same problems are compared problem by problem, which cancels
what is hard for both.

Not done: a correction for looking at many models, or at many tasks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import correlation, fmean, variance

Z = 1.959964  # of a normal distribution 95 % lies within so many standard deviations


@dataclass(frozen=True)
class Estimate:
    """A mean over problems, and its 95 % interval."""

    value: float
    low: float
    high: float


def pass_at(samples: int, right: int, k: int) -> float:
    """The probability that at least one of k answers, drawn from `samples` of which `right` are right, is right.

    Over the samples' own randomness its mean is exactly the pass@k of k fresh answers (arXiv 2107.03374, 3.1); 1 - (1 - right/samples)^k
    would be biased. Needs k <= samples.
    """
    assert 0 <= right <= samples and 1 <= k <= samples
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def majority(answers: Sequence[str], scores: Sequence[float]) -> float:
    """The score of the answer that was given most often; answers that are empty do not vote.

    Of several that are as frequent one is chosen by lot, so the expected score is returned: answers that all differ score their mean.
    """
    given: dict[str, list[float]] = {}
    for answer, score in zip(answers, scores, strict=True):
        if answer:
            given.setdefault(answer, []).append(score)
    most = max(map(len, given.values()), default=0)
    return fmean(fmean(scores) for scores in given.values() if len(scores) == most) if given else 0.0


def wilson(share: float, trials: float, z: float = Z) -> tuple[float, float]:
    """The score interval of a proportion seen in so many independent trials."""
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return max(0.0, min(centre - half, share)), min(1.0, max(centre + half, share))  # the inner ones are for rounding


def estimate(values: Sequence[float], samples: int = 1) -> Estimate:
    """The mean of one value between 0 and 1 for each problem, each from so many answers."""
    mean, count = fmean(values), len(values)
    error = variance(values) / count if count > 1 else 0.0
    spread = mean * (1 - mean)
    # between all answers to a problem being the same and their having nothing in common
    trials = min(max(spread / error, count), count * samples) if error > 0 else count * samples if spread > 0 else count
    return Estimate(mean, *wilson(mean, trials))


def difference(before: Sequence[float], after: Sequence[float], samples: int = 1) -> Estimate:
    """How much more the second has than the first on the same problems, -1 to 1.

    The interval joins those of the two (R. G. Newcombe, 1998, for paired proportions): the more alike they find the same problems hard,
    the narrower.
    """
    a, b = estimate(before, samples), estimate(after, samples)
    alike = correlation(before, after) if len(set(before)) > 1 and len(set(after)) > 1 else 0.0

    def join(x: float, y: float) -> float:
        return math.sqrt(max(x * x - 2 * alike * x * y + y * y, 0.0))

    gain = b.value - a.value
    return Estimate(gain, gain - join(b.value - b.low, a.high - a.value), gain + join(b.high - b.value, a.value - a.low))
