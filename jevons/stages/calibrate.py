"""`jevons plan NAME --calibrate`: what this device does, measured on the recipe's own stages at their own shapes and on serving.

    profile = calibrate(recipe, root, console)                 every stage, and the engine that serves the model
    profile = calibrate_model(model, root, console)            the engine that serves a model's folder
    profile = calibrate_serving(model, traffic, root, console) a fixed traffic through `jevons serve`

How each is measured stands in stages/probe.py and stages/pace.py; here is what is measured when, and kept. It takes a minute a stage, or
as long as a few steps do. Each is measured in a fresh process, since a peak of memory is a process's; weights that change are theirs and
go with them. The file is written once, at the end, so whoever stops this leaves it as it was.

Text that is not prepared yet is: the first few megabytes, with a tokenizer of their own. Reinforcement learning whose model an earlier
stage has yet to train cannot be measured before, since its answers would be another model's; other stages are, with new weights.

    jevons plan text --calibrate "prepare.sources=[...]"; jevons run text "prepare.sources=[...]"; jevons receipt text

puts planned beside actual; benchmarks/plan.py does it for serving. Memory is that of the steps measured, two dozen where a step takes no
more than two seconds: a process on a CPU goes on growing for about as many (docs/LOG.md), so of slower ones a run may hold more than
planned. Not done: that growth, files of tokens that are mapped as they are read, several devices.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console

from jevons.cost.arithmetic import cache_bytes_per_token
from jevons.cost.profile import Entry, Profile, signature, torch_version
from jevons.data.text import BadLines, read_documents
from jevons.kernels import native, processor
from jevons.model.folder import load_config, resolve
from jevons.recipe import TRAINING, Recipe
from jevons.run import Interrupt, Run, newest_model
from jevons.stages.forecast import KIND
from jevons.stages.pace import measure_engine
from jevons.stages.prepare import prepare
from jevons.stages.probe import SECONDS, measure
from jevons.stages.traffic import MAX_SEQUENCES, Traffic, receipt, send, serve_arguments, serve_shape, server
from jevons.train import device

CHARACTERS = 4_000_000  # of text that is not prepared yet


def calibrate(recipe: Recipe, root: Path, console: Console, *, weights: str = "bf16", prompt: int = 2000) -> Profile:
    """Measure what can be measured of a recipe and add it to root/calibration.json. ValueError where nothing can.

    `weights`, `prompt`: the format in which the model is served, and the length of a prompt in tokens.
    """
    where = device.choose(recipe.device)
    recipe = recipe.settle(device.best_dtype(where))
    stages = [stage for stage in recipe.stages if stage in KIND]
    late = [stage for stage in stages if stage == "rl" and _begins_with(recipe, stage, root) is None]
    for stage in late:
        console.print(f"{stage}: begins with what an earlier stage trains; calibrate again once that is done", highlight=False)
    if not (ready := [stage for stage in stages if stage not in late]):
        raise ValueError(f"--calibrate: {recipe.name} has no stage that can be measured now; it knows {', '.join(KIND)}")
    root.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".calibration-", dir=root) as aside:
        prepared = _prepared(recipe, root, Path(aside), console)
        about = _apart(console, "this device", machine, where.type, recipe.dtype)
        entries = []
        for stage in ready:
            source = _newest(recipe, stage, root) if stage == "evaluate" else _begins_with(recipe, stage, root)
            entries.append(_apart(console, stage, measure, recipe.to_toml(), stage, source, prepared, root))
        try:
            if device.choose("auto").type != where.type:
                raise ValueError(f"`jevons serve` takes the GPU, and the recipe says device={recipe.device!r}")
            served = (recipe.to_toml(), _newest(recipe, "serve", root), prepared, weights, prompt, root)
            entries += _apart(console, f"serving in {weights}", measure_engine, *served)
        except ValueError as error:
            console.print(f"serving in {weights} is not measured: {error}", highlight=False, markup=False)
    return _keep(root, device.describe(where), about, entries)


def calibrate_model(model: str, root: Path, console: Console, *, weights: str = "bf16", prompt: int = 2000) -> Profile:
    """Measure the engine that serves a model, by its folder or hub name, and add it to root/calibration.json."""
    folder, where = _folder(model), device.choose("auto")
    about = _apart(console, "this device", machine, where.type, device.best_dtype(where))
    entries = _apart(console, f"serving in {weights}", measure_engine, None, folder, None, weights, prompt, root)
    return _keep(root, device.describe(where), about, entries)


def calibrate_serving(
    model: str, traffic: Traffic, root: Path, console: Console, *, weights: str = "auto", dtype: str = "auto", cache_gb: float = 1.0
) -> Profile:
    """Measure a traffic through `jevons serve` for half a minute, or for one request of each client, and add it to root/calibration.json.

    `weights`: as they are kept, as for `jevons serve`. ValueError for what cannot be served.
    """
    folder = _folder(model)
    config, where = load_config(folder), device.choose("auto")
    choose = device.best_dtype if weights == "plain" else device.sampling_dtype
    dtype = choose(where) if dtype == "auto" else dtype
    about = _apart(console, "this device", machine, where.type, dtype)
    console.print(f"measuring serve: {traffic.clients} clients, {traffic.prompt} + {traffic.output} tokens a request", highlight=False)
    root.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".calibration-", dir=root) as aside:
        with server([str(folder), *serve_arguments(traffic, weights, dtype, cache_gb)], Path(aside)) as (host, port):
            send(host, port, traffic, 1, config.vocab_size, seed=-1)
            waves, seconds = 0, 0.0
            while not waves or seconds + seconds / waves < SECONDS:
                seconds += send(host, port, traffic, traffic.clients, config.vocab_size, seed=waves)
                waves += 1
        spent = receipt(Path(aside))
    size = getattr(torch, dtype).itemsize
    limit = MAX_SEQUENCES * config.max_position_embeddings * cache_bytes_per_token(config, size)
    assert spent.memory is not None and spent.finished is not None
    rates = {
        "start": spent.seconds - seconds,
        "wave": seconds / waves,
        "requests": 1.0 + waves * traffic.clients,
        "memory": float(spent.memory),
        "cache": min(cache_gb * 2**30, limit),
        "scalar": float(size),
    }
    entry = Entry("serve", signature(config), serve_shape(traffic, weights, dtype, cache_gb), rates, time.strftime("%Y-%m-%d %H:%M:%S"))
    return _keep(root, device.describe(where), about, [entry])


def _folder(model: str) -> Path:
    folder = newest_model(Path(model).expanduser())
    return folder if folder.is_dir() else resolve(model)


def _begins_with(recipe: Recipe, stage: str, root: Path) -> Path | None:
    """The model that a stage begins with, if it is there already; None for new weights, too."""
    before = [s for s in recipe.stages[: recipe.stages.index(stage)] if s in TRAINING]
    if not before:
        return resolve(recipe.model["path"]) if "path" in recipe.model else None
    done = root / recipe.name / before[-1]
    return done / "model" if (done / "DONE.json").exists() else None


def _newest(recipe: Recipe, stage: str, root: Path) -> Path | None:
    """The last model before a stage that is there already: a training stage's, or the recipe's own."""
    before = recipe.stages[: recipe.stages.index(stage)] if stage in recipe.stages else recipe.stages
    done = [root / recipe.name / s for s in reversed(before) if s in TRAINING]
    found = next((folder / "model" for folder in done if (folder / "DONE.json").exists()), None)
    return resolve(recipe.model["path"]) if found is None and "path" in recipe.model else found


def _prepared(recipe: Recipe, root: Path, aside: Path, console: Console) -> Path | None:
    """What [prepare] left, or would leave of some of its text; None without it."""
    if recipe.prepare is None:
        return None
    done = root / recipe.name / "prepare"
    if (done / "DONE.json").exists():
        return done
    console.print("preparing some text", highlight=False)
    try:
        return some_text(recipe, aside)
    except ValueError as error:
        raise ValueError(f"prepare.sources: {error}") from error


def _apart(console: Console, what: str, function: Any, *arguments: Any) -> Any:
    """A measurement in a process of its own, started anew."""
    console.print(f"measuring {what}", highlight=False)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _keep(root: Path, name: str, about: dict[str, Any], entries: list[Entry]) -> Profile:
    """A device's profile with new entries; older ones stay where they still hold."""
    old = Profile.load(root, name)
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    kept = old.entries if old else ()
    profile = Profile(name, processor.name(), torch_version(), processor.threads(), now, entries=kept, **about).add(*entries)
    profile.save(root)
    return profile


