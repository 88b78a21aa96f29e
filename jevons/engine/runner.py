"""How the engine calls its model: through the modules, or natively on their weights.

Problem: a model that is being trained cannot be packed, and its plain modules decode at half the speed that memory allows. Approach: on
a CPU, where the native kernels are there, layers and head run through engine/layer.py with the weights where the modules have them. What
is not of the model's own kind (an adapter in a projection's place) runs as it is. Modules and parameters may be put in others' places
at any time: that is noticed before the next step. Memory layers have a native form of their own (engine/memory.py).

On processors with AMX torch's products are faster where rows are many, so steps of many rows go through the modules there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jevons.engine.cache import Paged
from jevons.engine.layer import NativeLayer
from jevons.engine.memory import NativeMemory, Recorded, can_run
from jevons.engine.packed import is_packed
from jevons.kernels import native
from jevons.kernels.quantize import HERE, pack
from jevons.model.attention import GQA, MLA
from jevons.model.layer import MLP, RMSNorm
from jevons.model.moe import Experts, MoE, Router
from jevons.model.transformer import Decoder, DecoderLayer, MTPLayer, Output, SharedHead, Transformer
from jevons.model.ultramem import SharedValues, Table, UltraMem

OWN = {Transformer, Decoder, DecoderLayer, MTPLayer, SharedHead, GQA, MLA, MLP, RMSNorm, MoE, Router, Experts}
OWN |= {UltraMem, SharedValues, Table, nn.LayerNorm, nn.ModuleList, nn.Linear, nn.Embedding, nn.Identity}
MANY = 64  # rows


class Runner:
    """The model's forward, its MTP module and its head, on one step's rows."""

    def __init__(self, model: Transformer, use_native: bool) -> None:
        self.model = model
        weight = model.model.embed_tokens.weight
        self.use_native = use_native and weight.device.type == "cpu" and weight.dtype in native.DTYPE and not is_packed(model)
        self.most = MANY if self.use_native and weight.dtype == torch.bfloat16 and _has_amx() else None
        self._placed: _Placed | None = None
        self._stale = False
        self._logits_SW: Tensor | None = None
        self._recorded: list[Recorded] = []

    def record(self) -> None:
        """From now on `picks` says which rows memory layers chose. ValueError where they are packed, and have no module that could tell."""
        modules = [module for module in self.model.modules() if isinstance(module, UltraMem)]
        if modules and is_packed(self.model):
            raise ValueError("record_routes: packed memory layers do not tell which rows they look up; load the weights plain")
        self._recorded = [Recorded(module) for module in modules]

    def picks(self) -> Tensor:
        """Of the last call: (T, L, X), by memory layer in order."""
        return torch.stack([recorded.picks_TX for recorded in self._recorded], dim=1)

    def new_weights(self) -> None:
        """What was copied of the weights is copied again before it is needed."""
        self._stale = True

    def __call__(self, tokens_T: Tensor, attend: Paged) -> Output:
        with self._layers(len(tokens_T)), self._recording():
            return self.model(tokens_T, attend.positions_T, attend)

    def mtp(self, hidden_TD: Tensor, following_T: Tensor, attend: Paged) -> Tensor:
        """Hidden states (T, D) that predict one token further."""
        with self._layers(len(hidden_TD)):
            return self.model.mtp(hidden_TD, following_T, attend.positions_T, attend).hidden_TD

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """(T, W), fp32; good until the next call."""
        if self._placed is None or not self._placed.layers:
            return self.model.logits(hidden_TD).float()
        if self._logits_SW is None or len(self._logits_SW) < len(hidden_TD):  # kept: fresh pages would cost a sixth of the product
            self._logits_SW = torch.empty(len(hidden_TD), self._placed.head.N)
        return native.linear(hidden_TD, self._placed.head, dtype=torch.float32, out=self._logits_SW[: len(hidden_TD)])

    def release(self) -> None:
        """Give back what is kept between steps."""
        self._logits_SW = None

    @contextmanager
    def _layers(self, rows: int) -> Iterator[None]:
        """The model calls native layers meanwhile, where these are wanted."""
        model = self.model
        if not self._ready() or (self.most is not None and rows > self.most):
            yield
            return
        before = model.call_layer, model.rope_dtype
        assert self._placed is not None
        layers, memories = self._placed.layers, self._placed.memories
        model.call_layer, model.rope_dtype = lambda layer, *arguments: layers[layer](*arguments), torch.float32
        for memory in memories:
            memory.module.native = memory
        try:
            yield
        finally:
            model.call_layer, model.rope_dtype = before
            for memory in memories:
                memory.module.native = None

    @contextmanager
    def _recording(self) -> Iterator[None]:
        """Memory layers say what they choose meanwhile, where that is wanted."""
        before = [recorded.module.native for recorded in self._recorded]
        for recorded in self._recorded:
            recorded.module.native = recorded
        try:
            yield
        finally:
            for recorded, native_memory in zip(self._recorded, before):
                recorded.module.native = native_memory

    def _ready(self) -> bool:
        """Whether native layers can be used, which are up to date then."""
        if not self.use_native:
            return False
        if self._placed is None or self._placed.moved():
            self._placed = _Placed(self.model)
        elif self._stale:
            self._placed.refresh()
        self._stale = False
        return bool(self._placed.layers)


class _Placed:
    """A model's native layers, memory layers and head; none where it holds modules that are not its own."""

    def __init__(self, model: Transformer) -> None:
        self.links: list[tuple[dict[str, Any], str, Any]] = []  # what hung where
        self.addresses: list[tuple[Tensor, int]] = []
        own = True
        for module in model.modules():
            own &= type(module) in OWN
            for parts in (module._modules, module._parameters):
                self.links += [(parts, name, part) for name, part in parts.items()]
            self.addresses += [(p, p.data_ptr()) for p in module._parameters.values() if p is not None]
        self.layers: dict[nn.Module, NativeLayer] = {}
        self.memories: list[NativeMemory] = []
        if own:
            self.memories = [NativeMemory(m, HERE) for m in model.modules() if isinstance(m, UltraMem) and can_run(m)]
            self.layers = {layer: NativeLayer(layer, HERE) for layer in model.model.layers if isinstance(layer, DecoderLayer)}
            self.head = pack(model.lm_head.weight, HERE)

    def moved(self) -> bool:
        """Whether anything hangs or lies elsewhere than when this was made."""
        return any(parts.get(name) is not part for parts, name, part in self.links) or any(p.data_ptr() != at for p, at in self.addresses)

    def refresh(self) -> None:
        for layer in self.layers.values():
            layer.refresh()
        for memory in self.memories:
            memory.refresh()


def _has_amx() -> bool:
    return "amx_bf16" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
