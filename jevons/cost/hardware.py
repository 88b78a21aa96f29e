"""What devices can do and what they rent for: a dated table, and clusters of them by name.

    hardware = Hardware.load(extra)                    the table that comes with Jevons (hardware.toml), and a file of the user's own
    hardware.device("NVIDIA H100 80GB HBM3")           by the name that a driver reports, or that people type: h100, 4090
    parse_cluster("8xH100", hardware)                  eight of them
    this_machine(hardware)                             what a plan is for where nobody says

Data sheets are only what a plan begins with. A CPU, a laptop or a clocked-down card reaches less, so a run measures its own peak and
`jevons plan --calibrate` everything else. Sparsity is never counted. Not done: prices by region or term, devices of other kinds
in one cluster.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from jevons.kernels import processor

CORES = 2  # that the table's CPU has
DRIVER = Path("/proc/driver/nvidia/gpus")  # a folder for each card; what asks no program and loads no library
GB, TERA = 1e9, 1e12


@dataclass(frozen=True)
class Device:
    """One device: bytes, bytes/s, FLOPS by format, dollars an hour. None where nothing is known."""

    name: str
    memory: float
    bandwidth: float
    peak: dict[str, float]  # dense products, by the format of both factors: bf16, and where known fp32 and fp8
    link: float | None  # to the others of its node, in one direction
    network: float | None  # to other nodes, in one direction, for each device
    on_demand: float | None
    spot: float | None
    source: str
    valid_from: date
    per_node: int = 8

    def __str__(self) -> str:
        return self.name


class _Row(BaseModel):
    """A device as the file has it: GB, GB/s, TFLOPS."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str = Field(min_length=1)
    memory: float = Field(gt=0)
    bandwidth: float = Field(gt=0)
    bf16: float = Field(gt=0)
    fp32: float | None = Field(None, gt=0)
    fp8: float | None = Field(None, gt=0)
    link: float | None = Field(None, gt=0)
    network: float | None = Field(None, gt=0)
    on_demand: float | None = Field(None, ge=0)
    spot: float | None = Field(None, ge=0)
    per_node: int = Field(8, ge=1)
    source: str
    valid_from: date

    def device(self) -> Device:
        rates = {name: rate for name in ("bf16", "fp32", "fp8") if (rate := getattr(self, name)) is not None}
        link, network = (None if rate is None else rate * GB for rate in (self.link, self.network))
        return Device(
            name=self.name,
            memory=self.memory * GB,
            bandwidth=self.bandwidth * GB,
            peak={name: rate * TERA for name, rate in rates.items()},
            link=link,
            network=network,
            on_demand=self.on_demand,
            spot=self.spot,
            source=self.source,
            valid_from=self.valid_from,
            per_node=self.per_node,
        )


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    device: tuple[_Row, ...] = ()


class Hardware:
    """All devices, each as it stands today."""

    def __init__(self, devices: Iterable[Device], today: date | None = None) -> None:
        """Of several entries with one name the newest that has begun counts, of the same date the later; one for the future does not."""
        self.devices: dict[str, Device] = {}
        for device in devices:
            before = self.devices.get(device.name)
            begun = device.valid_from <= (today or date.today())
            if before is None or (begun and device.valid_from >= before.valid_from):
                self.devices[device.name] = device

    @classmethod
    def load(cls, extra: Path | None = None, today: date | None = None) -> Hardware:
        """The table of Jevons with `extra` over it. Raises ValueError with the file and the key."""
        files = [Path(__file__).with_name("hardware.toml"), *([extra] if extra else [])]
        return cls([row.device() for file in files for row in _read(file).device], today)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.devices)

    def find(self, name: str) -> Device | None:
        """A device by its name as a driver reports it, or by words of its own name; None for an unknown one.

        The most exact of the table's names whose words all stand in `name` wins: an H100 PCIe is no H100.
        """
        words = _words(name)
        held = [d for d in self.devices.values() if _words(d.name) <= words]
        if held:
            return max(held, key=lambda d: len(_words(d.name)))
        meant = [d for d in self.devices.values() if words and words <= _words(d.name)]
        return meant[0] if len(meant) == 1 else None

    def device(self, name: str) -> Device:
        """As `find`. Raises ValueError with the nearest name for an unknown one."""
        if (found := self.find(name)) is not None:
            return found
        lower = {known.lower(): known for known in self.names}
        near = difflib.get_close_matches(name.lower(), lower, n=1)
        hint = f"did you mean {lower[near[0]]}?" if near else f"there are {', '.join(self.names)}"
        raise ValueError(f"no device {name!r}; {hint} (others go into a file of your own, --hardware FILE)")


@dataclass(frozen=True)
class Cluster:
    """So many devices of one kind."""

    device: Device
    count: int = 1

    def __str__(self) -> str:
        return f"{self.count}x{self.device}" if self.count > 1 else self.device.name

    @property
    def memory(self) -> float:
        """Bytes, of all of them."""
        return self.count * self.device.memory

    @property
    def nodes(self) -> int:
        return -(-self.count // self.device.per_node)


def parse_cluster(text: str, hardware: Hardware) -> Cluster:
    """"8xH100", or one device by its name. Raises ValueError for what is neither."""
    match = re.fullmatch(r"\s*(?:(\d+)\s*[xX*]\s*)?([A-Za-z0-9][\w .()-]*?)\s*", text)
    if not match or (hardware.find(match[2]) is None and re.search(r"[xX*]\s*\d+$", match[2])):
        raise ValueError(f"devices are written 8xH100, number first, or H100 for one, not {text!r}")
    count = 1 if match[1] is None else int(match[1])
    if not count:
        raise ValueError(f"{text!r} is not at least one device")
    return Cluster(hardware.device(match[2]), count)


def this_machine(hardware: Hardware) -> Cluster:
    """The NVIDIA cards that the driver shows, else the processor: the table's CPU with this machine's cores, memory and name."""
    cards = [_card(folder) for folder in sorted(DRIVER.glob("*/information"))]
    known = [device for card in cards if (device := hardware.find(card)) is not None]
    if known:
        return Cluster(known[0], sum(device == known[0] for device in known))
    cpu, cores = hardware.device("CPU"), os.cpu_count() or CORES
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    peak = {name: rate * cores / CORES for name, rate in cpu.peak.items()}
    if not processor.multiplies_bf16():
        peak["bf16"] = peak["fp32"]  # it trains in fp32 then
    return Cluster(replace(cpu, name=f"CPU {processor.name()}, {cores} cores", memory=float(memory), peak=peak))


def peak_flops(device: str) -> float | None:
    """Data-sheet peak in bf16 FLOPS of one device, found by its name as the driver reports it; None for an unknown device."""
    found = Hardware.load().find(device)
    return found.peak["bf16"] if found else None


def _words(name: str) -> set[str]:
    """Of a name as people and drivers write it, in lower case: RTX4090 is two words, like RTX 4090."""
    return set(re.findall(r"[a-z0-9]+", re.sub(r"\b(rtx|gtx)(?=\d)", r"\1 ", name.lower())))


def _card(information: Path) -> str:
    lines = information.read_text(encoding="utf-8").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("Model")), "")


def _read(path: Path) -> _Table:
    try:
        return _Table.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not TOML: {error}") from error
    except ValidationError as error:
        problems = "".join(f"\n  {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ValueError(f"{path}:{problems}") from error
