"""What the engine is asked for, what it gives back, and what it remembers in between.

`SamplingParams` is the request's wish, `Sample` the answer, `Sequence` the state of one request while it lives: its
tokens, its blocks of cache, its own random generator. Everything is token ids; text begins in data/chat.py.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

GREEDY_BELOW = 1e-5  # dividing by less than this overflows; the limit is the argmax anyway

StopReason = Literal["stop", "length", "abort"]
State = Literal["waiting", "running", "finished"]
Alternatives = list[tuple[int, float]]  # token ids with the model's own log-probability, best first


class Grammar(Protocol):
    """What may be drawn next, as a state machine over token ids (`server/grammar.py` makes them)."""

    def mask(self, words: Tensor) -> bool:
        """Fill int32 words (ceil(W / 32),), bit i for token i; False where everything is allowed and nothing was filled."""

    def accept(self, token: int) -> None:
        """Advance by a token that was drawn."""

    @property
    def done(self) -> bool:
        """Only the end is left."""


@dataclass(frozen=True, kw_only=True)
class ThinkingBudget:
    """Bounds on thinking, in tokens (s1's budget forcing, arXiv 2501.19393).

    `end_ids` are what ends thinking (`</think>`, one or several ids). At `max_tokens` they are forced; before `min_tokens`
    the end is not taken: where the model draws it, `wait_ids` ("Wait") are put in its place, or, without them, it cannot be
    drawn at all. Thinking begins at once where `start_ids` is empty, else where the answer begins with them. What is forced
    counts as thinking and as output.
    """

    end_ids: tuple[int, ...]
    max_tokens: int | None = None
    min_tokens: int = 0
    start_ids: tuple[int, ...] = ()
    wait_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.end_ids:
            raise ValueError("thinking: end_ids must name what ends thinking")
        if self.min_tokens < 0 or (self.max_tokens is not None and self.max_tokens < self.min_tokens):
            raise ValueError(f"thinking: needs 0 <= min_tokens <= max_tokens, has {self.min_tokens} and {self.max_tokens}")


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to draw tokens. In this order: penalties and bias, what is forbidden, temperature, top-k, top-p, min-p.

    temperature 0 takes the likeliest token that is allowed. top_k 0, top_p 1, min_p 0, penalties 0 and repetition_penalty 1
    switch a rule off. `stop_ids` are added to the engine's and cannot be drawn before `min_tokens`. `repetition_penalty`
    divides what is likely (multiplies what is not) of all tokens seen, prompt included (CTRL, arXiv 1909.05858);
    `presence_penalty` and `frequency_penalty` are subtracted once, and once an occurrence, for tokens of the answer
    (OpenAI). The same `seed` gives the same text whatever else is in the batch; None draws a fresh one. `logprobs` asks for
    that many best alternatives of each token, `prompt_logprobs` for each prompt token's log-probability and that many best
    alternatives, `record_routes` for the experts chosen and the rows that memory layers looked up, `record_support` for the words that
    each token was drawn from, `embed` for the mean of the prompt's hidden states. Requests of higher `priority` are served first.
    """

    max_tokens: int = 256
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop_ids: tuple[int, ...] = ()
    logprobs: int = 0
    prompt_logprobs: int | None = None
    record_routes: bool = False
    record_support: bool = False
    embed: bool = False
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    thinking: ThinkingBudget | None = None
    priority: int = 0

    def __post_init__(self) -> None:
        wrong = {
            "max_tokens: must be at least 1": self.max_tokens < 1,
            "min_tokens: must be at least 0": self.min_tokens < 0,
            "temperature: must be finite and at least 0": not 0 <= self.temperature < math.inf,
            "top_k: must be at least 0 (0 is off)": self.top_k < 0,
            "top_p: must be above 0 and at most 1": not 0 < self.top_p <= 1,
            "min_p: must be between 0 and 1": not 0 <= self.min_p <= 1,
            "seed: must fit 64 bits": self.seed is not None and not -(2**63) <= self.seed < 2**64,
            "stop_ids: must not be negative": any(i < 0 for i in self.stop_ids),
            "logprobs: must be at least 0": self.logprobs < 0,
            "prompt_logprobs: must be at least 0, or None": (self.prompt_logprobs or 0) < 0,
            # wider ones overflow fp32 logits, and a row without a finite maximum fails the whole step
            "repetition_penalty: must be between 0.01 and 100": not 0.01 <= self.repetition_penalty <= 100,
            "presence_penalty: must be between -100 and 100": not abs(self.presence_penalty) <= 100,
            "frequency_penalty: must be between -100 and 100": not abs(self.frequency_penalty) <= 100,
            "logit_bias: must be numbers between -1000 and 1000 of token ids that are not negative": any(
                i < 0 or not abs(b) <= 1000 for i, b in self.logit_bias
            ),
        }
        for message, is_wrong in wrong.items():
            if is_wrong:
                name = message.partition(":")[0]
                raise ValueError(f"{message}, is {getattr(self, name)}")

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def penalised(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


@dataclass
class Sample:
    """One finished answer.

    tokens      generated ids, the stop id included
    logps       log-probability of each in the distribution that it was drawn from, after temperature and filters (greedy: 0)
    raw_logps   log-probability of each in the model's own distribution: temperature 1, whole vocabulary
    version     of the weights that drew the first token; later ones may come from newer weights (`Engine.load_weights`)
    routes      (prompt + tokens - 1, L, K) int16, experts chosen in the L routed layers in order; the last token was never fed
    picks       (prompt + tokens - 1, L, X) int32, what the L memory layers looked up (model/ultramem.py), likewise
    supports    of each token the ids (int32, ascending) of the words that it was drawn from, None for the whole vocabulary
    cached      prompt tokens that were found in the prefix cache when the request was first admitted
    seconds     device-seconds: each step's time, shared by the tokens that it computed
    prompt_logprobs   of prompt token i + 1: its log-probability in the model's own distribution, and the best alternatives
    embedding   (D,) in fp32: the mean of the prompt's hidden states
    """

    tokens: list[int]
    logps: list[float]
    raw_logps: list[float]
    stop_reason: StopReason
    version: int
    logprobs: list[Alternatives] | None = None
    routes: Tensor | None = None
    picks: Tensor | None = None
    supports: list[Tensor | None] | None = None
    cached: int = 0
    seconds: float = 0.0
    prompt_logprobs: list[tuple[float, Alternatives]] | None = None
    embedding: Tensor | None = None


class Sequence:
    """One request while it lives. `tokens` is prompt and output in one list; `computed` of them are in the cache."""

    def __init__(
        self, id: int, prompt: list[int], params: SamplingParams, *, stop_ids: frozenset[int], max_length: int, tenant: str = ""
    ) -> None:
        self.id, self.params, self.stop_ids, self.tenant = id, params, stop_ids, tenant
        self.tokens = list(prompt)
        self.prompt_length = len(prompt)
        self.max_length = min(max_length, len(prompt) + params.max_tokens)
        self.state: State = "waiting"
        self.blocks: list[int] = []
        self.digests: list[bytes] = []  # of the leading full blocks, as far as they were needed
        self.computed = 0
        self.draft: list[int] = []  # guesses of the tokens after the last one
        self.cached: int | None = None  # prompt tokens found in the prefix cache at the first admission
        self.seconds = 0.0
        self.turn = 0.0  # place in the order of service; see engine/scheduler.py
        self.version: int | None = None
        self.logps: list[float] = []
        self.raw_logps: list[float] = []
        self.logprobs: list[Alternatives] = []
        self.prompt_logprobs: list[tuple[float, Alternatives]] = []
        self.hidden_D: Tensor | None = None  # the sum over prompt tokens so far, `pooled` of them
        self.pooled = 0
        self.routes: list[Tensor] = []  # pieces of (tokens, L, K), one for each time that its cache was given up
        self.picks: list[Tensor] = []  # likewise, (tokens, L, X)
        self.routed = 0  # tokens in those pieces
        self.supports: list[Tensor | None] = []
        self.generator = torch.Generator()
        self._uniforms: deque[float] = deque()  # drawn ahead for drafts, used up one a token
        if params.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(params.seed)

    @property
    def pending(self) -> int:
        """Tokens known but not yet in the cache: 1 in decode, more in prefill and after a preemption."""
        return len(self.tokens) - self.computed

    @property
    def shares_prefix(self) -> bool:
        """Whether cached blocks may stand for its prompt: not where something is wanted of every prompt token."""
        return not self.params.embed and self.params.prompt_logprobs is None

    def uniform(self, ahead: int) -> float:
        """The number that decides the token `ahead` places from the next one; `append` uses one up."""
        while len(self._uniforms) <= ahead:
            self._uniforms.append(torch.rand((), dtype=torch.float64, generator=self.generator).item())
        return self._uniforms[ahead]

    def append(
        self, token: int, logp: float, raw_logp: float, alternatives: Alternatives, support: Tensor | None, version: int
    ) -> StopReason | None:
        """Take a drawn token; the reason to stop here, if any."""
        self.tokens.append(token)
        self.logps.append(logp)
        self.raw_logps.append(raw_logp)
        if self._uniforms:
            self._uniforms.popleft()
        if self.params.logprobs:
            self.logprobs.append(alternatives)
        if self.params.record_support:
            self.supports.append(support)
        if self.version is None:
            self.version = version
        if token in self.stop_ids:
            return "stop"
        return "length" if len(self.tokens) >= self.max_length else None

    def record(self, routes_TLK: Tensor | None, picks_TLX: Tensor | None) -> None:
        """Keep the choices for the tokens that follow those recorded. What was before a preemption stays: it made the logps."""
        for kept, piece in ((self.routes, routes_TLK), (self.picks, picks_TLX)):
            if piece is not None:
                kept.append(piece)
        self.routed = self.computed

    def pool(self, hidden_LD: Tensor) -> None:
        """Add the hidden states of the tokens just computed, those of the prompt that were not counted before."""
        rows_LD = hidden_LD[max(0, self.pooled - self.computed) : max(0, self.prompt_length - self.computed)].float()
        self.hidden_D = rows_LD.sum(0) if self.hidden_D is None else self.hidden_D + rows_LD.sum(0)
        self.pooled += len(rows_LD)

    def sample(self, reason: StopReason, version: int) -> Sample:
        """The answer as it stands. `version` counts where nothing was drawn yet."""
        with torch.inference_mode(False):  # the trainer's autograd refuses tensors made in inference mode
            routes = torch.cat(self.routes).to(torch.int16) if self.routes else None
            picks = torch.cat(self.picks).clone() if self.picks else None
            supports = _copies(self.supports) if self.params.record_support else None
            embedding = None if self.hidden_D is None else (self.hidden_D / self.pooled).cpu()
        return Sample(
            tokens=self.tokens[self.prompt_length :],
            logps=self.logps,
            raw_logps=self.raw_logps,
            stop_reason=reason,
            version=version if self.version is None else self.version,
            logprobs=self.logprobs if self.params.logprobs else None,
            routes=routes,
            picks=picks,
            supports=supports,
            cached=self.cached or 0,
            seconds=self.seconds,
            embedding=embedding,
            prompt_logprobs=self.prompt_logprobs if self.params.prompt_logprobs is not None else None,
        )


def _copies(pieces: list[Tensor | None]) -> list[Tensor | None]:
    """The same as views of one tensor."""
    filled = [piece for piece in pieces if piece is not None]
    if not filled:
        return list(pieces)
    views = iter(torch.cat(filled).split([len(piece) for piece in filled]))
    return [None if piece is None else next(views) for piece in pieces]
