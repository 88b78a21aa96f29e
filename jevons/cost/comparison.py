"""One day's traffic, priced at every model of the price table beside what serving it ourselves costs.

    traffic = Traffic.of(Request(prompt=4000, cached=2500, output=800), requests=50_000)
    comparison = compare(traffic, prices, date(2026, 11, 27), quote)
    comparison.own.dollars, comparison.own.busy          rented all day, and what share of that it works
    comparison.bills[0].dollars, comparison.break_even(comparison.bills[0])

Problem: an API charges tokens, a rented device hours, also those in which nobody asks. Approach: the traffic has a profile over
the day, an API's bill takes each hour at its price (DeepSeek's has peak hours), and of our own deployments as many are rented all
day as the busiest hour needs. The break-even utilisation is the share of rented time that has to be work for both to cost the
same: above 1 the API is cheaper than devices that never rest. Not done: quality. A cheaper model may need more tokens or be wrong.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta

from jevons.cost.price import Prices
from jevons.cost.serving import Quote, Request

FLAT = (1.0,) * 24
# People who sleep at night: half a sine over the sixteen hours from 06:00, a tenth of its peak outside. A shape of ours, not measured
DAYTIME = tuple(max(0.1, math.sin(math.pi * (hour - 6 + 0.5) / 16)) for hour in range(24))


@dataclass(frozen=True)
class Traffic:
    """Tokens of one day, and the weight of each hour in it (UTC, any scale)."""

    prompt: float
    cached: float  # of the prompt tokens, found in the cache
    output: float
    hours: tuple[float, ...] = FLAT

    def __post_init__(self) -> None:
        if not 0 <= self.cached <= self.prompt or self.output < 0:
            raise ValueError(f"traffic: needs 0 <= cached <= prompt and output >= 0, has {self.prompt}, {self.cached}, {self.output}")
        if len(self.hours) != 24 or min(self.hours) < 0 or sum(self.hours) <= 0:
            raise ValueError("hours: needs 24 weights, none negative and not all 0")

    @classmethod
    def of(cls, request: Request, requests: float, hours: tuple[float, ...] = FLAT) -> Traffic:
        """So many requests of one kind a day."""
        return cls(request.prompt * requests, request.cached * requests, request.output * requests, hours)

    @property
    def shares(self) -> tuple[float, ...]:
        """Of the day's tokens, hour by hour."""
        total = sum(self.hours)
        return tuple(weight / total for weight in self.hours)


@dataclass(frozen=True)
class Bill:
    """What a provider charges for the day."""

    model: str
    dollars: float
    per_million: float  # dollars a million tokens of all kinds together


@dataclass(frozen=True)
class Own:
    """What serving it ourselves costs a day."""

    deployments: int  # copies of the quoted deployment that the busiest hour needs
    devices: int  # of all of them
    dollars: float  # rented all day
    by_the_hour: float  # rented for each hour as that hour needs
    full: float  # if every rented second were work: what the traffic's device seconds cost
    busy: float  # share of the rented time that is work

    def per_million(self, traffic: Traffic) -> float:
        return self.dollars / (traffic.prompt + traffic.output) * 1e6


@dataclass(frozen=True)
class Comparison:
    """Bills, the cheapest first, and our own cost; None where no device was quoted or it has no price."""

    traffic: Traffic
    day: date
    bills: tuple[Bill, ...]
    own: Own | None

    def break_even(self, bill: Bill) -> float | None:
        """Share of rented time that has to be work for our own to cost what the bill does; above 1 it never does."""
        return self.own.full / bill.dollars if self.own is not None and bill.dollars else None


def bills(traffic: Traffic, prices: Prices, day: date) -> list[Bill]:
    """The day at every model of the table that has a price then, hour by hour, the cheapest first. Retired models keep their last price."""
    midnight = datetime.combine(day, time(), UTC)
    found = []
    for model in prices.models:
        if prices.since(model) > midnight:
            continue
        dollars = 0.0
        for hour, share in enumerate(traffic.shares):
            tariff = prices.at(model, (midnight + timedelta(hours=hour)).timestamp())
            dollars += share * tariff.cost(prompt=traffic.prompt, cached=traffic.cached, completion=traffic.output)
        found.append(Bill(model, dollars, dollars / (traffic.prompt + traffic.output) * 1e6))
    return sorted(found, key=lambda bill: bill.dollars)


def own(traffic: Traffic, quotes: Iterable[Quote], *, headroom: float = 1.0) -> Own | None:
    """What the traffic costs on a quoted deployment, or on two of which the first reads prompts and the second generates.

    `headroom`: of the busiest hour's work, what is rented for it (1.2: a fifth more). None where a device has no price.
    """
    quoted = tuple(quotes)
    reads, writes = quoted[0], quoted[-1]
    reading = (traffic.prompt - traffic.cached) * reads.seconds_input + traffic.cached * reads.seconds_cached
    writing = traffic.output * writes.seconds_output
    work = {reads: reading + writing} if len(quoted) == 1 else {reads: reading, writes: writing}
    deployments, devices, dollars, hourly, full, worked = 0, 0, 0.0, 0.0, 0.0, 0.0
    for quote, seconds in work.items():
        if quote.price_per_hour is None:
            return None
        rent = quote.price_per_hour * quote.devices
        needed = [math.ceil(seconds * share / 3600 * headroom - 1e-9) for share in traffic.shares]
        copies = max(1, *needed)
        deployments += copies
        devices += copies * quote.devices
        dollars += copies * rent * 24
        hourly += sum(max(1, n) for n in needed) * rent
        full += seconds / 3600 * rent
        worked += seconds * quote.devices
    return Own(deployments, devices, dollars, hourly, full, worked / (devices * 86_400))


def compare(traffic: Traffic, prices: Prices, day: date, *quotes: Quote, headroom: float = 1.0) -> Comparison:
    """Everybody's bill of a day beside our own cost on what was quoted (see `own`), if anything was."""
    mine = own(traffic, quotes, headroom=headroom) if quotes else None
    return Comparison(traffic, day, tuple(bills(traffic, prices, day)), mine)


def margin(revenue: float, cost: float) -> float:
    """Profit over cost, as DeepSeek quotes its 545 %."""
    return (revenue - cost) / cost
