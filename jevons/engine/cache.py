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
from typing import Protocol

import torch
from torch import Tensor

from jevons.kernels.attention import absorbed_attention, chunk_attention, masked_attention
from jevons.model.attend import Packed, expand_latent
from jevons.model.config import ModelConfig

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
        shapes = token_shapes(config)
        self.layers = [
            tuple(torch.empty(num_blocks * block_size, *shape, dtype=dtype, device=device) for shape in shapes) for _ in range(layer_count(config))
        ]
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


class _Part(Protocol):
    """Consecutive sequences of the flat batch that attend in one call; `span` is their tokens. `memory` is the layer's cache."""

    span: slice

    def gqa(self, memory: tuple[Tensor, ...], q_TNH: Tensor, k_TMH: Tensor, v_TMH: Tensor, scale: float) -> Tensor: ...

    def mla(
        self, memory: tuple[Tensor, ...], q_TNH: Tensor, ckv_TC: Tensor, kpe_TR: Tensor, w_kvb: Tensor, v_width: int, scale: float
    ) -> Tensor: ...


class _Prompts(Packed):
    """New prompts: nothing cached before them, so they attend to each other's tokens as in training."""

    def __init__(self, pool: Pool, span: slice, lengths: list[int]) -> None:
        super().__init__(torch.tensor([0, *itertools.accumulate(lengths)], device=pool.device))
        self.span = span

    def gqa(self, memory, q_TNH, k_TMH, v_TMH, scale):  # type: ignore[no-untyped-def, override]
        return super().gqa(0, q_TNH, k_TMH, v_TMH, scale)
