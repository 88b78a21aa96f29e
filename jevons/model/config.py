"""What a model is made of, as numbers.

One flat dataclass describes every family that Jevons loads. Its fields carry Hugging Face's names (DeepSeek-V3's where
families differ), so that a recipe's [model] section, a checkpoint's config.json and the code speak one language.
`model/family.py` translates each family's own config.json to and from it. No torch here: the cost arithmetic and the
planner read configurations of models that would never fit this machine.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from jevons.model.memory import MemoryConfig

MODEL_TYPES = ("deepseek_v3", "deepseek_v2", "qwen2", "qwen3", "qwen3_moe", "llama")


@dataclass(frozen=True, kw_only=True)
class ModelConfig(MemoryConfig):
    """A decoder-only transformer: GQA or MLA attention, dense or mixture-of-experts feed-forward, optional memory layers and MTP modules.

    Attention is MLA where `kv_lora_rank` is set and GQA otherwise. A layer's feed-forward is a mixture of experts where
    `is_moe(layer)` holds. Raises ValueError, naming the field, for a combination that no model can have.
    """

    model_type: str = "deepseek_v3"
    vocab_size: int
    hidden_size: int
    intermediate_size: int  # width of the dense feed-forward
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False  # each family's own meaning; see qkv_bias and o_bias
    mlp_bias: bool = False
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None  # Hugging Face's fields with `rope_type`: yarn, llama3 or linear

    # grouped-query attention
    num_key_value_heads: int = 0  # 0: as many as attention heads
    head_dim: int = 0  # 0: hidden_size / num_attention_heads

    # multi-head latent attention (DeepSeek-V2/V3)
    q_lora_rank: int | None = None
    kv_lora_rank: int | None = None
    qk_nope_head_dim: int = 0
    qk_rope_head_dim: int = 0
    v_head_dim: int = 0
    rope_interleave: bool = True

    # mixture of experts
    n_routed_experts: int = 0
    n_shared_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    first_k_dense_replace: int = 0  # layers below this one are dense
    moe_layer_freq: int = 1  # deepseek: layers with index % freq == 0 are sparse
    decoder_sparse_step: int = 1  # qwen3_moe: layers with (index + 1) % step == 0 are sparse
    mlp_only_layers: tuple[int, ...] = ()  # qwen3_moe: these layers are dense
    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid"
    topk_method: Literal["noaux_tc", "greedy", "group_limited_greedy"] = "noaux_tc"
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0

    num_nextn_predict_layers: int = 0  # multi-token-prediction modules after the last layer
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.model_type not in MODEL_TYPES:
            raise ValueError(f"model_type: unknown {self.model_type!r}; known: {', '.join(MODEL_TYPES)}")
        if not self.is_mla:
            if not self.num_key_value_heads:
                object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
            if not self.head_dim:
                object.__setattr__(self, "head_dim", self.hidden_size // max(self.num_attention_heads, 1))
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1, is {getattr(self, name)}")
        if self.is_mla:
            for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
                if getattr(self, name) < 1:
                    raise ValueError(f"{name}: must be at least 1 where kv_lora_rank is set, is {getattr(self, name)}")
        elif self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"num_key_value_heads: {self.num_key_value_heads} does not divide {self.num_attention_heads} attention heads")
        if self.rope_dim % 2:
            raise ValueError(f"{'qk_rope_head_dim' if self.is_mla else 'head_dim'}: rotary width must be even, is {self.rope_dim}")
        if self.n_routed_experts:
            self._check_experts()
        self._check_memory(self.num_hidden_layers)

    def _check_experts(self) -> None:
        experts, chosen = self.n_routed_experts, self.num_experts_per_tok
        for name, known in (("scoring_func", ("sigmoid", "softmax")), ("topk_method", ("noaux_tc", "greedy", "group_limited_greedy"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: unknown {getattr(self, name)!r}; known: {', '.join(known)}")
        if self.moe_intermediate_size < 1:
            raise ValueError("moe_intermediate_size: must be at least 1 where n_routed_experts is set")
        if not 1 <= chosen <= experts:
            raise ValueError(f"num_experts_per_tok: must be between 1 and n_routed_experts {experts}, is {chosen}")
        if self.n_group < 1 or experts % self.n_group:
            raise ValueError(f"n_group: {self.n_group} does not divide n_routed_experts {experts}")
        if not 1 <= self.topk_group <= self.n_group:
            raise ValueError(f"topk_group: must be between 1 and n_group {self.n_group}, is {self.topk_group}")
        if chosen > self.topk_group * (experts // self.n_group):
            raise ValueError(f"num_experts_per_tok: {chosen} is more than the experts in topk_group {self.topk_group} groups")
        if self.topk_method == "noaux_tc" and self.n_group > 1 and experts // self.n_group < 2:
            raise ValueError("n_group: noaux_tc scores a group by its two best experts, so a group needs at least two")

    @property
    def is_mla(self) -> bool:
        return self.kv_lora_rank is not None

    @property
    def qk_head_dim(self) -> int:
        """Width of a query or key head: nope + rope for MLA, head_dim for GQA."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim if self.is_mla else self.head_dim

    @property
    def rope_dim(self) -> int:
        """How many dimensions of a head are rotated."""
        return self.qk_rope_head_dim if self.is_mla else self.head_dim

    @property
    def qkv_bias(self) -> bool:
        return self.attention_bias or self.model_type == "qwen2"

    @property
    def o_bias(self) -> bool:
        return self.attention_bias and self.model_type != "qwen2"

    @property
    def qk_norm(self) -> bool:
        return self.model_type in ("qwen3", "qwen3_moe")

    @property
    def has_correction_bias(self) -> bool:
        """Whether routers carry `e_score_correction_bias`, the buffer of loss-free balancing."""
        return self.topk_method == "noaux_tc"

    def is_moe(self, layer: int) -> bool:
        """Whether this layer's feed-forward is a mixture of experts. MTP modules (layer >= num_hidden_layers) follow the same rule."""
        return (
            self.n_routed_experts > 0
            and layer >= self.first_k_dense_replace
            and layer % self.moe_layer_freq == 0
            and (layer + 1) % self.decoder_sparse_step == 0
            and layer not in self.mlp_only_layers
        )

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The end-of-sequence ids as a tuple, whichever form config.json used."""
        if self.eos_token_id is None:
            return ()
        return (self.eos_token_id,) if isinstance(self.eos_token_id, int) else tuple(self.eos_token_id)

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        return tuple(f.name for f in dataclasses.fields(cls))
