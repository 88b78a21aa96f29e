"""POST /v1/completions: text in, text out, with log-probabilities of the prompt as lm-eval needs them, and infilling.

A prompt is text or token ids, one or many. With `echo` and `logprobs` each prompt token is scored: the first has no score (nothing came
before it), and every token stands in its own `top_logprobs` with the very same float, because lm-eval decides "was this the greedy choice"
by equality. `suffix` fills in between (DeepSeek's /beta/completions) where the tokenizer has tokens for it.

Not done: streaming of an echoed prompt's log-probabilities.
"""

# no `from __future__ import annotations`: FastAPI could not read annotations that name a function's arguments

import asyncio
import codecs
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field, WithJsonSchema

from jevons.data.tokenizer import Tokenizer
from jevons.engine.sequence import Alternatives, SamplingParams
from jevons.server.chunk import FINISH, failure
from jevons.server.conversation import refused
from jevons.server.document import WORK, list_of, object_of, responses
from jevons.server.error import APIError
from jevons.server.field import Sampling, at_most, best, usage
from jevons.server.job import Job, Reply, Token, Update
from jevons.server.service import Service
from jevons.server.stream import attended, data, stream
from jevons.server.ticket import Ticket
from jevons.server.vocabulary import Vocabulary

PATHS = ("/v1/completions", "/completions", "/beta/completions", "/beta/v1/completions")
LONG_TEXT = 1 << 14  # characters from which on tokenising would hold up the event loop
# before the prefix, before the suffix, before the middle: Qwen's and DeepSeek's infilling tokens
INFILL = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>"),
)
INFILL_ENDS = ("<|endoftext|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<\uff5cend\u2581of\u2581sentence\uff5c>")

IDS = list_of({"type": "integer", "minimum": 0}) | {"minItems": 1}
TEXTS = list_of("string") | {"minItems": 1}
PROMPT = {"anyOf": [{"type": "string"}, IDS, TEXTS, list_of(IDS) | {"minItems": 1}]}


class CompletionBody(Sampling):
    ignored: ClassVar[Mapping[str, str]] = {
        "store": "nothing is stored",
        "metadata": "belongs to store",
        "service_tier": "there is one tier",
    }
    prompt: Annotated[Any, WithJsonSchema(PROMPT)] = Field(description="Text, texts, token ids, or lists of token ids")
    max_tokens: int | None = Field(None, ge=0, description="Default 16; 0 only with echo")
    suffix: str | None = Field(None, description="Fill in between prompt and suffix")
    echo: bool | None = Field(None, description="Give the prompt back before the answer")
    logprobs: int | None = Field(None, ge=0, description="Log-probabilities with so many alternatives")
    best_of: int | None = Field(None, ge=1, description="Draw so many and give the n of the highest mean log-probability")
    add_special_tokens: bool | None = Field(None, description="Default true: text gets what the tokenizer adds, such as a first token")


@dataclass
class Prompt:
    ids: list[int]
    text: str  # what echo gives back


def read_prompts(value: Any, tokenizer: Tokenizer, *, special: bool, where: str = "prompt") -> list[Prompt]:
    """All forms of a prompt. CPU-bound for long texts. Raises APIError."""
    if isinstance(value, str) or (isinstance(value, list) and value and type(value[0]) is int):
        value = [value]
    if not isinstance(value, list) or not value:
        raise APIError(400, f"{where}: must be a text, a list of texts, token ids or a list of token ids, and not empty", param=where)
    prompts = []
    for i, item in enumerate(value):
        if isinstance(item, str):
            ids, text = tokenizer.raw.encode(item, add_special_tokens=special).ids, item
        elif isinstance(item, list) and all(type(id) is int and 0 <= id < 2**31 for id in item):
            ids, text = item, tokenizer.decode(item)
        else:
            raise APIError(400, f"{where}[{i}]: must be a text or a list of token ids", param=where)
        if not ids:
            raise APIError(400, f"{where}[{i}]: is empty; give at least one token", param=where)
        prompts.append(Prompt(ids, text))
    return prompts


async def long_or_not(size: int, work: Callable[[], Any]) -> Any:
    """Run work that grows with a text: in a thread where it would hold up others."""
    return await asyncio.to_thread(work) if size > LONG_TEXT else work()


def text_size(value: Any) -> int:
    """Characters of text, counting a token id as a few."""
    if isinstance(value, str):
        return len(value)
    return sum(len(v) if isinstance(v, str) else 4 * len(v) if isinstance(v, list) else 4 for v in value) if isinstance(value, list) else 0


