"""UltraMem: a layer that looks rows up in a table of values, millions of which may be there, some hundred of which are read for a token.

Problem: a mixture of experts reads whole matrices, so with few tokens at once it waits for memory. Approach (arXiv 2411.12364; its
released code's layer): a token's query meets two sides of n keys, whose sums or products stand for n * n rows, so that the best rows
are found without scoring them all. Scores are a Tucker decomposition: r numbers a key, and S[a, b] = row[a]' core column[b]. Candidates
come from the core's best approximation of rank one, S ~ (row[a] u)(column[b] v): the m best of each side, then the m best of their m * m
by the whole S. No softmax. Several cores give a row several scores, each for its share of the row (multi-core scoring). A row stands for
E virtual ones: which of E buckets its values are added to is in a fixed shuffle, and each bucket has its own part of the output projection
(implicit value expansion). The choice is a learned heuristic, not a search: at a core far from rank one it misses about half of the best.

UltraMemV2 (arXiv 2508.18756) shares one table between the layers, each reaching a window of it that begins elsewhere, has a query for
each of the r numbers, a single projection for all buckets, and weighs a row by its pre-value's product with the input, too.

Not done: the paper's causal convolution before the query (it gained nothing), its auxiliary loss on the core's further singular values
(commented out in the released code), dropout, and UltraMemV2's initialisation of values from its activation statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jevons.kernels.memory import lookup, project, select
from jevons.model.config import ModelConfig


class Lookup(NamedTuple):
    """What one memory layer looks up: for each of T tokens X = heads * top_k rows of its table, the bucket and the C scores of each.

    `picks_TX` is how the choice is recorded and replayed: row key * N + column key, from which all of it follows.
    """

    rows_TX: Tensor
    blocks_TX: Tensor
    scores_TXC: Tensor
    picks_TX: Tensor


class Table(nn.Module):
    """A matrix of which single rows are read."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width))


