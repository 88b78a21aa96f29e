"""Supervised fine-tuning: chats, or the worked solutions of tasks, of which the assistant's tokens are learned.

    STAGE/checkpoints/   while it trains: step-N/, the tokenised chats in train/, with patience the best weights so far in best/
    STAGE/model/         the result, a Hugging Face folder, adapters merged        STAGE/adapter/   with lora: in PEFT's format
    STAGE/DONE.json

The chats are rendered by the model's own template, tokenised once, packed without padding and shuffled anew every epoch. Not done: packing
by length (a step is so many conversations, whatever their lengths), weights of single turns.
"""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path

import torch
from rich.markup import escape
from safetensors.torch import load_file, save_file

from jevons.cost.arithmetic import parameters
from jevons.cost.profile import Profile
from jevons.cost.receipt import Plan, format_flops, format_seconds
from jevons.data.disk import new_folder
from jevons.data.shard import Shards, write_shards
from jevons.data.text import BadLines, Document, read_documents
from jevons.data.tokenizer import Tokenizer
from jevons.model.config import ModelConfig
from jevons.model.folder import companions, load_config, load_model
from jevons.model.transformer import Transformer
from jevons.progress import Meter
from jevons.recipe import Recipe
from jevons.run import Interrupt, Interrupted, Run, Spending
from jevons.section import Sft
from jevons.stages.forecast import forecast, held_out_count, measured, reads, token_flops, validates
from jevons.stages.origin import make_trainer, origin
from jevons.stages.prepare import problems
from jevons.stages.result import save_result
from jevons.stages.sample import answer, log_answers
from jevons.stages.step import StepLog
from jevons.train import checkpoint, device
from jevons.train.conversation import Conversations, validation_loss
from jevons.train.loss import answer_token
from jevons.train.schedule import build
from jevons.train.trainer import Metrics, Trainer

REPLY = 128  # tokens of a sample


@dataclass
class State:
    """Where the stage stands: saved with every checkpoint."""

    step: int = 0
    tokens: int = 0
    best: float | None = None  # validation loss
    best_step: int = 0
    worse: int = 0  # validations since


def sft(run: Run, recipe: Recipe, interrupt: Interrupt) -> None:
    """Run the stage, from its newest checkpoint where there is one. ValueError for chats that teach nothing, before any training."""
    options = recipe.sft
    assert options is not None
    where = device.choose(recipe.device)
    folder, source = run.stage_folder("sft"), origin(run, recipe, "sft")
    work = folder / "checkpoints"
    tokenizer = Tokenizer.load(source)
    _fits(load_config(source), tokenizer, options, source)
    found = checkpoint.newest(work)
    files = companions(source)

    with run.spend("sft") as spending:
        if found is None:  # what an attempt left that never trained may be another recipe's
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
            tokenise(options, recipe.seed, source, work, spending, interrupt)
        chats, held_out = read_chats(options, recipe.seed, tokenizer, work)
        model = load_model(source, dtype=getattr(torch, recipe.dtype), device=where)
        trainer = make_trainer(model, options, recipe.seed)
        count = reads(len(chats), options)
        steps = ceil(count / options.batch_size)
        schedule = build(
            options.schedule,
            peak=options.lr,
            steps=steps,
            warmup=int(steps * options.warmup_share),
            minimum=options.minimum_lr,
            decay=0,
        )
        state = State()
        if found is not None:
            progress = checkpoint.load(found, trainer)
            state = State(**{name: progress[name] for name in asdict(state)})
        run.truncate_metrics("sft", state.step if found else -1)
        run.note(parameters=parameters(model.config).total)
        spending.receipt.peak_flops = device.measure_peak(where, model.model.embed_tokens.weight.dtype)
        flops = token_flops(model.config, options, chats.num_tokens / len(chats))
        if spending.receipt.planned is None:
            entry = measured(recipe, "sft", model.config, Profile.load(run.folder.parent, run.device))
            spent = spending.update().seconds
            spending.receipt.planned = (
                forecast(recipe, "sft", model.config, entry, run.carried)
                if entry
                else _plan(trainer, chats, held_out, options, count, flops, recipe.price_per_hour, spent)
            )

        with Meter("sft", steps) as meter:
            _say(meter, model, chats, held_out, spending, options, steps, found)
            log = StepLog(run, "sft", spending, meter, flops, state.tokens)
            if state.step == 0:
                _validate(run, trainer.model, held_out, options, state, work)
                show_replies(run, model, tokenizer, held_out or chats, options, recipe.seed, 0)
            while state.step < steps and not _stopped(state, options):
                lr = schedule.at(state.step)
                metrics, norm = train_step(trainer, chats, options, recipe.seed, state.step, lr)
                state.step, state.tokens = state.step + 1, state.tokens + metrics.tokens
                last = state.step == steps
                if last or validates(len(chats), options, state.step):
                    _validate(run, model, held_out, options, state, work)
                last = last or _stopped(state, options)
                epoch = min(state.step * options.batch_size, count) / len(chats)
                log.add(state.step, metrics, norm, lr, force=last or state.step % options.log_every == 0, epoch=epoch)
                if last:
                    _restore(model, options, work)
                    show_replies(run, model, tokenizer, held_out or chats, options, recipe.seed, state.step)
                if last or interrupt.requested or (options.save_every and state.step % options.save_every == 0):
                    checkpoint.save(work, state.step, trainer, asdict(state), companions=files, keep_last=options.keep_last)
                if interrupt.requested and not last:
                    raise Interrupted(f"saved after step {state.step} of {steps}; the same command continues")
            if options.patience:
                how = f"stopped early after step {state.step}: " if state.step < steps else ""
                meter.console.print(f"{how}step {state.best_step} is the best, validation loss {state.best:.4f}", highlight=False)
        _restore(model, options, work)  # again, for a run that was killed just here
        save_result(run, recipe, "sft", model, source, files)
    run.mark_done("sft", steps=state.step, tokens=state.tokens, best_step=state.best_step, validation_loss=state.best)
    shutil.rmtree(work)  # last: killed before it was done, the stage would start over without them


