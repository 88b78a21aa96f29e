"""A model as a Hugging Face folder, in and out.

Problem: checkpoints name every expert's matrices one by one, may be block-scaled FP8, repeat the embedding and head in
each MTP module, and are larger than one wants to hold twice. Approach: parameters carry Hugging Face's names, so the map
is the identity plus one invertible operation that stacks experts. Tensors are read one at a time; where nothing has to be
converted the file's own pages become the parameter (memory-mapped, private), so loading neither copies nor waits.
Not done: pickled checkpoints (.bin), which can run code, and remote code of any kind.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from jevons.data.disk import new_folder, write_json
from jevons.kernels.fp8 import dequantize_blocks
from jevons.model.config import ModelConfig
from jevons.model.family import load_config, read_json, to_hf
from jevons.model.transformer import Transformer
from jevons.model.ultramem import check_shuffles

SHARD_BYTES = 5 * 10**9
COMPANIONS = (
    *("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*", "*.model"),
    "generation_config.json",
)
_EXPERT = re.compile(r"(model\.layers\.\d+\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


def resolve(name: str) -> Path:
    """A local folder, or a hub name's safetensors files (downloaded once by huggingface_hub, never code)."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ValueError(f"{name}: no such folder, and not a hub name (owner/model)")
    from huggingface_hub import snapshot_download  # only here: a local folder needs no network code

    patterns = ["*.safetensors", "*.json", *COMPANIONS]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except OSError as error:  # huggingface_hub's own errors and the network's are all OSError
        raise ValueError(f"{name}: not a local folder, and the hub could not be read: {error}") from error


class _Folder:
    """The tensors of a folder by name, whichever file they lie in."""

    def __init__(self, folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            files = sorted({folder / name for name in read_json(index).get("weight_map", {}).values()})
            if absent := [f.name for f in files if not f.is_file()]:
                raise ValueError(f"{folder}: the index names files that are missing: {', '.join(absent)}")
        else:
            files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise ValueError(f"{folder}: no *.safetensors (pickled .bin checkpoints are not read; convert them first)")
        self.handles: dict[str, Any] = {}
        for file in files:
            try:
                handle = safe_open(file, "pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{file}: truncated or corrupt: {error}") from error
            self.handles |= dict.fromkeys(handle.keys(), handle)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.handles[name].get_slice(name).get_shape())

    def tensor(self, name: str, dtype: torch.dtype, block: tuple[int, int]) -> Tensor:
        """One tensor as it was stored, or in `dtype` where a `_scale_inv` sibling says that it is block-scaled FP8."""
        tensor = self.handles[name].get_tensor(name)
        if (scale := f"{name}_scale_inv") in self.handles:
            return dequantize_blocks(tensor, self.handles[scale].get_tensor(scale), dtype, block)
        return tensor


def locate(name: str, config: ModelConfig) -> tuple[str, tuple[Any, ...]] | None:
    """Where a checkpoint's tensor goes: the parameter's name and an index into it; None for copies that memory does not keep."""
    if match := _EXPERT.fullmatch(name):
        stem, expert, kind = match[1], int(match[2]), match[3]
        if kind == "down":
            return f"{stem}.down_proj", (expert,)
        F = config.moe_intermediate_size
        return f"{stem}.gate_up_proj", (expert, slice(0, F) if kind == "gate" else slice(F, 2 * F))
    if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tie_word_embeddings):
        return None
    match = _LAYER.fullmatch(name)
    if match and int(match[1]) >= config.num_hidden_layers and match[2] in ("embed_tokens.weight", "shared_head.head.weight"):
        return None  # an MTP module's embedding and head are copies of the main model's
    return name, ()


def disk_tensors(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """The inverse of `locate`: every tensor under its checkpoint name, experts one by one, in layer order. Views, not copies."""
    config = model.config
    state = model.state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    F = config.moe_intermediate_size
    for name, tensor in state.items():
        stem, _, leaf = name.rpartition(".")
        if leaf == "gate_up_proj":
            for e, gate_up in enumerate(tensor):
                yield f"{stem}.{e}.gate_proj.weight", gate_up[:F]
                yield f"{stem}.{e}.up_proj.weight", gate_up[F:]
        elif leaf == "down_proj" and stem.endswith("experts"):
            for e, down in enumerate(tensor):
                yield f"{stem}.{e}.down_proj.weight", down
        else:
            yield name, tensor
    for i in range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers):
        yield f"model.layers.{i}.embed_tokens.weight", model.model.embed_tokens.weight.detach()
        yield f"model.layers.{i}.shared_head.head.weight", model.lm_head.weight.detach()


