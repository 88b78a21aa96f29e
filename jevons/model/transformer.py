"""The one model: trainer, sampler and server all call this forward.

Tokens are flat, (T,); what they may attend to is decided by the attention context that the caller passes. There is no
training flag, no cache argument and no batch dimension. The output is hidden states, not logits: the loss makes its
logits in chunks, the engine only for the rows it samples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from jevons.model.attend import Attend
from jevons.model.attention import GQA, MLA
from jevons.model.config import ModelConfig
from jevons.model.layer import MLP, RMSNorm
from jevons.model.moe import MoE, Router, Routing
from jevons.model.rope import inverse_frequencies
from jevons.model.ultramem import SharedValues, UltraMem

Rope = tuple[Tensor, Tensor]
Called = tuple[Tensor, Routing | None, Tensor | None]  # what a layer makes of x_TD, what its router did, what its memory layer found (T, D)


class Output(NamedTuple):
    """Hidden states after the final norm (T, D), and what each MoE layer's router did."""

    hidden_TD: Tensor
    routing: tuple[Routing, ...]


class DecoderLayer(nn.Module):
    """Pre-norm block: x += attention(norm(x)); x += feed_forward(norm(x)); a memory layer reads that norm, too, and is added later."""

    def __init__(self, config: ModelConfig, layer: int, shared: SharedValues | None = None) -> None:
        super().__init__()
        self.self_attn = MLA(config, layer) if config.is_mla else GQA(config, layer)
        self.mlp = MoE(config, layer) if config.is_moe(layer) else MLP(config.hidden_size, config.intermediate_size, config.mlp_bias)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.memory = UltraMem(config, layer, shared) if layer in config.memory_targets else None

    def forward(self, x_TD: Tensor, rope: Rope, attend: Attend, forced_TK: Tensor | None = None) -> Called:
        x_TD = x_TD + self.self_attn(self.input_layernorm(x_TD), rope, attend)
        h_TD = self.post_attention_layernorm(x_TD)
        memory_TD = None if self.memory is None else self.memory(h_TD)
        if isinstance(self.mlp, MoE):
            out_TD, routing = self.mlp(h_TD, forced_TK)
            return x_TD + out_TD, routing, memory_TD
        return x_TD + self.mlp(h_TD), None, memory_TD


class SharedHead(nn.Module):
    """Holds the MTP output norm under its checkpoint name; the head itself is the main model's."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class MTPLayer(DecoderLayer):
    """One multi-token-prediction module: a decoder layer over [norm(embedding of the next token) ; norm(hidden)].

    DeepSeek-V3 section 2.2. Trap: the paper writes the hidden state first, the released weights want the embedding first.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.shared_head = SharedHead(config)


class Decoder(nn.Module):
    """Embedding, layers and final norm under Hugging Face's `model.` prefix; MTP modules are the layers after the last."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        main, depth = config.num_hidden_layers, config.num_nextn_predict_layers
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.memory = SharedValues(config) if config.memory_shared else None
        blocks = [DecoderLayer(config, i, self.memory) for i in range(main)]
        self.layers = nn.ModuleList([*blocks, *(MTPLayer(config, i) for i in range(main, main + depth))])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Transformer(nn.Module):
    """A decoder-only language model of any family in `model/config.py`.

    `call_layer` is how a layer is invoked; the trainer replaces it to recompute activations, the engine's packed weights to
    compute it by other means; `rope_dtype` is what cos and sin are given in, None for the activations' dtype. Parameters are left
    uninitialised: `init_weights` or `model/folder.py` fills them.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.call_layer: Callable[..., Called] = lambda layer, *arguments: layer(*arguments)
        self.rope_dtype: torch.dtype | None = None
        frequencies, self.rope_magnitude = inverse_frequencies(config)
        self.inverse_frequencies = frequencies  # a plain attribute: made on the CPU even under torch.device("meta")

    def rope(self, positions_T: Tensor, dtype: torch.dtype) -> Rope:
        """cos and sin, (T, R/2), of each token's position; angles in fp32."""
        self.inverse_frequencies = self.inverse_frequencies.to(positions_T.device)
        angle_TR = positions_T[:, None].float() * self.inverse_frequencies
        dtype = self.rope_dtype or dtype
        return (angle_TR.cos() * self.rope_magnitude).to(dtype), (angle_TR.sin() * self.rope_magnitude).to(dtype)

    def forward(self, tokens_T: Tensor, positions_T: Tensor, attend: Attend, routes: dict[int, Tensor] | None = None) -> Output:
        """Flat tokens and their positions -> hidden states. `routes` (layer -> (T, K) experts) replays recorded choices."""
        x_TD = self.model.embed_tokens(tokens_T)
        rope = self.rope(positions_T, x_TD.dtype)
        routing = []
        found: list[tuple[int, Tensor]] = []  # by memory layers: the block after which it is added, and what
        for i, layer in enumerate(self.model.layers[: self.config.num_hidden_layers]):
            x_TD, routed, memory_TD = self.call_layer(layer, x_TD, rope, attend, routes.get(i) if routes else None)
            if routed is not None:
                routing.append(routed)
            if memory_TD is not None:
                found.append((self.config.memory_targets[i], memory_TD))
            x_TD = sum((late_TD for target, late_TD in found if target == i), x_TD)
        return Output(self.model.norm(x_TD), tuple(routing))

    def mtp(self, hidden_TD: Tensor, next_tokens_T: Tensor, positions_T: Tensor, attend: Attend, depth: int = 0) -> Output:
        """One MTP module: hidden states for predicting one token further, normed for the shared head.

        `hidden_TD` is the main model's output (after its final norm) or, for depth > 0, the previous module's; token i of
        `next_tokens_T` is the one that follows it (and depth more), already known in training or just sampled in drafting.
        """
        layer = self.model.layers[self.config.num_hidden_layers + depth]
        assert isinstance(layer, MTPLayer)
        embedding_TD = layer.enorm(self.model.embed_tokens(next_tokens_T))
        x_TD = layer.eh_proj(torch.cat((embedding_TD, layer.hnorm(hidden_TD)), dim=-1))
        x_TD, routed, _ = self.call_layer(layer, x_TD, self.rope(positions_T, x_TD.dtype), attend, None)
        return Output(layer.shared_head.norm(x_TD), () if routed is None else (routed,))

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """(T, D) -> (T, W). For a few rows; losses use kernels/cross_entropy.py."""
        return self.lm_head(hidden_TD)

    @property
    def routers(self) -> dict[int, Router]:
        """Routers by global layer index, MTP modules included."""
        return {i: layer.mlp.gate for i, layer in enumerate(self.model.layers) if isinstance(layer.mlp, MoE)}

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Every matrix from N(0, initializer_range^2), norms one, biases zero (DeepSeek-V3 section 4.2: 0.006); memory by its own rule."""
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif name.endswith("bias"):
                parameter.zero_()
            elif ".memory." not in name:
                draw = torch.randn(parameter.shape, generator=generator, dtype=torch.float32, device=generator.device)
                parameter.copy_(draw * self.config.initializer_range)
        for buffer in self.buffers():
            buffer.zero_()
        for module in self.modules():
            if isinstance(module, UltraMem | SharedValues):
                module.init_weights(generator)