def _fits(config: ModelConfig, tokenizer: Tokenizer, options: Sft, source: Path) -> None:
    """What the recipe alone cannot know of the model that it begins with."""
    if tokenizer.template is None:
        raise ValueError(f"{source}: the tokenizer has no chat template (chat_template.jinja), so chats cannot be written as its text")
    if not tokenizer.template.has_generation_prompt():
        raise ValueError(f"{source}: the chat template has no generation prompt, so what a reply begins with is unknown")
    if tokenizer.size > config.vocab_size:
        raise ValueError(f"{source}: the tokenizer has {tokenizer.size} tokens, the model's embedding {config.vocab_size}")
    if options.sequence_length > (limit := config.max_position_embeddings):
        raise ValueError(f"sft.sequence_length: {options.sequence_length} is more than the model's {limit} positions")


def tokenise(options: Sft, seed: int, source: Path, work: Path, spending: Spending, interrupt: Interrupt) -> None:
    """Write the chats as shards with the assistant's mask: train/, and of tasks, whose problems have a test split, validation/."""
    counts = {"train": options.documents}
    if options.tasks:
        counts["validation"] = held_out_count(options, options.documents)
    bad = BadLines(limit=options.bad_lines)
    for split, count in counts.items():
        if options.tasks and not count:
            continue
        with Meter(f"sft: tokenising {split}", count or None) as meter:

            def progress(documents: int, tokens: int, meter: Meter = meter) -> None:
                if interrupt.requested:
                    raise Interrupted("stopped while tokenising; run again to start over")
                spending.update()
                meter.update(documents, f"{tokens:,} tokens")

            write_shards(
                _documents(options, seed, split, count, bad),
                source,
                work / split,
                processes=options.processes,
                mask="assistant",
                progress=progress,
                source={"sources": list(options.sources), "tasks": [mix.model_dump() for mix in options.tasks], "split": split},
                bad=bad,
            )
    if skipped := bad.empty + bad.malformed:
        shown = escape("".join(f"\n  {example}" for example in bad.examples))
        meter.console.print(f"[yellow]{skipped} bad lines left out[/], the first:{shown}", highlight=False)


def _documents(options: Sft, seed: int, split: str, count: int, bad: BadLines) -> Iterator[Document]:
    if options.tasks:
        found = problems(options.tasks, "train" if split == "train" else "test", seed)
    else:
        found = read_documents(options.sources, field=options.field, bad=bad)
    return itertools.islice(found, count or None)


def read_chats(options: Sft, seed: int, tokenizer: Tokenizer, work: Path) -> tuple[Conversations, Conversations]:
    """Chats to learn from, and those held out. ValueError where there are none."""
    digest = tokenizer.digest()
    train = Conversations.fit(Shards.open(work / "train", digest=digest), options.sequence_length, options.too_long)
    if not len(train):
        raise ValueError(
            f"sft: nothing to learn from {train.shards.num_documents} conversations: {train.too_long} are longer than "
            f"sft.sequence_length {options.sequence_length}, {train.unlearnable} have no assistant's tokens within it"
        )
    if (work / "validation").exists():
        held_out = Conversations.fit(Shards.open(work / "validation", digest=digest), options.sequence_length, options.too_long)
        if not len(held_out):
            raise ValueError(f"sft.sequence_length: no held-out problem fits {options.sequence_length} tokens")
        return train, held_out
    count = held_out_count(options, len(train))
    if count >= len(train):
        raise ValueError("sft: a single conversation cannot be learned from and held out; set sft.validation_share=0 or give more")
    return train.split(count, seed)


