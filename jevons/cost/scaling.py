"""The best model for a budget: dense or a mixture of experts, how large, on how many tokens, and how sure that is.

    suggestion = best(500, parse_cluster("8xH100", hardware), share=0.4)
    suggestion.best.config, suggestion.best.tokens, suggestion.best.hours, str(suggestion)

Problem: money buys FLOPs, and they can go into a larger model or into more text. Approach: loss = E + A / N^alpha + B / D^beta,
fitted to Chinchilla's runs (Hoffmann et al., arXiv 2203.15556), with the constants that a replication found (Besiroglu et al.,
arXiv 2404.10102) because the published ones contradict the paper's other two methods. A mixture of experts is taken as a dense
model of `leverage` times its active parameters; LEVERAGE says what was published for that and at which scale. It trains at a lower
share of peak than a dense model, so at small scale, where leverage is small, dense wins a dollar. What benchmarks/sparse.py measured
here is the leverage at its own, small scale, and on a CPU the difference in speed. Every figure is a range. The law's losses are of
another corpus and vocabulary: they rank, and say nothing about yours. Several devices are taken to share the work without loss. Not
done: memory layers; what serving costs (a smaller model on more tokens is cheaper to serve); more than four passes over a text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from jevons.cost import shape
from jevons.cost.arithmetic import Parameters, parameters, train_flops
from jevons.cost.hardware import Cluster
from jevons.cost.memory import training_memory
from jevons.cost.receipt import format_amount, format_count
from jevons.model.config import ModelConfig

# Besiroglu et al., table 1: estimate and standard error of each
E, A, B, ALPHA, BETA = 1.8172, 482.01, 2085.43, 0.3478, 0.3658
E_ERROR = 0.03
SHARE_OF_N = 0.5126  # exponent a of N ~ C^a, from ALPHA and BETA
SHARE_OF_N_ERROR = 0.02
FITTED = (6e18, 3e21)  # FLOPs of Chinchilla's runs
CENTRE = math.sqrt(FITTED[0] * FITTED[1])  # about which the fit can turn
CONFIDENCE = 1.28  # standard errors on either side: 80 %
CHINCHILLA = 20  # tokens a parameter of Hoffmann's first method, the other end of what is published for the optimum
EPOCHS = 4  # passes over text that are worth nearly as much as new text, arXiv 2305.16264
RATIO, LEAST_RATIO = 12, 4  # total over active parameters of a suggested mixture, and the least that is one
ROOM = 0.9  # of the devices' memory that training may take
# A mixture's share of peak beside a dense model's: nanochat's log of 2026-02-19 has 35 % and 46 %.
SPARSE_SHARE = 0.35 / 0.46


@dataclass(frozen=True)
class Range:
    low: float
    middle: float
    high: float


@dataclass(frozen=True)
class Measured:
    """A mixture beside a dense model of the same FLOPs a token, trained here (benchmarks/sparse.py, one run each)."""

    leverage: Range
    flops: float  # of a run
    speed: float  # tokens/s of the mixture over those of the dense model
    device: str
    date: str


@dataclass(frozen=True)
class Evidence:
    """Of a mixture: the dense model that reaches the same loss on the same tokens has so many times its active parameters."""

    leverage: float
    flops: float | None  # of the mixture's training; None where it is not public
    source: str


LEVERAGE = (
    Evidence(2.5, 3.4e22, "DeepSeekMoE 16B (arXiv 2401.06066): LLaMA2 7B's results at 40 % of its FLOPs, 2.8B active, 2T tokens"),
    Evidence(3.9, 1.1e21, "UltraMem (arXiv 2411.12364), table 1: 2 of 34 experts, 0.35 GFLOP a token, loss 2.63; dense 0.68B 2.64"),
    Evidence(3.7, 1.1e22, "UltraMem (arXiv 2411.12364), table 1: 2 of 34 experts, 3.52 GFLOP a token, loss 2.30; dense 6.5B 2.30"),
    Evidence(7.2, 5.1e21, "Ling-mini-beta (arXiv 2507.17702): 0.85B active equals 6.1B dense on 1T tokens"),
    Evidence(7.0, None, "Doubao-1.5-Pro's announcement: beats a dense model of 7 times its active size; sizes and tokens are not public"),
)
# nanochat (log of 2026-02-19): DeepSeek-V3's design, better a FLOP and worse a second than dense at GPT-2's scale
_NAMES = {"dense": "A dense model", "moe": "A mixture of experts"}
NO_GAIN = 4e19  # FLOPs
FULL_GAIN = min(evidence.flops for evidence in LEVERAGE if evidence.flops)


@dataclass(frozen=True)
class Option:
    """A model that the budget trains."""

    kind: str  # dense or moe
    config: ModelConfig
    parameters: Parameters
    tokens: float
    flops: float
    hours: float  # wall clock, of all devices
    dollars: float
    loss: Range  # by the law, in nats a token of Chinchilla's corpus
    active: Range  # where the best active size lies, by the uncertainty of the fit
    flat: tuple[float, float]  # active sizes between which the law's loss rises by at most 1 %
    memory: float  # bytes a device, training
    recompute: bool  # whether it has to compute activations again to fit
    passes: float | None  # over the text at hand; None where its size was not said
    cramped: bool  # whether the devices' memory made it smaller than the budget would train best

    def model(self) -> dict[str, object]:
        """A recipe's [model]."""
        return shape.fields(self.config)


