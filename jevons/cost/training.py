"""How long training takes and what it costs, from its FLOPs and the share of a device's peak that it reaches.

    hours = tokens x FLOPs a token / (share x peak x 3600)          of one device; of n of them the n-th part

The identity behind DeepSeek-V3's published figures: 14.8T tokens x 250 GFLOP at 38.9 % of an H800's 989.5 TFLOPS are 2.67 million hours.
A share is either measured (`jevons plan --calibrate`), or published with the model, or the default here, and a plan says which.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from jevons.cost.arithmetic import multiply_flops, train_flops
from jevons.cost.hardware import Cluster
from jevons.cost.memory import Memory, adapter_parameters
from jevons.model.config import ModelConfig

SHARE_GPU = 0.20  # between DeepSeek-V3's 39 % on 2,048 devices and the 10 % that small models reach in plain PyTorch
SHARE_CPU = 0.25  # recipes/text.toml on two cores: 3,900 tokens/s x 62 MFLOP of 0.9 TFLOPS, docs/LOG.md


def training_hours(flops: float, peak: float, share: float, devices: int = 1) -> float:
    """Wall-clock hours of this many FLOPs on devices of `peak` FLOPS each, of which `share` (0 to 1) is reached."""
    if not 0 < share <= 1:
        raise ValueError(f"share: must be above 0 and at most 1 (of peak), is {share}")
    return flops / (share * peak * devices) / 3600


def default_share(cluster: Cluster) -> float:
    """Of peak, where nothing was measured or stated."""
    return SHARE_CPU if cluster.device.name.startswith("CPU") else SHARE_GPU


def adapter_flops(config: ModelConfig, sequence_length: float, rank: int, targets: Iterable[str], *, mtp: bool = False) -> float:
    """Training FLOPs of a token under adapters: frozen weights get no gradient, a third of their FLOPs, and the adapters add theirs."""
    added = 6 * adapter_parameters(config, rank, targets, active=True)
    return train_flops(config, sequence_length, mtp=mtp) - multiply_flops(config) + added


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """What one stage is expected to take on a cluster."""

    stage: str
    on: Cluster
    tokens: float = 0.0
    flops: float = 0.0
    seconds: float  # wall clock
    basis: str  # what the time stands on: measured, stated, a default
    parts: dict[str, float] = field(default_factory=dict)  # seconds of each, where a stage has several
    memory: Memory | None = None  # at its highest, of one device, as counted
    measured_memory: float | None = None  # bytes, where a calibration says it

    @property
    def memory_needed(self) -> float | None:
        """Bytes of one device: measured, else counted; None where neither is known."""
        return self.measured_memory or (self.memory.total if self.memory else None)

    @property
    def hours(self) -> float:
        return self.seconds / 3600

    @property
    def device_hours(self) -> float:
        return self.hours * self.on.count

    @property
    def tokens_per_second(self) -> float:
        """Over all devices."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def share(self) -> float:
        """Of the devices' bf16 peak."""
        return self.flops / (self.seconds * self.on.count * self.on.device.peak["bf16"]) if self.seconds else 0.0

    def money(self, *, spot: bool = False) -> float | None:
        """Dollars, on demand or spot; None where the device has no such price."""
        rate = self.on.device.spot if spot else self.on.device.on_demand
        return None if rate is None else self.device_hours * rate
