"""The verbs `jevons keys ...`, and the table of all keys that `jevons receipt --keys` prints.

What a key may do and how it is kept is in server/key.py; here is only what people type and read. Moments are written as people
say them: 30d, 12h, or a date, which is UTC's.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from jevons.cost.usage import KeyRow, UsageStore, UsageSums
    from jevons.server.key import Keys

SECONDS = {"m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
Root = Annotated[Path, typer.Option("--runs", help="The folder with the ledger.", envvar="JEVONS_RUNS")]
URL = Annotated[
    str | None,
    typer.Option(
        "--ledger",
        help="The server's ledger, if not ledger.db in that folder: a SQLite file, or a database's URL such as "
        "postgresql://user@host/database. Set JEVONS_LEDGER where it holds a password, which a command line would show to others.",
        envvar="JEVONS_LEDGER",
        show_default=False,
    ),
]
Key = Annotated[str, typer.Argument(help="The key's name or id, as `jevons keys list` shows them.")]

keys = typer.Typer(
    name="keys",
    help="Keys to the server: who may ask, for which models, how fast, and for how much money.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)


@keys.command()
def create(
    name: Annotated[str, typer.Option("--name", help="Whose key it is; it stands beside every request in the ledger.")],
    models: Annotated[str | None, typer.Option(help="Only these models, separated by commas.", show_default="all")] = None,
    budget: Annotated[float | None, typer.Option(help="Dollars, in all; then requests are answered with 402.", show_default="none")] = None,
    rate: Annotated[float | None, typer.Option(help="Requests a second; beyond, 429 with retry-after.", show_default="any")] = None,
    concurrency: Annotated[int | None, typer.Option(help="Requests at once; beyond, 429.", show_default="any")] = None,
    expires: Annotated[str | None, typer.Option(help="In 30d, 12h, or at a date: 2027-01-31.", show_default="never")] = None,
    tenant: Annotated[
        str | None,
        typer.Option(help="Keys of one tenant share cached prefixes, and can tell so from the time to first token.", show_default="own"),
    ] = None,
    root: Root = Path("runs"),
    ledger: URL = None,
) -> None:
    """Make a key and print it, once: only its digest is kept.

    From the first key on, the server answers nobody without one. A key works at once, also on a server that runs.

    jevons keys create --name alice --budget 5 --rate 2 --expires 30d
    """
    moment = None if expires is None else parse_moment(expires, time.time(), 1, "--expires")
    names = None if models is None else _names(models)
    row, secret = _open(root, ledger, make=True).create(
        name, models=names, budget=budget, rate=rate, concurrency=concurrency, expires=moment, tenant=tenant
    )
    _show(f"{row.name} ({row.id})", secret)


@keys.command("list")
def list_keys(root: Root = Path("runs"), ledger: URL = None) -> None:
    """All keys ever made: limits, money spent, and whether they work."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from jevons.cost.receipt import format_amount

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for column in ("name", "id", "key", "spent", "limits", "state"):
        table.add_column(column, no_wrap=column != "limits", justify="right" if column == "spent" else "left")
    for row in _store(root, ledger).all_keys():
        state = row.state(time.time())
        cells = (row.name, row.id, row.prefix, f"${format_amount(row.spent)}", _limits(row), state)
        table.add_row(*cells, style=None if state == "active" else "dim")
    Console().print(table)


@keys.command()
def change(
    key: Key,
    models: Annotated[str | None, typer.Option(help="Only these models from now on, or `all`.", show_default="as before")] = None,
    budget: Annotated[
        float | None, typer.Option(help="Dollars, in all, what is spent included; 0: none.", show_default="as before")
    ] = None,
    rate: Annotated[float | None, typer.Option(help="Requests a second; 0: any.", show_default="as before")] = None,
    concurrency: Annotated[int | None, typer.Option(help="Requests at once; 0: any.", show_default="as before")] = None,
    expires: Annotated[str | None, typer.Option(help="In 30d, 12h, at a date, or `never`.", show_default="as before")] = None,
    root: Root = Path("runs"),
    ledger: URL = None,
) -> None:
    """Other limits for a key: its budget raised, its end put off. Within a second on every server that uses this ledger."""
    limits: dict[str, object] = {"budget": budget, "rate": rate, "concurrency": concurrency}
    limits = {name: value or None for name, value in limits.items() if value is not None}
    if models is not None:
        limits["models"] = None if models == "all" else _names(models)
    if expires is not None:
        limits["expires"] = None if expires == "never" else parse_moment(expires, time.time(), 1, "--expires")
    if not limits:
        raise ValueError(f"keys change {key}: name a limit to change, such as --budget 10")
    row = _open(root, ledger).change(key, **limits)
    print(f"{row.name} ({row.id}): {_limits(row)}")


