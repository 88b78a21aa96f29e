"""Several models' results side by side on a page that stands alone, in the style of a run's report."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import cycle
from pathlib import Path
from typing import Any

from jevons import plot
from jevons.chapter import COLOURS
from jevons.plot import Curve, dollars, number, percent
from jevons.report import draw_bars, draw_examples, interval, page


def render(document: dict[str, Any]) -> str:
    """The page for the JSON of `jevons eval`."""
    entries = document["models"]
    title = heading(document)
    meta = ["Jevons evaluation", document["device"], document["date"]]
    who = "One model" if len(entries) == 1 else f"{len(entries)} models"
    words = f"{who}, {max(entry['problems'] for entry in entries):,} {document['split']} problems"
    words += f", {document['samples']} answers to each at temperature {document['temperature']:g}" if document["samples"] > 1 else ""
    best = max(entries, key=lambda entry: entry["accuracy"])
    words += f". {best['model']} solves {percent(best['accuracy'])}."
    warnings = [f"{entry['model']} was stopped {entry['stopped']}." for entry in entries if "stopped" in entry]
    body = draw_intervals(entries) + draw_table(document) + draw_passes(entries) + draw_models(entries)
    return page(title, meta, f'<p class="summary">{escape(words)}</p>', warnings, body)


def heading(document: dict[str, Any]) -> str:
    """The task with its options, files by their names alone."""
    pairs = [option.partition("=") for option in document["options"]]
    options = ", ".join(f"{key}={Path(value).name if '/' in value else value}" for key, _, value in pairs)
    return document["task"] + (f" ({options})" if options else "")


def draw_intervals(entries: list[dict[str, Any]]) -> str:
    """Each model's accuracy as a mark on its interval, all on one axis from nothing to everything."""
    rows = "".join(f'<dt>{escape(e["model"])}</dt><dd>{interval(e)}</dd><dd>{percent(e["accuracy"])}</dd>' for e in entries)
    ticks = "".join(f'<i style="left:{x}%">{x}%</i>' for x in (0, 25, 50, 75, 100))
    rows += f'<dt></dt><dd class="ticks">{ticks}</dd><dd></dd>'
    return f'<figure class="intervals"><figcaption>Right answers, with 95 % intervals</figcaption><dl>{rows}</dl></figure>'


def draw_table(document: dict[str, Any]) -> str:
    entries, samples = document["models"], document["samples"]
    passes = [k for k in entries[0].get("pass_at", {}) if k != "1"]
    heads = ["", "pass@1", *(f"pass@{k}" for k in passes), *([f"majority@{samples}"] if samples > 1 else [])]
    gains, priced = any("gain" in entry for entry in entries), any(entry["money"] for entry in entries)
    heads += ["points more than the first"] if gains else []
    heads += ["tokens", "cut off", "tokens/s", "seconds", *(["money"] if priced else [])]
    rows = _row("th", heads)
    for entry in entries:
        cells = [_cell(entry), *(_cell(entry["pass_at"][k]) for k in passes), *([_cell(entry["majority"])] if samples > 1 else [])]
        if gains:
            gain = {name: 100 * value for name, value in entry.get("gain", {}).items()}
            cells.append("{value:+.1f}<small>{low:+.1f} to {high:+.1f}</small>".format(**gain) if gain else "")
        cells += [number(entry["mean_tokens"]), percent(entry["unfinished"]), number(entry["tokens_per_second"])]
        cells += [number(entry["seconds"] + entry["grading_seconds"]), *([dollars(entry["money"])] if priced else [])]
        rows += _row("td", cells, escape(entry["model"]))
    return f'<section><h2>Results</h2><div class="scroll"><table class="plain">{rows}</table></div></section>'


def _row(tag: str, cells: Sequence[str], head: str | None = None) -> str:
    first = "" if head is None else f"<th>{head}</th>"
    return f"<tr>{first}{''.join(f'<{tag}>{cell}</{tag}>' for cell in cells)}</tr>"


def _cell(found: dict[str, Any]) -> str:
    value = found["accuracy"] if "accuracy" in found else found["value"]
    return f"{percent(value)}<small>{percent(found['low'])} to {percent(found['high'])}</small>"


def draw_passes(entries: list[dict[str, Any]]) -> str:
    """How much more is solved by trying more often."""
    curves = [
        Curve(entry["model"], [(int(k), 100 * found["value"]) for k, found in entry["pass_at"].items()], "line", colour)
        for entry, colour in zip(entries, cycle(("accent", *COLOURS)))
        if "pass_at" in entry
    ]
    if not curves:
        return ""
    chart = plot.draw_chart("Problems solved by at least one of k answers, percent", curves, 280, zero=True, against="k")
    return f"<section><h2>More answers</h2>{chart}</section>"


def draw_models(entries: list[dict[str, Any]]) -> str:
    """Each model by difficulty and category, with replies."""
    cards = ""
    for entry in entries:
        bars = "".join(draw_bars({}, entry, field) for field in ("by_difficulty", "by_category"))
        facts = f"{percent(entry['accuracy'])} of {entry['problems']:,}, {number(entry['mean_tokens'])} tokens a reply"
        cards += f"<article><h4>{escape(entry['model'])}<small>{facts}</small></h4>{bars}{draw_examples(entry)}</article>"
    return f'<section><h2>Models</h2><div class="samples">{cards}</div></section>'