def load_model(folder: Path, *, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu", mtp: bool = True) -> Transformer:
    """A model from a Hugging Face folder, in `dtype` (router biases stay fp32). `mtp=False` leaves MTP modules on the disk.

    Raises ValueError with the whole list of missing, unexpected and wrongly shaped tensors.
    """
    config = load_config(folder)
    files = _Folder(folder)
    names = [n for n in files.handles if not n.endswith("_scale_inv")]
    extra = {int(m[1]) for n in names if (m := _LAYER.fullmatch(n)) and int(m[1]) >= config.num_hidden_layers}
    if not extra or not mtp:
        # transformers writes num_nextn_predict_layers even where it dropped the modules' weights
        config = replace(config, num_nextn_predict_layers=0)
    if not mtp:
        names = [n for n in names if not (m := _LAYER.fullmatch(n)) or int(m[1]) < config.num_hidden_layers]
    quantization = read_json(folder / "config.json").get("quantization_config") or {}
    rows, columns = quantization.get("weight_block_size") or (128, 128)
    with torch.device("meta"):
        model = Transformer(config)
    _fill(model, files, names, dtype, torch.device(device), (rows, columns), str(folder))
    check_shuffles(model, str(folder))
    return model


def _place(
    config: ModelConfig, slots: dict[str, Tensor], files: _Folder, names: list[str], block: tuple[int, int], where: str
) -> list[tuple[str, str, tuple[Any, ...]]]:
    """Which tensor goes where, without reading any: (name, slot, index into it). ValueError with everything that does not fit."""
    places: list[tuple[str, str, tuple[Any, ...]]] = []
    filled = dict.fromkeys(slots, 0)
    faults: list[str] = []
    for name in sorted(names):
        target = locate(name, config)
        if target is None:
            continue
        slot, index = target
        if slot not in slots or (index and index[0] >= len(slots[slot])):
            faults.append(f"unexpected: {name}")
            continue
        part = slots[slot][index]
        filled[slot] += part.numel()
        shapes = {name: tuple(part.shape)}
        if (scale := f"{name}_scale_inv") in files.handles:
            shapes[scale] = tuple(-(-size // step) for size, step in zip(part.shape, block))
        faults += [f"wrongly shaped: {n} is {files.shape(n)}, config.json makes it {s}" for n, s in shapes.items() if files.shape(n) != s]
        places.append((name, slot, index))
    for slot, tensor in slots.items():
        if filled[slot] < tensor.numel():
            faults.append(f"missing: {'some experts of ' if filled[slot] else ''}{slot}")
    if faults:
        raise ValueError(f"{where}: the weights do not fit config.json:\n  " + "\n  ".join(faults))
    return places


def _fill(
    model: Transformer, files: _Folder, names: list[str], dtype: torch.dtype, device: torch.device, block: tuple[int, int], where: str
) -> None:
    slots = dict(model.named_parameters()) | dict(model.named_buffers())
    filled: dict[str, Tensor] = {}
    for name, slot, index in _place(model.config, slots, files, names, block, where):
        wanted = slots[slot].dtype if slot.endswith(("e_score_correction_bias", "shuffle_index")) else dtype
        tensor = files.tensor(name, wanted, block)
        if index:
            if slot not in filled:
                filled[slot] = torch.empty(slots[slot].shape, dtype=wanted, device=device)
            filled[slot][index].copy_(tensor)
        else:
            filled[slot] = tensor.to(device, wanted)
    _assign(model, filled)


def _assign(model: Transformer, tensors: dict[str, Tensor]) -> None:
    """Put tensors in the place of a meta model's parameters and buffers, keeping a tied head tied."""
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        setattr(module, leaf, tensor if leaf in module._buffers else nn.Parameter(tensor))
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight


def save_model(model: Transformer, folder: Path, *, companions: Iterable[Path] = (), shard_bytes: int = SHARD_BYTES) -> None:
    """Write config.json, generation_config.json and sharded safetensors, plus copies of `companions` (tokenizer files), atomically."""
    with new_folder(folder) as aside:
        write_folder(model, aside, companions=companions, shard_bytes=shard_bytes)


def write_folder(model: Transformer, folder: Path, *, companions: Iterable[Path] = (), shard_bytes: int = SHARD_BYTES) -> None:
    """`save_model` into a folder that exists and that the caller makes atomic."""
    config = model.config
    dtype = str(model.model.embed_tokens.weight.dtype).removeprefix("torch.")
    write_json(folder / "config.json", to_hf(config, dtype))
    for companion in companions:
        (folder / companion.name).write_bytes(companion.read_bytes())
    if not (folder / "generation_config.json").exists():
        ids = {k: getattr(config, k) for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
        write_json(folder / "generation_config.json", {k: list(v) if isinstance(v, tuple) else v for k, v in ids.items() if v is not None})

    shards: list[list[str]] = [[]]
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in disk_tensors(model)}
    room = shard_bytes
    for name, size in sizes.items():
        if size > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size
    tensors = dict(disk_tensors(model))
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        # the copies that an MTP module carries share memory with the originals, which safetensors refuses: clone those
        shard = {n: tensors[n].clone() if n.endswith((".embed_tokens.weight", "shared_head.head.weight")) else tensors[n] for n in names}
        save_file({n: t.contiguous() for n, t in shard.items()}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})


def companions(folder: Path) -> list[Path]:
    """Tokenizer files, chat templates and generation settings that travel with a model's weights."""
    return sorted({file for pattern in COMPANIONS for file in folder.glob(pattern) if file.is_file()})
