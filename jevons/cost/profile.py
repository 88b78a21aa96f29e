"""What was measured on a device, kept in runs/calibration.json, so that a plan can stand on it instead of on a data sheet.

`jevons plan RECIPE --calibrate` (stages/calibrate.py) writes it, the planner and the stages' own plans read it, without torch. A file
holds a profile a device, and a profile an entry for every shape that was measured, so several recipes' calibrations live side by side.
What no longer holds is not used, and said: another processor, torch, number of threads or shape. Lists of entries grow by what is
measured; an entry measured again replaces the one before it.

    kind      shape (what must be equal, beside the model)       rates (what was measured; seconds are wall clock)
    train     the section's options but how often, the data      start, step, validation, sample, checkpoint, finish, memory
    sft       the section's options but how many and how often   start, step, sample, checkpoint, finish, memory; tokenise and validation
                                                                 (of a chat each); documents, kept (their share), length (tokens of a chat)
    rl        the section's options but how often                start, held_out, sample, checkpoint, finish, memory; groups, silent (how
                                                                 many were sampled, agreed); rollout, grading, drawn, read (of a group),
                                                                 training, trained (of one that is trained on), update (of a step that
                                                                 trains); prompt, answer (tokens)
    evaluate  the section's options, tasks, length of text       start, text, memory; answers, grading, drawn, read (of all tasks); prompt,
                                                                 answer (tokens of one); untrained (0 or 1)
    serve     weights, dtype, cache_gb, clients, prompt, output  start, wave (a request of every client), requests, memory, cache and scalar
                                                                 (bytes)
    prefill   weights, tokens (of the chunk), context            seconds
    decode    weights, batch, context                            seconds

stages/calibrate.py writes them; stages/forecast.py (no torch either) makes plans of stages from all but the last two, for `jevons plan` and
for a stage that begins, and cost/deployment.py plans of serving from those.
`memory` is the highest resident memory of the process (on a GPU: of the device) in bytes. Not done: drift over days, other load on the
machine: a calibration says what the device did while it was made.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from jevons.data.disk import write_json
from jevons.kernels import processor
from jevons.model.config import ModelConfig

FILE = "calibration.json"
KINDS = ("train", "sft", "rl", "evaluate", "serve", "prefill", "decode")
Shape = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """One thing measured: `rates` of a model at a `shape`."""

    kind: str
    model: str
    shape: Shape
    rates: dict[str, float]
    measured: str  # date and time

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"calibration: unknown kind {self.kind!r}; known: {', '.join(KINDS)}")


@dataclass(frozen=True)
class Profile:
    """A device as it was measured. FLOPS and bytes/s are what large products and large reads reached, not a data sheet's."""

    device: str  # as train/device.py describes it
    processor: str  # of the machine, which needs no torch to know
    torch: str  # version
    threads: int  # that the environment asked for; 0: torch chose how many, which `device` has in its name
    measured: str
    peak_flops: dict[str, float] = dataclasses.field(default_factory=dict)  # by dtype: "bfloat16", "float32"
    bandwidth: float = 0.0  # bytes/s of memory
    base_memory: int = 0  # bytes of a process that has loaded Jevons and torch and nothing else
    entries: tuple[Entry, ...] = ()

    @classmethod
    def load(cls, root: Path, device: str | None = None) -> Profile | None:
        """The newest profile of this machine in root/calibration.json that still holds, or that of `device`; None where there is none."""
        held = [p for p in profiles(root) if not p.stale() and (p.device == device or (device is None and not p.other_threads()))]
        return max(held, key=lambda p: p.measured, default=None)

    def stale(self) -> str:
        """Why this profile does not hold here any more; empty where it does."""
        if self.processor != processor.name():
            return f"{self.device} was measured beside another processor ({self.processor})"
        if self.torch != torch_version():
            return f"{self.device} was measured with torch {self.torch}, here is {torch_version()}"
        return ""

    def other_threads(self) -> str:
        """Why it does not hold for the threads that this process's torch would have, were it loaded; empty where it does."""
        asked = processor.threads()
        if not self.device.startswith("CPU") or asked == self.threads or self.device.endswith(f", {asked} threads"):
            return ""
        here, there = (f"OMP_NUM_THREADS={n}" if n else "no OMP_NUM_THREADS" for n in (asked, self.threads))
        return f"{self.device} was measured with {there}, here is {here}"

    def find(self, kind: str, model: ModelConfig | str, **shape: Any) -> Entry | None:
        """What was measured of a model at a shape that agrees with `shape` in every key given."""
        return next((e for e in self.of(kind, model) if all(e.shape.get(key) == value for key, value in shape.items())), None)

    def of(self, kind: str, model: ModelConfig | str) -> list[Entry]:
        """Everything of one kind that was measured of a model."""
        name = model if isinstance(model, str) else signature(model)
        return [e for e in self.entries if (e.kind, e.model) == (kind, name)]

    def missing(self, kind: str, model: ModelConfig | str, **shape: Any) -> str:
        """Why `find` has nothing, in words: never measured, or at which other shape."""
        if not (found := self.of(kind, model)):
            return f"{kind}: this model was not measured on {self.device}"
        near = max(found, key=lambda e: sum(e.shape.get(key) == value for key, value in shape.items()))
        was, now = _flat(near.shape), _flat(shape)
        other = [f"{key} {was.get(key)}, not {value}" for key, value in now.items() if was.get(key) != value]
        return f"{kind}: measured with {', '.join(other)}"

    def add(self, *entries: Entry) -> Profile:
        """With these; one of the same kind, model and shape is replaced."""
        new = {(e.kind, e.model, json.dumps(e.shape, sort_keys=True)): e for e in (*self.entries, *entries)}
        return dataclasses.replace(self, entries=tuple(new.values()))

    def save(self, root: Path) -> None:
        """Write it to root/calibration.json in place of this device's, other devices' profiles kept. Atomic."""
        others = [p for p in profiles(root) if p.device != self.device]
        root.mkdir(parents=True, exist_ok=True)
        write_json(root / FILE, {"profiles": [dataclasses.asdict(p) for p in (*others, self)]})


