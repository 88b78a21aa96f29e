"""Dense, mixture of experts or memory: what each costs to decode and what it learns, by one protocol.

    python benchmarks/sparse.py                                       # tables, and one JSON line last
    python benchmarks/sparse.py --part latency --out docs/results     # a part; sparse.json and sparse.html there are brought up to date
    JEVONS_REAL_TEXT=FILE python benchmarks/sparse.py --part loss     # FILE: conversations or text
    python benchmarks/sparse.py --quick                               # tiny models, seconds: whether it works

Three models alike in width, depth, attention and tokens; mixture (top 2 of N) and memory (UltraMem) match within 1 % in parameters and in
FLOPs a token, the dense one in FLOPs (benchmarks/match.py). Parts:

`latency`  One decoding step at batches of 1 to 512, at 1 GB of sparse parameters in bf16: warm and cold time, bytes touched by count and by
           the formula for uniform choices, beside the machine's measured bandwidth (benchmarks/latency.py).
`loss`     Real text at the scale of recipes/text.toml: loss at equal tokens, equal time, equal money (benchmarks/loss.py). Runs stand in
           --runs and continue where they stopped.
`step`     Seconds of a training step at half of the latency part's sparse parameters, which in fp32 are as many bytes: AdamW over all
           experts, or over the rows that were looked up. The mixture takes some 5 GB.

Each side runs in a process of its own, one at a time. Decoding is in bf16 with packed weights where the native kernels are there, else in
fp32 through torch (then memory is measured through torch as well); learning in what the processor multiplies.
The parts' ratio is the mixture's time over the memory model's, above 1 where memory is faster.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import page
from match import LARGE, SMALL, TINY, Shape, describe, trio

PARTS = ("latency", "loss", "step")
# As the command line sets them, before torch is loaded: threads sleep while they wait; large tensors lie on huge pages
ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "THP_MEM_ALLOC_ENABLE": "1"}


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is measured."""

    large: Shape  # of decoding
    small: Shape  # of learning
    training: Shape  # of a training step
    batches: tuple[int, ...]
    seconds: float  # of warm steps at each batch
    flush: int  # bytes that empty the caches
    pretrain: dict[str, Any]
    step_tokens: int


