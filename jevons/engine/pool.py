"""Cache memory in blocks, who uses them, and which of them hold a prefix that others may share.

Problem: sequences of unknown length share one memory, and conversations begin alike. Approach: the pool is cut into blocks
of a few tokens, counted by user. A full block is known by the digest of all tokens up to its end, chained block by block
and salted with the weights' version and the tenant, so that equal digests mean equal keys and values and nobody finds
what another tenant left. A block that nobody uses keeps its contents and its digest until memory is wanted: least recently
used first, the end of a conversation before its beginning. A block that is only partly filled can be known too, by what it begins with
and while somebody uses it: others do not share it but copy the beginning. The experts that routers chose for each token, and the rows that
memory layers did, can be kept beside its keys, so that who shares a prefix knows them as well.
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
    reads it in place; None asks it. Once `record` was called, `routes` is (slots, L, K) of experts in the L routed layers, and `picks`
    (slots, L, X) of what L memory layers looked up; None for a model that has no such layers.
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
        self.config, self.dtype, self.device = config, dtype, device
        self.native = device.type == "cpu" and dtype in native.DTYPE and native.available() if use_native is None else use_native
        self.num_blocks, self.block_size = num_blocks, block_size
        self.layers: list[Memory] = []
        self.routes: Tensor | None = None
        self.picks: Tensor | None = None
        self.records = False
        self._empty = list(range(num_blocks))[::-1]  # a stack: a lone sequence gets blocks in order
        self._idle: OrderedDict[int, None] = OrderedDict()  # in order of eviction
        self._users = [0] * num_blocks
        self._digests: list[bytes | None] = [None] * num_blocks
        self._known: dict[bytes, int] = {}
        self._starts: dict[bytes, int] = {}  # blocks in use by the digest of what they begin with
        self._start_of: dict[int, bytes] = {}
        self.open()

    def open(self) -> None:
        """Take the memory, if it is not there."""
        def memory(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            return torch.empty(self.num_blocks * self.block_size, *shape, dtype=dtype, device=self.device)

        if not self.layers:
            shapes = token_shapes(self.config)
            self.layers = [tuple(memory(shape, self.dtype) for shape in shapes) for _ in range(layer_count(self.config))]
        if self.records and self.routes is None and self.config.n_routed_experts:
            self.routes = memory(routes_shape(self.config), torch.uint8 if self.config.n_routed_experts <= 256 else torch.int16)
        if self.records and self.picks is None and self.config.memory_layers:
            self.picks = memory(picks_shape(self.config), torch.int32)

    def close(self) -> None:
        """Give the memory back, and forget what was in it. Nobody may be using any."""
        assert not self.used, self.used
        self.forget_all()
        self.layers, self.routes, self.picks = [], None, None

    def record(self) -> None:
        """Keep routes and picks from now on. What is known so far has none, so it is forgotten; nobody may be using any."""
        assert not self.used, self.used
        self.forget_all()
        self.records = True
        self.open()

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
                self._starts.pop(self._start_of.pop(block, b""), None)
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

    def is_known(self, digest: bytes) -> bool:
        return digest in self._known

    def publish_start(self, block: int, digest: bytes) -> None:
        """Make what a block begins with findable, for as long as somebody uses it."""
        assert self._users[block], block
        if digest not in self._starts and block not in self._start_of:
            self._starts[digest], self._start_of[block] = block, digest

    def has_start(self, digest: bytes) -> bool:
        return digest in self._starts

    def copy_start(self, digest: bytes, block: int, count: int) -> None:
        """Copy the first `count` tokens of the block that begins so into another."""
        a, b = self._starts[digest] * self.block_size, block * self.block_size
        for memory in [*(m for layer in self.layers for m in layer), *(m for m in (self.routes, self.picks) if m is not None)]:
            memory[b : b + count] = memory[a : a + count]

    def recorded(self, blocks: Sequence[int], start: int, end: int) -> tuple[Tensor | None, Tensor | None]:
        """(end - start, L, K) and (end - start, L, X): copies on the CPU of routes and picks for those tokens of a sequence."""
        assert self.records
        size = self.block_size
        slots = torch.tensor([blocks[i // size] * size + i % size for i in range(start, end)], dtype=torch.int64, device=self.device)
        routes, picks = (None if kept is None else kept.index_select(0, slots).cpu() for kept in (self.routes, self.picks))
        return routes, picks

    def forget_all(self) -> None:
        """No block is known any more: the weights changed."""
        for block in self._known.values():
            self._digests[block] = None
        self._known.clear()
        self._empty += reversed(self._idle)
        self._idle.clear()
        self._starts.clear()
        self._start_of.clear()

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


def routes_shape(config: ModelConfig) -> tuple[int, int]:
    """(L, K): routed layers, MTP modules not among them, and experts of a token in each."""
    return sum(map(config.is_moe, range(config.num_hidden_layers))), config.num_experts_per_tok


def picks_shape(config: ModelConfig) -> tuple[int, int]:
    """(L, X): memory layers, and rows that each looks up for a token."""
    return len(config.memory_layers), config.memory_heads * config.memory_top_k


def bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """Cache of one token in all layers: (C + R) scalars a layer for MLA, 2 M H for GQA."""
    scalars = sum(torch.Size(shape).numel() for shape in token_shapes(config))
    return scalars * layer_count(config) * dtype.itemsize
