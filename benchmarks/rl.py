"""Seconds of one GRPO step on a real model, in turn with TRL: 2 problems, 8 answers each of at most 96 tokens, bf16, no KL.

    python benchmarks/rl.py [MODEL] [--peer trl] [--rounds 2] [--steps 4]

MODEL is a Hugging Face folder (default: $JEVONS_REAL_MODEL). Ours are the functions of stages/rl.py on reasoning-gym's chain_sum, every
group trained on, with or without a signal, since the peer does so too. Each side runs in a process of its own, A B A B; medians over
steps, then over rounds. Ours counts everything; the peer's figure is its own `step_time`, which leaves the optimizer out. The last line is
JSON. The peer's environment is $JEVONS_PEERS/trl (default ~/.cache/jevons-dev/peers), its program $JEVONS_PEER_PROGRAMS/grpo_trl.py.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

PARTS = ("rollout", "grading", "training", "handover")
# For both sides: threads that spin while they wait make a shared machine several times slower
QUIET = {"OMP_WAIT_POLICY": "PASSIVE"}


def ours(path: Path, steps: int) -> dict[str, float]:
    """Medians over steps; the first one, which warms up, is left out."""
    import torch

    from jevons.data.tokenizer import Tokenizer
    from jevons.model.folder import load_model
    from jevons.section import Rl
    from jevons.stages.classroom import Classroom
    from jevons.stages.origin import make_trainer
    from jevons.stages.rl import hand_over, learn, make_engine
    from jevons.train import device
    from jevons.train.policy import policy_loss

    task = {"task": "gym", "options": {"family": "chain_sum", "instruction": ""}}
    options = Rl.model_validate({"tasks": [task], "steps": steps, "problems": 2, "group": 8, "max_tokens": 96, "temperature": 1.0})
    where = device.choose("auto")
    model = load_model(path, dtype=torch.bfloat16, device=where)
    tokenizer = Tokenizer.load(path)
    trainer, engine = make_trainer(model, options, seed=0), make_engine(model, tokenizer, options)
    classroom = Classroom(options, tokenizer, engine, seed=0)
    loss = policy_loss(options.objective)
    rows: list[dict[str, float]] = []
    for step in range(steps + 1):
        begin = time.perf_counter()
        row = {"handover": hand_over(engine, step)}
        harvest = classroom.collect(step, 0.0, lambda drawn: None)
        start = time.perf_counter()
        if where.type == "cuda":
            engine.release()
        [(metrics, _)] = learn(trainer, replace(harvest, kept=harvest.groups), options, loss, options.lr, None)
        device.synchronize(where)
        end = time.perf_counter()
        drawn = sum(t.drawn for group in harvest.groups for t in group.trajectories)
        row |= {"seconds_per_step": end - begin, "rollout": harvest.seconds, "grading": harvest.grading, "training": end - start}
        row |= {"rollout_tokens_per_second": drawn / harvest.seconds, "train_tokens_per_second": metrics.tokens / (end - start)}
        row |= {"tokens_per_answer": drawn / 16}
        print(f"ours, step {step}: {json.dumps({k: round(v, 3) for k, v in row.items()})}", file=sys.stderr, flush=True)
        rows.append(row)
    classroom.close()
    return {key: statistics.median(row[key] for row in rows[1:]) for key in rows[0]}


def run(command: list[str], environment: dict[str, str]) -> dict[str, float]:
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    if done.returncode:
        raise ValueError(f"{command[1]} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def peer_command(name: str, model: str) -> list[str]:
    root = Path(os.environ.get("JEVONS_PEERS", "~/.cache/jevons-dev/peers")).expanduser()
    python, program = root / name / "bin" / "python", Path(os.environ.get("JEVONS_PEER_PROGRAMS", ".")) / f"grpo_{name}.py"
    for path, what in ((python, "JEVONS_PEERS"), (program, "JEVONS_PEER_PROGRAMS")):
        if not path.exists():
            raise ValueError(f"{path}: missing. Make a virtual environment there that has {name}, or point {what} elsewhere")
    return [str(python), str(program), model]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=os.environ.get("JEVONS_REAL_MODEL"))
    parser.add_argument("--peer", action="append", default=[], choices=["trl"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4, help="of ours in each round; the peer's program makes three")
    parser.add_argument("--side", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.model:
        parser.error("name a model's folder, or set JEVONS_REAL_MODEL")
    if args.side:
        print(json.dumps(ours(Path(args.model), args.steps)))
        return
    commands = {"ours": [sys.executable, __file__, args.model, "--side", "--steps", str(args.steps)]}
    commands |= {peer: peer_command(peer, args.model) for peer in args.peer}
    environment = {"ours": QUIET | {"THP_MEM_ALLOC_ENABLE": "1"}}  # as the command line sets them
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in commands}
    for i in range(args.rounds):
        for side, command in commands.items():
            runs[side].append(run(command, environment.get(side, QUIET)))
            print(f"round {i + 1} {side}: {runs[side][-1]['seconds_per_step']:.1f} s a step", file=sys.stderr, flush=True)
    mine = {key: statistics.median(row[key] for row in runs["ours"]) for key in runs["ours"][0]}
    peers = {peer: {"seconds_per_step": statistics.median(row["seconds_per_step"] for row in runs[peer])} for peer in args.peer}
    for part in PARTS:
        print(f"{part:>12}{mine[part]:9.3f} s{mine[part] / mine['seconds_per_step']:8.1%}")
    print(f"{'step':>12}{mine['seconds_per_step']:9.3f} s", end="   ")
    print(
        f"{mine['rollout_tokens_per_second']:.0f} tokens/s sampled, {mine['train_tokens_per_second']:.0f} trained, "
        f"{mine['tokens_per_answer']:.0f} tokens an answer"
    )
    ratio = {peer: row["seconds_per_step"] / mine["seconds_per_step"] for peer, row in peers.items()}
    for peer, row in peers.items():
        print(f"{peer:>12}{row['seconds_per_step']:9.3f} s{ratio[peer]:8.2f} times as long")
    print(json.dumps({"benchmark": "rl", "ours": mine, "peers": peers, "ratio": ratio}))


if __name__ == "__main__":
    main()
