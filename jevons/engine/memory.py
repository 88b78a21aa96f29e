"""A memory layer as the engine computes it: one native call, with what only changes with the weights made beforehand.

Problem: at decoding a memory layer's many operators take longer than its few hundred kilobytes of rows, and norming all keys again for
every token longer still. Approach: keys are normed once, and summed by the singular vectors, so that one product a side scores all of them
for the choice of candidates; kernels/memory.py does the rest. With weights in place that is a copy, made again when weights change. The
table of values stays where it is in any format. Not done: UltraMemV2's layer, which runs as its module does, with native lookups; telling
from the native call which keys met, so that a layer whose choices are recorded runs as its module does, too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jevons.engine.layer import empty
from jevons.kernels import memory
from jevons.kernels.quantize import HERE, PackedWeight, pack
from jevons.model.ultramem import UltraMem


class NativeMemory:
    """One memory layer's weights and how to run them, in the model's dtype and `format` (keys in bf16 where that has fewer bits).

    Packing empties the module that they came from, but for its table.
    """

    def __init__(self, module: UltraMem, format: str) -> None:
        assert module.values is not None and can_run(module)
        self.module, self.copies = module, _copies(module)
        self.rows_TX = torch.empty(0, 0, dtype=torch.int64)  # that the last call looked up
        keys_SHNRY, row_NY, column_NY, norm_Y, core_HRR, core_CHRR = self.copies
        of_keys = "bf16" if format in ("int8", "int4") else format
        query, out = (pack(linear.weight, format) for linear in (module.query_proj, module.values_proj))
        self.layer = memory.Layer(
            query, pack(row_NY, of_keys), pack(column_NY, of_keys), out, norm_Y, core_HRR, core_CHRR, keys_SHNRY,
            module.values.weight.detach(), module.shuffle_index, module.query_norm.eps, module.top_k, module.expansion,
        )  # fmt: skip
        if format != HERE:
            self.copies = []
            for part in (module, module.query_proj, module.values_proj):
                empty(part)

    @property
    def nbytes(self) -> int:
        """Bytes that it reads from, the table of values among them."""
        return sum(x.nbytes for x in vars(self.layer).values() if isinstance(x, PackedWeight | Tensor))

    def __call__(self, x_TD: Tensor) -> Tensor:
        y_TD, self.rows_TX = memory.run_layer(x_TD, self.layer)
        return y_TD

    def refresh(self) -> None:
        """Make again what was made of weights in place."""
        for copy, new in zip(self.copies, _copies(self.module)):
            copy.copy_(new)


class Recorded:
    """A memory layer as its module computes it; `picks_TX` is what the last call chose."""

    def __init__(self, module: UltraMem) -> None:
        self.module = module
        self.picks_TX = torch.empty(0, 0, dtype=torch.int64)

    def __call__(self, x_TD: Tensor) -> Tensor:
        found = self.module.look(x_TD)
        self.picks_TX = found.picks_TX
        return self.module.read(x_TD, found)


def can_run(module: UltraMem) -> bool:
    """Whether `NativeMemory` computes such a layer here."""
    return module.values is not None and memory.is_native(module.values.weight)


@torch.no_grad()
def _copies(module: UltraMem) -> list[Tensor]:
    keys_SHNRY, core_CHRR = module.keys_norm(module.keys), module.tucker_core.float()
    sides = zip(keys_SHNRY.float(), (module.u.float(), module.v.float()))
    row_NY, column_NY = (torch.einsum("hnry,hr->hny", side_HNRY, by_HR).to(keys_SHNRY.dtype).flatten(0, 1) for side_HNRY, by_HR in sides)
    return [keys_SHNRY, row_NY, column_NY, module.query_norm.weight.float().clone(), core_CHRR.sum(0), core_CHRR.clone()]
