"""The page of `jevons receipt --html`: what it cost and where the money went, told to a stranger in ten seconds.

One sentence, a row of numbers and one bar cut by stages come first; then the plan beside what came, money over time, what was bought
with it, and the receipts themselves. Drawn with the parts of a run's report, so it stands alone like that and lets no script but
theirs run; names of runs, models and keys are other people's text, and escaped. Not done: exact times of spending inside a stage (a
receipt knows its beginning and its end), so money over time is straight between them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from html import escape

from jevons import plot
from jevons.cost.receipt import Receipt, format_bytes, format_difference, total
from jevons.plot import Curve, dollars, duration, number, percent
from jevons.report import STAGES, draw_receipt, page, tile
from jevons.stages.invoice import Invoice, Session, scaled, tell_gain

COLOURS = {"prepare": "dim", "pretrain": "accent", "sft": "third", "rl": "second", "evaluate": "right", "eval": "right", "serve": "fourth"}
NAMES = {"prepare": "Preparing data", "evaluate": "Evaluation", "eval": "Comparing models", "serve": "Serving"}
NAMES |= {stage: noun for stage, (_, noun) in STAGES.items()}
MOST = 12  # bars of one figure
UNITS = ((86400, "days"), (3600, "hours"), (60, "minutes"), (1, "seconds"))

STYLE = """
.tile{flex-basis:165px}.stack{display:flex;height:38px;border-radius:8px;overflow:hidden;gap:2px;margin:0 0 14px}.stack i{min-width:2px}
.key{display:flex;flex-wrap:wrap;gap:6px 26px;font-size:15px}.key span{display:flex;gap:8px;align-items:baseline}.key i{width:11px;
height:11px;border-radius:3px;align-self:center}.key b{font-variant-numeric:tabular-nums}.key small{color:var(--dim);font-size:13px}
.bars{grid-template-columns:fit-content(46%) 1fr auto;max-width:760px;gap:9px 14px;font-size:14px}.bars dt{overflow-wrap:anywhere}
.bars i{height:10px}.bars .was{height:4px;margin-bottom:2px}
.bars dd:has(i){background:none;border-left:1px solid var(--line);border-radius:0}
@media(max-width:600px){.bars{grid-template-columns:minmax(0,34%) 1fr minmax(0,34%)}}
"""


def statement(invoice: Invoice) -> str:
    """The page."""
    title = invoice.run or ("All runs" if invoice.runs else "Keys")
    days = sorted({f"{datetime.fromtimestamp(r.started, UTC):%Y-%m-%d}" for r in invoice.receipts if r.started})
    meta = ["Jevons receipt", *sorted({r.device for r in invoice.receipts})[:3], " to ".join(dict.fromkeys(days[:1] + days[-1:]))]
    warnings = [f"Only what began on {datetime.fromtimestamp(invoice.since, UTC):%Y-%m-%d %H:%M} UTC or later."] if invoice.since else []
    body = ""
    if invoice.receipts:
        body = draw_tiles(invoice) + draw_shares(invoice) + draw_plans(invoice.receipts) + draw_course(invoice.receipts)
        body += draw_answers(invoice) + draw_served(invoice)
    body += draw_keys(invoice)
    for receipts in (found for found in invoice.by_run.values() if found[0].stage != "serve"):  # those stand under Served
        stages = {"stages": [r.describe() for r in receipts], "total": asdict(total(receipts))}
        body += draw_receipt(stages, "Receipt" if invoice.run else f"Receipt of {receipts[0].run}")
    return page(title, [fact for fact in meta if fact], draw_summary(invoice), warnings, body, STYLE)


def _title(receipts: Sequence[Receipt]) -> str:
    return f"{receipts[0].run}, served" if receipts[0].stage == "serve" else receipts[0].run


def _name(stage: str) -> str:
    return NAMES.get(stage, stage)


def shares(receipts: Iterable[Receipt], key: Callable[[Receipt], str]) -> dict[str, float]:
    """Money by a property of its receipts, in order of appearance."""
    found: dict[str, float] = {}
    for receipt in receipts:
        found[key(receipt)] = found.get(key(receipt), 0.0) + receipt.money
    return found


def draw_summary(invoice: Invoice) -> str:
    """What it cost, what took most of it, and how well that was foreseen."""
    totals = invoice.total
    if not invoice.receipts:
        if invoice.keys is None:
            return '<p class="summary">Nothing was spent.</p>'
        spent = sum(row.money for row in invoice.keys or [])
        return f'<p class="summary">{len(invoice.keys or []):,} keys were charged {dollars(spent)} for what they asked for.</p>'
    runs = len({r.run_id for r in invoice.receipts if r.stage != "serve"})
    parts = ["This run" if invoice.run else _count(runs, "run")] if runs else []
    parts += [_count(len(invoice.sessions), "server session")] if invoice.sessions else []
    words = f"{' and '.join(parts)} cost <b>{dollars(totals.money)}</b> and took {duration(totals.seconds)}"
    words += f", {number(totals.device_hours)} device-hours" if any(r.device_count > 1 for r in invoice.receipts) else ""
    by_stage = shares(invoice.receipts, lambda r: r.stage)
    most = max(by_stage, key=lambda stage: by_stage[stage])
    if totals.money:
        words += f". {share(by_stage[most] / totals.money)} of the money went into {escape(_name(most).lower())}"
        words += f", where the device stood idle {share(1 - invoice.busy)} of the time" if most == "serve" else ""
    return f'<p class="summary">{words}.</p>'


def share(part: float) -> str:
    """Whole percents, as people say them."""
    return "below 1%" if 0 < part < 0.01 else "over 99%" if 0.99 < part < 1 else f"{part:.0%}"


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'s' * (number != 1)}"


def draw_tiles(invoice: Invoice) -> str:
    totals, tiles = invoice.total, []
    prices = {r.price_per_hour for r in invoice.receipts}
    tiles.append(tile("cost", dollars(totals.money), f"at {dollars(prices.pop())} a device-hour" if len(prices) == 1 else ""))
    known = [(r.planned.money, r) for r in invoice.receipts if r.planned and r.difference("money") is not None]
    if known:
        planned, actual = sum(money for money, _ in known), sum(r.money for _, r in known)
        note = f"{dollars(actual)} for {dollars(planned)} planned, of stages that had a plan"
        tiles.append(tile("against the plan", format_difference(actual / planned - 1), note))
    if best := [a for a in invoice.answers if a.model != "before" and a.money_per_correct is not None]:
        value, words = scaled(best[-1].money_per_correct or 0.0)
        note = f"{best[-1].correct:,} of {best[-1].answers:,} right: {escape(best[-1].task)}"
        tiles.append(tile(f"{words} right answer{'s' * (words != 'a')}", value, note))
    if gains := [g for g in invoice.gains if g.points > 0]:
        note = f"{gains[-1].points:+.3g} points for {dollars(gains[-1].money)}: {escape(gains[-1].task)}"
        tiles.append(tile("a point of accuracy by RL", dollars(gains[-1].money / gains[-1].points), note))
    if invoice.tokens:
        note = f"idle time counted; busy {share(invoice.busy)} of the time"
        tiles.append(tile("a million served tokens", dollars(invoice.served.money / invoice.tokens * 1e6), note))
    return f'<div class="tiles">{"".join(tiles)}</div>'


def draw_stack(parts: Sequence[tuple[str, float, str, str]]) -> str:
    """One bar cut into parts (name, amount above 0, what it says, colour), and their names below."""
    whole = sum(amount for _, amount, _, _ in parts)
    cuts = "".join(f'<i style="flex:{amount / whole:.5f};background:var(--{colour})"></i>' for _, amount, _, colour in parts)
    words = ""
    for name, amount, text, colour in parts:
        words += f'<span><i style="background:var(--{colour})"></i>{escape(name)} <b>{share(amount / whole)}</b>'
        words += f"<small>{escape(text)}</small></span>"
    return f'<div class="stack">{cuts}</div><div class="key">{words}</div>'


def draw_shares(invoice: Invoice) -> str:
    """Where the money went: by stage, and of several runs by run."""
    spent = {stage: money for stage, money in shares(invoice.receipts, lambda r: r.stage).items() if money > 0}
    if not spent:
        return ""
    body = draw_stack([(_name(stage), money, dollars(money), COLOURS.get(stage, "hot")) for stage, money in spent.items()])
    runs = [(_title(receipts), total(receipts).money) for receipts in invoice.by_run.values()]
    if len(runs) > 1 and not invoice.run:
        runs.sort(key=lambda run: -run[1])
        rest = [(f"{len(runs) - MOST + 1} others", sum(money for _, money in runs[MOST - 1 :]))] if len(runs) > MOST else []
        runs = runs[: MOST - len(rest)] + rest
        longest = max(money for _, money in runs) or 1.0
        body += f"<h3>By run</h3>{plot.draw_bars([(name, money / longest, dollars(money), None) for name, money in runs], ['accent'])}"
    return f"<section><h2>Where the money went</h2>{body}</section>"


def draw_plans(receipts: Sequence[Receipt]) -> str:
    """Of each stage that had a plan, money, time and memory, the plan as a thin bar above."""
    several = len({r.run_id for r in receipts if r.planned}) > 1
    figures = ""
    for title, field, show in (("Money", "money", dollars), ("Time", "seconds", duration), ("Peak memory", "memory", format_bytes)):
        pairs = [(r, getattr(r.planned, field), getattr(r, field)) for r in receipts if r.planned][-MOST:]
        pairs = [(r, planned, actual) for r, planned, actual in pairs if planned is not None and actual is not None]
        if not pairs or not (longest := max(max(planned, actual) for _, planned, actual in pairs)):
            continue
        rows = []
        for r, planned, actual in pairs:
            share = r.difference(field)
            if share is not None:
                word = f" {format_difference(share)}"
            else:
                word = f" of at most {show(planned)}" if r.planned and r.planned.bound else f" of {show(planned)}, not finished"
            name = f"{r.run}: {_name(r.stage)}" if several else _name(r.stage)
            rows.append((name, actual / longest, show(actual) + word, planned / longest))
        figures += f"<div><h3>{title}</h3>{plot.draw_bars(rows, ['accent'])}</div>"
    note = '<p class="note">The thin grey bar above each is the plan, made before the stage began.</p>'
    return f"<section><h2>Planned and actual</h2>{note}{figures}</section>" if figures else ""


def course(receipts: Sequence[Receipt]) -> list[tuple[float, float]]:
    """Money spent by each moment at which a stage began or ended (seconds since the first), each stage's spread evenly over its time."""
    spans = [(r.started, max(r.started + r.seconds, r.finished or 0.0), r.money) for r in receipts if r.money > 0]
    first = min((start for start, _, _ in spans), default=0.0)
    moments = sorted({moment for start, end, _ in spans for moment in (start, end)})
    return [
        (moment - first, sum(money * min(max((moment - start) / (end - start or 1.0), 0.0), 1.0) for start, end, money in spans))
        for moment in moments
    ]


