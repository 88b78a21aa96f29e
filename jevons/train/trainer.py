"""The trainer: four verbs, and no idea which algorithm it serves.

    metrics = trainer.forward_backward(batches, loss)     # micro-batches of one step; gradients add up
    norm = trainer.step(lr)                               # clip, check, update, move the router biases
    trainer.weights()                                     # named tensors for an engine
    trainer.save(folder) / trainer.load(folder)           # bit-identical continuation

Losses are normalised by the token weights of the whole step, so accumulation over micro-batches equals the large batch.
The mixture's own terms (loss-free bias, sequence-wise loss) and multi-token prediction belong to the model, not to an
algorithm, and are added here. Not done here: parallelism over devices.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from jevons.data.batch import Batch, mtp_targets
from jevons.data.disk import write_json
from jevons.kernels.cross_entropy import cross_entropy
from jevons.model.attend import Packed
from jevons.model.moe import Routing
from jevons.model.transformer import Transformer
from jevons.train.balance import sequence_loss, update_bias
from jevons.train.loss import Loss
from jevons.train.optimizer import Optimizer


@dataclass
class Metrics:
    """Means over the tokens of one step, and the loads of every router (layer -> (E,) counts)."""

    loss: float
    tokens: int
    mtp_loss: float | None
    balance_loss: float | None
    loads: dict[int, Tensor]


class Trainer:
    """Trains one Transformer in its own dtype over fp32 master weights.

    mtp_weight is V3's lambda (0.3, later 0.1), balance_weight its alpha (1e-4), bias_speed its gamma (1e-3).
    `recompute` trades time for memory by recomputing each layer in the backward pass; `compile` compiles each layer.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.1,
        clip: float = 1.0,
        mtp_weight: float = 0.3,
        balance_weight: float = 1e-4,
        bias_speed: float = 1e-3,
        recompute: bool = False,
        compile: bool = False,
    ) -> None:
        self.model = model
        self.device = model.model.embed_tokens.weight.device
        self.optimizer = Optimizer(model, betas=betas, weight_decay=weight_decay, clip=clip)
        self.mtp_weight, self.balance_weight, self.bias_speed = mtp_weight, balance_weight, bias_speed
        self.loads: dict[int, Tensor] = {}
        if compile:
            for layer in model.model.layers:
                layer.compile()
        if recompute:
            model.call_layer = lambda layer, *arguments: checkpoint(layer, *arguments, use_reentrant=False)

    def forward_backward(self, batches: Sequence[Batch], loss: Callable[[Tensor, Tensor, Batch], Loss]) -> Metrics:
        """Add the gradients of `loss` over these micro-batches, one step's worth, to the optimizer's.

        Raises FloatingPointError naming the micro-batch where a loss is not finite; the step is then forgotten.
        """
        depth = self.model.config.num_nextn_predict_layers if self.mtp_weight else 0
        total = max(sum(float(b.weights_T.sum()) for b in batches), 1e-9)
        shifted = [[mtp_targets(b, d + 1) for d in range(depth)] for b in batches]
        mtp_total = max(sum(float(w.sum()) for s in shifted for _, w in s) / max(depth, 1), 1e-9)
        tokens = sum(b.num_tokens for b in batches)

        main, mtp, balance = [], [], []
        self.loads = {}
        for batch, targets in zip(batches, shifted):
            attend = Packed(batch.cu_seqlens, self.device)
            batch = batch.to(self.device)
            output = self.model(batch.tokens_T, batch.positions_T, attend)
            term = loss(output.hidden_TD, self.model.lm_head.weight, batch)
            objective = term.total / total
            main.append(term.total.detach())
            routing = list(output.routing)
            if depth:
                mtp_sum, routed = self._mtp(output.hidden_TD, batch, targets, attend)
                objective = objective + self.mtp_weight / depth * mtp_sum / mtp_total
                mtp.append(mtp_sum.detach())
                routing += routed
            if self.balance_weight and routing:
                balance_sum = sum(sequence_loss(r, batch.cu_seqlens) for r in routing)
                objective = objective + self.balance_weight * balance_sum / tokens
                balance.append(balance_sum.detach())  # type: ignore[union-attr]
            objective.backward()
            self.optimizer.accumulate()
            for r in routing:
                loads = r.loads_E()
                self.loads[r.layer] = self.loads[r.layer] + loads if r.layer in self.loads else loads

        sums = torch.stack(main).tolist()  # the one wait for the device in a step
        for i, value in enumerate(sums):
            if not torch.isfinite(torch.tensor(value)):
                self.optimizer.clear()
                raise FloatingPointError(f"the loss of micro-batch {i} is {value}")
        return Metrics(
            loss=sum(sums) / total,
            tokens=tokens,
            mtp_loss=float(sum(mtp)) / depth / mtp_total if mtp else None,
            balance_loss=float(sum(balance)) / tokens if balance else None,
            loads=self.loads,
        )

    def _mtp(
        self, hidden_TD: Tensor, batch: Batch, targets: list[tuple[Tensor, Tensor]], attend: Packed
    ) -> tuple[Tensor, list[Routing]]:
        """Summed cross-entropy of the MTP modules: module d sees tokens up to i + 1 + d and predicts token i + 2 + d."""
        total = hidden_TD.new_zeros((), dtype=torch.float32)
        routing: list[Routing] = []
        following = batch.targets_T
        for depth, (targets_T, weights_T) in enumerate(targets):
            output = self.model.mtp(hidden_TD, following, batch.positions_T, attend, depth)
            hidden_TD = output.hidden_TD
            routing += output.routing
            following = targets_T.to(self.device)
            total = total + cross_entropy(hidden_TD, self.model.lm_head.weight, following, weights_T.to(self.device))[0]
        return total, routing

    def step(self, lr: float) -> float:
        """Update the weights; returns the gradient norm before clipping. FloatingPointError, and no update, where it is not finite."""
        norm = self.optimizer.gradient_norm()
        if not torch.isfinite(norm):
            self.optimizer.clear()
            raise FloatingPointError(f"the gradient norm is {norm.item()}")
        self.optimizer.step(lr, norm)
        for layer, router in self.model.routers.items():
            if layer in self.loads and self.bias_speed:
                update_bias(router, self.loads[layer], self.bias_speed)
        return norm.item()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Named parameters and buffers as the model holds them, without a copy."""
        yield from self.model.state_dict().items()

    def save(self, folder: Path, progress: dict[str, object]) -> None:
        """Write optimizer state, router biases and random states into `folder` (which the caller makes atomic), with `progress` beside."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = self.optimizer.state()
        tensors |= {f"buffer.{name}": buffer for name, buffer in self.model.named_buffers()}
        tensors["random.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(self.device)
        save_file({name: t.detach().contiguous() for name, t in tensors.items()}, folder / "state.safetensors")
        write_json(folder / "progress.json", progress)

    def load(self, folder: Path) -> dict[str, object]:
        """Continue from `save`: the next step is bit-identical to the one that would have followed. Returns the progress."""
        tensors = load_file(folder / "state.safetensors")
        self.optimizer.load(tensors)
        for name, buffer in self.model.named_buffers():
            buffer.copy_(tensors[f"buffer.{name}"])
        torch.set_rng_state(tensors["random.cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["random.cuda"], self.device)
        return json.loads((folder / "progress.json").read_text())
