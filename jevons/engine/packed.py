"""A model's layers with packed weights, through the native kernels: what the server decodes with on a CPU.

Problem: decoding reads every weight once a step, and a layer of the plain modules is some forty small torch operators. Here
a layer is six native calls on weights in bf16, int8 or int4 (kernels/quantize.py). `pack_model` packs a model in place,
layer by layer so that both copies never exist at once, and puts itself where the model lets others in: `call_layer` and the
head. The modules stay as they are, shapes and all, but their weights are gone: such a model samples and serves, it does not
train, export or take new weights. The equality with the plain modules is a test. Routers, norms and embedding stay plain.
Not done: GPUs, models in other dtypes than bf16 (fp32 with the format "fp32", for exact comparisons).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from jevons.engine.cache import Paged, Rows
from jevons.kernels import native
from jevons.kernels.quantize import PackedWeight, check, pack, pack_kv_b, pack_swiglu
from jevons.model.attend import Attend
from jevons.model.attention import GQA, MLA
from jevons.model.layer import MLP
from jevons.model.moe import MoE, Routing
from jevons.model.transformer import DecoderLayer, Rope, Transformer

Progress = Callable[[int, int], None]


def pack_model(model: Transformer, format: str, progress: Progress | None = None) -> int:
    """Pack a model's weights in place; the bytes that they take now. `format`: bf16, int8, int4, or fp32 for an fp32 model.

    Raises ValueError where the native kernels are not available, or the model is of another dtype or on another device.
    """
    check(format)
    weight = model.model.embed_tokens.weight
    if not native.available():
        raise ValueError(f"weights cannot be packed: {native.reason()}")
    wanted = torch.float32 if format == "fp32" else torch.bfloat16
    if weight.dtype != wanted or weight.device.type != "cpu":
        here = f"{weight.dtype} on {weight.device}"
        raise ValueError(f"weights are packed as {format} from a model in {wanted} on the CPU, this one is {here}")
    layers: dict[nn.Module, _Layer] = {}
    total = len(model.model.layers) + 1
    for i, layer in enumerate(model.model.layers):
        assert isinstance(layer, DecoderLayer)
        layers[layer] = _Layer(layer, format)
        if progress is not None:
            progress(i + 1, total)
    # in 8 bits where the layers have 4: its error goes straight into the logits, and it is read for every token drawn
    head = _Head(pack(model.lm_head.weight, "int8" if format == "int4" else format))
    if not model.config.tie_word_embeddings:
        _empty(model.lm_head)
    model.lm_head = head  # type: ignore[assignment]
    model.rope_dtype = torch.float32
    model.call_layer = lambda layer, *arguments: layers[layer](*arguments)
    if progress is not None:
        progress(total, total)
    return head.weight.nbytes + sum(layer.nbytes for layer in layers.values()) + weight.nbytes


class _Head(nn.Module):
    def __init__(self, weight: PackedWeight) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x_TD: Tensor) -> Tensor:
        return native.linear(x_TD, self.weight, dtype=torch.float32)


class _Layer:
    """One decoder layer's packed weights and how to run them."""

    def __init__(self, layer: DecoderLayer, format: str) -> None:
        self.weights: list[PackedWeight] = []
        self.norm = native.norm(layer.input_layernorm)
        self.attend = self._mla(layer.self_attn, format) if isinstance(layer.self_attn, MLA) else self._gqa(layer.self_attn, format)
        self.feed = self._moe(layer, format) if isinstance(layer.mlp, MoE) else self._mlp(layer, layer.mlp, format)

    @property
    def nbytes(self) -> int:
        return sum(weight.nbytes for weight in self.weights)

    def __call__(self, x_TD: Tensor, rope: Rope, attend: Attend, forced_TK: Tensor | None = None) -> tuple[Tensor, Routing | None]:
        assert isinstance(attend, Paged), "packed weights attend over the paged cache only"
        return self.feed(self.attend(x_TD, rope, attend), forced_TK)

    def _keep(self, weight: PackedWeight, *sources: nn.Module) -> PackedWeight:
        self.weights.append(weight)
        for source in sources:
            _empty(source)
        return weight

    def _gqa(self, module: nn.Module, format: str) -> Callable[[Tensor, Rope, Paged], Tensor]:
        assert isinstance(module, GQA)
        projections = [module.q_proj, module.k_proj, module.v_proj]
        weights: list[Tensor] = [p.weight for p in projections]
        biases: list[Tensor] = [p.bias for p in projections if p.bias is not None]
        w_qkv = pack(torch.cat(weights), format, torch.cat(biases) if biases else None)
        self._keep(w_qkv, *projections)
        w_o = self._keep(pack(module.o_proj.weight, format, module.o_proj.bias), module.o_proj)
        normed = not isinstance(module.q_norm, nn.Identity)
        project = functools.partial(
            native.gqa_project,
            w_qkv=w_qkv,
            norm=self.norm,
            heads=module.heads,
            kv_heads=module.kv_heads,
            q_norm=native.norm(module.q_norm) if normed else None,
            k_norm=native.norm(module.k_norm) if normed else None,
        )

        def run(x_TD: Tensor, rope: Rope, attend: Paged) -> Tensor:
            keys, values = attend.layers[module.layer]
            q, k, v = project(x_TD, cos=rope[0], sin=rope[1], keys=keys, values=values, slots=attend.slots_T)
            out_TNH = attend.gqa_written(module.layer, q, k, v, module.scale)
            return native.linear(out_TNH.flatten(1), w_o, residual=x_TD)

        return run

    def _mla(self, module: MLA, format: str) -> Callable[[Tensor, Rope, Paged], Tensor]:
        first = module.q_a_proj if hasattr(module, "q_a_proj") else module.q_proj
        both = [first, module.kv_a_proj_with_mqa]
        bias = None
        if any(p.bias is not None for p in both):
            bias = torch.cat([torch.zeros(len(p.weight)) if p.bias is None else p.bias.detach().float() for p in both])
        w_a = self._keep(pack(torch.cat([p.weight for p in both]), format, bias), *both)
        w_q_b = self._keep(pack(module.q_b_proj.weight, format), module.q_b_proj) if hasattr(module, "q_b_proj") else None
        w_kvb = module.kv_b_proj.weight
        latent = PackedLatent(pack(w_kvb, format), *pack_kv_b(w_kvb, module.heads, module.nope, format), module.value)
        self.weights += [latent.w_kvb, latent.w_key, latent.w_value]
        _empty(module.kv_b_proj)
        w_o = self._keep(pack(module.o_proj.weight, format, module.o_proj.bias), module.o_proj)
        project = functools.partial(
            native.mla_project,
            w_a=w_a,
            w_q_b=w_q_b,
            norm=self.norm,
            q_norm=native.norm(module.q_a_layernorm) if w_q_b else None,
            kv_norm=native.norm(module.kv_a_layernorm),
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

    def _mlp(self, layer: DecoderLayer, module: nn.Module, format: str) -> Callable[[Tensor, Tensor | None], tuple[Tensor, Routing | None]]:
        norm = native.norm(layer.post_attention_layernorm)
        gate_up, down = self._swiglu(module, format)
        return lambda x_TD, forced_TK: (native.mlp(x_TD, gate_up, down, norm=norm, residual=x_TD), None)

    def _swiglu(self, module: nn.Module, format: str) -> tuple[PackedWeight, PackedWeight]:
        assert isinstance(module, MLP)
        gate, up, down = module.gate_proj, module.up_proj, module.down_proj
        gate_up = self._keep(pack_swiglu(gate.weight, up.weight, format, gate.bias, up.bias), gate, up)
        return gate_up, self._keep(pack(down.weight, format, down.bias), down)

    def _moe(self, layer: DecoderLayer, format: str) -> Callable[[Tensor, Tensor | None], tuple[Tensor, Routing | None]]:
        module, norm = layer.mlp, native.norm(layer.post_attention_layernorm)
        assert isinstance(module, MoE)
        gate, up = module.experts.gate_up_proj.detach().chunk(2, dim=1)
        gate_up, down = pack_swiglu(gate, up, format), pack(module.experts.down_proj, format)
        self.weights += [gate_up, down]
        _empty(module.experts)
        shared = self._swiglu(module.shared_experts, format) if module.shared_experts is not None else None

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


def _empty(module: nn.Module) -> None:
    """Let go of a module's own parameters."""
    for parameter in module.parameters(recurse=False):
        parameter.data = torch.empty(0, dtype=parameter.dtype)
