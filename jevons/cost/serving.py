"""What serving costs: the speed and the prices of a deployment for one kind of request, and which deployments would do.

    quote(deployment, Request(prompt=4600, cached=2600, output=800))     tokens a second, dollars a million tokens
    fit(config, Cluster(device, 8), request, format="fp8")               the best layout of these devices, or what else would do

Problem: a price list is one number a token, but a device costs the same whatever it does. Approach: a token costs the seconds
that it takes of all devices of its deployment (cost/deployment.py), times their rent. Prices hold for devices that are busy
all the time; cost/comparison.py counts the idle ones. Prompts and answers may share devices or have their own: the seconds
are the same. Not done: host memory, disk and people; requests of different lengths; queueing (a server is never full).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from jevons.cost.arithmetic import cache_bytes_per_token
from jevons.cost.deployment import FORMATS, Deployment, Layout, weight_format
from jevons.cost.hardware import Cluster, Device
from jevons.cost.profile import Profile
from jevons.model.config import ModelConfig

COUNTS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 320)  # of devices that `fit` tries

@dataclass(frozen=True)
class Request:
    """A mean request, in tokens."""

    prompt: int
    output: int
    cached: int = 0  # of the prompt, found in the cache

    def __post_init__(self) -> None:
        if not 0 <= self.cached < self.prompt or self.output < 1:
            raise ValueError(f"request: needs 0 <= cached < prompt and an output, has {self.prompt}, {self.cached} and {self.output}")

    @property
    def context(self) -> float:
        """Tokens that a step of decoding attends to, on average."""
        return self.prompt + self.output / 2


@dataclass(frozen=True)
class Quote:
    """What a deployment gives for one kind of request, busy all the time. Prices are dollars a million tokens, None without a rent."""

    device: str
    layout: Layout
    format: str
    weights: float  # bytes on a device
    cache_per_token: float  # bytes on a device
    sequences: int  # that the memory of all devices holds at the request's context
    batch: int  # sequences at once that the figures below are for: as many as fit and as the time a token allows
    crossover: float  # batch from which on a step reads more cache than weights
    time_per_token: float  # seconds
    tokens_per_second: float  # generated, of all devices, when they do nothing else
    prefill_tokens_per_second: float  # of prompts, cached ones not counted, when they do nothing else
    bound: str  # what decoding waits for: memory, compute or communication
    requests_per_second: float  # of all devices, prompts and answers in turn
    decode_share: float  # of the roofline, in the step that was planned
    prefill_share: float
    measured: bool  # whether the shares were, on this device
    price_per_hour: float | None  # of a device
    seconds_cached: float  # of all devices, that a cached token of a prompt takes: others attend to it, and it is fetched
    price_input: float | None
    price_cached: float | None
    price_output: float | None
    price_request: float | None  # dollars

    @property
    def devices(self) -> int:
        return self.layout.devices

    @property
    def seconds_input(self) -> float:
        """Of all devices, that a token of a prompt takes."""
        return 1 / self.prefill_tokens_per_second

    @property
    def seconds_output(self) -> float:
        """Of all devices, that a generated token takes."""
        return 1 / self.tokens_per_second


def quote(deployment: Deployment, request: Request, *, slowest: float = 0.05, price_per_hour: float | None = None) -> Quote:
    """Speed and prices for requests of this kind; ValueError where they do not fit.

    `slowest`: seconds a token may take; the batch is the largest that keeps to it (one sequence a copy where none does).
    `price_per_hour`: of a device; None takes the hardware table's rent on demand.
    """
    context = request.context
    held = deployment.sequences(context)
    if not held:
        raise ValueError(deployment.problem(context))
    data = deployment.layout.data
    low, high = 1, held // data
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if deployment.decode(middle * data, context).seconds <= slowest else (low, middle - 1)
    step, reading = deployment.decode(low * data, context), deployment.prefill(request.prompt)
    hour = deployment.device.on_demand if price_per_hour is None else price_per_hour
    per_second = None if hour is None else hour * deployment.layout.devices / 3600
    # a cached token is not computed, but the others attend to it, and it is fetched from where it was kept
    prompt_seconds = (request.prompt - request.cached) / deployment.prefill(request.prompt, request.cached).rate
    extra = max(0.0, prompt_seconds - (request.prompt - request.cached) / reading.rate) / max(1, request.cached)
    way = (deployment.device.network or deployment.device.bandwidth) * deployment.layout.devices
    fetch = cache_bytes_per_token(deployment.config, deployment.cache_bytes) / way
    prompt_seconds += fetch * request.cached
    request_seconds = prompt_seconds + request.output / step.rate

    def price(seconds: float) -> float | None:
        return None if per_second is None else seconds * per_second * 1e6

    return Quote(
        device=deployment.device.name,
        layout=deployment.layout,
        format=deployment.format.name,
        weights=deployment.weights,
        cache_per_token=deployment.cache_per_token,
        sequences=held,
        batch=low * data,
        crossover=deployment.crossover(context),
        time_per_token=step.seconds,
        tokens_per_second=step.rate,
        prefill_tokens_per_second=reading.rate,
        bound=step.bound,
        requests_per_second=1 / request_seconds,
        decode_share=step.share,
        prefill_share=reading.share,
        measured=deployment.measured,
        price_per_hour=hour,
        seconds_cached=extra + fetch,
        price_input=price(1 / reading.rate),
        price_cached=price(extra + fetch),
        price_output=price(1 / step.rate),
        price_request=None if per_second is None else request_seconds * per_second,
    )


@dataclass(frozen=True)
class Fit:
    """Whether a model can be served on a cluster, how best, and what would do if not. As text: the answer in a sentence."""

    cluster: Cluster
    format: str
    quote: Quote | None  # of the layout whose requests cost the least; None where none fits
    problem: str  # of the layout that comes nearest, empty where one fits
    alternatives: tuple[Quote, ...]  # where none fits: the fewest devices of each kind and format that do, the cheapest first

    def __str__(self) -> str:
        if self.quote is not None:
            return f"{self.cluster}, {self.format}: {self.quote.layout}, {self.quote.sequences:,} sequences at once"
        would = [f"{q.devices} x {q.device} in {q.format}" for q in self.alternatives]
        return f"does not fit on {self.problem}. " + (f"These would do: {', '.join(would)}" if would else "Nothing in the table would do")


def fit(
    config: ModelConfig,
    cluster: Cluster,
    request: Request,
    *,
    format: str = "bf16",
    devices: Iterable[Device] = (),
    slowest: float = 0.05,
    profile: Profile | None = None,
    price_per_hour: float | None = None,
) -> Fit:
    """The best layout of a model on a cluster, or why none fits and what would do: more of these, fewer bits, or others of `devices`.

    `slowest` and `price_per_hour`: see `quote`; `profile`: of the cluster's device, where it was measured. Raises ValueError for an
    unknown format.
    """
    wanted = weight_format(format)
    asked = deployments(config, cluster.device, cluster.count, format)
    assert asked, "a layout without any slicing is always possible"
    if profile is not None:
        asked = [deployment.calibrated(profile) for deployment in asked]
    if (best := _best(asked, request, slowest, price_per_hour)) is not None:
        return Fit(cluster, format, best, "", ())
    nearest = min(asked, key=lambda d: d.weights + request.context * d.cache_per_token)
    smaller = [f.name for f in FORMATS.values() if f.matrix <= wanted.matrix]
    tried = [(cluster.device, name) for name in smaller]
    tried += [(device, format) for device in devices if device.name != cluster.device.name]
    found = []
    for device, name in tried:
        options = (deployments(config, device, count, name) for count in COUNTS)
        first = next((o for o in options if any(d.sequences(request.context) for d in o)), [])
        rent = price_per_hour if device is cluster.device else None
        if (quoted := _best(first, request, slowest, rent)) is not None:
            found.append(quoted)
    found.sort(key=lambda q: (q.price_request is None, q.price_request, q.devices))
    return Fit(cluster, format, None, nearest.problem(request.context), tuple(found))


def deployments(config: ModelConfig, device: Device, count: int, format: str) -> list[Deployment]:
    """Every layout of a model on so many devices: slices within a node, experts sliced, dealt out in a node, or over all of them."""
    found = []
    for tensor in (t for t in range(1, min(count, device.per_node) + 1) if count % t == 0 and config.num_attention_heads % t == 0):
        groups = {1}
        if config.n_routed_experts:
            groups |= {group for group in (device.per_node, count) if group <= count and count % group == 0 and group % tensor == 0}
        for expert in groups:
            way = device.network if expert > device.per_node else device.link
            if (tensor == 1 or device.link is not None) and (expert == 1 or way is not None):
                found.append(Deployment(config, device, Layout(tensor, count // tensor, expert), weight_format(format)))
    return found


def _best(options: Iterable[Deployment], request: Request, slowest: float, price_per_hour: float | None) -> Quote | None:
    """Of those that fit, the one that answers most requests a second while it keeps to `slowest`, else the fastest a token."""
    quotes = [quote(d, request, slowest=slowest, price_per_hour=price_per_hour) for d in options if d.sequences(request.context)]
    kept = [q for q in quotes if q.time_per_token <= slowest]
    if kept:
        return max(kept, key=lambda q: q.requests_per_second)
    return min(quotes, key=lambda q: q.time_per_token, default=None)


def node_hours(input_tokens: float, output_tokens: float, prefill_rate: float, decode_rate: float) -> float:
    """Hours of nodes that a traffic takes, at tokens/s that a node reads (cached ones counted) and generates."""
    return (input_tokens / prefill_rate + output_tokens / decode_rate) / 3600


def price_per_million(price_per_hour: float, tokens_per_second: float) -> float:
    """Dollars a million tokens of something that costs so much an hour and gives so many tokens a second."""
    return price_per_hour / (tokens_per_second * 3600) * 1e6
