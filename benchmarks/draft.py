"""Drafting: accepted share and speed-up, on a model trained with an MTP module or on any by n-grams. The text must not change.

    python benchmarks/draft.py --model runs/quickstart [--draft mtp] [--task arithmetic]
    python benchmarks/draft.py --model DIR --draft ngram --text FILE.jsonl

Prompts are test problems of a task, or the first user turns of a JSON Lines file of conversations. Each is answered greedily
and, with a seed, at temperature 0.7, with and without drafts in turn; tokens/s are medians over rounds. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from jevons.data.chat import Message
from jevons.data.tokenizer import Tokenizer
from jevons.engine.engine import Engine
from jevons.engine.packed import pack_model
from jevons.engine.sequence import SamplingParams
from jevons.kernels import native
from jevons.model.folder import load_model
from jevons.run import newest_model
from jevons.tasks.task import get_task


def questions(args: argparse.Namespace) -> list[str]:
    if args.text is None:
        task = get_task(args.task)
        return [task.problem("test", i, 0).prompt for i in range(args.prompts)]
    rows = (json.loads(line) for line in Path(args.text).read_text(encoding="utf-8").splitlines())
    return [row["messages"][0]["content"][:1000] for _, row in zip(range(args.prompts), rows)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--draft", default="mtp", choices=["mtp", "ngram"])
    parser.add_argument("--draft-tokens", type=int, default=0, help="guesses at once; default 1 for mtp, 3 for ngram")
    parser.add_argument("--weights", default="bf16", choices=["plain", "bf16", "int8", "int4"])
    parser.add_argument("--task", default="arithmetic")
    parser.add_argument("--text")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    folder = newest_model(Path(args.model))
    tokenizer, model = Tokenizer.load(folder), load_model(folder, mtp=args.draft == "mtp")
    assert tokenizer.template is not None
    prompts = [
        tokenizer.encode(tokenizer.template.render([Message("user", text)], add_generation_prompt=True)) for text in questions(args)
    ]
    if args.weights != "plain" and native.available():
        pack_model(model, args.weights)
    stops = {*model.config.eos_token_ids, tokenizer.eos_id}
    count = args.draft_tokens or (1 if args.draft == "mtp" else 3)
    results: dict[str, Any] = {}
    for name, temperature in (("greedy", 0.0), ("sampled", 0.7)):
        for batch in (1, 4):
            params = SamplingParams(max_tokens=args.max_tokens, temperature=temperature, seed=0)
            rates: dict[bool, list[float]] = {False: [], True: []}
            texts: dict[bool, list[list[int]]] = {}
            accepted = drafted = 0
            for _ in range(args.rounds):
                for on in (False, True):
                    engine = Engine(
                        model, max_sequences=batch, stop_ids=stops, draft=args.draft if on else None, draft_tokens=count, draft_rows=16
                    )
                    engine.generate(prompts[:1], replace(params, max_tokens=4))
                    start = time.perf_counter()
                    done = engine.generate(prompts, params)
                    rates[on].append(sum(len(s.tokens) for s in done) / (time.perf_counter() - start))
                    texts[on] = [s.tokens for s in done]
                    accepted, drafted = (engine.accepted, engine.drafted) if on else (accepted, drafted)
            row = {
                "plain": statistics.median(rates[False]),
                "drafted": statistics.median(rates[True]),
                "accepted": accepted / max(1, drafted),
                "same": sum(a == b for a, b in zip(texts[False], texts[True])) / len(prompts),
            }
            row["speedup"] = row["drafted"] / row["plain"]
            results[f"{name} {batch}"] = row
            print(
                f"{name:8} batch {batch}: {row['plain']:8.1f} -> {row['drafted']:8.1f} tokens/s, {row['speedup']:.2f}x; "
                f"{row['accepted']:.1%} of drafts accepted; {row['same']:.0%} of texts identical"
            )
    print(json.dumps({"benchmark": "draft", "draft": args.draft, "weights": args.weights, "ours": results}))


if __name__ == "__main__":
    main()
