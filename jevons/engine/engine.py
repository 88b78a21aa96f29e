"""The engine: token ids in, samples out.

One loop serves reinforcement learning, evaluation and the server: `submit` requests, call `step` until they are done. A
step is one forward of the model, the trainer's own module, over a flat batch of whatever the scheduler chose, with the
paged cache as attention context. Not thread-safe: one thread owns an engine. Not done: drafting, graphs, several devices.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Many
from typing import NamedTuple

import torch
from torch import Tensor

from jevons.engine.cache import Paged, Pool, bytes_per_token
from jevons.engine.sampling import sample
from jevons.engine.scheduler import Scheduler
from jevons.engine.sequence import Alternatives, Sample, SamplingParams, Sequence, StopReason
from jevons.model.folder import locate
from jevons.model.transformer import Transformer

CACHE_BYTES = 2**30  # memory is touched only where sequences reach


class Event(NamedTuple):
    """One new token of one request; `sample` is the whole answer when this token finished it. Log-probabilities as in `Sample`."""

    id: int
    token: int
    logp: float
    raw_logp: float
    logprobs: Alternatives
    sample: Sample | None


class Engine:
    """Continuous batching over one model, in its dtype and on its device.

    The cache holds `num_blocks` blocks, or as many as fit `cache_bytes` and `max_sequences` sequences of full length could
    use. `max_batch_tokens` bounds a step, so also how long a prompt's reading delays other requests' tokens. `stop_ids`
    default to the model's end-of-sequence ids; pass () to let only `max_tokens` stop.
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
    ) -> None:
        config, weight = model.config, model.model.embed_tokens.weight
        if num_blocks is None:
            useful = max_sequences * -(-config.max_position_embeddings // block_size)
            num_blocks = min(cache_bytes // (bytes_per_token(config, weight.dtype) * block_size), useful)
        self.model = model
        self.pool = Pool(config, dtype=weight.dtype, device=weight.device, num_blocks=num_blocks, block_size=block_size)
        self.scheduler = Scheduler(self.pool, max_batch_tokens, max_sequences)
        self.stop_ids = frozenset(config.eos_token_ids if stop_ids is None else stop_ids)
        self.max_length = min(config.max_position_embeddings, self.pool.num_blocks * block_size)
        self.version = 0
        self._sequences: dict[int, Sequence] = {}
        self._ids = itertools.count()

    @property
    def has_work(self) -> bool:
        return bool(self._sequences)

    def submit(self, prompt: Many[int], params: SamplingParams) -> int:
        """Queue a request; its id. An answer that reaches the model's positions or the whole cache stops with "length".

        Raises ValueError for a prompt that is empty, has ids outside the vocabulary, or leaves no room for a token.
        """
        config, tokens = self.model.config, list(prompt)
        if not tokens:
            raise ValueError("prompt: is empty; give at least one token")
        for i, token in enumerate(tokens):
            if not 0 <= token < config.vocab_size:
                raise ValueError(f"prompt: token {i} is {token}, outside the vocabulary of {config.vocab_size}")
        if len(tokens) >= config.max_position_embeddings:
            raise ValueError(f"prompt: {len(tokens)} tokens and one more exceed the model's {config.max_position_embeddings} positions")
        if len(tokens) >= self.max_length:
            raise ValueError(f"prompt: {len(tokens)} tokens and one more exceed the cache of {self.max_length}; raise num_blocks")
        if params.record_routes and not config.n_routed_experts:
            raise ValueError("record_routes: the model has no routed experts")
        stop_ids = self.stop_ids.union(params.stop_ids)
        sequence = Sequence(next(self._ids), tokens, params, stop_ids=stop_ids, max_length=self.max_length)
        self._sequences[sequence.id] = sequence
        self.scheduler.add(sequence)
        return sequence.id

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """One forward. Events of the requests that got a token; none while prompts are being read, or without work."""
        batch = self.scheduler.schedule()
        if not batch:
            return []
        batch.sort(key=lambda item: Paged.order(item[0].computed, item[1]))
        sequences = [sequence for sequence, _ in batch]
        new = [count for _, count in batch]
        attend = Paged(self.pool, [s.blocks for s in sequences], [s.computed for s in sequences], new)
        tokens = [t for s, count in batch for t in s.tokens[s.computed : s.computed + count]]
        output = self.model(torch.tensor(tokens, device=self.pool.device), attend.positions_T, attend)
        ends = list(itertools.accumulate(new))
        if any(s.params.record_routes for s in sequences):
            routes_TLK = torch.stack([r.experts_TK for r in output.routing], dim=1).to("cpu", torch.int16)
            for sequence, count, end in zip(sequences, new, ends):
                if sequence.params.record_routes:
                    sequence.record(routes_TLK[end - count : end])
        for sequence, count in batch:
            sequence.computed += count
        ready = [(s, end - 1) for s, end in zip(sequences, ends) if not s.pending]
        if not ready:
            return []
        hidden_SD = output.hidden_TD
        if len(ready) < len(hidden_SD):  # only rows that are sampled meet the vocabulary
            hidden_SD = hidden_SD[torch.tensor([row for _, row in ready], device=self.pool.device)]
        drawn = sample(self.model.logits(hidden_SD), [s.params for s, _ in ready], [s.generator for s, _ in ready])
        events = []
        for (sequence, _), token, logp, raw_logp, logprobs in zip(ready, *drawn):
            reason = sequence.append(token, logp, raw_logp, logprobs, self.version)
            finished = None if reason is None else self._finish(sequence, reason)
            events.append(Event(sequence.id, token, logp, raw_logp, logprobs, finished))
        return events

    def abort(self, id: int) -> Sample:
        """Drop a request at any moment; what it has so far. ValueError for an id that is unknown or already finished."""
        if id not in self._sequences:
            raise ValueError(f"id: no request {id} is under way (unknown, or finished already)")
        return self._finish(self._sequences[id], "abort")

    def _finish(self, sequence: Sequence, reason: StopReason) -> Sample:
        del self._sequences[sequence.id]
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
            self._abort_all()
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
            self._abort_all()

    def _abort_all(self) -> None:
        for id in list(self._sequences):
            self.abort(id)

    @torch.no_grad()
    def load_weights(self, items: Iterable[tuple[str, Tensor]], version: int) -> None:
        """New weights in place, under parameter or checkpoint names; the tied head and copies inside MTP modules may be left out.

        Requests under way keep their text and go on under the new weights: their caches are dropped and read again, since
        keys of old weights under queries of new ones belong to no model. Raises ValueError for an unknown name, a wrong shape or
        a missing tensor; the model is then a mixture, to be loaded again before use.
        """
        self.scheduler.preempt_all()
        slots = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        filled = dict.fromkeys(slots, 0)
        for name, tensor in items:
            target = locate(name, self.model.config)
            if target is None:
                continue
            slot, index = target
            if slot not in slots or (index and index[0] >= len(slots[slot])):
                raise ValueError(f"load_weights: {name} is no tensor of this model")
            destination = slots[slot][index] if index else slots[slot]
            if destination.shape != tensor.shape:
                raise ValueError(f"load_weights: {name} is {tuple(tensor.shape)}, the model's is {tuple(destination.shape)}")
            destination.copy_(tensor)
            filled[slot] += tensor.numel()
        if missing := [name for name, count in filled.items() if count != slots[name].numel()]:
            raise ValueError(f"load_weights: missing or incomplete: {', '.join(missing)}")
        self.version = version
