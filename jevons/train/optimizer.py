"""AdamW on fp32 master weights, for a model whose own weights may be bf16.

The model computes in its parameters' dtype, so the sampler uses the trainer's very weights. What must not be rounded
lives here: fp32 masters (the parameters themselves where those are fp32), the moments, and sums of gradients: those of a
step's only micro-batch are used as they are, from the second on they are added up in fp32. A step rounds the masters into the
parameters. Weight decay touches matrices only, not norms and biases. Tables of which only some rows were looked up have sparse gradients:
summed sparse, counted in the norm, stepped on those rows alone (kernels/adamw.py); masters and moments are whole all the same.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from jevons.kernels.adamw import Rates, adamw_step, total_norm
from jevons.kernels.memory import add_rows, rows_of, sorted_rows
from jevons.model.ultramem import Table


class Optimizer:
    """`accumulate()` after every backward, `step(lr)` once; `state()`/`load()` for checkpoints.

    betas and weight decay default to DeepSeek-V3's (0.9, 0.95) and 0.1 (arXiv 2412.19437, 4.2).
    """

    def __init__(
        self, model: nn.Module, *, betas: tuple[float, float] = (0.9, 0.95), weight_decay: float = 0.1, eps: float = 1e-8, clip: float = 1.0
    ) -> None:
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.names, self.parameters = list(named), list(named.values())
        tables = {m.weight for m in model.modules() if isinstance(m, Table)}
        self.is_table = [p in tables for p in self.parameters]
        self.betas, self.weight_decay, self.eps, self.clip = betas, weight_decay, eps, clip
        self.masters = [p.detach().float() for p in self.parameters]  # of fp32 parameters the same memory
        self.gradients: list[Tensor] = []  # of the step so far
        self.moments: list[tuple[Tensor, Tensor]] = []  # made by the first step
        self.steps = 0

    @torch.no_grad()
    def accumulate(self) -> None:
        """Take the parameters' gradients, or add them to those taken before; a parameter without one counts as zero."""
        found = [_gradient(p, is_table) for p, is_table in zip(self.parameters, self.is_table)]
        for parameter in self.parameters:
            parameter.grad = None
        for i, total in enumerate(self.gradients):
            self.gradients[i] = add_rows(total, found[i]) if total.is_sparse else total.float().add_(found[i])
        self.gradients = self.gradients or found

    @torch.no_grad()
    def gradient_norm(self) -> Tensor:
        return total_norm(self.gradients)

    @torch.no_grad()
    def step(self, lr: float, norm: Tensor, tables: float = 1.0) -> None:
        """Clip the accumulated gradients by their global `norm`, update, round into the model, and start over at zero.

        Tables' learning rate is `tables` times `lr`.
        """
        if not self.moments:
            self.moments = [(torch.zeros_like(m), torch.zeros_like(m)) for m in self.masters]
        self.steps += 1
        scale = (self.clip / (norm + 1e-6)).clamp(max=1.0) if self.clip > 0 else torch.ones_like(norm)
        rows = zip(self.masters, self.gradients, self.moments, self.parameters, self.is_table)
        for master, gradient, moments, parameter, is_table in rows:
            rates = Rates(lr * tables if is_table else lr, *self.betas, self.eps, self.weight_decay if master.dim() > 1 else 0.0)
            adamw_step(master, gradient, moments, parameter, rates, step=self.steps, scale=scale)
        self.clear()

    def clear(self) -> None:
        """Forget accumulated gradients."""
        self.gradients = []

    def forget(self) -> None:
        """Start over with the moments, as k1.5 does after every iteration; masters stay."""
        self.moments, self.steps = [], 0

    def bytes_to_come(self) -> int:
        """Memory that the first step will take for the moments; 0 once it has."""
        return 0 if self.moments else sum(2 * m.numel() * m.element_size() for m in self.masters)

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, as named tensors."""
        out = {f"master.{name}": master for name, master in zip(self.names, self.masters)}
        for name, (first, second) in zip(self.names, self.moments):
            out |= {f"exp_avg.{name}": first, f"exp_avg_sq.{name}": second}
        return out | {"steps": torch.tensor(self.steps)}

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Restore `state()`, masters rounded into the model again. ValueError listing what is missing."""
        if missing := [n for n in self.names if f"master.{n}" not in state]:
            raise ValueError(f"checkpoint lacks optimizer state for: {', '.join(missing)}")
        for name, parameter, master in zip(self.names, self.parameters, self.masters):
            master.copy_(state[f"master.{name}"])
            parameter.copy_(master)
        self.steps = int(state["steps"])
        self.moments = []
        for name, master in zip(self.names, self.masters) if self.steps else ():
            first, second = (state[f"{key}.{name}"].to(master.device, copy=True) for key in ("exp_avg", "exp_avg_sq"))
            self.moments.append((first, second))


def _gradient(parameter: Tensor, is_table: bool) -> Tensor:
    if parameter.grad is not None:
        return sorted_rows(parameter.grad) if is_table else parameter.grad
    if is_table:  # no row was looked up
        return rows_of(torch.zeros(0, dtype=torch.int64, device=parameter.device), parameter[:0], parameter.shape)
    return torch.zeros_like(parameter)
