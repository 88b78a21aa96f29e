"""A model on devices that serve it: does it fit, how many sequences at once, how long a step takes and what it waits for.

    deployment = Deployment(published("deepseek-v3"), device, Layout(data=144, expert=144), FORMATS["fp8"])
    deployment.sequences(context=4989)                 how many the memory of all devices holds
    deployment.decode(batch=88 * 144, context=4989)    one step: bytes, FLOPs, seconds, what bounds it

Problem: serving is bound by three different things. Prompts are products of thick matrices (the device's peak), single tokens
read weights and cache (its memory), experts on many devices exchange tokens (its network). Approach: a roofline. A step takes
the largest of the three times, divided by the share of the roofline that is reached: measured by `jevons plan --calibrate`,
or DECODE_SHARE and PREFILL_SHARE, which make DeepSeek's published day come out (tests/test_serving_cost.py). The three are
taken to overlap, as DeepSeek's two micro-batches do; sums over the slices of a sliced layer are waited for. A mixture's step
reads the experts that its tokens are expected to choose.
Not done: latency of collectives and launches (in the share), pipeline parallelism, drafts, queueing.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from jevons.cost.arithmetic import (
    attention_parameters,
    cache_bytes_per_token,
    correction_biases,
    decode_flops,
    memory_parameters,
    memory_read,
    prefill_flops,
    swiglu_parameters,
)
from jevons.cost.hardware import Device
from jevons.cost.profile import Profile
from jevons.model.config import ModelConfig

# What share of this file's roofline DeepSeek reached on 27-28 February 2025 (open-infra-index, day 6): a node of eight H800 gave
# 14.8K tokens/s in decoding, at 20 to 22 tokens/s a sequence and 4,989 tokens of mean context, and read 73.7K tokens/s of
# prompts, 56.3 % from the cache. Against the bf16 peak, though their products ran in fp8: see Deployment.products.
DECODE_SHARE = 0.35
PREFILL_SHARE = 0.36
USABLE = 0.9  # of a device's memory, for weights and cache; the rest is activations, buffers and the runtime (vLLM's default too)
DISPATCH, COMBINE = 1, 2  # bytes of a scalar that goes to an expert (fp8) and back (bf16), arXiv 2505.09343


@dataclass(frozen=True)
class Format:
    """Bytes a weight takes, scales included. Input embedding, routers, norms and memory tables stay in bf16 whatever the format."""

    name: str
    matrix: float  # weights of attention, feed-forward, experts
    head: float


FORMATS = {
    format.name: format
    for format in (
        Format("bf16", 2, 2),
        Format("fp8", 1 + 4 / 128**2, 2),  # an fp32 scale a 128 x 128 block, the head in bf16: DeepSeek-V3's own checkpoint
        Format("int8", 1 + 2 / 128, 1 + 2 / 128),  # kernels/quantize.py: a bf16 scale for every 128
        Format("int4", 0.5 + 4 / 32, 1 + 2 / 128),  # kernels/quantize.py: scale and least value for every 32, the head in int8
    )
}


def weight_format(name: str) -> Format:
    """A format by its name. ValueError, naming those that there are, for another."""
    if name not in FORMATS:
        raise ValueError(f"weights: unknown format {name!r}; known: {', '.join(FORMATS)}")
    return FORMATS[name]


@dataclass(frozen=True)
class Layout:
    """How a model lies on devices: attention sliced in `tensor` and copied `data` times, routed experts over `expert` devices.

    expert=1: every expert is sliced as attention is. Otherwise whole experts are dealt out, each device gets as many as the
    busiest needs, and places left over hold second copies (V3's 256 experts on 144 devices: 2 each, 32 of them copies).
    Shared experts and dense feed-forwards are sliced as attention is.
    """

    tensor: int = 1
    data: int = 1
    expert: int = 1

    def __post_init__(self) -> None:
        for name in ("tensor", "data", "expert"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1, is {getattr(self, name)}")
        if self.expert > 1 and (self.devices % self.expert or self.expert % self.tensor):
            wanted = f"must divide tensor x data = {self.devices} and be a multiple of tensor {self.tensor}"
            raise ValueError(f"expert: {wanted}, is {self.expert}")

    @property
    def devices(self) -> int:
        return self.tensor * self.data

    @property
    def expert_group(self) -> int:
        """Devices that hold all experts once."""
        return max(self.expert, self.tensor)

    def __str__(self) -> str:
        return ", ".join(f"{name} {size}" for name, size in dataclasses.asdict(self).items() if size > 1) or "one device"


@dataclass(frozen=True)
class Step:
    """One step of a deployment: what each device does in it."""

    tokens: int  # of all devices together: those generated, or those read from prompts
    weight_bytes: float
    cache_bytes: float
    flops: float
    memory: float  # seconds, each at the data sheet's (or the profile's) full rate
    compute: float
    communication: float  # with experts on other devices
    sums: float  # over the slices of attention and feed-forward; the next layer waits for them, so they come on top
    share: float

    @property
    def roofline(self) -> float:
        """Seconds that it takes at least."""
        return max(self.memory, self.compute, self.communication) + self.sums

    @property
    def seconds(self) -> float:
        """Seconds that it is expected to take."""
        return self.roofline / self.share

    @property
    def bound(self) -> str:
        """What it waits for longest: memory, compute or communication."""
        waits = {"memory": self.memory, "compute": self.compute, "communication": max(self.communication, self.sums)}
        return max(waits, key=lambda name: waits[name])

    @property
    def rate(self) -> float:
        """Tokens a second of all devices together."""
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Deployment:
    """A model on devices. Raises ValueError for a layout that the model cannot have, or a link whose speed nobody knows."""

    config: ModelConfig
    device: Device
    layout: Layout = Layout()
    format: Format = FORMATS["bf16"]
    cache_bytes: float = 2  # of a cached scalar
    # the peak that products count against; fp8 weights too: shares are published, and reached, against bf16's
    products: str = "bf16"
    decode_share: float = DECODE_SHARE
    prefill_share: float = PREFILL_SHARE
    decode_shares: tuple[tuple[float, float], ...] = ()  # where they were measured: (sequences on a copy, share), in order
    measured: bool = False  # whether the shares were
    chunk: int = 8192  # prompt tokens that a copy of attention reads in one step

    def __post_init__(self) -> None:
        config, layout = self.config, self.layout
        if config.num_attention_heads % layout.tensor:
            raise ValueError(f"tensor: {layout.tensor} does not divide {config.num_attention_heads} attention heads")
        if layout.expert > 1 and not config.n_routed_experts:
            raise ValueError(f"expert: {layout.expert}, but the model has no experts; use tensor or data")
        if self.products not in self.device.peak:
            raise ValueError(f"products: {self.device.name} has no peak in {self.products}; known: {', '.join(self.device.peak)}")
        if layout.tensor > 1 and self.device.link is None:
            raise ValueError(f"tensor: the speed of {self.device.name}'s link is not known; add it to the hardware file, or use tensor 1")
        if layout.expert > 1 and self._exchange_bandwidth is None:
            raise ValueError(f"expert: the speed between {layout.expert} {self.device.name} is not known; add it to the hardware file")

    @property
    def _exchange_bandwidth(self) -> float | None:
        return self.device.network if self.layout.expert > self.device.per_node else self.device.link

    @cached_property
    def _moe_layers(self) -> int:
        return sum(self.config.is_moe(layer) for layer in range(self.config.num_hidden_layers))

    # memory

    def read_bytes(self, tokens: float) -> float:
        """Bytes of weights that a device reads in a step with so many tokens on all devices: without experts that nobody chose."""
        config, layout = self.config, self.layout
        group = layout.expert_group
        slots = self._expert_slots * group
        in_group = tokens * group / layout.devices
        chosen = 1 - (1 - config.num_experts_per_tok / slots) ** in_group if slots else 0.0
        head = config.vocab_size * config.hidden_size / layout.tensor * self.format.head
        rows = 2 * memory_read(config, tokens / layout.data) / layout.tensor if config.memory_layers else 0.0
        return self._common_bytes + self._expert_bytes * chosen + head + rows

    @cached_property
    def weights(self) -> float:
        """Bytes of weights on a device. The input embedding is among them; a step reads a few rows of it."""
        matrix = self.config.vocab_size * self.config.hidden_size / self.layout.tensor
        tied = self.config.tie_word_embeddings and self.format.head == 2
        tables = 2 * self._table_scalars * (1 if self.config.memory_shared else len(self.config.memory_layers)) / self.layout.tensor
        return self._common_bytes + self._expert_bytes + matrix * (2 + (0 if tied else self.format.head)) + tables

    @cached_property
    def _expert_slots(self) -> float:
        """Routed experts of a layer on a device; a fraction where they are sliced."""
        experts, layout = self.config.n_routed_experts, self.layout
        return math.ceil(experts / layout.expert) if layout.expert > 1 else experts / layout.tensor

    @cached_property
    def _expert_bytes(self) -> float:
        width = 3 * self.config.hidden_size * self.config.moe_intermediate_size
        return self._moe_layers * self._expert_slots * width * self.format.matrix

    @property
    def _table_scalars(self) -> int:
        """Of one table of a memory layer, or of the one that all have in common."""
        return self.config.memory_rows * (self.config.memory_value_dim + self.config.memory_pre_value_dim)

    @cached_property
    def _common_bytes(self) -> float:
        """What every step reads whole, but for the head. MLA's projections into the latents are taken as sliced too: 8 % of attention."""
        config, moe = self.config, self._moe_layers
        layers = config.num_hidden_layers
        shared = swiglu_parameters(config, config.n_shared_experts * config.moe_intermediate_size) if config.n_shared_experts else 0
        dense = swiglu_parameters(config, config.intermediate_size)
        sliced = layers * attention_parameters(config) + moe * shared + (layers - moe) * dense
        if config.memory_layers:  # their queries, keys and projections
            sliced += len(config.memory_layers) * (memory_parameters(config) - (0 if config.memory_shared else self._table_scalars))
        routers = moe * (config.n_routed_experts * config.hidden_size + correction_biases(config))
        norms = (2 * layers + 1) * config.hidden_size
        return sliced / self.layout.tensor * self.format.matrix + 2 * (routers + norms)

    @cached_property
    def cache_per_token(self) -> float:
        """Bytes of cache of one token on a device that has it: key/value heads are sliced, MLA's latent is not."""
        slices = 1 if self.config.is_mla else min(self.layout.tensor, self.config.num_key_value_heads)
        return cache_bytes_per_token(self.config, self.cache_bytes) / slices

    def sequences(self, context: float) -> int:
        """How many sequences of this length the memory holds, on all devices; 0 where not one or not even the weights fit."""
        room = self.device.memory * USABLE - self.weights
        return max(0, math.floor(room / (context * self.cache_per_token))) * self.layout.data

    def crossover(self, context: float) -> float:
        """Sequences at once from which on a step reads more cache than weights; below, a token's cost falls as 1/batch."""
        per_sequence = context * self.cache_per_token / self.layout.data
        low, high = 0.0, self.weights / per_sequence
        while high - low > 1e-6 * high:  # weights read grow slower than the cache does, so they meet once
            middle = (low + high) / 2
            low, high = (middle, high) if self.read_bytes(middle) > middle * per_sequence else (low, middle)
        return high

    # time

    def decode(self, batch: int, context: float) -> Step:
        """A step that generates one token for each of `batch` sequences on all devices, `context` tokens long on average."""
        weights = self.read_bytes(batch)
        cache = batch / self.layout.data * context * self.cache_per_token
        base, slope = self._decode_flops
        flops = batch * (base + slope * context) / self.layout.devices
        return self._step(weights, cache, flops, batch, True, self._share(batch / self.layout.data))

    def _share(self, sequences: float) -> float:
        """Of decoding's roofline: between two measured batches on a line over their logarithms, beyond them as at the last."""
        if not self.decode_shares:
            return self.decode_share
        for (small, low), (large, high) in pairwise(self.decode_shares):
            if sequences < large:
                along = max(0.0, math.log(sequences / small) / math.log(large / small))
                return low + along * (high - low)
        return self.decode_shares[-1][1]

    @cached_property
    def _decode_flops(self) -> tuple[float, float]:
        """Of one token: without context, and for each token of it."""
        base = decode_flops(self.config, 0)
        return base, decode_flops(self.config, 1) - base

    def prefill(self, prompt: int, cached: int = 0) -> Step:
        """A step in which every copy of attention reads `chunk` prompt tokens, of as many prompts of this length as that is."""
        tokens = self.chunk * self.layout.data
        prompts = self.chunk / (prompt - cached)
        cache = prompts * prompt * self.cache_per_token
        flops = prompts * prefill_flops(self.config, prompt, cached) / self.layout.tensor
        return self._step(self.read_bytes(tokens), cache, flops, tokens, False, self.prefill_share)

    def _step(self, weights: float, cache: float, flops: float, tokens: int, direct: bool, share: float) -> Step:
        memory, compute = (weights + cache) / self.device.bandwidth, flops / self.device.peak[self.products]
        return Step(tokens, weights, cache, flops, memory, compute, self._exchange(tokens, direct), self._sums(tokens), share)

    def _sums(self, tokens: int) -> float:
        """Seconds of two ring all-reduces a layer, in bf16."""
        slices, config = self.layout.tensor, self.config
        if slices == 1:
            return 0.0
        assert self.device.link is not None
        sent = 2 * (slices - 1) / slices * tokens / self.layout.data * config.hidden_size * 2
        return 2 * config.num_hidden_layers * sent / self.device.link

    def _exchange(self, tokens: int, direct: bool) -> float:
        """Seconds in which tokens go to their experts and come back.

        `direct`: a token goes to every chosen expert by itself; otherwise once to each node that it may go to (node-limited
        routing), which hands it on.
        """
        config, group, node = self.config, self.layout.expert, self.device.per_node
        if group <= self.layout.tensor:
            return 0.0
        assert self._exchange_bandwidth is not None
        apart = group > node
        by_node = apart and not direct and config.n_group > 1
        copies = min(config.num_experts_per_tok, config.topk_group if by_node else config.num_experts_per_tok)
        away = 1 - (node if apart else 1) / group
        return self._moe_layers * exchange(tokens / self.layout.devices, copies * away, config.hidden_size, self._exchange_bandwidth)

    def problem(self, context: float) -> str:
        """Why it does not fit, in words and gigabytes."""
        weights, cache, usable = self.weights / 1e9, context * self.cache_per_token / 1e9, self.device.memory * USABLE / 1e9
        need = f"a device needs {weights:.1f} GB for weights and {cache:.2f} GB for one sequence's cache"
        return f"{self}: {need}, of {self.device.memory / 1e9:.0f} GB {usable:.1f} are usable"

    def __str__(self) -> str:
        return f"{self.layout.devices} x {self.device.name}, {self.format.name}, {self.layout}"

    def calibrated(self, profile: Profile) -> Deployment:
        """This deployment with the shares of a single device's roofline that were measured for this model and format, where they were.

        Of one batch, or one length of prompt, the last measurement counts.
        """
        alone = dataclasses.replace(self, layout=Layout())
        decoding, reading = {}, {}
        for entry in profile.of("decode", self.config):
            if (shape := entry.shape)["weights"] == self.format.name:
                decoding[shape["batch"]] = alone.decode(shape["batch"], shape["context"]).roofline / entry.rates["seconds"]
        for entry in profile.of("prefill", self.config):
            if (shape := entry.shape)["weights"] == self.format.name:
                chunk = dataclasses.replace(alone, chunk=shape["tokens"])
                step = chunk.prefill(shape["context"] + shape["tokens"], shape["context"])
                reading[shape["tokens"]] = step.roofline / entry.rates["seconds"]
        if not (decoding and reading):
            return self
        return dataclasses.replace(
            self, decode_shares=tuple(sorted(decoding.items())), prefill_share=statistics.median(reading.values()), measured=True
        )


def exchange(tokens: float, copies: float, hidden_size: int, bandwidth: float) -> float:
    """Seconds in which a device sends `tokens` to `copies` experts each and gets their answers back, in one layer.

    ISCA 2025 (arXiv 2505.09343), section 2.3.2: 32 tokens, 9 experts, 7,000 wide, 50 GB/s: 120.96 us.
    """
    return (DISPATCH + COMBINE) * tokens * copies * hidden_size / bandwidth


def attention_intensity(config: ModelConfig, queries: int = 1, cache_bytes: float = 2) -> float:
    """FLOPs of decoding's attention for every byte of cache that it reads; `queries` tokens of a sequence share a reading."""
    flops = decode_flops(config, 1) - decode_flops(config, 0)
    return flops * queries / cache_bytes_per_token(config, cache_bytes)
