"""`jevons serve` as a process: signals, sudden death, doors, secrets; and its service over a real engine: failing steps, short memory.

A subprocess serves a tiny random model. Answers are as long as a test asks for (min_tokens), so that load lasts until a signal comes.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import fields
from urllib.parse import urlsplit

import httpx
import pytest
import torch
from scripted import make_service, make_tokenizer, served
from sqlalchemy import text as sql
from typer.testing import CliRunner

from jevons.cli import app
from jevons.cost.ledger import Ledger
from jevons.cost.usage import UsageStore
from jevons.engine.engine import Engine
from jevons.engine.sequence import SamplingParams
from jevons.model.config import ModelConfig
from jevons.model.folder import save_model
from jevons.model.transformer import Transformer
from jevons.server.job import Job, Reply
from jevons.server.key import Account, Keys
from jevons.server.ticket import Ticket
from jevons.stages.serve import Options

COMPLETIONS = "/v1/completions"
LONG = "The quick brown fox jumps over the lazy dog. " * 8  # several blocks of the cache


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Products of this size gain nothing from a second thread, and lose much where another process wants its core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    fields = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "initializer_range": 0.2}
    fields |= {"max_position_embeddings": 16384}
    fields |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": tokenizer.size, "eos_token_id": tokenizer.eos_id}
    model = Transformer(ModelConfig(**fields, model_type="qwen2", tie_word_embeddings=True))
    model.init_weights(torch.Generator().manual_seed(0))
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def folder(tokenizer, model, tmp_path_factory):
    root = tmp_path_factory.mktemp("model")
    tokenizer.save(root / "tokenizer")
    save_model(model, root / "tiny", companions=sorted((root / "tokenizer").iterdir()))
    return root / "tiny"


class Process:
    """A server in a process of its own, and what it says (both streams, in a file)."""

    def __init__(self, folder, ledger, *options):
        self.ledger, self.out = ledger, ledger.with_suffix(".out")
        command = [sys.executable, "-m", "jevons.cli", "serve", str(folder), "--port", "0", "--dtype", "float32", "--draft", "none"]
        command += ["--cache-gb", "0.05", "--ledger", str(ledger), *options]
        with self.out.open("wb") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=out, env=os.environ | {"COLUMNS": "200", "OMP_NUM_THREADS": "1"})

    @property
    def said(self):
        return self.out.read_text()

    def url(self):
        """Its address, once it has one."""
        end = time.monotonic() + 120
        while not (found := re.search(r"http://\S+:\d+(?=\s)", self.said)):
            assert self.process.poll() is None and time.monotonic() < end, self.said
            time.sleep(0.05)
        return found[0].replace("0.0.0.0", "127.0.0.1")

    def rows(self):
        """request_id: (status, completion) of all rows; there is one of each. All belong to the one session that the ledger has."""
        store = UsageStore(self.ledger)
        with store.engine.connect() as connection:
            rows = [tuple(row) for row in connection.execute(sql("SELECT request_id, status, completion FROM usage"))]
        sessions = {sums.group: sums.requests for sums in store.sums("session")}
        store.close()
        assert sessions == {self.receipt().run_id: len(rows)}
        assert len({row[0] for row in rows}) == len(rows)
        return {row[0]: row[1:] for row in rows}

    def receipt(self):
        ledger = Ledger(self.ledger)
        (receipt,) = ledger.rows()
        ledger.close()
        assert (receipt.stage, receipt.run, receipt.price_per_hour) == ("serve", "tiny", 0.1)
        return receipt


@contextmanager
def serving(*arguments):
    server = Process(*arguments)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait()


class Load:
    """Streams at once, one a length; `ended` has the ids of those whose end a client saw."""

    def __init__(self, url, lengths):
        self.url, self.begun, self.ended, self.lock = url, set(), set(), threading.Lock()
        self.threads = [threading.Thread(target=self._stream, args=(length,), daemon=True) for length in lengths]
        for thread in self.threads:
            thread.start()
        self.wait(lambda: len(self.begun) == len(lengths))

    def _stream(self, length):
        body = {"model": "tiny", "prompt": "Speak, friend", "max_tokens": length, "min_tokens": length, "temperature": 0, "stream": True}
        try:
            with httpx.stream("POST", self.url + COMPLETIONS, json=body, timeout=60) as response:
                assert response.status_code == 200, response.read()
                for line in response.iter_lines():
                    with self.lock:
                        if line.startswith("data: {"):
                            self.begun.add(response.headers["x-request-id"])
                        elif line == "data: [DONE]":
                            self.ended.add(response.headers["x-request-id"])
        except httpx.TransportError:
            pass  # a server that dies cuts its streams; what was seen before counts

    def wait(self, condition):
        end = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.01)

    def join(self):
        for thread in self.threads:
            thread.join(60)
            assert not thread.is_alive()


def refuses(url, method="POST", path=COMPLETIONS):
    """Whether a new client gets no answer, or is told to come back."""
    body = {"model": "tiny", "prompt": "Hi", "max_tokens": 1} if method == "POST" else None
    try:
        return httpx.request(method, url + path, json=body, timeout=60).status_code == 503
    except httpx.TransportError:
        return True


# --- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_lets_answers_end_and_leaves_with_0(folder, tmp_path, number):
    with serving(folder, tmp_path / "ledger.db") as server:
        url = server.url()
        load = Load(url, [150, 200, 250, 800] * 2)
        server.process.send_signal(number)
        load.wait(lambda: refuses(url, "GET", "/health"))  # the signal has come to its handler
        assert len(load.ended) < 8 and refuses(url), "the load was over too early, or a new request was taken"
        assert server.process.wait(60) == 0, server.said
        load.join()
        assert load.ended == load.begun and "Traceback" not in server.said, server.said
        receipt = server.receipt()
        assert 0 < receipt.seconds <= receipt.finished - receipt.started + 0.01
        assert {id: row[0] for id, row in server.rows().items()} == dict.fromkeys(load.begun, "length")


@pytest.mark.slow
def test_answers_that_outlast_the_drain_are_cut_and_metered(folder, tmp_path):
    open_door = ("--host", "0.0.0.0", "--insecure")  # which takes requests without a key where it was said aloud
    with serving(folder, tmp_path / "ledger.db", "--drain", "1", *open_door) as server:
        load = Load(server.url(), [12000] * 4)
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(60) == 0, server.said
        load.join()
        rows = server.rows()
        assert rows.keys() == load.begun and not load.ended
        assert all(status in ("abort", "error") and 0 < completion < 12000 for status, completion in rows.values()), rows


@pytest.mark.slow
def test_a_second_signal_leaves_at_once(folder, tmp_path):
    with serving(folder, tmp_path / "ledger.db", "--drain", "600") as server:
        load = Load(server.url(), [12000] * 2)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert server.process.poll() is None  # the first one waits
        server.process.send_signal(signal.SIGINT)
        server.process.wait(60)  # a tenth of what the first would wait
        load.join()
        assert not load.ended


def test_what_a_client_saw_end_is_in_the_ledger_after_sudden_death(folder, tmp_path):
    with serving(folder, tmp_path / "ledger.db") as server:
        load = Load(server.url(), [40 * i for i in range(1, 9)] + [12000] * 8)
        load.wait(lambda: len(load.ended) >= 6)
        server.process.kill()
        server.process.wait()
        load.join()
        assert 6 <= len(load.ended) < 16, "death came after the load"
        rows = server.rows()
        assert load.ended <= rows.keys() <= load.begun
        assert {rows[id][0] for id in load.ended} == {"length"}
        assert server.receipt().finished is None


# --- doors


def test_open_doors_are_refused_before_the_model_is_loaded(tmp_path):
    with serving(tmp_path / "no such model", tmp_path / "ledger.db", "--host", "0.0.0.0") as server:
        assert server.process.wait(60) == 1
        assert "jevons keys create" in server.said and "--insecure" in server.said and "no such model" not in server.said


@pytest.fixture(scope="module")
def keyed(folder, tmp_path_factory):
    """A server on every address with two tenants' keys: (process, address, secrets)."""
    ledger = tmp_path_factory.mktemp("keyed") / "ledger.db"
    store = UsageStore(ledger)
    secrets = [Keys(store).create(name)[1] for name in ("alice", "bob")]
    store.close()
    with serving(folder, ledger, "--host", "0.0.0.0", "--log-requests", "--header-timeout", "0.5") as server:
        yield server, server.url(), secrets


