"""HTTP load with real prompts: many clients streaming chat completions from `jevons serve`, and from vLLM's server in its turn.

    python benchmarks/traffic.py --model DIR --text FILE.jsonl [--clients 64] [--seconds 300] [--weights bf16]
                                 [--peer vllm] [--offline] [--prefix]

Each client takes the next conversation's first user turn, streams a greedy reply of at most --max-tokens, and takes another.
A request counts as lost unless it ends in [DONE] with a finish reason; requests and rows of the ledger must be as many.
`--offline` gives the same prompts to the engine in this process, as many at once: what HTTP, JSON, detokenising and metering
cost is the ratio. `--prefix` asks five times about a text of 1,000 tokens that the server has not seen, and five times about
one that it has: times to the first token. The last line is JSON. Peers as in benchmarks/serve.py.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from jevons.cost.usage import UsageStore
from jevons.data.chat import Message
from jevons.data.tokenizer import Tokenizer
from jevons.engine.engine import Engine
from jevons.engine.packed import pack_model
from jevons.engine.sequence import SamplingParams
from jevons.model.folder import load_model

CHARACTERS = 1000  # of a prompt
MAX_BATCH_TOKENS = 512  # the server's default


def questions(text: Path) -> Iterator[str]:
    """First user turns, again from the beginning when they are used up."""
    with text.open(encoding="utf-8") as lines:
        turns = [json.loads(line)["messages"][0]["content"][:CHARACTERS] for line, _ in zip(lines, range(20000))]
    return itertools.cycle(turns)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def server(command: list[str], port: int, environment: dict[str, str]) -> Iterator[str]:
    """The address of a server that is up; it is stopped in the end."""
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | environment)
        try:
            for _ in range(600):
                time.sleep(0.5)
                if process.poll() is not None:
                    output.seek(0)
                    raise ValueError(f"{command[0]} ended with {process.returncode}:\n{output.read()[-2000:]}")
                try:
                    if httpx.get(f"{url}/health").status_code == 200:
                        break
                except httpx.TransportError:
                    continue
            yield url
        finally:
            process.terminate()
            try:
                process.wait(40)
            except subprocess.TimeoutExpired:
                process.kill()


async def ask(client: httpx.AsyncClient, url: str, model: str, question: str, max_tokens: int) -> dict[str, Any]:
    """One streamed request: seconds to the first token, between tokens, in all; tokens; whether all of it came."""
    body = {"model": model, "messages": [{"role": "user", "content": question}], "max_tokens": max_tokens, "temperature": 0}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    start, first, finish, done, tokens, arrivals = time.perf_counter(), None, None, False, 0, []
    try:
        async with client.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                return {"lost": f"{response.status_code} {(await response.aread())[:200]!r}"}
            async for line in response.aiter_lines():
                if not line.startswith("data: "):
                    continue
                if line == "data: [DONE]":
                    done = True
                    continue
                chunk = json.loads(line[6:])
                if chunk.get("usage"):
                    tokens = chunk["usage"]["completion_tokens"]
                for choice in chunk.get("choices") or []:
                    if choice["delta"].get("content"):
                        arrivals.append(time.perf_counter())
                        first = first or arrivals[-1]
                    finish = choice["finish_reason"] or finish
    except httpx.TransportError as error:
        return {"lost": repr(error)}
    end = time.perf_counter()
    if not done or not finish:
        return {"lost": f"no end: done {done}, finish {finish}"}
    return {"start": start, "end": end, "tokens": tokens, "first": None if first is None else first - start, "arrivals": arrivals}


async def load(url: str, model: str, asked: Iterator[str], clients: int, seconds: float, max_tokens: int, name: str) -> dict[str, Any]:
    """All clients for a time; what they saw."""
    rows: list[dict[str, Any]] = []
    begin = time.perf_counter()

    async def client() -> None:
        async with httpx.AsyncClient(timeout=600) as http:
            while time.perf_counter() - begin < seconds:
                rows.append(await ask(http, url, model, next(asked), max_tokens))

    async def watch() -> None:
        while True:
            await asyncio.sleep(10)
            print(f"{name}: {time.perf_counter() - begin:.0f} s, {len(rows)} requests", file=sys.stderr, flush=True)

    watcher = asyncio.create_task(watch())
    await asyncio.gather(*(client() for _ in range(clients)))
    watcher.cancel()
    lost = [row["lost"] for row in rows if "lost" in row]
    whole = [row for row in rows if "lost" not in row]
    firsts = sorted(row["first"] for row in whole if row["first"] is not None)
    gaps = sorted(b - a for row in whole for a, b in zip(row["arrivals"], row["arrivals"][1:]))
    elapsed = max(row["end"] for row in whole) - begin
    # between the first tenth and the end of asking, all clients are busy
    steady = sum(begin + seconds * 0.1 <= at <= begin + seconds for row in whole for at in row["arrivals"]) / (0.9 * seconds)
    return {
        "requests": len(rows),
        "lost": len(lost),
        "reasons": sorted(set(lost))[:3],
        "tokens": sum(row["tokens"] for row in whole),
        "tokens_per_second": sum(row["tokens"] for row in whole) / elapsed,
        "pieces_per_second_busy": steady,
        "first_token": {"p50": _quantile(firsts, 0.5), "p95": _quantile(firsts, 0.95)},
        "between_tokens": {"p50": _quantile(gaps, 0.5), "p95": _quantile(gaps, 0.95)},
    }


def _quantile(values: list[float], share: float) -> float:
    return values[min(len(values) - 1, int(share * len(values)))] if values else float("nan")


def offline(folder: Path, weights: str, asked: Iterator[str], clients: int, seconds: float, max_tokens: int) -> dict[str, Any]:
    """The engine without a server, always with `clients` requests under way until the time is over."""
    tokenizer, model = Tokenizer.load(folder), load_model(folder, mtp=False)
    assert tokenizer.template is not None
    if weights != "plain":
        pack_model(model, weights)
    stops = {*model.config.eos_token_ids, tokenizer.eos_id}
    engine = Engine(model, max_batch_tokens=MAX_BATCH_TOKENS, max_sequences=clients, stop_ids=stops, draft="ngram", draft_tokens=3)

    def submit() -> None:
        text = tokenizer.template.render([Message("user", next(asked))], add_generation_prompt=True)  # type: ignore[union-attr]
        engine.submit(tokenizer.encode(text), SamplingParams(max_tokens=max_tokens, temperature=0))

    begin, tokens, busy, requests = time.perf_counter(), 0, 0, 0
    for _ in range(clients):
        submit()
    while engine.has_work:
        events, now = engine.step(), time.perf_counter() - begin
        tokens += len(events)
        busy += len(events) if 0.1 * seconds <= now <= seconds else 0
        for event in events:
            if event.sample is not None:
                requests += 1
                if now < seconds:
                    submit()
    elapsed = time.perf_counter() - begin
    return {"requests": requests, "tokens": tokens, "tokens_per_second": tokens / elapsed, "pieces_per_second_busy": busy / (0.9 * seconds)}


async def prefixes(url: str, model: str, text: Path, tokenizer: Tokenizer) -> dict[str, float]:
    """Seconds to the first token of a question about 1,000 tokens, new ones and those that were read before."""
    ids: list[int] = []
    for turn in itertools.islice(questions(text), 400, 3000):
        ids += tokenizer.encode(turn + "\n")
        if len(ids) >= 6000:
            break
    texts = [tokenizer.decode(ids[1000 * i : 1000 * (i + 1)]) for i in range(6)]
    cold, warm = [], []
    async with httpx.AsyncClient(timeout=600) as http:
        await ask(http, url, model, "Hello", 4)
        for i in range(5):
            cold.append((await ask(http, url, model, texts[i] + "\nWhat is this about?", 4))["first"])
        for i in range(5):
            warm.append((await ask(http, url, model, texts[0] + f"\nSay {i} words on this.", 4))["first"])
    cold_s, warm_s = statistics.median(cold), statistics.median(warm)
    return {"cold": cold_s, "warm": warm_s, "ratio": cold_s / warm_s}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--weights", default="bf16", choices=["plain", "bf16", "int8", "int4"])
    parser.add_argument("--peer", choices=["vllm"])
    parser.add_argument("--offline", action="store_true")
    parser.add_argument("--prefix", action="store_true")
    args = parser.parse_args()
    tokenizer, results = Tokenizer.load(args.model), {}
    settings = (args.clients, args.seconds, args.max_tokens)
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        command = [sys.executable, "-m", "jevons.cli", "serve", str(args.model), "--port", str(port), "--name", "model", "--runs", folder]
        command += ["--weights", args.weights, "--max-sequences", str(args.clients), "--max-batch-tokens", str(MAX_BATCH_TOKENS)]
        with server(command, port, {}) as url:
            if args.prefix:
                results["prefix"] = asyncio.run(prefixes(url, "model", args.text, tokenizer))
                print("prefix", json.dumps(results["prefix"]), flush=True)
            before = sum(row.requests for row in UsageStore(f"{folder}/ledger.db").sums("key"))
            ours = asyncio.run(load(url, "model", questions(args.text), *settings, "jevons"))
            ours["metered"] = sum(row.requests for row in UsageStore(f"{folder}/ledger.db").sums("key")) - before
            results["jevons"] = ours
            print("jevons", json.dumps(ours), flush=True)
    if args.offline:
        results["offline"] = offline(args.model, args.weights, questions(args.text), *settings)
        results["of_offline"] = results["jevons"]["tokens_per_second"] / results["offline"]["tokens_per_second"]
        print("offline", json.dumps(results["offline"]), f"HTTP reaches {results['of_offline']:.1%} of it", flush=True)
    if args.peer:
        root, port = Path(os.environ.get("JEVONS_PEERS", "~/.cache/jevons-dev/peers")).expanduser(), free_port()
        command = [str(root / args.peer / "bin" / "python"), "-m", "vllm.entrypoints.openai.api_server", "--model", str(args.model)]
        command += ["--served-model-name", "model", "--dtype", "bfloat16", "--max-model-len", "2048", "--port", str(port)]
        command += ["--max-num-seqs", str(args.clients), "--host", "127.0.0.1"]
        with server(command, port, {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_LOGGING_LEVEL": "ERROR"}) as url:
            results[args.peer] = asyncio.run(load(url, "model", questions(args.text), *settings, args.peer))
        print(args.peer, json.dumps(results[args.peer]), flush=True)
    print(json.dumps({"benchmark": "traffic", "weights": args.weights, **results}))


if __name__ == "__main__":
    main()
