"""Pretraining: next-token prediction over the shards, from scratch or from a checkpoint.

    STAGE/checkpoints/step-N/   while it trains        STAGE/model/   the result, a Hugging Face folder        STAGE/DONE.json
"""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from jevons.cost.arithmetic import parameters, train_flops, weight_bytes
from jevons.cost.profile import Profile
from jevons.cost.receipt import Plan, format_flops, format_seconds
from jevons.data.tokenizer import Tokenizer
from jevons.model.config import ModelConfig
from jevons.model.folder import companions, load_model, resolve, save_model
from jevons.model.transformer import Transformer
from jevons.progress import Meter
from jevons.recipe import Recipe
from jevons.run import Interrupt, Interrupted, Run
from jevons.section import Pretrain
from jevons.stages.forecast import forecast, measured
from jevons.stages.origin import make_trainer
from jevons.stages.prepare import tokenizer_folder
from jevons.stages.sample import log_samples
from jevons.stages.step import StepLog
from jevons.train import checkpoint, device
from jevons.train.corpus import Corpus, validation_loss
from jevons.train.loss import next_token
from jevons.train.schedule import Phase, Schedule, build
from jevons.train.trainer import Metrics, Trainer


def pretrain(run: Run, recipe: Recipe, interrupt: Interrupt) -> None:
    """Run the stage, from its newest checkpoint where there is one."""
    options = recipe.pretrain
    assert options is not None
    where = device.choose(recipe.device)
    folder = run.stage_folder("pretrain")
    folder.mkdir(exist_ok=True)
    tokenizer = Tokenizer.load(tokenizer_folder(run))
    files = companions(tokenizer_folder(run))
    schedule = make_schedule(options)
    with run.spend("pretrain") as spending:
        model = make_model(recipe, tokenizer, where)
        _fits(model, tokenizer, options)
        corpus = open_corpus(run.stage_folder("prepare"), tokenizer, recipe)
        trainer = make_trainer(model, options, recipe.seed)
        memory = memory_schedule(options, model.config)
        peak = spending.receipt.peak_flops = device.measure_peak(where, model.model.embed_tokens.weight.dtype)
        flops = train_flops(model.config, options.sequence_length, mtp=_mtp(model, options))
        step_tokens = options.batch_size * options.sequence_length
        if spending.receipt.planned is None:
            spending.receipt.planned = _plan(run, recipe, trainer, corpus, flops, spending.update().seconds)
        first = 0
        if (found := checkpoint.newest(folder / "checkpoints")) is not None:
            first = int(checkpoint.load(found, trainer)["step"])
        run.truncate_metrics("pretrain", first if found else -1)
        run.note(parameters=parameters(model.config).total)
        with Meter("pretrain", options.steps) as meter:
            show_plan(meter, model, spending.receipt.planned, peak, first, found)
            if first == 0:
                _validate(run, model, corpus, options.evaluate_windows, 0)
            log = StepLog(run, "pretrain", spending, meter, flops, first * step_tokens)
            for step in range(first, options.steps):
                lr = schedule.at(step)
                metrics, norm = train_step(trainer, corpus, options, step, lr, memory.at(step))
                log.add(step + 1, metrics, norm, lr, force=(step + 1) % options.log_every == 0 or step + 1 == options.steps)
                last = step + 1 == options.steps
                if _due(options.evaluate_every, step) or last:
                    _validate(run, model, corpus, options.evaluate_windows, step + 1)
                if _due(options.sample_every, step) or last:
                    log_samples(run, recipe, model, tokenizer, corpus.validation.shards, "pretrain", step + 1)
                if _due(options.save_every, step) or last or interrupt.requested:
                    progress = {"tokens": (step + 1) * step_tokens}
                    checkpoint.save(folder / "checkpoints", step + 1, trainer, progress, companions=files, keep_last=options.keep_last)
                if interrupt.requested and not last:
                    raise Interrupted(f"saved after step {step + 1} of {options.steps}; the same command continues")
        save_model(model, folder / "model", companions=files)
    run.mark_done("pretrain", steps=options.steps, tokens=options.steps * step_tokens)
    shutil.rmtree(folder / "checkpoints")  # last: killed before it was done, the stage would start over without them


def open_corpus(prepared: Path, tokenizer: Tokenizer, recipe: Recipe) -> Corpus:
    """What [prepare] left, in the windows of [pretrain]."""
    options = recipe.pretrain
    assert options is not None
    length, split = options.sequence_length, options.split_documents
    return Corpus.open(prepared, tokenizer, sequence_length=length, split_documents=split, seed=recipe.seed)


def make_schedule(options: Pretrain) -> Schedule:
    return build(
        options.schedule,
        peak=options.lr,
        steps=options.steps,
        warmup=options.warmup_steps,
        minimum=options.minimum_lr,
        decay=options.decay_steps,
    )


def _mtp(model: Transformer, options: Pretrain) -> bool:
    return bool(options.mtp_weight) and model.config.num_nextn_predict_layers > 0