def ask(url, secret, prompt, **body):
    headers = {"authorization": f"Bearer {secret}"} if secret else {}
    return httpx.post(url + COMPLETIONS, headers=headers, json={"model": "tiny", "prompt": prompt, "max_tokens": 4, **body}, timeout=60)


def test_keys_open_every_address(keyed):
    _, url, (alice, _) = keyed
    assert ask(url, alice, "Hi").status_code == 200
    for wrong in (None, alice[:-1], alice + "x", "sk-jevons-" + "a" * 43):
        assert ask(url, wrong, "Hi").status_code == 401


def test_slow_headers_are_cut_and_kept_connections_are_not(keyed):
    _, url, (alice, _) = keyed
    address = (urlsplit(url).hostname, urlsplit(url).port)
    with socket.create_connection(address, timeout=60) as slow:
        start = time.monotonic()
        slow.sendall(b"POST /v1/comp")
        assert slow.recv(100) == b"" and time.monotonic() - start > 0.3
    with socket.create_connection(address, timeout=60) as trickle, pytest.raises(OSError):  # a byte now and then gains no time
        for _ in range(600):
            trickle.sendall(b"x")
            time.sleep(0.1)
    request = f"GET /v1/models HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {alice}\r\n\r\n".encode()
    with socket.create_connection(address, timeout=60) as kept:
        for _ in range(2):
            kept.sendall(request)
            answer = b""
            while not (b"\r\n\r\n" in answer and answer.endswith(b"}")):
                part = kept.recv(65536)
                assert part, answer
                answer += part
            assert answer.startswith(b"HTTP/1.1 200")
            time.sleep(0.2)