def infill(tokenizer: Tokenizer, prompt: str, suffix: str) -> tuple[list[int], tuple[int, ...]]:
    """The prompt's ids for filling in between, and the ids that end the middle. ValueError for a model that cannot."""
    for tokens in INFILL:
        before, between, after = (tokenizer.raw.token_to_id(token) for token in tokens)
        if before is not None and between is not None and after is not None:
            ends = (tokenizer.raw.token_to_id(token) for token in INFILL_ENDS)
            ids = [before, *tokenizer.encode(prompt), between, *tokenizer.encode(suffix), after]
            return ids, tuple(id for id in ends if id is not None)
    raise ValueError("suffix: this model's tokenizer has no tokens for filling in between")


@dataclass
class Choice:
    """One choice of a text completion. `top` None: no log-probabilities."""

    index: int
    prompt: Prompt
    vocabulary: Vocabulary
    echo: bool
    top: int | None
    sampled: bool
    silent: bool  # max_tokens 0: the one token that the engine drew is not shown
    pieces: list[str] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    finish: str | None = None
    scores: list[tuple[float, Alternatives]] = field(default_factory=list)
    _characters: int = 0
    _begun: bool = False

    def __post_init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def take(self, update: Update) -> None:
        if not self.silent:
            self.pieces += [piece.text for piece in update.pieces]
            self.tokens += update.tokens
        if update.finish is not None:
            self.finish = "length" if self.silent else FINISH.get(update.finish, update.finish)
            self.scores = update.prompt_logprobs or []

    @property
    def mean(self) -> float:
        """What best_of compares."""
        return sum(token.raw_logp for token in self.tokens) / max(1, len(self.tokens))

    def whole(self, index: int) -> dict[str, Any]:
        text = (self.prompt.text if self.echo else "") + "".join(self.pieces)
        logs = None
        if self.top is not None:
            logs = self._logs(prompt=self.echo)
        return {"text": text, "index": index, "logprobs": logs, "finish_reason": self.finish}

    def chunk(self, update: Update) -> dict[str, Any]:
        self.take(update)
        text = "".join(self.pieces)
        if self.echo and not self._begun:
            text = self.prompt.text + text
        self._begun = True
        logs = self._logs(prompt=False) if self.top is not None and self.tokens else None
        self.pieces, self.tokens = [], []
        return {"text": text, "index": self.index, "logprobs": logs, "finish_reason": self.finish}

    def _logs(self, *, prompt: bool) -> dict[str, Any]:
        """OpenAI's four parallel lists. The first token of an echoed prompt has no score."""
        logs: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        if prompt:
            self._add(logs, self.prompt.ids[0], None, [])
            for id, (logp, alternatives) in zip(self.prompt.ids[1:], self.scores, strict=True):
                self._add(logs, id, logp, alternatives)
        for token in self.tokens:
            if self.sampled:
                self._add(logs, token.id, token.logp, [])
            else:
                self._add(logs, token.id, token.raw_logp, token.alternatives)
        return logs

    def _add(self, logs: dict[str, Any], id: int, logp: float | None, alternatives: Alternatives) -> None:
        name = self.vocabulary.text(id)
        logs["tokens"].append(name)
        logs["text_offset"].append(self._characters)
        self._characters += len(self._decoder.decode(self.vocabulary.data(id)))
        if logp is None:
            logs["token_logprobs"].append(None)
            logs["top_logprobs"].append(None)
            return
        own, pairs = best(logp, id, alternatives)
        table: dict[str, float] = {}
        for other, value in pairs[: self.top]:
            table.setdefault(self.vocabulary.text(other), value)  # best first: of two ids with one name the likelier stays
        if table.get(name, own) != own:
            name = f"token_id:{id}"
        logs["token_logprobs"].append(own)
        logs["top_logprobs"].append(table | {name: own})


def router(service: Service, admit: Callable[..., Any]) -> APIRouter:
    api = APIRouter(tags=["completions"])
    vocabulary = Vocabulary(service.tokenizer)

    async def completions(request: Request, body: CompletionBody, ticket: Annotated[Ticket, Depends(admit)]) -> Response:
        body.enter(service, ticket)
        prompts, jobs = await _jobs(service, body, ticket)
        n, drawn = body.n or 1, jobs[0].n
        choices = [
            Choice(
                i * drawn + j,
                prompt,
                vocabulary,
                echo=bool(body.echo),
                top=body.logprobs,
                sampled=body.logprobs_mode == "sampled",
                silent=body.max_tokens == 0,
            )
            for i, prompt in enumerate(prompts)
            for j in range(drawn)
        ]
        head = body.head(ticket, "cmpl", "text_completion")
        if body.stream:
            frames = _frames(service, jobs, ticket, choices, head, body.wants_usage)
            return await stream(request, frames, failure=lambda error: data(failure(error)), keep_alive=service.limits.keep_alive)
        return JSONResponse(await attended(request, _whole(service, jobs, ticket, choices, head, n)))

    reply = object_of(id="string", object="string", created="integer", model="string", choices=list_of("object"), usage="object")
    for path in PATHS:
        api.post(path, responses=responses(reply, *WORK, stream=True), response_model=None, include_in_schema=path == PATHS[0])(completions)
    return api


