"""The page that a run leaves behind.

A stranger must see within ten seconds what was trained, how well it went and what it cost; so `report.html` opens with one
sentence and a row of numbers, then shows answers, curves, experts and the receipt. It is read from the run's folder alone,
at any moment of the run: what is not there yet is left out. Everything in it is text somebody else wrote (a model's replies
above all), so every string is escaped and a Content-Security-Policy admits our one script by its hash and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from jevons import plot
from jevons.chapter import clip, draw_reply, draw_stage, mark
from jevons.cost.receipt import format_bytes, format_difference
from jevons.data.disk import write_text
from jevons.plot import dollars, duration, number, percent, scientific, smooth
from jevons.record import Record, Stage, read_run

STAGES = {  # the field's verb for the summary, its noun for headings
    "pretrain": ("pretrained", "Pretraining"),
    "sft": ("fine-tuned", "Supervised fine-tuning"),
    "distill": ("distilled", "Distillation"),
    "rl": ("taught by reinforcement", "Reinforcement learning"),
}
QUANTITIES = {  # of the receipt
    "tokens": "tokens", "flops": "FLOPs", "seconds": "time", "tokens_per_second": "tokens per second", "tflops": "TFLOPS",
    "share_of_peak": "share of peak", "memory": "peak memory", "device": "device", "device_hours": "device-hours",
    "price_per_hour": "price of an hour", "money": "money",
}  # fmt: skip
SHOWN: dict[str, Callable[[Any], str]] = {
    "flops": scientific, "seconds": duration, "share_of_peak": percent, "memory": format_bytes, "device": str,
    "price_per_hour": dollars, "money": dollars,
}  # fmt: skip


def tile(label: str, value: str, note: str = "", extra: str = "") -> str:
    return f'<div class="tile"><span>{label}</span><strong>{value}</strong>{extra}<small>{note}</small></div>'


def interval(task: dict[str, Any], kind: str = "") -> str:
    """A 0..100% track with a task's interval as a band and its accuracy as a mark."""
    low, high, at = (100 * task[name] for name in ("low", "high", "accuracy"))
    return f'<div class="track{kind}"><i style="left:{low:.1f}%;width:{high - low:.1f}%"></i><b style="left:{at:.1f}%"></b></div>'


def pairs(run: Record) -> list[tuple[dict[str, Any] | None, dict[str, Any]]]:
    """The results of each task, those of the model that reinforcement learning began with beside them where there are."""
    after, before = run.evaluation.get("tasks", []), run.evaluation.get("before", {}).get("tasks", [])
    return list(zip(before or [None] * len(after), after))


def draw_summary(run: Record) -> str:
    """What was trained, how well it went, what it cost, in one sentence each."""
    model = run.recipe.get("model", {})
    experts, chosen = model.get("n_routed_experts"), model.get("num_experts_per_tok")
    size = run.environment.get("parameters")
    kind = "mixture of experts" if experts else "language model"
    words = f"A{'n' * (number(size)[0] == '8')} {number(size)}-parameter {kind}" if size else f"A {kind}"
    parts = [f"{model['num_hidden_layers']} layers"] if "num_hidden_layers" in model else []
    parts += [f"{model['hidden_size']} wide"] if "hidden_size" in model else []
    parts += [f"{experts} experts of which {chosen} serve each token"] if experts and chosen else []
    words += f" ({', '.join(escape(part) for part in parts)})" if parts else ""
    verbs = [STAGES.get(name, (name, name))[0] for name in run.stages]
    if verbs:
        words += f", {escape(' and '.join([', '.join(verbs[:-1]), verbs[-1]] if verbs[1:] else verbs))}"
    tokens, seconds, money = run.total("tokens", training=True), run.total("seconds"), run.total("money")
    words += f" on {number(tokens)} tokens" if tokens else ""
    words += f" in {duration(seconds)}" if seconds else ""
    words += f" for {dollars(money)}" if money is not None else ""
    solved = []
    for before, task in pairs(run):
        solved.append(f"{percent(task['accuracy'])} of {escape(task['task'])}")
        solved[-1] += f" ({percent(before['accuracy'])} before reinforcement learning)" if before else ""
    words += f". It solves {', '.join(solved)}" if solved else ""
    return f'<p class="summary">{words}.</p>'


