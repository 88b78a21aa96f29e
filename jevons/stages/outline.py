"""A plan as people read it, in 80 columns, and as a JSON file has it.

    show(plan, console)        a table a section: stages, memory, serving, prices of others, what a budget buys
    to_dict(plan)              every figure

What a figure stands on is said below it: a plan whose assumptions are hidden is a guess with digits. Device memory is in GB of 10^9
bytes, as data sheets have it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from json import dumps
from pathlib import Path
from typing import Any

import tomli_w
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jevons.cost.arithmetic import parameters
from jevons.cost.hardware import Cluster
from jevons.cost.receipt import format_amount, format_count, format_flops, format_seconds
from jevons.cost.serving import Quote
from jevons.cost.training import StagePlan
from jevons.data.disk import write_json
from jevons.kernels import processor
from jevons.stages.plan import Options, Plan, check_here, find, make_plan

PARTS = {  # of Memory, as they are called in a table
    "weights": "weights",
    "gradients": "gradients",
    "moments": "masters, moments",
    "activations": "activations",
    "logits": "logits, head's gradient",
    "cache": "keys and values",
    "other": "process, reference model",
    "freed": "freed blocks that it keeps",
}


def tell(name: str | None, overrides: list[str], options: Options, *, calibrate: bool, json: Path | None) -> None:
    """`jevons plan`: make the plan, after measuring it here if asked to, print it, and write it; `json` may be "-", which prints that."""
    printed = str(json) == "-"
    if json and not printed and (json.is_dir() or not json.parent.is_dir()):
        what = "is a folder" if json.is_dir() else f"there is no folder {json.parent}"
        raise ValueError(f"--json {json}: {what}; name a file, or - to print")
    console = Console(stderr=printed)
    if calibrate:
        if name is None:
            raise ValueError("--calibrate: measures a recipe or a model; name one")
        recipe, _ = find(name, overrides, options)
        check_here(name, recipe, options)
        from jevons.stages.calibrate import calibrate as measure  # only here: it loads torch
        from jevons.stages.calibrate import calibrate_model

        if recipe is None:
            calibrate_model(name, options.root, console, weights=options.weights, prompt=options.prompt)
        else:
            measure(recipe, options.root, console, weights=options.weights, prompt=options.prompt)
    plan = make_plan(name, overrides, options)
    if printed:
        print(dumps(to_dict(plan), indent=2))
        return
    show(plan, console)
    if json:
        write_json(json, to_dict(plan))


def show(plan: Plan, console: Console) -> None:
    """Print it."""
    _head(plan, console)
    if plan.stages:
        console.print(_stages(plan))
        _notes(plan, console)
        if any(s.memory for s in plan.stages):
            _memory(plan.stages, plan.on, console)
    for shortage in plan.shortages:
        what, needed, room = shortage.stage, shortage.needed / 1e9, shortage.room / 1e9
        _say(console, f"[bold red]{what} does not fit[/]: it needs {needed:,.1f} GB on each {plan.on.device}, {room:,.1f} are usable.")
        if change := shortage.change:
            _say(console, f"  The smallest change that makes it fit: [bold]{escape(change.what)}[/] ({change.memory / 1e9:,.1f} GB)")
        else:
            _say(console, "  No smaller batch, recomputation, adapter or number of these devices would do.")
    if plan.suggestion:
        _budget(plan, console)
    if plan.serving:
        _serving(plan, console)


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False)


def _heading(console: Console, text: str) -> None:
    """Above a table: a title of its own would be broken at the table's width."""
    console.print(f"[italic]{text}[/]", highlight=False)


def _table(columns: Sequence[str], *, footer: bool = False) -> Table:
    """Without names of columns, without a head."""
    form = box.SIMPLE_HEAD if any(columns) else box.SIMPLE
    table = Table(box=form, show_header=any(columns), show_footer=footer, pad_edge=False, collapse_padding=True)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    return table


