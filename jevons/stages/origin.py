"""What training stages begin with: the model of the stage before, or the recipe's, and a trainer over it."""

from __future__ import annotations

from pathlib import Path

from jevons.model.folder import resolve
from jevons.model.transformer import Transformer
from jevons.recipe import TRAINING, Recipe
from jevons.run import Run
from jevons.section import Pretrain, Rl, Sft
from jevons.train.lora import add_lora
from jevons.train.trainer import Trainer


def origin(run: Run, recipe: Recipe, stage: str) -> Path:
    """The Hugging Face folder that `stage` starts from: the model of the last training stage before it, else model.path."""
    before = recipe.stages[: recipe.stages.index(stage)]
    for earlier in reversed([s for s in before if s in TRAINING]):
        return run.stage_folder(earlier) / "model"
    return resolve(recipe.model["path"])


def make_trainer(model: Transformer, options: Pretrain | Sft | Rl, seed: int) -> Trainer:
    """What is trained: adapters, or all weights but those that no loss reaches, which weight decay would shrink."""
    if lora := None if isinstance(options, Pretrain) else options.lora:
        add_lora(model, rank=lora.rank, alpha=lora.alpha, targets=lora.targets, rslora=lora.rslora, seed=seed)
    elif not options.mtp_weight:
        model.model.layers[model.config.num_hidden_layers :].requires_grad_(False)
    return Trainer(
        model,
        betas=options.betas,
        weight_decay=options.weight_decay,
        clip=options.clip,
        mtp_weight=options.mtp_weight,
        balance_weight=options.balance_weight,
        bias_speed=options.bias_speed,
        recompute=options.recompute,
        compile=isinstance(options, Pretrain) and options.compile,
    )