def draw_tiles(run: Record) -> str:
    tiles = []
    for before, task in pairs(run):
        value, extra = percent(task["accuracy"]), interval(task)
        note = f"{percent(task['low'])} to {percent(task['high'])}, {task['problems']:,} problems"
        if before:
            value, extra = f"{percent(before['accuracy'])} &rarr; {value}", interval(before, " was") + extra
            gain, low, high = (100 * task["gain"][name] for name in ("value", "low", "high"))
            note = f"{gain:+.3g} points ({low:+.3g} to {high:+.3g}), {task['problems']:,} problems"
        tiles.append(tile(escape(task["task"]), value, note, extra))
    stages = [s for s in run.stages.values() if ("loss" in s.series or "validation_loss" in s.series) and "reward" not in s.series]
    stage = stages[0] if stages else Stage()
    loss = run.evaluation.get("validation_loss", stage.last("validation_loss"))
    if loss is not None:
        bits = run.evaluation.get("bits_per_byte", stage.last("bits_per_byte"))
        tiles.append(tile("validation loss", number(loss), f"{number(bits)} bits per byte" if bits is not None else "nats per token"))
    elif stage.points("loss"):
        tiles.append(tile("training loss", number(smooth(stage.points("loss"))[-1][1]), "mean of the last steps"))
    tokens, seconds, money = run.total("tokens", training=True), run.total("seconds"), run.total("money")
    if tokens:
        steps = sum(max(map(max, stage.series.values())) for stage in run.stages.values() if stage.series)
        tiles.append(tile("tokens", number(tokens), f"{steps:,} steps" if steps else ""))
    if seconds:
        hours = run.receipt.get("total", {}).get("device_hours")
        tiles.append(tile("time", duration(seconds), f"{number(hours)} device-hours" if hours is not None else ""))
    if money is not None:
        prices = {stage["price_per_hour"] for stage in run.receipt.get("stages", []) if stage["price_per_hour"] is not None}
        tiles.append(tile("money", dollars(money), f"at {dollars(prices.pop())} an hour" if len(prices) == 1 else ""))
    if tokens and (spent := run.total("seconds", training=True)):
        peaks = [s["share_of_peak"] for s in run.receipt.get("stages", []) if s["stage"] in run.stages and s["share_of_peak"]]
        note = f"training, {percent(peaks[0])} of the device's peak" if peaks else "training"
        tiles.append(tile("tokens per second", number(tokens / spent), note))
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def draw_bars(before: dict[str, Any], task: dict[str, Any], field: str) -> str:
    """Accuracies by difficulty or category, those before above those after."""
    was = before.get(field, {})
    rows = [(str(level), share, percent(share), was.get(level)) for level, share in task.get(field, {}).items()]
    return f'<p class="note">by {field.removeprefix("by_")}</p>{plot.draw_bars(rows)}' if rows else ""


def draw_examples(task: dict[str, Any]) -> str:
    """Replies to a few problems, folded, the mistakes first."""
    chosen = sorted(task.get("examples", []), key=lambda example: bool(example["correct"]))[:10]
    rows = "".join(
        f'<li>{mark(example["correct"])}<div><pre><b>{clip(example["prompt"], 1000)}</b></pre>{draw_reply(str(example["reply"]))}'
        f'<small>expected {clip(example["answer"], 300)}</small></div></li>'
        for example in chosen
    )
    return f"<details><summary>Replies, mistakes first</summary><ol>{rows}</ol></details>" if rows else ""


def draw_evaluation(run: Record) -> str:
    """Each task by difficulty and category, with examples; before reinforcement learning in grey."""
    cards = []
    for before, task in pairs(run):
        facts = f"{percent(task['accuracy'])} of {task['problems']:,}"
        facts += f", {number(task['mean_tokens'])} tokens a reply" if task.get("mean_tokens") is not None else ""
        facts += f"; before {percent(before['accuracy'])}" if before else ""
        facts += f", {number(before['mean_tokens'])} tokens" if before and before.get("mean_tokens") is not None else ""
        bars = "".join(draw_bars(before or {}, task, field) for field in ("by_difficulty", "by_category"))
        cards.append(f"<article><h4>{escape(task['task'])}<small>{facts}</small></h4>{bars}{draw_examples(task)}</article>")
    return f'<section><h2>Evaluation</h2><div class="samples">{"".join(cards)}</div></section>' if cards else ""


