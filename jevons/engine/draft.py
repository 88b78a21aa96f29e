"""Guesses at the next tokens, checked by the model in the same step as the token before them.

Weights are read once a step however many rows they serve, so a few guessed tokens cost little and each right one saves a
step. Verification draws at every row exactly as it would have without a draft, with the same uniform number of the
sequence's own, and goes on while the draw is what was guessed: so the text is the same with and without drafting, greedy
or sampled, token for token, and not only alike in distribution. A guess is a single token (a distribution of one point),
for which this is also the rejection rule of speculative sampling (arXiv 2211.17192): accepted with probability p(guess).

`NGram` needs no model: it proposes what followed the last few tokens when they stood earlier in the same text. `MTP` asks
the model's own multi-token-prediction module (DeepSeek-V3 section 2.2). Not done: trees of guesses, and drafts under
grammars and penalties.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from jevons.engine.cache import Paged
from jevons.engine.pool import Pool
from jevons.engine.runner import Runner
from jevons.engine.sequence import Sequence

LONGEST, SHORTEST = 4, 2  # tokens that must recur


Wanted = Callable[[Sequence], bool]  # whether a sequence may be drafted for


class Step(NamedTuple):
    """One forward: its sequences in order, the position of each one's first row, where its rows end, and what was computed."""

    sequences: list[Sequence]
    firsts: list[int]
    ends: list[int]
    tokens: list[int]
    hidden_TD: Tensor
    attend: Paged


class Drafter(Protocol):
    """Sets `Sequence.draft`, `tokens` guesses at most, while at most `rows` rows would be computed."""

    def before(self, running: list[Sequence], wanted: Wanted) -> None:
        """Called before a step is scheduled."""

    def after(self, step: Step, wanted: Wanted) -> None:
        """Called when a step's tokens are drawn."""

    def forget(self, id: int) -> None:
        """The sequence is finished."""


class NGram:
    """Where each run of 2 to 4 tokens of each sequence last went on; grows with the sequence, forgotten with it."""

    def __init__(self, tokens: int = 1, rows: int = 8) -> None:
        self.tokens, self.rows = tokens, rows
        self._seen: dict[int, tuple[int, dict[tuple[int, ...], int]]] = {}  # id -> tokens indexed, run -> where it went on

    def before(self, running: list[Sequence], wanted: Wanted) -> None:
        if len(running) * 2 > self.rows:
            return
        for sequence in running:
            if sequence.pending == 1 and wanted(sequence):
                each = self.rows // len(running) - 1
                sequence.draft = self.propose(sequence, min(each, self.tokens, sequence.max_length - len(sequence.tokens) - 1))

    def after(self, step: Step, wanted: Wanted) -> None:
        pass

    def propose(self, sequence: Sequence, count: int) -> list[int]:
        """At most `count` tokens that may follow; none where the text does not repeat itself."""
        tokens = sequence.tokens
        start, index = self._seen.get(sequence.id, (SHORTEST, {}))
        for end in range(start, len(tokens)):
            for n in range(SHORTEST, min(LONGEST, end) + 1):
                index[tuple(tokens[end - n : end])] = end
        self._seen[sequence.id] = len(tokens), index
        for n in range(min(LONGEST, len(tokens) - 1), SHORTEST - 1, -1):
            at = index.get(tuple(tokens[-n:]))
            if at is not None:
                period = tokens[at:]
                return [period[i % len(period)] for i in range(count)]  # past the end it repeats itself, as loops do
        return []

    def forget(self, id: int) -> None:
        self._seen.pop(id, None)


class MTP:
    """Guesses of the model's own module, whose cache lies beside the layers' in the pool."""

    def __init__(self, runner: Runner, pool: Pool, tokens: int, rows: int) -> None:
        self.runner, self.pool, self.tokens, self.rows = runner, pool, tokens, rows

    def before(self, running: list[Sequence], wanted: Wanted) -> None:
        pass

    def forget(self, id: int) -> None:
        pass

    def after(self, step: Step, wanted: Wanted) -> None:
        """Run the module over the step's rows, so that its cache keeps up, and take its guesses as drafts.

        Row by row it reads the hidden state and the token that came after. Rows of refused drafts leave keys that the next
        step writes over. Further guesses feed the module its own output, as it was not trained to: each is likelier wrong.
        """
        device = self.pool.device
        following = torch.tensor([*step.tokens[1:], 0])
        rows: list[tuple[Sequence, int]] = []
        running = [s for s in step.sequences if s.state == "running"]
        few = 2 * len(running) <= self.rows
        for sequence, first, start, end in zip(step.sequences, step.firsts, [0, *step.ends], step.ends):
            if sequence.state != "running":
                continue
            known = sequence.tokens[first + 1 : first + 1 + end - start]
            following[start : start + len(known)] = torch.tensor(known)
            if sequence.pending == 1 and few and wanted(sequence) and len(sequence.tokens) + 1 < sequence.max_length:
                rows.append((sequence, start + len(known) - 1))
        guess_TD = self.runner.mtp(step.hidden_TD, following.to(device), step.attend)
        guess_SD = guess_TD[torch.tensor([row for _, row in rows], device=device, dtype=torch.int64)]
        drafted = [sequence for sequence, _ in rows]
        for depth in range(self.tokens):
            if not drafted:
                return
            next_S = self.runner.logits(guess_SD).argmax(-1)
            for sequence, token in zip(drafted, next_S.tolist()):
                sequence.draft.append(token)
            if depth + 1 == self.tokens or (2 + depth) * len(running) > self.rows:
                return
            keep = [i for i, s in enumerate(drafted) if self._has_room(s)]
            drafted = [drafted[i] for i in keep]
            if not drafted:
                return
            where = torch.tensor(keep, device=device)
            cached = [s.computed + len(s.draft) - 1 for s in drafted]
            ahead = Paged(self.pool, [s.blocks for s in drafted], cached, [1] * len(drafted))
            guess_SD = self.runner.mtp(guess_SD[where], next_S[where], ahead)

    def _has_room(self, sequence: Sequence) -> bool:
        """For one guess more than it has, and for what the guess before it leaves in the cache."""
        ahead, blocks = len(sequence.draft), len(sequence.blocks)
        return len(sequence.tokens) + ahead + 1 < sequence.max_length and self.pool.blocks_for(sequence.computed + ahead) <= blocks
