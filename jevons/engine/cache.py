"""The paged cache, and attention over it.

Problem: sequences of unknown length share one memory, and a step mixes prompts being read with sequences that grow by one
token. Approach: the pool is cut into blocks of a few tokens; a sequence owns a list of blocks. `Paged` is the engine's
attention context for one step: it lays the flat batch out once, in its constructor, as parts of three kinds (new
prompts, later chunks of prompts, single tokens), and every layer writes its keys and walks the parts. For MLA the cache
holds the latent and the rope key alone; prompts expand them to keys and values, single tokens attend in latent space.
Not done: sharing blocks between sequences, and kernels that read blocks in place (rows are gathered, except where a lone
sequence's blocks are contiguous).
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from jevons.kernels.attention import absorbed_attention, chunk_attention, row_attention
from jevons.model.attend import Packed, expand_latent
from jevons.model.config import ModelConfig

Memory = tuple[Tensor, ...]  # one layer's: (keys, values), or (latents with rope keys,)

SHORT = 256  # single tokens whose contexts are no longer than this share a padded call, whatever their lengths


class Pool:
    """Cache memory of `num_blocks` blocks of `block_size` tokens in every layer, MTP modules included, and who owns which.

    `layers[i]` is (keys (slots, M, H), values (slots, M, H)) for GQA and (latents with rope keys (slots, C + R),) for MLA.
    Memory is not cleared: no reader may touch a slot that was not written.
    """

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device, num_blocks: int, block_size: int = 16) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"num_blocks and block_size must be at least 1, are {num_blocks} and {block_size}")
        self.config, self.device = config, device
        self.num_blocks, self.block_size = num_blocks, block_size
        slots, shapes = num_blocks * block_size, token_shapes(config)
        self.layers = [tuple(torch.empty(slots, *s, dtype=dtype, device=device) for s in shapes) for _ in range(layer_count(config))]
        self._free = list(range(num_blocks))[::-1]  # a stack: a lone sequence gets blocks in order
        self._owned = bytearray(num_blocks)

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        return sum(self._owned)

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def allocate(self, n: int) -> list[int]:
        assert n <= len(self._free), (n, len(self._free))
        blocks = [self._free.pop() for _ in range(n)]
        for block in blocks:
            assert not self._owned[block], block
            self._owned[block] = 1
        return blocks

    def release(self, blocks: list[int]) -> None:
        for block in reversed(blocks):
            assert self._owned[block], f"block {block} freed twice"
            self._owned[block] = 0
            self._free.append(block)
        assert len(self._free) <= self.num_blocks


def layer_count(config: ModelConfig) -> int:
    return config.num_hidden_layers + config.num_nextn_predict_layers


def token_shapes(config: ModelConfig) -> list[tuple[int, ...]]:
    """Shapes of what one token leaves in one layer."""
    if config.kv_lora_rank is not None:
        return [(config.kv_lora_rank + config.qk_rope_head_dim,)]
    return [(config.num_key_value_heads, config.head_dim)] * 2


def bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """Cache of one token in all layers: (C + R) scalars a layer for MLA, 2 M H for GQA."""
    scalars = sum(torch.Size(shape).numel() for shape in token_shapes(config))
    return scalars * layer_count(config) * dtype.itemsize


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
        self.parts: list[_Prompts | _Chunk | _Rows] = []
        start = i = 0
        while i < len(new):
            end = _part_end(cached, new, i)
            span = slice(start, start + sum(new[i:end]))
            if new[i] == 1:
                self.parts.append(_Rows(pool, span, tables[i:end], [c + 1 for c in cached[i:end]]))
            elif cached[i] == 0:
                self.parts.append(_Prompts(pool, span, new[i:end]))
            else:
                self.parts.append(_Chunk(pool, span, tables[i], cached[i], new[i]))
            start, i = span.stop, end

    @staticmethod
    def order(cached: int, new: int) -> tuple[bool, bool, int]:
        """Sort key of a sequence: single tokens first, by length, then new prompts, then later chunks."""
        return new > 1, new > 1 and cached > 0, cached

    def gqa(self, layer: int, q_TNH: Tensor, k_TMH: Tensor, v_TMH: Tensor, scale: float) -> Tensor:
        keys, values = memory = self.layers[layer]
        keys.index_copy_(0, self.slots_T, k_TMH)
        values.index_copy_(0, self.slots_T, v_TMH)
        out = [part.gqa(memory, q_TNH[part.span], k_TMH[part.span], v_TMH[part.span], scale) for part in self.parts]
        return out[0] if len(out) == 1 else torch.cat(out)

    def mla(self, layer: int, q_TNH: Tensor, ckv_TC: Tensor, kpe_TR: Tensor, w_kvb: Tensor, v_width: int, scale: float) -> Tensor:
        memory = self.layers[layer]
        row_TX = torch.cat((ckv_TC, kpe_TR), dim=-1)
        memory[0].index_copy_(0, self.slots_T, row_TX)
        out = [part.mla(memory, q_TNH[part.span], row_TX[part.span], w_kvb, v_width, scale) for part in self.parts]
        return out[0] if len(out) == 1 else torch.cat(out)


def _part_end(cached: list[int], new: list[int], i: int) -> int:
    """The end of the part that begins with sequence i: as many following ones as attend well in one call."""
    end = i + 1
    if new[i] == 1:
        longest = max(SHORT, 2 * (cached[i] + 1))  # padding at most doubles the work
        while end < len(new) and new[end] == 1 and cached[end] < longest:
            end += 1
    elif cached[i] == 0:
        while end < len(new) and new[end] > 1 and cached[end] == 0:
            end += 1
    return end


def _expand(row_XC: Tensor, w_kvb: Tensor, heads: int, v_width: int) -> tuple[Tensor, Tensor]:
    latent = w_kvb.shape[1]
    return expand_latent(row_XC[:, :latent], row_XC[:, latent:], w_kvb, heads, v_width)


class _Prompts:
    """New prompts: nothing is cached before them, so they attend to each other's tokens exactly as in training."""

    def __init__(self, pool: Pool, span: slice, lengths: list[int]) -> None:
        self.span = span
        self.packed = Packed(torch.tensor([0, *itertools.accumulate(lengths)], device=pool.device))

    def gqa(self, memory: Memory, q_TNH: Tensor, k_TMH: Tensor, v_TMH: Tensor, scale: float) -> Tensor:
        return self.packed.gqa(0, q_TNH, k_TMH, v_TMH, scale)

    def mla(self, memory: Memory, q_TNH: Tensor, row_TX: Tensor, w_kvb: Tensor, v_width: int, scale: float) -> Tensor:
        return self.packed.gqa(0, q_TNH, *_expand(row_TX, w_kvb, q_TNH.shape[1], v_width), scale)


