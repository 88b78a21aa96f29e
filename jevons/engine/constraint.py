"""What may be drawn next, beyond the model's own wishes: penalties, bias, minimums, thinking budgets, grammars.

One `Constraint` a sequence that has any of them, so that plain requests pay nothing. It changes a row of fp32 logits in
place (-inf: cannot be drawn) and follows the tokens that are drawn. What must come (the end of thinking at its budget) is
everything else made impossible, so the sampler has no second way to choose a token and the log-probability as drawn is 0.
The order is transformers': penalties, bias, then what is forbidden.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable

import torch
from torch import Tensor

from jevons.engine.sequence import Grammar, SamplingParams, ThinkingBudget


class Constraint:
    """The rules of one sequence and where it stands in them."""

    def __init__(self, prompt: list[int], params: SamplingParams, stop_ids: frozenset[int], grammar: Grammar | None) -> None:
        self.params, self.stop_ids, self.grammar = params, sorted(stop_ids), grammar
        self.seen = Counter(prompt if params.repetition_penalty != 1 else ())
        self.counts: Counter[int] = Counter()
        self.drawn = 0
        self.thinking = _Thinking(params.thinking, stop_ids) if params.thinking else None

    @staticmethod
    def wanted(params: SamplingParams, grammar: Grammar | None) -> bool:
        """Whether these settings have any rule that a plain draw does not."""
        return bool(grammar or params.penalised or params.logit_bias or params.min_tokens or params.thinking)

    def apply(self, row_W: Tensor) -> None:
        """Change one row of fp32 logits in place."""
        if self.thinking and self.thinking.forced:
            _only(row_W, self.thinking.forced[0])
            return
        if self.params.repetition_penalty != 1 and self.seen:
            ids = _ids(self.seen, row_W)
            x = row_W[ids]
            row_W[ids] = torch.where(x > 0, x / self.params.repetition_penalty, x * self.params.repetition_penalty)
        if self.counts and (self.params.presence_penalty or self.params.frequency_penalty):
            ids = _ids(self.counts, row_W)
            times = torch.tensor(list(self.counts.values()), dtype=row_W.dtype, device=row_W.device)
            row_W[ids] -= self.params.presence_penalty + self.params.frequency_penalty * times
        if self.params.logit_bias:
            ids = _ids((i for i, _ in self.params.logit_bias), row_W)
            row_W[ids] += torch.tensor([b for _, b in self.params.logit_bias], dtype=row_W.dtype, device=row_W.device)
        forbidden = list(self.thinking.forbidden) if self.thinking else []
        if self.drawn < self.params.min_tokens:
            forbidden += self.stop_ids
        if forbidden:
            row_W[_ids(forbidden, row_W)] = -math.inf
        if self.grammar is not None:
            words = torch.zeros(-(-len(row_W) // 32), dtype=torch.int32)
            if self.grammar.mask(words):
                bits = torch.arange(32, dtype=torch.int32)
                allowed_W = (words[:, None] >> bits & 1).flatten()[: len(row_W)].bool().to(row_W.device)
                row_W.masked_fill_(~allowed_W, -math.inf)
                if forbidden and not bool(row_W.isfinite().any()):  # a grammar that admits only the end beats a minimum length
                    row_W[_ids(self.stop_ids, row_W)] = 0.0

    def replace(self, token: int) -> int:
        """The token that takes this one's place: "Wait" where thinking would end too soon, mostly the same."""
        return self.thinking.replace(token) if self.thinking else token

    def accept(self, token: int) -> None:
        """Follow a token that joined the answer."""
        self.drawn += 1
        if self.params.penalised:
            self.counts[token] += 1
            self.seen[token] += 1
        if self.thinking:
            self.thinking.accept(token)
        if self.grammar is not None:
            self.grammar.accept(token)


class _Thinking:
    """A `ThinkingBudget` under way: before its start, inside, or over."""

    def __init__(self, budget: ThinkingBudget, stop_ids: frozenset[int]) -> None:
        self.budget, self.stop_ids = budget, stop_ids
        self.inside = not budget.start_ids
        self.over = False
        self.count = 0
        self.tail: deque[int] = deque(maxlen=max(len(budget.end_ids), len(budget.start_ids)))
        self.forced: deque[int] = deque()
        self._check()

    @property
    def early(self) -> bool:
        return self.inside and self.count < self.budget.min_tokens

    @property
    def forbidden(self) -> Iterable[int]:
        """What cannot be drawn: the end, and with it any stop, before the minimum; unless "Wait" takes its place."""
        return [self.budget.end_ids[0], *self.stop_ids] if self.early and not self.budget.wait_ids else ()

    def replace(self, token: int) -> int:
        if not self.early or self.forced or not self.budget.wait_ids or (token != self.budget.end_ids[0] and token not in self.stop_ids):
            return token
        self.forced.extend(self.budget.wait_ids)
        return self.forced[0]

    def accept(self, token: int) -> None:
        if self.forced:
            expected = self.forced.popleft()
            assert token == expected, (token, expected)
        if self.over:
            return
        self.tail.append(token)
        if not self.inside:
            start = self.budget.start_ids
            if tuple(self.tail) == start[: len(self.tail)]:
                self.inside = len(self.tail) == len(start)
            else:
                self.over = True
            if self.inside:
                self.tail.clear()
                self._check()
            return
        self.count += 1
        if tuple(self.tail)[-len(self.budget.end_ids) :] == self.budget.end_ids:
            self.inside, self.over = False, True
            return
        self._check()

    def _check(self) -> None:
        limit = self.budget.max_tokens
        if self.inside and limit is not None and self.count >= limit and not self.forced:
            self.forced.extend(self.budget.end_ids)


def _ids(ids: Iterable[int], row_W: Tensor) -> Tensor:
    return torch.tensor(list(ids), dtype=torch.int64, device=row_W.device)


def _only(row_W: Tensor, token: int) -> None:
    kept = row_W[token].clone()
    row_W.fill_(-math.inf)
    row_W[token] = kept
