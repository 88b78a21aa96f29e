"""Grouped-query attention and multi-head latent attention, without the attending itself.

Both modules make queries, keys and values and hand them to the attention context (`model/attend.py`), which knows about
documents and caches. Parameter names are Hugging Face's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from jevons.model.attend import Attend
from jevons.model.config import ModelConfig
from jevons.model.layer import RMSNorm
from jevons.model.rope import rotate, softmax_scale


class GQA(nn.Module):
    """Grouped-query attention of Llama, Qwen2 (biases on q, k, v) and Qwen3 (norms on each query and key head)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        width, head = config.hidden_size, config.head_dim
        self.layer, self.scale = layer, softmax_scale(config)
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(width, self.heads * head, bias=config.qkv_bias)
        self.k_proj = nn.Linear(width, self.kv_heads * head, bias=config.qkv_bias)
        self.v_proj = nn.Linear(width, self.kv_heads * head, bias=config.qkv_bias)
        self.o_proj = nn.Linear(self.heads * head, width, bias=config.o_bias)
        self.q_norm = RMSNorm(head, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(head, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x_TD: Tensor, rope: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        q_TNH = self.q_norm(self.q_proj(x_TD).view(len(x_TD), self.heads, -1))
        k_TMH = self.k_norm(self.k_proj(x_TD).view(len(x_TD), self.kv_heads, -1))
        v_TMH = self.v_proj(x_TD).view(len(x_TD), self.kv_heads, -1)
        q_TNH, k_TMH = rotate(q_TNH, *rope, interleave=False), rotate(k_TMH, *rope, interleave=False)
        return self.o_proj(attend.gqa(self.layer, q_TNH, k_TMH, v_TMH, self.scale).flatten(1))


class MLA(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434; V3, arXiv 2412.19437, section 2.1.1).

    What a cache needs of a token is its latent after the norm (C) and its rope key after the rotation (R), one for all heads.
    The inner norms' eps is 1e-6 whatever rms_norm_eps says, as in the released code; attention_bias touches q_a, kv_a and o only.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        assert config.kv_lora_rank is not None
        width, bias = config.hidden_size, config.attention_bias
        self.layer, self.scale = layer, softmax_scale(config)
        self.heads, self.interleave = config.num_attention_heads, config.rope_interleave
        self.nope, self.rope, self.value, self.latent = (
            config.qk_nope_head_dim,
            config.qk_rope_head_dim,
            config.v_head_dim,
            config.kv_lora_rank,
        )
        if config.q_lora_rank:
            self.q_a_proj = nn.Linear(width, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank)
            self.q_b_proj = nn.Linear(config.q_lora_rank, self.heads * config.qk_head_dim, bias=False)
        else:
            self.q_proj = nn.Linear(width, self.heads * config.qk_head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(width, self.latent + self.rope, bias=bias)
        self.kv_a_layernorm = RMSNorm(self.latent)
        self.kv_b_proj = nn.Linear(self.latent, self.heads * (self.nope + self.value), bias=False)
        self.o_proj = nn.Linear(self.heads * self.value, width, bias=bias)

    def forward(self, x_TD: Tensor, rope: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_TD))) if hasattr(self, "q_a_proj") else self.q_proj(x_TD)
        q_nope, q_pe = q.view(len(x_TD), self.heads, -1).split((self.nope, self.rope), dim=-1)
        ckv_TC, kpe_TR = self.kv_a_proj_with_mqa(x_TD).split((self.latent, self.rope), dim=-1)
        ckv_TC = self.kv_a_layernorm(ckv_TC)  # the latent only, never the rope key
        q_TNH = torch.cat((q_nope, rotate(q_pe, *rope, self.interleave)), dim=-1)
        kpe_TR = rotate(kpe_TR[:, None], *rope, self.interleave)[:, 0]
        out_TNV = attend.mla(self.layer, q_TNH, ckv_TC, kpe_TR, self.kv_b_proj.weight, self.value, self.scale)
        return self.o_proj(out_TNV.flatten(1))