class SharedValues(nn.Module):
    """UltraMemV2's table, which all its memory layers look into."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.values = Table(config.memory_rows, config.memory_value_dim)
        self.pre_values = Table(config.memory_rows, config.memory_pre_value_dim) if config.memory_pre_value_dim else None

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        for parameter in self.parameters():
            _normal(parameter, 0.02, generator)


class UltraMem(nn.Module):
    """The memory layer that begins at block `layer`: (T, D) in, (T, D) out.

    keys (2, H, N, R, Y): for each side and head N = memory_side keys of R vectors of width Y = memory_key_dim. Both heads share a query.
    `u` and `v` (H, R) are the leading singular vectors of the summed cores: `update_vectors` sets them, after initialisation and every
    change of weights, because at zero the choice of rows would be arbitrary. `shared` is the table of UltraMemV2. While `replayed_TX` is
    set, those picks are looked up instead of the module's own, and scored as the weights are now.
    """

    u: Tensor
    v: Tensor
    shuffle_index: Tensor

    def __init__(self, config: ModelConfig, layer: int, shared: SharedValues | None = None) -> None:
        super().__init__()
        self.native: Callable[[Tensor], Tensor] | None = None  # how the engine computes the same by other means
        self.replayed_TX: Tensor | None = None
        D, H, R, Y, V = config.hidden_size, config.memory_heads, config.memory_rank, config.memory_key_dim, config.memory_value_dim
        self.heads, self.rank, self.top_k, self.side = H, R, config.memory_top_k, config.memory_side
        self.expansion, self.window, self.rows = config.memory_expansion, config.memory_window, config.memory_rows
        self.offset = sorted(config.memory_targets).index(layer) * config.memory_keys**2 if shared is not None else 0
        self.shared = (shared,)  # in a tuple, so that it is the model's submodule and not every layer's
        queries = 2 * R if shared is not None else 2
        self.query_proj = nn.Linear(D, queries * Y, bias=False)
        self.query_norm = nn.LayerNorm(Y, bias=False)
        self.keys_norm = nn.LayerNorm(Y, bias=False)
        self.keys = nn.Parameter(torch.empty(2, H, self.side, R, Y))
        self.tucker_core = nn.Parameter(torch.empty(config.memory_cores, H, R, R))
        self.values = Table(self.rows, V) if shared is None else None
        self.pre_values_proj = nn.Linear(D, config.memory_pre_value_dim, bias=False) if config.memory_pre_value_dim else None
        self.values_proj = nn.Linear(V if shared is not None else self.expansion * V, D, bias=False)
        self.register_buffer("shuffle_index", torch.zeros(self.expansion * self.window, dtype=torch.int32))
        self.register_buffer("u", torch.zeros(H, R))
        self.register_buffer("v", torch.zeros(H, R))

    def forward(self, x_TD: Tensor) -> Tensor:
        if self.native is not None:
            return self.native(x_TD)
        return self.read(x_TD, self.look(x_TD))

    def read(self, x_TD: Tensor, found: Lookup) -> Tensor:
        """What the rows say, (T, D)."""
        (shared,) = self.shared
        scores_TXC = found.scores_TXC
        if shared is None:
            assert self.values is not None
            return self.values_proj(lookup(self.values.weight, found.rows_TX, found.blocks_TX, scores_TXC, self.expansion))
        if shared.pre_values is not None:
            assert self.pre_values_proj is not None
            scores_TXC = scores_TXC * project(shared.pre_values.weight, found.rows_TX, self.pre_values_proj(x_TD))[..., None]
        return self.values_proj(lookup(shared.values.weight, found.rows_TX, torch.zeros_like(found.blocks_TX), scores_TXC, 1))

    def look(self, x_TD: Tensor) -> Lookup:
        """The rows that (T, D) inputs are answered with."""
        row_THNR, column_THNR = self.scores(x_TD)
        core_CHRR = self.tucker_core.to(torch.promote_types(x_TD.dtype, torch.float32))
        if self.replayed_TX is None:
            a_THM, b_THM = select(row_THNR, column_THNR, self.u, self.v, core_CHRR.sum(0), self.top_k)
        else:
            picks_THM = self.replayed_TX.long().unflatten(1, (self.heads, -1))
            a_THM, b_THM = picks_THM // self.side, picks_THM % self.side
        picks_TX = (a_THM * self.side + b_THM).flatten(1)
        row_THMR, column_THMR = (_take(s, i).to(core_CHRR.dtype) for s, i in ((row_THNR, a_THM), (column_THNR, b_THM)))
        scores_THMC = torch.einsum("thmr,chrs,thms->thmc", row_THMR, core_CHRR, column_THMR)
        slots_TX = self.shuffle_index[picks_TX].long()
        rows_TX = (slots_TX % self.window + self.offset) % self.rows
        return Lookup(rows_TX, slots_TX // self.window, scores_THMC.flatten(1, 2), picks_TX)

    def scores(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """R numbers for each key of each head, (T, H, N, R), of the rows' side and the columns'."""
        Y = self.keys.shape[-1]
        query_TQY = self.query_norm(self.query_proj(x_TD).unflatten(-1, (-1, Y)))
        keys = self.keys_norm(self.keys)
        if query_TQY.shape[1] == 2:
            row, column = (F.linear(query_TQY[:, side], keys[side].flatten(0, 2)).unflatten(-1, self.keys.shape[1:4]) for side in (0, 1))
        else:  # a query for each of the R numbers
            pairs = zip(query_TQY.unflatten(1, (2, -1)).unbind(1), keys)
            row, column = (torch.einsum("try,hnry->thnr", query_TRY, keys_HNRY) for query_TRY, keys_HNRY in pairs)
        return row, column

    @torch.no_grad()
    def update_vectors(self) -> None:
        """Set u and v to the leading singular vectors of the summed cores.

        A singular pair is determined up to a common sign: the one closest to what u and v were, so that the candidates change smoothly,
        or at first the one whose u has a positive sum, so that a run is reproducible.
        """
        core_HRR = self.tucker_core.to(torch.promote_types(self.tucker_core.dtype, torch.float32)).sum(0)
        left, _, right = torch.linalg.svd(core_HRR)
        u_HR, v_HR = left[..., 0], right[..., 0, :]
        before_H = (u_HR * self.u).sum(-1) + (v_HR * self.v).sum(-1)
        sign_H = torch.where(before_H == 0, u_HR.sum(-1), before_H).sign()
        self.u.copy_(u_HR * sign_H[:, None])
        self.v.copy_(v_HR * sign_H[:, None])

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """The released code's: norms of a power of the width, which keeps scores near one; cores uniform in [0, 1]; a random shuffle."""
        Y = self.keys.shape[-1]
        for norm in (self.query_norm, self.keys_norm):
            norm.weight.fill_(Y ** (-0.33 if self.values is not None else -0.4))
        _normal(self.query_proj.weight, Y**-0.5, generator)
        _normal(self.keys, Y**-0.5, generator)
        _normal(self.values_proj.weight, self.values_proj.in_features**-0.5, generator)
        if self.values is not None:
            _normal(self.values.weight, 0.02, generator)
        if self.pre_values_proj is not None:
            _normal(self.pre_values_proj.weight, self.pre_values_proj.in_features**-0.5, generator)
        self.tucker_core.copy_(torch.rand(self.tucker_core.shape, generator=generator, device=generator.device))
        self.shuffle_index.copy_(torch.randperm(len(self.shuffle_index), generator=generator, device=generator.device))
        self.u.zero_()  # so that the sign does not depend on what was before
        self.v.zero_()
        self.update_vectors()


def check_shuffles(model: nn.Module, where: str) -> None:
    """ValueError where a memory layer's shuffle leads outside its table: what reads rows by it does not look again."""
    for name, module in model.named_modules():
        if isinstance(module, UltraMem) and ((slots := module.shuffle_index).min() < 0 or slots.max() >= len(slots)):
            raise ValueError(f"{where}: {name}.shuffle_index: has entries outside 0 to {len(slots) - 1}")


def _take(x_THNR: Tensor, chosen_THM: Tensor) -> Tensor:
    return x_THNR.gather(2, chosen_THM[..., None].expand(-1, -1, -1, x_THNR.shape[-1]))


def _normal(parameter: Tensor, deviation: float, generator: torch.Generator) -> None:
    """Fill from N(0, deviation^2), some rows at a time: a table may take most of the memory."""
    for rows in parameter.split(1 << 16):
        rows.copy_(torch.randn(rows.shape, generator=generator, dtype=torch.float32, device=generator.device) * deviation)
