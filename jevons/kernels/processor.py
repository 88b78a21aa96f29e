"""What this machine's processor is called and what it can do, as Linux tells. Without torch: the planner asks, too.

Elsewhere than under Linux the name is Python's and nothing is known of its abilities, so none is assumed.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path

INFORMATION = Path("/proc/cpuinfo")


def name() -> str:
    """As people know it."""
    return _field("model name") or platform.processor() or platform.machine()


def flags() -> list[str] | None:
    """What an x86-64 processor under Linux can do; None for any other."""
    found = _field("flags")
    return found.split() if found else None


def multiplies_bf16() -> bool:
    """Whether it has products in bf16. One without takes up to sixty times as long for them as for products in fp32."""
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & {*(_field("flags") or _field("Features") or "").split()})  # the latter on ARM


def threads() -> int:
    """How many the environment asks torch to compute with; 0: it chooses."""
    asked = (os.environ.get(name, "").partition(",")[0].strip() for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"))
    return next((int(text) for text in asked if text.isdigit()), 0)


def _field(key: str) -> str:
    """Of the first core."""
    if not INFORMATION.exists():
        return ""
    lines = (line.partition(":") for line in INFORMATION.read_text(encoding="utf-8").splitlines())
    return next((value.strip() for name, _, value in lines if name.strip() == key), "")
