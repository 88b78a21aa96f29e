"""The engine: token ids in, samples out.

One loop serves reinforcement learning, evaluation and the server: `submit` requests, call `step` until they are done. A
step is one forward of the model, the trainer's own module, over a flat batch of whatever the scheduler chose, with the
paged cache as attention context. Not thread-safe: one thread owns an engine. Not done: graphs, several devices.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Many
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from jevons.engine.cache import Paged
from jevons.engine.constraint import Constraint
from jevons.engine.draft import MTP, Drafter, NGram, Step
from jevons.engine.packed import is_packed
from jevons.engine.pool import Pool, bytes_per_token
from jevons.engine.runner import Runner
from jevons.engine.sampling import alternatives, sample
from jevons.engine.scheduler import Scheduler
from jevons.engine.sequence import Alternatives, Grammar, Sample, SamplingParams, Sequence, StopReason
from jevons.engine.weights import fill
from jevons.model.transformer import Transformer

CACHE_BYTES = 2**30  # memory is touched only where sequences reach
SCORED = 64  # prompt rows whose logits are held at once


class Event(NamedTuple):
    """One new token of one request; `sample` is the whole answer when this token finished it. Other fields as in `Sample`."""

    id: int
    token: int
    logp: float
    raw_logp: float
    logprobs: Alternatives
    cached: int
    seconds: float
    sample: Sample | None


class Engine:
    """Continuous batching over one model, in its dtype and on its device.

    The cache holds `num_blocks` blocks, or as many as fit `cache_bytes` and `max_sequences` sequences of full length could
    use. `max_batch_tokens` bounds a step, so also how long a prompt's reading delays other requests' tokens. `stop_ids`
    default to the model's end-of-sequence ids; pass () to let only `max_tokens` stop. `share_prefixes` keeps what was read
    for prompts that begin alike. `draft` guesses tokens ahead, `draft_tokens` at a time, while at most `draft_rows` rows
    would be computed: "mtp" by the model's own module, "ngram" by repetition; the text is the same either way.
    `use_native`: whether layers, attention and sampling go through the native kernels; None: where they are available.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        num_blocks: int | None = None,
        cache_bytes: int = CACHE_BYTES,
        block_size: int = 16,
        max_batch_tokens: int = 2048,
        max_sequences: int = 64,
        stop_ids: Iterable[int] | None = None,
        share_prefixes: bool = True,
        draft: Literal["mtp", "ngram"] | None = None,
        draft_tokens: int = 1,
        draft_rows: int = 8,
        use_native: bool | None = None,
    ) -> None:
        config, weight = model.config, model.model.embed_tokens.weight
        if draft == "mtp" and not config.num_nextn_predict_layers:
            raise ValueError("draft: the model has no multi-token-prediction module (or it was loaded without); use 'ngram'")
        if draft and draft_tokens < 1:
            raise ValueError(f"draft_tokens: must be at least 1, is {draft_tokens}")
        if num_blocks is None:
            useful = max_sequences * -(-config.max_position_embeddings // block_size)
            num_blocks = min(cache_bytes // (bytes_per_token(config, weight.dtype) * block_size), useful)
        self.model = model
        self.pool = Pool(
            config, dtype=weight.dtype, device=weight.device, num_blocks=num_blocks, block_size=block_size, use_native=use_native
        )
        self.scheduler = Scheduler(self.pool, max_batch_tokens, max_sequences, share_prefixes=share_prefixes)
        self.stop_ids = frozenset(config.eos_token_ids if stop_ids is None else stop_ids)
        self.max_length = min(config.max_position_embeddings, self.pool.num_blocks * block_size)
        self.runner = Runner(model, self.pool.native)
        self.draft, self.draft_tokens = draft, draft_tokens
        self.drafter: Drafter | None = None
        if draft is not None:
            self.drafter = NGram(draft_tokens, draft_rows) if draft == "ngram" else MTP(self.runner, self.pool, draft_tokens, draft_rows)
        self.drafted = self.accepted = self.prompt_tokens = self.drawn_tokens = self.steps = 0
        self._sequences: dict[int, Sequence] = {}
        self._constraints: dict[int, Constraint] = {}
        self._ids = itertools.count()

    @property
    def version(self) -> int:
        return self.scheduler.version

    @property
    def has_work(self) -> bool:
        return bool(self._sequences)

    def snapshot(self) -> dict[str, float]:
        """Numbers for whoever watches: what runs now, and counts since the engine was made (prefixes in tokens)."""
        scheduler, pool = self.scheduler, self.pool
        return {
            "running": len(scheduler.running),
            "waiting": len(scheduler.waiting),
            "max_sequences": scheduler.max_sequences,
            "total_blocks": pool.num_blocks,
            "used_blocks": pool.num_blocks - pool.free,
            "cached_blocks": pool.idle,
            "prefix_queries": scheduler.prefix_queries,
            "prefix_hits": scheduler.prefix_hits,
            "preemptions": scheduler.preemptions,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "prompt_tokens": self.prompt_tokens,
            "drawn_tokens": self.drawn_tokens,
            "steps": self.steps,
        }

    def submit(self, prompt: Many[int], params: SamplingParams, *, tenant: str = "", grammar: Grammar | None = None) -> int:
        """Queue a request; its id. An answer that reaches the model's positions or the whole cache stops with "length".

        Prefixes are shared, and service is fair, by `tenant`. Raises ValueError for a prompt that is empty, has ids outside
        the vocabulary, or leaves no room for a token.
        """
        config, tokens = self.model.config, list(prompt)
        if not tokens:
            raise ValueError("prompt: is empty; give at least one token")
        if min(tokens) < 0 or max(tokens) >= config.vocab_size:
            i = next(i for i, token in enumerate(tokens) if not 0 <= token < config.vocab_size)
            raise ValueError(f"prompt: token {i} is {tokens[i]}, outside the vocabulary of {config.vocab_size}")
        if len(tokens) >= config.max_position_embeddings:
            raise ValueError(f"prompt: {len(tokens)} tokens and one more exceed the model's {config.max_position_embeddings} positions")
        if len(tokens) >= self.max_length:
            raise ValueError(f"prompt: {len(tokens)} tokens and one more exceed the cache of {self.max_length}; raise num_blocks")
        if params.record_routes and not config.n_routed_experts and not config.memory_layers:
            raise ValueError("record_routes: the model has no routed experts and no memory layers")
        if any(i >= config.vocab_size for i, _ in params.logit_bias):
            raise ValueError(f"logit_bias: a token id is outside the vocabulary of {config.vocab_size}")
        stop_ids = self.stop_ids.union(params.stop_ids)
        sequence = Sequence(next(self._ids), tokens, params, stop_ids=stop_ids, max_length=self.max_length, tenant=tenant)
        if Constraint.wanted(params, grammar):
            self._constraints[sequence.id] = Constraint(tokens, params, stop_ids, grammar)
        self.pool.open()
        if params.record_routes and not self.pool.records:
            self.runner.record()
            self.scheduler.preempt_all()
            self.pool.record()
        self._sequences[sequence.id] = sequence
        self.scheduler.add(sequence)
        return sequence.id

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """One forward. Events of the requests that got tokens; none while prompts are being read, or without work."""
        start = time.perf_counter()
        if self.drafter:
            self.drafter.before(self.scheduler.running, self._may_draft)
        batch = self.scheduler.schedule()
        if not batch:
            return []
        batch.sort(key=lambda item: Paged.order(item[0].computed, item[1] + len(item[0].draft)))
        new = [count + len(s.draft) for s, count in batch]
        sequences, firsts = [s for s, _ in batch], [s.computed for s, _ in batch]
        attend = Paged(self.pool, [s.blocks for s in sequences], firsts, new)
        tokens = [t for s, count in batch for t in s.tokens[s.computed : s.computed + count] + s.draft]
        hidden_TD, routing = self.runner(torch.tensor(tokens, device=self.pool.device), attend)
        ends = list(itertools.accumulate(new))
        if self.pool.routes is not None:
            routes_TLK = torch.stack([r.experts_TK for r in routing], dim=1)
            self.pool.routes.index_copy_(0, attend.slots_T, routes_TLK.to(self.pool.routes.dtype))
        if self.pool.picks is not None:
            self.pool.picks.index_copy_(0, attend.slots_T, self.runner.picks().int())
        for (sequence, count), end in zip(batch, ends):
            known = slice(end - len(sequence.draft) - count, end - len(sequence.draft))
            if sequence.params.prompt_logprobs is not None:
                self._score_prompt(sequence, hidden_TD[known])
            if sequence.params.embed:
                sequence.pool(hidden_TD[known])
        events = self._draw(batch, ends, hidden_TD, start)
        if self.drafter:
            self.drafter.after(Step(sequences, firsts, ends, tokens, hidden_TD, attend), self._may_draft)
        self.steps += 1
        self.prompt_tokens += len(tokens) - len(events)
        self.drawn_tokens += len(events)
        return events

    def _draw(self, batch: list[tuple[Sequence, int]], ends: list[int], hidden_TD: Tensor, start: float) -> list[Event]:
        """Draw from the rows whose tokens are all computed, drafts while the draws agree with them. The step began at `start`."""
        ready = [(s, end - 1 - len(s.draft)) for (s, count), end in zip(batch, ends) if count == s.pending]
        for sequence, count in batch:
            if count < sequence.pending:
                self.scheduler.computed(sequence, count)
        if not ready:
            self._charge(batch, ends[-1], start)
            return []
        rows = [(s, row + j, j) for s, row in ready for j in range(1 + len(s.draft))]
        if len(rows) < len(hidden_TD):  # only rows that are sampled meet the vocabulary
            hidden_TD = hidden_TD[torch.tensor([row for _, row, _ in rows], device=self.pool.device)]
        logits_SW = self.runner.logits(hidden_TD)
        allowed_SW = None
        for i, (sequence, _, _) in enumerate(rows):
            if constraint := self._constraints.get(sequence.id):
                allowed_SW = logits_SW.clone() if allowed_SW is None else allowed_SW
                constraint.apply(allowed_SW[i])
        uniforms = [0.0 if s.params.greedy else s.uniform(j) for s, _, j in rows]
        drawn = sample(logits_SW, [s.params for s, _, _ in rows], uniforms, allowed_SW, use_native=self.pool.native)
        self._charge(batch, ends[-1], start)
        events, at = [], 0
        for sequence, _ in ready:
            draft, sequence.draft = sequence.draft, []
            constraint = self._constraints.get(sequence.id)
            before = len(sequence.tokens) - sequence.computed
            for j in range(1 + len(draft)):
                i = at + j
                token, logp, raw_logp, support = drawn.tokens[i], drawn.logps[i], drawn.raw_logps[i], drawn.supports[i]
                if constraint and (instead := constraint.replace(token)) != token:
                    raw_logp += (logits_SW[i, instead] - logits_SW[i, token]).item()
                    token, logp, support = instead, 0.0, torch.tensor([instead], dtype=torch.int32)
                if constraint:
                    constraint.accept(token)
                reason = sequence.append(token, logp, raw_logp, drawn.logprobs[i], support, self.version)
                if reason is not None or j == len(draft) or token != draft[j]:
                    break
            self.drafted += len(draft)
            self.accepted += j
            self.scheduler.computed(sequence, before + j)
            finished = None if reason is None else self._finish(sequence, reason)
            for i in range(j + 1):
                back = i - 1 - j
                scores = (sequence.logps[back], sequence.raw_logps[back], drawn.logprobs[at + i])
                last = finished if i == j else None
                events.append(Event(sequence.id, sequence.tokens[back], *scores, sequence.cached or 0, sequence.seconds, last))
            at += 1 + len(draft)
        return events

    def _charge(self, batch: list[tuple[Sequence, int]], rows: int, start: float) -> None:
        """Share the step's time so far among its sequences, by the rows that each brought."""
        share = (time.perf_counter() - start) / rows
        for sequence, count in batch:
            sequence.seconds += share * (count + len(sequence.draft))

    def _may_draft(self, sequence: Sequence) -> bool:
        return sequence.id not in self._constraints

    def _score_prompt(self, sequence: Sequence, hidden_LD: Tensor) -> None:
        """Log-probabilities of the prompt's tokens that follow the rows just computed."""
        wanted, done = sequence.params.prompt_logprobs, sequence.prompt_logprobs
        assert wanted is not None
        first = sequence.computed + 1
        for start in range(max(0, len(done) + 1 - first), min(len(hidden_LD), sequence.prompt_length - first), SCORED):
            targets = sequence.tokens[first + start : min(first + start + SCORED, first + len(hidden_LD), sequence.prompt_length)]
            logits_LW = self.runner.logits(hidden_LD[start : start + len(targets)])
            chosen_L = logits_LW.gather(1, torch.tensor(targets, device=logits_LW.device)[:, None])[:, 0] - logits_LW.logsumexp(-1)
            done += zip(chosen_L.tolist(), alternatives(logits_LW, [wanted] * len(targets)))

    def abort(self, id: int) -> Sample:
        """Drop a request at any moment; what it has so far. ValueError for an id that is unknown or already finished."""
        if id not in self._sequences:
            raise ValueError(f"id: no request {id} is under way (unknown, or finished already)")
        return self._finish(self._sequences[id], "abort")

    def _finish(self, sequence: Sequence, reason: StopReason) -> Sample:
        del self._sequences[sequence.id]
        self._constraints.pop(sequence.id, None)
        if self.drafter:
            self.drafter.forget(sequence.id)
        self.scheduler.remove(sequence)
        return sequence.sample(reason, self.version)

    def generate(
        self,
        prompts: Many[Many[int]],
        params: SamplingParams | Many[SamplingParams],
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Sample]:
        """Samples of all prompts, in their order. `progress(samples finished, tokens drawn)` is called after each step.

        Needs the engine to itself: ValueError where other requests are under way. Leaves none behind, whatever happens.
        """
        if self.has_work:
            raise ValueError("generate: other requests are under way; use submit and step")
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise ValueError(f"params: {len(each)} for {len(prompts)} prompts; give one for all, or one each")
        samples: dict[int, Sample] = {}
        tokens = 0
        try:
            ids = [self.submit(*request) for request in zip(prompts, each)]
            while self.has_work:
                events = self.step()
                tokens += len(events)
                samples.update((event.id, event.sample) for event in events if event.sample is not None)
                if progress is not None:
                    progress(len(samples), tokens)
        finally:
            self.abort_all()
        return [samples[id] for id in ids]

    def stream(self, prompt: Many[int], params: SamplingParams) -> Iterator[int]:
        """Tokens of one prompt as they come. Needs the engine to itself; a caller who stops listening aborts the request."""
        if self.has_work:
            raise ValueError("stream: other requests are under way; use submit and step")
        self.submit(prompt, params)
        try:
            while self.has_work:
                for event in self.step():
                    yield event.token
        finally:
            self.abort_all()

    def abort_all(self) -> None:
        """Drop every request."""
        for id in list(self._sequences):
            self.abort(id)

    def new_weights(self, version: int) -> None:
        """The model's weights were changed where they are, by a trainer say: forget everything that the old ones computed.

        Nothing is copied. Requests under way keep their text and go on under the new weights: their caches are dropped and
        read again, since keys of old weights under queries of new ones belong to no model. Raises ValueError where the weights
        are packed: the engine has its own copy of them.
        """
        if is_packed(self.model):
            raise ValueError("new_weights, load_weights: the weights are packed, a copy that cannot be changed; load them without packing")
        self.scheduler.new_weights(version)
        self.runner.new_weights()

    def load_weights(self, items: Iterable[tuple[str, Tensor]], version: int) -> None:
        """`new_weights` that are copied in, under parameter or checkpoint names (engine/weights.py).

        Raises ValueError for an unknown name, a wrong shape or a missing tensor; the model is then a mixture, to be loaded
        again before use.
        """
        self.new_weights(self.version)
        fill(self.model, items)
        self.scheduler.version = version

    def release(self) -> None:
        """Give the cache's memory back until the next request. ValueError while requests are under way."""
        if self.has_work:
            raise ValueError("release: requests are under way; finish or abort them first")
        self.pool.close()
        self.runner.release()
