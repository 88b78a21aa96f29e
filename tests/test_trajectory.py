"""Batches of sampled answers: a prompt held once teaches what a prompt held by every sample would."""

from __future__ import annotations

import pytest
import torch

from jevons.data.trajectory import Lesson, Trajectory, divide, pack_lessons
from jevons.kernels.cross_entropy import cross_entropy
from jevons.train.loss import Loss
from jevons.train.trainer import Trainer


def trajectory(prompt, length, seed, routed=None):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 90, (length,), generator=generator).tolist()
    own = [i % 4 != 3 for i in range(length)]  # as if a tool answered now and then
    routes = None
    if routed:
        layers, experts, chosen = routed
        rows = len(prompt) + length - 1
        rows = [torch.randperm(experts, generator=generator)[:chosen] for _ in range(rows * layers)]
        routes = torch.stack(rows).view(-1, layers, chosen).short()
    logps = [-0.1 * i if drawn else 0.0 for i, drawn in enumerate(own)]
    return Trajectory(prompt, tokens, own, logps, logps, finished=True, version=0, routes=routes)


def lessons(routed=None):
    prompts = [list(range(5, 16)), [7], list(range(40, 52))]
    out = []
    for p, prompt in enumerate(prompts):
        shared = None
        for i, length in enumerate((9, 1, 4)):
            t = trajectory(prompt, length, 10 * p + i, routed)
            if t.routes is not None:  # one prompt has one route, whoever read it
                shared = t.routes[: len(prompt) - 1] if shared is None else shared
                t.routes[: len(prompt) - 1] = shared
            out.append(Lesson(t, advantage=p - 0.5 * i, weight=1.0 / length))
    return out


def weighted(hidden_TD, head_WD, batch):
    return Loss(*cross_entropy(hidden_TD, head_WD, batch.targets_T, batch.weights_T * batch.advantages_T))


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen2", "qwen3_moe"])
@pytest.mark.parametrize("replay", [False, True])
def test_a_shared_prompt_gives_the_same_loss_and_gradients(tiny_model, family, replay):
    if replay and family == "qwen2":
        pytest.skip("a dense model has no routes")
    routed = (3 - (family == "deepseek_v3"), 8, 3) if replay else None
    found = []
    for share in (True, False):
        model = tiny_model(family)
        trainer = Trainer(model, mtp_weight=0, balance_weight=0)
        batch = pack_lessons(lessons(routed), share=share, replay=replay)
        metrics = trainer.forward_backward([batch], weighted, normaliser=2.5)
        found.append((metrics.loss, [g.clone() for g in trainer.optimizer.gradients]))
    (loss, shared), (plain_loss, plain) = found
    assert loss == pytest.approx(plain_loss, rel=1e-5)
    for name, a, b in zip(trainer.optimizer.names, shared, plain):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)


def test_rows_predict_the_samples_tokens_and_nothing_else():
    every = lessons()
    batch = pack_lessons(every)
    for i, lesson in enumerate(every):
        rows = batch.samples_T == i
        assert batch.targets_T[rows].tolist() == lesson.trajectory.tokens
        assert (batch.weights_T[rows] > 0).tolist() == lesson.trajectory.own
        last = len(lesson.trajectory.prompt) - 1
        assert batch.positions_T[rows].tolist() == list(range(last, last + lesson.num_tokens))
        torch.testing.assert_close(batch.logps_T[rows], torch.tensor(lesson.trajectory.logps))
    assert batch.weights_T[batch.samples_T < 0].sum() == 0
    assert batch.num_tokens == sum(lesson.num_tokens for lesson in every) + 10 + 0 + 11  # each prompt once, less its last token


def test_supports_follow_their_tokens():
    a, b = trajectory([5, 6], 3, 0), trajectory([5, 6], 2, 1)
    a.supports = [torch.tensor([1, 2]), None, torch.tensor([3])]
    b.supports = [None, torch.tensor([4, 5, 6])]
    batch = pack_lessons([Lesson(a, 1.0, 1.0), Lesson(b, 1.0, 1.0)])
    ids, offsets = batch.supports
    rows = [ids[offsets[i] : offsets[i + 1]].tolist() for i in range(batch.num_tokens)]
    assert rows == [[], [1, 2], [], [3], [], [4, 5, 6]]


def test_dividing_keeps_order_and_counts_prompts_once():
    every = lessons()
    for most in (1, 12, 20, 10_000):
        parts = list(divide(every, most))
        assert [lesson for part in parts for lesson in part] == every
        assert all(len(part) == 1 or pack_lessons(part).num_tokens <= most for part in parts)
    assert len(parts) == 1