def draw_receipt(receipt: dict[str, Any], title: str = "Receipt") -> str:
    """What each stage cost, planned beside actual: stages across, quantities down."""
    if not receipt:
        return ""
    stages, rows = receipt["stages"], []
    for key, label in QUANTITIES.items():
        show = SHOWN.get(key, number)
        values, cells = [stage.get(key) for stage in stages], ""
        if key == "device" and len(stages) > 1 and len(set(values)) == 1:
            continue  # the page's head says it, and it is long
        if key in ("flops", "tflops"):
            values = [value or None for value in values]  # where none are counted
        for stage, value in zip(stages, values):
            plan = (stage.get("planned") or {}).get(key)
            word = "at most" if (stage.get("planned") or {}).get("bound") and key != "memory" else "planned"
            planned = f"<small>{word} {escape(show(plan))}{_difference(stage, key)}</small>" if plan is not None else ""
            cells += f"<td>{escape(show(value)) if value is not None else '&ndash;'}{planned}</td>"
        total = receipt["total"].get(key, sum(v for v in values if v is not None) if key in ("tokens", "flops") else None)
        cells += f"<td>{escape(show(total)) if total is not None else ''}</td>" if len(stages) > 1 else ""
        if any(value is not None for value in [*values, total]):
            rows.append(f"<tr><th>{label}</th>{cells}</tr>")
    heads = "".join(f"<th>{escape(stage['stage'])}</th>" for stage in stages) + ("<th>total</th>" if len(stages) > 1 else "")
    table = f'<div class="scroll"><table><tr><th></th>{heads}</tr>{"".join(rows)}</table></div>'
    return f"<section><h2>{escape(title)}</h2>{table}</section>"


def _difference(stage: dict[str, Any], key: str) -> str:
    share = (stage.get("difference") or {}).get(key)
    return f", {format_difference(share)}" if share else ""


def draw_sources(run: Record) -> str:
    """The recipe and the environment, folded: enough to run it again."""
    parts = []
    if run.recipe_text is not None:
        parts.append(f'<details><summary>Recipe</summary><pre class="source">{escape(run.recipe_text)}</pre></details>')
    if run.environment:
        text = json.dumps(run.environment, indent=2, ensure_ascii=False)
        parts.append(f'<details><summary>Environment</summary><pre class="source">{escape(text)}</pre></details>')
    return f"<section><h2>Run it again</h2>{''.join(parts)}</section>" if parts else ""


def render(run: Record) -> str:
    """The whole page."""
    facts = [run.environment.get(name) for name in ("device", "commit", "date")]
    meta = ["Jevons run", *(fact for fact in facts if isinstance(fact, str) and fact)]
    notes = [] if run.receipt or not run.stages else ["No receipt yet: the run is going on or was stopped. Numbers are the latest written."]
    notes += ["The last line of metrics.jsonl was cut short by a kill and is skipped."] if run.torn else []
    stages = "".join(draw_stage(STAGES.get(name, (name, name))[1], stage) for name, stage in run.stages.items())
    body = f"{draw_tiles(run)}{draw_evaluation(run)}{stages}{draw_receipt(run.receipt)}{draw_sources(run)}"
    return page(run.name, meta, draw_summary(run), notes, body)


def page(title: str, meta: Sequence[str], summary: str, warnings: Sequence[str], body: str, style: str = "") -> str:
    """A page that stands alone. `summary` and `body` are HTML, `style` is CSS beside the common one, the rest is text."""
    notes = "".join(f'<p class="note warn">{escape(warning)}</p>' for warning in warnings)
    digest = base64.b64encode(hashlib.sha256(plot.SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none';style-src 'unsafe-inline';script-src 'sha256-{digest}'"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{plot.STYLE}{style}</style></head><body><main>"
        f'<header><p class="meta">{" &middot; ".join(clip(fact, 80) for fact in meta)}</p><h1>{escape(title)}</h1>{summary}</header>{notes}'
        f"{body}</main><script>{plot.SCRIPT}</script></body></html>\n"
    )


def write_report(folder: Path) -> Path:
    """Writes `folder`/report.html from what the run has left there so far and returns its path. The page replaces the old one
    in one step: a reader never sees half of it. Raises ValueError, naming file and line, for what cannot be read."""
    path = folder / "report.html"
    write_text(path, render(read_run(folder)).encode(errors="replace").decode())  # a reply may hold half a surrogate pair
    return path