def machine(kind: str, dtype: str) -> dict[str, Any]:
    """Peak, bandwidth, the memory of a process that does nothing. Compiles the native kernels where that is due: once a machine."""
    where = torch.device(kind)
    native.available()
    base = device.peak_memory(where)
    peaks = {name: device.measure_peak(where, getattr(torch, name)) for name in dict.fromkeys((dtype, "float32"))}
    return {"base_memory": base, "peak_flops": peaks, "bandwidth": device.measure_bandwidth(where)}


def some_text(recipe: Recipe, aside: Path) -> Path:
    """The first of the recipe's text, prepared as the recipe says, in a run of its own."""
    options = recipe.prepare
    assert options is not None
    changes: dict[str, Any] = {"validation_share": max(options.validation_share, 0.1), "processes": 1}
    if options.tasks:
        changes["documents"] = min(options.documents, 2000)
    else:
        sample = aside / "sample.jsonl"
        with sample.open("w", encoding="utf-8") as file:
            for record in _records(recipe):
                file.write(json.dumps(record) + "\n")
        changes |= {"sources": (str(sample),), "field": None}
    few = recipe.model_copy(update={"name": "text", "prepare": options.model_copy(update=changes)})
    run = Run(few, aside, "")
    prepare(run, few, Interrupt())
    return run.stage_folder("prepare")


def _records(recipe: Recipe) -> Iterator[dict[str, Any]]:
    options, characters = recipe.prepare, 0
    assert options is not None
    for document in read_documents(options.sources, field=options.field, bad=BadLines(limit=options.bad_lines)):
        if document.messages is None:
            yield {"text": document.text}
            characters += len(document.text or "")
        else:
            yield {"messages": [m.to_dict() for m in document.messages]}
            characters += sum(len(m.content) for m in document.messages)
        if characters > CHARACTERS:
            return
