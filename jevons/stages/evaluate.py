"""Held-out problems answered by the engine and graded exactly; held-out text scored in bits per byte.

    STAGE/results.json        STAGE/DONE.json
"""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from jevons.data.disk import write_json
from jevons.data.tokenizer import Tokenizer
from jevons.engine.engine import Engine
from jevons.engine.sequence import SamplingParams
from jevons.model.folder import load_model
from jevons.model.transformer import Transformer
from jevons.progress import Meter
from jevons.recipe import Recipe, TaskMix
from jevons.run import Interrupt, Interrupted, Run, newest_model
from jevons.stages.sample import prompt_ids
from jevons.tasks.task import Problem, get_task
from jevons.train import device
from jevons.train.corpus import Corpus, validation_loss


def evaluate(run: Run, recipe: Recipe, interrupt: Interrupt) -> None:
    """Run the stage on the newest model of the run."""
    options = recipe.evaluate
    assert options is not None and recipe.prepare is not None
    folder = newest_model(run.folder)
    tokenizer = Tokenizer.load(folder)
    model = load_model(folder, dtype=getattr(torch, recipe.dtype), device=device.choose(recipe.device), mtp=False)
    results: dict[str, Any] = {"model": str(folder.relative_to(run.folder)), "tasks": []}
    with run.spend("evaluate") as spending:
        tokens = 0
        for mix in recipe.prepare.tasks:
            result = grade(model, tokenizer, mix, options.problems, options.max_tokens, options.examples, recipe.seed, interrupt)
            tokens += round(result["mean_tokens"] * result["problems"])
            results["tasks"].append(result)
            spending.update(tokens=tokens)
        if recipe.pretrain:
            corpus = Corpus.open(
                run.stage_folder("prepare"),
                tokenizer,
                sequence_length=recipe.pretrain.sequence_length,
                split_documents=recipe.pretrain.split_documents,
                seed=recipe.seed,
            )
            results["validation_loss"], results["bits_per_byte"] = validation_loss(model, corpus, options.windows)
    run.stage_folder("evaluate").mkdir(exist_ok=True)
    write_json(run.stage_folder("evaluate") / "results.json", results)
    run.mark_done("evaluate")


def grade(
    model: Transformer, tokenizer: Tokenizer, mix: TaskMix, problems: int, max_tokens: int, examples: int, seed: int, interrupt: Interrupt
) -> dict[str, Any]:
    """Greedy accuracy on `problems` test problems of one task, with its 95 % interval, by difficulty, and with examples."""
    task = get_task(mix.task, **mix.options)
    asked = [task.problem("test", i, seed) for i in range(problems)]
    engine = Engine(model)
    with Meter(f"evaluate {task.name}", problems) as meter:

        def progress(finished: int, tokens: int) -> None:
            if interrupt.requested:
                raise Interrupted("stopped while evaluating; the same command starts this stage again")
            meter.update(finished, f"{tokens:,} tokens")

        prompts = [prompt_ids(tokenizer, p.prompt) for p in asked]
        done = engine.generate(prompts, SamplingParams(max_tokens=max_tokens, temperature=0), progress=progress)
    replies = [tokenizer.decode(s.tokens, skip_special=True) for s in done]
    scores = [task.verify(p, r) for p, r in zip(asked, replies)]
    by_difficulty: dict[str, list[float]] = {}
    for problem, score in zip(asked, scores):
        by_difficulty.setdefault(str(problem.difficulty), []).append(score)
    low, high = wilson(sum(scores), problems)
    return {
        "task": task.name,
        "accuracy": sum(scores) / problems,
        "low": low,
        "high": high,
        "problems": problems,
        "mean_tokens": sum(len(s.tokens) for s in done) / problems,
        "unfinished": sum(s.stop_reason == "length" for s in done),
        "by_difficulty": {k: sum(v) / len(v) for k, v in sorted(by_difficulty.items(), key=lambda item: int(item[0]))},
        "examples": [_example(p, r, s) for p, r, s in _spread(asked, replies, scores, examples)],
    }


def _example(problem: Problem, reply: str, score: float) -> dict[str, Any]:
    return {"prompt": problem.prompt, "reply": reply, "answer": problem.answer, "correct": score == 1.0}


def _spread(asked: list[Problem], replies: list[str], scores: list[float], count: int) -> list[tuple[Problem, str, float]]:
    """The first right and the first wrong answers, half of each where there are enough."""
    rows = list(zip(asked, replies, scores))
    wrong, right = [r for r in rows if r[2] < 1], [r for r in rows if r[2] == 1]
    take = min(len(wrong), max(count // 2, count - len(right)))
    return right[: count - take] + wrong[:take]


def wilson(successes: float, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % score interval of a proportion (E. B. Wilson, 1927)."""
    share = successes / trials
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return max(0.0, centre - half), min(1.0, centre + half)


def show_results(run: Run, console: Console) -> None:
    """Print accuracies and examples where the run was evaluated."""
    path = run.stage_folder("evaluate") / "results.json"
    if not path.exists():
        return
    results = json.loads(path.read_text(encoding="utf-8"))
    if "bits_per_byte" in results:
        console.print(f"held-out text: {results['bits_per_byte']:.3f} bits per byte")
    for result in results["tasks"]:
        console.print(
            f"[bold]{result['task']}: {result['accuracy']:.1%}[/] of {result['problems']} held-out problems "
            f"(95 % interval {result['low']:.1%} to {result['high']:.1%})"
        )
        for example in result["examples"][:1] + result["examples"][-1:]:
            mark = "[green]right[/]" if example["correct"] else f"[red]wrong[/], the answer is {example['answer']}"
            console.print(f"  {example['prompt']}  ->  ", end="")
            console.print(Text(example["reply"].replace("\n", " ")), end="  ")
            console.print(mark)
