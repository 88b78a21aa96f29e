"""One stage of a run on a page: what it learned, drawn large, everything else small, and the answers that it gave on the way.

What a stage is about differs: a loss where the next token is learned, the share of right answers and the parts of the reward where
answers are. Both are found in its rows, not in its name, so a stage that this file never heard of is drawn too.
"""

from __future__ import annotations

import math
from html import escape
from itertools import cycle
from statistics import fmean
from typing import Any

from jevons import plot
from jevons.plot import Curve, number, percent, smooth
from jevons.record import Stage

FIELDS: dict[str, tuple[str, dict[str, Any]]] = {  # small charts: title, plot.draw_chart's options
    "loss": ("Loss", {}),
    "response_tokens": ("Tokens of a reply", {"zero": True}),
    "unfinished": ("Replies cut off, share", {"zero": True}),
    "unanswered": ("Replies without an answer, share", {"zero": True}),
    "turns": ("Turns of a reply", {"zero": True}),
    "no_signal": ("Groups of equal rewards, share", {"zero": True}),
    "group_deviation": ("Deviation of rewards in a group", {"zero": True}),
    "groups": ("Groups", {"zero": True}),
    "verifier_failures": ("Answers whose verifier failed", {"zero": True}),
    "entropy": ("Entropy, nats per token", {"zero": True}),
    "kl": ("KL to the reference, nats per token", {"zero": True}),
    "kl_old": ("KL to the policy that sampled, nats per token", {"zero": True}),
    "tis_clipped": ("Importance weights bounded, share", {"zero": True}),
    "ratio": ("Ratio of new to old probability", {}),
    "ratio_max": ("Largest ratio", {}),
    "masked": ("Tokens masked, share", {"zero": True}),
    "clipped_low": ("Tokens clipped below, share", {"zero": True}),
    "clipped_high": ("Tokens clipped above, share", {"zero": True}),
    "mismatch_mean": ("Sampler against trainer, mean", {"log_ratio": 30}),
    "mismatch_max": ("Sampler against trainer, worst token", {"log_ratio": 30}),
    "mismatch_kl": ("Sampler against trainer, KL", {"log_ratio": 30}),
    "lr": ("Learning rate", {"zero": True}),
    "tokens_per_second": ("Tokens per second", {"zero": True}),
    "rollout_tokens_per_second": ("Tokens sampled per second", {"zero": True}),
    "train_tokens_per_second": ("Tokens trained per second", {"zero": True}),
    "rollout_seconds": ("Seconds of sampling, a step", {"zero": True}),
    "train_seconds": ("Seconds of training, a step", {"zero": True}),
    "grade_seconds": ("Seconds of grading, a step", {"zero": True}),
    "handover_seconds": ("Seconds of handing weights over", {"zero": True}),
    "grad_norm": ("Gradient norm", {"log_ratio": 10}),
    "mtp_loss": ("Multi-token-prediction loss", {"log_ratio": 3}),
    "balance_loss": ("Balance loss", {"log_ratio": 30}),
    "max_violation": ("Worst overload of an expert", {"zero": True}),
}
COLOURS = ("second", "third", "fourth", "right")  # of curves beside the accent's
DEAD = 0.05  # of its fair share: an expert that gets less at the end is called dead
PROBLEMS, ROUNDS = 4, 12  # sampled problems a stage, replies a problem
LETTERS = 3000  # of one reply


def clip(value: Any, letters: int = LETTERS) -> str:
    """Escaped text, cut after so many letters with a word on what is missing."""
    text = str(value)
    rest = f" <em>({len(text) - letters:,} more characters)</em>" if len(text) > letters else ""
    return escape(text[:letters]) + rest


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


def draw_answer(answer: dict[str, Any]) -> str:
    return f'{mark(answer.get("correct"))}<div>{draw_reply(str(answer["reply"]))}</div>'