def _head(plan: Plan, console: Console) -> None:
    device = plan.on.device
    size = ""
    if plan.config:
        count = parameters(plan.config)
        size = f": {format_count(count.total)} parameters"
        size += f", {format_count(count.active)} of them for a token" if count.active < count.total else ""
    _say(console, f"[bold]{escape(plan.name)}[/]{size}")
    spot = f" (spot ${device.spot:.2f})" if device.spot is not None else ""
    rent = "no price known" if device.on_demand is None else f"${device.on_demand:.2f} an hour{spot}"
    peak = format_flops(device.peak["bf16"])  # on a processor without products in bf16 that of fp32
    precision = "fp32" if plan.on.device.name.startswith("CPU") and not processor.multiplies_bf16() else "bf16"
    reach = f"{device.memory / 1e9:,.0f} GB, {device.bandwidth / 1e9:,.0f} GB/s, {peak}S in {precision}"
    _say(console, f"on {_cluster(plan.on)}: {reach}; {rent}")
    if plan.stages:
        fits = "Everything fits" if not plan.shortages else f"[red]{' and '.join(s.stage for s in plan.shortages)} does not fit[/]"
        prices = ((plan.total(), ""), (plan.total(spot=True), " spot"))
        known = [f"{_money(dollars)}{kind}" for dollars, kind in prices if dollars is not None]
        _say(console, f"[bold]In all {', '.join((format_seconds(_seconds(plan)), *known))}. {fits}.[/]")
    console.print()


def _seconds(plan: Plan) -> float:
    return sum(s.seconds for s in plan.stages) + sum(a.device_hours for a in plan.additions) / plan.on.count * 3600


def _stages(plan: Plan) -> Table:
    """A column of device-hours only where they differ from the time."""
    several = plan.on.count > 1
    spot = plan.total(spot=True) is not None
    columns = ("stage", "tokens", "FLOP", "tok/s", "peak", "time", *(("device-h",) if several else ()), "$", *(("$ spot",) if spot else ()))
    table = _table(columns, footer=True)
    first = table.columns[0]
    words = " ".join(("evaluate", *(f"- {part}" for s in plan.stages for part in s.parts), *(a.name for a in plan.additions))).split()
    first.no_wrap, first.min_width = False, max(map(len, words))
    for s in plan.stages:
        table.add_row(
            s.stage,
            *(_short(s.tokens) if s.tokens else "-", _flops(s.flops), _short(s.tokens_per_second) if s.tokens else "-"),
            *(f"{s.share:.1%}" if s.flops else "-", format_seconds(s.seconds), *([_short(s.device_hours)] if several else [])),
            *(_amount(s.money()), *((_amount(s.money(spot=True)),) if spot else ())),
        )
        for part, seconds in s.parts.items():
            table.add_row(f"- {part}", "", "", "", "", format_seconds(seconds), style="dim")
    for a in plan.additions:
        rates = (plan.on.device.on_demand, *((plan.on.device.spot,) if spot else ()))
        table.add_row(
            *(a.name, "", "", "", "", format_seconds(a.device_hours / plan.on.count * 3600)),
            *((_short(a.device_hours),) if several else ()),
            *(_amount(None if rate is None else rate * a.device_hours) for rate in rates),
        )
    hours = sum(s.device_hours for s in plan.stages) + sum(a.device_hours for a in plan.additions)
    footers = ["total", "", "", "", "", format_seconds(_seconds(plan)), *([_short(hours)] if several else [])]
    footers += [_amount(plan.total()), *([_amount(plan.total(spot=True))] if spot else [])]
    for column, text in zip(table.columns, footers):
        column.footer = text
    return table


def _notes(plan: Plan, console: Console) -> None:
    """What the figures stand on."""
    by_basis: dict[str, list[str]] = {}
    for s in plan.stages:
        by_basis.setdefault(s.basis, []).append(s.stage)
    lines = [f"{', '.join(stages)}: {basis}" for basis, stages in by_basis.items()]
    lines += [f"{a.name}: stated, {a.note}" for a in plan.additions]
    lines += [f"assumed {text}" for text in plan.assumed]
    if any(s.on != plan.on for s in plan.stages if s.stage == "prepare"):
        lines.append("prepare is counted on processors, two cores a device")
    if plan.on.count > 1:
        lines.append("several devices share the work without loss; `jevons run` itself trains on one")
    for line in lines:
        console.print(f"[dim]- {escape(line)}[/]", highlight=False)
    console.print()


