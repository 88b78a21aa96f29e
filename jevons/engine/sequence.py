"""What the engine is asked for, what it gives back, and what it remembers in between.

`SamplingParams` is the request's wish, `Sample` the answer, `Sequence` the state of one request while it lives: its
tokens, its blocks of cache, its own random generator. Everything is token ids; text begins in data/chat.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

GREEDY_BELOW = 1e-5  # dividing by less than this overflows; the limit is the argmax anyway

StopReason = Literal["stop", "length", "abort"]
State = Literal["waiting", "running", "finished"]
Alternatives = list[tuple[int, float]]  # token ids with the model's own log-probability, best first


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to draw tokens. Applied in transformers' order: temperature, top-k, top-p, min-p.

    temperature 0 takes the argmax of the model's logits. top_k 0, top_p 1 and min_p 0 switch a filter off. `stop_ids` are
    added to the engine's. The same `seed` gives the same text whatever else is in the batch; None draws a fresh one.
    `logprobs` asks for that many best alternatives of each token, `record_routes` for the experts chosen.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop_ids: tuple[int, ...] = ()
    logprobs: int = 0
    record_routes: bool = False

    def __post_init__(self) -> None:
        wrong = {
            "max_tokens: must be at least 1": self.max_tokens < 1,
            "temperature: must be finite and at least 0": not 0 <= self.temperature < math.inf,
            "top_k: must be at least 0 (0 is off)": self.top_k < 0,
            "top_p: must be above 0 and at most 1": not 0 < self.top_p <= 1,
            "min_p: must be between 0 and 1": not 0 <= self.min_p <= 1,
            "seed: must fit 64 bits": self.seed is not None and not -(2**63) <= self.seed < 2**64,
            "stop_ids: must not be negative": any(i < 0 for i in self.stop_ids),
            "logprobs: must be at least 0": self.logprobs < 0,
        }
        for message, is_wrong in wrong.items():
            if is_wrong:
                name = message.partition(":")[0]
                raise ValueError(f"{message}, is {getattr(self, name)}")

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW


@dataclass
class Sample:
    """One finished answer.

    tokens      generated ids, the stop id included
    logps       log-probability of each in the distribution that it was drawn from, after temperature and filters (greedy: 0)
    raw_logps   log-probability of each in the model's own distribution: temperature 1, whole vocabulary
    version     of the weights that drew the first token; later ones may come from newer weights (`Engine.load_weights`)
    routes      (prompt + tokens - 1, L, K) int16, experts chosen in the L routed layers in order; the last token was never fed
    """

    tokens: list[int]
    logps: list[float]
    raw_logps: list[float]
    stop_reason: StopReason
    version: int
    logprobs: list[Alternatives] | None = None
    routes: Tensor | None = None


class Sequence:
    """One request while it lives. `tokens` is prompt and output in one list; `computed` of them are in the cache."""

    def __init__(self, id: int, prompt: list[int], params: SamplingParams, *, stop_ids: frozenset[int], max_length: int) -> None:
        self.id, self.params, self.stop_ids = id, params, stop_ids
        self.tokens = list(prompt)
        self.prompt_length = len(prompt)
        self.max_length = min(max_length, len(prompt) + params.max_tokens)
        self.state: State = "waiting"
        self.blocks: list[int] = []
        self.computed = 0
        self.version: int | None = None
        self.logps: list[float] = []
        self.raw_logps: list[float] = []
        self.logprobs: list[Alternatives] = []
        self.routes: list[Tensor] = []  # pieces of (tokens, L, K), one a step
        self.routed = 0  # tokens in those pieces
        self.generator = torch.Generator()
        if params.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(params.seed)

    @property
    def pending(self) -> int:
        """Tokens known but not yet in the cache: 1 in decode, more in prefill and after a preemption."""
        return len(self.tokens) - self.computed

    def append(self, token: int, logp: float, raw_logp: float, alternatives: Alternatives, version: int) -> StopReason | None:
        """Take a drawn token; the reason to stop here, if any."""
        self.tokens.append(token)
        self.logps.append(logp)
        self.raw_logps.append(raw_logp)
        if self.params.logprobs:
            self.logprobs.append(alternatives)
        if self.version is None:
            self.version = version
        if token in self.stop_ids:
            return "stop"
        return "length" if len(self.tokens) >= self.max_length else None

    def record(self, routes_TLK: Tensor) -> None:
        """Keep the experts of the tokens just computed. What was recorded before a preemption stays: it made the logps."""
        seen = self.routed - self.computed
        if seen < len(routes_TLK):
            self.routes.append(routes_TLK[seen:].clone())  # not a view: it would keep the whole batch's alive
            self.routed = self.computed + len(routes_TLK)

    def sample(self, reason: StopReason, version: int) -> Sample:
        """The answer as it stands. `version` counts where nothing was drawn yet."""
        with torch.inference_mode(False):  # the trainer's autograd refuses tensors made in inference mode
            routes = torch.cat(self.routes) if self.routes else None
        return Sample(
            tokens=self.tokens[self.prompt_length :],
            logps=self.logps,
            raw_logps=self.raw_logps,
            stop_reason=reason,
            version=version if self.version is None else self.version,
            logprobs=self.logprobs if self.params.logprobs else None,
            routes=routes,
        )