def draw_samples(stage: Stage) -> str:
    """The replies to each sampled problem over time, the problems seen most often first. Where a step had a right and a wrong one they
    stand side by side."""
    problems = sorted(stage.samples.items(), key=lambda item: -len(item[1]))[:PROBLEMS]
    cards = []
    for prompt, by_step in problems:
        steps, rows = sorted(by_step), ""
        for step in sorted({steps[i * (len(steps) - 1) // max(min(ROUNDS, len(steps)) - 1, 1)] for i in range(min(ROUNDS, len(steps)))}):
            answers = [by_step[step], *([by_step[step]["other"]] if by_step[step].get("other") else [])]
            cells = "".join(f'<div class="answer">{draw_answer(answer)}</div>' for answer in answers)
            rows += f'<li><span>{number(step)}</span><div class="answers">{cells}</div></li>'
        judged = [by_step[step]["correct"] for step in steps if by_step[step].get("correct") is not None]
        count = f"<small>right {sum(judged)} of {len(judged)} times</small>" if judged else ""
        head = f"<h4><code>{clip(prompt, 600)}</code>{count}</h4>"
        cards.append(f"<article>{head}<ol>{rows}</ol></article>")
    if not cards:
        return ""
    others = len(stage.samples) - len(problems)
    rest = f'<p class="note">{others} more problems in metrics.jsonl.</p>' if others else ""
    pairs = any(sample.get("other") for _, by_step in problems for sample in by_step.values())
    kind = "samples whole" if pairs else "samples"
    return f'<h3>The same problems, step by step</h3><div class="{kind}">{"".join(cards)}</div>{rest}'


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


def draw_loss(stage: Stage) -> str:
    train, checks = stage.points("loss"), stage.points("validation_loss")
    if not train and not checks:
        return ""
    curves = [*plot.trace("training", train), Curve("validation", checks, "dots", "second")]
    return plot.draw_chart("Loss, nats per token", curves, 280, log_ratio=3)


def draw_success(stage: Stage) -> str:
    """The share of right answers, in training and on held-out problems; then the reward and what it is made of."""
    held = [name for name in stage.series if name.startswith("held_out")]
    right = {name: [(step, 100 * share) for step, share in stage.points(name)] for name in ("accuracy", *held)}
    reward = stage.points("reward")
    words = []
    for name, where in (("held_out", "of held-out problems are answered right"), ("accuracy", "of answers in training are right")):
        if len(points := smooth(stage.points(name)) if name == "accuracy" else stage.points(name)) > 1:
            words.append(f"{percent(points[-1][1])} {where}, {percent(points[0][1])} at the start.")
    if equal := stage.points("no_signal"):
        words.append(f"{percent(fmean(share for _, share in equal))} of the groups had equal rewards and taught nothing.")
    if worst := stage.points("mismatch_max"):
        words.append(f"On no token did sampler and trainer differ by more than {number(max(value for _, value in worst))} nats.")
    body = f'<p class="note">{" ".join(words)}</p>' if words else ""
    curves = plot.trace("training", right["accuracy"]) if right["accuracy"] else []
    for name, colour in zip(held, cycle(COLOURS)):
        curves.append(Curve(name.removeprefix("held_out_").replace("_", " "), right[name], "joined", colour))
    if any(curve.points for curve in curves):
        body += plot.draw_chart("Right answers, percent", curves, 280, zero=True)
    parts = [name for name in stage.series if name.startswith("reward_")]
    curves = plot.trace("reward", reward) if reward else []
    for name, colour in zip(parts if len(parts) > 1 else [], cycle(COLOURS)):
        curves.append(Curve(name.removeprefix("reward_").replace("_", " "), plot.calm(stage.points(name)), "line", colour))
    if reward and reward != stage.points("accuracy"):
        body += plot.draw_chart("Reward and its parts" if len(parts) > 1 else "Reward", curves, 200)
    return body


def draw_details(stage: Stage, drawn: set[str]) -> str:
    """Every number that is not drawn yet, small; those that never change in words."""
    small, same = "", []
    for name in dict.fromkeys([*FIELDS, *stage.series]):
        points = stage.points(name)
        if name in drawn or len(points) < 2:
            continue
        label, options = FIELDS.get(name, (name.replace("_", " "), {}))
        if len({value for _, value in points}) == 1:
            same.append(f"{escape(label)} {number(points[0][1])}")
        else:
            small += plot.draw_chart(label, plot.trace(label, points), **options)
    words = f'<p class="note">The same at all steps: {"; ".join(same)}.</p>' if same else ""
    return (f'<div class="grid small">{small}</div>' if small else "") + words


def draw_stage(title: str, stage: Stage) -> str:
    """One stage: what it is about large, every other number small, its experts and its samples."""
    body = ""
    for broken in (name for name, values in stage.series.items() if len(stage.points(name)) < len(values)):
        first = min(step for step, value in stage.series[broken].items() if not math.isfinite(value))
        body += f'<p class="note"><b class="alarm">{escape(broken)} is not finite</b> from step {first:,}.</p>'
    drawn = {"tokens", "seconds", "money", "epoch"}  # told elsewhere in words
    success = {name for name in stage.series if name in ("accuracy", "reward") or name.startswith(("reward_", "held_out"))}
    if success:
        body += draw_success(stage)
        drawn |= success
    else:
        body += draw_loss(stage)
        drawn |= {"loss", "validation_loss", "bits_per_byte"}
    body += draw_details(stage, drawn) + draw_samples(stage) + draw_experts(stage)
    return f"<section><h2>{escape(title)}</h2>{body}</section>" if body else ""
