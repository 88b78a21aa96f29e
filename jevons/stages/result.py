"""What a training stage leaves: STAGE/model, a Hugging Face folder, and STAGE/adapter in PEFT's format where adapters were trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jevons.data.disk import new_folder
from jevons.model.folder import save_model
from jevons.model.transformer import Transformer
from jevons.recipe import TRAINING, Recipe
from jevons.run import Run
from jevons.train.lora import adapters, merge, save_adapter


def save_result(run: Run, recipe: Recipe, stage: str, model: Transformer, source: Path, files: Sequence[Path]) -> None:
    """Adapters are written, then merged into the model that is saved. `source` is what the stage began with."""
    folder = run.stage_folder(stage)
    if adapters(model):
        trained_here = any(earlier in TRAINING for earlier in recipe.stages[: recipe.stages.index(stage)])
        with new_folder(folder / "adapter") as aside:
            save_adapter(model, aside, base=str(source) if trained_here else recipe.model["path"])
        merge(model)
    save_model(model, folder / "model", companions=files)
