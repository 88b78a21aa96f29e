"""What every endpoint turns its request into, and what it gets back: the one vocabulary inside the server.

An endpoint is a translation: its clients' fields into `Job`s, and the `Update`s of `Service.answer` into its clients' events.
Nothing else in the server knows what an OpenAI chunk or an Anthropic block looks like.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from jevons.engine.sequence import Alternatives, SamplingParams

ToolFormat = Literal["hermes", "qwen3_coder", "deepseek_v3", "deepseek_v31"]  # Qwen2.5 and Qwen3 write Hermes's
FinishReason = Literal["stop", "length", "tool_calls", "abort"]


@dataclass(frozen=True, kw_only=True)
class Reply:
    """How to read an answer's tokens: whether it begins inside <think>, and whether tool calls are looked for."""

    plain: bool = False  # text only: no thinking, no tool calls (the completions endpoints)
    thinking: bool = False  # the prompt ended inside an opened <think>
    may_think: bool = True  # else the answer may not open <think> by itself
    tools: ToolFormat | None = None
    schemas: Mapping[str, Any] = field(default_factory=dict)  # a tool's name: its parameters' JSON schema, which types qwen3_coder's values


@dataclass(frozen=True, kw_only=True)
class Job:
    """One prompt, how to draw from it, and how to read what comes. `stop` strings apply to content, not to thinking."""

    prompt: tuple[int, ...]
    params: SamplingParams
    n: int = 1  # answers; choice j draws with seed + j where a seed is given
    stop: tuple[str, ...] = ()
    reply: Reply = Reply()
    grammar: str | None = None  # llguidance's JSON, held to from the end of thinking on; see server/grammar.py
    tenant: str = ""  # prefixes are shared inside a tenant only


@dataclass(frozen=True)
class Piece:
    """A piece of an answer as clients see it. A call's first piece has its id and name and no text."""

    kind: Literal["reasoning", "content", "call"]
    text: str = ""
    call: int = 0  # which tool call, for kind "call"
    id: str = ""
    name: str = ""


@dataclass(frozen=True)
class Token:
    """One drawn token: its log-probability as drawn and in the model's own distribution, and the model's best alternatives."""

    id: int
    logp: float
    raw_logp: float
    alternatives: Alternatives
    kind: Literal["reasoning", "content", "call"] = "content"


@dataclass
class Usage:
    """What one job cost: cached is the part of the prompt that was found in the cache (of one reading of the prompt)."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0
    reasoning: int = 0

    def __add__(self, other: Usage) -> Usage:
        values = (self.prompt, self.cached, self.completion, self.reasoning)
        others = (other.prompt, other.cached, other.completion, other.reasoning)
        return Usage(*(a + b for a, b in zip(values, others)))


@dataclass(frozen=True)
class Update:
    """News of one choice. `choice` counts over all jobs of a request: job i, answer j is the sum of n before i, plus j.

    The last update of a choice, and only that, has `finish`; `stop` is the stop string that ended it, if one did, and
    `prompt_logprobs` what SamplingParams.prompt_logprobs asked for.
    """

    choice: int
    pieces: list[Piece] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    finish: FinishReason | None = None
    stop: str | None = None
    usage: Usage | None = None  # with `finish`
    prompt_logprobs: list[tuple[float, Alternatives]] | None = None  # with `finish`; entry i is prompt token i + 1's
    embedding: Tensor | None = None  # with `finish`, where SamplingParams.embed asked for it
