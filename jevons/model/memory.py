"""What a memory layer (model/ultramem.py) is made of, as numbers: the fields of ModelConfig that begin with `memory_`.

They stand apart because most models have none. Like all of a configuration, without torch.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """Memory layers beside whatever feed-forward a block has."""

    memory_layers: tuple[str, ...] = ()  # "2:5": reads what block 2's feed-forward reads, is added after block 5
    memory_version: Literal["ultramem", "ultramem_v2"] = "ultramem"
    memory_keys: int = 0  # n: a layer brings n * n rows of values
    memory_key_dim: int = 0
    memory_value_dim: int = 0
    memory_top_k: int = 0  # rows that a head looks up for a token
    memory_heads: int = 2
    memory_rank: int = 2  # of the Tucker decomposition of scores
    memory_cores: int = 2  # scores of one row, each for its share of the row
    memory_expansion: int = 4  # virtual rows for one of memory; ultramem projects each copy by another matrix
    memory_share_ratio: float = 1.0  # ultramem_v2: share of the table, which all layers have in common, that a layer can reach
    memory_pre_value_dim: int = 0  # ultramem_v2: width of the vectors that weigh a row by its product with the input; 0: none

    def _check_memory(self, blocks: int) -> None:
        fields = dataclasses.fields(MemoryConfig)
        if not self.memory_layers:
            if unread := [f.name for f in fields if getattr(self, f.name) != f.default]:
                raise ValueError(f"{unread[0]}: nothing reads it without memory_layers, such as ['2:5']")
            return
        if self.memory_version not in ("ultramem", "ultramem_v2"):
            raise ValueError(f"memory_version: unknown {self.memory_version!r}; known: ultramem, ultramem_v2")
        sources = set()
        for place in self.memory_layers:
            source, colon, target = place.partition(":")
            if not (colon and source.isdecimal() and target.isdecimal() and int(source) <= int(target) < blocks):
                raise ValueError(f"memory_layers: {place!r} must be 'SOURCE:TARGET' with source <= target < num_hidden_layers {blocks}")
            if int(source) in sources:
                raise ValueError(f"memory_layers: block {source} feeds two memory layers; one is all that a block can have")
            sources.add(int(source))
        for name in ("keys", "key_dim", "value_dim", "top_k", "heads", "rank", "cores", "expansion"):
            if getattr(self, f"memory_{name}") < 1:
                raise ValueError(f"memory_{name}: must be at least 1 where memory_layers is set, is {getattr(self, f'memory_{name}')}")
        if self.memory_heads > 2:
            raise ValueError(f"memory_heads: at most 2, which share one query, is {self.memory_heads}")
        if math.isqrt(self.memory_expansion) ** 2 != self.memory_expansion:
            raise ValueError(f"memory_expansion: must be a square (1, 4, 9): both sides' keys grow by its root, is {self.memory_expansion}")
        if self.memory_value_dim % self.memory_cores:
            raise ValueError(f"memory_cores: {self.memory_cores} does not divide memory_value_dim {self.memory_value_dim}")
        if not 0 < self.memory_share_ratio <= 1:
            raise ValueError(f"memory_share_ratio: must be above 0 and at most 1, is {self.memory_share_ratio}")
        if self.memory_pre_value_dim < 0:
            raise ValueError(f"memory_pre_value_dim: must be at least 0, is {self.memory_pre_value_dim}")
        if not self.memory_shared:
            for name, default in (("memory_share_ratio", 1.0), ("memory_pre_value_dim", 0)):
                if getattr(self, name) != default:
                    raise ValueError(f"{name}: only memory_version 'ultramem_v2' has it")
        if self.memory_top_k > self.memory_side:
            raise ValueError(f"memory_top_k: {self.memory_top_k} is more than the {self.memory_side} keys of a side; raise memory_keys")

    @property
    def memory_targets(self) -> dict[int, int]:
        """Memory layers: the block that each reads from, and the block after which it is added."""
        return {int(source): int(target) for source, _, target in (place.partition(":") for place in self.memory_layers)}

    @property
    def memory_shared(self) -> bool:
        """Whether all memory layers look into one table (UltraMemV2) or each has its own."""
        return self.memory_version == "ultramem_v2"

    @property
    def memory_rows(self) -> int:
        """Rows of a table of values: of each layer's own, or of the one that all have in common."""
        return self.memory_keys**2 * (len(self.memory_layers) if self.memory_shared else 1)

    @property
    def memory_window(self) -> int:
        """Rows of its table that one memory layer can reach, a square."""
        return math.isqrt(int(self.memory_rows * self.memory_share_ratio)) ** 2

    @property
    def memory_side(self) -> int:
        """Keys of one side of one head: the product of both sides' is memory_expansion virtual rows for each that can be reached."""
        return math.isqrt(self.memory_window * self.memory_expansion)