FULL = Size(
    LARGE, SMALL, dataclasses.replace(LARGE, sparse=LARGE.sparse // 2), (1, 4, 16, 64, 256, 512), 3.0, 2**28,
    {
        "steps": 220, "sequence_length": 512, "batch_size": 4, "lr": 1e-3, "schedule": "constant", "warmup_steps": 20, "bias_speed": 0.02,
        "evaluate_every": 20, "evaluate_windows": 16, "save_every": 50,
    },
    1024,
)  # fmt: skip
QUICK = Size(
    TINY, TINY, TINY, (1, 4, 16), 0.1, 2**22,
    {
        "steps": 4, "sequence_length": 32, "batch_size": 4, "lr": 1e-3, "schedule": "constant", "log_every": 1, "evaluate_every": 2,
        "evaluate_windows": 2,
    },
    64,
)  # fmt: skip


def side(part: str, name: str, size: Size, arguments: argparse.Namespace) -> dict[str, Any]:
    """One model's measurements of one part."""
    import latency
    import loss
    import torch

    latency.pin(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    if part == "loss":
        loss.train(name, arguments.runs, first="dense")
        return {"chosen": loss.chosen(arguments.runs / name, size.batches)}
    if part == "step":
        return loss.step_seconds(trio(size.training)[name], size.step_tokens, 3, dtype)
    config = trio(size.large)[name]
    row = latency.row_bytes(trio(size.large)["memory"], dtype.itemsize)
    found = latency.measure(config, size.batches, dtype=dtype, seconds=size.seconds, flush=size.flush, plain=arguments.plain)
    return found | {"machine": latency.machine(dtype, row, 2**30 if size is FULL else 2**24)}


def run_side(part: str, name: str, size: Size, arguments: argparse.Namespace) -> dict[str, Any]:
    """`side` in a process of its own, or for the quick check in this one."""
    print(f"{part}: {name}{' through torch' if arguments.plain else ''}", file=sys.stderr, flush=True)
    if arguments.quick:
        return side(part, name, size, arguments)
    options = ["--threads", str(arguments.threads), "--dtype", arguments.dtype, "--runs", str(arguments.runs)]
    options += ["--plain"] if arguments.plain else []
    command = [sys.executable, __file__, "--side", part, name, *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return json.loads(done.stdout.strip().splitlines()[-1])


def run_latency(size: Size, arguments: argparse.Namespace) -> dict[str, Any]:
    """Medians over rounds, each of which runs all sides in turn."""
    from jevons.kernels import native

    configs = trio(size.large)
    through_torch = argparse.Namespace(**vars(arguments) | {"plain": True})
    rounds: list[dict[str, Any]] = []
    for _ in range(arguments.rounds):
        rounds.append({name: run_side("latency", name, size, arguments) for name in configs})
        if not native.available():  # then the mixture runs through torch
            rounds[-1]["memory_torch"] = run_side("latency", "memory", size, through_torch)
    machine = {key: statistics.median(s["machine"][key] for r in rounds for s in r.values()) for key in ("bandwidth", "gather")}
    models: dict[str, Any] = {name: describe(configs[name.removesuffix("_torch")], size.large.context) for name in rounds[0]}
    for name, model in models.items():
        model["batches"] = {}
        for batch in map(str, size.batches):
            rows = [r[name]["batches"][batch] for r in rounds]
            row = rows[0] | {key: statistics.median(r[key] for r in rows) for key in ("median", "p90", "cold")}
            model["batches"][batch] = row | {"bytes_per_second": row["bytes"]["total"] / row["median"] * 1e3}
    ratio: dict[str, dict[str, float]] = {name: {} for name in models if name.startswith("memory")}
    marginal: dict[str, float | None] = {}
    for batch in map(str, size.batches):
        moe = models["moe"]["batches"][batch]
        for name, row in ratio.items():
            row[batch] = moe["median"] / models[name]["batches"][batch]["median"]
        memory = models[list(ratio)[-1]]["batches"][batch]  # through the same operators
        more, longer = moe["bytes"]["total"] - memory["bytes"]["total"], (moe["median"] - memory["median"]) / 1e3
        marginal[batch] = more / longer if more > 0 and longer > 0 else None
    return {
        "dtype": arguments.dtype, "packed": rounds[0]["moe"]["packed"], "threads": arguments.threads, "machine": machine, "models": models,
        "ratio": ratio["memory"], "ratio_through_torch": ratio.get("memory_torch"), "bytes_per_second_of_the_difference": marginal,
    }  # fmt: skip


def run_loss(size: Size, arguments: argparse.Namespace) -> dict[str, Any]:
    import loss

    configs = trio(size.small)
    if arguments.quick:
        prepare = {"tasks": [{"task": "arithmetic"}], "documents": 200, "validation_share": 0.1, "processes": 1}
    else:
        if not arguments.text:
            raise ValueError("--text: name conversations or text to learn from, or set JEVONS_REAL_TEXT")
        prepare = {"sources": arguments.text}
    pretrain = size.pretrain | ({"steps": arguments.steps} if arguments.steps else {})
    loss.write_recipes(configs, arguments.runs, prepare, pretrain, dtype=arguments.dtype, price_per_hour=arguments.price)
    trained = {name: run_side("loss", name, size, arguments) for name in configs}
    found = loss.compare(configs, arguments.runs, arguments.price)
    for name, config in configs.items():
        found["models"][name] = describe(config, size.small.context) | found["models"][name] | trained[name]
    return found | {"pretrain": pretrain, "dtype": arguments.dtype}


def run_step(size: Size, arguments: argparse.Namespace) -> dict[str, Any]:
    configs = trio(size.training)
    models = {name: describe(config, size.step_tokens) | run_side("step", name, size, arguments) for name, config in configs.items()}
    ratio = {key: models["moe"][key] / models["memory"][key] for key in ("step", "optimizer")}
    return {"tokens": size.step_tokens, "dtype": arguments.dtype, "models": models, "ratio": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=PARTS, help="may be repeated; without it all of them")
    parser.add_argument("--quick", action="store_true", help="tiny models: whether it works, not how fast anything is")
    parser.add_argument("--out", type=Path, help="a folder: sparse.json there gets the parts that ran, sparse.html is drawn again")
    parser.add_argument("--runs", type=Path, help="where the loss part's runs stand; default runs/sparse, or runs/sparse-quick")
    parser.add_argument("--text", action="append", help="files, folders or globs of the loss part; default $JEVONS_REAL_TEXT")
    parser.add_argument("--steps", type=int, help="of the loss part's runs")
    parser.add_argument("--rounds", type=int, default=1, help="of the latency part")
    parser.add_argument("--price", type=float, default=0.10, help="of this machine's hour, in dollars")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="default: bfloat16 where this machine gains by it")
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--side", nargs=2, metavar=("PART", "NAME"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import torch

    from jevons.train import device

    cpu, dtype = torch.device("cpu"), arguments.dtype
    arguments.text = arguments.text or [text for text in [os.environ.get("JEVONS_REAL_TEXT")] if text]
    arguments.runs = arguments.runs or Path("runs/sparse-quick" if arguments.quick else "runs/sparse")
    size = QUICK if arguments.quick else FULL
    if arguments.side:
        print(json.dumps(side(*arguments.side, size, arguments)))
        return
    results = json.loads((arguments.out / "sparse.json").read_text()) if arguments.out and (arguments.out / "sparse.json").exists() else {}
    ours = results.get("ours", {})
    about = {
        "device": device.describe(cpu), "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
    }  # fmt: skip
    for part, run in zip(PARTS, (run_latency, run_loss, run_step)):
        if part in (arguments.part or PARTS):
            arguments.dtype = dtype or (device.sampling_dtype if part == "latency" else device.best_dtype)(cpu)
            ours[part] = about | run(size, arguments)
            page.show(part, ours[part])
    ratio = {"moe": {part: ours[part]["ratio"] for part in ("latency", "step") if part in ours}}
    results = {"benchmark": "sparse", **about, "ours": ours, "peers": {}, "ratio": ratio}
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "sparse.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        (arguments.out / "sparse.html").write_text(page.draw(results), encoding="utf-8")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
