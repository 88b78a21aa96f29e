"""Prefill and decode speed of the engine, in turn with other engines' on the same model and machine.

    python benchmarks/serve.py --model DIR [--peer vllm] [--peer llamacpp] [--peer transformers] [--rounds 3] [--format bf16]

`prefill` is tokens/s of one prompt of 512 tokens, `decode` tokens/s of a batch of 1, 8 and 32 sequences that each hold 32 prompt
tokens and grow by 32. Each round measures ours and then every peer; medians over rounds and their ratios are printed, with
each figure's share of the machine's limit: bytes over measured bandwidth, or operations over the measured bf16 peak,
whichever is the larger time. The last line is JSON. A peer's environment is $JEVONS_PEERS/NAME (default
~/.cache/jevons-dev/peers), its program $JEVONS_PEER_PROGRAMS/serve_NAME.py.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from jevons.cost.arithmetic import cache_bytes_per_token, decode_flops, prefill_flops
from jevons.engine.engine import Engine
from jevons.engine.packed import pack_model
from jevons.engine.sequence import SamplingParams
from jevons.kernels import native
from jevons.model.folder import load_model

BATCHES = (1, 8, 32)
PROMPT, GROWTH, PREFILL = 32, 32, 512


def tokens(count: int, vocab: int) -> list[int]:
    return [random.randrange(5, min(vocab, 30000)) for _ in range(count)]


def measure(engine: Engine) -> dict[str, Any]:
    """Tokens/s, counted in whole steps: a batch's prompts are read in the first, its tokens grow in the 32 after it."""
    vocab = engine.model.config.vocab_size
    params = SamplingParams(max_tokens=1, temperature=0)
    engine.generate([tokens(PREFILL, vocab)], params)
    rates = []
    for _ in range(3):
        prompt = tokens(PREFILL, vocab)
        start = time.perf_counter()
        engine.generate([prompt], params)
        rates.append(PREFILL / (time.perf_counter() - start))
    decode = {}
    for batch in BATCHES:
        prompts = [tokens(PROMPT, vocab) for _ in range(batch)]
        for prompt in prompts:
            engine.submit(prompt, SamplingParams(max_tokens=GROWTH + 2, temperature=0))
        engine.step(), engine.step()
        start = time.perf_counter()
        for _ in range(GROWTH):
            engine.step()
        decode[str(batch)] = batch * GROWTH / (time.perf_counter() - start)
        assert not engine.has_work
    return {"prefill": statistics.median(rates), "decode": decode}


def machine() -> tuple[float, float]:
    """Bytes/s that both cores read, and bf16 operations/s of a product of 2048-cubed; best of five."""
    x, a = torch.ones(2**28), torch.ones(2048, 2048, dtype=torch.bfloat16)
    read = min(_time(x.sum) for _ in range(5))
    product = min(_time(lambda: a @ a) for _ in range(5))
    return x.nbytes / read, 2 * 2048**3 / product


def _time(f: Any) -> float:
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def limits(engine: Engine, weights: int) -> dict[str, Any]:
    """Tokens/s that the machine allows: reading what a step reads, or computing what it computes, the slower of the two.

    `weights` are the bytes of packed weights without the embedding; of routed experts a batch reads at most those it chooses.
    """
    config, (bandwidth, peak) = engine.model.config, machine()
    read = {b: float(weights) for b in BATCHES}
    if config.n_routed_experts:
        sparse = sum(config.is_moe(i) for i in range(config.num_hidden_layers)) * 3 * config.hidden_size * config.moe_intermediate_size
        per_weight = weights / sum(p.numel() for p in load_shapes(engine))
        for b in BATCHES:
            chosen = config.n_routed_experts * (1 - (1 - config.num_experts_per_tok / config.n_routed_experts) ** b)
            read[b] -= sparse * per_weight * (config.n_routed_experts - chosen)
    decode = {}
    for b in BATCHES:
        context = PROMPT + GROWTH / 2
        memory = (read[b] + b * context * cache_bytes_per_token(config)) / bandwidth
        decode[str(b)] = b / max(memory, b * decode_flops(config, context) / peak)
    return {"prefill": peak * PREFILL / prefill_flops(config, PREFILL), "decode": decode}


