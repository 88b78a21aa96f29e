"""A model with packed weights: what the server decodes with on a CPU.

Problem: decoding reads every weight once a step, so weights should be few bytes, in the order in which they are read: bf16,
int8 or int4 (kernels/quantize.py). `pack_model` packs a model in place, layer by layer so that both copies never exist at
once, and puts itself where the model lets others in: `call_layer` and the head. The modules stay as they are, shapes and all,
but their weights are gone: such a model samples and serves, it does not train, export or take new weights. The equality with
the plain modules is a test. Routers, norms, embedding and tables of values stay plain. Not done: GPUs, models in other dtypes than
bf16 (fp32 with the format "fp32", for exact comparisons).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from jevons.engine.layer import NativeLayer, empty
from jevons.engine.memory import NativeMemory, can_run
from jevons.kernels import native
from jevons.kernels.quantize import PackedWeight, check, pack
from jevons.model.transformer import DecoderLayer, MTPLayer, Transformer
from jevons.model.ultramem import SharedValues, UltraMem

Progress = Callable[[int, int], None]


def pack_model(model: Transformer, format: str, progress: Progress | None = None) -> int:
    """Pack a model's weights in place; the bytes that they take now. `format`: bf16, int8, int4, or fp32 for an fp32 model.

    Raises ValueError where the native kernels are not available, or the model is of another dtype or on another device.
    """
    check(format)
    weight = model.model.embed_tokens.weight
    if not native.available():
        raise ValueError(f"weights cannot be packed: {native.reason()}")
    wanted = torch.float32 if format == "fp32" else torch.bfloat16
    if weight.dtype != wanted or weight.device.type != "cpu":
        here = f"{weight.dtype} on {weight.device}"
        raise ValueError(f"weights are packed as {format} from a model in {wanted} on the CPU, this one is {here}")
    layers: dict[nn.Module, NativeLayer] = {}
    total, held = len(model.model.layers) + 1, 0
    for i, layer in enumerate(model.model.layers):
        assert isinstance(layer, DecoderLayer)
        layers[layer] = NativeLayer(layer, format)
        if isinstance(layer, MTPLayer):
            before = layer.eh_proj
            layer.eh_proj = _Product(pack(before.weight, format))  # type: ignore[assignment]
            held += layer.eh_proj.weight.nbytes
            empty(before)
        if progress is not None:
            progress(i + 1, total)
    memories = [module for module in model.modules() if isinstance(module, UltraMem | SharedValues)]
    for module in memories:
        if isinstance(module, UltraMem) and can_run(module):
            module.native = NativeMemory(module, format)
            held += module.native.nbytes
        else:
            held += sum(p.nbytes for p in module.parameters())
    # in 8 bits where the layers have 4: its error goes straight into the logits, and it is read for every token drawn
    head = _Product(pack(model.lm_head.weight, "int8" if format == "int4" else format), torch.float32)
    if not model.config.tie_word_embeddings:
        empty(model.lm_head)
    model.lm_head = head  # type: ignore[assignment]
    model.rope_dtype = torch.float32
    model.call_layer = lambda layer, *arguments: layers[layer](*arguments)
    if progress is not None:
        progress(total, total)
    return head.weight.nbytes + sum(layer.nbytes for layer in layers.values()) + held + weight.nbytes


def is_packed(model: Transformer) -> bool:
    return isinstance(model.lm_head, _Product)


class _Product(nn.Module):
    def __init__(self, weight: PackedWeight, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight, self.dtype = weight, dtype

    def forward(self, x_TD: Tensor) -> Tensor:
        return native.linear(x_TD, self.weight, dtype=self.dtype)
