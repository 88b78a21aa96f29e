"""What one stage of a run cost, beside what it was planned to cost.

A receipt holds totals since the stage began, not increments: a stage that resumes continues from its saved receipt and
records it again. Everything else (speed, utilisation, money) is derived, so it cannot disagree with the counts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Plan:
    """What was expected of a stage, in the receipt's units."""

    tokens: int
    flops: float
    seconds: float  # wall clock
    money: float
    memory: int | None = None  # peak bytes of one device; None where nobody planned it
    bound: bool = False  # the most that it can come to, not what is expected: nothing to be measured against, but for memory


AMOUNTS = ("tokens", "flops", "seconds", "money", "memory")  # what of a plan can be compared


@dataclass(kw_only=True)
class Receipt:
    """One stage of one run. Counts are totals over all devices; `seconds` is the wall clock spent working, pauses left out."""

    run_id: str  # unique; made with the run's folder
    run: str  # the name that people gave it; may repeat
    stage: str
    device: str
    device_count: int = 1
    tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    memory: int | None = None  # peak bytes of one device, over all attempts; None where nobody looked
    peak_flops: float | None = None  # measured, of one device
    price_per_hour: float = 0.0  # of one device, in the user's currency
    started: float = 0.0  # seconds since the epoch
    finished: float | None = None  # None while the stage runs
    planned: Plan | None = None

    @property
    def device_seconds(self) -> float:
        return self.seconds * self.device_count

    @property
    def device_hours(self) -> float:
        return self.device_seconds / 3600

    @property
    def money(self) -> float:
        return self.device_hours * self.price_per_hour

    @property
    def tokens_per_second(self) -> float:
        """Over all devices; 0 before any time was spent."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def tflops(self) -> float:
        """Model TFLOPS of one device; 0 before any time was spent."""
        return self.flops / self.device_seconds / 1e12 if self.seconds else 0.0

    @property
    def share_of_peak(self) -> float | None:
        """Model FLOPS utilisation, 0 to 1; None where no peak is known or no FLOPs are counted."""
        return self.tflops * 1e12 / self.peak_flops if self.peak_flops and self.flops else None

    def difference(self, name: str) -> float | None:
        """How much more than planned a field of the plan came to, as a share: 0.1 is a tenth more. None before the stage has ended, and
        where the plan is a bound. Memory is none: a process grows beyond what its longest step took."""
        if self.planned and self.planned.bound and name != "memory":
            return None
        planned, actual = getattr(self.planned, name, None), getattr(self, name)
        return actual / planned - 1 if self.finished is not None and planned and actual is not None else None

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON; `planned` is a dict or None."""
        return dataclasses.asdict(self)

    def describe(self) -> dict[str, Any]:
        """The fields, and all that is derived from them: a line of a report."""
        derived = ("device_hours", "tokens_per_second", "tflops", "share_of_peak", "money")
        values = self.to_dict() | {name: getattr(self, name) for name in derived}
        return values | ({"difference": {name: self.difference(name) for name in AMOUNTS}} if self.planned else {})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Receipt:
        """The inverse of `to_dict`. Raises ValueError for a field that is unknown or missing."""
        planned = values.get("planned")
        try:
            return cls(**{**values, "planned": Plan(**planned) if planned else None})
        except TypeError as error:
            raise ValueError(f"receipt: {error}") from error


@dataclass(frozen=True)
class Totals:
    """Sums over receipts."""

    stages: int
    tokens: int
    flops: float
    seconds: float
    device_hours: float
    money: float


def total(receipts: Iterable[Receipt]) -> Totals:
    """Sums over receipts; `money` adds prices as given, so it has a meaning only in one currency."""
    rows = list(receipts)
    return Totals(
        stages=len(rows),
        tokens=sum(r.tokens for r in rows),
        flops=sum(r.flops for r in rows),
        seconds=sum(r.seconds for r in rows),
        device_hours=sum(r.device_hours for r in rows),
        money=sum(r.money for r in rows),
    )


