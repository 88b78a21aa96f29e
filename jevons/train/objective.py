"""The numbers of a policy-gradient loss, which `train/policy.py` explains and computes.

Apart from it so that a recipe is checked as it is read, before it costs anything, and without torch; so the fields have the recipe's names.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

CLIP = {"grpo": (0.2, 0.2), "gspo": (3e-4, 4e-4), "cispo": (math.inf, 4.0), "mirror": (math.inf, math.inf)}  # what None stands for
TAU = 0.1


@dataclass(frozen=True)
class Objective:
    """The numbers of the losses of train/policy.py. A ratio is clipped to [1 - clip_low, 1 + clip_high]; None: as the kind's papers do.

    Raises ValueError, naming the field, for numbers that contradict each other or that the kind has no use for.
    """

    kind: Literal["grpo", "gspo", "cispo", "mirror"] = "grpo"
    clip_low: float | None = None
    clip_high: float | None = None
    two_sided: float | None = None
    kl_weight: float = 0.0
    kl: Literal["k3", "unbiased"] = "k3"
    importance_cap: float | None = None
    importance_mode: Literal["truncate", "mask"] = "truncate"
    sequence_mask: float | None = None
    tau: float = TAU

    def __post_init__(self) -> None:
        unused = {"cispo": ("clip_low", "two_sided"), "mirror": ("clip_low", "clip_high", "two_sided", "importance_cap")}
        for name in unused.get(self.kind, ()):
            if getattr(self, name) is not None:
                raise ValueError(f"{name}: has no meaning for {self.kind}, leave it out")
        for name in ("clip_low", "clip_high", "sequence_mask", "tau"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"{name}: must be above 0, is {value}")
        if self.two_sided is not None and self.two_sided <= self.bounds[1]:
            raise ValueError(f"two_sided: must be above 1 + clip_high = {self.bounds[1]}, is {self.two_sided}")
        if self.importance_cap is not None and self.importance_cap < 1:
            raise ValueError(f"importance_cap: must be at least 1, is {self.importance_cap}")
        if self.importance_mode != "truncate" and self.importance_cap is None:
            raise ValueError(f"importance_mode: {self.importance_mode!r} needs importance_cap, such as 2.0")
        if self.kl != "k3" and not self.kl_weight:
            raise ValueError(f"kl: {self.kl!r} needs kl_weight, such as 0.001")
        if self.tau != TAU and self.kind != "mirror":
            raise ValueError(f"tau: only mirror has it, the loss is {self.kind}")

    @property
    def bounds(self) -> tuple[float, float]:
        """Between which ratios count as they are."""
        low, high = (given if given is not None else usual for given, usual in zip((self.clip_low, self.clip_high), CLIP[self.kind]))
        return 1 - low, 1 + high


PRESETS = {
    "r1": Objective(clip_low=10, clip_high=10, kl_weight=1e-3),  # stage 1: a lower clip cut the gradient of too many tokens, so not 0.2
    "dapo": Objective(clip_low=0.2, clip_high=0.28),
    "gspo": Objective("gspo", clip_low=3e-4, clip_high=4e-4),
    "scalerl": Objective("cispo", clip_high=4),  # the ratio at most 5
    "intellect-2": Objective(clip_low=0.2, clip_high=0.2, two_sided=4),
    "v3.2": Objective(kl="unbiased", kl_weight=1e-3, sequence_mask=0.5),  # its own two numbers are not published; 0.5 is TRL's
}
