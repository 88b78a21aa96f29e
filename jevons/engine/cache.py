"""Attention over the paged cache.

Problem: a step mixes prompts being read with sequences that grow by one token, or by a few where some were drafted.
Approach: `Paged` is the engine's attention context for one step: it lays the flat batch out once, in its constructor, as
parts of three kinds (new prompts, later chunks of prompts, rows: single tokens), and every layer writes its keys and walks
the parts. For MLA the cache holds the latent and the rope key alone; prompts expand them to keys and values, rows attend in
latent space. Rows read their blocks in place where the native kernels are there, and are gathered elsewhere, except where
a lone sequence's blocks are contiguous.
"""

from __future__ import annotations

import itertools
import math
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from jevons.engine.pool import Memory, Pool
from jevons.kernels import native
from jevons.kernels.attention import absorbed_attention, chunk_attention, row_attention
from jevons.model.attend import Packed, expand_latent

SHORT = 256  # single tokens whose contexts are no longer than this share a padded call, whatever their lengths
FEW = 8  # so many tokens after cached ones are rows of their own (a drafted token is one), more are a chunk


class Paged:
    """The engine's attention context: one step's flat batch over the pool (an `Attend`).

    Sequence i has `cached[i]` tokens in the blocks `tables[i]` and brings `new[i]` more, which its blocks must have room
    for; each new token sees everything before it and itself. Any order of sequences is right; `order` is the fast one.
    """

    def __init__(self, pool: Pool, tables: list[list[int]], cached: list[int], new: list[int]) -> None:
        block, self.layers = pool.block_size, pool.layers
        positions = [list(range(c, c + n)) for c, n in zip(cached, new)]
        slots = [table[p // block] * block + p % block for table, row in zip(tables, positions) for p in row]
        self.positions_T = torch.tensor([p for row in positions for p in row], device=pool.device)
        self.slots_T = torch.tensor(slots, device=pool.device)
        self.parts: list[_Prompts | _Chunk | Rows] = []
        start = i = 0
        while i < len(new):
            end = _part_end(cached, new, i, pool.native)
            span = slice(start, start + sum(new[i:end]))
            if _is_rows(cached[i], new[i]):
                rows = [(table, p + 1) for table, row in zip(tables[i:end], positions[i:end]) for p in row]
                self.parts.append(Rows(pool, span, [table for table, _ in rows], [length for _, length in rows]))
            elif cached[i] == 0:
                self.parts.append(_Prompts(pool, span, tables[i:end], new[i:end]))
            else:
                self.parts.append(_Chunk(pool, span, tables[i], cached[i], new[i]))
            start, i = span.stop, end

    @staticmethod
    def order(cached: int, new: int) -> tuple[bool, bool, int]:
        """Sort key of a sequence: rows first, by length, then new prompts, then later chunks."""
        rows = _is_rows(cached, new)
        return not rows, not rows and cached > 0, cached

    def gqa(self, layer: int, q_TNH: Tensor, k_TMH: Tensor, v_TMH: Tensor, scale: float) -> Tensor:
        keys, values = self.layers[layer]
        keys.index_copy_(0, self.slots_T, k_TMH)
        values.index_copy_(0, self.slots_T, v_TMH)
        return self.gqa_written(layer, q_TNH, k_TMH, v_TMH, scale)

    def gqa_written(self, layer: int, q_TNH: Tensor, k_TMH: Tensor, v_TMH: Tensor, scale: float) -> Tensor:
        """`gqa` where the new keys and values are in the pool already."""
        memory = self.layers[layer]
        out = [part.gqa(memory, q_TNH[part.span], k_TMH[part.span], v_TMH[part.span], scale) for part in self.parts]
        return _joined(out)

    def mla(self, layer: int, q_TNH: Tensor, ckv_TC: Tensor, kpe_TR: Tensor, w_kvb: Tensor, v_width: int, scale: float) -> Tensor:
        row_TX = torch.cat((ckv_TC, kpe_TR), dim=-1)
        self.layers[layer][0].index_copy_(0, self.slots_T, row_TX)
        return self.mla_written(layer, q_TNH, row_TX, PlainLatent(w_kvb, v_width), scale)

    def mla_written(self, layer: int, q_TNH: Tensor, row_TX: Tensor, latent: Latent, scale: float) -> Tensor:
        """`mla` where the new rows [latent | rope key] are in the pool already; `latent` knows kv_b."""
        memory = self.layers[layer]
        out = [part.mla(memory, q_TNH[part.span], row_TX[part.span], latent, scale) for part in self.parts]
        return _joined(out)


class Latent(Protocol):
    """MLA's kv_b, whichever way its weights are kept."""

    def expand(self, row_XC: Tensor, heads: int) -> tuple[Tensor, Tensor]:
        """Rows [latent | rope key] -> keys (X, N, nope + R) and values (X, N, V)."""

    def absorbed(self, q_SNH: Tensor, rows: Rows, memory: Tensor, scale: float) -> Tensor:
        """One query a row over the cached rows, in latent space -> (S, N, V)."""


class PlainLatent:
    """kv_b as the model has it."""

    def __init__(self, w_kvb: Tensor, v_width: int) -> None:
        self.w_kvb, self.v_width = w_kvb, v_width

    def expand(self, row_XC: Tensor, heads: int) -> tuple[Tensor, Tensor]:
        latent = self.w_kvb.shape[1]
        return expand_latent(row_XC[:, :latent], row_XC[:, latent:], self.w_kvb, heads, self.v_width)

    def absorbed(self, q_SNH: Tensor, rows: Rows, memory: Tensor, scale: float) -> Tensor:
        return absorbed_attention(q_SNH, rows.context.take(memory), rows.bias_SC, self.w_kvb, self.v_width, scale)


def _is_rows(cached: int, new: int) -> bool:
    return new == 1 or (cached > 0 and new <= FEW)


def _part_end(cached: list[int], new: list[int], i: int, in_place: bool) -> int:
    """The end of the part that begins with sequence i: as many following ones as attend well in one call."""
    end = i + 1
    if _is_rows(cached[i], new[i]):
        longest = max(SHORT, 2 * (cached[i] + 1))  # padding at most doubles the work
        while end < len(new) and _is_rows(cached[end], new[end]) and (in_place or cached[end] + new[end] <= longest):
            end += 1
    elif cached[i] == 0:
        while end < len(new) and new[end] > 1 and cached[end] == 0:
            end += 1
    return end


class _Prompts:
    """New prompts: nothing is cached before them, so they attend to each other's tokens exactly as in training."""

    def __init__(self, pool: Pool, span: slice, tables: list[list[int]], lengths: list[int]) -> None:
        self.span, ends = span, [0, *itertools.accumulate(lengths)]
        self.packed = Packed(torch.tensor(ends), pool.device)
        self.native = [_Native(pool, slice(a, b), table, 0) for a, b, table in zip(ends, ends[1:], tables)] if _reads(pool) else []

    def gqa(self, memory: Memory, q_TNH: Tensor, k_TMH: Tensor, v_TMH: Tensor, scale: float) -> Tensor:
        if self.native:
            return _joined([piece.paged(q_TNH, memory, scale) for piece in self.native])
        return self.packed.gqa(0, q_TNH, k_TMH, v_TMH, scale)

    def mla(self, memory: Memory, q_TNH: Tensor, row_TX: Tensor, latent: Latent, scale: float) -> Tensor:
        keys, values = latent.expand(row_TX, q_TNH.shape[1])
        if self.native:
            values = values.contiguous()  # kv_b's product has them beside the keys
            return _joined([native.causal(q_TNH[p.span], keys[p.span], values[p.span], scale, context=p.context) for p in self.native])
        return self.packed.gqa(0, q_TNH, keys, values, scale)


class _Chunk:
    """A later piece of one prompt: its tokens see the cached ones, all of them expanded, and each other (bottom-right causal)."""

    def __init__(self, pool: Pool, span: slice, table: list[int], cached: int, new: int) -> None:
        self.span, self.pool, self._of = span, pool, (table, cached, new)
        self.native = _Native(pool, slice(0, new), table, cached) if _reads(pool) else None

    @cached_property
    def context(self) -> _Context:
        table, cached, new = self._of
        return _Context(self.pool, [table], [cached + new])

    @cached_property
    def bias_LC(self) -> Tensor:
        _, cached, new = self._of
        dtype = self.pool.dtype
        return torch.full((new, cached + new), -math.inf, dtype=dtype, device=self.pool.device).triu(cached + 1)

    def gqa(self, memory: Memory, q_LNH: Tensor, k_LMH: Tensor, v_LMH: Tensor, scale: float) -> Tensor:
        if self.native:
            return self.native.paged(q_LNH, memory, scale)
        keys, values = (self.context.take(m)[0] for m in memory)
        return chunk_attention(q_LNH, keys, values, self.bias_LC, scale)

    def mla(self, memory: Memory, q_LNH: Tensor, row_LX: Tensor, latent: Latent, scale: float) -> Tensor:
        keys, values = latent.expand(self.context.take(memory[0])[0], q_LNH.shape[1])
        if self.native:
            return native.causal(q_LNH, keys, values.contiguous(), scale, context=len(keys))
        return chunk_attention(q_LNH, keys, values, self.bias_LC, scale)


class _Native:
    """One sequence's new tokens and where their context lies, for the native kernel."""

    def __init__(self, pool: Pool, span: slice, table: list[int], cached: int) -> None:
        self.span, self.block_size, self.context = span, pool.block_size, cached + span.stop - span.start
        self.table = torch.tensor(table, dtype=torch.int32)

    def paged(self, q_TNH: Tensor, memory: Memory, scale: float) -> Tensor:
        q, (keys, values) = q_TNH[self.span], memory
        return native.causal(q, keys, values, scale, context=self.context, table=self.table, block_size=self.block_size)


def _reads(pool: Pool) -> bool:
    """Whether prompts attend natively: in bf16, and heads of even width, as all are that are rotated."""
    return pool.native and pool.dtype == torch.bfloat16


def _joined(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


class Rows:
    """One query each over contexts of several lengths. Read in place by the native kernels, else padded to the longest."""

    def __init__(self, pool: Pool, span: slice, tables: list[list[int]], lengths: list[int]) -> None:
        self.span, self.pool, self._of = span, pool, (tables, lengths)

    @cached_property
    def tables_SB(self) -> Tensor:
        """Blocks of each row's context, int32, padded with zeros."""
        tables, widest = self._of[0], max(map(len, self._of[0]))
        return torch.tensor([table + [0] * (widest - len(table)) for table in tables], dtype=torch.int32)

    @cached_property
    def lengths_S(self) -> Tensor:
        return torch.tensor(self._of[1], dtype=torch.int32)

    @cached_property
    def context(self) -> _Context:
        return _Context(self.pool, *self._of)

    @cached_property
    def bias_SC(self) -> Tensor | None:
        lengths = self._of[1]
        if min(lengths) == max(lengths):
            return None
        padding = torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]
        dtype = self.pool.dtype
        return torch.zeros(padding.shape, dtype=dtype).masked_fill_(padding, -math.inf).to(self.pool.device)

    def gqa(self, memory: Memory, q_SNH: Tensor, k_SMH: Tensor, v_SMH: Tensor, scale: float) -> Tensor:
        keys, values = memory
        if self.pool.native:
            return native.paged_gqa(q_SNH, keys, values, self.tables_SB, self.lengths_S, self.pool.block_size, scale)
        return row_attention(q_SNH, self.context.take(keys), self.context.take(values), self.bias_SC, scale)

    def mla(self, memory: Memory, q_SNH: Tensor, row_SX: Tensor, latent: Latent, scale: float) -> Tensor:
        return latent.absorbed(q_SNH, self, memory[0], scale)


class _Context:
    """Which slots hold the tokens of some sequences, oldest first: a slice where one sequence's blocks follow each other."""

    def __init__(self, pool: Pool, tables: list[list[int]], lengths: list[int]) -> None:
        block, longest = pool.block_size, max(lengths)
        self.rows = len(lengths)
        self.where: slice | Tensor
        tables = [table[: -(-length // block)] for table, length in zip(tables, lengths)]
        if self.rows == 1 and tables[0] == list(range(tables[0][0], tables[0][0] + len(tables[0]))):
            first = tables[0][0] * block
            self.where = slice(first, first + longest)
            return
        widest = max(map(len, tables))
        table_SB = torch.tensor([table + table[-1:] * (widest - len(table)) for table in tables])
        # padding repeats the last token: an unwritten slot may hold NaN, and NaN times a probability of 0 is NaN
        column_SC = torch.minimum(torch.arange(longest), torch.tensor(lengths)[:, None] - 1)
        self.where = (table_SB.gather(1, column_SC // block) * block + column_SC % block).flatten().to(pool.device)

    def take(self, memory: Tensor) -> Tensor:
        """(slots, ...) -> (S, C, ...): a view or a copy."""
        rows = memory[self.where] if isinstance(self.where, slice) else memory.index_select(0, self.where)
        return rows.unflatten(0, (self.rows, -1))
