"""Chats to be fine-tuned on: whole, or cut to the window, with which tokens the assistant wrote.

They lie in a shard folder whose mask says that (data/shard.py). Each is a segment of its own in a packed batch, so nothing is padded and
none sees another. The order is a function of the seed alone, as the windows of pretraining, so a run resumes by its step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Literal

import numpy as np
import torch

from jevons.data.batch import Batch, pack, permute
from jevons.data.shard import Shards
from jevons.model.attend import Packed
from jevons.model.transformer import Transformer
from jevons.train.loss import answer_token


@dataclass
class Conversations:
    """Those chats of a shard folder that have something to learn, as (start, stop) in its stream; and how many were changed or left out."""

    shards: Shards
    spans: list[tuple[int, int]]
    cut: int = 0  # to the window
    too_long: int = 0  # left out
    unlearnable: int = 0  # left out: nothing in the window that the assistant wrote

    @classmethod
    def fit(cls, shards: Shards, length: int, too_long: Literal["cut", "drop"]) -> Conversations:
        """Those that fit `length` tokens, the others cut or left out."""
        found = cls(shards, [])
        for i in range(shards.num_documents):
            start, stop = shards.document(i)
            if stop - start > length and too_long == "drop":
                found.too_long += 1
                continue
            end = min(stop, start + length)
            if not shards.mask(start + 1, end).any():  # the first token is predicted from nothing
                found.unlearnable += 1
                continue
            found.cut += end < stop
            found.spans.append((start, end))
        return found

    def __len__(self) -> int:
        return len(self.spans)

    @property
    def num_tokens(self) -> int:
        return sum(stop - start for start, stop in self.spans)

    @property
    def assistant_tokens(self) -> int:
        return int(sum(self.shards.mask(start, stop).sum() for start, stop in self.spans))

    def document(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens, and for each 1.0 where the assistant wrote it."""
        return self.shards.tokens(*self.spans[index]), self.shards.mask(*self.spans[index])

    def prompt(self, index: int) -> list[int]:
        """What stands before the assistant's first token: the first question, and the beginning of a reply."""
        tokens, mask = self.document(index)
        return tokens[: int(mask.argmax())].tolist()

    def split(self, held_out: int, seed: int) -> tuple[Conversations, Conversations]:
        """The chats to learn from, and `held_out` others. Equal chats have equal places in the order that decides."""
        key = str(seed).encode()
        ordered = sorted(self.spans, key=lambda span: blake2b(self.shards.tokens(*span).tobytes(), key=key, digest_size=8).digest())
        chosen = set(ordered[:held_out])
        return tuple(replace(self, spans=[s for s in self.spans if (s in chosen) == held]) for held in (False, True))  # type: ignore

    def chosen(self, first: int, count: int, seed: int) -> list[int]:
        """Indices of the first-th and following chats of an endless order that visits each once an epoch."""
        where = (divmod(i, len(self)) for i in range(first, first + count))
        return [permute(i, len(self), key=f"{seed}:{epoch}") for epoch, i in where]

    def batches(self, indices: Sequence[int], most_tokens: int) -> Iterator[Batch]:
        """The chats packed into batches of at most this many tokens, or of one chat."""
        held: list[tuple[np.ndarray, np.ndarray]] = []
        size = 0
        for index in indices:
            document = self.document(index)
            if held and size + len(document[0]) > most_tokens:
                yield pack(held)
                held, size = [], 0
            held.append(document)
            size += len(document[0])
        if held:
            yield pack(held)


@torch.no_grad()
def validation_loss(model: Transformer, conversations: Conversations, most_tokens: int) -> float:
    """Mean negative log-likelihood of the assistant's tokens."""
    where = model.model.embed_tokens.weight.device
    nats = tokens = 0.0
    for batch in conversations.batches(range(len(conversations)), most_tokens):
        attend = Packed(batch.cu_seqlens, where)
        batch = batch.to(where)
        hidden_TD = model(batch.tokens_T, batch.positions_T, attend).hidden_TD
        nats += float(answer_token(hidden_TD, model.lm_head.weight, batch).total)
        tokens += float(batch.weights_T.sum())
    return nats / tokens
