"""Jobs in, updates out: the whole way of a request through the server, without a word about any client's protocol.

`answer` admits (or refuses at once: a full queue is a 503), compiles grammars, submits each choice to the engine, turns its
tokens into pieces (thinking, content, tool calls), applies stop strings, and meters. The usage row is committed before the
last update goes out, so a client that saw the end of its answer finds it in the ledger whatever happens next. A consumer
that stops iterating (its client went away) aborts the engine's work; the row is written all the same.
Not done: several models in one process, several engines.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace

import torch.nn.functional as F

from jevons.cost.usage import UsageRow
from jevons.data.tokenizer import Tokenizer
from jevons.engine.engine import Event
from jevons.engine.sequence import Grammar, Sample, SamplingParams
from jevons.server.error import APIError
from jevons.server.grammar import GrammarFactory
from jevons.server.job import FinishReason, Job, Piece, Reply, Token, Update, Usage
from jevons.server.limit import Limits
from jevons.server.loop import EngineLoop, Failure, Mailbox
from jevons.server.meter import Meter
from jevons.server.metric import Metrics
from jevons.server.parser import ReplyParser
from jevons.server.stop import StopFinder
from jevons.server.ticket import Ticket

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelAlias:
    """Another name for the served model; `thinking` is what it means where the request does not say."""

    name: str
    thinking: bool | None = None


# names that DeepSeek's clients send; the first two were retired in July 2026
ALIASES = (
    ModelAlias("deepseek-chat", thinking=False),
    ModelAlias("deepseek-reasoner", thinking=True),
    ModelAlias("deepseek-flash"),
    ModelAlias("deepseek-v4-pro"),
)


class Service:
    """One model, its tokenizer, its engine's thread, and the meter."""

    def __init__(
        self,
        engine_loop: EngineLoop,
        tokenizer: Tokenizer,
        meter: Meter,
        *,
        model_id: str,
        limits: Limits,
        aliases: Sequence[ModelAlias] = ALIASES,
    ) -> None:
        self.engine_loop, self.tokenizer, self.meter, self.model_id, self.limits = engine_loop, tokenizer, meter, model_id, limits
        self.aliases = {alias.name: alias for alias in aliases}
        self.metrics = Metrics(model_id)
        self.created, self.clock = int(time.time()), time.perf_counter()
        self.draining = False
        self.grammars = GrammarFactory(
            tokenizer, engine_loop.config.vocab_size, engine_loop.engine.stop_ids, max_bytes=limits.max_schema_bytes
        )
        self.running: set[asyncio.Task[object]] = set()  # rows of clients that went away, until they are written
        self.under_way = 0  # choices submitted and not finished

    @property
    def uptime(self) -> float:
        return time.perf_counter() - self.clock

    async def answer(self, jobs: Sequence[Job], ticket: Ticket) -> AsyncGenerator[Update, None]:
        """Updates of all choices of all jobs as they come. Raises APIError before the first update, or in its place later."""
        choices = [_Choice(self, job, j) for job in jobs for j in range(job.n)]
        self._admit(len(choices))
        self.under_way += len(choices)
        box: Mailbox = asyncio.Queue()
        first_token: float | None = None
        self.metrics.started(ticket)
        try:
            for number, choice in enumerate(choices):
                grammar = await self._grammar(choice.job)
                choice.future = self.engine_loop.submit(
                    box, number, choice.job.prompt, choice.params, tenant=choice.job.tenant, grammar=grammar
                )
            left = len(choices)
            while left:
                number, news = await box.get()
                batch = [(number, news)]
                while not box.empty():
                    batch.append(box.get_nowait())
                changed: dict[int, None] = {}
                for number, news in batch:
                    if isinstance(news, Failure):
                        raise _refusal(news.error)
                    if first_token is None:
                        first_token = time.perf_counter() - ticket.clock
                        self.metrics.first_token(first_token)
                    if choices[number].finish is None:
                        choices[number].take(news)
                        changed[number] = None
                for number in changed:
                    choice = choices[number]
                    if choice.finish is not None:
                        left -= 1
                        if not left:
                            await self._record(jobs, choices, ticket, first_token, "")
                    if choice.pieces or choice.finish is not None:
                        yield choice.update(number)
        except APIError:
            await self._record(jobs, choices, ticket, first_token, "error")
            raise
        finally:
            self.under_way -= len(choices)
            for choice in choices:
                if choice.finish is None and choice.future is not None:
                    self.engine_loop.abort(choice.future)
            if ticket.row is None:
                # not awaited here: whoever closes this generator may have been cancelled, and would be again at the next await
                task: asyncio.Task[object] = asyncio.ensure_future(self._record(jobs, choices, ticket, first_token, "abort"))
                self.running.add(task)
                task.add_done_callback(self.running.discard)

    def _admit(self, count: int) -> None:
        if self.draining:
            raise APIError(503, "the server is shutting down", retry_after=5)
        if not self.engine_loop.alive:
            raise APIError(503, "the engine has stopped; restart the server", retry_after=30)
        self.meter.check()
        waiting = self.engine_loop.snapshot["waiting"]
        if self.under_way and self.under_way + count > self.limits.max_queue + self.engine_loop.snapshot["max_sequences"]:
            raise APIError(503, f"the queue is full ({waiting:.0f} requests wait); try again", code="queue_full", retry_after=1)

    async def _grammar(self, job: Job) -> Grammar | None:
        if job.grammar is None:
            return None
        try:
            return await asyncio.to_thread(self.grammars.compile, job.grammar, job.reply, may_think=job.reply.may_think)
        except ValueError as error:
            field = "tools" if job.reply.tools else "response_format"
            raise APIError(400, f"{field}: {error}", param=field) from error

    async def _record(self, jobs: Sequence[Job], choices: list[_Choice], ticket: Ticket, ttft: float | None, status: str) -> None:
        """One row a request: each prompt counts once, however many answers it gets."""
        total, at = Usage(), 0
        for job in jobs:
            mine = choices[at : at + job.n]
            at += job.n
            if job.params.embed:  # the one token that the engine draws is nobody's
                total += Usage(len(job.prompt))
                continue
            total += Usage(len(job.prompt), mine[0].cached, sum(c.completion for c in mine), sum(c.parser.reasoning_tokens for c in mine))
        row = UsageRow(
            key_id=ticket.account.key_id,
            key_name=ticket.account.name,
            model=self.model_id,
            endpoint=ticket.endpoint,
            request_id=ticket.request_id,
            prompt=total.prompt,
            cached=total.cached,
            completion=total.completion,
            reasoning=total.reasoning,
            ttft=ttft,
            duration=time.perf_counter() - ticket.clock,
            device_seconds=sum(c.seconds for c in choices),
            status=status or ",".join(sorted({c.finish or "abort" for c in choices})),
            started=ticket.started,
        )
        ticket.row = row = self.meter.priced(row)
        self.metrics.finished(row)
        await self.meter.record(row)

    async def embed(self, prompts: Sequence[Sequence[int]], ticket: Ticket) -> list[list[float]]:
        """Mean-pooled hidden states of each prompt, scaled to length 1. They go through the engine's queue like any request."""
        jobs = [
            Job(prompt=tuple(p), params=SamplingParams(max_tokens=1, embed=True), reply=Reply(plain=True), tenant=ticket.tenant)
            for p in prompts
        ]
        vectors: list[list[float]] = [[] for _ in prompts]
        async for update in self.answer(jobs, ticket):
            if update.embedding is not None:
                vectors[update.choice] = F.normalize(update.embedding, dim=0).tolist()
        return vectors

    async def finish(self, timeout: float) -> None:
        """Take no more requests, wait for those under way, and end the engine; what has not ended by then ends with an error."""
        self.draining = True
        end = time.perf_counter() + timeout
        while self.under_way and time.perf_counter() < end:
            await asyncio.sleep(0.05)
        await self.engine_loop.stop()

    async def drain(self, timeout: float) -> None:
        """`finish`, and write every row."""
        await self.finish(timeout)
        if self.running:
            await asyncio.wait(self.running, timeout=5)
        await self.meter.close()


