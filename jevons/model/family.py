"""config.json of each model family, in and out.

Problem: families spell the same thing differently (num_experts, n_routed_experts), leave out fields whose defaults live in
their Python classes, and changed where rotary settings stand. Approach: one table row per family with what is fixed and
what is renamed; everything else has the same name here as there. Whatever a config.json asks for that this code does not
compute (sliding windows, another activation, another rope type) is an error here, not a wrong answer later.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jevons.model.config import MODEL_TYPES, ModelConfig

# model_type of a config.json -> the family that computes it
ALIASES = {"kimi_k2": "deepseek_v3"}
# model_type of any family with memory layers, so that programs that do not compute these refuse it; the family is its base_model_type
MEMORY = "jevons_memory"


@dataclass(frozen=True)
class Family:
    """How one family's config.json differs: its class name, its names for our fields, its defaults, what it fixes."""

    architecture: str
    renamed: dict[str, tuple[str, ...]] = field(default_factory=dict)  # our field -> its names for it, the one to write first
    defaults: dict[str, Any] = field(default_factory=dict)  # where config.json is silent
    fixed: dict[str, Any] = field(default_factory=dict)  # what the family's code computes whatever config.json says
    written: dict[str, Any] = field(default_factory=dict)  # extra fields that other programs read
    fields: tuple[str, ...] = ()  # what config.json carries beyond the common fields


