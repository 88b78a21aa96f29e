"""Held-out problems answered by the engine and graded; held-out text scored in bits per byte.

    STAGE/results.json        STAGE/DONE.json

Where the recipe has reinforcement learning, the model that it began with sits the same exam (`before` in the results), and each task says
how much was gained.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from jevons.cost.arithmetic import forward_flops, prefill_flops
from jevons.cost.profile import Profile
from jevons.data.disk import write_json
from jevons.data.tokenizer import Tokenizer
from jevons.engine.engine import Engine
from jevons.model.config import ModelConfig
from jevons.model.folder import load_config, load_model
from jevons.model.transformer import Transformer
from jevons.recipe import Recipe
from jevons.run import Interrupt, Interrupted, Run
from jevons.stages.estimate import difference
from jevons.stages.exam import Exam, Sheet, results, sit
from jevons.stages.forecast import forecast, measured, text_flops, turns
from jevons.stages.origin import origin
from jevons.tasks.task import get_task
from jevons.train import device
from jevons.train.corpus import Corpus, validation_loss


def evaluate(run: Run, recipe: Recipe, interrupt: Interrupt) -> None:
    """Run the stage on the last model of the run."""
    options = recipe.evaluate
    assert options is not None
    folder = origin(run, recipe, "evaluate")
    first = origin(run, recipe, "rl") if recipe.rl and options.before_rl else None
    out: dict[str, Any] = {"model": _label(run, folder)}
    config = load_config(folder)
    entry = measured(recipe, "evaluate", config, Profile.load(run.folder.parent, run.device))
    with run.spend("evaluate", planned=forecast(recipe, "evaluate", config, entry, run.carried) if entry else None) as spending:
        model, tokenizer = _open(recipe, folder)
        after = grade(model, tokenizer, recipe, interrupt)
        out["tasks"] = [results(sheet, options.examples) for sheet in after]
        flops = text_flops(recipe, config) + spent(after, config)
        spending.update(tokens=sum(sheet.tokens for sheet in after), flops=flops)
        if recipe.prepare and recipe.pretrain:
            corpus = Corpus.open(
                run.stage_folder("prepare"),
                tokenizer,
                sequence_length=recipe.pretrain.sequence_length,
                split_documents=recipe.pretrain.split_documents,
                seed=recipe.seed,
            )
            out["validation_loss"], out["bits_per_byte"] = validation_loss(model, corpus, options.windows)
        del model
        if first and after:
            before = grade(*_open(recipe, first), recipe, interrupt, " before rl")
            out["before"] = {"model": _label(run, first), "tasks": [results(sheet, options.examples) for sheet in before]}
            for task, old, new in zip(out["tasks"], before, after):
                task["gain"] = asdict(difference(old.rates, new.rates, options.samples))
            spending.update(tokens=sum(sheet.tokens for sheet in before + after), flops=flops + spent(before, config))
    run.stage_folder("evaluate").mkdir(exist_ok=True)
    write_json(run.stage_folder("evaluate") / "results.json", out)
    run.mark_done("evaluate")


def _label(run: Run, folder: Path) -> str:
    return str(folder.relative_to(run.folder) if folder.is_relative_to(run.folder) else folder)


def _open(recipe: Recipe, folder: Path) -> tuple[Transformer, Tokenizer]:
    model = load_model(folder, dtype=getattr(torch, recipe.dtype), device=device.choose(recipe.device), mtp=False)
    return model, Tokenizer.load(folder)


def grade(model: Transformer, tokenizer: Tokenizer, recipe: Recipe, interrupt: Interrupt, when: str = "") -> list[Sheet]:
    """The model's answers to the recipe's held-out problems, a sheet a task."""
    engine = make_engine(model, tokenizer, recipe)
    sheets = []
    for exam in exams(recipe):
        sheets.append(sit(exam, engine, tokenizer, interrupt, exam.task.name + when))
        if sheets[-1].stopped:
            raise Interrupted("stopped while evaluating; the same command starts this stage again")
    return sheets


def make_engine(model: Transformer, tokenizer: Tokenizer, recipe: Recipe) -> Engine:
    assert recipe.evaluate is not None
    return Engine(model, max_sequences=recipe.evaluate.concurrency, stop_ids=tokenizer.ends(model.config.eos_token_ids))


def exams(recipe: Recipe) -> list[Exam]:
    """An exam a task, as the recipe asks for them."""
    options, most = recipe.evaluate, turns(recipe)
    assert options is not None
    tasks = [get_task(mix.task, **mix.options) for mix in recipe.task_mixes]
    if most > 1 and not any(task.tools() for task in tasks):
        raise ValueError(f"evaluate.max_turns: {most} turns need a task with tools")
    return [
        Exam(
            task=task,
            problems=options.problems,
            samples=options.samples,
            temperature=options.temperature,
            top_p=options.top_p,
            max_tokens=options.max_tokens,
            max_turns=most if task.tools() else 1,
            seed=recipe.seed,
        )
        for task in tasks
    ]


def spent(sheets: Sequence[Sheet], config: ModelConfig) -> float:
    """FLOPs of answers; a problem is read once for all of them."""
    groups = [group.trajectories for sheet in sheets for group in sheet.groups]
    read = sum(prefill_flops(config, len(answers[0].prompt)) for answers in groups)
    return read + sum(t.drawn * forward_flops(config, len(t.prompt) + t.drawn / 2) for answers in groups for t in answers)


def show_results(run: Run, console: Console) -> None:
    """Print accuracies and examples where the run was evaluated."""
    path = run.stage_folder("evaluate") / "results.json"
    if not path.exists():
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    if "bits_per_byte" in found:
        console.print(f"held-out text: {found['bits_per_byte']:.3f} bits per byte")
    before = found.get("before", {}).get("tasks", [])
    for place, result in enumerate(found["tasks"]):
        console.print(
            f"[bold]{result['task']}: {result['accuracy']:.1%}[/] of {result['problems']} held-out problems "
            f"(95 % interval {result['low']:.1%} to {result['high']:.1%})"
        )
        if before:
            gain, low, high = (100 * result["gain"][name] for name in ("value", "low", "high"))
            was = before[place]["accuracy"]
            console.print(f"  {was:.1%} before reinforcement learning: {gain:+.1f} points (95 % interval {low:+.1f} to {high:+.1f})")
        for example in result["examples"][:1] + result["examples"][-1:]:
            mark = "[green]right[/]" if example["correct"] else f"[red]wrong[/], the answer is {escape(example['answer'])}"
            console.print(f"  {escape(example['prompt'])}  ->  ", end="")
            console.print(Text(example["reply"].replace("\n", " ")), end="  ")
            console.print(mark)
