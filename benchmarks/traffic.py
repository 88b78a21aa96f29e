"""HTTP load with real prompts: many clients streaming chat completions from `jevons serve`, and from vLLM's server in its turn.

    python benchmarks/traffic.py --model DIR --text FILE.jsonl [--clients 64] [--seconds 300] [--weights bf16]
                                 [--peer vllm] [--offline] [--prefix]

Each client takes the next conversation's first user turn, streams a greedy reply of at most --max-tokens, and takes another.
A request counts as lost unless it ends in [DONE] with a finish reason; requests and tokens must be as many in the ledger. Where
either is not so, the exit status is 1. `tokens_per_second` is of the whole time until the last reply's end, `busy` of the time
after the first tenth in which all clients ask. `between_pieces` are seconds between pieces of text: mostly one token each.
`--offline` gives the same prompts to the engine in this process, as many at once: what HTTP, JSON, detokenising and metering
cost is the ratio. `--prefix` asks five times about a text of 1,000 tokens that the server has not seen, and five times about
one that it has: times to the first token. The last line is JSON. Peers as in benchmarks/serve.py; they are told to leave the
model's generation_config.json alone, as our server does: its repetition penalty would make another text, and more work.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console

from jevons.cost.usage import UsageStore
from jevons.data.chat import Message
from jevons.data.tokenizer import Tokenizer
from jevons.engine.sequence import SamplingParams
from jevons.stages.serve import Options, load_engine

CHARACTERS = 1000  # of a prompt
MAX_BATCH_TOKENS = 512  # the server's default
STARTING = 300  # seconds that a server gets


def questions(text: Path) -> Iterator[str]:
    """First user turns, again from the beginning when they are used up."""
    with text.open(encoding="utf-8") as lines:
        talks = [json.loads(line)["messages"] for line in itertools.islice(lines, 20000)]
    # some begin with a system's or even an assistant's turn
    firsts = (next((turn["content"] for turn in talk if turn["role"] == "user"), "") for talk in talks)
    turns = [first[:CHARACTERS] for first in firsts if first.strip()]
    if not turns:
        raise ValueError(f'--text {text}: no user turn in it; give lines of {{"messages": [{{"role": "user", "content": ...}}]}}')
    return itertools.cycle(turns)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def server(command: list[str], port: int, environment: dict[str, str]) -> Iterator[str]:
    """The address of a server that is up; it is stopped in the end."""
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile("w+") as output, httpx.Client(trust_env=False) as http:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | environment, start_new_session=True)
        try:
            until = time.monotonic() + STARTING
            while not _healthy(http, url):
                late = time.monotonic() > until
                if late or process.poll() is not None:
                    output.seek(0)
                    what = f"does not answer after {STARTING} s" if late else f"ended with {process.returncode}"
                    raise ValueError(f"{' '.join(command)} {what}:\n{output.read()[-2000:]}")
                time.sleep(0.5)
            yield url
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(40)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # also what it started: vLLM's engine is a process of its own
            process.wait()


def _healthy(http: httpx.Client, url: str) -> bool:
    try:
        return http.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


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

    async def client() -> None:
        while time.perf_counter() - begin < seconds:
            rows.append(await ask(http, url, model, next(asked), max_tokens))
            if "lost" in rows[-1]:
                await asyncio.sleep(1)  # a server that is gone refuses thousands a second

    async def watch() -> None:
        while True:
            await asyncio.sleep(10)
            print(f"{name}: {time.perf_counter() - begin:.0f} s, {len(rows)} requests", file=sys.stderr, flush=True)

    async with browser(clients) as http:
        warm_up = await ask(http, url, model, "Hello", 4)  # what is made at the first request is not measured
        if "lost" in warm_up:
            raise ValueError(f"{name}: the first request was lost: {warm_up['lost']}")
        begin = time.perf_counter()
        watcher = asyncio.create_task(watch())
        await asyncio.gather(*(client() for _ in range(clients)))
        watcher.cancel()
    lost = [row["lost"] for row in rows if "lost" in row]
    whole = [row for row in rows if "lost" not in row]
    firsts = sorted(row["first"] for row in whole if row["first"] is not None)
    gaps = sorted(b - a for row in whole for a, b in zip(row["arrivals"], row["arrivals"][1:]))
    if not whole:
        raise ValueError(f"{name}: all {len(rows)} requests were lost: {lost[0]}")
    elapsed = max(row["end"] for row in whole) - begin
    # a reply's tokens are spread over its pieces: one piece may be several tokens, and some tokens are no text
    shares = [(at, row["tokens"] / len(row["arrivals"])) for row in whole for at in row["arrivals"]]
    busy = sum(share for at, share in shares if begin + seconds * 0.1 <= at <= begin + seconds) / (0.9 * seconds)
    return {
        "requests": len(rows),
        "lost": len(lost),
        "reasons": sorted(set(lost))[:3],
        "tokens": sum(row["tokens"] for row in whole),
        "warm_up_tokens": warm_up["tokens"],
        "tokens_per_second": sum(row["tokens"] for row in whole) / elapsed,
        "busy": busy,
        "first_token": {"p50": _quantile(firsts, 0.5), "p95": _quantile(firsts, 0.95)},
        "between_pieces": {"p50": _quantile(gaps, 0.5), "p95": _quantile(gaps, 0.95)},
    }


def browser(clients: int) -> httpx.AsyncClient:
    """One for all clients: each of them with its own would read the machine's certificates, for seconds. Proxies are left out."""
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    return httpx.AsyncClient(timeout=600, limits=limits, trust_env=False)


