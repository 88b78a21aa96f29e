"""`jevons receipt`: what was spent, planned beside actual, and what one correct answer, one point or a million tokens came to.

Nothing here is kept: every figure is made anew from rows that are written once or replaced whole (receipts, usage) and from what a
run's folder says of its results, so kills and re-runs cannot be counted twice. Money spent is the sum of the receipts, a server's
uptime included; what keys were charged for is in the usage rows, and is never added to that.

- A correct answer: the evaluation's money, shared among its models by the tokens that each generated, over the answers that were right.
- A point gained by RL: the money of the stage `rl` over the percentage points of accuracy that came of it, with the gain's 95 % interval.
- A million served tokens: a session's whole uptime, idle or not, over prompt and generated tokens of the requests that it answered.

`since` takes stages that began then or later, and the part of a server's uptime that lies after it. Not done: money of a stage split at
`since` (a stage pauses, and its receipt does not say when), currencies.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jevons.cost.ledger import Ledger
from jevons.cost.price import Prices
from jevons.cost.receipt import Receipt, Totals, total
from jevons.cost.usage import COUNTS, Traffic, UsageStore, UsageSums, cost_at
from jevons.plot import dollars
from jevons.record import read_json


@dataclass(frozen=True)
class Answers:
    """One model's answers to one task, and the money that they cost."""

    run: str
    task: str
    model: str  # "before" and "after" reinforcement learning, or the model's name
    answers: int
    correct: int
    money: float

    @property
    def money_per_correct(self) -> float | None:
        """None where no answer was right."""
        return self.money / self.correct if self.correct else None


@dataclass(frozen=True)
class Gain:
    """Percentage points of a task's accuracy that reinforcement learning brought, with their 95 % interval, and its money."""

    run: str
    task: str
    points: float
    low: float
    high: float
    money: float

    @property
    def money_per_point(self) -> tuple[float | None, float | None, float | None]:
        """Of the gain as measured, and the interval's least and most; None where nothing was gained."""
        value, least, most = (self.money / points if points > 0 else None for points in (self.points, self.high, self.low))
        return value, least, most


@dataclass(frozen=True)
class Session:
    """One server from its start to its end, and the requests that it answered."""

    receipt: Receipt
    sums: UsageSums | None  # None where nobody asked

    @property
    def tokens(self) -> int:
        return self.sums.prompt + self.sums.completion if self.sums else 0

    @property
    def busy(self) -> float:
        """Share of the uptime in which the device worked for requests that it answered, 0 to 1."""
        worked = self.sums.device_seconds if self.sums else 0.0
        return min(1.0, worked / self.receipt.seconds) if self.receipt.seconds else 0.0

    @property
    def money_per_million(self) -> float | None:
        """Of prompt and generated tokens together, idle time counted; None where there are none."""
        return self.receipt.money / self.tokens * 1e6 if self.tokens else None

    def describe(self) -> dict[str, Any]:
        """Its receipt and its requests, ready for JSON."""
        counts = {name: getattr(self.sums, name, 0) for name in ("requests", *COUNTS, "device_seconds")}
        named = {name: getattr(self.receipt, name) for name in ("run_id", "run", "device", "started", "finished", "seconds", "money")}
        return named | counts | {"busy": self.busy, "tokens": self.tokens, "money_per_million": self.money_per_million}