def test_an_answer_may_take_longer_than_headers(keyed):
    _, url, (alice, _) = keyed
    start, tokens = time.monotonic(), 500
    while time.monotonic() - start < 0.5:  # as many as this machine takes longer for
        start, tokens = time.monotonic(), 2 * tokens
        assert ask(url, alice, "Hi", max_tokens=tokens, min_tokens=tokens).json()["usage"]["completion_tokens"] == tokens


def test_tenants_do_not_share_what_is_cached(keyed):
    _, url, (alice, bob) = keyed

    def hits(secret):
        return ask(url, secret, LONG).json()["usage"]["prompt_cache_hit_tokens"]

    assert hits(alice) == 0
    assert hits(bob) == 0 and hits(alice) > 0 and hits(bob) > 0


def test_secrets_and_prompts_are_written_nowhere(keyed):
    server, url, secrets = keyed
    marker = "xyzzy-plugh-4711"
    for secret in secrets:
        assert ask(url, secret, f"Remember {marker}").status_code == 200
        assert ask(url, secret, marker, no_such_field=marker).status_code == 400
    stolen = secrets[0][:-6] + "Stolen"
    assert ask(url, stolen, marker).status_code == 401
    broken = f'{{"model": "tiny", "prompt": {marker}'
    assert httpx.post(url + COMPLETIONS, content=broken, headers={"x-api-key": secrets[0]}, timeout=60).status_code == 400
    assert f"POST {COMPLETIONS}" in server.said  # requests are logged, so their secrets could have been
    written = [path.read_bytes() for path in server.ledger.parent.iterdir()]
    assert b"alice" in b"".join(written)
    for hidden in (marker, stolen, *secrets):
        assert not any(hidden.encode() in content for content in written)


# --- the service over a real engine


def rows(service):
    with service.meter.store.engine.connect() as connection:
        return [tuple(row) for row in connection.execute(sql("SELECT request_id, status FROM usage"))]