def _quantile(values: list[float], share: float) -> float:
    return values[min(len(values) - 1, int(share * len(values)))] if values else float("nan")


def offline(folder: Path, weights: str, asked: Iterator[str], clients: int, seconds: float, max_tokens: int) -> dict[str, Any]:
    """The engine without a server, always with `clients` requests under way until the time is over."""
    tokenizer = Tokenizer.load(folder)
    options = Options(model=str(folder), weights=weights, max_sequences=clients, max_batch_tokens=MAX_BATCH_TOKENS)
    engine = load_engine(folder, tokenizer, options, Console(stderr=True, highlight=False))  # the server's very engine

    def submit() -> None:
        text = tokenizer.template.render([Message("user", next(asked))], add_generation_prompt=True)
        engine.submit(tokenizer.encode(text), SamplingParams(max_tokens=max_tokens, temperature=0))

    engine.generate([tokenizer.encode("Hello")], SamplingParams(max_tokens=4, temperature=0))
    begin, shown, tokens, busy, requests = time.perf_counter(), 0.0, 0, 0, 0
    for _ in range(clients):
        submit()
    while engine.has_work:
        events, now = engine.step(), time.perf_counter() - begin
        tokens += len(events)
        busy += len(events) if 0.1 * seconds <= now <= seconds else 0
        if now - shown >= 10:
            shown = now
            print(f"offline: {now:.0f} s, {requests} requests", file=sys.stderr, flush=True)
        for event in events:
            if event.sample is not None:
                requests += 1
                if now < seconds:
                    submit()
    elapsed = time.perf_counter() - begin
    return {"requests": requests, "tokens": tokens, "tokens_per_second": tokens / elapsed, "busy": busy / (0.9 * seconds)}