def load_shapes(engine: Engine) -> list[torch.Tensor]:
    with torch.device("meta"):
        return [p for n, p in type(engine.model)(engine.model.config).named_parameters() if "embed_tokens" not in n]


def run_peer(name: str, model: str) -> dict[str, Any]:
    root = Path(os.environ.get("JEVONS_PEERS", "~/.cache/jevons-dev/peers")).expanduser()
    python, program = root / name / "bin" / "python", Path(os.environ.get("JEVONS_PEER_PROGRAMS", ".")) / f"serve_{name}.py"
    for path, what in ((python, "JEVONS_PEERS"), (program, "JEVONS_PEER_PROGRAMS")):
        if not path.exists():
            raise ValueError(f"{path}: missing. Make a virtual environment there that has {name}, or point {what} elsewhere")
    done = subprocess.run([python, program, model], capture_output=True, text=True, timeout=900)
    if done.returncode:
        raise ValueError(f"{name} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--format", action="append", choices=["bf16", "int8", "int4", "plain"], help="of our weights; may be repeated")
    parser.add_argument("--peer", action="append", default=[], choices=["vllm", "llamacpp", "transformers"])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    formats = args.format or ["bf16", "int4"]
    engines, limit = {}, {}
    for format in formats:
        model = load_model(Path(args.model), mtp=False)
        if format == "plain":
            engines[format] = Engine(model, max_batch_tokens=2048, share_prefixes=False)
            continue
        if not native.available():
            raise ValueError(native.reason())
        weights = pack_model(model, format) - model.model.embed_tokens.weight.nbytes
        engines[format] = Engine(model, max_batch_tokens=2048, share_prefixes=False)
        limit[format] = limits(engines[format], weights)
    runs: dict[str, list[dict[str, Any]]] = {}
    for i in range(args.rounds):
        for format, engine in engines.items():
            runs.setdefault(format, []).append(measure(engine))
            print(f"round {i + 1} {format}: {json.dumps(runs[format][-1])}", file=sys.stderr, flush=True)
        for peer in args.peer:
            runs.setdefault(peer, []).append(run_peer(peer, args.model))
            print(f"round {i + 1} {peer}: {json.dumps(runs[peer][-1])}", file=sys.stderr, flush=True)
    medians = {
        name: {
            "prefill": statistics.median(r["prefill"] for r in rows),
            "decode": {str(b): statistics.median(r["decode"][str(b)] for r in rows) for b in BATCHES},
        }
        for name, rows in runs.items()
    }
    print(f"{'':14}{'prefill 512':>14}" + "".join(f"{f'decode {b}':>14}" for b in BATCHES))
    for name, row in medians.items():
        print(f"{name:14}{row['prefill']:14.1f}" + "".join(f"{row['decode'][str(b)]:14.1f}" for b in BATCHES))
        if name in limit:
            shares = [row["prefill"] / limit[name]["prefill"], *(row["decode"][str(b)] / limit[name]["decode"][str(b)] for b in BATCHES)]
            print(f"{'  of the limit':14}" + "".join(f"{share:14.0%}" for share in shares))
    ratio = {
        format: {
            peer: {
                "prefill": medians[format]["prefill"] / medians[peer]["prefill"],
                "decode": {str(b): medians[format]["decode"][str(b)] / medians[peer]["decode"][str(b)] for b in BATCHES},
            }
            for peer in args.peer
        }
        for format in formats
    }
    for format, peers in ratio.items():
        for peer, row in peers.items():
            print(f"{format + ' / ' + peer:20}{row['prefill']:8.2f}" + "".join(f"{row['decode'][str(b)]:14.2f}" for b in BATCHES))
    ours = {format: medians[format] | ({"limit": limit[format]} if format in limit else {}) for format in formats}
    print(json.dumps({"benchmark": "serve", "ours": ours, "peers": {p: medians[p] for p in args.peer}, "ratio": ratio}))


if __name__ == "__main__":
    main()
