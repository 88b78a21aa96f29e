"""Reinforcement learning on problems whose answers can be checked: sample groups, grade, compare, train, again.

    STAGE/checkpoints/step-N/   while it trains        STAGE/model/   the result, a Hugging Face folder        STAGE/DONE.json

DeepSeek-R1's GRPO (arXiv 2501.12948) and its successors; what differs between them is in train/policy.py (the loss) and
train/advantage.py (what an answer is compared with). Sampler and trainer are one module: a step's new weights reach the sampler by telling
it to forget its cache. The loop is synchronous: every answer is from the weights of its own step, unless a step makes several updates.

Groups whose rewards are all equal teach nothing. They are left out of the batch and counted in the mean, which gives the gradient that
computing them would (`drop`), or replaced by groups of other problems (`refill`, DAPO's dynamic sampling).

Everything that a step does follows from the weights and the checkpoint's few numbers, so a killed run goes on to the same rewards and
weights, bit for bit. Not done: sampling while training, rollouts kept over steps.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from jevons.cost.arithmetic import parameters
from jevons.cost.profile import Profile
from jevons.data.batch import Batch
from jevons.data.tokenizer import Tokenizer
from jevons.data.trajectory import Lesson, divide, pack_lessons
from jevons.engine.engine import Engine
from jevons.model.folder import companions, load_model
from jevons.model.transformer import Transformer
from jevons.progress import Meter
from jevons.recipe import Recipe
from jevons.run import Interrupt, Interrupted, Run
from jevons.section import Rl
from jevons.stages.classroom import Classroom, Harvest
from jevons.stages.forecast import forecast, measured, trains_all
from jevons.stages.origin import make_trainer, origin
from jevons.stages.reference import Reference
from jevons.stages.rehearsal import rehearse
from jevons.stages.result import save_result
from jevons.stages.scorecard import Scorecard
from jevons.train import checkpoint, device
from jevons.train.advantage import advantages, normaliser, token_weight
from jevons.train.loss import Loss
from jevons.train.policy import policy_loss
from jevons.train.schedule import build
from jevons.train.trainer import Metrics, Trainer


def rl(run: Run, recipe: Recipe, interrupt: Interrupt) -> None:
    """Run the stage, from its newest checkpoint where there is one."""
    options = recipe.rl
    assert options is not None
    where = device.choose(recipe.device)
    folder, source = run.stage_folder("rl"), origin(run, recipe, "rl")
    folder.mkdir(exist_ok=True)
    tokenizer = Tokenizer.load(source)
    files = companions(source)
    dtype = getattr(torch, recipe.dtype)
    with run.spend("rl") as spending:
        model = load_model(source, dtype=dtype, device=where)
        trainer = make_trainer(model, options, recipe.seed)
        engine = make_engine(model, tokenizer, options)
        classroom = Classroom(options, tokenizer, engine, recipe.seed)
        reference = Reference(folder / "reference", source, options.reference_every, dtype, where) if options.kl_weight else None
        first = 0
        if (found := checkpoint.newest(folder / "checkpoints")) is not None:
            progress: dict[str, Any] = checkpoint.load(found, trainer)
            first = progress["step"]
            classroom.load(progress["classroom"])
            if reference:
                reference.resume(first)
        run.truncate_metrics("rl", first if found else -1)
        run.note(parameters=parameters(model.config).total)
        spending.receipt.peak_flops = device.measure_peak(where, dtype)
        schedule = build(options.schedule, peak=options.lr, steps=options.steps, warmup=options.warmup_steps, minimum=0.0, decay=0)
        loss = policy_loss(options.objective)

        rehearsal = None
        if options.dry_run:
            spent = spending.update().seconds
            rehearsal = rehearse(
                trainer, classroom, options, loss, reference, recipe.price_per_hour, spent, partial(stop, interrupt, first)
            )
        if spending.receipt.planned is None:
            entry = measured(recipe, "rl", model.config, Profile.load(run.folder.parent, run.device))
            worst = rehearsal.plan if rehearsal else None
            spending.receipt.planned = forecast(recipe, "rl", model.config, entry, run.carried) if entry else worst
        with Meter("rl", options.steps) as meter:
            card = Scorecard(run, spending, meter, options, engine, progress["totals"] if found else {})
            card.open(model, found, rehearsal)
            card.notices(classroom.tasks)
            if first == 0:
                card.held_out(0, classroom.measure() if options.evaluate_every else {})
            for step in range(first, options.steps):
                handover = hand_over(engine, step)
                before = classroom.state()
                try:
                    harvest = classroom.collect(step, step / options.steps, partial(watch, card, interrupt, step))
                except Interrupted:  # sampling is where the time goes: what it has so far is drawn again
                    if step and not (folder / "checkpoints" / f"step-{step:08d}").exists():
                        state = {"classroom": before, "totals": card.totals}
                        checkpoint.save(folder / "checkpoints", step, trainer, state, companions=files, keep_last=options.keep_last)
                    raise
                if step == 0:
                    classroom.check_thinking(harvest.groups)
                lr, start = schedule.at(step), time.perf_counter()
                if where.type == "cuda":
                    engine.release()  # the cache's memory, for the trainer
                learned = learn(trainer, harvest, options, loss, lr, reference)
                card.add(step + 1, harvest, learned, lr, handover, time.perf_counter() - start)
                done = step + 1
                last = done == options.steps
                engine.new_weights(done)  # also what is measured and shown must not stand on the old ones' cache
                if due(options.evaluate_every, done) or (last and options.evaluate_every):
                    card.held_out(done, classroom.measure())
                if due(options.sample_every, done) or (last and options.sample_every):
                    card.samples(done, classroom.show(done))
                renewed = reference is not None and reference.due(done)
                if reference and renewed:
                    reference.renew(done, model)
                if due(options.save_every, done) or last or renewed or interrupt.requested:
                    state = {"classroom": classroom.state(), "totals": card.totals}
                    checkpoint.save(folder / "checkpoints", done, trainer, state, companions=files, keep_last=options.keep_last)
                if reference and renewed:
                    reference.forget(done)
                if interrupt.requested and not last:
                    raise Interrupted(f"saved after step {done} of {options.steps}; the same command continues")
        save_result(run, recipe, "rl", model, source, files)
        classroom.close()
    run.mark_done("rl", steps=options.steps, **card.totals)
    shutil.rmtree(folder / "checkpoints")
    shutil.rmtree(folder / "reference", ignore_errors=True)


def watch(card: Scorecard, interrupt: Interrupt, step: int, drawn: int) -> None:
    """While a step is sampled."""
    card.show(step, drawn)
    stop(interrupt, step)


def stop(interrupt: Interrupt, step: int) -> None:
    """Interrupted, where that was asked for, while nothing is learned yet of the step that follows."""
    if interrupt.requested and step:
        raise Interrupted(f"stopped after step {step}; the same command continues")
    if interrupt.requested:
        raise Interrupted("stopped before the first step; the same command starts the stage over")


def make_engine(model: Transformer, tokenizer: Tokenizer, options: Rl) -> Engine:
    """The sampler: over the trainer's own module, with room for every answer of a step at once."""
    return Engine(
        model,
        max_sequences=options.problems * options.group,
        cache_bytes=round(options.cache_gb * 2**30),
        stop_ids=tokenizer.ends(model.config.eos_token_ids),
    )