def is_even(points: Sequence[tuple[float, float]]) -> bool:
    """Whether money went at one pace, as that of one run without a pause does: a straight line says nothing."""
    time, money = points[-1]
    return all(abs(spent / money - at / time) < 0.02 for at, spent in points)


def draw_course(receipts: Sequence[Receipt]) -> str:
    points = course(receipts)
    if len(points) < 2 or is_even(points):
        return ""
    size, unit = next(((size, unit) for size, unit in UNITS if points[-1][0] >= 2 * size), UNITS[-1])
    curve = Curve("spent", [(moment / size, money) for moment, money in points])
    start = f"{datetime.fromtimestamp(min(r.started for r in receipts), UTC):%Y-%m-%d %H:%M} UTC"
    chart = plot.draw_chart(f"Dollars, by {unit} since {start}", [curve], 220, zero=True, against=unit)
    return f"<section><h2>Money over time</h2>{chart}</section>"


def draw_answers(invoice: Invoice) -> str:
    """What a right answer cost of each model, and what reinforcement learning's points did."""
    rows, longest = [], max((a.money_per_correct or 0.0 for a in invoice.answers), default=0.0)
    several = len({a.run for a in invoice.answers}) > 1
    for a in invoice.answers[-MOST:]:
        when = {"before": "before RL", "after": "after RL"}.get(a.model, a.model)
        name = ", ".join(filter(None, [a.run if several and a.model in ("", "before", "after") else "", a.task, when]))
        cost, name = a.money_per_correct, f"{name}: {a.correct:,} of {a.answers:,}"
        text = "none right" if cost is None else " ".join(scaled(cost)).removesuffix(" a")
        rows.append((name, (cost or 0.0) / (longest or 1.0), text, None))
    body = f"<h3>Right answers, and what they cost each</h3>{plot.draw_bars(rows)}" if rows else ""
    if invoice.gains:
        body += "<h3>Points of accuracy</h3>" + "".join(f'<p class="note">{escape(tell_gain(gain))}.</p>' for gain in invoice.gains)
    return f"<section><h2>What it bought</h2>{body}</section>" if body else ""


