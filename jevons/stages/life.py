"""A recipe from its first stage to its last."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from jevons.cost.receipt import render
from jevons.recipe import Recipe, load
from jevons.report import write_report
from jevons.run import Interrupt, Interrupted, Run
from jevons.stages.evaluate import evaluate, show_results
from jevons.stages.foresight import look_ahead
from jevons.stages.moment import show_moments
from jevons.stages.prepare import prepare
from jevons.stages.pretrain import pretrain
from jevons.stages.rl import rl
from jevons.stages.sft import sft
from jevons.train import device

STAGES: dict[str, Callable[[Run, Recipe, Interrupt], None]] = {
    "prepare": prepare,
    "pretrain": pretrain,
    "sft": sft,
    "rl": rl,
    "evaluate": evaluate,
}


def live(name: str, overrides: Sequence[str], root: Path, *, stage: str | None = None, again: str | None = None) -> Path:
    """Run or continue a recipe and print what came of it; the run's folder.

    Leaves with 128 + the signal's number where the user or the system stopped it, everything saved.
    """
    recipe = load(name, overrides)
    if stage and stage not in recipe.stages:
        raise ValueError(f"--stage {stage}: the recipe's stages are {', '.join(recipe.stages)}")
    where = device.choose(recipe.device)
    recipe = recipe.settle(device.best_dtype(where))
    run = Run(recipe, root, device.describe(where), again=again or None, memory=lambda: device.peak_memory(where))
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"[bold]{recipe.name}[/] on {run.device}, {recipe.dtype}: {' -> '.join(recipe.stages)}, in {run.folder}")
    with Interrupt() as interrupt:
        try:
            pending = [each for each in recipe.stages if stage in (None, each) and not run.is_done(each)]
            look_ahead(recipe, pending[1:])
            began: int | None = None
            for each in pending:
                _needs(run, recipe, each)
                held = device.peak_memory(where) if device.forget_peak(where) else 0  # now, of the stages before
                began = held if began is None else began
                run.carried = max(held - began, 0)
                STAGES[each](run, recipe, interrupt)
        except Interrupted as stopped:
            write_report(run.folder)
            console.print(f"[yellow]{stopped}[/]")
            sys.exit(128 + (interrupt.signal or signal.SIGINT))
    show_moments(run, console)
    show_results(run, console)
    console.print(render(run.write_receipt()))
    console.print(f"report: {write_report(run.folder)}\nchat:   jevons chat {run.folder}")
    return run.folder


def _needs(run: Run, recipe: Recipe, stage: str) -> None:
    """A stage needs the ones before it."""
    before = recipe.stages[: recipe.stages.index(stage)]
    if missing := [s for s in before if not run.is_done(s)]:
        raise ValueError(f"--stage {stage}: {', '.join(missing)} must run first")
