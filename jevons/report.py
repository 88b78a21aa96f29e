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
import math
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from jevons import plot
from jevons.data.disk import write_text
from jevons.plot import Curve, Point, dollars, duration, number, percent, scientific, smooth

STAGES = {  # the field's verb for the summary, its noun for headings
    "pretrain": ("pretrained", "Pretraining"),
    "sft": ("fine-tuned", "Supervised fine-tuning"),
    "distill": ("distilled", "Distillation"),
    "rl": ("taught by reinforcement", "Reinforcement learning"),
}
FIELDS: dict[str, tuple[str, dict[str, Any]]] = {  # small charts: title, plot.draw_chart's options
    "lr": ("Learning rate", {"zero": True}),
    "tokens_per_second": ("Tokens per second", {"zero": True}),
    "grad_norm": ("Gradient norm", {"log_ratio": 10}),
    "mtp_loss": ("Multi-token-prediction loss", {"log_ratio": 3}),
    "balance_loss": ("Balance loss", {"log_ratio": 30}),
    "max_violation": ("Worst overload of an expert", {"zero": True}),
}
QUANTITIES = {  # of the receipt
    "tokens": "tokens", "flops": "FLOPs", "seconds": "time", "tokens_per_second": "tokens per second", "tflops": "TFLOPS",
    "share_of_peak": "share of peak", "device": "device", "device_hours": "device-hours", "price_per_hour": "price of an hour",
    "money": "money",
}  # fmt: skip
SHOWN: dict[str, Callable[[Any], str]] = {
    "flops": scientific, "seconds": duration, "share_of_peak": percent, "device": str, "price_per_hour": dollars, "money": dollars,
}  # fmt: skip
ELSEWHERE = {"loss", "validation_loss", "bits_per_byte", "tokens", "seconds", "money"}  # drawn large or told in words
DEAD = 0.05  # of its fair share: an expert that gets less at the end is called dead
PROBLEMS, ROUNDS = 4, 12  # sampled problems a stage, replies a problem
LETTERS = 3000  # of one reply


@dataclass
class Stage:
    """One stage's metrics, by step. A step written twice (a resumed run repeats some) keeps its last value."""

    series: dict[str, dict[int, float]] = field(default_factory=dict)
    loads: dict[int, list[list[float]]] = field(default_factory=dict)  # step -> [layer][expert]
    samples: dict[str, dict[int, dict[str, Any]]] = field(default_factory=dict)  # prompt -> step -> sample

    def points(self, name: str) -> list[Point]:
        """The finite values of a field, by step."""
        return [(step, value) for step, value in sorted(self.series.get(name, {}).items()) if math.isfinite(value)]

    def last(self, name: str) -> float | None:
        values = self.series.get(name)
        return values[max(values)] if values else None


@dataclass
class Run:
    """All that a run's folder says, in memory. Missing files are None or empty."""

    name: str
    recipe_text: str | None
    recipe: dict[str, Any]
    environment: dict[str, Any]
    stages: dict[str, Stage]
    torn: int  # lines at the end of metrics.jsonl that a kill cut short
    evaluation: dict[str, Any]
    receipt: dict[str, Any]

    def total(self, name: str, *, training: bool = False) -> float | None:
        """Tokens, seconds or money of the whole run, or of its training stages alone: the receipt's, or the metrics' latest."""
        if self.receipt:
            if name in self.receipt["total"] and not training:
                return self.receipt["total"][name]
            values = [stage[name] for stage in self.receipt["stages"] if not training or stage["stage"] in self.stages]
        else:
            values = [stage.last(name) for stage in self.stages.values()]
        known = [value for value in values if value is not None]
        return sum(known) if known else None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty where there is no file. Raises ValueError naming the file where it is not one."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); delete it or write it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a {type(value).__name__}, not an object; delete it or write it again")
    return value