def draw_served(invoice: Invoice) -> str:
    """Sessions with their idle time, and the price of a million tokens beside that of the same tokens elsewhere."""
    if not invoice.sessions:
        return ""
    served, tokens = invoice.served, invoice.tokens
    busy = sum(s.busy * s.receipt.money for s in invoice.sessions)
    parts = [("answering", busy, dollars(busy), "accent"), ("idle", served.money - busy, dollars(served.money - busy), "dim")]
    body = draw_stack([part for part in parts if part[1] > 0]) if served.money else ""
    if tokens and served.money:
        others = sorted(invoice.elsewhere, key=lambda model: model != invoice.compare)[: MOST - 1]  # that one first, then the cheapest
        prices = {"here": served.money} | {model: invoice.elsewhere[model] for model in others}
        longest = max(prices.values())
        rows = [(model, cost / longest, dollars(cost / tokens * 1e6), None) for model, cost in sorted(prices.items(), key=lambda p: p[1])]
        colours = ["accent" if name == "here" else "dim" for name, *_ in rows]
        note = "The same prompt, cached and generated tokens at API prices of the minute in which each was asked for. Other models answer "
        note += "better or worse, and need more tokens or fewer."
        body += f'<h3>A million tokens, here and elsewhere</h3><p class="note">{note}</p>{plot.draw_bars(rows, colours)}'
    heads = "".join(f"<th>{head}</th>" for head in ("", "from", "up", "busy", "requests", "tokens", "money", "a million tokens"))
    table = f'<table class="plain"><tr>{heads}</tr>{"".join(map(_session_row, invoice.sessions))}</table>'
    return f'<section><h2>Served</h2>{body}<h3>Sessions</h3><div class="scroll">{table}</div></section>'


