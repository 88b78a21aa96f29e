"""A server whose model says what a test wrote: everything from HTTP down to the engine's thread is real, the engine itself is a list.

Random tiny models never think or call a tool, so clients' tests need a model that does as it is told.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace
from urllib.parse import urlsplit

import uvicorn

from jevons.cost.price import Prices
from jevons.cost.usage import UsageStore
from jevons.data.tokenizer import train_bpe
from jevons.engine.engine import Event
from jevons.engine.sequence import Sample
from jevons.server.app import build
from jevons.server.key import Keys
from jevons.server.limit import Limits
from jevons.server.loop import EngineLoop
from jevons.server.meter import Meter
from jevons.server.service import Service

TEXTS = ["Speak, friend, and enter. The quick brown fox jumps over the lazy dog. 0123456789 {}[]\"':,", "system user assistant tool"] * 8


def make_tokenizer(**options):
    return train_bpe(TEXTS, 400, **options)


class ScriptedEngine:
    """Answers requests with `replies` in turn, each token by token; `step_time` seconds a step."""

    def __init__(self, tokenizer, *replies, step_time=0.0, max_length=4096):
        self.tokenizer, self.replies, self.step_time, self.max_length = tokenizer, replies, step_time, max_length
        self.stop_ids = frozenset({tokenizer.eos_id})
        self.model = SimpleNamespace(config=SimpleNamespace(vocab_size=tokenizer.size, hidden_size=4))
        self.requests, self.aborted, self.running = [], 0, {}
        self.drawn = 0

    @property
    def has_work(self):
        return bool(self.running)

    def snapshot(self):
        names = ("waiting", "used_blocks", "cached_blocks", "prefix_queries", "prefix_hits", "preemptions", "prompt_tokens")
        numbers = {"running": len(self.running), "max_sequences": 8, "total_blocks": 10, "drawn_tokens": self.drawn}
        return dict.fromkeys(names, 0) | numbers

    def submit(self, prompt, params, *, tenant="", grammar=None):
        reply = self.replies[len(self.requests) % len(self.replies)]
        if isinstance(reply, Exception):
            raise reply
        tokens = [*self.tokenizer.encode(reply), self.tokenizer.eos_id]
        text = self.tokenizer.decode(prompt)
        self.requests.append(SimpleNamespace(prompt=prompt, text=text, params=params, tenant=tenant, grammar=grammar))
        id = len(self.requests)
        self.running[id] = (tokens, [], params, list(prompt))
        return id

    def step(self):
        time.sleep(self.step_time)
        events = []
        for id, (tokens, said, params, prompt) in list(self.running.items()):
            token = tokens[len(said)]
            said.append(token)
            reason = "stop" if token in self.stop_ids else "length" if len(said) >= params.max_tokens else None
            others = [(token, -0.25), (token - 1, -2.0), (token - 2, -3.0)][: params.logprobs]
            sample = None
            if reason:
                del self.running[id]
                scores = None
                if params.prompt_logprobs is not None:
                    scores = [(-1.5, [(0, -0.5), (1, -1.0)][: params.prompt_logprobs])] * (len(prompt) - 1)
                sample = Sample(said, [0.0] * len(said), [-0.25] * len(said), reason, 0, prompt_logprobs=scores)
            events.append(Event(id, token, -0.125, -0.25, others, 0, self.step_time, sample))
        self.drawn += len(events)
        return events

    def abort(self, id):
        if self.running.pop(id, None):
            self.aborted += 1

    def abort_all(self):
        self.running.clear()


def make_service(engine, tokenizer, url, *, limits=None, keyed=False):
    """(Service, Keys or None) over an engine."""
    store = UsageStore(url)
    keys = Keys(store, refresh=0.01) if keyed else None
    loop = EngineLoop(engine)
    return Service(loop, tokenizer, Meter(store, Prices.load(), keys), model_id="tiny", limits=limits or Limits()), keys


def hang_up(url, body, begun, *, streamed):
    """Ask, and go away once `begun` says that the answer is being made; of a stream, once some of it has come."""
    address, content = urlsplit(url), json.dumps(body).encode()
    head = f"POST {address.path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    with socket.create_connection((address.hostname, address.port), timeout=60) as client:
        client.sendall(head.encode() + content)
        until(begun)
        assert not streamed or client.recv(1)


def until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@contextmanager
def served(service, keys=None, **options):
    """The address of a real uvicorn server in a thread."""
    config = uvicorn.Config(build(service, keys, drain=1.0, **options), port=0, log_level="error", timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()
