"""What one stage of a run cost, beside what it was planned to cost.

A receipt holds totals since the stage began, not increments: a stage that resumes continues from its saved receipt and
records it again. Everything else (speed, utilisation, money) is derived, so it cannot disagree with the counts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
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
        """Model FLOPS utilisation, 0 to 1; None where no peak is known."""
        return self.tflops * 1e12 / self.peak_flops if self.peak_flops else None

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON; `planned` is a dict or None."""
        return dataclasses.asdict(self)

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
    """A table for a terminal: one line a stage, its plan (where there is one) dimmed below it, and a total.

    TFLOPS are one device's, hours are device-hours. A run or device that all lines share stands in the title, which keeps
    the table of one run within 80 columns.
    """
    from rich import box
    from rich.table import Table

    rows = list(receipts)
    names = {"run": [r.run for r in rows], "stage": [r.stage for r in rows], "device": [_device(r) for r in rows]}
    shared = {key for key, values in names.items() if key != "stage" and len(set(values)) == 1}
    title = " on ".join(values[0] for key, values in names.items() if key in shared)
    text_columns = [key for key in names if key not in shared]
    totals = total(rows)
    footers = {
        "tokens": format_count(totals.tokens),
        "time": format_seconds(totals.seconds),
        "FLOPs": format_flops(totals.flops).removesuffix("FLOP"),
        "tokens/s": "",
        "TFLOPS": "",
        "of peak": "",
        "hours": format_amount(totals.device_hours),
        "money": format_amount(totals.money),
    }
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_footer=bool(rows), pad_edge=False, collapse_padding=True)
    for key in text_columns:
        table.add_column(key, footer="total" if key == text_columns[0] else "", no_wrap=key == "stage")
    for key, footer in footers.items():
        table.add_column(key, footer=footer, justify="right", no_wrap=True)
    for i, r in enumerate(rows):
        share = "-" if r.share_of_peak is None else f"{r.share_of_peak:.1%}"
        table.add_row(
            *(names[key][i] for key in text_columns),
            *_amounts(r.tokens, r.seconds, r.flops),
            *(f"{r.tokens_per_second:,.0f}", format_amount(r.tflops), share),
            *(format_amount(r.device_hours), format_amount(r.money)),
        )
        if plan := r.planned:
            table.add_row(
                *("planned" if key == "stage" else "" for key in text_columns),
                *_amounts(plan.tokens, plan.seconds, plan.flops),
                *("", "", ""),
                *(format_amount(plan.seconds * r.device_count / 3600), format_amount(plan.money)),
                style="dim",
            )
    return table


def _device(receipt: Receipt) -> str:
    return receipt.device if receipt.device_count == 1 else f"{receipt.device_count:,} x {receipt.device}"


def _amounts(tokens: int, seconds: float, flops: float) -> tuple[str, str, str]:
    return format_count(tokens), format_seconds(seconds), format_flops(flops).removesuffix("FLOP")  # the column's head says so


def format_amount(amount: float) -> str:
    """Money or hours: two decimals, four where two would hide most of it."""
    return f"{amount:,.4f}" if 0 < abs(amount) < 1 else f"{amount:,.2f}"


def format_count(count: int) -> str:
    """A count in three digits: 812, 98.3K, 2.05M, 671B, 14.8T."""
    for exponent, prefix in ((12, "T"), (9, "B"), (6, "M"), (3, "K")):
        if (scaled := count / 10**exponent) >= 1:
            return f"{scaled:.{2 if scaled < 10 else 1 if scaled < 100 else 0}f}{prefix}"
    return str(count)


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