def read_metrics(path: Path) -> tuple[dict[str, Stage], int]:
    """The stages of a metrics.jsonl in order of appearance, and the number of torn lines: 1 if a kill cut the last one short.

    Raises ValueError naming file and line for any other line that is no metrics row.
    """
    stages: dict[str, Stage] = {}
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    last = max((i for i, line in enumerate(lines, 1) if line.strip()), default=0)
    for i, line in enumerate(lines[:last], 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            if i == last:
                return stages, 1
            raise ValueError(f"{path} line {i}: not JSON ({error}); remove the line") from error
        if not isinstance(row, dict) or not isinstance(row.get("stage"), str) or not isinstance(row.get("step"), int):
            raise ValueError(f"{path} line {i}: needs a string `stage` and a whole `step`; remove the line")
        stage, step = stages.setdefault(row["stage"], Stage()), row["step"]
        if row.get("loads"):  # a dense model has none
            shape = [len(layer) for layer in row["loads"]]
            if stage.loads and shape != [len(layer) for layer in next(iter(stage.loads.values()))]:
                raise ValueError(f"{path} line {i}: `loads` has {shape} experts by layer, other rows of this stage differ; remove the line")
            stage.loads[step] = row["loads"]
        elif "sample" in row:
            stage.samples.setdefault(str(row["sample"]["prompt"]), {})[step] = row["sample"]
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                stage.series.setdefault(name, {})[step] = value
    return stages, 0


def read_run(folder: Path) -> Run:
    """Reads a run's folder, whatever part of it is there. Raises ValueError naming the file that cannot be read."""
    path = folder / "recipe.toml"
    text = path.read_text(encoding="utf-8") if path.exists() else None
    try:
        recipe = tomllib.loads(text or "")
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: not TOML ({error}); restore it from the recipe that was run") from error
    stages, torn = read_metrics(folder / "metrics.jsonl")
    return Run(
        name=str(recipe.get("name") or folder.resolve().name),
        recipe_text=text,
        recipe=recipe,
        environment=read_json(folder / "environment.json"),
        stages=stages,
        torn=torn,
        evaluation=read_json(folder / "evaluate" / "results.json"),
        receipt=read_json(folder / "receipt.json"),
    )


def clip(value: Any, letters: int = LETTERS) -> str:
    """Escaped text, cut after so many letters with a word on what is missing."""
    text = str(value)
    rest = f" <em>({len(text) - letters:,} more characters)</em>" if len(text) > letters else ""
    return escape(text[:letters]) + rest


def tile(label: str, value: str, note: str = "", extra: str = "") -> str:
    return f'<div class="tile"><span>{label}</span><strong>{value}</strong>{extra}<small>{note}</small></div>'


def interval(task: dict[str, Any]) -> str:
    """A 0..100% track with a task's interval as a band and its accuracy as a mark."""
    low, high, at = (100 * task[name] for name in ("low", "high", "accuracy"))
    return f'<div class="track"><i style="left:{low:.1f}%;width:{high - low:.1f}%"></i><b style="left:{at:.1f}%"></b></div>'


def draw_summary(run: Run) -> str:
    """What was trained, how well it went, what it cost, in one sentence each."""
    model = run.recipe.get("model", {})
    experts, chosen = model.get("n_routed_experts"), model.get("num_experts_per_tok")
    size = run.environment.get("parameters")
    kind = "mixture of experts" if experts else "language model"
    words = f"A {number(size)}-parameter {kind}" if size else f"A {kind}"
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
    tasks = run.evaluation.get("tasks", [])
    if tasks:
        words += ". It solves " + ", ".join(f"{percent(task['accuracy'])} of {escape(task['task'])}" for task in tasks)
    return f'<p class="summary">{words}.</p>'


def draw_tiles(run: Run) -> str:
    tiles = []
    for task in run.evaluation.get("tasks", []):
        note = f"{percent(task['low'])} to {percent(task['high'])}, {task['problems']:,} problems"
        tiles.append(tile(escape(task["task"]), percent(task["accuracy"]), note, interval(task)))
    stages = [stage for stage in run.stages.values() if "loss" in stage.series or "validation_loss" in stage.series]
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


def draw_reply(reply: str) -> str:
    """A reply with its reasoning dimmed, folded where it is long. Accepts replies that were cut off while reasoning."""
    before, closed, answer = reply.partition("</think>")
    if not closed and not reply.startswith("<think>"):
        return f"<pre>{clip(reply)}</pre>"
    reasoning = before.removeprefix("<think>").strip()
    thought = f'<pre class="thought">{clip(reasoning)}</pre>'
    if len(reasoning) > 160:
        thought = f"<details><summary>reasoning, {len(reasoning):,} characters</summary>{thought}</details>"
    final = f"<pre>{clip(answer.strip())}</pre>" if closed else "<em>no answer: cut off while reasoning</em>"
    return (thought if reasoning else "") + final


def mark(correct: bool | None) -> str:
    name, sign = {True: ("right", "&#10003;"), False: ("wrong", "&#10007;"), None: ("unjudged", "&#183;")}[correct]
    return f'<i class="mark {name}" title="{name}">{sign}</i>'


def draw_samples(stage: Stage) -> str:
    """The replies to each sampled problem over time, the problems seen most often first."""
    problems = sorted(stage.samples.items(), key=lambda item: -len(item[1]))
    cards = []
    for prompt, by_step in problems[:PROBLEMS]:
        steps = sorted(by_step)
        shown = sorted({steps[i * (len(steps) - 1) // max(min(ROUNDS, len(steps)) - 1, 1)] for i in range(min(ROUNDS, len(steps)))})
        rows = "".join(
            f'<li>{mark(by_step[step].get("correct"))}<span>{number(step)}</span><div>{draw_reply(str(by_step[step]["reply"]))}</div></li>'
            for step in shown
        )
        right = sum(bool(by_step[step].get("correct")) for step in steps)
        head = f"<h4><code>{clip(prompt, 600)}</code><small>right {right} of {len(steps)} times</small></h4>"
        cards.append(f"<article>{head}<ol>{rows}</ol></article>")
    if not cards:
        return ""
    rest = f'<p class="note">{len(problems) - PROBLEMS} more problems in metrics.jsonl.</p>' if len(problems) > PROBLEMS else ""
    return f'<h3>The same problems, step by step</h3><div class="samples">{"".join(cards)}</div>{rest}'


def draw_experts(stage: Stage) -> str:
    """Heat maps of the experts' loads, after a sentence on those that nobody uses."""
    if not stage.loads:
        return ""
    steps = sorted(stage.loads)
    loads = [stage.loads[step] for step in steps]
    ending = plot.mean_loads(loads[-max(1, len(loads) // 10) :], 1)
    ends = {(index, expert): row[0] for index, layer in enumerate(ending) for expert, row in enumerate(layer)}
    dead = [place for place, load in ends.items() if load < DEAD]
    (layer, expert), least = min(ends.items(), key=lambda item: item[1])
    (top_layer, top_expert), most = max(ends.items(), key=lambda item: item[1])
    words = f"At the end the least used expert gets {percent(least)} of its fair share (MoE layer {layer}, expert {expert}), "
    words += f"the most used {percent(most)} (MoE layer {top_layer}, expert {top_expert}). "
    if dead:
        names = ", ".join(f"layer {i} expert {e}" for i, e in dead[:8]) + (f" and {len(dead) - 8} more" if dead[8:] else "")
        words += f'<b class="alarm">{len(dead)} of {len(ends)} experts are dead</b> (below {percent(DEAD)} of their share): {names}.'
    else:
        words += "No expert is dead."
    words += f" {len(ending) - plot.LAYERS} of {len(ending)} layers are left out." if len(ending) > plot.LAYERS else ""
    words += " Experts go down, steps across; the colour is load over fair share."
    return f'<h3>Load of the experts</h3><p class="note">{words}</p>{plot.draw_legend()}{plot.draw_heats(steps, loads)}'


def draw_stage(title: str, stage: Stage) -> str:
    """One stage: its loss large, every other number small, its experts and its samples."""
    train, checks = stage.points("loss"), stage.points("validation_loss")
    body = ""
    for broken in (name for name, values in stage.series.items() if len(stage.points(name)) < len(values)):
        first = min(step for step, value in stage.series[broken].items() if not math.isfinite(value))
        body += f'<p class="note"><b class="alarm">{escape(broken)} is not finite</b> from step {first:,}.</p>'
    if train or checks:
        curves = [*plot.trace("training", train), Curve("validation", checks, "dots", "second")]
        body += plot.draw_chart("Loss, nats per token", curves, 280, log_ratio=3)
    small = ""
    for name in dict.fromkeys([*FIELDS, *stage.series]):
        if name not in ELSEWHERE and len(stage.points(name)) >= 2:
            label, options = FIELDS.get(name, (name.replace("_", " "), {}))
            small += plot.draw_chart(label, plot.trace(label, stage.points(name)), **options)
    body += f'<div class="grid small">{small}</div>' if small else ""
    body += draw_samples(stage) + draw_experts(stage)
    return f"<section><h2>{escape(title)}</h2>{body}</section>" if body else ""


def draw_evaluation(run: Run) -> str:
    """Each task by difficulty, with examples: the mistakes first."""
    cards = []
    for task in run.evaluation.get("tasks", []):
        bars = "".join(
            f'<dt>{escape(str(level))}</dt><dd><i style="width:{100 * share:.1f}%"></i></dd><dd>{percent(share)}</dd>'
            for level, share in task.get("by_difficulty", {}).items()
        )
        chosen = sorted(task.get("examples", []), key=lambda example: bool(example["correct"]))[:10]
        examples = "".join(
            f'<li>{mark(example["correct"])}<div><pre><b>{clip(example["prompt"], 1000)}</b></pre>{draw_reply(str(example["reply"]))}'
            f'<small>expected {clip(example["answer"], 300)}</small></div></li>'
            for example in chosen
        )
        tokens = f", {number(task['mean_tokens'])} tokens a reply" if task.get("mean_tokens") is not None else ""
        cards.append(
            f'<article><h4>{escape(task["task"])}<small>{percent(task["accuracy"])} of {task["problems"]:,}{tokens}</small></h4>'
            + (f'<p class="note">by difficulty</p><dl class="bars">{bars}</dl>' if bars else "")
            + (f"<details><summary>Replies, mistakes first</summary><ol>{examples}</ol></details>" if examples else "")
            + "</article>"
        )
    return f'<section><h2>Evaluation</h2><div class="samples">{"".join(cards)}</div></section>' if cards else ""


def draw_receipt(receipt: dict[str, Any]) -> str:
    """What each stage cost, planned beside actual: stages across, quantities down."""
    if not receipt:
        return ""
    stages, rows = receipt["stages"], []
    for key, label in QUANTITIES.items():
        show = SHOWN.get(key, number)
        values, cells = [stage.get(key) for stage in stages], ""
        for stage, value in zip(stages, values):
            plan = (stage.get("planned") or {}).get(key)
            planned = f"<small>planned {escape(show(plan))}</small>" if plan is not None else ""
            cells += f"<td>{escape(show(value)) if value is not None else '&ndash;'}{planned}</td>"
        total = receipt["total"].get(key, sum(v for v in values if v is not None) if key in ("tokens", "flops") else None)
        cells += f"<td>{escape(show(total)) if total is not None else ''}</td>" if len(stages) > 1 else ""
        if any(value is not None for value in [*values, total]):
            rows.append(f"<tr><th>{label}</th>{cells}</tr>")
    heads = "".join(f"<th>{escape(stage['stage'])}</th>" for stage in stages) + ("<th>total</th>" if len(stages) > 1 else "")
    return f'<section><h2>Receipt</h2><div class="scroll"><table><tr><th></th>{heads}</tr>{"".join(rows)}</table></div></section>'


def draw_sources(run: Run) -> str:
    """The recipe and the environment, folded: enough to run it again."""
    parts = []
    if run.recipe_text is not None:
        parts.append(f'<details><summary>Recipe</summary><pre class="source">{escape(run.recipe_text)}</pre></details>')
    if run.environment:
        text = json.dumps(run.environment, indent=2, ensure_ascii=False)
        parts.append(f'<details><summary>Environment</summary><pre class="source">{escape(text)}</pre></details>')
    return f"<section><h2>Run it again</h2>{''.join(parts)}</section>" if parts else ""


def render(run: Run) -> str:
    """The whole page."""
    facts = [run.environment.get(name) for name in ("device", "commit", "date")]
    meta = " &middot; ".join(clip(fact, 80) for fact in ["Jevons run", *(fact for fact in facts if isinstance(fact, str) and fact)])
    notes = [] if run.receipt or not run.stages else ["No receipt yet: the run is going on or was stopped. Numbers are the latest written."]
    notes += ["The last line of metrics.jsonl was cut short by a kill and is skipped."] if run.torn else []
    stages = "".join(draw_stage(STAGES.get(name, (name, name))[1], stage) for name, stage in run.stages.items())
    warnings = "".join(f'<p class="note warn">{note}</p>' for note in notes)
    digest = base64.b64encode(hashlib.sha256(plot.SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none';style-src 'unsafe-inline';script-src 'sha256-{digest}'"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><meta name="color-scheme" content="light dark">'
        f"<title>{escape(run.name)}</title><style>{plot.STYLE}</style></head><body><main>"
        f'<header><p class="meta">{meta}</p><h1>{escape(run.name)}</h1>{draw_summary(run)}</header>{warnings}'
        f"{draw_tiles(run)}{draw_evaluation(run)}{stages}{draw_receipt(run.receipt)}{draw_sources(run)}"
        f"</main><script>{plot.SCRIPT}</script></body></html>\n"
    )


def write_report(folder: Path) -> Path:
    """Writes `folder`/report.html from what the run has left there so far and returns its path. The page replaces the old one
    in one step: a reader never sees half of it. Raises ValueError, naming file and line, for what cannot be read."""
    path = folder / "report.html"
    write_text(path, render(read_run(folder)).encode(errors="replace").decode())  # a reply may hold half a surrogate pair
    return path