def hand_over(engine: Engine, version: int) -> float:
    """The trainer's weights to the sampler: it has them already and forgets what it cached of the old ones. Seconds."""
    start = time.perf_counter()
    engine.new_weights(version)
    return time.perf_counter() - start


def learn(
    trainer: Trainer, harvest: Harvest, options: Rl, loss: Callable[[Tensor, Tensor, Batch], Loss], lr: float, reference: Reference | None
) -> list[tuple[Metrics, float]]:
    """The optimizer's steps on one step's groups: metrics and gradient norm of each; none where no group has a signal."""
    updates = lessons(harvest, options)
    batches = [pack(part, options) for part, _ in updates]
    every = [batch for part in batches for batch in part]
    if options.importance_cap:  # how far the sampler is from the trainer, at the weights that both had
        for batch, logps_T in zip(every, trainer.score(every)):
            batch.old_logps_T = logps_T
    if reference:
        reference.score(trainer, every)
    if options.loss == "mirror":  # every step is a problem of its own, with the policy before it as the reference
        trainer.optimizer.forget()
    out = []
    for part, (_, total) in zip(batches, updates):
        if part:
            metrics = trainer.forward_backward(part, loss, total)
            out.append((metrics, trainer.step(lr)))
    return out


def lessons(harvest: Harvest, options: Rl) -> list[tuple[list[Lesson], float]]:
    """For every update of the step its lessons and what their sum is divided by."""
    counted = harvest.groups if options.no_signal == "drop" else harvest.kept
    if not counted:
        return []
    taught = counted if trains_all(options) else harvest.kept
    advantages_PG = advantages(torch.tensor([group.rewards for group in counted]), options.advantage)
    whole = options.loss == "mirror"  # it squares sums over whole samples, so there is nothing to average inside one
    how = "token" if whole else options.aggregation
    out = []
    for part in range(options.updates):
        rows = range(part, len(counted), options.updates)
        lengths = [t.drawn for row in rows for t in counted[row].trajectories]
        part_lessons = [
            Lesson(t, advantage, token_weight(how, t.drawn))
            for row in rows
            if counted[row] in taught
            for t, advantage in zip(counted[row].trajectories, advantages_PG[row].tolist())
        ]
        out.append((part_lessons, float(len(lengths)) if whole else normaliser(how, lengths, options.max_tokens)))
    return out


def pack(part: Sequence[Lesson], options: Rl) -> list[Batch]:
    """Micro-batches, a prompt held once for all of its answers; multi-token prediction cannot look across that."""
    runs = divide(part, options.micro_batch_tokens)
    return [pack_lessons(run, temperature=options.temperature, share=not options.mtp_weight) for run in runs]


def due(every: int, done: int) -> bool:
    return every > 0 and done % every == 0