def _session_row(session: Session) -> str:
    receipt, sums = session.receipt, session.sums
    end = "" if receipt.finished is not None else "<small>no end recorded</small>"
    cells = [f"{datetime.fromtimestamp(receipt.started, UTC):%Y-%m-%d %H:%M}", duration(receipt.seconds) + end, percent(session.busy)]
    cells += [f"{sums.requests if sums else 0:,}", number(session.tokens), dollars(receipt.money)]
    cells.append("&ndash;" if session.money_per_million is None else dollars(session.money_per_million))
    return f"<tr><th>{escape(receipt.run)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def draw_keys(invoice: Invoice) -> str:
    """What each key used, and its price elsewhere."""
    if not invoice.keys:
        return ""
    names = ("", "requests", "prompt", "cached", "output", "device time", "charged", invoice.compare)
    heads = "".join(f"<th>{escape(name)}</th>" for name in names)
    rows = ""
    for row in invoice.keys:
        cells = [f"{row.requests:,}", *(number(count) for count in (row.prompt, row.cached, row.completion)), duration(row.device_seconds)]
        cells += [dollars(row.money), dollars(invoice.keys_elsewhere[row.group])]
        rows += f"<tr><th>{escape(row.label)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
    return f'<section><h2>Keys</h2><div class="scroll"><table class="plain"><tr>{heads}</tr>{rows}</table></div></section>'