class _Choice:
    """One answer while it comes."""

    def __init__(self, service: Service, job: Job, j: int) -> None:
        seed = job.params.seed
        self.job = job
        self.params = job.params if seed is None or not j else replace(job.params, seed=(seed + j) % 2**63)
        self.parser = ReplyParser(service.tokenizer, job.reply)
        self.stops = StopFinder(job.stop)
        self.service = service
        self.future: Future[int] | None = None
        self.pieces: list[Piece] = []
        self.tokens: list[Token] = []
        self.finish: FinishReason | None = None
        self.stop: str | None = None
        self.sample: Sample | None = None
        self.completion, self.cached, self.seconds = 0, 0, 0.0

    def take(self, event: Event) -> None:
        """One token: into pieces, unless a stop string ends the answer here."""
        self.completion += 1
        self.cached, self.seconds = event.cached, event.seconds
        self._release(self.parser.push(event.token))
        self.tokens.append(Token(event.token, event.logp, event.raw_logp, event.logprobs, self.parser.kind))
        if self.stop is not None:
            self.finish = "stop"
            if event.sample is None and self.future is not None:
                self.service.engine_loop.abort(self.future)
        elif event.sample is not None:
            self.sample = event.sample
            self._release(self.parser.finish())
            if self.stop is None and (rest := self.stops.flush()):
                self._append(Piece("content", rest))
            reason = event.sample.stop_reason
            assert reason in ("stop", "length"), reason
            self.finish = "length" if reason == "length" and self.stop is None else "tool_calls" if self.parser.calls else "stop"

    def _release(self, pieces: list[Piece]) -> None:
        for piece in pieces:
            if piece.kind == "content" and self.stop is None:
                text, self.stop = self.stops.push(piece.text)
                piece = replace(piece, text=text)
            elif self.stop is not None:
                return
            elif held := self.stops.flush():  # what might have begun a stop string did not: it stood before this piece
                self._append(Piece("content", held))
            if piece.text or piece.kind == "call":
                self._append(piece)

    def _append(self, piece: Piece) -> None:
        last = self.pieces[-1] if self.pieces else None
        if last is not None and last.kind == piece.kind and last.call == piece.call and not piece.id and not last.id:
            self.pieces[-1] = replace(last, text=last.text + piece.text)
        else:
            self.pieces.append(piece)

    def update(self, number: int) -> Update:
        """What is new since the last one."""
        pieces, tokens = self.pieces, self.tokens
        self.pieces, self.tokens = [], []
        if self.finish is None:
            return Update(number, pieces, tokens)
        usage = Usage(len(self.job.prompt), self.cached, self.completion, self.parser.reasoning_tokens)
        prompt_logprobs, embedding = (self.sample.prompt_logprobs, self.sample.embedding) if self.sample else (None, None)
        return Update(number, pieces, tokens, self.finish, self.stop, usage, prompt_logprobs, embedding)


def _refusal(error: APIError | ValueError) -> APIError:
    if isinstance(error, APIError):
        return error
    return APIError(400, str(error), param=str(error).partition(":")[0] if ":" in str(error) else None)
