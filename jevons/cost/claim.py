"""A headline number with its source, computed again: what was published, what comes out here, and what to make of it.

Problem: the story of cheap models is told in numbers that are true, true of something else, or nobody's to check. Approach: each
number is a function (cost/claim_*.py; cost/story.py has them all) that computes it from configurations, prices and published
measurements, with the same arithmetic that plans and receipts use. What is written down by hand are the published figures,
their sources, the verdict and the reason; the figure of our own and those in notes and tables are results. A verdict has to stand: a
confirmed number that stops agreeing, or a wrong one that starts to, is an error of `jevons claims` and of the tests.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Verdict = Literal["confirmed", "with a caveat", "wrong comparison", "not verifiable", "measured", "not yet measured"]


Figure = float | tuple[float, float]


@dataclass(frozen=True)
class Table:
    """Figures behind a claim, ready to print; the first column names the row."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.columns) for row in self.rows), self.title


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One number of the story. `published` and `ours` are in `unit`'s own scale (671e9 parameters, 93.3 %), None where there is none.

    Where only `published` is a pair it is a range that ours has to lie in; where both are, each has to agree.
    """

    name: str
    statement: str
    source: tuple[str, ...]
    method: str
    published: Figure | None
    ours: Figure | None
    unit: str = ""
    tolerance: float = 0.01  # relative
    bound: bool = False  # ours is the most that physics allows, not an estimate
    verdict: Verdict
    note: str
    tables: tuple[Table, ...] = ()

    @property
    def command(self) -> str:
        """What computes this claim alone."""
        return f"jevons claims {self.name}"

    @property
    def agrees(self) -> bool | None:
        """Whether the published figure is ours (or below, if ours is a bound), within the tolerance; None where one is missing."""
        if self.published is None or self.ours is None:
            return None
        low, high = self.published if isinstance(self.published, tuple) else (self.published, self.published)
        if isinstance(self.ours, tuple):
            return all(abs(ours / theirs - 1) <= self.tolerance for ours, theirs in zip(self.ours, (low, high)))
        if self.bound:
            return high <= self.ours * (1 + self.tolerance)
        return low * (1 - self.tolerance) <= self.ours <= high * (1 + self.tolerance)

    @property
    def stands(self) -> bool:
        """Whether the verdict still follows from the figures."""
        match self.verdict:
            case "confirmed":
                return self.agrees is True
            case "with a caveat":
                return self.agrees is not False and self.ours is not None
            case "wrong comparison":
                return self.agrees is False
            case "not verifiable":
                return True
        return (self.ours is not None) == (self.verdict == "measured")


def cite(name: str, place: str = "") -> str:
    """A source of sources.toml, and where in it."""
    sources = tomllib.loads(Path(__file__).with_name("sources.toml").read_text(encoding="utf-8"))
    return f"{sources[name]}{', ' if place else ''}{place}"


def show(value: Figure | None, unit: str) -> str:
    """A figure in few digits with its unit: 671B, $5.576M, 93.3 %, 200x, 70.27 KB, 250.5 GFLOP; a dash where there is none."""
    if value is None:
        return "-"
    if isinstance(value, tuple):
        return f"{show(value[0], unit).removesuffix(unit).rstrip()} to {show(value[1], unit)}"
    if unit in ("%", "x"):
        return f"{value:.3g}{' ' * (unit == '%')}{unit}"
    if unit == "$" and value < 1e5:
        return f"${value:,.0f}" if value >= 1000 else f"${value:.3g}"
    symbol = unit.partition("/")[0] in ("B", "FLOP", "FLOPS")
    prefixes = ("", *("KMGTPEZY" if symbol else "KMBT"))
    step = min(int(f"{value:e}".partition("e")[2]) // 3, len(prefixes) - 1) if value >= 1000 else 0
    number, prefix = f"{value / 1000**step:.4g}", prefixes[step]
    if unit == "$":
        return f"${number}{prefix}"
    return f"{number} {prefix}{unit}" if symbol else f"{number}{prefix}{'' if unit.startswith('/') else ' '}{unit}".strip()


def percent(share: float) -> str:
    """A share of one, as a percentage."""
    return show(100 * share, "%")
