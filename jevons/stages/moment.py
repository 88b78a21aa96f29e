"""One problem's answers over a run: half-way through pretraining, after it, after fine-tuning, after reinforcement learning."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from jevons.recipe import TRAINING
from jevons.run import Run

LETTERS = 100  # of an answer


def moments(rows: list[dict[str, Any]]) -> tuple[str, list[tuple[str, int, dict[str, Any]]]]:
    """The problem that most stages answered, and (stage, step, sample): its first answer, and the last one of each training stage."""
    samples = [row for row in rows if "correct" in row.get("sample", {})]
    if not samples:
        return "", []
    stages = {row["sample"]["prompt"]: set[str]() for row in samples}
    for row in samples:
        stages[row["sample"]["prompt"]].add(row["stage"])
    prompt = max(stages, key=lambda p: len(stages[p]))
    mine = [(row["stage"], row["step"], row["sample"]) for row in samples if row["sample"]["prompt"] == prompt]
    mine.sort(key=lambda m: (TRAINING.index(m[0]), m[1]))
    last = {stage: (stage, step, sample) for stage, step, sample in mine}
    return prompt, [mine[0], *(m for m in last.values() if m[:2] != mine[0][:2])]


def show_moments(run: Run, console: Console) -> None:
    """Print them, where there are any."""
    if not run.metrics_path.exists():
        return
    rows = [json.loads(line) for line in run.metrics_path.read_text(encoding="utf-8").splitlines()]
    prompt, shown = moments(rows)
    if len(shown) < 2:
        return
    console.print(f"[bold]{escape(prompt)}[/] over the run:")
    for stage, step, sample in shown:
        reply = sample["reply"].replace("\n", " ")
        mark = "[green]right[/]" if sample["correct"] else "[red]wrong[/]"
        console.print(f"  {stage:>8} {step:>5,}  {mark}  ", end="")
        console.print(Text(reply if len(reply) <= LETTERS else reply[:LETTERS] + " ..."))
