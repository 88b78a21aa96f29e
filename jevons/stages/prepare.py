"""Text or generated problems -> a tokenizer, training shards and validation shards.

    STAGE/tokenizer/   STAGE/train/   STAGE/validation/   STAGE/DONE.json

Nothing here depends on the number of processes, and a prepare that was stopped starts over: it is the cheap stage.
"""

from __future__ import annotations

import itertools
import random
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path

from rich.markup import escape

from jevons.data.chat import Message
from jevons.data.shard import write_shards
from jevons.data.text import BadLines, Document, read_documents
from jevons.data.tokenizer import Tokenizer, train_bpe
from jevons.model.folder import resolve
from jevons.progress import Meter
from jevons.recipe import Recipe
from jevons.run import Interrupt, Interrupted, Run
from jevons.section import Prepare, TaskMix
from jevons.tasks.task import Split, Task, get_task

TOKENIZER_CHARACTERS = 20_000_000  # what a tokenizer is trained on; more changes little


def prepare(run: Run, recipe: Recipe, interrupt: Interrupt) -> None:
    """Run the stage. ValueError for sources without text, a tokenizer that the model cannot hold, too many bad lines."""
    options = recipe.prepare
    assert options is not None
    folder = run.stage_folder("prepare")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    below = _below(options)
    bad = {"train": BadLines(limit=options.bad_lines), "validation": BadLines(limit=options.bad_lines)}
    manifests = {}
    with run.spend("prepare") as spending:
        # with model.path a model is trained further, so its own tokenizer goes on
        source = options.tokenizer or ("path" in recipe.model and resolve(recipe.model["path"]))
        tokenizer = Tokenizer.load(source) if source else _train_tokenizer(options, recipe)
        if "path" not in recipe.model and tokenizer.size > (size := recipe.config().vocab_size):
            raise ValueError(f"model.vocab_size: {size} is less than the tokenizer's {tokenizer.size}; raise it to a multiple of 64 above")
        tokenizer.save(folder / "tokenizer")
        for split in ("train", "validation"):
            with Meter(f"prepare {split}", _expected(options, split)) as meter:

                def progress(documents: int, tokens: int, meter: Meter = meter) -> None:
                    if interrupt.requested:
                        raise Interrupted("stopped while preparing; run again to start this stage over")
                    spending.update()
                    meter.update(documents, f"{tokens:,} tokens")

                manifests[split] = write_shards(
                    _split(options, recipe.seed, split, below, bad[split]),
                    folder / "tokenizer",
                    folder / split,
                    processes=options.processes,
                    mask=options.loss_on,
                    progress=progress,
                    source={"sources": list(options.sources), "tasks": [mix.model_dump() for mix in options.tasks], "split": split},
                    bad=bad[split],
                )
        spending.update(tokens=sum(m.tokens for m in manifests.values()))
    if skipped := bad["train"].empty + bad["train"].malformed:
        shown = escape("".join(f"\n  {example}" for example in bad["train"].examples))
        meter.console.print(f"[yellow]{skipped} bad lines left out[/], the first:{shown}", highlight=False)
    run.mark_done("prepare", **{s: {"documents": m.documents, "tokens": m.tokens, "bytes": m.bytes} for s, m in manifests.items()})


def _train_tokenizer(options: Prepare, recipe: Recipe) -> Tokenizer:
    documents = _split(options, recipe.seed, "train", _below(options), BadLines(limit=options.bad_lines))
    return train_bpe(_texts(documents), recipe.config().vocab_size)


def _texts(documents: Iterator[Document]) -> Iterator[str]:
    seen = 0
    for document in documents:
        parts = [document.text or ""]
        for message in document.messages or ():
            parts += (f"{message.role}\n", message.reasoning, message.content)  # a role is written in every turn, so it earns a token
        for text in filter(None, parts):
            seen += len(text)
            yield text
        if seen > TOKENIZER_CHARACTERS:
            return


def _expected(options: Prepare, split: str) -> int | None:
    """How many documents there will be, where that is known beforehand."""
    if not options.tasks:
        return None
    return options.documents if split == "train" else max(1, round(options.documents * options.validation_share))


def _below(options: Prepare) -> float:
    """Documents of sources whose hash is below this are held out. Of a few none might be, so then it is the one with the lowest."""
    below, lowest = options.validation_share * 1_000_000, 1_000_000
    if options.tasks:
        return below  # whose problems have splits of their own
    for document in read_documents(options.sources, field=options.field, bad=BadLines(limit=options.bad_lines)):
        if (lowest := min(lowest, _hash(document))) < below:
            return below
    return lowest + 1


def _split(options: Prepare, seed: int, split: str, below: float, bad: BadLines) -> Iterator[Document]:
    """The documents of one split. Of sources, a document's own text decides which split it is in; tasks have disjoint problems for each."""
    if options.tasks:
        count = _expected(options, split)
        yield from itertools.islice(problems(options.tasks, "train" if split == "train" else "test", seed), count)
        return
    empty = True
    for document in read_documents(options.sources, field=options.field, bad=bad):
        if (_hash(document) < below) == (split == "validation"):
            empty = False
            yield document
    if empty and not bad.empty + bad.malformed:
        raise ValueError(
            f"prepare.sources: none of their documents fell into {split}; give more documents (a .txt file is one) "
            f"or change prepare.validation_share, which is {options.validation_share}"
        )


def _hash(document: Document) -> int:
    """Below a million, by what it says."""
    text = document.text if document.text is not None else "\n".join(m.content for m in document.messages or ())
    return zlib.crc32(text.encode()) % 1_000_000


def problems(mixes: tuple[TaskMix, ...], split: Split, seed: int) -> Iterator[Document]:
    """Conversations of worked problems without end, tasks drawn by their shares; no problem index is used twice."""
    tasks: list[tuple[Task, int]] = [(get_task(mix.task, **mix.options), mix.turns) for mix in mixes]
    weights = [mix.share for mix in mixes]
    rng = random.Random(seed)
    index = itertools.count()
    for number in itertools.count():
        ((task, turns),) = rng.choices(tasks, weights)
        messages: list[Message] = []
        for _ in range(rng.randint(1, turns)):
            worked = task.worked(task.problem(split, next(index), seed))
            if worked is None:
                raise ValueError(f"tasks: {task.name} has no worked solutions to learn from; it is a task for rl and evaluate")
            messages += worked
        yield Document(None, tuple(messages), task.name, number)


def tokenizer_folder(run: Run) -> Path:
    return run.stage_folder("prepare") / "tokenizer"
