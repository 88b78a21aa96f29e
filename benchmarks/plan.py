"""Planned beside actual for serving: a fixed traffic through `jevons serve`, planned from a short one, then run.

    python benchmarks/plan.py --model DIR [--requests 128] [--clients 16] [--prompt 128] [--output 64] [--weights auto] [--runs runs]

The plan is made of a calibration (a wave or half a minute of the same traffic, kept in RUNS/calibration.json) before the first
request of the run. Seconds are those of the server's receipt, its start included, memory its peak. The last line is JSON. For stages of a
recipe the same comparison is `jevons plan RECIPE --calibrate`, `jevons run RECIPE`, `jevons receipt RECIPE`. What `jevons plan MODEL`
says of serving stands on the engine alone (stages/pace.py); here it is the whole server, at one traffic.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path

from rich.console import Console

from jevons.cost.receipt import format_bytes, format_seconds
from jevons.model.folder import load_config
from jevons.stages.calibrate import calibrate_serving
from jevons.stages.forecast import serving
from jevons.stages.traffic import Traffic, receipt, send, serve_arguments, serve_shape, server
from jevons.train import device


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--output", type=int, default=64)
    parser.add_argument("--weights", default="auto", choices=["auto", "plain", "bf16", "int8", "int4"])
    parser.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float32"])
    parser.add_argument("--cache-gb", type=float, default=1.0)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    args = parser.parse_args()
    if args.requests < 1:
        parser.error(f"--requests: must be at least 1, is {args.requests}")
    try:
        compare(args)
    except ValueError as error:
        parser.error(str(error))


def compare(args: argparse.Namespace) -> None:
    """Plan, run, print both. ValueError for what cannot be served."""
    choose = device.best_dtype if args.weights == "plain" else device.sampling_dtype  # as the server does
    dtype = choose(device.choose("auto")) if args.dtype == "auto" else args.dtype
    traffic, how = Traffic(args.clients, args.prompt, args.output), (args.weights, dtype, args.cache_gb)
    console, config = Console(highlight=False), load_config(args.model)
    options = {"weights": args.weights, "dtype": dtype, "cache_gb": args.cache_gb}
    profile = calibrate_serving(str(args.model), traffic, args.runs, console, **options)
    entry = profile.find("serve", config, **serve_shape(traffic, *how))
    assert entry is not None
    plan = serving(config, entry, args.requests, 0.0)
    with tempfile.TemporaryDirectory() as folder:
        with server([str(args.model), *serve_arguments(traffic, *how)], Path(folder)) as (host, port):
            seconds = send(host, port, traffic, args.requests, config.vocab_size, seed=1000)
        spent = receipt(Path(folder))
    assert spent.memory is not None and plan.memory is not None
    off = {"seconds": spent.seconds / plan.seconds - 1, "memory": spent.memory / plan.memory - 1}
    rates = plan.tokens / (plan.seconds - entry.rates["start"]), plan.tokens / seconds
    for name, took, held, rate in (
        ("planned", plan.seconds, plan.memory, rates[0]), ("actual", spent.seconds, spent.memory, rates[1])
    ):  # fmt: skip
        console.print(f"{name:>8}  {format_seconds(took):>8}  {format_bytes(held):>9}  {rate:,.1f} tokens/s")
    console.print(f"{'off by':>8}  {off['seconds']:>+8.1%}  {off['memory']:>+9.1%}")
    actual = {"seconds": spent.seconds, "memory": spent.memory, "answering": seconds}
    print(json.dumps({"benchmark": "plan", "traffic": vars(args) | {"model": str(args.model), "runs": str(args.runs)},
                      "planned": dataclasses.asdict(plan), "actual": actual, "off": off}))  # fmt: skip


if __name__ == "__main__":
    main()