def _fits(model: Transformer, tokenizer: Tokenizer, options: Pretrain) -> None:
    """What a recipe alone cannot know where its model comes from model.path."""
    if tokenizer.size > (size := model.config.vocab_size):
        raise ValueError(f"the tokenizer has {tokenizer.size} tokens, the model's embedding {size}: take the model's own")
    if options.sequence_length > (limit := model.config.max_position_embeddings):
        raise ValueError(f"pretrain.sequence_length: {options.sequence_length} is more than the model's {limit} positions")
    options.check_memory(model.config)


def train_step(trainer: Trainer, corpus: Corpus, options: Pretrain, step: int, lr: float, memory: float = 1.0) -> tuple[Metrics, float]:
    """One optimizer step. FloatingPointError names step and windows where a loss or gradient is not finite."""
    first, size = step * options.batch_size, options.micro_batch_size or options.batch_size
    batches = [corpus.train.batch(first + i, size) for i in range(0, options.batch_size, size)]
    try:
        metrics = trainer.forward_backward(batches, next_token)
        return metrics, trainer.step(lr, memory)
    except FloatingPointError as error:
        raise FloatingPointError(
            f"pretrain step {step + 1}, windows {first} to {first + options.batch_size - 1} (lr {lr:.2e}): {error}. "
            "Nothing was saved over the last good checkpoint; lower pretrain.lr or lengthen pretrain.warmup_steps "
            "and start over with --from pretrain, or look at that data"
        ) from error


def memory_schedule(options: Pretrain, config: ModelConfig) -> Schedule:
    """What multiplies the learning rate of memory layers' values: `memory_lr`, falling to 1 along a line (arXiv 2411.12364)."""
    first = options.memory_lr or (1.0 if config.memory_shared else 4.0)  # UltraMemV2's released run has no higher rate
    return Schedule((Phase(options.steps * (options.memory_lr_share or 1.0), first, 1.0),))


def make_model(recipe: Recipe, tokenizer: Tokenizer, where: torch.device) -> Transformer:
    """The recipe's model: new weights from its seed, or model.path's."""
    dtype = getattr(torch, recipe.dtype)
    if "path" in recipe.model:
        return load_model(resolve(recipe.model["path"]), dtype=dtype, device=where)
    ids: dict[str, Any] = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    config = replace(recipe.config(), **ids)
    needed, there = weight_bytes(config, 4, mtp=True), device.total_memory(torch.device("cpu"))
    if needed > there:  # to be made, before gradients and moments
        raise ValueError(
            f"model: {parameters(config).total:,} parameters need {needed / 2**30:,.0f} GiB, there are {there / 2**30:,.0f}: "
            f"take a smaller model; `jevons plan {recipe.name}` says what would hold this one"
        )
    model = Transformer(config)
    model.init_weights(torch.Generator().manual_seed(recipe.seed))
    model = model.to(where, dtype)
    for router in model.routers.values():
        if router.e_score_correction_bias is not None:
            router.e_score_correction_bias = router.e_score_correction_bias.float()  # stays fp32 whatever the model is in
    return model


def _validate(run: Run, model: Transformer, corpus: Corpus, windows: int, step: int) -> None:
    loss, bits = validation_loss(model, corpus, windows)
    run.log("pretrain", step, validation_loss=loss, bits_per_byte=bits)


def _due(every: int, step: int) -> bool:
    return every > 0 and (step + 1) % every == 0


def _plan(run: Run, recipe: Recipe, trainer: Trainer, corpus: Corpus, flops: float, spent: float) -> Plan:
    """What the stage will take: by this device's calibration where there is one, else by a real step whose gradients are thrown away.

    `spent`: seconds of the stage so far. What else it does beside steps is then not in the plan.
    """
    options, config = recipe.pretrain, trainer.model.config
    assert options is not None
    entry = measured(recipe, "pretrain", config, Profile.load(run.folder.parent, run.device))
    if entry is not None:
        return forecast(recipe, "pretrain", config, entry, run.carried)
    size = options.micro_batch_size or options.batch_size
    seconds = 0.0
    for i in range(2):  # the first one warms up
        batch = corpus.train.batch(i * size, size)
        start = time.perf_counter()
        trainer.forward_backward([batch], next_token)
        device.synchronize(trainer.device)
        seconds = time.perf_counter() - start
        trainer.optimizer.clear()
    tokens = options.steps * options.batch_size * options.sequence_length
    total = spent + seconds * options.steps * options.batch_size / size
    memory = device.peak_memory(trainer.device) + trainer.optimizer.bytes_to_come()
    return Plan(tokens=tokens, flops=tokens * flops, seconds=total, money=total / 3600 * recipe.price_per_hour, memory=memory)


def show_plan(meter: Meter, model: Transformer, plan: Plan, peak: float, first: int, found: Path | None) -> None:
    count = parameters(model.config)
    meter.console.print(
        f"[bold]pretrain[/] {count.total:,} parameters, {count.active:,} active a token; "
        f"{plan.tokens:,} tokens, {format_flops(plan.flops)}; measured peak {format_flops(peak)}/s; "
        f"about {format_seconds(plan.seconds)} and ${plan.money:.4f}",
        highlight=False,
        soft_wrap=True,
    )
    if found:
        meter.console.print(f"continuing from {found.name}", highlight=False)