async def _jobs(service: Service, body: CompletionBody, ticket: Ticket) -> tuple[list[Prompt], list[Job]]:
    """The prompts and one job for each; raises APIError for what cannot be had together."""
    limits, n = service.limits, body.n or 1
    drawn = max(n, body.best_of or n)
    for name, wrong in {
        f"n: must be at most {limits.max_n}": n > limits.max_n,
        f"best_of: must be at least n and at most {limits.max_n}": body.best_of is not None and not n <= body.best_of <= limits.max_n,
        "best_of: cannot be streamed beyond n": bool(body.stream) and drawn > n,
        f"logprobs: must be at most {limits.max_logprobs}": (body.logprobs or 0) > limits.max_logprobs,
        "logprobs: cannot be streamed together with echo": bool(body.stream and body.echo) and body.logprobs is not None,
        "logprobs_mode: an echoed prompt was not sampled; leave out sampled or echo": bool(body.echo) and body.logprobs_mode == "sampled",
        "max_tokens: must be at least 1 without echo": body.max_tokens == 0 and not body.echo,
        "suffix: cannot be combined with echo": body.suffix is not None and bool(body.echo),
        "suffix: needs one text as prompt": body.suffix is not None and not isinstance(body.prompt, str),
    }.items():
        if wrong:
            raise refused(ValueError(name))
    drawing = body.drawing(service) | {"max_tokens": 16 if body.max_tokens is None else max(1, body.max_tokens), "logprobs": body.logprobs}
    if isinstance(body.prompt, list) and type(next(iter(body.prompt), None)) is not int:
        at_most("prompt", len(body.prompt), limits.max_prompts)
    if body.suffix is not None:
        suffix = body.suffix
        try:
            ids, ends = await long_or_not(text_size(body.prompt) + len(suffix), lambda: infill(service.tokenizer, body.prompt, suffix))
        except ValueError as error:
            raise refused(error) from error
        prompts = [Prompt(ids, body.prompt)]
        drawing["stop_ids"] += ends
    else:
        special = body.add_special_tokens is not False
        prompts = await long_or_not(text_size(body.prompt), lambda: read_prompts(body.prompt, service.tokenizer, special=special))
    if body.echo and body.logprobs is not None:
        drawing["prompt_logprobs"] = body.logprobs
    grammar = body.structured_outputs.source() if body.structured_outputs is not None else None
    stops, jobs = body.stops(limits), []
    for prompt in prompts:
        check_length(service, len(prompt.ids))
        room = service.engine_loop.max_length - len(prompt.ids)
        fields = {name: value for name, value in drawing.items() if value is not None} | {"max_tokens": min(drawing["max_tokens"], room)}
        try:
            params = SamplingParams(**fields)
        except ValueError as error:
            raise refused(error) from error
        reply = Reply(plain=True)
        jobs.append(Job(prompt=tuple(prompt.ids), params=params, n=drawn, stop=stops, reply=reply, grammar=grammar, tenant=ticket.tenant))
    return prompts, jobs


def check_length(service: Service, tokens: int, where: str = "prompt") -> None:
    longest = min(service.limits.max_prompt_tokens, service.engine_loop.max_length - 1)
    if tokens > longest:
        raise APIError(400, f"{where}: {tokens:,} tokens, but at most {longest:,} fit", param=where, code="context_length_exceeded")


async def _whole(
    service: Service, jobs: Sequence[Job], ticket: Ticket, choices: list[Choice], head: dict[str, Any], n: int
) -> dict[str, Any]:
    async with aclosing(service.answer(jobs, ticket)) as updates:
        async for update in updates:
            choices[update.choice].take(update)
    drawn, kept = jobs[0].n, []
    for first in range(0, len(choices), drawn):
        group = choices[first : first + drawn]
        kept += group if n == drawn else sorted(group, key=lambda c: -c.mean)[:n]
    return head | {"choices": [choice.whole(index) for index, choice in enumerate(kept)], "usage": usage(ticket)}


async def _frames(
    service: Service, jobs: Sequence[Job], ticket: Ticket, choices: list[Choice], head: dict[str, Any], wants_usage: bool
) -> AsyncGenerator[str, None]:
    blank = {"usage": None} if wants_usage else {}
    async with aclosing(service.answer(jobs, ticket)) as updates:
        async for update in updates:
            yield data(head | {"choices": [choices[update.choice].chunk(update)]} | blank)
    if wants_usage:
        yield data(head | {"choices": [], "usage": usage(ticket)})
    yield "data: [DONE]\n\n"
