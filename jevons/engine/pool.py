"""Cache memory in blocks, who uses them, and which of them hold a prefix that others may share.

Problem: sequences of unknown length share one memory, and conversations begin alike. Approach: the pool is cut into blocks
of a few tokens, counted by user. A full block is known by the digest of all tokens up to its end, chained block by block
and salted with the weights' version and the tenant, so that equal digests mean equal keys and values and nobody finds
what another tenant left. A block that nobody uses keeps its contents and its digest until memory is wanted: least recently
used first, the end of a conversation before its beginning. Not done: sharing a block that is only partly filled.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from jevons.kernels import native
from jevons.model.config import ModelConfig

Memory = tuple[Tensor, ...]  # one layer's: (keys, values), or (latents with rope keys,)


class Pool:
    """Cache memory of `num_blocks` blocks of `block_size` tokens in every layer, MTP modules included.

    `layers[i]` is (keys (slots, M, H), values (slots, M, H)) for GQA and (latents with rope keys (slots, C + R),) for MLA.
    Memory is not cleared: no reader may touch a slot that was not written. `free + used` is always `num_blocks`; what is free
    includes `idle`, the blocks that nobody uses but that still hold a known prefix. `use_native`: whether kernels/native.py
    reads it in place; None asks it.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: torch.dtype,
        device: torch.device,
        num_blocks: int,
        block_size: int = 16,
        use_native: bool | None = None,
    ) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"num_blocks and block_size must be at least 1, are {num_blocks} and {block_size}")
        self.config, self.device = config, device
        self.native = device.type == "cpu" and dtype in native.DTYPE and native.available() if use_native is None else use_native
        self.num_blocks, self.block_size = num_blocks, block_size
        slots, shapes = num_blocks * block_size, token_shapes(config)
        self.layers = [tuple(torch.empty(slots, *s, dtype=dtype, device=device) for s in shapes) for _ in range(layer_count(config))]
        self._empty = list(range(num_blocks))[::-1]  # a stack: a lone sequence gets blocks in order
        self._idle: OrderedDict[int, None] = OrderedDict()  # in order of eviction
        self._users = [0] * num_blocks
        self._digests: list[bytes | None] = [None] * num_blocks
        self._known: dict[bytes, int] = {}

    @property
    def free(self) -> int:
        return len(self._empty) + len(self._idle)

    @property
    def idle(self) -> int:
        return len(self._idle)

    @property
    def used(self) -> int:
        return sum(1 for users in self._users if users)

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def allocate(self, n: int) -> list[int]:
        """Blocks with one user and no known contents; idle prefixes make room, the least recently used first."""
        assert n <= self.free, (n, self.free)
        blocks = []
        for _ in range(n):
            if self._empty:
                block = self._empty.pop()
            else:
                block, _ = self._idle.popitem(last=False)
                self._forget(block)
            assert not self._users[block], block
            self._users[block] = 1
            blocks.append(block)
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        """Give up one use of each; the last block first, so that it is evicted first."""
        for block in reversed(blocks):
            assert self._users[block], f"block {block} freed twice"
            self._users[block] -= 1
            if not self._users[block]:
                if self._digests[block] is None:
                    self._empty.append(block)
                else:
                    self._idle[block] = None

    def take_known(self, digests: Sequence[bytes]) -> list[int]:
        """The blocks of the longest known beginning, each with one more user."""
        blocks = []
        for digest in digests:
            block = self._known.get(digest)
            if block is None:
                break
            self._idle.pop(block, None)
            self._users[block] += 1
            blocks.append(block)
        return blocks

    def publish(self, block: int, digest: bytes) -> None:
        """Make a full block findable. Where another block holds the same, that one stays the known one."""
        assert self._users[block], block
        if self._digests[block] is None and digest not in self._known:
            self._digests[block], self._known[digest] = digest, block

    def forget_all(self) -> None:
        """No block is known any more: the weights changed."""
        for block in range(self.num_blocks):
            self._forget(block)
        self._empty += reversed(self._idle)
        self._idle.clear()

    def _forget(self, block: int) -> None:
        digest = self._digests[block]
        if digest is not None:
            del self._known[digest]
            self._digests[block] = None


def chain_digest(previous: bytes, tokens: Sequence[int]) -> bytes:
    """The digest of everything up to a block's end: of the block before it, and of its own tokens."""
    return hashlib.blake2b(previous + b"".join(t.to_bytes(4, "little") for t in tokens), digest_size=16).digest()


def salt(version: int, tenant: str) -> bytes:
    """Where a chain of digests begins: prefixes are shared inside one tenant under one version of the weights."""
    return hashlib.blake2b(f"{version}\0{tenant}".encode("utf-8", "surrogatepass"), digest_size=16).digest()


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
