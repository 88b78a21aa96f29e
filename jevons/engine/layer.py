"""One decoder layer through the native kernels: some six calls instead of some forty small torch operators.

Weights are packed (kernels/quantize.py), or stay where the model has them, in the format "here": then a trainer's changes are seen at
once, but for what is copied: biases and norms where these are bf16, and MLA's kv_b turned round; `refresh` copies them again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from jevons.engine.cache import Paged, Rows
from jevons.kernels import native
from jevons.kernels.quantize import HERE, PackedWeight, pack, pack_kv_b, pack_swiglu
from jevons.model.attend import Attend
from jevons.model.attention import GQA, MLA
from jevons.model.layer import MLP
from jevons.model.moe import MoE, Routing
from jevons.model.transformer import Called, DecoderLayer, Rope


class NativeLayer:
    """One decoder layer's weights and how to run them. Packing empties the modules that they came from."""

    def __init__(self, layer: DecoderLayer, format: str) -> None:
        self.format = format
        self.weights: list[PackedWeight] = []
        self.copies: list[tuple[Tensor, Callable[[], Tensor]]] = []  # made when the layer was, and what to make them of again
        self.norm = self._norm(layer.input_layernorm)
        self.attend = self._mla(layer.self_attn) if isinstance(layer.self_attn, MLA) else self._gqa(layer.self_attn)
        self.memory, self.memory_norm = layer.memory, self._norm(layer.post_attention_layernorm)
        self.feed = self._moe(layer) if isinstance(layer.mlp, MoE) else self._mlp(layer, layer.mlp)

    @property
    def nbytes(self) -> int:
        return sum(weight.nbytes for weight in self.weights)

    def __call__(self, x_TD: Tensor, rope: Rope, attend: Attend, forced_TK: Tensor | None = None) -> Called:
        assert isinstance(attend, Paged), "native layers attend over the paged cache only"
        x_TD = self.attend(x_TD, rope, attend)
        memory_TD = None if self.memory is None else self.memory(native.rms_norm(x_TD, self.memory_norm))
        return *self.feed(x_TD, forced_TK), memory_TD

    def refresh(self) -> None:
        """Copy again what is not read where it lies."""
        for weight in self.weights:
            weight.refresh()
        for copy, source in self.copies:
            copy.copy_(source())

    def _norm(self, module: nn.Module) -> native.Norm:
        norm = native.norm(module)
        if norm.weight.data_ptr() != module.weight.data_ptr():  # type: ignore[operator]
            self.copies.append((norm.weight, lambda: module.weight))  # type: ignore[arg-type, return-value]
        return norm

    def _keep(self, weight: PackedWeight, *sources: nn.Module) -> PackedWeight:
        self.weights.append(weight)
        for source in sources if self.format != HERE else ():
            empty(source)
        return weight

    def _gqa(self, module: nn.Module) -> Callable[[Tensor, Rope, Paged], Tensor]:
        assert isinstance(module, GQA)
        projections = [module.q_proj, module.k_proj, module.v_proj]
        weights: list[Tensor] = [p.weight for p in projections]
        biases: list[Tensor] = [p.bias for p in projections if p.bias is not None]
        w_qkv = self._keep(pack(weights, self.format, biases), *projections)
        w_o = self._keep(pack(module.o_proj.weight, self.format, module.o_proj.bias), module.o_proj)
        normed = not isinstance(module.q_norm, nn.Identity)
        project = functools.partial(
            native.gqa_project,
            w_qkv=w_qkv,
            norm=self.norm,
            heads=module.heads,
            kv_heads=module.kv_heads,
            q_norm=self._norm(module.q_norm) if normed else None,
            k_norm=self._norm(module.k_norm) if normed else None,
        )

        def run(x_TD: Tensor, rope: Rope, attend: Paged) -> Tensor:
            keys, values = attend.layers[module.layer]
            q, k, v = project(x_TD, cos=rope[0], sin=rope[1], keys=keys, values=values, slots=attend.slots_T)
            out_TNH = attend.gqa_written(module.layer, q, k, v, module.scale)
            return native.linear(out_TNH.flatten(1), w_o, residual=x_TD)

        return run

    def _mla(self, module: MLA) -> Callable[[Tensor, Rope, Paged], Tensor]:
        first = module.q_a_proj if hasattr(module, "q_a_proj") else module.q_proj
        both = [first, module.kv_a_proj_with_mqa]
        biases = [torch.zeros(len(p.weight)) if p.bias is None else p.bias for p in both] if any(p.bias is not None for p in both) else None
        w_a = self._keep(pack([p.weight for p in both], self.format, biases), *both)
        w_q_b = self._keep(pack(module.q_b_proj.weight, self.format), module.q_b_proj) if hasattr(module, "q_b_proj") else None
        w_kvb = module.kv_b_proj.weight.detach()
        w_key, w_value = pack_kv_b(w_kvb, module.heads, module.nope, self.format)
        if w_key.sources:  # turned round, so a copy
            self.copies.append((w_key.sources[0], lambda: w_kvb.view(module.heads, -1, module.latent)[:, : module.nope].mT))
        latent = PackedLatent(self._keep(pack(w_kvb, self.format), module.kv_b_proj), self._keep(w_key), self._keep(w_value), module.value)
        w_o = self._keep(pack(module.o_proj.weight, self.format, module.o_proj.bias), module.o_proj)
        project = functools.partial(
            native.mla_project,
            w_a=w_a,
            w_q_b=w_q_b,
            norm=self.norm,
            q_norm=self._norm(module.q_a_layernorm) if w_q_b else None,
            kv_norm=self._norm(module.kv_a_layernorm),
            heads=module.heads,
            nope=module.nope,
            rope=module.rope,
            latent=module.latent,
            interleave=module.interleave,
        )

        def run(x_TD: Tensor, rope: Rope, attend: Paged) -> Tensor:
            memory = attend.layers[module.layer][0]
            q_TNH, row_TX = project(x_TD, cos=rope[0], sin=rope[1], memory=memory, slots=attend.slots_T)
            out_TNV = attend.mla_written(module.layer, q_TNH, row_TX, latent, module.scale)
            return native.linear(out_TNV.flatten(1), w_o, residual=x_TD)

        return run

    def _mlp(self, layer: DecoderLayer, module: nn.Module) -> Callable[[Tensor, Tensor | None], tuple[Tensor, Routing | None]]:
        norm = self._norm(layer.post_attention_layernorm)
        gate_up, down = self._swiglu(module)
        return lambda x_TD, forced_TK: (native.mlp(x_TD, gate_up, down, norm=norm, residual=x_TD), None)

    def _swiglu(self, module: nn.Module) -> tuple[PackedWeight, PackedWeight]:
        assert isinstance(module, MLP)
        gate, up, down = module.gate_proj, module.up_proj, module.down_proj
        gate_up = self._keep(pack_swiglu(gate.weight, up.weight, self.format, gate.bias, up.bias), gate, up)
        return gate_up, self._keep(pack(down.weight, self.format, down.bias), down)

    def _moe(self, layer: DecoderLayer) -> Callable[[Tensor, Tensor | None], tuple[Tensor, Routing | None]]:
        module, norm = layer.mlp, self._norm(layer.post_attention_layernorm)
        assert isinstance(module, MoE)
        gate, up = module.experts.gate_up_proj.detach().chunk(2, dim=1)
        gate_up, down = pack_swiglu(gate, up, self.format), pack(module.experts.down_proj, self.format)
        self._keep(gate_up), self._keep(down, module.experts)
        shared = self._swiglu(module.shared_experts) if module.shared_experts is not None else None

        def run(x_TD: Tensor, forced_TK: Tensor | None) -> tuple[Tensor, Routing | None]:
            h_TD = native.rms_norm(x_TD, norm)
            routing = module.gate(h_TD, forced_TK)
            if shared is not None:
                x_TD = native.mlp(h_TD, *shared, residual=x_TD)
            out_TD = native.moe(h_TD, routing.experts_TK, routing.weights_TK, gate_up, down, residual=x_TD)
            return out_TD, routing

        return run


