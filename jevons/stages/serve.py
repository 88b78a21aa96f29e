"""`jevons serve`: a model behind an API, until it is told to stop.

Loads the model, packs its weights where the native kernels are there, starts the engine's thread and one uvicorn process.
SIGINT and SIGTERM stop taking requests, let those under way finish for a while, write their rows, and leave with 0; a
second one leaves at once. How long it was up is a row of the ledger (server/uptime.py). On other addresses than this machine's own
it refuses to start without keys.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import signal
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import uvicorn
from rich.console import Console
from starlette.middleware.trustedhost import TrustedHostMiddleware
from uvicorn.protocols.http.h11_impl import H11Protocol

from jevons.cost.ledger import Ledger
from jevons.cost.price import Prices
from jevons.cost.receipt import Receipt, format_count
from jevons.cost.usage import UsageStore
from jevons.data.tokenizer import Tokenizer
from jevons.engine.engine import Engine
from jevons.engine.packed import pack_model
from jevons.kernels import native
from jevons.model.config import ModelConfig
from jevons.model.folder import load_config, load_model, resolve
from jevons.progress import Meter as ProgressMeter
from jevons.run import newest_model
from jevons.server.app import build
from jevons.server.key import Keys
from jevons.server.limit import Limits
from jevons.server.loop import EngineLoop
from jevons.server.meter import Meter
from jevons.server.service import Service
from jevons.server.uptime import Uptime
from jevons.train import device

Weights = Literal["auto", "plain", "bf16", "int8", "int4"]
WEIGHTS = ("auto", "plain", "bf16", "int8", "int4")
DTYPES = ("auto", "bfloat16", "float32")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line decides."""

    model: str
    name: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    weights: str = "auto"
    dtype: str = "auto"
    cache_gb: float = 1.0
    max_sequences: int = 64
    max_batch_tokens: int = 512
    draft: str = "auto"
    draft_tokens: int = 3
    draft_rows: int = 8
    ledger: str = "runs/ledger.db"
    prices: Path | None = None
    price_per_hour: float | None = None
    insecure: bool = False
    page: bool = True
    cors: tuple[str, ...] = ()
    drain: float = 30.0
    header_timeout: float = 10.0
    log_requests: bool = False
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if self.weights not in WEIGHTS:
            raise ValueError(f"--weights: must be one of {', '.join(WEIGHTS)}, is {self.weights!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"--dtype: must be auto, bfloat16 or float32, is {self.dtype!r}")
        if self.draft not in ("auto", "none", "mtp", "ngram"):
            raise ValueError(f"--draft: must be auto, none, mtp or ngram, is {self.draft!r}")
        if not 0 <= self.port < 65536:
            raise ValueError(f"--port: must be between 0 and 65535, is {self.port}")
        if self.cache_gb <= 0:
            raise ValueError(f"--cache-gb: must be above 0, is {self.cache_gb}")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address; a name other than localhost may mean anything."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def serve(options: Options) -> None:
    """Serve until SIGINT or SIGTERM. Raises ValueError for what cannot be served, before the model is loaded where possible."""
    console = Console(stderr=True, highlight=False)
    store = UsageStore(options.ledger)
    local = is_loopback(options.host)
    keys = Keys(store, allow_open=local or options.insecure)
    if not (local or options.insecure or keys.any()):
        raise ValueError(
            f"--host {options.host}: whoever reaches this address could use the model, and there is no key yet. "
            "Make one with `jevons keys create --name NAME`, or say --insecure if that is what you want"
        )
    prices = Prices.load(options.prices, price_per_hour=options.price_per_hour)
    folder = newest_model(Path(options.model).expanduser())
    folder = folder if folder.is_dir() else resolve(options.model)
    tokenizer = Tokenizer.load(folder)
    began = time.time(), time.perf_counter()  # the device is taken from here on
    engine, where = load_engine(folder, tokenizer, options, console), device.choose("auto")
    name = options.name or folder.resolve().name
    if options.name is None and (folder.parent.parent / "recipe.toml").exists():
        name = folder.parent.parent.name  # runs/quickstart/pretrain/model is called quickstart
    receipt = Receipt(run_id=uuid.uuid4().hex, run=name, stage="serve", device=device.describe(where))
    receipt.price_per_hour = prices.price_per_hour
    receipt.started, receipt.seconds = began[0], time.perf_counter() - began[1]
    uptime = Uptime(Ledger(options.ledger), receipt, memory=lambda: device.peak_memory(where))
    meter = Meter(store, prices, keys, session=receipt.run_id)
    service = Service(EngineLoop(engine), tokenizer, meter, model_id=name, limits=options.limits)
    app = build(service, keys, page=options.page, cors=options.cors, drain=options.drain)
    if local and not keys.any():  # or any page on the web could have its own name resolve to this server, and ask it
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[options.host, "localhost", "127.0.0.1", "[::1]", "["])

    class Protocol(TimedProtocol):
        header_timeout = options.header_timeout

    config = uvicorn.Config(
        app,
        host=options.host,
        port=options.port,
        http=Protocol,
        log_level="info" if options.log_requests else "warning",
        access_log=options.log_requests,
        server_header=False,
        timeout_graceful_shutdown=round(options.drain) + 10,  # Server.shutdown ends them before
        h11_max_incomplete_event_size=65536,
    )
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    server = Server(config, service, options.drain)
    server.announce = lambda url: console.print(
        f"[bold]{name}[/] at [bold]{url}[/]  (page {url}/, API {url}/v1, metrics {url}/metrics); "
        f"{'keys needed' if keys.any() else 'no key needed'}; Ctrl-C stops"
    )
    sys.setswitchinterval(0.001)  # a reply's text must not wait 5 ms for the engine's Python, nor the engine for a reply's
    try:
        asyncio.run(server.serve())
    finally:
        uptime.close()