def _memory(stages: Sequence[StagePlan], on: Cluster, console: Console) -> None:
    held = [(s, s.memory) for s in stages if s.memory]
    unit, size = (1e9, "GB") if max(m.total for _, m in held) >= 2e9 else (1e6, "MB")
    table = _table(("", *(s.stage for s, _ in held)))

    def row(name: str, values: Sequence[float | None], style: str = "") -> None:
        if any(values):
            table.add_row(name, *(f"{v / unit:,.{2 if unit == 1e9 else 0}f}" if v else "-" for v in values), style=style)

    for part, name in PARTS.items():
        row(name, [getattr(m, part) for _, m in held])
    row("gradients in activations' place", [-m.reused for _, m in held], "dim")
    row("total", [m.total for _, m in held], "bold")
    row("as measured", [s.measured_memory for s, _ in held], "bold")
    _heading(console, f"{size} of memory on one device, of {on.device.memory / unit:,.0f}")
    console.print(table)


def _serving(plan: Plan, console: Console) -> None:
    assert plan.serving and plan.request and plan.comparison
    found, request = plan.serving, plan.request
    cluster, asked = _cluster(found.cluster), f"{request.prompt:,} tokens in ({request.cached:,} cached), {request.output:,} out"
    if (quote := found.quote) is None:
        _say(console, f"[bold red]{escape(plan.name)} in {found.format} cannot be served on {cluster}[/]: {found.problem}.")
        if found.alternatives:
            _heading(console, "What would do, the cheapest for such requests first")
            table = _table(("devices", "weights", "sequences\nat once", "tokens/s", "$ a million\noutput", "$ a thousand\nrequests"))
            for q in found.alternatives:
                row = (q.format, f"{q.sequences:,}", _short(q.tokens_per_second), _price(q.price_output))
                table.add_row(f"{q.devices} x {q.device}", *row, "-" if q.price_request is None else _price(1000 * q.price_request))
            console.print(table)
    else:
        _heading(console, f"Serving in {found.format} on {cluster}, for requests of {asked}")
        table = _table(("", ""))
        for name, value in _quoted(quote):
            table.add_row(name, value)
        console.print(table)
        console.print(f"[dim]- {escape(plan.serving_basis)}[/]\n", highlight=False)
    _compared(plan, console)


def _quoted(quote: Quote) -> list[tuple[str, str]]:
    return [
        ("layout", str(quote.layout)),
        ("weights on a device", f"{quote.weights / 1e9:,.1f} GB" if quote.weights >= 1e9 else f"{quote.weights / 1e6:,.1f} MB"),
        ("cache of a token on a device", f"{quote.cache_per_token / 1e3:,.1f} KB"),
        ("sequences that fit", f"{quote.sequences:,}"),
        ("sequences at once, as planned", f"{quote.batch:,}"),
        ("crossover: more cache is read than weights from", f"{quote.crossover:,.0f}"),
        ("time per token", f"{quote.time_per_token * 1e3:,.1f} ms, waiting for {quote.bound}"),
        ("tokens/s generated", _short(quote.tokens_per_second)),
        ("tokens/s read", _short(quote.prefill_tokens_per_second)),
        ("$ per million input tokens", _price(quote.price_input)),
        ("$ per million cached input tokens", _price(quote.price_cached)),
        ("$ per million output tokens", _price(quote.price_output)),
    ]


def _compared(plan: Plan, console: Console) -> None:
    comparison = plan.comparison
    assert comparison
    own, traffic = comparison.own, comparison.traffic
    cached = traffic.cached / traffic.prompt
    _heading(console, f"At others' prices: {_short(traffic.prompt + traffic.output)} tokens a day, {cached:.0%} of input cached")
    table = _table(("", "$ a day", "$ per million", *(("ours costs less when busy",) if own else ())))
    if own:
        device = plan.serving.quote.device if plan.serving and plan.serving.quote else ""
        name = f"ours, {own.devices} x {'CPU' if device.startswith('CPU') else device} all day"
        busy = f"is busy {own.busy:.0%}" if own.busy >= 0.01 else "is busy below 1%"
        table.add_row(name, format_amount(own.dollars), _price(own.per_million(traffic)), busy, style="bold")
    for bill in comparison.bills:
        share = comparison.break_even(bill)
        never = share is not None and share > 1
        text = "never" if never else f"{share:.1%} of the time" if share else ""
        table.add_row(bill.model, format_amount(bill.dollars), _price(bill.per_million), *((text,) if own else ()))
    console.print(table)


