"""An invoice on paper: JSON, CSV, a page, or tables in the terminal."""

from __future__ import annotations

import csv
import io
import json
import time
from dataclasses import asdict, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from jevons.cost.receipt import AMOUNTS, Receipt, format_amount, format_count, format_seconds, render
from jevons.cost.usage import UsageSums
from jevons.data.disk import write_text
from jevons.plot import dollars
from jevons.stages.invoice import Invoice, scaled, tell_gain
from jevons.stages.key import render as render_keys
from jevons.stages.statement import statement


def document(invoice: Invoice) -> dict[str, Any]:
    """An invoice as JSON takes it. Times are seconds (moments: since the epoch), memory is bytes, shares are 0 to 1, money as priced."""
    totals, served = invoice.total, invoice.served
    out: dict[str, Any] = {"run": invoice.run, "date": time.strftime("%Y-%m-%d %H:%M:%S"), "since": invoice.since}
    if invoice.runs:
        out["stages"] = [r.describe() | {"share": r.money / totals.money if totals.money else None} for r in invoice.receipts]
        out["total"] = asdict(totals)
        out["answers"] = [asdict(a) | {"money_per_correct": a.money_per_correct} for a in invoice.answers]
        ends = ("money_per_point", "money_per_point_low", "money_per_point_high")
        out["gains"] = [asdict(gain) | dict(zip(ends, gain.money_per_point)) for gain in invoice.gains]
    if invoice.sessions:
        tokens = invoice.tokens
        out["served"] = {"sessions": [s.describe() for s in invoice.sessions], "seconds": served.seconds, "money": served.money}
        out["served"] |= {"tokens": tokens, "money_per_million": served.money / tokens * 1e6 if tokens else None}
        out["served"]["elsewhere"] = invoice.elsewhere
    if invoice.keys is not None:
        out["keys"] = [asdict(row) | {"elsewhere": invoice.keys_elsewhere[row.group]} for row in invoice.keys]
        out["compare"] = invoice.compare
    return out


def table(invoice: Invoice) -> str:
    """The stages as CSV, or where there are none the keys: a line each, what was planned and by how much that was missed beside it."""
    found = document(invoice)
    if invoice.runs:
        rows, like = found["stages"], Receipt(run_id="", run="", stage="", device="").describe() | {"share": None}
    else:
        rows, like = found["keys"], dict.fromkeys([*(each.name for each in fields(UsageSums)), "elsewhere"])
    rows = [_flat(entry) for entry in rows]
    heads = list(dict.fromkeys(name for row in (_flat(like), *rows) for name in row))  # also where there are none
    out = io.StringIO()
    writer = csv.DictWriter(out, heads, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _cell(name, value) for name, value in row.items()} for row in rows)
    return out.getvalue()


def _flat(entry: dict[str, Any]) -> dict[str, Any]:
    """`planned` and `difference` as columns of their own, there or not, so that all files have the same."""
    nested = ("planned", "difference") if "stage" in entry else ()
    parts = {f"{part}_{name}": (entry.get(part) or {}).get(name) for part in nested for name in AMOUNTS}
    parts |= {"planned_bound": (entry.get("planned") or {}).get("bound")} if nested else {}
    return {name: value for name, value in entry.items() if name not in nested} | parts


def _cell(name: str, value: Any) -> Any:
    """Moments as people read them; text that a spreadsheet would take for a formula is quoted."""
    if name in ("started", "finished") and value is not None:
        return f"{datetime.fromtimestamp(value, UTC):%Y-%m-%d %H:%M:%S}"
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def show(invoice: Invoice, console: Console) -> None:
    """A table a run, what was served, what it bought; and a total where there are several."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    for receipts in invoice.by_run.values():
        if receipts[0].stage != "serve":
            console.print(render(receipts))
    if invoice.sessions:
        found = Table(title="served, uptime counted", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        for head in ("model", "since (UTC)", "uptime", "busy", "calls", "tokens", "money", "a million"):
            found.add_column(head, justify="left" if head == "model" else "right", no_wrap=head != "model", overflow="fold")
        for s in invoice.sessions:
            calls, price = s.sums.requests if s.sums else 0, s.money_per_million
            cells = [f"{datetime.fromtimestamp(s.receipt.started, UTC):%m-%d %H:%M}", format_seconds(s.receipt.seconds), f"{s.busy:.1%}"]
            cells += [format_count(calls), format_count(s.tokens), f"${format_amount(s.receipt.money)}"]
            found.add_row(Text(s.receipt.run), *cells, "-" if price is None else f"${format_amount(price)}")
        console.print(found)
    if invoice.keys == []:
        console.print("no key was used yet" if invoice.since is None else "no key was used since then")
    elif invoice.keys is not None:
        console.print(render_keys(invoice.keys, invoice.keys_elsewhere, invoice.since, invoice.compare))
    if invoice.runs and not invoice.receipts:
        console.print("nothing began since then" if invoice.since else "no receipts yet")
    for line in findings(invoice):
        console.print(line, highlight=False, markup=False)
    if len(invoice.by_run) > 1:
        totals = invoice.total
        console.print(f"[bold]in all[/] {format_seconds(totals.seconds)}, ${format_amount(totals.money)}", highlight=False)


def findings(invoice: Invoice) -> list[str]:
    """What the money bought, a sentence each."""
    several = len({answers.run for answers in invoice.answers}) > 1
    out = []
    for a in invoice.answers:
        whose = f" {a.model}" * bool(a.model) + f" of {a.run.removesuffix(f' {a.model}')}" * several
        cost = f", {each(a.money_per_correct, 'right answer')}" if a.money_per_correct is not None else ""
        out.append(f"{a.task}{whose}: {a.correct:,} of {a.answers:,} answers right{cost}")
    out += map(tell_gain, invoice.gains)
    if tokens := invoice.tokens:
        words = f"a million served tokens, idle time counted: {dollars(invoice.served.money / tokens * 1e6)}"
        if invoice.compare in invoice.elsewhere:
            words += f"; at {invoice.compare}'s prices {dollars(invoice.elsewhere[invoice.compare] / tokens * 1e6)}"
        out.append(words)
    return out


def each(money: float, thing: str) -> str:
    value, words = scaled(money)
    return f"{value} {words} {thing}{'s' * (words != 'a')}"


def write(invoice: Invoice, console: Console, *, json_file: str | None, csv_file: str | None, html_file: Path | None) -> None:
    """To files, `-` being standard output; or where none is named, a table."""
    texts = [(json_file, lambda: json.dumps(document(invoice), indent=2) + "\n"), (csv_file, lambda: table(invoice))]
    texts.append((None if html_file is None else str(html_file), lambda: statement(invoice)))
    named = [(name, make) for name, make in texts if name is not None]
    if [name for name, _ in named].count("-") > 1:
        raise ValueError("--json, --csv, --html: one of them can be -, standard output; name files for the others")
    for name, _ in named:
        if name != "-" and (Path(name).is_dir() or not Path(name).parent.is_dir()):
            what = "is a folder" if Path(name).is_dir() else f"there is no folder {Path(name).parent}"
            raise ValueError(f"{name}: {what}; name a file, or - to print")
    for name, make in named:
        if name == "-":
            print(make(), end="")
        else:
            write_text(Path(name), make())
            console.print(name, highlight=False, soft_wrap=True)
    if not named:
        show(invoice, console)
