"""Low-rank adapters: W + s B A with W frozen (arXiv 2106.09685), on attention, feed-forward and routed experts.

The model knows nothing of them. `add_lora` puts a wrapper in the place of each module that it adapts: called like the module, it adds
the low-rank path beside the frozen one, so a weight's gradient is never made; read like the module (latent attention reads kv_b_proj's
weight, packing reads all of them), it is the sum. Adapters are ordinary parameters in the model's dtype, so optimizer, sampler and
checkpoints treat them like any others. `merge` adds them to the weights and puts the plain modules back.

On disk an adapter has PEFT's format, experts by their separate names as in model checkpoints: gate, up and down of each with an A and a B
of its own. vLLM wants them so, and peft fuses them on loading. For families whose experts transformers keeps stacked, peft takes the names
gate_proj, up_proj, down_proj for the routed experts alone, so plain feed-forwards of these families are listed as `target_parameters`.
vLLM leaves out the adapter of kv_b_proj without a word (its issue 48974): there a model with latent attention must be served merged.

Not done: dropout (peft itself refuses it on experts, one epoch seldom needs it), DoRA and other variants, embedding, head and routers,
multi-token-prediction modules (transformers has none), several adapters at once.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from jevons.data.disk import write_json
from jevons.kernels.experts import Dispatch, can_group, experts
from jevons.kernels.pointwise import swiglu
from jevons.model.attention import GQA, MLA
from jevons.model.layer import MLP
from jevons.model.moe import Experts, MoE, Routing
from jevons.model.transformer import DecoderLayer, Transformer

TARGETS = ("attention", "mlp", "experts")
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
STACKED = ("deepseek_v2", "deepseek_v3", "qwen3_moe")  # families whose experts transformers stacks
PREFIX = "base_model.model."
_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(gate|up|down)_proj")
_NAME = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


@dataclass(frozen=True)
class Scale:
    """alpha / rank, or with `rslora` alpha / sqrt(rank), which keeps the update's size as the rank grows (arXiv 2312.03732)."""

    rank: int
    alpha: float
    rslora: bool = False

    @property
    def factor(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class LoraLinear(nn.Module):
    """A frozen nn.Linear and its adapter: lora_A (R, in), lora_B (out, R)."""

    def __init__(self, base: nn.Linear, scale: Scale) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        like: dict[str, Any] = {"dtype": base.weight.dtype, "device": base.weight.device}
        self.lora_A = nn.Parameter(torch.zeros(scale.rank, base.in_features, **like))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, scale.rank, **like))

    @property
    def weight(self) -> Tensor:
        return torch.addmm(self.base.weight, self.lora_B, self.lora_A, alpha=self.scale.factor)

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(x, self.lora_A) * self.scale.factor, self.lora_B)

    def merge(self) -> nn.Linear:
        with torch.no_grad():
            delta = self.lora_B.float() @ self.lora_A.float() * self.scale.factor
            self.base.weight.copy_(self.base.weight.float() + delta)  # rounded once
        return self.base

    def tensors(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(path below this module, A, B) of every matrix that PEFT's format names; views, so they can be written to as well."""
        yield "", self.lora_A, self.lora_B


class LoraExperts(nn.Module):
    """Frozen stacked experts and an adapter for the gate, up and down matrix of each, stacked like them.

    Of gate_up_A (E, 2R, D) the gate's rows come first, as in gate_up_B (E, 2F, R); down_A (E, R, F), down_B (E, D, R).
    """

    def __init__(self, base: Experts, scale: Scale) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        (E, D, F_), R = base.down_proj.shape, scale.rank
        like: dict[str, Any] = {"dtype": base.down_proj.dtype, "device": base.down_proj.device}
        self.gate_up_A = nn.Parameter(torch.zeros(E, 2 * R, D, **like))
        self.gate_up_B = nn.Parameter(torch.zeros(E, 2 * F_, R, **like))
        self.down_A = nn.Parameter(torch.zeros(E, R, F_, **like))
        self.down_B = nn.Parameter(torch.zeros(E, D, R, **like))

    @property
    def gate_up_proj(self) -> Tensor:
        pairs = zip(self.gate_up_B.chunk(2, 1), self.gate_up_A.chunk(2, 1))
        return self.base.gate_up_proj + self.scale.factor * torch.cat([b @ a for b, a in pairs], 1)

    @property
    def down_proj(self) -> Tensor:
        return self.base.down_proj + self.scale.factor * self.down_B @ self.down_A

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        if not can_group(x_TD, *self.base.down_proj.shape[1:], self.scale.rank):
            return experts(x_TD, routing.experts_TK, routing.weights_TK, self.gate_up_proj, self.down_proj)
        go = Dispatch(routing.experts_TK, routing.weights_TK, len(self.down_A), x_TD.dtype)

        def low(x_XA: Tensor, a_ERA: Tensor) -> Tensor:
            return go.product(x_XA, a_ERA.transpose(1, 2)) * self.scale.factor

        x_XD = go.gather(x_TD)
        lows = low(x_XD, self.gate_up_A).chunk(2, -1)
        added = [go.product(l_XR, b_EFR.transpose(1, 2)) for l_XR, b_EFR in zip(lows, self.gate_up_B.chunk(2, 1))]
        gate_up_XF = go.product(x_XD, self.base.gate_up_proj.transpose(1, 2)) + torch.cat(added, -1)
        gate, up = gate_up_XF.chunk(2, -1)
        activation_XF = swiglu(gate, up, go.weight_X1)
        y_XD = go.product(activation_XF, self.base.down_proj.transpose(1, 2))
        y_XD = y_XD + go.product(low(activation_XF, self.down_A), self.down_B.transpose(1, 2))
        return go.combine(y_XD, routing.experts_TK.shape[1])

    def merge(self) -> Experts:
        with torch.no_grad():
            for e in range(len(self.down_A)):  # expert by expert: no second stack of them in fp32
                for b_FR, a_RD, w_FD in (
                    *zip(self.gate_up_B[e].chunk(2), self.gate_up_A[e].chunk(2), self.base.gate_up_proj[e].chunk(2)),
                    (self.down_B[e], self.down_A[e], self.base.down_proj[e]),
                ):
                    w_FD.copy_(w_FD.float() + b_FR.float() @ a_RD.float() * self.scale.factor)
        return self.base

    def tensors(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        for e in range(len(self.down_A)):
            gate, up = zip(self.gate_up_A[e].chunk(2), self.gate_up_B[e].chunk(2))
            for name, (a, b) in zip(PROJECTIONS, (gate, up, (self.down_A[e], self.down_B[e]))):
                yield f".{e}.{name}", a, b


Adapter = LoraLinear | LoraExperts


def add_lora(
    model: Transformer, *, rank: int, alpha: float, targets: Sequence[str] = TARGETS, rslora: bool = False, seed: int = 0
) -> None:
    """Adapt every attention projection, feed-forward matrix (dense and shared) and routed expert of `targets`, in place.

    Everything else is frozen. A is drawn uniformly from +-1/sqrt(in), as PEFT does, B is 0: the output does not change. Raises
    ValueError for an unknown target, or where the model has none of them.
    """
    if unknown := sorted(set(targets) - set(TARGETS)):
        raise ValueError(f"lora.targets: unknown {unknown[0]!r}; known: {', '.join(TARGETS)}")
    found = [(path, module) for target, path, module in _modules(model) if target in targets]
    if not found:
        raise ValueError(f"lora.targets: this model has no {' or '.join(targets)}")
    _wrap(model, found, Scale(rank, alpha, rslora))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, adapter in adapters(model):
            for _, a_RD, _ in adapter.tensors():
                bound = 1 / math.sqrt(a_RD.shape[1])
                a_RD.copy_(torch.empty(a_RD.shape).uniform_(-bound, bound, generator=generator))


def adapters(model: Transformer) -> list[tuple[str, Adapter]]:
    """The model's adapters by the path of the module that they stand in for; none where it is plain."""
    return [(path, module) for path, module in model.named_modules() if isinstance(module, Adapter)]


def merge(model: Transformer) -> None:
    """Add the adapters to the weights and put the plain modules back, in place; every parameter can be trained again."""
    for path, adapter in adapters(model):
        _put(model, path, adapter.merge())
    model.requires_grad_(True)


def save_adapter(model: Transformer, folder: Path, base: str = "") -> None:
    """Write adapter_config.json and adapter_model.safetensors as PEFT does. `base`: the model that the adapter belongs to."""
    found = adapters(model)
    assert found, "the model has no adapters"
    scale = found[0][1].scale
    modules: set[str] = set()
    parameters: set[str] = set()
    for path, adapter in found:
        parent, _, leaf = path.rpartition(".")
        if isinstance(adapter, LoraExperts):
            modules.update(PROJECTIONS)
        elif leaf in PROJECTIONS and model.config.model_type in STACKED:
            parameters.add(f"{parent.rpartition('.')[2]}.{leaf}.weight")
        else:
            modules.add(leaf)
    fields: dict[str, Any] = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "bias": "none"}
    # peft doubles rank and alpha where it fuses gate and up, which keeps alpha / rank but not alpha / sqrt(rank)
    rslora = scale.rslora and not any(isinstance(adapter, LoraExperts) for _, adapter in found)
    alpha = scale.alpha if rslora == scale.rslora else scale.factor * scale.rank
    fields |= {"r": scale.rank, "lora_alpha": alpha, "use_rslora": rslora, "lora_dropout": 0.0, "inference_mode": True}
    fields |= {"target_modules": sorted(modules), "target_parameters": sorted(parameters) or None}
    tensors: dict[str, Tensor] = {}
    for path, adapter in found:
        for below, *pair in adapter.tensors():
            for letter, tensor in zip("AB", pair):
                tensors[f"{PREFIX}{path}{below}.lora_{letter}.weight"] = tensor.detach().contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    write_json(folder / "adapter_config.json", fields)


def load_adapter(model: Transformer, folder: Path) -> None:
    """Adapt a plain model, in place, as an adapter in PEFT's format says; other parameters are frozen.

    Experts may have separate names or be stacked as peft itself writes them. Raises ValueError naming the file and what does not fit.
    """
    assert not adapters(model), "merge the adapter that is there first"
    scale = _read_scale(folder / "adapter_config.json")
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise ValueError(f"{file}: missing (pickled adapter_model.bin files are not read)")
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(file).items():
        if not (match := _NAME.fullmatch(name)):
            raise ValueError(f"{file}: {name}: only the lora_A and lora_B of linear layers and experts are understood")
        pairs.setdefault(match[1], {})[match[2]] = tensor
    known = {path: module for _, path, module in _modules(model)}
    pairs = _separate(pairs, known, str(file))
    paths = {m[1] if (m := _EXPERT.fullmatch(path)) else path for path in pairs}
    if strange := sorted(paths - known.keys()):
        raise ValueError(f"{file}: the model has no {strange[0]}, or it cannot be adapted")
    _wrap(model, [(path, module) for path, module in known.items() if path in paths], scale)
    slots = {path + below: {"A": a, "B": b} for path, adapter in adapters(model) for below, a, b in adapter.tensors()}
    wrong = sorted(slots.keys() ^ pairs.keys())
    wrong += [p for p in slots if p not in wrong and {k: t.shape for k, t in slots[p].items()} != {k: t.shape for k, t in pairs[p].items()}]
    if wrong:
        for path, adapter in adapters(model):
            _put(model, path, adapter.base)
        model.requires_grad_(True)
        raise ValueError(f"{file}: missing or wrongly shaped for rank {scale.rank}: {', '.join(wrong[:5])}")
    with torch.no_grad():
        for path, slot in slots.items():
            for letter, tensor in slot.items():
                tensor.copy_(pairs[path][letter])


def _modules(model: Transformer) -> Iterator[tuple[str, str, nn.Linear | Experts]]:
    """(target, path, module) of everything that can be adapted."""
    for i, layer in enumerate(model.model.layers[: model.config.num_hidden_layers]):
        assert isinstance(layer, DecoderLayer) and isinstance(layer.self_attn, GQA | MLA)
        path = f"model.layers.{i}"
        yield from (("attention", *found) for found in _linears(layer.self_attn, f"{path}.self_attn"))
        if isinstance(layer.mlp, MLP):
            yield from (("mlp", *found) for found in _linears(layer.mlp, f"{path}.mlp"))
        elif isinstance(layer.mlp, MoE):
            if layer.mlp.shared_experts is not None:
                yield from (("mlp", *found) for found in _linears(layer.mlp.shared_experts, f"{path}.mlp.shared_experts"))
            yield "experts", f"{path}.mlp.experts", layer.mlp.experts


def _linears(parent: nn.Module, path: str) -> Iterator[tuple[str, nn.Linear]]:
    yield from ((f"{path}.{name}", child) for name, child in parent.named_children() if isinstance(child, nn.Linear))


def _wrap(model: Transformer, found: Sequence[tuple[str, nn.Linear | Experts]], scale: Scale) -> None:
    model.requires_grad_(False)
    for path, module in found:
        _put(model, path, LoraExperts(module, scale) if isinstance(module, Experts) else LoraLinear(module, scale))


def _put(model: Transformer, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _read_scale(file: Path) -> Scale:
    """What adapter_config.json says of rank and alpha; ValueError for what this code would compute wrongly."""
    if not file.is_file():
        raise ValueError(f"{file}: missing; an adapter's folder holds it beside adapter_model.safetensors")
    fields = json.loads(file.read_text(encoding="utf-8"))
    if (kind := fields.get("peft_type")) != "LORA":
        raise ValueError(f"{file}: peft_type {kind!r} is not supported, only 'LORA'")
    if fields.get("bias", "none") != "none":
        raise ValueError(f"{file}: bias {fields['bias']!r} is not supported, only 'none'")
    for field in ("use_dora", "lora_bias", "modules_to_save", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "alora_invocation_tokens"):
        if fields.get(field):
            raise ValueError(f"{file}: {field} is not supported; merge the adapter with peft and load the merged model")
    return Scale(fields["r"], fields["lora_alpha"], bool(fields.get("use_rslora")))


def _separate(pairs: dict[str, dict[str, Tensor]], known: dict[str, nn.Linear | Experts], where: str) -> dict[str, dict[str, Tensor]]:
    """Give stacked experts separate names. peft nests gate_up_proj inside down_proj, and gives gate and up one A between them:
    A is (E R, in) with experts slowest, B (out, R E) with experts fastest.
    """
    out: dict[str, dict[str, Tensor]] = {}
    for path, pair in pairs.items():
        inner = path.endswith(".base_layer")
        module = known.get(path.removesuffix(".base_layer"))
        if not isinstance(module, Experts):
            out[path] = pair
            continue
        E = len(module.down_proj)
        if pair.keys() != {"A", "B"} or pair["A"].shape[0] % E or pair["B"].shape[1] != pair["A"].shape[0]:
            raise ValueError(f"{where}: {path}: not the adapter of {E} stacked experts")
        a_ERI = pair["A"].unflatten(0, (E, -1))
        b_EOR = pair["B"].unflatten(1, (-1, E)).permute(2, 0, 1)
        for e in range(E):
            names = ("gate_proj", "up_proj") if inner else ("down_proj",)
            for name, b_OR in zip(names, b_EOR[e].chunk(len(names))):
                out[f"{path.removesuffix('.base_layer')}.{e}.{name}"] = {"A": a_ERI[e], "B": b_OR}
    return out
