"""Who computes what in the next step: continuous batching with chunked prompts.

Every running sequence first gets its next token; what remains of the token budget goes to waiting prompts, in chunks, so
a long prompt delays the others by one step's budget at most. Waiting requests are served by priority, then fairly among
tenants (start-time fair queueing: each tenant's requests stand behind one another in its own virtual time, so one who sends a
hundred does not keep another's single one waiting), then in order. A newcomer whose prompt begins like one that was read
before starts with those blocks. When blocks run out the last running sequence in that order gives up its own and is read
again later from prompt and output: it loses time, never text.
"""

from __future__ import annotations

from bisect import insort

from jevons.engine.pool import Pool, chain_digest, salt
from jevons.engine.sequence import Sequence

EXPECTED = 256  # tokens of output that a request is charged for in its tenant's virtual time, at most


def _order(sequence: Sequence) -> tuple[int, float, int]:
    return -sequence.params.priority, sequence.turn, sequence.id


class Scheduler:
    """Queues over a pool, both in order of service. `version` is that of the weights, which the engine keeps."""

    def __init__(self, pool: Pool, max_batch_tokens: int, max_sequences: int, *, share_prefixes: bool = True) -> None:
        if not 1 <= max_sequences <= max_batch_tokens:
            raise ValueError(f"max_sequences: must be between 1 and max_batch_tokens {max_batch_tokens}, is {max_sequences}")
        self.pool, self.max_batch_tokens, self.max_sequences = pool, max_batch_tokens, max_sequences
        self.share_prefixes = share_prefixes
        self.version = 0
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.preemptions = self.prefix_queries = self.prefix_hits = 0  # the latter two in tokens
        self._now = 0.0
        self._booked: dict[str, float] = {}  # where each tenant's next request begins, in virtual time

    def add(self, sequence: Sequence) -> None:
        sequence.turn = max(self._now, self._booked.get(sequence.tenant, 0.0))
        self._booked[sequence.tenant] = sequence.turn + sequence.prompt_length + min(sequence.params.max_tokens, EXPECTED)
        insort(self.waiting, sequence, key=_order)

    def schedule(self) -> list[tuple[Sequence, int]]:
        """The next step: sequences and how many of their pending tokens to compute, drafts after them. Their blocks have room.

        A sequence whose pending tokens all fit brings its draft along where blocks are free, and else loses it.
        """
        budget, full = self.max_batch_tokens, False
        batch: list[tuple[Sequence, int]] = []
        for sequence in list(self.running):
            if sequence.state != "running" or budget == 0:  # given up for one before it, and so are all that follow
                break
            count = min(sequence.pending, budget)
            if full := not self._reserve(sequence, count):
                break  # no blocks for it, none for newcomers
            batch.append((sequence, count))
            budget -= count
        for sequence, _ in batch:
            room = self.pool.free - self.pool.blocks_for(sequence.computed + sequence.pending + len(sequence.draft)) + len(sequence.blocks)
            if not sequence.draft or sequence.pending > 1 or len(sequence.draft) > budget or room < 0:
                sequence.draft = []
                continue
            self._reserve(sequence, 1 + len(sequence.draft))
            budget -= len(sequence.draft)
        # whoever was given up just now stands first and does not fit: nobody slips past it
        while self.waiting and budget and not full and len(self.running) < self.max_sequences:
            sequence = self.waiting[0]
            self._begin(sequence)
            if self.pool.blocks_for(len(sequence.tokens)) - len(sequence.blocks) > self.pool.free:
                self._drop_cache(sequence)  # all of it must fit, or its second chunk would evict it again
                break
            self.waiting.pop(0)
            self._now = max(self._now, sequence.turn)
            insort(self.running, sequence, key=_order)
            sequence.state, sequence.draft = "running", []
            if sequence.cached is None:
                sequence.cached = min(sequence.computed, sequence.prompt_length)
                self.prefix_queries += sequence.prompt_length
                self.prefix_hits += sequence.cached
            count = min(sequence.pending, budget)
            reserved = self._reserve(sequence, count)
            assert reserved
            batch.append((sequence, count))
            budget -= count
        assert batch or not self.waiting, "a sequence that fits the pool waits for nobody"
        if not self.waiting:
            self._booked = {tenant: at for tenant, at in self._booked.items() if at > self._now}
        return batch

    def computed(self, sequence: Sequence, count: int) -> None:
        """`count` more tokens are in the cache; blocks that they filled become findable."""
        block, before = self.pool.block_size, sequence.computed
        sequence.computed += count
        if not self.share_prefixes:
            return
        self._extend_digests(sequence, sequence.computed // block)
        for i in range(before // block, sequence.computed // block):
            self.pool.publish(sequence.blocks[i], sequence.digests[i])

    def remove(self, sequence: Sequence) -> None:
        """Finished or aborted: its blocks are free at once."""
        (self.running if sequence.state == "running" else self.waiting).remove(sequence)
        self._drop_cache(sequence)
        sequence.state = "finished"

    def new_weights(self, version: int) -> None:
        """Give up every cache: the weights changed. The order of service stays."""
        while self.running:
            self._preempt(self.running[-1])
        self.pool.forget_all()
        self.version = version
        for sequence in self.waiting:
            sequence.digests = []

    def _begin(self, sequence: Sequence) -> None:
        """Take the known blocks that its tokens begin with; at least one token is left to compute."""
        if self.share_prefixes and sequence.shares_prefix:
            self._extend_digests(sequence, (len(sequence.tokens) - 1) // self.pool.block_size)
            sequence.blocks = self.pool.take_known(sequence.digests[: (len(sequence.tokens) - 1) // self.pool.block_size])
            sequence.computed = len(sequence.blocks) * self.pool.block_size

    def _extend_digests(self, sequence: Sequence, count: int) -> None:
        block, digests = self.pool.block_size, sequence.digests
        for i in range(len(digests), count):
            digests.append(
                chain_digest(digests[-1] if digests else salt(self.version, sequence.tenant), sequence.tokens[i * block : (i + 1) * block])
            )

    def _reserve(self, sequence: Sequence, count: int) -> bool:
        """Blocks for `count` more tokens, taken from the last in order if need be; False if that is the sequence itself."""
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
        self.preemptions += 1
        self.running.remove(victim)
        self._drop_cache(victim)
        victim.state = "waiting"
        insort(self.waiting, victim, key=_order)

    def _drop_cache(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks, sequence.draft = [], []
        sequence.computed = 0
