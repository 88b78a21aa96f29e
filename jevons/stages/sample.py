"""What a model in training writes: the same few problems, or the same few beginnings, answered again and again."""

from __future__ import annotations

from jevons.data.chat import Message
from jevons.data.shard import Shards
from jevons.data.tokenizer import Tokenizer
from jevons.engine.engine import Engine
from jevons.engine.sequence import SamplingParams
from jevons.model.transformer import Transformer
from jevons.recipe import Recipe
from jevons.run import Run
from jevons.tasks.task import get_task

COUNT = 2  # problems of each task, or documents
BEGINNING = 24  # tokens of a held-out document to continue, half of it at most


def prompt_ids(tokenizer: Tokenizer, question: str) -> list[int]:
    """A user's question as the model expects it, up to where its reply begins. ValueError where the tokenizer has no template."""
    if tokenizer.template is None:
        raise ValueError("the tokenizer has no chat template, so problems cannot be asked")
    return tokenizer.encode(tokenizer.template.render([Message("user", question)], add_generation_prompt=True))


def log_samples(run: Run, recipe: Recipe, model: Transformer, tokenizer: Tokenizer, held_out: Shards, stage: str, step: int) -> None:
    """Log replies to test problems of the recipe's tasks; without tasks, continuations of held-out documents."""
    assert recipe.prepare is not None
    engine = Engine(model, num_blocks=256)
    room = min(256, model.config.max_position_embeddings // 2)
    for mix in recipe.prepare.tasks:
        task = get_task(mix.task, **mix.options)
        asked = [task.problem("test", i, recipe.seed) for i in range(COUNT)]
        done = engine.generate([prompt_ids(tokenizer, p.prompt) for p in asked], SamplingParams(max_tokens=room, temperature=0))
        for problem, sample in zip(asked, done):
            reply = tokenizer.decode(sample.tokens, skip_special=True)
            run.log(stage, step, sample={"prompt": problem.prompt, "reply": reply, "correct": task.verify(problem, reply) == 1.0})
    if recipe.prepare.tasks:
        return
    for i in range(min(COUNT, held_out.num_documents)):
        start, stop = held_out.document(i)
        beginning = held_out.tokens(start, start + min(BEGINNING, (stop - start + 1) // 2)).tolist()
        (sample,) = engine.generate([beginning], SamplingParams(max_tokens=room // 2, temperature=0.8, top_p=0.95, seed=recipe.seed))
        run.log(stage, step, sample={"prompt": tokenizer.decode(beginning), "reply": tokenizer.decode(sample.tokens, skip_special=True)})