@dataclass
class Invoice:
    """Everything that a report says. `elsewhere`: what all sessions' tokens would have cost at each model's prices."""

    run: str | None  # the name of the one run that it is about; None: all
    since: float | None
    runs: bool = True  # whether receipts were asked for
    receipts: list[Receipt] = field(default_factory=list)  # those of servers too, with the tokens that they served
    answers: list[Answers] = field(default_factory=list)
    gains: list[Gain] = field(default_factory=list)
    sessions: list[Session] = field(default_factory=list)
    elsewhere: dict[str, float] = field(default_factory=dict)
    keys: list[UsageSums] | None = None  # where they were asked for
    keys_elsewhere: dict[str, float] = field(default_factory=dict)  # by key, at the prices of `compare`
    compare: str = ""

    @property
    def total(self) -> Totals:
        return total(self.receipts)

    @property
    def served(self) -> Totals:
        return total(session.receipt for session in self.sessions)

    @property
    def tokens(self) -> int:
        """Served."""
        return sum(session.tokens for session in self.sessions)

    @property
    def busy(self) -> float:
        """Share of all sessions' time, as of one."""
        return sum(s.busy * s.receipt.seconds for s in self.sessions) / seconds if (seconds := self.served.seconds) else 0.0

    @property
    def by_run(self) -> dict[str, list[Receipt]]:
        """Receipts by run, stages in order; sessions of one model are one entry, under its name."""
        groups: dict[str, list[Receipt]] = {}
        for receipt in self.receipts:
            groups.setdefault(f"serve {receipt.run}" if receipt.stage == "serve" else receipt.run_id, []).append(receipt)
        return groups


def gather(
    root: Path,
    run: str | None,
    *,
    prices: Prices,
    compare: str,
    ledger: str | None = None,
    since: float | None = None,
    runs: bool = True,
    keys: bool = False,
) -> Invoice:
    """The figures of all runs in `root`, or of one, by its folder, name or id; with `keys`, those of each key; without `runs`, only those.

    `ledger` is the servers', if not that of the runs. Raises ValueError where there is no ledger or no such run.
    """
    folder = Path(run) if run else None
    if folder and (folder / "recipe.toml").exists():
        root = folder.parent
    name, own = folder.name if folder else None, root / "ledger.db"
    if not own.exists() and ledger is None:
        raise ValueError(f"{own}: no ledger; runs are kept in {root} (change it with --runs, or name a server's with --ledger)")
    if ledger is not None and "://" not in ledger and not Path(ledger).is_file():  # to open it would be to make it
        raise ValueError(f"--ledger {ledger}: no such file")
    try:
        prices.at(compare, time.time())
    except ValueError as error:
        raise ValueError(f"--compare: {error}") from error
    store = UsageStore(ledger or own)
    invoice = Invoice(run=None, since=since, runs=runs, compare=compare)
    if runs:
        places = {str(place): place for place in (ledger, own if own.exists() else None) if place is not None}
        rows = {(receipt.run_id, receipt.stage): receipt for place in places.values() for receipt in _rows(place, name)}
        if not rows and run:
            names = sorted({receipt.run for place in places.values() for receipt in _rows(place, None)})
            raise ValueError(f"{run}: no such run in {own}; there are {', '.join(names[:20]) or 'none'}")
        if name:
            invoice.run = next(iter(rows.values())).run
        kept = [part for receipt in rows.values() if (part := _after(receipt, since)) is not None]
        _add(invoice, sorted(kept, key=lambda receipt: receipt.started), store, prices, root)
    if keys:
        invoice.keys, invoice.keys_elsewhere = store.sums("key", since), store.cost_at(prices, compare, since)
    store.close()
    return invoice


def _add(invoice: Invoice, receipts: list[Receipt], store: UsageStore, prices: Prices, root: Path) -> None:
    """Receipts, those of servers with the tokens that they served, and what they bought."""
    sums = {row.group: row for row in store.sums("session", invoice.since)}
    invoice.sessions = [Session(r, sums.get(r.run_id)) for r in receipts if r.stage == "serve"]
    tokens = {session.receipt.run_id: session.tokens for session in invoice.sessions}
    invoice.receipts = [replace(r, tokens=tokens[r.run_id]) if r.stage == "serve" else r for r in receipts]
    for receipt in invoice.receipts:
        if receipt.stage == "evaluate":
            _read_results(invoice, receipt, root)
        elif receipt.stage == "eval":
            invoice.answers += _read_contest(receipt, root)
    traffic = [part for part in store.traffic("session", invoice.since) if part.group in tokens]
    invoice.elsewhere = prices_elsewhere(traffic, prices)


