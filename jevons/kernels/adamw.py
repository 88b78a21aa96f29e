"""One step of AdamW on fp32 masters with gradients and weights in the model's dtype, and the norm that clips it.

Problem: at 0.6 billion parameters a step moves memory and little else: clipping, the update and rounding into the model, one after the
other, are some 55 bytes a parameter. Approach: on a CPU one native pass of 28 (native/adamw.cpp); elsewhere torch's fused step.
A table of which some rows were looked up has a sparse gradient: then the step is those rows' alone, decay included, and moments of other
rows stand still (as in torch's SparseAdam; corrections count steps, not touches). Not done: moments of fewer bits; the same for embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from jevons.kernels import memory, native


class Rates(NamedTuple):
    """AdamW's (Loshchilov & Hutter, arXiv 1711.05101)."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of all of them together, () in fp32; of a sparse one its rows count."""
    tensors = [x.values() if x.is_sparse else x for x in tensors]
    if all(x.device.type == "cpu" for x in tensors) and native.available():
        return torch.tensor(math.sqrt(sum(native.squares(x) for x in tensors)))
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(x, dtype=torch.float32) for x in tensors]))


def adamw_step(
    master: Tensor, gradient: Tensor, moments: tuple[Tensor, Tensor], parameter: Tensor, rates: Rates, *, step: int, scale: Tensor
) -> None:
    """Update `master` and its moments, fp32, in step number 1, 2, ... by `scale` times the gradient, and round into `parameter`.

    `parameter` may be the master's own memory. It and the gradient are fp32 or bf16. A sparse gradient, coalesced, is a step of its rows.
    """
    assert step >= 1 and master.shape == gradient.shape == parameter.shape
    rounded = None if parameter.data_ptr() == master.data_ptr() else parameter
    is_native = memory.is_native(master) if gradient.is_sparse else master.device.type == "cpu" and native.available()
    if is_native:
        rate, root = rates.lr / (1 - rates.beta1**step), math.sqrt(1 - rates.beta2**step)
        keep, betas = 1 - rates.lr * rates.weight_decay, (rates.beta1, rates.beta2)
        run = memory.step_rows if gradient.is_sparse else native.adamw
        run(master, gradient, moments, rounded, float(scale), keep, rate, betas, root, rates.eps)
        return
    if gradient.is_sparse:
        rows_U, whole = gradient.indices()[0], (master, *moments)
        taken = [x[rows_U] for x in whole]
        adamw_step(taken[0], gradient.values(), (taken[1], taken[2]), taken[0], rates, step=step, scale=scale)
        for x, rows_UV in zip(whole if rounded is None else (*whole, rounded), (*taken, taken[0])):
            x[rows_U] = rows_UV.to(x.dtype)
        return
    first, second = moments
    before = torch.full((), step - 1.0, device=master.device)
    fixed: dict[str, Any] = {"fused": True, "amsgrad": False, "maximize": False} | rates._asdict()
    adamw([master], [gradient.float() * scale], [first], [second], [], [before], **fixed)
    if rounded is not None:
        rounded.copy_(master)