def train_step(trainer: Trainer, chats: Conversations, options: Sft, seed: int, step: int, lr: float) -> tuple[Metrics, float]:
    """One optimizer step. FloatingPointError names step and conversations where a loss or gradient is not finite."""
    first = step * options.batch_size
    indices = chats.chosen(first, min(options.batch_size, reads(len(chats), options) - first), seed)
    try:
        metrics = trainer.forward_backward(list(chats.batches(indices, options.micro_batch_tokens)), answer_token)
        return metrics, trainer.step(lr)
    except FloatingPointError as error:
        raise FloatingPointError(
            f"sft step {step + 1}, conversations {', '.join(map(str, indices))} (lr {lr:.2e}): {error}. Nothing was saved over the last "
            "good checkpoint; lower sft.lr and start over with --from sft, or look at those conversations"
        ) from error


def _validate(run: Run, model: Transformer, held_out: Conversations, options: Sft, state: State, work: Path) -> None:
    """Log the validation loss, and with patience keep the best weights."""
    if not len(held_out):
        return
    loss = validation_loss(model, held_out, options.micro_batch_tokens)
    run.log("sft", state.step, validation_loss=loss)
    if state.best is not None and loss >= state.best:
        state.worse += 1
        return
    state.best, state.best_step, state.worse = loss, state.step, 0
    if options.patience:
        with new_folder(work / "best") as aside:
            save_file({name: t.detach().contiguous() for name, t in _changing(model).items()}, aside / "weights.safetensors")


def _stopped(state: State, options: Sft) -> bool:
    return options.patience > 0 and state.worse >= options.patience


def _changing(model: Transformer) -> dict[str, torch.Tensor]:
    """Everything that training changes."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad} | dict(model.named_buffers())


@torch.no_grad()
def _restore(model: Transformer, options: Sft, work: Path) -> None:
    """With patience: the best weights, in place."""
    if not options.patience:
        return
    kept = load_file(work / "best/weights.safetensors")
    for name, tensor in _changing(model).items():
        tensor.copy_(kept[name])


def show_replies(run: Run, model: Transformer, tokenizer: Tokenizer, chats: Conversations, options: Sft, seed: int, step: int) -> None:
    """Log what the model answers, greedily: to the tasks' test problems, or to the first questions of the chats."""
    if not options.samples:
        return
    if options.tasks:
        return log_answers(run, options.tasks, model, tokenizer, seed, "sft", step)
    prompts = [chats.prompt(i) for i in range(min(options.samples, len(chats)))]
    for prompt, reply in zip(prompts, answer(model, tokenizer, prompts, REPLY)):
        run.log("sft", step, sample={"prompt": tokenizer.decode(prompt, skip_special=True), "reply": reply})


def _plan(
    trainer: Trainer, chats: Conversations, held_out: Conversations, options: Sft, count: int, flops: float, price: float, spent: float
) -> Plan:
    """What the stage will take, from the time of a real micro-batch whose gradients are thrown away; validation takes a third a token.

    `count`: conversations that are read. `spent`: seconds of the stage so far.
    """
    batch = next(chats.batches(range(len(chats)), options.micro_batch_tokens))
    seconds = 0.0
    for _ in range(2):  # the first one warms up
        start = time.perf_counter()
        trainer.forward_backward([batch], answer_token)
        device.synchronize(trainer.device)
        seconds = time.perf_counter() - start
        trainer.optimizer.clear()
    tokens, steps = round(count * chats.num_tokens / len(chats)), ceil(count / options.batch_size)
    validations = 1 + sum(step == steps or validates(len(chats), options, step) for step in range(1, steps + 1))
    total = spent + seconds / batch.num_tokens * (tokens + validations * held_out.num_tokens / 3)
    memory = device.peak_memory(trainer.device) + trainer.optimizer.bytes_to_come()
    return Plan(tokens=tokens, flops=tokens * flops, seconds=total, money=total / 3600 * price, memory=memory)


def _say(
    meter: Meter,
    model: Transformer,
    chats: Conversations,
    held_out: Conversations,
    spending: Spending,
    options: Sft,
    steps: int,
    found: Path | None,
) -> None:
    plan = spending.receipt.planned
    assert plan is not None
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    share = chats.assistant_tokens / chats.num_tokens
    lines = [
        f"[bold]sft[/] {trained:,} of {parameters(model.config).total:,} parameters; {len(chats):,} conversations and {len(held_out):,} "
        f"held out; {chats.num_tokens:,} tokens, {share:.0%} of them the assistant's; {steps:,} steps; about "
        f"{format_seconds(plan.seconds)}, {format_flops(plan.flops)} and ${plan.money:.4f}"
    ]
    if chats.cut or chats.too_long or chats.unlearnable:
        lines.append(
            f"of all {chats.shards.num_documents:,} conversations {chats.cut:,} were cut to {options.sequence_length} tokens, "
            f"{chats.too_long:,} left out for their length, {chats.unlearnable:,} because the assistant says nothing in them"
        )
    if found:
        lines.append(f"continuing from {found.name}")
    for line in lines:
        meter.console.print(line, highlight=False, soft_wrap=True)