def load_engine(folder: Path, tokenizer: Tokenizer, options: Options, console: Console) -> Engine:
    """The model with its weights as `options` want them, in an engine."""
    config = load_config(folder)
    if tokenizer.size > config.vocab_size:
        raise ValueError(f"{folder}: the tokenizer has {tokenizer.size} tokens, the model's embedding only {config.vocab_size}")
    where = device.choose("auto")
    start = time.perf_counter()
    choose = device.best_dtype if options.weights == "plain" else device.sampling_dtype
    dtype = choose(where) if options.dtype == "auto" else options.dtype
    model = load_model(folder, dtype=getattr(torch, dtype), device=where, mtp=options.draft in ("auto", "mtp"))
    if options.draft == "mtp" and not model.config.num_nextn_predict_layers:
        raise ValueError(f"--draft mtp: {folder} has no multi-token-prediction module; use ngram or none")
    weights, note = _weights(options.weights, dtype, where)
    parameters = sum(p.numel() for p in model.parameters())
    size = sum(p.nbytes for p in model.parameters())
    if weights != "plain":
        with ProgressMeter(f"pack weights as {weights}", len(model.model.layers) + 1) as progress:
            size = pack_model(model, weights, lambda done, total: progress.update(done, ""))
    engine = Engine(
        model,
        cache_bytes=round(options.cache_gb * 2**30),
        max_batch_tokens=max(options.max_batch_tokens, options.max_sequences),
        max_sequences=options.max_sequences,
        stop_ids=tokenizer.ends(model.config.eos_token_ids),
        draft=_draft(options.draft, model.config),
        draft_tokens=1 if _draft(options.draft, model.config) == "mtp" else options.draft_tokens,
        draft_rows=options.draft_rows,
    )
    pool = engine.pool
    console.print(
        f"{folder}: {format_count(parameters)} parameters, {size / 2**20:,.0f} MiB as {weights}{note}, "
        f"loaded in {time.perf_counter() - start:.1f} s; cache of {pool.num_blocks * pool.block_size:,} tokens; "
        f"drafts: {engine.draft or 'none'}"
    )
    return engine


def _weights(weights: str, dtype: str, where: torch.device) -> tuple[str, str]:
    """The format that is used, and why it is not a packed one."""
    if weights == "plain" or (weights == "auto" and (where.type != "cpu" or dtype != "bfloat16")):
        return "plain", ""
    if weights == "auto":
        return ("bf16", "") if native.available() else ("plain", f" ({native.reason()})")
    if dtype != "bfloat16":
        raise ValueError(f"--weights {weights}: needs --dtype bfloat16")
    return weights, ""


def _draft(wanted: str, config: ModelConfig) -> Literal["mtp", "ngram"] | None:
    if wanted == "auto":
        return "mtp" if config.num_nextn_predict_layers else "ngram"
    return {"mtp": "mtp", "ngram": "ngram"}.get(wanted)  # type: ignore[return-value]


class Server(uvicorn.Server):
    """uvicorn's, that ends replies properly when told to stop, and leaves with 0: its own cuts them off, and raises the signal again."""

    def __init__(self, config: uvicorn.Config, service: Service, drain: float) -> None:
        super().__init__(config)
        self.service, self.drain = service, drain
        self.announce = lambda url: None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()

        def stop() -> None:
            self.force_exit = self.should_exit  # the second time
            self.should_exit = self.service.draining = True

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop)
        yield

    async def shutdown(self, sockets: list | None = None) -> None:
        ending = asyncio.ensure_future(self.service.finish(self.drain))
        await super().shutdown(sockets)
        if self.force_exit:
            ending.cancel()
        else:
            await ending

    async def startup(self, sockets: list | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            self.announce(f"http://{f'[{host}]' if ':' in host else host}:{port}")


class TimedProtocol(H11Protocol):
    """uvicorn's HTTP, that closes a connection whose request line and headers do not arrive in time."""

    header_timeout = 10.0
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._late:
            self._late.cancel()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """Between requests the time runs from the first byte on; while one is answered it does not."""
        if self._answering():
            if self._late:
                self._late.cancel()
                self._late = None
        elif self._late is None:
            self._late = self.loop.call_later(self.header_timeout, self._close)

    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _close(self) -> None:
        self._late = None
        if not self._answering() and not self.transport.is_closing():
            self.transport.close()
