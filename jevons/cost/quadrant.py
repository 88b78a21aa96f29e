"""Serving in four quadrants: prompts and answers, attention and feed-forward, each on devices of its own kind.

    found = quadrants(published("deepseek-v3"), [h800, h20], Request(prompt=4000, cached=2000, output=1000), format="fp8")
    found.decode.attention, found.decode.feed_forward, found.decode.price         so many of which device each, dollars a million tokens

Problem: the four want different things of a device (Doubao-1.5-Pro's announcement of January 2025 names them, and heterogeneous
hardware for each, without figures): reading prompts wants FLOPS, decoding's attention bandwidth and memory for the cache, its experts
large batches. Approach: a layer's attention runs on one group of devices and its feed-forward on another; `micro` batches go back
and forth in turn, so that both work at once. A layer then takes the largest of what a group needs for all of them and what one needs
for its round trip. All counts of both groups and all pairs of devices are tried, per phase. Shares of the roofline, formats and
expected experts are cost/deployment.py's. Not done: groups within a node, prompts of different lengths, moving the cache from the
first phase to the second. A surrogate: nothing of Doubao's own system is public, and nothing here was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import product

from jevons.cost.arithmetic import attention_parameters, cache_bytes_per_token, decode_flops, prefill_flops
from jevons.cost.deployment import COMBINE, DECODE_SHARE, DISPATCH, PREFILL_SHARE, USABLE, Deployment, weight_format
from jevons.cost.hardware import Cluster, Device
from jevons.cost.serving import Request, price_per_million
from jevons.model.config import ModelConfig

COUNTS = tuple(2**i for i in range(7))  # devices of a group that are tried
CHUNK = 8192  # prompt tokens that a device of attention reads in one step


@dataclass(frozen=True)
class Work:
    """What a token asks of the two halves of all layers."""

    attention_flops: float
    feed_forward_flops: float
    cache: float  # bytes that attention reads for it, and that its sequence holds


@dataclass(frozen=True)
class Phase:
    """Prompts or answers on two groups of devices."""

    attention: Cluster
    feed_forward: Cluster
    tokens: int  # in a step, of all micro-batches
    seconds: float
    bound: str  # attention, feed-forward, exchange, or the round trip of one micro-batch

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds

    @property
    def price_per_hour(self) -> float:
        return sum(group.count * (group.device.on_demand or 0.0) for group in (self.attention, self.feed_forward))

    @property
    def price(self) -> float:
        """Dollars a million tokens."""
        return price_per_million(self.price_per_hour, self.rate)


@dataclass(frozen=True)
class Quadrants:
    """The cheapest devices for each quadrant."""

    prefill: Phase
    decode: Phase

    def price(self, request: Request) -> float:
        """Dollars a million requests."""
        return (request.prompt - request.cached) * self.prefill.price + request.output * self.decode.price


def cycle(attention: float, feed_forward: float, exchange: float, micro: int) -> tuple[float, str]:
    """Seconds in which `micro` batches in turn pass a layer whose parts take so long for one of them, and what they wait for.

    `exchange`: one way. A group works on one batch at a time, and a batch is back only after its round trip.
    """
    waits = {
        "attention": micro * attention,
        "feed-forward": micro * feed_forward,
        "exchange": micro * exchange,
        "round trip": attention + feed_forward + 2 * exchange,
    }
    bound = max(waits, key=lambda name: waits[name])
    return waits[bound], bound


def phase(whole: Deployment, attention: Cluster, feed_forward: Cluster, work: Work, tokens: int, share: float, micro: int) -> Phase:
    """A step of `tokens` tokens in all, in `micro` batches, of the model that `whole` would have on one device of feed-forward.

    The attention group copies its weights, the other one deals its own out.
    """
    config = whole.config
    batch, layers, own = tokens / micro, config.num_hidden_layers, _attention_bytes(whole)

    def seconds(group: Cluster, read: float, flops: float) -> float:
        """Of one micro-batch and one layer; `read` and `flops`: of one device in all layers."""
        return max(read / group.device.bandwidth, flops / group.device.peak["bf16"]) / layers / share

    mine, theirs = batch / attention.count, batch / feed_forward.count
    first = seconds(attention, own + mine * work.cache, mine * work.attention_flops)
    second = seconds(feed_forward, (whole.read_bytes(batch) - own) / feed_forward.count, theirs * work.feed_forward_flops)
    # a token visits the devices of its experts, or all slices of a dense feed-forward; there and back are a way each
    copies = min(config.num_experts_per_tok or feed_forward.count, feed_forward.count)
    sent = (DISPATCH + COMBINE) / 2 * copies * config.hidden_size
    assert attention.device.network is not None and feed_forward.device.network is not None
    way = max(mine * sent / attention.device.network, theirs * sent / feed_forward.device.network) / share
    time, bound = cycle(first, second, way, micro)
    return Phase(attention, feed_forward, tokens, time * layers, bound)


def quadrants(
    config: ModelConfig, devices: Iterable[Device], request: Request, *, format: str = "bf16", slowest: float = 0.05, micro: int = 3
) -> Quadrants:
    """The cheapest two groups for prompts and for answers; `slowest`: seconds a generated token may take. ValueError where nothing fits.

    Devices without a price or a network between nodes are left out.
    """
    kinds = [device for device in devices if device.on_demand and device.network]
    wholes = {device.name: Deployment(config, device, format=weight_format(format)) for device in kinds}
    layers = config.num_hidden_layers
    kept = cache_bytes_per_token(config)
    forward = decode_flops(config, 0) - 2 * layers * attention_parameters(config)
    head = 2 * config.vocab_size * config.hidden_size
    new = request.prompt - request.cached
    reading = prefill_flops(config, request.prompt, request.cached) / new - forward + head
    prompts = Work(reading, forward - head, request.prompt * kept / new)
    answers = Work(decode_flops(config, request.context) - forward, forward, request.context * kept)
    found: dict[str, Phase] = {}
    for name, work, share, limit in (("prefill", prompts, PREFILL_SHARE, None), ("decode", answers, DECODE_SHARE, slowest)):
        options = []
        for first, second in product(_groups(kinds), _groups(kinds)):
            take = partial(phase, wholes[second.device.name], first, second, work, share=share, micro=micro)
            if tokens := _tokens(wholes[second.device.name], first, second, work, take, limit):
                options.append(take(tokens))
        if not options:
            names = ", ".join(device.name for device in kinds)
            raise ValueError(f"{name}: no two groups of up to {COUNTS[-1]} of {names or 'nothing'} hold the model and keep to the time")
        found[name] = min(options, key=lambda option: option.price)
    return Quadrants(found["prefill"], found["decode"])


def _attention_bytes(whole: Deployment) -> float:
    return whole.config.num_hidden_layers * attention_parameters(whole.config) * whole.format.matrix


def _groups(kinds: Iterable[Device]) -> list[Cluster]:
    return [Cluster(device, count) for device in kinds for count in COUNTS]


def _tokens(
    whole: Deployment, first: Cluster, second: Cluster, work: Work, take: Callable[[int], Phase], limit: float | None
) -> int:
    """The most tokens a step that both groups have memory for and that keep to the limit; 0 where nothing fits."""
    own = _attention_bytes(whole)
    rest, room = whole.weights - own, first.device.memory * USABLE - own
    if rest / second.count > second.device.memory * USABLE or room < work.cache:
        return 0
    high = int(room / work.cache) * first.count
    if limit is None:
        return min(high, CHUNK * first.count)
    low = 0
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if take(middle).seconds <= limit else (low, middle - 1)
    return low
