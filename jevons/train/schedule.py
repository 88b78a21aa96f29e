"""Learning rates over a run, as a list of phases.

Warm-up, constant, cosine and warm-up-stable-decay are all the same thing: phases of a given length, each going from one
value to another along a line or a half cosine. The unit of length is the caller's (steps here; tokens for DeepSeek-V3's
published schedule, which a test reproduces).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Phase:
    """`length` units from `start` to `end`; past its end a schedule keeps its last phase's end."""

    length: float
    start: float
    end: float
    shape: Literal["linear", "cosine"] = "linear"

    def at(self, position: float) -> float:
        share = min(position / self.length, 1.0)
        if self.shape == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        return self.start + (self.end - self.start) * share


@dataclass(frozen=True)
class Schedule:
    phases: tuple[Phase, ...]

    def at(self, position: float) -> float:
        """The learning rate at `position`, 0 being the first step."""
        for phase in self.phases:
            if position < phase.length:
                return phase.at(position)
            position -= phase.length
        return self.phases[-1].end


def build(kind: Literal["constant", "cosine", "wsd"], *, peak: float, steps: int, warmup: int, minimum: float, decay: int) -> Schedule:
    """The schedule of a stage. `minimum` is the final rate; `decay` the length of wsd's last phase, which falls linearly.

    The warm-up reaches the peak at step `warmup` and starts at peak / warmup, not at 0: a step of rate 0 would be wasted.
    """
    if warmup >= steps and kind != "constant":
        raise ValueError(f"warmup_steps: {warmup} must be less than steps {steps}")
    rise = (Phase(warmup, peak / (warmup + 1), peak),) if warmup else ()
    rest = steps - warmup
    if kind == "constant":
        return Schedule((*rise, Phase(max(rest, 1), peak, peak)))
    if kind == "cosine":
        return Schedule((*rise, Phase(rest, peak, minimum, "cosine")))
    if not 0 < decay <= rest:
        raise ValueError(f"decay_steps: must be between 1 and steps - warmup_steps = {rest} for wsd, is {decay}")
    stable = (Phase(rest - decay, peak, peak),) if rest > decay else ()
    return Schedule((*rise, *stable, Phase(decay, peak, minimum)))