def _budget(plan: Plan, console: Console) -> None:
    suggestion = plan.suggestion
    assert suggestion and plan.budget
    options = (suggestion.best, suggestion.other)
    kinds = {"moe": "mixture of experts", "dense": "dense"}
    _heading(console, f"The best model for ${format_amount(plan.budget)}, and the best of the other kind")
    table = _table(("", *(kinds[o.kind] for o in options)))
    rows = {
        "parameters": [format_count(o.parameters.total) for o in options],
        "of them for a token": [format_count(o.parameters.active) for o in options],
        "tokens": [format_count(round(o.tokens)) for o in options],
        "FLOPs": [_flops(o.flops) for o in options],
        "hours": [_short(o.hours) for o in options],
        "loss by Chinchilla's law, nats": [f"{o.loss.middle:.2f} ({o.loss.low:.2f} to {o.loss.high:.2f})" for o in options],
        "GB of memory a device": [f"{o.memory / 1e9:,.1f}" for o in options],
    }
    for name, values in rows.items():
        table.add_row(name, *values)
    console.print(table)
    _say(console, escape(str(suggestion)))
    if plan.stages and (cost := plan.total()):
        _say(console, f"The recipe as it stands costs ${format_amount(cost)}, {cost / plan.budget:.2g} of the budget.")
    console.print("\nIts recipe begins:", highlight=False)
    console.print(escape(tomli_w.dumps({"model": suggestion.best.model()})), highlight=False)


def to_dict(plan: Plan) -> dict[str, Any]:
    """Everything, ready for JSON: bytes, FLOPs, seconds, dollars."""
    out: dict[str, Any] = {"name": plan.name, "devices": plan.on.count, "device": _plain(plan.on.device)}
    if plan.config:
        out["parameters"] = dataclasses.asdict(parameters(plan.config))
    out["stages"] = [
        {
            **{name: getattr(s, name) for name in ("stage", "tokens", "flops", "seconds", "parts", "basis", "measured_memory")},
            **{name: getattr(s, name) for name in ("tokens_per_second", "device_hours", "memory_needed")},
            "share_of_peak": s.share,
            "on": str(s.on),
            "on_demand": s.money(),
            "spot": s.money(spot=True),
            "memory": s.memory and dataclasses.asdict(s.memory) | {"total": s.memory.total},
        }
        for s in plan.stages
    ]
    out["additions"] = [a.model_dump() for a in plan.additions]
    out["total"] = {"on_demand": plan.total(), "spot": plan.total(spot=True)} if plan.stages else None
    out["does_not_fit"] = [dataclasses.asdict(s) for s in plan.shortages]
    out["assumed"] = list(plan.assumed)
    if plan.serving:
        out["request"], out["serving"] = _plain(plan.request), _plain(plan.serving)
        out["serving"]["basis"] = plan.serving_basis
        out["comparison"] = _plain(plan.comparison)
    if plan.suggestion:
        out["budget"] = {"dollars": plan.budget, "says": str(plan.suggestion), **_plain(plan.suggestion)}
        out["budget"]["model"] = plan.suggestion.best.model()
    return out


def _plain(value: Any) -> Any:
    """A dataclass as what JSON has; dates as text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if value is None or isinstance(value, str | int | float) else str(value)


def _cluster(on: Cluster) -> str:
    return f"{on.count:,} x {on.device}" if on.count > 1 else str(on.device)


def _short(amount: float) -> str:
    """Three digits: 2.67M, 12.4, 0.188, below a hundredth 0.00."""
    return format_count(round(amount)) if amount >= 1000 else f"{amount:.3g}" if amount >= 0.01 else f"{amount:.2f}"


def _flops(flops: float) -> str:
    """Three digits: 3.86Y, 152T."""
    if not flops:
        return "-"
    number, prefix = format_flops(flops).removesuffix("FLOP").replace(",", "").split(" ")
    return f"{float(number):.3g}{prefix}"


def _amount(dollars: float | None) -> str:
    """Three digits or cents: 5.34M, 28.45, 0.019; below a hundredth of a cent 0.0000."""
    if dollars is None:
        return "-"
    return _short(dollars) if dollars >= 1000 else f"{dollars:.2f}" if dollars >= 1 else f"{dollars:.4f}"


def _money(dollars: float) -> str:
    return f"${_amount(dollars)}"


def _price(dollars: float | None) -> str:
    if dollars is None:
        return "-"
    if 0 < dollars < 5e-4:
        return "<0.001"
    return f"{dollars:,.3f}" if dollars < 10 else f"{dollars:,.2f}"
