"""Who computes what in the next step: continuous batching with chunked prompts.

Every running sequence first gets its next token; what remains of the token budget goes to waiting prompts, in chunks, so
a long prompt delays the others by one step's budget at most. Waiting requests are served by priority, then fairly among
tenants (start-time fair queueing: each tenant's requests stand behind one another in its own virtual time, so one who sends a
hundred does not keep another's single one waiting), then in order. A newcomer whose prompt begins like one that was read
before starts with those blocks; if that one is being read just now it waits for it, its place and its blocks kept free, so that
many answers to one prompt read it once. When blocks run out the last running sequence in that order gives up its own and is read
again later from prompt and output: it loses time, never text.
"""

from __future__ import annotations

from bisect import insort

from jevons.engine.pool import Pool, chain_digest, salt
from jevons.engine.sequence import Sequence

EXPECTED = 256  # tokens of output that a request is charged for in its tenant's virtual time, at most


Reading = dict[bytes, tuple[int, float, int]]  # blocks being read, and the earliest reader's place in the order of service


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
        held = blocks_held = 0  # of newcomers that wait for what others read
        reading: Reading = {}
        for sequence in self.running if self.waiting else []:
            self._add_reading(reading, sequence)
        for sequence in list(self.waiting) if not full else []:
            if not budget or len(self.running) + held >= self.max_sequences:
                break
            need = self.pool.blocks_for(len(sequence.tokens))
            if (shared := self._worth_waiting(sequence, reading)) is not None:
                held, blocks_held = held + 1, blocks_held + need - shared
                continue
            self._begin(sequence)
            # whoever was given up just now stands first and does not fit: nobody slips past it
            if need - len(sequence.blocks) > self.pool.free - blocks_held:
                self._drop_cache(sequence)  # all of it must fit, or its second chunk would evict it again
                break
            self._copy_start(sequence)
            self.waiting.remove(sequence)
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
            self._add_reading(reading, sequence)
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
        if before < sequence.prompt_length <= sequence.computed and (start := self._start(sequence, sequence.prompt_length)):
            self.pool.publish_start(sequence.blocks[(sequence.prompt_length - 1) // block], start)

    def remove(self, sequence: Sequence) -> None:
        """Finished or aborted: its blocks are free at once."""
        (self.running if sequence.state == "running" else self.waiting).remove(sequence)
        self._keep_routes(sequence)
        self._drop_cache(sequence)
        sequence.state = "finished"

    def new_weights(self, version: int) -> None:
        """Give up every cache: the weights changed. The order of service stays."""
        self.preempt_all()
        self.pool.forget_all()
        self.version = version
        for sequence in self.waiting:
            sequence.digests = []

    def preempt_all(self) -> None:
        while self.running:
            self._preempt(self.running[-1])

    def _shares(self, sequence: Sequence) -> bool:
        return self.share_prefixes and sequence.shares_prefix

    def _digests(self, sequence: Sequence) -> list[bytes]:
        """Of the full blocks that it may take from others; at least one token is left to compute."""
        if not self._shares(sequence):
            return []
        count = (len(sequence.tokens) - 1) // self.pool.block_size
        self._extend_digests(sequence, count)
        return sequence.digests[:count]

    def _start(self, sequence: Sequence, length: int) -> bytes | None:
        """The digest of the tokens before token length - 1 in its block, and of all before; None where there are none in its block."""
        full, rest = divmod(length - 1, self.pool.block_size)
        self._extend_digests(sequence, full)
        return self._digest(sequence, full, length - 1) if rest and self._shares(sequence) else None

    def _begin(self, sequence: Sequence) -> None:
        """Take the known blocks that its tokens begin with."""
        sequence.blocks = self.pool.take_known(self._digests(sequence))
        sequence.computed = len(sequence.blocks) * self.pool.block_size

    def _copy_start(self, sequence: Sequence) -> None:
        """Where it has all its full blocks, and another one's next block begins as its own will: copy that, and one token is left."""
        length, block = len(sequence.tokens), self.pool.block_size
        start = self._start(sequence, length) if sequence.computed + block >= length else None
        if start is not None and self.pool.has_start(start):
            sequence.blocks += self.pool.allocate(1)
            self.pool.copy_start(start, sequence.blocks[-1], length - 1 - sequence.computed)
            sequence.computed = length - 1

    def _add_reading(self, reading: Reading, sequence: Sequence) -> None:
        """Note what a running sequence is about to read."""
        if not self._shares(sequence) or sequence.pending == 1:
            return
        end = len(sequence.tokens) // self.pool.block_size
        self._extend_digests(sequence, end)
        start = self._start(sequence, sequence.prompt_length) if sequence.computed < sequence.prompt_length else None
        for digest in (*sequence.digests[sequence.computed // self.pool.block_size : end], start):
            if digest is not None:
                reading[digest] = min(reading.get(digest, _order(sequence)), _order(sequence))

    def _worth_waiting(self, sequence: Sequence, reading: Reading) -> int | None:
        """How many full blocks it can take if it waits for others to read them; None if it would rather begin now.

        It waits for those only that stand before it in the order of service, and if most of what it would read is read by them.
        """
        if not reading:
            return None
        mine, length, block = _order(sequence), len(sequence.tokens), self.pool.block_size
        digests = self._digests(sequence)
        known = next((i for i, digest in enumerate(digests) if not self.pool.is_known(digest)), len(digests))
        soon = known
        while soon < len(digests) and reading.get(digests[soon], mine) < mine:
            soon += 1
        there = soon * block
        if soon == len(digests) and reading.get(self._start(sequence, length) or b"", mine) < mine:
            there = length - 1
        return soon if there - known * block > length - there else None

    def _extend_digests(self, sequence: Sequence, count: int) -> None:
        for i in range(len(sequence.digests), count):
            sequence.digests.append(self._digest(sequence, i, (i + 1) * self.pool.block_size))

    def _digest(self, sequence: Sequence, block: int, end: int) -> bytes:
        previous = sequence.digests[block - 1] if block else salt(self.version, sequence.tenant)
        return chain_digest(previous, sequence.tokens[block * self.pool.block_size : end])

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
        self._keep_routes(victim)
        self._drop_cache(victim)
        victim.state = "waiting"
        insort(self.waiting, victim, key=_order)

    def _keep_routes(self, sequence: Sequence) -> None:
        """Of tokens that led to drawn ones: read again, they may be routed otherwise. The rest is recorded when it has led to some."""
        drawn = len(sequence.tokens) > sequence.prompt_length
        if sequence.params.record_routes and drawn and sequence.computed > sequence.routed:
            sequence.record(*self.pool.recorded(sequence.blocks, sequence.routed, sequence.computed))

    def _drop_cache(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks, sequence.draft = [], []
        sequence.computed = 0
