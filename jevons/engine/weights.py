"""New weights into a model that is being sampled from."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from jevons.model.folder import locate
from jevons.model.transformer import Transformer


@torch.no_grad()
def fill(model: Transformer, items: Iterable[tuple[str, Tensor]]) -> None:
    """Copy tensors into the model, under parameter or checkpoint names; the tied head and copies inside MTP modules may be left out.

    Raises ValueError for an unknown name, a wrong shape or a missing tensor; the model is then a mixture.
    """
    slots = dict(model.named_parameters()) | dict(model.named_buffers())
    filled = dict.fromkeys(slots, 0)
    for name, tensor in items:
        target = locate(name, model.config)
        if target is None:
            continue
        slot, index = target
        if slot not in slots or (index and index[0] >= len(slots[slot])):
            raise ValueError(f"load_weights: {name} is no tensor of this model")
        destination = slots[slot][index] if index else slots[slot]
        if destination.shape != tensor.shape:
            raise ValueError(f"load_weights: {name} is {tuple(tensor.shape)}, the model's is {tuple(destination.shape)}")
        destination.copy_(tensor)
        filled[slot] += tensor.numel()
    if missing := [name for name, count in filled.items() if count != slots[name].numel()]:
        raise ValueError(f"load_weights: missing or incomplete: {', '.join(missing)}")
