"""`jevons claims`: the story's numbers beside ours, as a table, one in full, JSON, or docs/CLAIMS.md. All of it is cost/story.py's."""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from jevons.cost.claim import Claim, Verdict, show
from jevons.cost.claim import Table as Figures
from jevons.cost.story import claim, story

WIDE = 120  # columns: of the table with a line a claim, and of what is piped
STYLES: dict[Verdict, str] = {
    "confirmed": "green",
    "with a caveat": "yellow",
    "wrong comparison": "red",
    "not verifiable": "magenta",
    "measured": "cyan",
    "not yet measured": "dim",
}
FALLEN = "no longer stands"


def claims(names: list[str], *, as_json: bool = False, markdown: bool = False) -> int:
    """Print all claims, or those named in full; 1 where a verdict no longer stands, else 0. ValueError for an unknown name."""
    if as_json and markdown:
        raise ValueError("--json, --markdown: one of them at a time")
    if names and markdown:
        raise ValueError(f"--markdown: writes the whole page; leave {names[0]!r} away")
    chapters = {"": tuple(claim(name) for name in names)} if names else story()
    found = [c for chapter in chapters.values() for c in chapter]
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = WIDE
    if as_json:
        print(json.dumps([to_dict(c) for c in found], indent=2))
    elif markdown:
        print(page(chapters), end="")
    elif names:
        for c in found:
            console.print(details(c))
    else:
        console.print(overview(chapters, narrow=console.width < WIDE))
    return int(not all(c.stands for c in found))


def to_dict(claim: Claim) -> dict[str, Any]:
    """A claim with what follows from it, ready for JSON."""
    return dataclasses.asdict(claim) | {"agrees": claim.agrees, "stands": claim.stands, "command": claim.command}


def overview(chapters: dict[str, tuple[Claim, ...]], *, narrow: bool = False) -> Group:
    """A line a claim, within 120 columns, or two within 80, and how many got which verdict."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", padding=(0, 1) if not narrow else (0, 1, 0, 0))
    heads = ("what is said", "published\nours") if narrow else ("claim", "what is said", "published", "ours")
    for head in heads:
        table.add_column(head, justify="right" if "published" in head or head == "ours" else "left", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for chapter, found in chapters.items():
        table.add_section()
        table.add_row(Text(chapter, style="bold"))
        for c in found:
            name, figures = Text(c.name, style="dim"), (show(c.published, c.unit), _ours(c))
            wide = (name, c.statement, *figures)
            table.add_row(*((Text(c.statement + "\n").append(name), "\n".join(figures)) if narrow else wide), _verdict(c))
    every = [c for found in chapters.values() for c in found]
    return Group(table, Text(f"{_summary(every)}.\nSources, reasons and tables: jevons claims NAME", style="dim"))


def _ours(claim: Claim) -> str:
    return ("up to " if claim.bound else "") + show(claim.ours, claim.unit)


def _verdict(claim: Claim) -> Text:
    return Text(claim.verdict, style=STYLES[claim.verdict]) if claim.stands else Text(FALLEN, style="bold white on red")


def _summary(found: list[Claim]) -> str:
    counts = Counter(claim.verdict if claim.stands else FALLEN for claim in found)
    return f"{len(found)} claims: " + ", ".join(f"{counts[name]} {name}" for name in (*STYLES, FALLEN) if counts[name])


def details(claim: Claim) -> Group:
    """One claim in full: both figures, why, from where, and the figures behind it."""
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column()
    facts.add_row("published", show(claim.published, claim.unit))
    facts.add_row("ours", _ours(claim))
    facts.add_row("verdict", _verdict(claim))
    facts.add_row("computed", Text(claim.method))
    for i, source in enumerate(claim.source):
        facts.add_row("" if i else "source", Text(source))
    head = Text.assemble((claim.statement, "bold"), (f"  {claim.name}", "dim"))
    tables = [part for figures in claim.tables for part in ("", Text(figures.title, style="italic"), _figures(figures))]
    return Group("", head, "", facts, "", Text(claim.note), *tables)


def _figures(figures: Figures) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(figures.columns):
        table.add_column(column, justify="right" if i else "left")
    for row in figures.rows:
        table.add_row(*row)
    return table


def page(chapters: dict[str, tuple[Claim, ...]]) -> str:
    """docs/CLAIMS.md."""
    return "\n".join(_lines(chapters)) + "\n"


def _lines(chapters: dict[str, tuple[Claim, ...]]) -> Iterator[str]:
    every = [c for found in chapters.values() for c in found]
    yield "# The numbers of the story, computed again"
    yield ""
    yield "Written by `jevons claims --markdown`; a test holds this page to what the code computes. A figure of ours comes from the"
    yield "functions that plan and bill runs; published figures stand in `jevons/cost/claim_*.py`, their sources in `sources.toml`."
    yield ""
    yield "- **confirmed**: comes out from public figures, within the tolerance that `--json` gives"
    yield "- **with a caveat**: comes out, but says less than it seems to, or is only possible (`up to`: a bound of the hardware)"
    yield "- **wrong comparison**: compares unlike things; ours compares like with like"
    yield "- **not verifiable**: what it takes to check is not public; ours, where there is one, is the nearest public figure"
    yield "- **measured**: on a machine of ours, the run is named"
    yield ""
    yield f"{_summary(every)}."
    for chapter, found in chapters.items():
        yield from ("", f"## {chapter}", "", "| claim | published | ours | verdict |", "|---|---|---|---|")
        for c in found:
            yield f"| [{_cell(c.statement)}](#{c.name}) | {show(c.published, c.unit)} | {_ours(c)} | {_verdict(c)} |"
        for c in found:
            yield from ("", f"### {c.name}", "")
            yield from (f"**{c.statement}.** Published {show(c.published, c.unit)}, ours {_ours(c)}: {_verdict(c)}.", "", c.note)
            yield from ("", f"- computed: {c.method}", f"- source: {'; '.join(c.source)}", f"- alone: `{c.command}`")
            for figures in c.tables:
                yield from ("", f"{figures.title}:", "", _row(figures.columns), "|---" + "|---:" * (len(figures.columns) - 1) + "|")
                yield from (_row(row) for row in figures.rows)


def _row(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(map(_cell, cells)) + " |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
