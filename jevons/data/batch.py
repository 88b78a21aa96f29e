"""Packed batches: documents flat behind each other, with what each token is to predict.

There is no padding and no batch dimension; `cu_seqlens` says where segments begin, and attention stays inside them. `pack` makes a batch
of whole documents (fine-tuning, reinforcement learning), `PackedReader` one of equal windows of a shard folder (pretraining) in an order
that is a function of the seed alone: it has no state, so a run resumes by asking for the window that comes next.

Not done: best-fit packing of documents into windows (windows cut documents; the model sees the rest of a cut one in another window).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, fields, replace
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jevons.data.shard import Shards


@dataclass
class Batch:
    """S segments in T packed tokens. Token i predicts targets_T[i], which counts weights_T[i] in the loss.

    positions_T restart at 0 in every segment; targets_T is 0 and weights_T 0.0 where there is nothing to predict.

    The fields that reinforcement learning adds (data/trajectory.py fills them) are about each token's target: its sample's advantage,
    its log-probability in the distribution that the sampler drew from, in the trainer's at the same weights, in a reference model's.
    """

    tokens_T: Tensor  # int64
    positions_T: Tensor  # int64
    cu_seqlens: Tensor  # int32 (S + 1)
    targets_T: Tensor  # int64
    weights_T: Tensor  # float32
    _: KW_ONLY
    advantages_T: Tensor | None = None  # float32
    logps_T: Tensor | None = None  # float32
    old_logps_T: Tensor | None = None  # float32
    ref_logps_T: Tensor | None = None  # float32
    samples_T: Tensor | None = None  # int64: which sample of the batch the token belongs to, -1 in a prompt that several share
    routes_TLK: Tensor | None = None  # int16: experts chosen by the sampler, to be replayed
    picks_TLX: Tensor | None = None  # int32: and what its memory layers looked up
    prefix_S: Tensor | None = None  # int32 (S,): the segment that a segment continues, -1: none; positions go on accordingly
    supports: tuple[Tensor, Tensor] | None = None  # ids (N,) and offsets (T + 1,): the words each target was drawn from; none: all
    temperature: float = 1.0  # that the targets were drawn at
    max_seqlen: int = 0  # computed here, on the CPU, and carried along: reading it from an accelerator would wait for it

    def __post_init__(self) -> None:
        if not self.max_seqlen:
            self.max_seqlen = int(self.cu_seqlens.diff().max())

    @property
    def num_tokens(self) -> int:
        return self.tokens_T.numel()

    def to(self, device: torch.device | str) -> Batch:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {name: x.to(device, non_blocking=True) for name, x in values.items() if isinstance(x, Tensor)}
        if self.supports is not None:
            moved["supports"] = tuple(x.to(device, non_blocking=True) for x in self.supports)
        return replace(self, **moved)


def pack(documents: Sequence[tuple[Any, Any]]) -> Batch:
    """Each (tokens, weights) becomes a segment of its own.

    weights: for each token how much predicting *it* counts (a mask of the assistant's tokens, say), or None for 1; so the weight of a
    token's target is that of the token after it, and the first token's is not used. Sequences, arrays or tensors on the CPU.
    """
    if not documents:
        raise ValueError("documents: there must be at least one")
    lengths = [len(tokens) for tokens, _ in documents]
    for i, (length, (_, weights)) in enumerate(zip(lengths, documents, strict=True)):
        if not length:
            raise ValueError(f"documents[{i}]: has no tokens")
        if weights is not None and len(weights) != length:
            raise ValueError(f"documents[{i}]: {length} tokens but {len(weights)} weights")
    tokens_T = np.concatenate([np.asarray(tokens, np.int64) for tokens, _ in documents])
    own_T = np.concatenate(
        [np.ones(n, np.float32) if w is None else np.asarray(w, np.float32) for n, (_, w) in zip(lengths, documents, strict=True)]
    )
    ends = np.cumsum(lengths)
    return _batch(tokens_T, np.roll(tokens_T, -1), np.roll(own_T, -1), cuts=ends, stops=ends)


def mtp_targets(batch: Batch, depth: int = 1) -> tuple[Tensor, Tensor]:
    """Targets and weights of multi-token prediction: for token i the token i + 1 + depth of its segment, with weight 0 where the segment
    has none.
    """
    if depth < 1:
        raise ValueError(f"depth: must be at least 1, is {depth}")
    targets_T, weights_T = torch.zeros_like(batch.targets_T), torch.zeros_like(batch.weights_T)
    # Positions restart with every segment, so they differ by depth exactly where both tokens stand in one; no lengths leave the device
    same = batch.positions_T[depth:] == batch.positions_T[:-depth] + depth
    targets_T[:-depth] = batch.targets_T[depth:] * same
    weights_T[:-depth] = batch.weights_T[depth:] * same
    return targets_T, weights_T


class PackedReader:
    """Shuffled windows of a shard folder, without end: window i is tokens i*L to i*L + L of the stream, and the token after them its last
    target.

    Every epoch visits each window once, in an order of its own. Ranks share the data by what they ask for: step s of R ranks and B
    windows in all takes `batch(s * B + rank * B // R, B // R)` on each. The rest of the stream that fills no window is left out.

    split_documents: segments end where documents do, and a document's last token (eos) predicts nothing. Without it a window is one
    segment and predicts across documents, as DeepSeek-V3 was pretrained. Raises ValueError where there are fewer tokens than one window
    and its last target.
    """

    def __init__(self, shards: Shards, *, sequence_length: int, seed: int, split_documents: bool = True) -> None:
        if sequence_length < 1:
            raise ValueError(f"sequence_length: must be at least 1, is {sequence_length}")
        if shards.num_tokens < sequence_length + 1:
            raise ValueError(
                f"{shards.folder}: {shards.num_tokens} tokens, fewer than one window of sequence_length + 1 = {sequence_length + 1}; "
                "prepare more text or shorten sequence_length"
            )
        self.shards, self.sequence_length, self.seed, self.split_documents = shards, sequence_length, seed, split_documents
        self.num_windows = (shards.num_tokens - 1) // sequence_length

    def window(self, index: int) -> int:
        """Which window of the stream is the index-th of the shuffled order."""
        epoch, i = divmod(index, self.num_windows)
        return permute(i, self.num_windows, key=f"{self.seed}:{epoch}")

    def batch(self, first: int, count: int) -> Batch:
        """Windows first to first + count of the shuffled order, packed: count * sequence_length tokens. Costs the same for every first."""
        if first < 0 or count < 1:
            raise ValueError(f"batch({first}, {count}): first must be at least 0 and count at least 1")
        length = self.sequence_length
        starts = [self.window(first + j) * length for j in range(count)]
        tokens_SL = np.stack([self.shards.tokens(start, start + length + 1) for start in starts])
        weights_SL = np.stack([self.shards.mask(start, start + length + 1) for start in starts])
        cuts, stops = (np.arange(count) + 1) * length, np.zeros(0, np.int64)
        if self.split_documents:
            # An end on the window's last token cuts nothing more, but that token's target is another document's
            stops = np.concatenate([self.shards.document_ends(s, s + length) - s + j * length for j, s in enumerate(starts)])
            cuts = np.union1d(cuts, stops)
        # flatten copies, ravel would not for a single window: tokens and targets must not share memory
        return _batch(tokens_SL[:, :-1].flatten(), tokens_SL[:, 1:].flatten(), weights_SL[:, 1:].flatten(), cuts, stops)


def permute(index: int, size: int, *, key: str) -> int:
    """Where a keyed pseudo-random permutation of range(size) sends index, in constant time and memory.

    A Feistel network permutes the next larger power of four; what falls outside range(size) is sent through again (cycle walking), fewer
    than four times on average.
    """
    assert 0 <= index < size
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    secret = blake2b(key.encode(), digest_size=32).digest()
    while True:
        left, right = index >> half, index & ((1 << half) - 1)
        for turn in range(4):
            digest = blake2b(turn.to_bytes(1) + right.to_bytes(8), key=secret, digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest) & ((1 << half) - 1))
        index = left << half | right
        if index < size:
            return index


def _batch(tokens_T: np.ndarray, targets_T: np.ndarray, weights_T: np.ndarray, cuts: np.ndarray, stops: np.ndarray) -> Batch:
    """cuts: the end of each segment, rising; stops: ends after which nothing is predicted. Targets and weights are written to."""
    targets_T[stops - 1] = 0
    weights_T[stops - 1] = 0.0
    starts = np.concatenate([[0], cuts[:-1]])
    positions_T = np.arange(len(tokens_T)) - np.repeat(starts, cuts - starts)
    cu_seqlens = np.concatenate([[0], cuts]).astype(np.int32)
    tensors = [torch.from_numpy(array) for array in (tokens_T, positions_T, cu_seqlens, targets_T, weights_T)]
    return Batch(*tensors, max_seqlen=int((cuts - starts).max()))