_MLA = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_GQA = ("num_key_value_heads", "head_dim")
_SPARSE = ("num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")
_DEEPSEEK = (
    *_SPARSE,
    *("q_lora_rank", *_MLA, "attention_bias"),
    *("n_routed_experts", "n_shared_experts", "first_k_dense_replace", "moe_layer_freq", "n_group", "topk_group"),
    *("scoring_func", "topk_method", "routed_scaling_factor"),
)
_PLAIN_ROUTER = {"scoring_func": "softmax", "topk_method": "greedy", "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0}
_COMMON = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"),
    *("rms_norm_eps", "tie_word_embeddings", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id"),
)
_MEMORY = tuple(name for name in ModelConfig.field_names() if name.startswith("memory_"))
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")

FAMILIES: dict[str, Family] = {
    "deepseek_v3": Family(
        "DeepseekV3ForCausalLM",
        defaults={"norm_topk_prob": True, "routed_scaling_factor": 2.5, "n_shared_experts": 1, "scoring_func": "sigmoid"}
        | {"topk_method": "noaux_tc", "rope_interleave": True, "first_k_dense_replace": 3, "n_group": 8, "topk_group": 4},
        fields=(*_DEEPSEEK, "rope_interleave", "num_nextn_predict_layers"),
    ),
    "deepseek_v2": Family(
        "DeepseekV2ForCausalLM",
        defaults={"norm_topk_prob": False, "scoring_func": "softmax", "topk_method": "greedy", "n_shared_experts": 2},
        fixed={"rope_interleave": True},
        fields=_DEEPSEEK,
    ),
    "qwen2": Family("Qwen2ForCausalLM", written={"use_sliding_window": False}, fields=_GQA),
    "qwen3": Family(
        "Qwen3ForCausalLM", defaults={"head_dim": 128}, written={"use_sliding_window": False}, fields=(*_GQA, "attention_bias")
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        renamed={"n_routed_experts": ("num_experts", "num_local_experts")},  # transformers 5 writes the second
        defaults={"norm_topk_prob": False},
        fixed=_PLAIN_ROUTER,
        written={"use_sliding_window": False},
        fields=(*_GQA, *_SPARSE, "attention_bias", "n_routed_experts", "decoder_sparse_step", "mlp_only_layers"),
    ),
    "llama": Family("LlamaForCausalLM", fields=(*_GQA, "attention_bias", "mlp_bias")),
}
assert tuple(FAMILIES) == MODEL_TYPES


def _rope(fields: dict[str, Any], where: str) -> dict[str, Any]:
    """rope_theta and rope_scaling from either spelling: transformers 5's `rope_parameters` or the older pair of fields."""
    parameters = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    scaling = {k: v for k, v in parameters.items() if v is not None and k not in ("rope_theta", "type")}
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    theta = parameters.get("rope_theta") or fields.get("rope_theta") or 10000.0
    if kind == "default":
        return {"rope_theta": float(theta), "rope_scaling": None}
    needed = {"linear": ("factor",), "yarn": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
    if kind not in needed:
        raise ValueError(f"{where}: rope_type {kind!r} is not supported; known: default, {', '.join(needed)}")
    for name in needed[kind]:
        if name not in scaling:
            raise ValueError(f"{where}: rope_type {kind!r} needs {name!r}")
    return {"rope_theta": float(theta), "rope_scaling": scaling | {"rope_type": kind}}


def from_hf(fields: dict[str, Any], where: str = "config.json") -> ModelConfig:
    """A Hugging Face config.json as ModelConfig. ValueError, naming `where` and the field, for what is unknown or unsupported."""
    key, memory = ("base_model_type", _MEMORY) if fields.get("model_type") == MEMORY else ("model_type", ())
    kind = ALIASES.get(fields.get(key, ""), fields.get(key))
    if kind not in FAMILIES:
        raise ValueError(f"{where}: unknown {key} {fields.get(key)!r}; known: {', '.join([*FAMILIES, *ALIASES])}")
    family = FAMILIES[kind]
    if (activation := fields.get("hidden_act", "silu")) != "silu":
        raise ValueError(f"{where}: hidden_act {activation!r} is not supported, only 'silu'")
    if fields.get("use_sliding_window") or "sliding_attention" in (fields.get("layer_types") or ()):
        raise ValueError(f"{where}: sliding windows (use_sliding_window, layer_types) are not supported")
    values: dict[str, Any] = {"model_type": kind}
    for name in (*_COMMON, *family.fields, *memory):
        stated = (fields[s] for s in family.renamed.get(name, (name,)) if fields.get(s) is not None)
        value = next(stated, family.defaults.get(name))
        if value is not None:
            values[name] = tuple(value) if isinstance(value, list) else value
    for name in (*_REQUIRED, *(_MLA if "kv_lora_rank" in family.fields else ()), *memory[:1]):
        if name not in values:
            raise ValueError(f"{where}: missing field {name!r}")
    values |= _rope(fields, where) | family.fixed
    try:
        return ModelConfig(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def to_hf(config: ModelConfig, dtype: str = "bfloat16") -> dict[str, Any]:
    """ModelConfig as config.json, with every field that transformers and vLLM read (vLLM needs topk_method and scoring_func).

    ValueError, naming the fields, for a model that its family's config.json cannot express: others could not load it.
    """
    family = FAMILIES[config.model_type]
    out: dict[str, Any] = {"architectures": [family.architecture], "model_type": config.model_type, "torch_dtype": dtype}
    if config.memory_layers:
        out |= {"architectures": ["JevonsMemoryForCausalLM"], "model_type": MEMORY, "base_model_type": config.model_type}
    for name in (*_COMMON, *family.fields, *(_MEMORY if config.memory_layers else ())):
        value = getattr(config, name)
        out[family.renamed.get(name, (name,))[0]] = list(value) if isinstance(value, tuple) else value
    if config.is_mla:
        out["num_key_value_heads"] = config.num_attention_heads
        out["ep_size"] = 1
    out |= {"rope_theta": config.rope_theta, "rope_scaling": config.rope_scaling}
    out |= {"hidden_act": "silu", "attention_dropout": 0.0, "use_cache": True} | family.written
    read = from_hf(out, f"model_type {config.model_type}")
    unused = _GQA if config.is_mla else ()
    if lost := [n for n in ModelConfig.field_names() if n not in unused and getattr(read, n) != getattr(config, n)]:
        raise ValueError(f"model_type {config.model_type}: cannot express {', '.join(f'{n}={getattr(config, n)!r}' for n in lost)}")
    return out


def load_config(folder: Path) -> ModelConfig:
    """config.json of a folder. ValueError naming the file and the field."""
    return from_hf(read_json(folder / "config.json"), str(folder / "config.json"))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a model's folder. ValueError naming the file."""
    if not path.is_file():
        raise ValueError(f"{path}: missing; a model folder holds config.json and *.safetensors")
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:  # not text, not JSON, or another value
        raise ValueError(f"{path}: not JSON, or no object: {error}") from error
