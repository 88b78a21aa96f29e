"""The model that the policy is kept near: the one that training began with, or the policy as it was every so many steps (R1: 400)."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from jevons.data.batch import Batch
from jevons.model.folder import load_model, save_model
from jevons.model.transformer import Transformer
from jevons.train.trainer import Trainer


class Reference:
    """Costs a second copy of the weights. `every` 0: never renewed. What a renewed one was is kept in `folder`, for resuming."""

    def __init__(self, folder: Path, source: Path, every: int, dtype: torch.dtype, device: torch.device) -> None:
        self.folder, self.every = folder, every
        self._options = {"dtype": dtype, "device": device, "mtp": False}
        self.model = self._open(source)

    def _open(self, folder: Path) -> Transformer:
        return load_model(folder, **self._options).requires_grad_(False)  # type: ignore[arg-type]

    def resume(self, step: int) -> None:
        """The reference of this step, 0 being the first."""
        if self.every and (renewed := step // self.every * self.every):
            self.model = self._open(self.folder / f"step-{renewed:08d}")

    def due(self, step: int) -> bool:
        """Whether the policy becomes the reference after so many steps."""
        return self.every > 0 and step % self.every == 0

    def renew(self, step: int, policy: Transformer) -> None:
        """Take the policy as it is after `step` steps. The caller saves a checkpoint of that step next, and then calls `forget`."""
        path = self.folder / f"step-{step:08d}"
        save_model(policy, path)
        self.model = self._open(path)

    def forget(self, step: int) -> None:
        """Delete older ones, which no checkpoint needs any more."""
        for old in self.folder.glob("step-*"):
            if old.name != f"step-{step:08d}":
                shutil.rmtree(old)

    def score(self, trainer: Trainer, batches: Sequence[Batch]) -> None:
        """Fill in the batches' ref_logps_T."""
        for batch, logps_T in zip(batches, trainer.score(batches, self.model)):
            batch.ref_logps_T = logps_T
