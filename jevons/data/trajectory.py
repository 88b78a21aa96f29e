"""What the sampler leaves for the trainer: conversations as the tokens that were drawn, and batches packed from groups of them.

Tokens are never made into text and back on the way: what was drawn is what is learned from, with the log-probabilities that it was drawn
at. All samples of a group begin with the same prompt, which a batch holds once:

    segment 0         prompt but its last token                                        prefix -1
    segment 1 .. G    the prompt's last token, then the sample's but its last          prefix 0, positions go on

so every row of a sample predicts one of its tokens, and the prompt's rows, which predict nothing, are computed and differentiated once
instead of G times. Only tokens that the model drew itself count; what tools and the template wrote between its turns has weight 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from jevons.data.batch import Batch


@dataclass
class Trajectory:
    """One sampled conversation. `tokens` follow `prompt`; of each, whether the model drew it, and at which log-probability.

    routes (prompt + tokens - 1, L, K): experts chosen; picks (prompt + tokens - 1, L, X): what memory layers looked up. supports: of each
    token the words it was drawn from, None for all of them.
    """

    prompt: list[int]
    tokens: list[int]
    own: list[bool]
    logps: list[float]  # in the distribution drawn from; 0.0 where the model did not draw
    raw_logps: list[float]
    finished: bool  # ended by itself, not cut off
    version: int  # of the weights that drew the first token
    routes: Tensor | None = None
    supports: list[Tensor | None] | None = None
    picks: Tensor | None = None

    @property
    def drawn(self) -> int:
        return sum(self.own)

    @property
    def turns(self) -> int:
        """How often the model spoke."""
        return sum(now and not before for before, now in zip([False, *self.own], self.own))


@dataclass
class Lesson:
    """A trajectory and what is to be learned from it: `weight` is what each of its drawn tokens counts in the loss."""

    trajectory: Trajectory
    advantage: float
    weight: float

    @property
    def num_tokens(self) -> int:
        return len(self.trajectory.tokens)


def pack_lessons(lessons: Sequence[Lesson], *, temperature: float = 1.0, share: bool = True, replay: bool = True) -> Batch:
    """One batch. Neighbours of equal prompts share it; `share=False` gives each a whole segment of its own instead.

    `replay` carries routes and picks along, where the sampler recorded them.
    """
    assert lessons
    tokens: list[int] = []
    positions: list[int] = []
    targets: list[int] = []
    weights: list[float] = []
    advantages: list[float] = []
    logps: list[float] = []
    samples: list[int] = []
    bounds, prefixes = [0], []
    chosen: dict[str, list[Tensor]] = {"routes": [], "picks": []}
    supports: list[Tensor | None] = []
    shared: tuple[list[int], int] | None = None  # a prompt and its segment

    def add(piece: list[int], first: int, prefix: int, wanted: list[int], own: list[float], lesson: Lesson | None, sample: int) -> None:
        tokens.extend(piece)
        positions.extend(range(first, first + len(piece)))
        targets.extend(wanted)
        weights.extend(own)
        advantages.extend([lesson.advantage if lesson else 0.0] * len(piece))
        samples.extend([sample] * len(piece))
        bounds.append(len(tokens))
        prefixes.append(prefix)

    for sample, lesson in enumerate(lessons):
        t = lesson.trajectory
        before = t.prompt[:-1]
        recorded = [(chosen[name], rows) for name, rows in (("routes", t.routes), ("picks", t.picks)) if rows is not None]
        begun = [] if share else before
        if share and before and (shared is None or shared[0] != t.prompt):
            shared = (t.prompt, len(prefixes))
            add(before, 0, -1, [0] * len(before), [0.0] * len(before), None, -1)
            logps += [0.0] * len(before)
            supports += [None] * len(before)
            for pieces, rows in recorded:
                pieces.append(rows[: len(before)])
        prefix = shared[1] if share and before and shared else -1
        piece = [*begun, t.prompt[-1], *t.tokens[:-1]]
        empty = [0] * len(begun)
        own = [lesson.weight if drawn else 0.0 for drawn in t.own]
        add(piece, len(before) - len(begun), prefix, [*empty, *t.tokens], [*map(float, empty), *own], lesson, sample)
        logps += [*map(float, empty), *t.logps]
        supports += [*[None] * len(begun), *(t.supports or [None] * len(t.tokens))]
        for pieces, rows in recorded:
            pieces.append(rows[len(before) - len(begun) :])
    long, real = torch.int64, torch.float32
    return Batch(
        torch.tensor(tokens, dtype=long),
        torch.tensor(positions, dtype=long),
        torch.tensor(bounds, dtype=torch.int32),
        torch.tensor(targets, dtype=long),
        torch.tensor(weights, dtype=real),
        advantages_T=torch.tensor(advantages, dtype=real),
        logps_T=torch.tensor(logps, dtype=real),
        samples_T=torch.tensor(samples, dtype=long),
        routes_TLK=torch.cat(chosen["routes"]) if replay and chosen["routes"] else None,
        picks_TLX=torch.cat(chosen["picks"]) if replay and chosen["picks"] else None,
        prefix_S=torch.tensor(prefixes, dtype=torch.int32) if max(prefixes) >= 0 else None,
        supports=_ragged(supports),
        temperature=temperature,
    )


def _ragged(rows: list[Tensor | None]) -> tuple[Tensor, Tensor] | None:
    if all(row is None for row in rows):
        return None
    none = torch.empty(0, dtype=torch.int32)
    filled = [none if row is None else row.to(torch.int32) for row in rows]
    lengths = torch.tensor([0, *map(len, filled)])
    return torch.cat(filled), lengths.cumsum(0)


def divide(lessons: Sequence[Lesson], most_tokens: int) -> Iterator[list[Lesson]]:
    """Lessons in runs whose batches hold at most `most_tokens` tokens, shared prompts counted once; a longer one stands alone."""
    run: list[Lesson] = []
    size = 0
    for lesson in lessons:
        prompt = lesson.trajectory.prompt
        fresh = not run or run[-1].trajectory.prompt != prompt
        more = lesson.num_tokens + (len(prompt) - 1) * fresh
        if run and size + more > most_tokens:
            yield run
            run, size = [], 0
            more = lesson.num_tokens + len(prompt) - 1
        run.append(lesson)
        size += more
    if run:
        yield run
