"""AdamW on fp32 master weights, for a model whose own weights may be bf16.

The model computes in its parameters' dtype, so the sampler uses the trainer's very weights. What must not be rounded
lives here: fp32 masters (the parameters themselves where those are fp32), fp32 accumulated gradients, the moments.
After a step the masters are rounded into the parameters. Weight decay touches matrices only, not norms and biases.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Optimizer:
    """`accumulate()` after every backward, `step(lr)` once; `state()`/`load()` for checkpoints.

    betas and weight decay default to DeepSeek-V3's (0.9, 0.95) and 0.1 (arXiv 2412.19437, 4.2).
    """

    def __init__(
        self, model: nn.Module, *, betas: tuple[float, float] = (0.9, 0.95), weight_decay: float = 0.1, eps: float = 1e-8, clip: float = 1.0
    ) -> None:
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.names, self.parameters = list(named), list(named.values())
        self.clip = clip
        self.masters = [p if p.dtype == torch.float32 else p.detach().float() for p in self.parameters]
        self.gradients = [torch.zeros_like(m, requires_grad=False) for m in self.masters]
        self.empty = True  # whether `gradients` holds leftovers only
        matrices = [m for m in self.masters if m.dim() > 1]
        vectors = [m for m in self.masters if m.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=betas, eps=eps, fused=True)

    @torch.no_grad()
    def accumulate(self) -> None:
        """Add the parameters' gradients to the fp32 sums and free them; a parameter without one counts as zero."""
        for parameter, total in zip(self.parameters, self.gradients):
            if parameter.grad is None:
                if self.empty:
                    total.zero_()
            elif self.empty:
                total.copy_(parameter.grad)  # half the traffic of zeroing first and adding then
            else:
                total.add_(parameter.grad)
            parameter.grad = None
        self.empty = False

    @torch.no_grad()
    def gradient_norm(self) -> Tensor:
        return torch.nn.utils.get_total_norm(self.gradients)

    @torch.no_grad()
    def step(self, lr: float, norm: Tensor) -> None:
        """Clip the accumulated gradients by their global `norm`, update, round into the model, and start over at zero."""
        if self.clip > 0:
            torch._foreach_mul_(self.gradients, (self.clip / (norm + 1e-6)).clamp(max=1.0))
        for group in self.adamw.param_groups:
            group["lr"] = lr
        for master, gradient in zip(self.masters, self.gradients):
            master.grad = gradient
        self.adamw.step()
        for parameter, master in zip(self.parameters, self.masters):
            master.grad = None
            if parameter is not master:
                parameter.copy_(master)
        self.clear()

    def clear(self) -> None:
        """Forget accumulated gradients."""
        self.empty = True

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, as named tensors."""
        out: dict[str, Tensor] = {}
        for name, master in zip(self.names, self.masters):
            out[f"master.{name}"] = master.detach()
            for key, value in self.adamw.state[master].items():
                out[f"{key}.{name}"] = value
        return out

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Restore `state()`, masters rounded into the model again. ValueError listing what is missing."""
        if missing := [n for n in self.names if f"master.{n}" not in state]:
            raise ValueError(f"checkpoint lacks optimizer state for: {', '.join(missing)}")
        for name, parameter, master in zip(self.names, self.parameters, self.masters):
            master.copy_(state[f"master.{name}"])
            if parameter is not master:
                parameter.copy_(master)
            kept = {k: state[f"{k}.{name}"] for k in ("step", "exp_avg", "exp_avg_sq") if f"{k}.{name}" in state}
            self.adamw.state[master] = {k: v.clone() if k == "step" else v.to(master.device, copy=True) for k, v in kept.items()}
