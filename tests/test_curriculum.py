"""Which problems are asked: in the right shares, the same after a resumption, more often what is not solved yet."""

from __future__ import annotations

from collections import Counter

import pytest

from jevons.stages.curriculum import FLOOR, Curriculum
from jevons.tasks.task import get_task


def make(sampling="uniform", pool=0, shares=(1.0,)):
    tasks = [get_task("arithmetic", digits=3, operations="+"), get_task("countdown", numbers=3)][: len(shares)]
    return Curriculum(tasks, shares, sampling, pool, seed=5)


@pytest.mark.parametrize("sampling, pool", [("uniform", 0), ("uniform", 40), ("prioritised", 40), ("curriculum", 40)])
def test_a_saved_state_draws_what_would_have_come(sampling, pool):
    first, second = make(sampling, pool, (3.0, 1.0)), make(sampling, pool, (3.0, 1.0))
    for step in range(5):
        for asked in first.draw(4, step / 10):
            first.learn(asked.key, step / 5)
    second.load(first.state())
    for step in range(5, 10):
        assert [a.key for a in first.draw(4, step / 10)] == [a.key for a in second.draw(4, step / 10)]


def test_an_epoch_asks_every_problem_once():
    curriculum = make(pool=24)
    keys = [a.key for _ in range(6) for a in curriculum.draw(4, 0.0)]
    assert len(set(keys)) == 24 == len(keys)


def test_tasks_are_asked_by_share():
    curriculum = make(shares=(3.0, 1.0))
    counts = Counter(a.key[0] for _ in range(250) for a in curriculum.draw(4, 0.0))
    assert counts[0] / 1000 == pytest.approx(0.75, abs=0.05)


def test_prioritised_sampling_follows_failure():
    curriculum = make("prioritised", pool=3)
    for index, rate in enumerate((0.0, 0.5, 1.0)):
        curriculum.learn((0, index), rate)
    counts = Counter(curriculum.draw(1, 0.0)[0].key[1] for _ in range(4000))
    total = 1 + 0.5 + FLOOR
    for index, weight in enumerate((1.0, 0.5, FLOOR)):
        assert counts[index] / 4000 == pytest.approx(weight / total, abs=0.03)


def test_a_curriculum_opens_from_the_easy_end():
    curriculum = make("curriculum", pool=200)
    difficulty = lambda progress: [a.problem.difficulty for _ in range(20) for a in curriculum.draw(4, progress)]  # noqa: E731
    easy, all_of_them = difficulty(0.0), difficulty(1.0)
    assert max(easy) <= 2 and set(all_of_them) >= {2, 3}


def test_a_curriculum_opens_as_far_as_a_step_needs():
    """An easiest fifth of 10 problems is 2: a step of 5 gets 5."""
    keys = {a.key for a in make("curriculum", pool=10).draw(5, 0.0)}
    assert len(keys) == 5


def test_more_problems_than_there_are():
    with pytest.raises(ValueError, match=r"rl\.problems: 5 different ones"):
        make(pool=3).draw(5, 0.0)
