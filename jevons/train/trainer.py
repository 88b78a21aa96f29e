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
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from jevons.data.batch import Batch, mtp_targets
from jevons.data.disk import write_json
from jevons.kernels.cross_entropy import cross_entropy
from jevons.model.attend import Attend, Packed, Shared
from jevons.model.moe import Routing
from jevons.model.transformer import Transformer
from jevons.model.ultramem import UltraMem
from jevons.train.balance import sequence_loss, update_bias
from jevons.train.loss import Loss
from jevons.train.optimizer import Optimizer
from jevons.train.policy import target_logps


@dataclass
class Metrics:
    """Means over the tokens of one step, and the loads of every router (layer -> (E,) counts)."""

    loss: float
    tokens: int
    mtp_loss: float | None
    balance_loss: float | None
    loads: dict[int, Tensor]
    stats: dict[str, float] = field(default_factory=dict)  # of `Loss.stats`: sums, or maxima, over the step


def attention(batch: Batch, device: torch.device) -> Attend:
    """The attention context of a batch; made before the batch moves to the device."""
    if batch.prefix_S is not None:
        return Shared(batch.cu_seqlens, batch.prefix_S, device)
    return Packed(batch.cu_seqlens, device)


def memories_of(model: Transformer) -> list[UltraMem]:
    return [module for module in model.modules() if isinstance(module, UltraMem)]


def replay(memories: Sequence[UltraMem], batch: Batch | None) -> None:
    """Have memory layers look up what the sampler's did, where the batch brings that; None: their own choice again."""
    picks_TLX = None if batch is None else batch.picks_TLX
    assert picks_TLX is None or picks_TLX.shape[:2] == (batch.num_tokens, len(memories)), (picks_TLX.shape, len(memories))  # type: ignore
    for i, memory in enumerate(memories):
        memory.replayed_TX = None if picks_TLX is None else picks_TLX[:, i]


class Trainer:
    """Trains one Transformer in its own dtype over fp32 master weights.

    mtp_weight is V3's lambda (0.3, later 0.1), balance_weight its alpha (1e-4), bias_speed its gamma (1e-3).
    `recompute` trades time for memory by recomputing each layer in the backward pass; `compile` compiles each layer. Memory layers'
    singular vectors follow their cores, now and after every step.
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
        self.memories = memories_of(model)
        for memory in self.memories:
            memory.update_vectors()
        if compile:
            for layer in model.model.layers:
                layer.compile()
        if recompute:
            model.call_layer = lambda layer, *arguments: checkpoint(layer, *arguments, use_reentrant=False)

    def forward_backward(
        self, batches: Sequence[Batch], loss: Callable[[Tensor, Tensor, Batch], Loss], normaliser: float | None = None
    ) -> Metrics:
        """Add the gradients of `loss` over these micro-batches, one step's worth, to the optimizer's.

        The sum is divided by `normaliser`, or without one by the sum of the tokens' weights. Batches that carry the sampler's
        choices are computed by the experts, and with the memory layers' rows, that it chose, weighed by the weights as they are now.
        Raises FloatingPointError naming the micro-batch where a loss is not finite; the step is then forgotten.
        """
        depth = self.model.config.num_nextn_predict_layers if self.mtp_weight else 0
        total = normaliser or max(sum(float(b.weights_T.sum()) for b in batches), 1e-9)
        if depth and any(b.prefix_S is not None for b in batches):
            raise ValueError("mtp_weight: multi-token prediction cannot look across a shared prompt; pack with share=False")
        shifted = [[mtp_targets(b, d + 1) for d in range(depth)] for b in batches]
        mtp_total = max(sum(float(w.sum()) for s in shifted for _, w in s) / max(depth, 1), 1e-9)
        tokens = sum(b.num_tokens for b in batches)

        main, mtp, balance = [], [], []
        stats: dict[str, Tensor] = {}
        self.loads = {}
        for batch, targets in zip(batches, shifted):
            attend = attention(batch, self.device)
            batch = batch.to(self.device)
            replay(self.memories, batch)
            output = self.model(batch.tokens_T, batch.positions_T, attend, self._replayed(batch))
            term = loss(output.hidden_TD, self.model.lm_head.weight, batch)
            for name, value in term.stats.items():
                kept = stats.get(name)
                stats[name] = value if kept is None else torch.maximum(kept, value) if name.startswith("max_") else kept + value
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
            objective.backward()  # which computes layers again under `recompute`, so memory layers replay until here
            replay(self.memories, None)
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
            stats=dict(zip(stats, torch.stack([v.float() for v in stats.values()]).tolist())) if stats else {},
        )

    def _replayed(self, batch: Batch) -> dict[int, Tensor] | None:
        """The recorded experts by layer. The sampler records routed layers in order, MTP modules not among them."""
        if batch.routes_TLK is None:
            return None
        layers = [i for i in self.model.routers if i < self.model.config.num_hidden_layers]
        assert batch.routes_TLK.shape[:2] == (batch.num_tokens, len(layers)), (batch.routes_TLK.shape, batch.num_tokens, layers)
        return {layer: batch.routes_TLK[:, i].long() for i, layer in enumerate(layers)}

    @torch.no_grad()
    def score(self, batches: Sequence[Batch], model: Transformer | None = None) -> list[Tensor]:
        """Log-probabilities (T,) of the targets that count, by this model or another, in the distribution that they were drawn from."""
        out = []
        for batch in batches:
            attend = attention(batch, self.device)
            batch = batch.to(self.device)
            scored = model or self.model
            memories = memories_of(scored)
            replay(memories, batch)
            hidden_TD = scored(batch.tokens_T, batch.positions_T, attend, self._replayed(batch)).hidden_TD
            replay(memories, None)
            logps_T = torch.zeros(batch.num_tokens, device=self.device)
            rows, logps_R, _ = target_logps(hidden_TD, scored.lm_head.weight, batch)
            logps_T[rows] = logps_R
            out.append(logps_T.cpu())
        return out

    def _mtp(
        self, hidden_TD: Tensor, batch: Batch, targets: list[tuple[Tensor, Tensor]], attend: Attend
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

    def step(self, lr: float, memory: float = 1.0) -> float:
        """Update the weights, memory layers' values at `memory` times `lr`; returns the gradient norm before clipping.

        FloatingPointError, and no update, where it is not finite.
        """
        norm = self.optimizer.gradient_norm()
        if not torch.isfinite(norm):
            self.optimizer.clear()
            raise FloatingPointError(f"the gradient norm is {norm.item()}")
        self.optimizer.step(lr, norm, tables=memory)
        for module in self.memories:
            module.update_vectors()
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
