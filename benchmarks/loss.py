"""Training the three models of benchmarks/match.py on real text: loss by tokens, by time and by money.

Problem: architectures are honestly compared at equal tokens, at equal wall clock and at equal money, and these disagree. Approach: three
ordinary runs (`jevons run`) that share one prepared corpus, differ in [model] alone and make as many steps. The learning rate is constant
after its warmup, so that a model is no better off at a point because its schedule ends there, and losses may be read anywhere: at equal
tokens at the end, at equal time when the fastest is done. Time is the receipt's, validation included, money its price. A run that was
interrupted continues with the same command. Not done: a learning rate for each architecture.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import statistics
import sys
import time
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomli_w
import torch
from latency import expected_unique, unique, watch

from jevons.data.batch import Batch
from jevons.data.tokenizer import Tokenizer
from jevons.model.attend import Packed
from jevons.model.config import ModelConfig
from jevons.model.folder import load_model
from jevons.model.transformer import Transformer
from jevons.record import read_run
from jevons.stages.life import live
from jevons.train.corpus import Corpus
from jevons.train.loss import next_token
from jevons.train.trainer import Trainer

Point = tuple[float, float]


def write_recipes(configs: dict[str, ModelConfig], root: Path, prepare: dict[str, Any], pretrain: dict[str, Any], **top: Any) -> None:
    """root/NAME.toml for each; `top` are the keys at a recipe's top."""
    root.mkdir(parents=True, exist_ok=True)
    for name, config in configs.items():
        model = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if getattr(config, f.name) != f.default}
        model = {"model_type": config.model_type} | {k: list(v) if isinstance(v, tuple) else v for k, v in model.items()}
        values = {"name": name, "seed": 0, **top, "model": model, "prepare": prepare, "pretrain": pretrain}
        (root / f"{name}.toml").write_text(tomli_w.dumps(values), encoding="utf-8")


def train(name: str, root: Path, first: str) -> None:
    """The run root/NAME, or what is left of it to do, on the corpus that the run `first` prepared. SystemExit where it was stopped."""
    corpus, prepared = root / first / "prepare", root / name / "prepare"
    if name != first and not (prepared / "DONE.json").exists():
        shutil.rmtree(prepared, ignore_errors=True)
        shutil.copytree(corpus, prepared)
    with contextlib.redirect_stdout(sys.stderr):
        live(str(root / f"{name}.toml"), [], root)


@torch.no_grad()
def chosen(folder: Path, batches: Sequence[int], windows: int = 8, draws: int = 20) -> dict[str, dict[str, float]]:
    """How many different experts or rows a layer of the trained model reads for a batch of tokens, each from anywhere in held-out text.

    Means over layers and draws; the model's weights are random no more, so its choices are not uniform.
    """
    model = load_model(folder / "pretrain" / "model", dtype=torch.float32)
    tokenizer = Tokenizer.load(folder / "prepare" / "tokenizer")
    length = model.config.max_position_embeddings
    corpus = Corpus.open(folder / "prepare", tokenizer, sequence_length=length, split_documents=True, seed=0)
    kept = watch(model)
    read = [corpus.validation.batch(i, 1) for i in range(min(windows, corpus.validation.num_windows))]
    for batch in read:
        model(batch.tokens_T, batch.positions_T, Packed(batch.cu_seqlens))
    found = kept.experts or kept.rows
    layers = [torch.cat(found[i :: len(found) // len(read)]) for i in range(len(found) // len(read))]
    generator = torch.Generator().manual_seed(0)
    out = {}
    for size in batches if layers else ():
        tokens = [torch.randperm(len(layers[0]), generator=generator)[:size] for _ in range(draws)]
        counts = [count for drawn_B in tokens for count in unique([layer[drawn_B] for layer in layers])]
        out[str(size)] = {"unique": statistics.mean(counts), "expected_unique": expected_unique(model.config, size)}
    return out


def curves(folder: Path) -> dict[str, list[Point]]:
    """Validation loss of a run by `tokens` and by `seconds`; at step 0 both are 0."""
    stage = read_run(folder).stages["pretrain"]
    out: dict[str, list[Point]] = {"tokens": [], "seconds": []}
    for step, loss in stage.points("validation_loss"):
        for axis, points in out.items():
            points.append((stage.series[axis][int(step)] if step else 0.0, loss))
    return out


def at(points: Sequence[Point], x: float) -> float:
    """A curve's value between its points."""
    i = min(max(bisect_right([p[0] for p in points], x), 1), len(points) - 1)
    (x0, y0), (x1, y1) = points[i - 1 : i + 1]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def compare(configs: dict[str, ModelConfig], root: Path, price: float) -> dict[str, Any]:
    """Curves and losses at equal tokens and at equal time, of finished runs."""
    found = {name: curves(root / name) for name in configs}
    tokens, seconds = (min(f[axis][-1][0] for f in found.values()) for axis in ("tokens", "seconds"))
    money = seconds / 3600 * price
    return {
        "tokens": tokens, "seconds": seconds, "money": money, "price_per_hour": price, "curves": found,
        "models": {
            name: {
                "loss_at_equal_tokens": at(f["tokens"], tokens), "loss_at_equal_time": at(f["seconds"], seconds),
                "loss_at_equal_money": at(f["seconds"], money / price * 3600), "seconds": f["seconds"][-1][0],
                "tokens_per_second": f["tokens"][-1][0] / f["seconds"][-1][0],
            }
            for name, f in found.items()
        },
    }  # fmt: skip


def step_seconds(config: ModelConfig, tokens: int, steps: int, dtype: torch.dtype) -> dict[str, float]:
    """Seconds of a training step on random tokens, and of the optimizer in it; medians without the first step."""
    torch.manual_seed(0)
    model = Transformer(config).to(dtype)
    model.init_weights(torch.Generator().manual_seed(0))
    trainer = Trainer(model)
    length = min(256, tokens)
    rows: list[tuple[float, float]] = []
    for _ in range(steps + 1):
        drawn = torch.randint(0, config.vocab_size, (tokens // length, length + 1))
        batch = Batch(
            tokens_T=drawn[:, :-1].flatten(), positions_T=torch.arange(length).repeat(len(drawn)),
            cu_seqlens=torch.arange(0, len(drawn) * length + 1, length, dtype=torch.int32), targets_T=drawn[:, 1:].flatten(),
            weights_T=torch.ones(len(drawn) * length),
        )  # fmt: skip
        start = time.perf_counter()
        trainer.forward_backward([batch], next_token)
        middle = time.perf_counter()
        trainer.step(1e-4)
        rows.append((time.perf_counter() - start, time.perf_counter() - middle))
    return {"step": statistics.median(r[0] for r in rows[1:]), "optimizer": statistics.median(r[1] for r in rows[1:])}