@dataclass(frozen=True)
class Suggestion:
    """What to train, what else was weighed, and how sure that is. As text: sentences."""

    best: Option
    other: Option  # the best of the other kind
    leverage: Range  # of a mixture at this budget
    sure: bool  # whether the kind stays the best over the whole range of its leverage
    reasons: tuple[str, ...]
    sources: tuple[str, ...]

    def __str__(self) -> str:
        option, count = self.best, self.best.parameters
        size = f"{format_count(count.total)} parameters"
        if option.kind == "moe":
            size += f", {format_count(count.active)} of them for a token"
        takes = f"{option.hours:,.1f} hours, ${format_amount(option.dollars)}"
        first = f"{_NAMES[option.kind]}, {size}, on {format_count(round(option.tokens))} tokens: {takes}."
        return " ".join((first, *self.reasons))


def loss(size: float, tokens: float) -> float:
    """The law: nats a token of a dense model of `size` parameters after `tokens` tokens."""
    return E + A / size**ALPHA + B / tokens**BETA


def optimum(flops: float, turn: float = 0.0) -> float:
    """The size that the law finds best for this many FLOPs, at 6 for a parameter and token.

    `turn`: added to the exponent, about the centre of the fitted runs: what the fit's uncertainty does to the optimum elsewhere.
    """
    least = (ALPHA * A / (BETA * B)) ** (1 / (ALPHA + BETA))
    return least * (flops / 6) ** (BETA / (ALPHA + BETA)) * (flops / CENTRE) ** turn


def sizes(flops: float) -> Range:
    """The best size of a dense model: 80 % of the fit's uncertainty, widened to where Chinchilla's 20 tokens a parameter lie."""
    around = [optimum(flops, sign * CONFIDENCE * SHARE_OF_N_ERROR) for sign in (-1, 0, 1)]
    chinchilla = math.sqrt(flops / 6 / CHINCHILLA)
    return Range(min(*around, chinchilla), around[1], max(*around, chinchilla))


def flat(flops: float, size: float, rise: float = 0.01) -> tuple[float, float]:
    """The sizes around `size` between which the loss at this many FLOPs is at most `rise` above its own, as a share."""
    limit = loss(size, flops / 6 / size) * (1 + rise)

    def edge(direction: int) -> float:
        near, far = 0.0, 8.0  # in doublings
        while far - near > 1e-3:
            middle = (near + far) / 2
            other = size * 2 ** (direction * middle)
            near, far = (middle, far) if loss(other, flops / 6 / other) <= limit else (near, middle)
        return float(size * 2 ** (direction * near))

    return edge(-1), edge(1)


def leverage(flops: float, measured: Measured | None = None) -> Range:
    """How many times its active parameters a mixture counts for, at a training of this many FLOPs.

    At NO_GAIN what nanochat saw (better a FLOP, worse a second: above 1, below the loss of speed), from FULL_GAIN on what is published,
    at its own scale what was `measured`; between them straight lines in the logarithm of FLOPs, on which nobody measured anything.
    """
    published = sorted(evidence.leverage for evidence in LEVERAGE)
    points = [
        (NO_GAIN, Range(1.0, (1 + 1 / SPARSE_SHARE) / 2, 1 / SPARSE_SHARE)),
        (FULL_GAIN, Range(published[0], math.prod(published) ** (1 / len(published)), published[-1])),
    ]
    if measured is not None:
        points = [(measured.flops, measured.leverage), *(point for point in points if point[0] > measured.flops)]
    if flops <= points[0][0]:
        return points[0][1]
    for (least, small), (most, large) in pairwise(points):
        if flops < most:
            along = math.log(flops / least) / math.log(most / least)
            return Range(*(getattr(small, end) ** (1 - along) * getattr(large, end) ** along for end in ("low", "middle", "high")))
    return points[-1][1]