@keys.command()
def revoke(key: Key, root: Root = Path("runs"), ledger: URL = None) -> None:
    """End a key for good, within a second on every server that uses this ledger. What it used stays on the bill."""
    row = _open(root, ledger).revoke(key)
    print(f"{row.name} ({row.id}) is revoked")


@keys.command()
def rotate(key: Key, root: Root = Path("runs"), ledger: URL = None) -> None:
    """A new secret for a key, printed once; limits and bill go on, and the old secret ends within a second."""
    row, secret = _open(root, ledger).rotate(key)
    _show(f"{row.name} ({row.id})", secret)


def render(rows: Sequence[UsageSums], elsewhere: Mapping[str, float], since: float | None, compare: str) -> Table:
    """A line a key: counts, the median time to first token, device time, money, and the money at `compare`'s prices."""
    from rich import box
    from rich.table import Table

    from jevons.cost.receipt import format_amount, format_count

    title = "keys" if since is None else f"keys since {datetime.fromtimestamp(since, UTC):%Y-%m-%d %H:%M} UTC"
    title += f"; elsewhere: the same tokens at {compare}'s prices"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_footer=True, pad_edge=False, padding=0)
    counts = {"requests": "calls", "prompt": "prompt", "cached": "cached", "completion": "output", "reasoning": "thought"}
    footers = {head: format_count(sum(getattr(row, field) for row in rows)) for field, head in counts.items()}
    footers |= {"first token": "", "hours": format_amount(sum(row.device_seconds for row in rows) / 3600)}
    footers |= {"money": f"${format_amount(sum(row.money for row in rows))}", "elsewhere": f"${format_amount(sum(elsewhere.values()))}"}
    table.add_column("key", footer="total", overflow="fold")
    for head, footer in footers.items():
        table.add_column(head, footer=footer, justify="right", no_wrap=head != "first token")
    for row in rows:
        table.add_row(
            row.label,
            *(format_count(getattr(row, field)) for field in counts),
            "-" if row.ttft is None else f"{row.ttft:.2f}s",
            format_amount(row.device_seconds / 3600),
            *(f"${format_amount(money)}" for money in (row.money, elsewhere[row.group])),
        )
    return table


def parse_moment(text: str, now: float, sign: int, option: str) -> float:
    """Seconds since the epoch of `30d` (before or after `now`, by `sign`) or of a date, with or without a time, in UTC."""
    if match := re.fullmatch(r"(\d+)([mhdw])", text):
        return now + sign * int(match[1]) * SECONDS[match[2]]
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"{option}: {text!r} is neither a duration, such as 30d or 12h, nor a date, such as 2027-01-31") from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _names(models: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in models.split(","))


def _limits(row: KeyRow) -> str:
    limits = [f"${row.budget:g}" if row.budget else "", f"{row.rate:g} a second" if row.rate else ""]
    limits += [f"{row.concurrency} at once" if row.concurrency else "", " ".join(row.models or ())]
    limits += [f"until {datetime.fromtimestamp(row.expires, UTC):%Y-%m-%d %H:%M}" if row.expires else ""]
    return ", ".join(filter(None, limits)) or "none"


def _store(root: Path, ledger: str | None, *, make: bool = False) -> UsageStore:
    """Raises ValueError where there is no ledger, unless it is to be made."""
    from jevons.cost.usage import UsageStore

    if not make and ledger is None and not (root / "ledger.db").exists():
        raise ValueError(f"{root / 'ledger.db'}: no ledger; name its folder with --runs, or the ledger with --ledger")
    return UsageStore(ledger or root / "ledger.db")


def _open(root: Path, ledger: str | None, *, make: bool = False) -> Keys:
    from jevons.server.key import Keys

    return Keys(_store(root, ledger, make=make))


def _show(whose: str, secret: str) -> None:
    typer.echo(f"the key of {whose}, shown this once:", err=True)  # apart, so that $(jevons keys create ...) is the key alone
    print(secret)