async def prefixes(url: str, model: str, text: Path, tokenizer: Tokenizer) -> dict[str, float]:
    """Seconds to the first token of a question about 1,000 tokens, new ones and those that were read before."""
    ids: list[int] = []
    for turn in itertools.islice(questions(text), 400, 3000):
        ids += tokenizer.encode(turn + "\n")
        if len(ids) >= 6000:
            break
    if len(ids) < 5000:
        raise ValueError(f"--text {text}: too short for five different texts of 1,000 tokens")
    texts = [tokenizer.decode(ids[1000 * i : 1000 * (i + 1)]) for i in range(5)]
    asked = ["Hello", *(f"{it}\nWhat is this about?" for it in texts), *(f"{texts[0]}\nSay {i} words on this." for i in range(5))]
    async with browser(1) as http:
        rows = [await ask(http, url, model, question, 4) for question in asked]
    if wrong := [row.get("lost", "no text in it") for row in rows if row.get("first") is None]:
        raise ValueError(f"--prefix: {len(wrong)} requests brought no first token: {wrong[0]}")
    cold_s, warm_s = (statistics.median(row["first"] for row in half) for half in (rows[1:6], rows[6:]))
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
    peers = Path(os.environ.get("JEVONS_PEERS", "~/.cache/jevons-dev/peers")).expanduser()
    if args.peer and not (python := peers / args.peer / "bin" / "python").exists():
        raise ValueError(f"{python}: missing. Make a virtual environment there that has {args.peer}, or point JEVONS_PEERS elsewhere")
    tokenizer, results = Tokenizer.load(args.model), {}
    settings = (args.clients, args.seconds, args.max_tokens)
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        command = [sys.executable, "-m", "jevons.cli", "serve", str(args.model), "--port", str(port), "--name", "model", "--runs", folder]
        command += ["--weights", args.weights, "--max-sequences", str(args.clients), "--max-batch-tokens", str(MAX_BATCH_TOKENS)]
        with server(command, port, {}) as url, closing(UsageStore(f"{folder}/ledger.db")) as store:
            if args.prefix:
                results["prefix"] = asyncio.run(prefixes(url, "model", args.text, tokenizer))
                print("prefix", json.dumps(results["prefix"]), flush=True)
            before = metered(store)
            ours = asyncio.run(load(url, "model", questions(args.text), *settings, "jevons"))
            ours["metered"] = {name: count - before[name] for name, count in metered(store).items()}
            results["jevons"] = ours
            print("jevons", json.dumps(ours), flush=True)
    if args.offline:
        results["offline"] = offline(args.model, args.weights, questions(args.text), *settings)
        results["of_offline"] = {name: ours[name] / results["offline"][name] for name in ("tokens_per_second", "busy")}
        print("offline", json.dumps(results["offline"]), f"HTTP reaches {results['of_offline']['tokens_per_second']:.1%} of it", flush=True)
    if args.peer:
        port = free_port()
        command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(args.model), "--served-model-name", "model"]
        command += ["--dtype", "bfloat16", "--max-model-len", "2048", "--max-num-seqs", str(args.clients)]
        command += ["--host", "127.0.0.1", "--port", str(port), "--generation-config", "vllm"]
        with server(command, port, {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_LOGGING_LEVEL": "ERROR"}) as url:
            peer = results[args.peer] = asyncio.run(load(url, "model", questions(args.text), *settings, args.peer))
        ratio = {name: ours[name] / peer[name] for name in ("tokens_per_second", "busy")}
        ratio |= {f"first_token_{name}": ours["first_token"][name] / peer["first_token"][name] for name in ("p50", "p95")}
        results["ratio"] = {args.peer: ratio}
        print(args.peer, json.dumps(peer), "ours / peer's", json.dumps(ratio), flush=True)
    print(json.dumps({"benchmark": "traffic", "weights": args.weights, **results}))
    # the request that warms up has a row, too
    if ours["lost"] or ours["metered"] != {"requests": ours["requests"] + 1, "tokens": ours["tokens"] + ours["warm_up_tokens"]}:
        raise SystemExit(f"jevons lost requests or rows: {json.dumps(ours)}")


def metered(store: UsageStore) -> dict[str, int]:
    sums = store.sums("model")
    return {"requests": sum(row.requests for row in sums), "tokens": sum(row.completion for row in sums)}


if __name__ == "__main__":
    main()
