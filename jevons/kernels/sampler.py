"""Drawing tokens natively: all of engine/sampling.py's rules in a few passes over each row (native/sample.cpp), on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from jevons.kernels.compiler import load

WISH = np.dtype([("temperature", "f4"), ("top_p", "f4"), ("min_p", "f4"), ("top_k", "i4"), ("uniform", "f8")], align=True)
DRAWN = np.dtype([("token", "i8"), ("logp", "f4"), ("raw_logp", "f4"), ("kept", "i4")], align=True)


class Wish(NamedTuple):
    """How to draw one token: temperature 0 takes the likeliest, top_p 1, min_p 0 and top_k 0 cut nothing."""

    temperature: float
    top_p: float
    min_p: float
    top_k: int
    uniform: float  # in [0, 1): decides the token


def draw(
    logits_SW: Tensor, allowed_SW: Tensor, wishes: Sequence[Wish], record: Sequence[bool], *, threads: int = 0
) -> tuple[list[int], list[float], list[float], list[Tensor | None]] | None:
    """Tokens, their log-probabilities as drawn and in the model's own distribution, and for the rows of `record` the words drawn from.

    fp32 on the CPU; `allowed_SW` may be `logits_SW`. None stands for all words. No result at all where logits are not finite.
    """
    S, W = logits_SW.shape
    for x in (logits_SW, allowed_SW):
        assert x.dtype == torch.float32 and x.is_contiguous() and x.shape == (S, W) and x.device.type == "cpu"
    assert len(wishes) == len(record) == S
    wanted, drawn = np.array(wishes, dtype=WISH), np.empty(S, dtype=DRAWN)
    flags = np.array(record, dtype=np.uint8)
    ids_SW = torch.empty(S, W, dtype=torch.int32) if any(record) else None  # memory is touched where words are written
    finite = load().functions.jevons_sample(
        logits_SW.data_ptr(), allowed_SW.data_ptr(), S, W, wanted.ctypes.data, flags.ctypes.data,
        None if ids_SW is None else ids_SW.data_ptr(), drawn.ctypes.data, threads or torch.get_num_threads(),
    )  # fmt: skip
    if not finite:
        return None
    supports: list[Tensor | None] = [None] * S
    if ids_SW is not None:
        for row, (asked, kept) in enumerate(zip(record, drawn["kept"].tolist())):
            if asked and kept >= 0:
                supports[row] = ids_SW[row, :kept].clone()
    return drawn["token"].tolist(), drawn["logp"].tolist(), drawn["raw_logp"].tolist(), supports
