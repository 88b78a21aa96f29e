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

from jevons.cost.arithmetic import parameters, train_flops
from jevons.cost.receipt import Plan, format_flops, format_seconds
from jevons.data.tokenizer import Tokenizer
from jevons.model.folder import companions, load_model, resolve, save_model
from jevons.model.transformer import Transformer
from jevons.progress import Meter
from jevons.recipe import Pretrain, Recipe
from jevons.run import Interrupt, Interrupted, Run, Spending
from jevons.stages.prepare import tokenizer_folder
from jevons.stages.sample import log_samples
from jevons.train import checkpoint, device
from jevons.train.balance import max_violation
from jevons.train.corpus import Corpus, validation_loss
from jevons.train.loss import next_token
from jevons.train.schedule import build
from jevons.train.trainer import Metrics, Trainer


def pretrain(run: Run, recipe: Recipe, interrupt: Interrupt) -> None:
    """Run the stage, from its newest checkpoint where there is one."""
    options = recipe.pretrain
    assert options is not None
    where = device.choose(recipe.device)
    folder = run.stage_folder("pretrain")
    folder.mkdir(exist_ok=True)
    tokenizer = Tokenizer.load(tokenizer_folder(run))
    model = make_model(recipe, tokenizer, where)
    _fits(model, tokenizer, options)
    corpus = Corpus.open(
        run.stage_folder("prepare"),
        tokenizer,
        sequence_length=options.sequence_length,
        split_documents=options.split_documents,
        seed=recipe.seed,
    )
    trainer = Trainer(
        model,
        betas=options.betas,
        weight_decay=options.weight_decay,
        clip=options.clip,
        mtp_weight=options.mtp_weight,
        balance_weight=options.balance_weight,
        bias_speed=options.bias_speed,
        recompute=options.recompute,
        compile=options.compile,
    )
    schedule = build(
        options.schedule,
        peak=options.lr,
        steps=options.steps,
        warmup=options.warmup_steps,
        minimum=options.minimum_lr,
        decay=options.decay_steps,
    )
    peak = device.measure_peak(where, model.model.embed_tokens.weight.dtype)
    flops = train_flops(model.config, options.sequence_length, mtp=bool(options.mtp_weight) and model.config.num_nextn_predict_layers > 0)
    step_tokens = options.batch_size * options.sequence_length
    plan = _plan(trainer, corpus, options, flops, recipe.price_per_hour)
    first = 0
    if (found := checkpoint.newest(folder / "checkpoints")) is not None:
        first = int(checkpoint.load(found, trainer)["step"])
    run.truncate_metrics("pretrain", first if found else -1)
    run.note(parameters=parameters(model.config).total)

    files = companions(tokenizer_folder(run))
    with run.spend("pretrain", peak_flops=peak, planned=plan) as spending, Meter("pretrain", options.steps) as meter:
        show_plan(meter, model, plan, peak, first, found)
        if first == 0:
            _validate(run, model, corpus, options.evaluate_windows, 0)
        log = StepLog(run, spending, meter, flops)
        for step in range(first, options.steps):
            lr = schedule.at(step)
            metrics, norm = train_step(trainer, corpus, options, step, lr)
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


def _fits(model: Transformer, tokenizer: Tokenizer, options: Pretrain) -> None:
    """What a recipe alone cannot know where its model comes from model.path."""
    if tokenizer.size > (size := model.config.vocab_size):
        raise ValueError(f"the tokenizer has {tokenizer.size} tokens, the model's embedding {size}: take the model's own")
    if options.sequence_length > (limit := model.config.max_position_embeddings):
        raise ValueError(f"pretrain.sequence_length: {options.sequence_length} is more than the model's {limit} positions")


def train_step(trainer: Trainer, corpus: Corpus, options: Pretrain, step: int, lr: float) -> tuple[Metrics, float]:
    """One optimizer step. FloatingPointError names step and windows where a loss or gradient is not finite."""
    first, size = step * options.batch_size, options.micro_batch_size or options.batch_size
    batches = [corpus.train.batch(first + i, size) for i in range(0, options.batch_size, size)]
    try:
        metrics = trainer.forward_backward(batches, next_token)
        return metrics, trainer.step(lr)
    except FloatingPointError as error:
        raise FloatingPointError(
            f"pretrain step {step + 1}, windows {first} to {first + options.batch_size - 1} (lr {lr:.2e}): {error}. "
            "Nothing was saved over the last good checkpoint; lower pretrain.lr or lengthen pretrain.warmup_steps "
            "and start over with --from pretrain, or look at that data"
        ) from error


def make_model(recipe: Recipe, tokenizer: Tokenizer, where: torch.device) -> Transformer:
    """The recipe's model: new weights from its seed, or model.path's."""
    dtype = getattr(torch, recipe.dtype)
    if "path" in recipe.model:
        return load_model(resolve(recipe.model["path"]), dtype=dtype, device=where)
    ids: dict[str, Any] = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    config = replace(recipe.config(), **ids)
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


def _plan(trainer: Trainer, corpus: Corpus, options: Pretrain, flops: float, price: float) -> Plan:
    """What the stage will take, from the time of a real step whose gradients are thrown away."""
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
    total = seconds * options.steps * options.batch_size / size
    return Plan(tokens=tokens, flops=tokens * flops, seconds=total, money=total / 3600 * price)


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


class StepLog:
    """Rows of metrics, and the progress line, from steps."""

    def __init__(self, run: Run, spending: Spending, meter: Meter, flops: float) -> None:
        self.run, self.spending, self.meter, self.flops = run, spending, meter, flops
        self.tokens, self.since = 0, time.perf_counter()
        self.loads: dict[int, torch.Tensor] = {}

    def add(self, step: int, metrics: Metrics, norm: float, lr: float, *, force: bool) -> None:
        self.tokens += metrics.tokens
        for layer, loads_E in metrics.loads.items():
            self.loads[layer] = self.loads[layer] + loads_E if layer in self.loads else loads_E
        total = step * metrics.tokens
        receipt = self.spending.update(tokens=total, flops=total * self.flops)
        rate = self.tokens / (time.perf_counter() - self.since)
        self.meter.update(step, f"loss {metrics.loss:.3f}  {rate:,.0f} tok/s  ${receipt.money:.4f}")
        if not force:
            return
        row: dict[str, Any] = {
            "tokens": total,
            "loss": metrics.loss,
            "lr": lr,
            "grad_norm": norm,
            "tokens_per_second": rate,
            "seconds": receipt.seconds,
            "money": receipt.money,
        }
        if metrics.mtp_loss is not None:
            row["mtp_loss"] = metrics.mtp_loss
        if metrics.balance_loss is not None:
            row["balance_loss"] = metrics.balance_loss
        if self.loads:
            row["max_violation"] = max(float(max_violation(loads_E)) for loads_E in self.loads.values())
            shares = [(loads_E / loads_E.sum()).tolist() for _, loads_E in sorted(self.loads.items())]
            self.run.log("pretrain", step, loads=[[round(x, 5) for x in share] for share in shares])
        self.run.log("pretrain", step, **row)
        self.tokens, self.since, self.loads = 0, time.perf_counter(), {}
