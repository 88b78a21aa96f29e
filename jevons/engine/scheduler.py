"""Who computes what in the next step: continuous batching with chunked prompts.

Every running sequence first gets its next token; what remains of the token budget goes to waiting prompts, in chunks, so
a long prompt delays the others by one step's budget at most. When blocks run out the youngest running sequence gives up
its own and is read again later from prompt and output: it loses time, never text. Not done: priorities, reuse of common
prefixes (a sequence would start with `blocks` and `computed` above 0; nothing else here assumes 0).
"""

from __future__ import annotations

from collections import deque

from jevons.engine.cache import Pool
from jevons.engine.sequence import Sequence


class Scheduler:
    """Queues over a pool. `running` is in order of admission, `waiting` in order of service."""

    def __init__(self, pool: Pool, max_batch_tokens: int, max_sequences: int) -> None:
        if not 1 <= max_sequences <= max_batch_tokens:
            raise ValueError(f"max_sequences: must be between 1 and max_batch_tokens {max_batch_tokens}, is {max_sequences}")
        self.pool, self.max_batch_tokens, self.max_sequences = pool, max_batch_tokens, max_sequences
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def schedule(self) -> list[tuple[Sequence, int]]:
        """The next step: sequences and how many of their pending tokens to compute. Their blocks have room for them."""
        budget = self.max_batch_tokens
        batch: list[tuple[Sequence, int]] = []
        for sequence in list(self.running):
            if sequence.state != "running" or budget == 0:  # given up for an older one, and so are all that follow
                break
            count = min(sequence.pending, budget)
            if not self._reserve(sequence, count):
                return batch  # no blocks for it, none for newcomers
            batch.append((sequence, count))
            budget -= count
        # whoever was given up just now stands first and does not fit: nobody slips past it
        while self.waiting and budget and len(self.running) < self.max_sequences:
            sequence = self.waiting[0]
            if self.pool.blocks_for(len(sequence.tokens)) > self.pool.free:  # all of it, or its second chunk would evict it again
                break
            self.waiting.popleft()
            self.running.append(sequence)
            sequence.state = "running"
            count = min(sequence.pending, budget)
            reserved = self._reserve(sequence, count)
            assert reserved
            batch.append((sequence, count))
            budget -= count
        assert batch or not self.waiting, "a sequence that fits the pool waits for nobody"
        return batch

    def remove(self, sequence: Sequence) -> None:
        """Finished or aborted: its blocks are free at once."""
        (self.running if sequence.state == "running" else self.waiting).remove(sequence)
        self._drop_cache(sequence)
        sequence.state = "finished"

    def preempt_all(self) -> None:
        """Give up every cache: the weights changed. The order of service stays."""
        while self.running:
            self._preempt(self.running[-1])

    def _reserve(self, sequence: Sequence, count: int) -> bool:
        """Blocks for `count` more tokens, taken from the youngest if need be; False if that is the sequence itself."""
        need = self.pool.blocks_for(sequence.computed + count) - len(sequence.blocks)
        while need > self.pool.free:
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        if need > 0:
            sequence.blocks += self.pool.allocate(need)
        return True

    def _preempt(self, victim: Sequence) -> None:
        self.running.remove(victim)
        self._drop_cache(victim)
        victim.state = "waiting"
        self.waiting.appendleft(victim)

    def _drop_cache(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        sequence.computed = 0
