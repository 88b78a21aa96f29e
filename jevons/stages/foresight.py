"""What later stages of a recipe could not do, found out before the first one costs anything.

Problem: a verifier that fails on its own gold answers, or a file of problems that is not there, shows when its stage begins, which may be
hours after the run began. Approach: what needs no model is tried at the start for the stages that are not next; each stage tries it again
when it begins, with what needs one (the chat template, prompts longer than the window).
"""

from __future__ import annotations

from collections.abc import Sequence

from jevons.recipe import Recipe
from jevons.stages.classroom import GOLD, make_tasks
from jevons.tasks.grade import check_gold
from jevons.tasks.task import get_task


def look_ahead(recipe: Recipe, stages: Sequence[str]) -> None:
    """ValueError, naming the stage, for tasks that one of these stages could not use."""
    if recipe.sft and "sft" in stages:
        for mix in recipe.sft.tasks:
            task = get_task(mix.task, **mix.options)
            if task.worked(task.problem("train", 0, recipe.seed)) is None:
                raise ValueError(f"sft.tasks: {task.name} has no worked solutions to learn from; it is a task for rl and evaluate")
    if recipe.rl and "rl" in stages:
        make_tasks(recipe.rl)
    if recipe.evaluate and "evaluate" in stages:
        for mix in recipe.evaluate.tasks:  # without its own they are those of a stage before
            task = get_task(mix.task, **mix.options)
            if task.size("test") == 0:
                raise ValueError(f"evaluate.tasks: {task.name} has no test problems; give a test_path")
            check_gold(task, GOLD)