def test_a_failed_step_ends_what_is_under_way_and_nothing_else(tokenizer, model, tmp_path):
    engine = Engine(model, num_blocks=1024, max_sequences=8)
    service, _ = make_service(engine, tokenizer, tmp_path / "ledger.db")
    step, failing = engine.step, threading.Event()

    def breaking():
        if failing.is_set():
            failing.clear()
            raise ValueError("secret of the engine")  # as for logits that are not finite: no fault of the request's
        return step()

    engine.step = breaking
    body = {"model": "tiny", "prompt": LONG, "max_tokens": 3000, "min_tokens": 3000}
    answers = {}

    def send(number):
        answers[number] = httpx.post(url + COMPLETIONS, json={**body, "stream": number % 2 == 0}, timeout=60)

    with served(service) as url:
        threads = [threading.Thread(target=send, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        while service.engine_loop.snapshot["running"] < 4:
            time.sleep(0.01)
        failing.set()
        for thread in threads:
            thread.join(60)
        for number, answer in answers.items():
            assert "secret" not in answer.text and "engine_error" in answer.text
            assert answer.status_code == 500 if number % 2 else answer.text.count("[DONE]") == 0
        assert len(answers) == 4 and engine.pool.used == 0
        again = httpx.post(url + COMPLETIONS, json={"model": "tiny", "prompt": LONG, "max_tokens": 4, "min_tokens": 4}, timeout=60).json()
        assert again["usage"]["completion_tokens"] == 4
    assert engine.pool.used == 0
    assert [status for _, status in rows(service)] == ["error"] * 4 + ["length"]


async def collect(service, job, name, leave_after=None):
    """The text of an answer, or None where its consumer left after so many updates."""
    text, updates = "", service.answer([job], Ticket(Account.open(), "/test", name))
    number = 0
    async for number, update in aenumerate(updates):
        text += "".join(piece.text for piece in update.pieces)
        if number == leave_after and update.finish is None:
            await updates.aclose()
            return None
    return text


async def aenumerate(items):
    number = 0
    async for item in items:
        yield number, item
        number += 1


@pytest.mark.parametrize("seed", range(2))
def test_any_schedule_gives_each_its_own_text_and_row(tokenizer, model, tmp_path, seed):
    draw = random.Random(seed)
    jobs, leave = [], []
    for i in range(16):
        leave.append(draw.randint(0, 10) if draw.random() < 0.3 else None)
        length = draw.randint(20, 50) if leave[i] is None else 120  # engine's work that must not be done
        params = SamplingParams(max_tokens=length, min_tokens=length, temperature=draw.choice([0.0, 1.0]), seed=i)
        prompt = tokenizer.encode(LONG[: draw.randint(20, 120)])
        jobs.append(Job(prompt=tuple(prompt), params=params, reply=Reply(plain=True), tenant=draw.choice("ab")))
    pauses = [draw.random() * 0.1 for _ in jobs]

    async def alone():
        engine = Engine(model, num_blocks=64, max_sequences=1, share_prefixes=False)
        service, _ = make_service(engine, tokenizer, tmp_path / "alone.db")
        service.engine_loop.start()
        texts = [await collect(service, job, f"alone-{i}") for i, job in enumerate(jobs) if leave[i] is None]
        await service.drain(5)
        return texts

    async def together():
        async def one(i):
            await asyncio.sleep(pauses[i])
            return await collect(service, jobs[i], str(i), leave[i])

        service.engine_loop.start()
        texts = await asyncio.gather(*map(one, range(len(jobs))))
        assert await service.engine_loop.call(lambda engine: engine.pool.used) == 0  # before a drain would free it
        await service.drain(5)
        return texts

    expected = asyncio.run(alone())
    engine = Engine(model, num_blocks=12, max_sequences=6)
    service, _ = make_service(engine, tokenizer, tmp_path / "ledger.db")
    texts = asyncio.run(together())
    assert engine.snapshot()["preemptions"] > 0, "memory was not short"
    assert [text is None for text in texts] == [at is not None for at in leave] and None in texts
    assert [text for text in texts if text is not None] == expected
    assert engine.drawn_tokens < sum(job.params.max_tokens for job in jobs) - 30 * texts.count(None)
    assert engine.pool.used == 0 and engine.pool.free == engine.pool.num_blocks and not engine.has_work and service.under_way == 0
    assert dict(rows(service)) == {str(i): "abort" if t is None else "length" for i, t in enumerate(texts)}
    assert len(rows(service)) == len(jobs)


# --- the command line


def test_help_names_every_option():
    result = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    options = {field.name for field in fields(Options)} - {"model", "limits"} | {"max_queue", "max_prompt_tokens", "max_body_mb"}
    not_there = {"draft_rows"}  # the engine's own tuning, left out on purpose
    shown = set(re.findall(r"--([a-z][a-z-]*)", result.output))
    assert {name.replace("_", "-") for name in options - not_there} <= shown