def read_measured(path: Path) -> Measured | None:
    """The loss part of a file that benchmarks/sparse.py wrote, None where it has none. ValueError for another file.

    Leverage is how many times as many tokens, so FLOPs, the dense model needs for the loss that both reached.
    """
    try:
        part = json.loads(path.read_text(encoding="utf-8"))["ours"].get("loss")
        if part is None:
            return None
        dense, moe = ([(x, y) for x, y in part["curves"][name]["tokens"]] for name in ("dense", "moe"))
        reached = max(min(y for _, y in curve) for curve in (dense, moe))
        needed = {name: _first(curve, reached) for name, curve in (("dense", dense), ("moe", moe))}
        middle = needed["dense"] / needed["moe"]
        speed = part["models"]["moe"]["tokens_per_second"] / part["models"]["dense"]["tokens_per_second"]
        flops = 3 * part["models"]["moe"]["flops"] * part["tokens"]
        # one run each: other seeds may move it by a quarter, a guess on the wide side
        return Measured(Range(middle / 1.25, middle, middle * 1.25), flops, speed, part["device"], part["date"])
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not what benchmarks/sparse.py writes ({error!r})") from error


def _first(curve: list[tuple[float, float]], level: float) -> float:
    """Where a falling curve first comes down to a level."""
    for (x0, y0), (x1, y1) in pairwise(curve):
        if y1 <= level:
            return x1 if y0 <= level or y0 == y1 else x0 + (x1 - x0) * (y0 - level) / (y0 - y1)
    return curve[-1][0]


def best(
    budget: float,
    cluster: Cluster,
    share: float,
    *,
    sparse_share: float | None = None,
    vocab_size: int = 32768,
    sequence_length: int = 4096,
    text: float | None = None,
    spot: bool = False,
    measured: Measured | None = None,
) -> Suggestion:
    """The model with the lowest loss that `budget` dollars train on these devices. ValueError where they buy none.

    `share`: of the devices' bf16 peak that a dense model reaches; `sparse_share`: a mixture, if not what was measured
    on such a device, or else SPARSE_SHARE of the dense one's. `text`: tokens at hand, of which four passes are taken at most.
    """
    price = cluster.device.spot if spot else cluster.device.on_demand
    if price is None or price <= 0:
        raise ValueError(f"no rent is known for {cluster.device.name}; give its on_demand in a hardware file (1 counts hours)")
    if not 0 < budget < math.inf:
        raise ValueError(f"budget: must be above 0 dollars, is {budget:g}")
    for name, value in (("share", share), ("sparse_share", sparse_share)):
        if value is not None and not 0 < value <= 1:
            raise ValueError(f"{name}: must be above 0 and at most 1 (of peak), is {value}")
    if sparse_share is None:  # the benchmark runs on processors
        slower = measured.speed if measured is not None and cluster.device.name.startswith("CPU") else SPARSE_SHARE
        sparse_share = min(1.0, share * slower)
    slow = sparse_share

    def options(dollars: float) -> tuple[Option, Option, Range]:
        hours = dollars / price / cluster.count
        peak = hours * 3600 * cluster.count * cluster.device.peak["bf16"]
        gain, spent = leverage(peak * slow, measured), (vocab_size, sequence_length, text, hours, dollars)
        dense = _option("dense", peak * share, Range(1, 1, 1), cluster, *spent)
        return dense, _option("moe", peak * slow, gain, cluster, *spent), gain

    try:
        dense, moe, gain = options(budget)
    except ValueError as error:
        raise ValueError(f"{_would_do(budget, options)} on {cluster} ({error})") from error
    if moe.loss.middle < dense.loss.middle:
        chosen, other, sure = moe, dense, moe.loss.high < dense.loss.middle
    else:
        chosen, other, sure = dense, moe, dense.loss.middle < moe.loss.low
    sources = ["arXiv 2203.15556", "arXiv 2404.10102", *(evidence.source for evidence in LEVERAGE), "nanochat's log, 2026-02-19"]
    return Suggestion(chosen, other, gain, sure, _reasons(chosen, other, gain, sure, moe.flops, measured), tuple(sources))


