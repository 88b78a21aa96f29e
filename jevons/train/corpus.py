"""What a training stage reads: shuffled windows to learn from, fixed windows to be measured on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from jevons.data.batch import PackedReader
from jevons.data.shard import Shards
from jevons.data.tokenizer import Tokenizer
from jevons.kernels.cross_entropy import cross_entropy
from jevons.model.attend import Packed
from jevons.model.transformer import Transformer


@dataclass
class Corpus:
    train: PackedReader
    validation: PackedReader
    token_bytes: torch.Tensor  # (W,) how many bytes of text each token stands for

    @classmethod
    def open(cls, folder: Path, tokenizer: Tokenizer, *, sequence_length: int, split_documents: bool, seed: int) -> Corpus:
        """The prepared shards. Validation windows shrink where there is less validation text than one window."""
        digest = tokenizer.digest()
        train, validation = (Shards.open(folder / split, digest=digest) for split in ("train", "validation"))
        length = min(sequence_length, validation.num_tokens - 1)
        return cls(
            PackedReader(train, sequence_length=sequence_length, seed=seed, split_documents=split_documents),
            PackedReader(validation, sequence_length=length, seed=0, split_documents=split_documents),
            torch.from_numpy(tokenizer.token_bytes()),
        )


@torch.no_grad()
def validation_loss(model: Transformer, corpus: Corpus, windows: int) -> tuple[float, float]:
    """Mean negative log-likelihood a token, and bits per byte of text, over the same windows every time."""
    nats = tokens = text_bytes = 0.0
    where = model.model.embed_tokens.weight.device
    for i in range(min(windows, corpus.validation.num_windows)):
        batch = corpus.validation.batch(i, 1)
        attend = Packed(batch.cu_seqlens, where)
        batch = batch.to(where)
        hidden_TD = model(batch.tokens_T, batch.positions_T, attend).hidden_TD
        total, _ = cross_entropy(hidden_TD, model.lm_head.weight, batch.targets_T, batch.weights_T)
        nats += float(total)
        tokens += float(batch.weights_T.sum())
        text_bytes += float((corpus.token_bytes.to(where)[batch.targets_T] * batch.weights_T).sum())
    return nats / max(tokens, 1.0), nats / math.log(2) / max(text_bytes, 1.0)


