"""What a model in training writes: the same few problems, or the same few beginnings, answered again and again."""

from __future__ import annotations

from collections.abc import Sequence

from jevons.data.shard import Shards
from jevons.data.tokenizer import Tokenizer
from jevons.engine.engine import Engine
from jevons.engine.sequence import SamplingParams
from jevons.model.transformer import Transformer
from jevons.recipe import Recipe
from jevons.run import Run
from jevons.section import TaskMix
from jevons.stages.dialogue import prompt_ids
from jevons.tasks.grade import Grader
from jevons.tasks.task import get_task

COUNT = 2  # problems of each task, or documents
BLOCK = 16  # tokens of a cache's block
BEGINNING = 24  # tokens of a held-out document to continue, half of it at most


def log_answers(run: Run, mixes: Sequence[TaskMix], model: Transformer, tokenizer: Tokenizer, seed: int, stage: str, step: int) -> None:
    """Log greedy replies to the first test problems of each task: the same ones in every stage."""
    room = min(256, model.config.max_position_embeddings // 2)
    for mix in mixes:
        task = get_task(mix.task, **mix.options)
        size = task.size("test")
        asked = [task.problem("test", i, seed) for i in range(COUNT if size is None else min(COUNT, size))]
        replies = answer(model, tokenizer, [prompt_ids(tokenizer, task.messages(problem)) for problem in asked], room)
        with Grader(task) as grader:
            grades = grader.grade(list(zip(asked, replies)))
        for problem, reply, grade in zip(asked, replies, grades):
            run.log(stage, step, sample={"prompt": problem.prompt, "reply": reply, "correct": grade.score == 1.0})


def answer(model: Transformer, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], room: int) -> list[str]:
    """Greedy replies of at most `room` tokens, as far as the model's positions go, by an engine that has memory for these alone."""
    blocks = sum(-(-(len(prompt) + room) // BLOCK) for prompt in prompts)
    engine = Engine(model, num_blocks=max(1, blocks), block_size=BLOCK, stop_ids=tokenizer.ends(model.config.eos_token_ids))
    done = engine.generate(prompts, SamplingParams(max_tokens=room, temperature=0))
    return [tokenizer.decode(sample.tokens, skip_special=True) for sample in done]


def log_samples(run: Run, recipe: Recipe, model: Transformer, tokenizer: Tokenizer, held_out: Shards, stage: str, step: int) -> None:
    """Log replies to test problems of the recipe's tasks; without tasks, continuations of held-out documents."""
    assert recipe.prepare is not None
    if recipe.prepare.tasks:
        return log_answers(run, recipe.prepare.tasks, model, tokenizer, recipe.seed, stage, step)
    engine = Engine(model, num_blocks=256)
    room = min(256, model.config.max_position_embeddings // 2)
    for i in range(min(COUNT, held_out.num_documents)):
        start, stop = held_out.document(i)
        beginning = held_out.tokens(start, start + min(BEGINNING, (stop - start + 1) // 2)).tolist()
        (sample,) = engine.generate([beginning], SamplingParams(max_tokens=room // 2, temperature=0.8, top_p=0.95, seed=recipe.seed))
        run.log(stage, step, sample={"prompt": tokenizer.decode(beginning), "reply": tokenizer.decode(sample.tokens, skip_special=True)})
