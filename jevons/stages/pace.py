"""What `jevons plan --calibrate` measures of serving: the engine of `jevons serve`, reading a prompt and decoding at several batches.

    entries = measure_engine(text, source, prepared, "int8", 1024, root)

Random prompts, none alike, so that nothing is found in the cache; a step counts when it gives every sequence a token. cost/deployment.py
makes a served plan of it: what was measured is set against its roofline, so that other batches and longer contexts follow. Not done: HTTP,
queueing, drafts; stages/traffic.py measures a whole server.
"""

from __future__ import annotations

import time
import tomllib
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console

from jevons.cost.profile import Entry, signature
from jevons.data.tokenizer import Tokenizer
from jevons.engine.engine import Engine
from jevons.engine.sequence import SamplingParams
from jevons.kernels import native
from jevons.model.config import ModelConfig
from jevons.model.folder import load_config, save_model
from jevons.recipe import parse
from jevons.stages.probe import Clock, home_of, open_model
from jevons.stages.serve import Options, load_engine
from jevons.train import device

BATCHES = (1, 4, 16, 64)  # sequences at once in decoding
READ = 1024  # tokens of all their prompts
DECODED, DECODING = 8.0, 30.0  # seconds of decoding at one batch, and after which no other begins


def measure_engine(text: str | None, source: Path | None, prepared: Path | None, weights: str, prompt: int, root: Path) -> list[Entry]:
    """The engine of `jevons serve --weights ...` on this process's device: reading `prompt` tokens, and a step at several batches.

    `text`: a recipe's, as TOML, whose shape with new weights is served where there is no `source`. ValueError for what cannot be served.
    """
    root.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".calibration-", dir=root) as aside:
        home = home_of(source, prepared)
        if source is None:
            assert text is not None
            recipe = parse(tomllib.loads(text), "the recipe")
            source = Path(aside) / "model"
            save_model(open_model(recipe, None, prepared, torch.device("cpu")), source)
        # plain weights where none are packed: bf16 is bf16
        plain = weights == "bf16" and (device.choose("auto").type != "cpu" or not native.available())
        options = Options(model=str(source), weights="plain" if plain else weights, dtype="bfloat16", draft="none")
        engine = load_engine(source, Tokenizer.load(home), options, Console(quiet=True))
        return [*_reading(engine, load_config(source), weights, prompt), *_decoding(engine, load_config(source), weights, prompt)]


def _reading(engine: Engine, config: ModelConfig, weights: str, prompt: int) -> list[Entry]:
    """Seconds from a prompt's coming to its answer's first token, nothing else being under way."""
    tokens = min(prompt, READ, engine.max_length - 1)
    once, seconds = SamplingParams(max_tokens=1, temperature=0), list[float]()
    _answer(engine, _prompt(config, min(tokens, 64), 0), once)  # warms up
    while not seconds or (len(seconds) < 3 and sum(seconds) < DECODED):
        start = time.perf_counter()
        _answer(engine, _prompt(config, tokens, 1 + len(seconds)), once)
        seconds.append(time.perf_counter() - start)
    return [_entry("prefill", config, {"weights": weights, "tokens": tokens, "context": 0}, min(seconds))]


def _decoding(engine: Engine, config: ModelConfig, weights: str, prompt: int) -> list[Entry]:
    """Seconds of a step that gives every one of so many sequences a token; on a slow device of fewer batches."""
    found, began = list[Entry](), time.perf_counter()
    for batch in (b for b in BATCHES if b <= engine.scheduler.max_sequences):
        if found and time.perf_counter() - began > DECODING:
            break
        length = max(1, min(prompt, READ // batch, engine.max_length // 2))
        most = max(2, min(256, engine.max_length - length))
        params = SamplingParams(max_tokens=most, min_tokens=most, temperature=0)
        for i in range(batch):
            engine.submit(_prompt(config, length, 100 + i), params)
        seconds, clock = list[float](), Clock()
        while engine.has_work and (sum(seconds) < DECODED or len(seconds) < 3):
            events = engine.step()
            lap = clock.lap()
            if len(events) == batch and not any(event.sample for event in events):
                seconds.append(lap)
        engine.abort_all()
        if len(seconds) > 1:  # the first one came with the prompts' ends
            shape = {"weights": weights, "batch": batch, "context": length + len(seconds) // 2}
            found.append(_entry("decode", config, shape, median(seconds[1:])))
    return found


def _entry(kind: str, config: ModelConfig, at: dict[str, Any], seconds: float) -> Entry:
    return Entry(kind, signature(config), at, {"seconds": seconds}, time.strftime("%Y-%m-%d %H:%M:%S"))


def _prompt(config: ModelConfig, tokens: int, seed: int) -> list[int]:
    """Random ids, no two prompts alike: nothing is found in the cache."""
    return torch.randint(config.vocab_size, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


def _answer(engine: Engine, prompt: list[int], params: SamplingParams) -> None:
    engine.generate([prompt], params)