class _Chunk:
    """A later piece of one prompt: its tokens see the cached ones, all of them expanded, and each other (bottom-right causal)."""

    def __init__(self, pool: Pool, span: slice, table: list[int], cached: int, new: int) -> None:
        self.span = span
        self.context = _Context(pool, [table], [cached + new])
        dtype = pool.layers[0][0].dtype
        self.bias_LC = torch.full((new, cached + new), -math.inf, dtype=dtype, device=pool.device).triu(cached + 1)

    def gqa(self, memory: Memory, q_LNH: Tensor, k_LMH: Tensor, v_LMH: Tensor, scale: float) -> Tensor:
        keys, values = (self.context.take(m)[0] for m in memory)
        return chunk_attention(q_LNH, keys, values, self.bias_LC, scale)

    def mla(self, memory: Memory, q_LNH: Tensor, row_LX: Tensor, w_kvb: Tensor, v_width: int, scale: float) -> Tensor:
        keys, values = _expand(self.context.take(memory[0])[0], w_kvb, q_LNH.shape[1], v_width)
        return chunk_attention(q_LNH, keys, values, self.bias_LC, scale)


class _Rows:
    """One new token each of several sequences, padded to the longest context. MLA attends in latent space."""

    def __init__(self, pool: Pool, span: slice, tables: list[list[int]], lengths: list[int]) -> None:
        self.span = span
        self.context = _Context(pool, tables, lengths)
        self.bias_SC: Tensor | None = None
        if min(lengths) < max(lengths):
            padding = torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]
            dtype = pool.layers[0][0].dtype
            self.bias_SC = torch.zeros(padding.shape, dtype=dtype).masked_fill_(padding, -math.inf).to(pool.device)

    def gqa(self, memory: Memory, q_SNH: Tensor, k_SMH: Tensor, v_SMH: Tensor, scale: float) -> Tensor:
        keys, values = memory
        return row_attention(q_SNH, self.context.take(keys), self.context.take(values), self.bias_SC, scale)

    def mla(self, memory: Memory, q_SNH: Tensor, row_SX: Tensor, w_kvb: Tensor, v_width: int, scale: float) -> Tensor:
        return absorbed_attention(q_SNH, self.context.take(memory[0]), self.bias_SC, w_kvb, v_width, scale)


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
