"""Checkpoints of a running stage: a Hugging Face folder with the trainer's state inside it.

    STAGE/checkpoints/step-000200/{config.json, model.safetensors, tokenizer.json, ..., trainer/{state.safetensors, progress.json}}

Of a model with adapters only those are written, in PEFT's format: the weights under them do not change. Each is written aside,
synced and renamed, so the newest folder that exists is complete whenever the process died. Only after that are older ones
deleted. One that is being written is invisible.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jevons.data.disk import new_folder
from jevons.model.folder import write_folder
from jevons.train.lora import adapters, save_adapter
from jevons.train.trainer import Trainer


def newest(root: Path) -> Path | None:
    """The checkpoint to continue from, or None."""
    found = sorted(root.glob("step-*/trainer/progress.json"))
    return found[-1].parent.parent if found else None


def save(root: Path, step: int, trainer: Trainer, progress: dict[str, Any], *, companions: Sequence[Path], keep_last: int) -> Path:
    """Write the checkpoint of `step` (steps done so far), then delete all but the newest `keep_last`."""
    path = root / f"step-{step:08d}"
    with new_folder(path) as aside:
        if adapters(trainer.model):
            save_adapter(trainer.model, aside)
        else:
            write_folder(trainer.model, aside, companions=companions)
        trainer.save(aside / "trainer", {**progress, "step": step})
    for old in sorted(root.glob("step-*"))[:-keep_last]:
        shutil.rmtree(old)
    return path


def load(path: Path, trainer: Trainer) -> dict[str, Any]:
    """Continue from `path`; returns the progress that was saved."""
    return trainer.load(path / "trainer")
