"""Guesses at the next tokens, checked by the model in the same step as the token before them.

Weights are read once a step however many rows they serve, so a few guessed tokens cost little and each right one saves a
step. Verification draws at every row exactly as it would have without a draft, with the same uniform number of the
sequence's own, and goes on while the draw is what was guessed: so the text is the same with and without drafting, greedy
or sampled, token for token, and not only alike in distribution. A guess is a single token (a distribution of one point),
for which this is also the rejection rule of speculative sampling (arXiv 2211.17192): accepted with probability p(guess).

`NGram` needs no model: it proposes what followed the last few tokens when they stood earlier in the same text.
The MTP module's guesses (`Engine(draft="mtp")`, DeepSeek-V3 section 2.2) are made in engine/engine.py, where its hidden
states are. Not done: trees of guesses, and drafts under grammars and penalties.
"""

from __future__ import annotations

from jevons.engine.sequence import Sequence

LONGEST, SHORTEST = 4, 2  # tokens that must recur


class NGram:
    """Where each run of 2 to 4 tokens of each sequence last went on; grows with the sequence, forgotten with it."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[int, dict[tuple[int, ...], int]]] = {}  # id -> tokens indexed, run -> where it went on

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