def _rows(place: str | Path, run: str | None) -> list[Receipt]:
    ledger = Ledger(place)
    rows = ledger.rows(run)
    ledger.close()
    return rows


def _after(receipt: Receipt, since: float | None) -> Receipt | None:
    """The part of a receipt that `since` leaves: all, nothing, or of a server's uptime what came later."""
    if since is None or receipt.started >= since:
        return receipt
    left = receipt.started + receipt.seconds - since  # a server does not pause
    return replace(receipt, started=since, seconds=left) if receipt.stage == "serve" and left > 0 else None


def _read_results(invoice: Invoice, receipt: Receipt, root: Path) -> None:
    """What the evaluation of a run found, if its folder is still that run's."""
    folder = root / receipt.run
    found = read_json(folder / "evaluate" / "results.json")
    if not found or read_json(folder / "environment.json").get("run_id") != receipt.run_id:
        return
    before = found.get("before", {}).get("tasks", [])
    sheets = [("before", task) for task in before] + [("after" if before else "", task) for task in found["tasks"]]
    drawn = sum(_tokens(task) for _, task in sheets)
    for model, task in sheets:
        money = receipt.money * _tokens(task) / drawn if drawn else 0.0
        count = task["problems"] * task.get("samples", 1)
        invoice.answers.append(Answers(receipt.run, task["task"], model, count, round(task["accuracy"] * count), money))
    spent = [r.money for r in invoice.receipts if r.run_id == receipt.run_id and r.stage == "rl"]
    for task in found["tasks"] if spent else []:
        if "gain" in task:
            value, low, high = (100 * task["gain"][name] for name in ("value", "low", "high"))
            invoice.gains.append(Gain(receipt.run, task["task"], value, low, high, spent[0]))


def _tokens(task: dict[str, Any]) -> float:
    return task["mean_tokens"] * task["problems"] * task.get("samples", 1)


def _read_contest(receipt: Receipt, root: Path) -> Iterable[Answers]:
    """What `jevons eval` found, where its file is in its place and still of that contest."""
    for path in sorted((root / "evaluations").glob("*.json")):
        if not receipt.run.startswith(f"{path.stem} "):
            continue
        document = read_json(path)
        for entry in document["models"]:
            if f"{path.stem} {entry['model']}" == receipt.run and entry["tokens"] == receipt.tokens and entry["money"] == receipt.money:
                count = entry["problems"] * document["samples"]
                yield Answers(receipt.run, document["task"], entry["model"], count, round(entry["accuracy"] * count), receipt.money)


def prices_elsewhere(traffic: Sequence[Traffic], prices: Prices) -> dict[str, float]:
    """What the tokens would have cost at each model of the price table, the cheapest first; models that came later are left out."""
    if not traffic:
        return {}
    first = datetime.fromtimestamp(min(part.when for part in traffic), UTC)
    found = {model: sum(cost_at(traffic, prices, model).values()) for model in prices.models if prices.since(model) <= first}
    return dict(sorted(found.items(), key=lambda item: item[1]))


def tell_gain(gain: Gain) -> str:
    words = f"{gain.task} of {gain.run}: {gain.points:+.1f} points by RL for {dollars(gain.money)}"
    middle, least, most = gain.money_per_point
    if middle is None or least is None:
        return words
    return f"{words}, {dollars(middle)} a point (95% interval: {dollars(least)} to {'any price' if most is None else dollars(most)})"


def scaled(money: float) -> tuple[str, str]:
    """The money of one thing, of a thousand or of a million, whichever shows digits and not noughts; and which that is."""
    scales = ((1, "a"), (1000, "a thousand"), (10**6, "a million"))
    count, words = next((scale for scale in scales if money * scale[0] >= 0.01), scales[-1])
    return dollars(money * count), words
