"""Training speed at 22M parameters (32 experts, 6M active), batch 8 x 512: ours, and peers in turn with it.

    python benchmarks/train.py                          # ours alone
    python benchmarks/train.py --peer transformers      # A B A B ..., medians and their ratio

Prints a table and, last, one JSON line. Peers run in their own virtual environments, found in JEVONS_PEERS (default
~/.cache/jevons-dev/peers/NAME). Every side trains DeepSeek-V3's architecture of the same shape with AdamW and no MTP.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

SHAPE = {
    "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 704, "moe_intermediate_size": 128, "num_hidden_layers": 6,
    "num_attention_heads": 4, "n_shared_experts": 1, "n_routed_experts": 32, "num_experts_per_tok": 4, "first_k_dense_replace": 1,
    "q_lora_rank": 96, "kv_lora_rank": 64, "qk_rope_head_dim": 32, "qk_nope_head_dim": 64, "v_head_dim": 64, "n_group": 1,
    "topk_group": 1, "max_position_embeddings": 512,
}  # fmt: skip
SEQUENCES, LENGTH, STEPS = 8, 512, 6


def ours(compile: bool) -> dict[str, float]:
    import torch

    from jevons.data.batch import Batch
    from jevons.model.config import ModelConfig
    from jevons.model.transformer import Transformer
    from jevons.train.loss import next_token
    from jevons.train.trainer import Trainer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**SHAPE)).to(device, torch.bfloat16)
    model.init_weights(torch.Generator(device).manual_seed(0))
    trainer = Trainer(model, compile=compile)
    tokens = torch.randint(0, SHAPE["vocab_size"], (SEQUENCES, LENGTH + 1))
    total = SEQUENCES * LENGTH
    batch = Batch(
        tokens_T=tokens[:, :-1].flatten(),
        positions_T=torch.arange(LENGTH).repeat(SEQUENCES),
        cu_seqlens=torch.arange(0, total + 1, LENGTH, dtype=torch.int32),
        targets_T=tokens[:, 1:].flatten(),
        weights_T=torch.ones(total),
    )
    rates = []
    for _ in range(STEPS + 2 * compile):
        start = time.perf_counter()
        trainer.forward_backward([batch], next_token)
        trainer.step(1e-3)
        if device == "cuda":
            torch.cuda.synchronize()
        rates.append(total / (time.perf_counter() - start))
    return {"bf16": statistics.median(rates[1 + 2 * compile :])}


def transformers() -> dict[str, float]:
    import torch
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    out = {}
    for name, mixed in (("fp32", False), ("bf16", True)):
        torch.manual_seed(0)
        model = DeepseekV3ForCausalLM(DeepseekV3Config(**SHAPE, num_key_value_heads=SHAPE["num_attention_heads"])).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        tokens = torch.randint(0, SHAPE["vocab_size"], (SEQUENCES, LENGTH), device=device)
        rates = []
        for _ in range(STEPS):
            start = time.perf_counter()
            with torch.autocast(device, torch.bfloat16, enabled=mixed):
                loss = model(tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if device == "cuda":
                torch.cuda.synchronize()
            rates.append(tokens.numel() / (time.perf_counter() - start))
        out[name] = statistics.median(rates[1:])
    return out


def run_side(python: str, side: str, compile: bool) -> dict[str, float]:
    command = [python, __file__, "--side", side] + ["--compile"] * compile
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{side} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=["transformers"], action="append", default=[], help="run this peer in turn with ours")
    parser.add_argument("--rounds", type=int, default=3, help="how many times each side runs")
    parser.add_argument("--compile", action="store_true", help="compile our layers with torch.compile")
    parser.add_argument("--side", choices=["ours", "transformers"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(transformers() if arguments.side == "transformers" else ours(arguments.compile)))
        return

    root = Path(os.environ.get("JEVONS_PEERS", "~/.cache/jevons-dev/peers")).expanduser()
    pythons = {"ours": sys.executable} | {peer: str(root / peer / "bin" / "python") for peer in arguments.peer}
    for peer in arguments.peer:
        if not Path(pythons[peer]).exists():
            sys.exit(f"no {pythons[peer]}; make it: python -m venv {root / peer} && {root / peer}/bin/pip install torch transformers")
    rates: dict[str, dict[str, list[float]]] = {}
    for _ in range(arguments.rounds):
        for side, python in pythons.items():
            for precision, rate in run_side(python, side, arguments.compile).items():
                rates.setdefault(side, {}).setdefault(precision, []).append(rate)
                print(f"{side:>14} {precision}: {rate:9,.0f} tokens/s", flush=True)
    medians = {side: {p: statistics.median(r) for p, r in by.items()} for side, by in rates.items()}
    mine = medians.pop("ours")
    ratio = {peer: {p: mine["bf16"] / r for p, r in by.items()} for peer, by in medians.items()}
    print(json.dumps({"benchmark": "train", "ours": mine, "peers": medians, "ratio": ratio}))


if __name__ == "__main__":
    main()