class PackedLatent:
    """kv_b packed three times: whole to expand prompts, and by head for the two sides of decoding in latent space."""

    def __init__(self, w_kvb: PackedWeight, w_key: PackedWeight, w_value: PackedWeight, v_width: int) -> None:
        self.w_kvb, self.w_key, self.w_value, self.v_width = w_kvb, w_key, w_value, v_width

    def expand(self, row_XC: Tensor, heads: int) -> tuple[Tensor, Tensor]:
        latent = self.w_kvb.K
        kv_XNY = native.linear(row_XC[:, :latent], self.w_kvb).unflatten(1, (heads, -1))
        nope, value = kv_XNY.split((kv_XNY.shape[-1] - self.v_width, self.v_width), dim=-1)
        return torch.cat((nope, row_XC[:, None, latent:].expand(-1, heads, -1)), dim=-1), value

    def absorbed(self, q_SNH: Tensor, rows: Rows, memory: Tensor, scale: float) -> Tensor:
        block = rows.pool.block_size
        return native.paged_mla(q_SNH, memory, rows.tables_SB, rows.lengths_S, block, self.w_key, self.w_value, scale)


def empty(module: nn.Module) -> None:
    """Let go of a module's own parameters."""
    for parameter in module.parameters(recurse=False):
        parameter.data = torch.empty(0, dtype=parameter.dtype)
