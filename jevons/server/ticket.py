"""Who asked, and what became of it: one ticket a request, from the door to the meter."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from jevons.cost.usage import UsageRow
from jevons.server.key import Account


@dataclass
class Ticket:
    """One HTTP request under way. `row` is there once the request is metered: before its last update goes out."""

    account: Account
    endpoint: str
    request_id: str
    started: float = field(default_factory=time.time)  # seconds since the epoch
    clock: float = field(default_factory=time.perf_counter)
    user: str = ""  # DeepSeek's user_id: prefixes are not shared between users of one account
    row: UsageRow | None = None

    @property
    def tenant(self) -> str:
        return f"{self.account.tenant}\x00{self.user}"

    def extras(self) -> dict[str, Any]:
        """What a reply's usage says beyond OpenAI's fields: money and time."""
        if self.row is None:
            return {}
        return {"cost": self.row.money, "time": {"first_token": self.row.ttft, "duration": self.row.duration}}