def render(receipts: Iterable[Receipt]) -> Table:
    """A table for a terminal: one line a stage, dimmed below it its plan and how far off that was, where there is one, and a total.

    A run or device that all lines share stands in the title, which keeps the table of one run within 80 columns; device-hours are
    there where a line has several devices.
    """
    from rich import box
    from rich.table import Table

    rows = list(receipts)
    names = {"run": [r.run for r in rows], "stage": [r.stage for r in rows], "device": [_device(r) for r in rows]}
    shared = {key for key, values in names.items() if key != "stage" and len(set(values)) == 1}
    title = " on ".join(values[0] for key, values in names.items() if key in shared)
    text_columns = [key for key in names if key not in shared]
    hours = ["hours"] if any(r.device_count > 1 for r in rows) else []
    heads = ["tokens", "time", "FLOPs", "memory", "tokens/s", "of peak", *hours, "money"]
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_footer=bool(rows), pad_edge=False, collapse_padding=True)

    def numbers(part: Receipt | Plan | Totals, memory: int | None, device_hours: float, rates: Sequence[str] = ("", "")) -> list[str]:
        flops = format_flops(part.flops).removesuffix("FLOP")  # the column's head says so
        cells = [format_count(part.tokens), format_seconds(part.seconds), flops, "-" if memory is None else format_bytes(memory), *rates]
        return [*cells, *([format_amount(device_hours)] if hours else []), f"${format_amount(part.money)}"]

    totals = total(rows)
    footers = numbers(totals, max((r.memory for r in rows if r.memory is not None), default=None), totals.device_hours)
    for key in text_columns:
        table.add_column(key, footer="total" if key == text_columns[0] else "", no_wrap=key == "stage")
    for head, footer in zip(heads, footers):
        table.add_column(head, footer=footer, justify="right", no_wrap=True)
    for i, r in enumerate(rows):
        rates = f"{r.tokens_per_second:,.0f}", "-" if r.share_of_peak is None else f"{r.share_of_peak:.1%}"
        table.add_row(*(names[key][i] for key in text_columns), *numbers(r, r.memory, r.device_hours, rates))
        if plan := r.planned:
            cells = numbers(plan, plan.memory, plan.seconds * r.device_count / 3600)
            word = "at most" if plan.bound else "planned"
            cells[3] = f"~{cells[3]}" if plan.bound and plan.memory is not None else cells[3]
            table.add_row(*(word if key == "stage" else "" for key in text_columns), *cells, style="dim")
            fields = {"tokens": "tokens", "time": "seconds", "FLOPs": "flops", "memory": "memory", "money": "money"}
            shares = [r.difference(fields[head]) if head in fields else None for head in heads]
            if any(off := ["" if share is None else format_difference(share) for share in shares]):
                table.add_row(*("off by" if key == "stage" else "" for key in text_columns), *off, style="dim")
    return table


def _device(receipt: Receipt) -> str:
    return receipt.device if receipt.device_count == 1 else f"{receipt.device_count:,} x {receipt.device}"


def format_difference(share: float) -> str:
    """How much more or less than planned: +3.1%, -0.4%, +120%."""
    return f"{round(share, 3) + 0.0:+.1%}" if abs(share) < 1 else f"{share:+.0%}"  # + 0.0: no -0.0%


def format_amount(amount: float) -> str:
    """Money or hours: two decimals; four, or six, where fewer would hide most of it."""
    return f"{amount:,.{6 if abs(amount) < 1e-4 else 4}f}" if 0 < abs(amount) < 1 else f"{amount:,.2f}"


def format_count(count: int) -> str:
    """A count in three digits: 812, 98.3K, 2.05M, 671B, 14.8T."""
    for exponent, prefix in ((12, "T"), (9, "B"), (6, "M"), (3, "K")):
        if (scaled := count / 10**exponent) >= 1:
            return f"{scaled:.{2 if scaled < 10 else 1 if scaled < 100 else 0}f}{prefix}"
    return str(count)


def format_bytes(count: float) -> str:
    """Memory in its binary unit: 812 B, 5.83 GiB."""
    for exponent, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if (scaled := count / 2**exponent) >= 1:
            return f"{scaled:.{2 if scaled < 10 else 1 if scaled < 100 else 0}f} {unit}"
    return f"{count:.0f} B"


def format_seconds(seconds: float) -> str:
    """A duration in its two largest units: 4.2s, 3m 05s, 2h 07m, 54d 05h."""
    if seconds < 59.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02}s"
    if whole < 86400:
        return f"{whole // 3600}h {whole % 3600 // 60:02}m"
    return f"{whole // 86400:,}d {whole % 86400 // 3600:02}h"


def format_flops(flops: float) -> str:
    """A count of FLOPs with its prefix, such as 3.71 YFLOP."""
    for exponent, prefix in ((24, "Y"), (21, "Z"), (18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M")):
        if flops >= 10**exponent:
            return f"{flops / 10**exponent:,.2f} {prefix}FLOP"
    return f"{flops:,.0f} FLOP"