def _would_do(budget: float, options: Callable[[float], object]) -> str:
    """The nearest budget, by factors of two, that buys a model which can be made."""
    for more in range(1, 200):
        for times, what in ((2.0**more, "too little for a model, ${} would do"), (0.5**more, "more than can be planned, up to ${}")):
            with suppress(ValueError):
                options(budget * times)
                return what.format(format_amount(budget * times))
    return "no budget buys such a model"


def _option(
    kind: str, flops: float, gain: Range, cluster: Cluster, vocab: int, length: int, text: float | None, hours: float, dollars: float
) -> Option:
    """The best model of a kind that the devices can hold in training, a sequence at once on each."""
    effective = gain.middle * flops  # what a dense model would have needed
    active = optimum(effective) / gain.middle
    if text is not None:
        active = max(active, flops / 6 / (EPOCHS * text))
    ratio, cramped, room = float(RATIO), False, ROOM * cluster.device.memory
    while True:
        if kind == "dense":
            config = shape.dense(active, vocab_size=vocab, max_position_embeddings=length)
        else:
            config = shape.sparse(active, ratio * active, vocab_size=vocab, max_position_embeddings=length)
        held = _memory(config, length, cluster, recompute=False)
        if recompute := held > room:
            held = _memory(config, length, cluster, recompute=True)
        if held <= room:
            break
        fewer = 0.98 * room / held
        if kind == "moe" and ratio > LEAST_RATIO:  # fewer experts first
            ratio = max(LEAST_RATIO, ratio * fewer)
        else:
            active, cramped = active * fewer, True
    counts = parameters(config)
    size = counts.active_without_embedding
    tokens = flops / train_flops(config, length, mtp=False)
    optimal = sizes(effective)
    ends = flat(effective, optimal.middle)
    return Option(
        kind,
        config,
        counts,
        tokens,
        flops,
        hours,
        dollars,
        Range(*(loss(size * times, tokens) for times in (gain.high, gain.middle, gain.low))),
        Range(*(value / gain.middle for value in (optimal.low, optimal.middle, optimal.high))),
        (ends[0] / gain.middle, ends[1] / gain.middle),
        held,
        recompute,
        None if text is None else tokens / text,
        cramped,
    )


def _memory(config: ModelConfig, length: int, cluster: Cluster, *, recompute: bool) -> float:
    return training_memory(config, tokens=length, micro_batches=2, devices=cluster.count, recompute=recompute).total


def _reasons(chosen: Option, other: Option, gain: Range, sure: bool, flops: float, measured: Measured | None) -> tuple[str, ...]:
    low, high, fit_low, fit_high = (format_count(round(n)) for n in (*chosen.flat, chosen.active.low, chosen.active.high))
    best = f"the law puts the best at {fit_low} to {fit_high} (80 % of its uncertainty), of which this is a shape that can be built"
    said = [f"Active sizes from {low} to {high} cost at most 1 % more loss; {best}."]
    if not FITTED[0] <= chosen.flops <= FITTED[1]:
        said.append(f"The law was fitted to runs of {FITTED[0]:.0e} to {FITTED[1]:.0e} FLOPs; this one has {chosen.flops:.1e}.")
    if chosen.passes is not None and chosen.passes > 1:
        said.append(f"Your text is read {chosen.passes:.1f} times.")
    if measured is not None and flops <= measured.flops:
        origin = f"measured on {measured.date}, at this scale or above"
    elif flops >= FULL_GAIN:
        origin = "published"
    elif flops <= NO_GAIN and measured is None:
        origin = "at or below the scale at which nanochat found it better a FLOP and worse a second"
    else:
        origin = "interpolated between scales that were measured"
    said.append(f"A mixture counts for {gain.middle:.2g} times its active parameters, {gain.low:.2g} to {gain.high:.2g} ({origin}).")
    ahead = f"{other.loss.middle - chosen.loss.middle:.3f} nats a token by the law"
    end = "over that whole range" if sure else "by the middle of that range, and behind at its other end"
    said.append(f"For the same money {_NAMES[chosen.kind].lower()} is ahead {end}: {ahead}, whose own level is uncertain by {E_ERROR}.")
    if chosen.recompute:
        said.append("To fit, it computes activations again in the backward pass, which no share of peak here counts.")
    said += [f"{_NAMES[o.kind]} is smaller than would be best, for want of memory in training." for o in (chosen, other) if o.cramped]
    return tuple(said)
