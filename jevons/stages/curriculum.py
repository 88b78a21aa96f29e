"""Which problems come next, from what has been solved so far.

    uniform       one after the other, in an order shuffled by the seed
    prioritised   in proportion to 1 - success rate (Kimi k1.5, arXiv 2501.12599, 2.3.3): what is always solved teaches nothing
    curriculum    easy ones first: the pool opens from its easiest fifth, or a step's problems, to all of it over half of the run

`pool` bounds how many different problems there are, which the last two need, since only a problem that is met again has a rate. Success
rates are averages that forget (an answer counts half after a few meetings), because the policy moves on. The state is a few numbers, saved
with every checkpoint; what is drawn is a function of it and the seed.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Literal

from jevons.data.batch import permute
from jevons.stages.rollout import Asked
from jevons.tasks.task import Task

Sampling = Literal["uniform", "prioritised", "curriculum"]
MEMORY = 0.5  # weight of the newest group in a problem's success rate
FLOOR = 0.05  # solved problems are still asked now and then: they can be forgotten
OPENING = 0.2  # share of the pool that a curriculum begins with


class Curriculum:
    """Draws problems of several tasks, each in proportion to its share."""

    def __init__(self, tasks: Sequence[Task], shares: Sequence[float], sampling: Sampling, pool: int, seed: int) -> None:
        self.tasks, self.shares, self.sampling, self.seed = tasks, shares, sampling, seed
        self.sizes = [_size(task, pool) for task in tasks]  # 0: without end
        self.drawn = [0] * len(tasks)
        self.rates: dict[tuple[int, int], float] = {}
        self.order: list[list[int]] = []
        if sampling == "curriculum":
            for place, size in enumerate(self.sizes):
                difficulty = [self._asked(place, i).problem.difficulty for i in range(size)]
                self.order.append(sorted(range(size), key=lambda i: difficulty[i]))

    def draw(self, count: int, progress: float) -> list[Asked]:
        """`count` problems, all different where the pool allows; `progress` is the share of the run that is done."""
        rng = random.Random(f"{self.seed}/{sum(self.drawn)}")
        asked: dict[tuple[int, int], Asked] = {}
        misses = 0
        while len(asked) < count:
            (place,) = rng.choices(range(len(self.tasks)), weights=self.shares)
            index = self._index(place, rng, progress, count)
            self.drawn[place] += 1
            if (place, index) in asked and misses < 50 * count:
                misses += 1
                continue
            if (place, index) in asked:
                raise ValueError(f"rl.problems: {count} different ones a step are more than the pool holds; lower it or raise rl.pool")
            asked[place, index] = self._asked(place, index)
        return list(asked.values())

    def _index(self, place: int, rng: random.Random, progress: float, count: int) -> int:
        size, turn = self.sizes[place], self.drawn[place]
        if self.sampling == "prioritised":
            return rng.choices(range(size), weights=[max(FLOOR, 1 - self.rates.get((place, i), 0.0)) for i in range(size)])[0]
        if self.sampling == "curriculum":
            opened = min(size, max(count, round(size * min(1.0, OPENING + (1 - OPENING) * 2 * progress))))
            return self.order[place][rng.randrange(opened)]
        if not size:
            return turn
        epoch, i = divmod(turn, size)
        return permute(i, size, key=f"{self.seed}/{place}/{epoch}")

    def _asked(self, place: int, index: int) -> Asked:
        return Asked(self.tasks[place], self.tasks[place].problem("train", index, self.seed), (place, index))

    def learn(self, key: tuple[int, int], rate: float) -> None:
        """A group's share of right answers."""
        before = self.rates.get(key)
        self.rates[key] = rate if before is None else MEMORY * rate + (1 - MEMORY) * before

    def state(self) -> dict[str, Any]:
        rates = [[*key, rate] for key, rate in self.rates.items()] if any(self.sizes) else []  # endless problems never come again
        return {"drawn": list(self.drawn), "rates": rates}

    def load(self, state: dict[str, Any]) -> None:
        self.drawn = list(state["drawn"])
        self.rates = {(place, index): rate for place, index, rate in state["rates"]}


def _size(task: Task, pool: int) -> int:
    size = task.size("train")
    assert size != 0, task.name
    return min(filter(None, (pool, size)), default=0)
