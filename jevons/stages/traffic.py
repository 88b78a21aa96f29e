"""A fixed traffic through `jevons serve`: so many clients, each with one streamed request at a time, all prompts and answers of one length.

Prompts are random token ids, no two alike, and answers do not stop before their length (`min_tokens`), so that the work is known and
can be planned. The server is a process of its own, as users start it, and its memory is what its receipt says. Not done: arrivals at random
times, shared prefixes, lengths that vary: what those cost is the server's benchmark's affair.
"""

from __future__ import annotations

import http.client
import json
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from jevons.cost.ledger import Ledger
from jevons.cost.profile import Shape
from jevons.cost.receipt import Receipt

MAX_SEQUENCES = 64  # answers under way at once: the server's default
PATIENCE = 600.0  # seconds for a server to be up, or for an answer's next token


@dataclass(frozen=True)
class Traffic:
    """`prompt` and `output` are tokens of each request."""

    clients: int
    prompt: int
    output: int

    def __post_init__(self) -> None:
        for name in ("clients", "prompt", "output"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1, is {getattr(self, name)}")


def serve_shape(traffic: Traffic, weights: str, dtype: str, cache_gb: float) -> Shape:
    """What a measurement of a traffic holds for."""
    return {"weights": weights, "dtype": dtype, "cache_gb": cache_gb, **asdict(traffic)}


def serve_arguments(traffic: Traffic, weights: str, dtype: str, cache_gb: float) -> list[str]:
    """For `jevons serve`: no drafts, whose use depends on what is said."""
    if traffic.clients > MAX_SEQUENCES:
        raise ValueError(f"clients: {traffic.clients} are more than the server answers at once, {MAX_SEQUENCES}")
    return ["--weights", weights, "--dtype", dtype, "--cache-gb", str(cache_gb), "--draft", "none"]


@contextmanager
def server(arguments: list[str], root: Path) -> Iterator[tuple[str, int]]:
    """Host and port of `jevons serve` with these arguments, its ledger in `root`. ValueError with what it said where it does not start."""
    command = [sys.executable, "-m", "jevons.cli", "serve", *arguments, "--name", "model", "--port", "0", "--runs", str(root), "--no-page"]
    log = root / "serve.log"
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        until = time.monotonic() + PATIENCE
        while not (found := re.search(r"at http://([\d.]+):(\d+)", text := log.read_text(encoding="utf-8"))):
            if process.poll() is not None or time.monotonic() > until:
                raise ValueError(f"{' '.join(command)}: the server did not start:\n{text[-2000:]}")
            time.sleep(0.1)
        yield found[1], int(found[2])
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def send(host: str, port: int, traffic: Traffic, requests: int, words: int, seed: int = 0) -> float:
    """Seconds until `requests` are answered whole. `words`: the vocabulary's size. ValueError where an answer is not what was asked for."""

    def client(mine: range) -> None:
        for i in mine:
            ids = random.Random(f"{seed} {i}").choices(range(words), k=traffic.prompt)
            ask(host, port, {"model": "model", "prompt": ids, "max_tokens": traffic.output, "min_tokens": traffic.output, "temperature": 0})

    start = time.perf_counter()
    with ThreadPoolExecutor(traffic.clients) as pool:
        list(pool.map(client, (range(c, requests, traffic.clients) for c in range(traffic.clients))))
    return time.perf_counter() - start


def ask(host: str, port: int, body: dict[str, object]) -> None:
    """One streamed completion, read to its end."""
    connection = http.client.HTTPConnection(host, port, timeout=PATIENCE)
    text = json.dumps(body | {"stream": True, "stream_options": {"include_usage": True}})
    connection.request("POST", "/v1/completions", text, {"content-type": "application/json"})
    answer = connection.getresponse().read().decode()
    connection.close()
    usage = re.search(r'"completion_tokens":\s*(\d+)', answer)
    if "data: [DONE]" not in answer or not usage or int(usage[1]) != body["max_tokens"]:
        raise ValueError(f"the server answered {answer[-300:]!r}")


def receipt(root: Path) -> Receipt:
    """What the server of `root` took, once it has ended: its newest session."""
    ledger = Ledger(root / "ledger.db")
    found = [row for row in ledger.rows() if row.stage == "serve"]
    ledger.close()
    return found[-1]
