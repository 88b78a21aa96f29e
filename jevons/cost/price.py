"""What tokens cost: a dated table of prices, also by time of day, and the money of a request that this machine served.

    Prices.load(extra)                                     the table that comes with Jevons (prices.toml), and a file of the user's own
    prices.cost("deepseek-flash", prompt=..., when=...)    what a provider would have charged at that moment
    prices.money("my-model", ..., device_seconds=...)      what the request cost here

A served model costs what the user's own file says of its name; without such an entry, the device time it took at the price of
an hour. The table that comes with Jevons never prices a served model: it is there to compare with. Prices are dollars per
million tokens; a prompt token is either a cache hit or a miss, and reasoning is output. Not done: holidays (DeepSeek charges
its lower price on those of China), prices by length of the prompt, batch discounts.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable
from datetime import UTC, date, datetime, time
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
Hours = tuple[int, int]  # minutes since midnight UTC, from and to; to <= from ends on the next day


class Tariff(BaseModel):
    """Dollars per million tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    hit: float = Field(ge=0)  # prompt tokens found in the cache
    miss: float = Field(ge=0)  # the other prompt tokens
    output: float = Field(ge=0)

    def cost(self, *, prompt: float, cached: float, completion: float) -> float:
        assert 0 <= cached <= prompt
        return (cached * self.hit + (prompt - cached) * self.miss + completion * self.output) / 1e6


class Window(Tariff):
    """Hours of the week with prices of their own, in UTC. Hours that pass midnight belong to the day on which they begin."""

    days: tuple[int, ...] = tuple(range(7))  # written "Mon-Fri" or "Sat,Sun"; every day without it
    times: tuple[Hours, ...]  # written ["01:00-04:00", "16:30-00:30"]

    @field_validator("days", mode="before")
    @classmethod
    def _days(cls, value: Any) -> Any:
        if not isinstance(value, str):
            raise ValueError(f"{value!r} is not written as days, such as Mon-Fri")
        days: list[int] = []
        for part in value.replace(" ", "").split(","):
            first, _, last = part.partition("-")
            if first not in DAYS or (last or first) not in DAYS:
                raise ValueError(f"{part!r} is not a day or a range of days, such as Mon-Fri")
            start, length = DAYS.index(first), (DAYS.index(last or first) - DAYS.index(first)) % 7
            days += [(start + i) % 7 for i in range(length + 1)]
        return tuple(days)

    @field_validator("times", mode="before")
    @classmethod
    def _times(cls, value: Any) -> Any:
        parts = [str(part).split("-") for part in value] if isinstance(value, list) else []
        if not parts or not all(len(p) == 2 and all(re.fullmatch(r"([01]\d|2[0-3]):[0-5]\d", t) for t in p) for p in parts):
            raise ValueError(f'{value!r} is not a list of hours, such as ["01:00-04:00"]')
        return tuple(tuple(int(t[:2]) * 60 + int(t[3:]) for t in p) for p in parts)

    def holds(self, when: datetime) -> bool:
        today, minute = when.weekday(), when.hour * 60 + when.minute
        for start, end in self.times:
            began_today = today in self.days and minute >= start and (minute < end or end <= start)
            if began_today or (end <= start and (today - 1) % 7 in self.days and minute < end):
                return True
        return False


class Entry(Tariff):
    """A model's prices from a date on, until its next entry."""

    name: str
    valid_from: datetime  # a date means its first moment in UTC
    source: str
    windows: tuple[Window, ...] = ()  # the first that holds counts

    @field_validator("valid_from", mode="before")
    @classmethod
    def _moment(cls, value: Any) -> Any:
        if isinstance(value, date) and not isinstance(value, datetime):
            value = datetime.combine(value, time())
        if isinstance(value, datetime) and value.tzinfo is None:
            value = value.replace(tzinfo=UTC)
        return value


class Local(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    price_per_hour: float = Field(ge=0)  # of one device, in dollars


class Table(BaseModel):
    """A price file."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    local: Local | None = None
    model: tuple[Entry, ...] = ()


class Prices:
    """All entries, and which of them are the user's own."""

    def __init__(self, entries: Iterable[Entry], *, own: Iterable[str] = (), price_per_hour: float = 0.0) -> None:
        """Of two entries with one name and date the later counts. `own`: names of which served requests are charged by token."""
        self.own, self.price_per_hour = frozenset(own), price_per_hour
        latest = {(entry.name, entry.valid_from): entry for entry in entries}
        self._entries: dict[str, list[Entry]] = {}
        for entry in sorted(latest.values(), key=lambda e: e.valid_from):
            self._entries.setdefault(entry.name, []).append(entry)

    @classmethod
    def load(cls, extra: Path | None = None, *, price_per_hour: float | None = None) -> Prices:
        """The table of Jevons, `extra` over it, `price_per_hour` over both. Raises ValueError with the file and the key."""
        tables = [_read(Path(__file__).with_name("prices.toml")), *([_read(extra)] if extra else [])]
        if price_per_hour is None:
            price_per_hour = [table.local.price_per_hour for table in tables if table.local][-1]
        elif price_per_hour < 0:
            raise ValueError(f"--price-per-hour: must not be negative, is {price_per_hour}")
        own = [entry.name for table in tables[1:] for entry in table.model]
        return cls([entry for table in tables for entry in table.model], own=own, price_per_hour=price_per_hour)

    @property
    def models(self) -> list[str]:
        return sorted(self._entries)

    def since(self, model: str) -> datetime:
        """From when on a model of `models` has a price."""
        return self._entries[model][0].valid_from

    def at(self, model: str, when: float) -> Tariff:
        """A model's prices at a moment, in seconds since the epoch. Raises ValueError for a model or a time without one."""
        if model not in self._entries:
            near = difflib.get_close_matches(model, self._entries, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(self.models)}"
            raise ValueError(f"prices: no model {model!r}{hint}")
        moment = datetime.fromtimestamp(when, UTC)
        entries = [entry for entry in self._entries[model] if entry.valid_from <= moment]
        if not entries:
            first = self._entries[model][0].valid_from
            raise ValueError(f"prices: {model} has no price for {moment:%Y-%m-%d %H:%M}; its first is from {first:%Y-%m-%d %H:%M} UTC")
        return next((window for window in entries[-1].windows if window.holds(moment)), entries[-1])

    def cost(self, model: str, *, prompt: int, cached: int, completion: int, when: float) -> float:
        """What these tokens cost at a model's price at that moment."""
        return self.at(model, when).cost(prompt=prompt, cached=cached, completion=completion)

    def money(self, model: str, *, prompt: int, cached: int, completion: int, device_seconds: float, when: float) -> float:
        """What a request cost that was served here: by the user's own prices, or else by the device time."""
        if model in self.own:
            return self.cost(model, prompt=prompt, cached=cached, completion=completion, when=when)
        return device_seconds / 3600 * self.price_per_hour


def _read(path: Path) -> Table:
    if not path.is_file():
        raise ValueError(f"--prices {path}: no such file")
    try:
        return Table.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not TOML: {error}") from error
    except ValidationError as error:
        problems = "".join(f"\n  {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ValueError(f"{path}:{problems}") from error