def refused(root: Path) -> str:
    """Why the newest profile of root/calibration.json does not hold here; empty where one does, or there is none."""
    if Profile.load(root) is not None or not (found := profiles(root)):
        return ""
    newest = max(found, key=lambda p: p.measured)
    return newest.stale() or newest.other_threads()


def profiles(root: Path) -> list[Profile]:
    """All of root/calibration.json, those that no longer hold too; none where there is no file. ValueError for another file."""
    path = root / FILE
    if not path.exists():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["profiles"]
        return [Profile(**{**p, "entries": tuple(Entry(**e) for e in p["entries"])}) for p in found]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a calibration of this version ({error}); delete it and calibrate again") from error


def _flat(shape: Shape) -> Shape:
    """With the keys of what it nests: data.sources."""
    nested = {key: {f"{key}.{name}": v for name, v in value.items()} for key, value in shape.items() if isinstance(value, dict)}
    return {name: v for key, value in shape.items() for name, v in nested.get(key, {key: value}).items()}


def signature(config: ModelConfig) -> str:
    """A model's name in a profile: what its arithmetic depends on. Ids of special tokens and the weights' values are not part of it."""
    fields = {k: v for k, v in dataclasses.asdict(config).items() if not k.endswith("_token_id") and k != "initializer_range"}
    digest = hashlib.blake2b(json.dumps(fields, sort_keys=True, default=str).encode(), digest_size=6).hexdigest()
    return f"{config.model_type}-{digest}"


def torch_version() -> str:
    """Of the torch that is installed, without loading it."""
    try:
        return version("torch")
    except PackageNotFoundError:
        return ""
