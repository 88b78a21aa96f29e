"""Policy losses against the published formulas: values, derivatives by each log-probability, and what they are in the mean."""

from __future__ import annotations

import math

import pytest
import torch

from jevons.data.batch import Batch
from jevons.data.trajectory import Lesson, Trajectory, pack_lessons
from jevons.engine.sampling import sampling_logps
from jevons.engine.sequence import SamplingParams
from jevons.model.attend import Packed
from jevons.train.advantage import advantages, has_signal, normaliser, token_weight
from jevons.train.objective import PRESETS, Objective
from jevons.train.policy import clipped, k3, policy_loss
from jevons.train.trainer import Trainer

EYE = torch.eye(2)
NOW, OLD, REF = [-1.0, -2.0, -0.5], [-1.2, -1.5, -0.5], [-1.1, -2.2, -0.4]  # SPEC 2.1's three tokens


def batch_of(old, advantage, *, targets=None, weights=None, samples=None, **more) -> Batch:
    """One segment whose tokens are these; of one sample unless told otherwise."""
    T = len(old)
    lists = {"advantages_T": [float(a) for a in (advantage if isinstance(advantage, list) else [advantage] * T)], "logps_T": old} | more
    fields = {name: torch.tensor(x, dtype=torch.float32) for name, x in lists.items()}
    fields["samples_T"] = torch.tensor(samples or [0] * T)
    weights_T = torch.ones(T) if weights is None else torch.as_tensor(weights, dtype=torch.float32)
    targets_T = torch.zeros(T, dtype=torch.int64) if targets is None else torch.tensor(targets)
    tokens_T, cu_seqlens = torch.zeros(T, dtype=torch.int64), torch.tensor([0, T], dtype=torch.int32)
    return Batch(tokens_T, torch.arange(T), cu_seqlens, targets_T, weights_T, **fields)


def measure(objective: Objective, now, batch: Batch):
    """The loss, its derivative by each token's log-probability, and the statistics, where these are `now`.

    Two words, the target being the first: its logit's gradient is 1 - p times the derivative.
    """
    logps = torch.tensor(now)
    hidden = torch.stack((logps, torch.log1p(-logps.exp())), -1).requires_grad_()
    loss = policy_loss(objective)(hidden, EYE, batch)
    (gradient,) = torch.autograd.grad(loss.total, hidden)
    torch.testing.assert_close(loss.nll_T, -logps * (batch.weights_T > 0), rtol=1e-5, atol=1e-6)
    return loss.total.item(), (gradient[:, 0] / -torch.expm1(logps)).tolist(), {k: v.item() for k, v in loss.stats.items()}


def near(*values, tolerance=1e-5):
    return pytest.approx(list(values), rel=tolerance, abs=1e-6)


# --- goldens of SPEC 2.1 and 2.4 ---


def test_goldens():
    now, old, ref = map(torch.tensor, (NOW, OLD, REF))
    ratio = (now - old).exp()
    assert ratio.tolist() == near(1.2214, 0.6065, 1, tolerance=1e-4)
    assert k3(ref, now).tolist() == near(0.0048, 0.0187, 0.0052, tolerance=0.02)
    assert (ratio * k3(ref, now)).tolist() == near(0.0059, 0.0114, 0.0052, tolerance=0.02)
    usual, dapo, up, down = Objective(), PRESETS["dapo"], torch.ones(3), -torch.ones(3)
    assert clipped(ratio, up, usual).tolist() == near(1.2, 0.6065, 1, tolerance=1e-4)
    assert clipped(ratio, down, usual).tolist() == near(-1.2214, -0.8, -1, tolerance=1e-4)
    assert clipped(ratio, up, dapo).tolist() == near(1.2214, 0.6065, 1, tolerance=1e-4)


@pytest.mark.parametrize("kl", ["k3", "unbiased"])
def test_grpo_is_made_of_them(kl):
    loss, slopes, stats = measure(Objective(kl_weight=0.1, kl=kl), NOW, batch_of(OLD, 1, ref_logps_T=REF))
    r, d = [math.exp(a - b) for a, b in zip(NOW, OLD)], [a - b for a, b in zip(REF, NOW)]
    kls = [math.exp(x) - x - 1 for x in d]
    pull, pulled = (kls, [1 - math.exp(x) for x in d]) if kl == "k3" else ([a * b for a, b in zip(r, kls)], [-a * x for a, x in zip(r, d)])
    assert loss == pytest.approx(-(1.2 + r[1] + 1) + 0.1 * sum(pull), rel=1e-5)
    assert slopes == near(*(g + 0.1 * p for g, p in zip((0, -r[1], -1), pulled)))  # the first token is past its bound
    assert stats["kl"] == pytest.approx(sum(kls), rel=1e-4) and stats["clipped_high"] == 1 and stats["clipped_low"] == 0


def test_advantages():
    rewards = torch.tensor([[1.0, 0, 0, 1, 1, 0, 0, 0]])
    for options, right, wrong in (({}, 1.2910, -0.7746), ({"deviation": "sample"}, 1.2074, -0.7244), ({"kind": "dr"}, 0.625, -0.375)):
        expected = torch.where(rewards == 1, right, wrong)
        torch.testing.assert_close(advantages(rewards, **options), expected, rtol=1e-4, atol=1e-4)


def test_advantages_of_alike_rewards_are_zero():
    rewards = torch.tensor([[0.1 + 0.2, 0.3, 0.3, 0.3], [0.7] * 4, [0.0, 0.0, 0.0, 1.0]], dtype=torch.float64)
    for kind in ("grpo", "dr", "batch"):
        for deviation in ("population", "sample"):
            found = advantages(rewards, kind, deviation=deviation)
            assert found[:2].eq(0).all() and found[2].ne(0).all() and abs(found[2].sum()) < 1e-6
            assert advantages(rewards[:2], kind, deviation=deviation).eq(0).all()
    assert [has_signal(row) for row in rewards.tolist()] == [False, False, True]


def test_advantages_over_the_batch():
    """One scale for all groups: a rare success still counts for more than one in an even group, but not through its group's deviation."""
    rewards = torch.tensor([[1.0, 0, 0, 0], [1.0, 1, 0, 0], [1.0, 1, 1, 1]])
    found = advantages(rewards, "batch")
    assert found.square().mean().item() == pytest.approx(1) and found[2].eq(0).all()
    torch.testing.assert_close(found * (advantages(rewards, "dr")[0, 0] / found[0, 0]), advantages(rewards, "dr"))


def test_presets_and_defaults():
    """Trap 15: R1's first stage clips at 10, not at 0.2."""
    assert PRESETS["r1"].bounds == (-9, 11) and PRESETS["r1"].kl_weight == 1e-3
    assert PRESETS["dapo"].bounds == (0.8, 1.28) and PRESETS["dapo"].kl_weight == 0
    assert Objective().bounds == (0.8, 1.2)
    assert Objective("gspo").bounds == PRESETS["gspo"].bounds == (1 - 3e-4, 1 + 4e-4)
    assert Objective("cispo").bounds == PRESETS["scalerl"].bounds == (-math.inf, 5)
    assert PRESETS["intellect-2"].two_sided == 4


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"two_sided": 1.1}, "two_sided"),
        ({"kind": "cispo", "clip_low": 0.2}, "clip_low"),
        ({"kind": "mirror", "clip_high": 0.2}, "clip_high"),
        ({"kind": "mirror", "importance_cap": 2.0}, "importance_cap"),
        ({"importance_cap": 0.5}, "importance_cap"),
        ({"kind": "mirror", "tau": 0.0}, "tau"),
        ({"tau": 0.2}, "tau"),
        ({"importance_mode": "mask"}, "importance_mode"),
        ({"kl": "unbiased"}, "kl"),
    ],
)
def test_contradictions_are_refused(fields, named):
    with pytest.raises(ValueError, match=f"^{named}:"):
        Objective(**fields)


# --- derivatives by hand ---


def test_two_sided_clip():
    now, old = [-0.1, -1.0, -3.0], [-2.1, -2.0, -2.9]  # ratios 7.4, 2.7, 0.9
    r = [math.exp(a - b) for a, b in zip(now, old)]
    loss, slopes, stats = measure(Objective(two_sided=4), now, batch_of(old, -1))
    assert loss == pytest.approx(4 + r[1] + r[2], rel=1e-5) and slopes == near(0, r[1], r[2]) and stats["clipped_high"] == 1
    assert measure(Objective(), now, batch_of(old, -1))[1] == near(*r)
    one_sided, two_sided = (measure(o, now, batch_of(old, 1)) for o in (Objective(), Objective(two_sided=4)))
    assert one_sided == two_sided


def test_gspo():
    """One ratio a sample, the geometric mean of its tokens'; it moves all of them by the same n-th, or none where it is clipped."""
    now, old = [-1.0, -2.0, -0.5, -1.5, -0.7], [-1.1, -1.9, -0.6, -1.5, -0.72]
    batch = batch_of(old, [2.0, 2.0, 2.0, -1.0, -1.0], samples=[3, 3, 3, 8, 8], weights=[1 / 3] * 3 + [1 / 2] * 2)
    s = [math.exp((0.1 - 0.1 + 0.1) / 3), math.exp(0.02 / 2)]
    loss, slopes, stats = measure(Objective("gspo", clip_low=0.2, clip_high=0.2), now, batch)
    assert loss == pytest.approx(-2 * s[0] + s[1], rel=1e-5)
    assert slopes == near(*[-2 * s[0] / 3] * 3, *[s[1] / 2] * 2)
    assert stats["ratio"] == pytest.approx(3 * s[0] + 2 * s[1], rel=1e-5) and stats["max_ratio"] == pytest.approx(s[0], rel=1e-5)
    loss, slopes, stats = measure(Objective("gspo"), now, batch)  # both moved further than 4e-4, the second against its advantage
    assert loss == pytest.approx(-2 * 1.0004 + s[1], rel=1e-5) and slopes == near(0, 0, 0, *[s[1] / 2] * 2)
    assert stats["clipped_high"] == 3


def test_cispo():
    """-sg(min(r, 5)) A log pi: the weight is bounded, the gradient stays."""
    now, old = [-0.5, -1.0, -2.0], [-3.5, -1.3, -1.0]
    loss, slopes, stats = measure(Objective("cispo"), now, batch_of(old, [1.0, -2.0, 1.0]))
    weights = [5, math.exp(0.3), math.exp(-1)]
    assert slopes == near(-weights[0], 2 * weights[1], -weights[2])
    assert loss == pytest.approx(-sum(w * a * x for w, a, x in zip(weights, (1, -2, 1), now)), rel=1e-5)
    assert stats["clipped_high"] == 1 and stats["clipped_low"] == 0


def test_mirror_descent():
    """Trap 16: the sum over a sample's tokens, not their mean; the derivative is k1.5's gradient, each sample's once."""
    now, old, tau = [-1.0, -2.0, -0.5, -1.5], [-1.3, -1.8, -0.9, -1.0], 0.3
    loss, slopes, _ = measure(Objective("mirror", tau=tau), now, batch_of(old, [1.0, 1.0, 1.0, -0.5], samples=[0, 0, 0, 1]))
    sums, advantage = [0.3 - 0.2 + 0.4, -0.5], [1.0, -0.5]
    assert loss == pytest.approx(sum((a - tau * s) ** 2 for a, s in zip(advantage, sums)) / (2 * tau), rel=1e-5)
    # downhill: - A grad log pi + tau / 2 grad (log ratio)^2
    closed = [-a + tau * s for a, s in zip(advantage, sums)]
    assert slopes == near(*[closed[0]] * 3, closed[1])


@pytest.mark.parametrize(("mode", "factors"), [("truncate", (1.2, 2.0, 0.4)), ("mask", (1.2, 0.0, 0.0))])
def test_importance_of_the_samplers_numerics(mode, factors):
    old = [x - 0.05 for x in NOW]
    sampler = [x - math.log(w) for x, w in zip(old, (1.2, 3.0, 0.4))]
    batch = batch_of(sampler, 1, old_logps_T=old)
    plain = measure(Objective(), NOW, batch)
    _, slopes, stats = measure(Objective(importance_cap=2, importance_mode=mode), NOW, batch)
    assert slopes == near(*(f * g for f, g in zip(factors, plain[1])))  # the ratio is to the trainer's own, w a constant beside it
    assert stats["tis_clipped"] == (1 if mode == "truncate" else 2) and stats["masked"] == factors.count(0.0)
    assert stats["ratio"] == pytest.approx(3 * math.exp(0.05), rel=1e-5)
    assert stats["mismatch"] == pytest.approx(sum(abs(math.log(w)) for w in (1.2, 3.0, 0.4)), rel=1e-4)
    assert stats["max_mismatch"] == pytest.approx(math.log(3), rel=1e-4)
    assert stats["mismatch_kl"] == pytest.approx(sum(w - 1 - math.log(w) for w in (1.2, 3.0, 0.4)), rel=1e-4)


@pytest.mark.parametrize("mode", ["truncate", "mask"])
def test_importance_is_one_where_the_sampler_is_the_trainer(mode):
    batch = batch_of(OLD, -1, old_logps_T=OLD)
    with_weight, without = (measure(o, NOW, batch) for o in (Objective(importance_cap=2, importance_mode=mode), Objective()))
    assert with_weight[:2] == without[:2]
    assert with_weight[2]["tis_clipped"] == with_weight[2]["masked"] == with_weight[2]["mismatch"] == 0


def test_off_policy_samples_are_left_out():
    """Only those of negative advantage that the policy has left, by the mean over their tokens of the sampler's log-ratio."""
    now, old = [-2.0, -0.5, -2.0, -0.5, -1.0], [-0.8, -0.5, -0.8, -0.5, -0.2]  # means 0.6, 0.6, 0.8
    batch = batch_of(old, [-1.0, -1.0, 1.0, 1.0, -1.0], samples=[0, 0, 1, 1, 2], ref_logps_T=now)
    _, slopes, stats = measure(Objective(sequence_mask=0.7, kl_weight=1.0, clip_low=0.9), now, batch)
    assert slopes[-1] == 0 and all(slopes[:-1]) and stats["masked"] == 1
    _, slopes, stats = measure(Objective(sequence_mask=0.5, clip_low=0.9), now, batch)
    assert slopes[:2] == [0, 0] and all(slopes[2:4]) and slopes[4] == 0 and stats["masked"] == 3
    batch.old_logps_T = torch.tensor(now)  # what the trainer would have said does not matter here: it is the sampler that was left
    assert measure(Objective(sequence_mask=0.5, clip_low=0.9), now, batch)[2]["masked"] == 3
    batch.ref_logps_T = torch.tensor(REF + REF[:2])
    _, pulled, _ = measure(Objective(sequence_mask=0.5, clip_low=0.9, kl_weight=1.0), now, batch)
    assert pulled[0] == pytest.approx(1 - math.exp(REF[0] - now[0]), rel=1e-4)  # the pull to the reference stays


# --- what they are in the mean ---

SYMBOLS = 10


def categorical(seed: int, scale: float = 0.6) -> torch.Tensor:
    return (torch.randn(SYMBOLS, generator=torch.Generator().manual_seed(seed)) * scale).log_softmax(-1)


def test_k3_estimates_the_divergence():
    policy, reference, N = categorical(0), categorical(1), 20_000
    drawn = torch.multinomial(policy.exp(), N, replacement=True, generator=torch.Generator().manual_seed(2))
    estimates = k3(reference[drawn], policy[drawn])
    truth = (policy.exp() * (policy - reference)).sum()
    assert (estimates >= 0).all() and abs(estimates.mean() - truth) < 3 * estimates.std() / N**0.5


@pytest.mark.parametrize("on_policy", [False, True])
def test_only_the_weighted_k3_has_the_divergences_gradient(on_policy):
    """Expectations over pi_old written out: every symbol once, with its probability as weight."""
    logits = categorical(0).requires_grad_()
    old, reference = logits.detach() if on_policy else categorical(3), categorical(1)
    policy = logits.log_softmax(-1)
    (truth,) = torch.autograd.grad((policy.exp() * (policy - reference)).sum(), logits)
    batch = batch_of(old.tolist(), 0, targets=list(range(SYMBOLS)), weights=old.exp(), ref_logps_T=reference.tolist())
    found = {}
    for kl in ("k3", "unbiased"):
        loss = policy_loss(Objective(kl_weight=1.0, kl=kl))(logits.expand(SYMBOLS, -1), torch.eye(SYMBOLS), batch)
        (found[kl],) = torch.autograd.grad(loss.total, logits)
    torch.testing.assert_close(found["unbiased"], truth, rtol=1e-4, atol=1e-6)
    assert (found["k3"] - truth).norm() > 0.1 * truth.norm()


def bandit(centre, tau: float):
    """Where mirror descent ends on five arms, all of them seen in proportion: probabilities before, after, rewards."""
    before = (torch.arange(5) * 0.4).log_softmax(-1)
    rewards = torch.tensor([0.1, 0.9, 0.3, 0.0, 0.5])
    advantage, arms = (rewards - centre(rewards, before)).tolist(), list(range(5))
    batch = batch_of(before.tolist(), advantage, targets=arms, samples=arms, weights=before.exp())
    logits = before.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-9)

    def closure():
        optimizer.zero_grad()
        loss = policy_loss(Objective("mirror", tau=tau))(logits.expand(5, -1), torch.eye(5), batch).total
        loss.backward()
        return loss

    optimizer.step(closure)
    return before.exp(), logits.detach().softmax(-1), rewards


def test_mirror_descent_ends_at_the_closed_form():
    tau = 0.5
    before, after, rewards = bandit(lambda r, before: tau * (before + r / tau).logsumexp(-1), tau)
    expected = before * (rewards / tau).exp()
    torch.testing.assert_close(after, expected / expected.sum(), rtol=0, atol=1e-3)
    # with the mean for tau log Z it is not exact: better arms gain, worse ones lose
    before, after, rewards = bandit(lambda r, before: (before.exp() * r).sum(), tau)
    assert (after * rewards).sum() > (before * rewards).sum() + 0.05 and after[1] > before[1] and after[3] < before[3]


# --- on a model ---


def group(model, lengths=(5, 9, 2, 7), seed=0):
    """Samples of one prompt, a tool's words among them, and the log-probabilities that a plain forward gives them."""
    generator, prompt, out = torch.Generator().manual_seed(seed), [3, 4, 5 + seed], []
    for i, length in enumerate(lengths):
        tokens = torch.randint(3, 90, (length,), generator=generator).tolist()
        own = [i != 1 or t not in (3, 4) for t in range(length)]
        logps = plain_logps(model, prompt, tokens).detach().tolist()
        out.append(Trajectory(prompt, tokens, own, logps, logps, finished=True, version=0))
    return out


def plain_logps(model, prompt, tokens):
    inputs = torch.tensor(prompt + tokens[:-1])
    logits = model.logits(model(inputs, torch.arange(len(inputs)), Packed(torch.tensor([0, len(inputs)]))).hidden_TD)
    return logits[len(prompt) - 1 :].log_softmax(-1)[torch.arange(len(tokens)), torch.tensor(tokens)]


def step(model, lessons, objective, total=1.0, **changes):
    trainer = Trainer(model, mtp_weight=0, balance_weight=0)
    batch = pack_lessons(lessons)
    for name, value in changes.items():
        setattr(batch, name, value(batch))
    metrics = trainer.forward_backward([batch], policy_loss(objective), total)
    return metrics, trainer.optimizer.gradients, trainer.optimizer.names


@pytest.mark.parametrize("kind", ["grpo", "gspo", "cispo", "mirror"])
def test_the_first_step_is_reinforce_with_the_groups_baseline(tiny_model, assert_close, kind):
    model = tiny_model("qwen2")
    sampled = group(model)
    found = advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0]]))[0].tolist()
    weights = [token_weight("sample" if kind != "mirror" else "token", t.drawn) for t in sampled]
    metrics, ours, names = step(model, [Lesson(t, a, w) for t, a, w in zip(sampled, found, weights)], Objective(kind), total=4.0)
    for p in model.parameters():
        p.grad = None
    for t, a, w in zip(sampled, found, weights):
        (-w * a * (plain_logps(model, t.prompt, t.tokens) * torch.tensor(t.own)).sum() / 4).backward()
    named = dict(model.named_parameters())
    scale = max(p.grad.abs().max().item() for p in named.values())
    for name, gradient in zip(names, ours):
        assert_close(gradient, named[name].grad, floor=0.01 * scale, message=name)
    tokens = metrics.stats["policy_tokens"]
    assert tokens == sum(t.drawn for t in sampled) and metrics.stats["ratio"] == pytest.approx(tokens, rel=1e-5)
    assert metrics.stats["max_mismatch"] < 1e-5 and metrics.stats["clipped_low"] == metrics.stats["clipped_high"] == 0


@pytest.mark.parametrize("objective", [*PRESETS.values(), Objective("mirror", tau=0.2), Objective(importance_cap=2)], ids=str)
def test_equal_rewards_give_exactly_no_gradient(tiny_model, objective):
    model = tiny_model("qwen2")
    found = advantages(torch.tensor([[0.7] * 4]))[0].tolist()
    own = {"ref_logps_T": lambda batch: batch.logps_T, "old_logps_T": lambda batch: batch.logps_T}
    metrics, gradients, _ = step(model, [Lesson(t, a, 1.0) for t, a in zip(group(model), found)], objective, **own)
    if objective.kl_weight or objective.kind == "mirror":  # pulls of 0 but for rounding: the sampler's numbers are another batch's
        assert all(g.abs().max() < 1e-5 for g in gradients)
    else:
        assert all(g.eq(0).all() for g in gradients) and metrics.loss == 0


@pytest.mark.parametrize("aggregation", ["sample", "token", "constant"])
@pytest.mark.parametrize("kind", ["grpo", "gspo", "cispo"])
def test_groups_without_signal_need_not_be_computed(tiny_model, aggregation, kind):
    model = tiny_model("qwen2")
    groups = [group(model, seed=seed) for seed in range(3)]
    rewards = torch.tensor([[1.0, 0, 0, 1], [1, 1, 1, 1], [0, 0, 1, 0]])
    found, lengths = advantages(rewards), [t.drawn for samples in groups for t in samples]
    results = []
    for kept in ([0, 1, 2], [p for p in range(3) if has_signal(rewards[p].tolist())]):
        lessons = [Lesson(t, a, token_weight(aggregation, t.drawn)) for p in kept for t, a in zip(groups[p], found[p].tolist())]
        results.append(step(model, lessons, Objective(kind), normaliser(aggregation, lengths, 16))[1])
    for whole, part in zip(*results):
        torch.testing.assert_close(part, whole, rtol=1e-4, atol=1e-7)


def test_aggregations():
    """Mean over samples of means; over all tokens; over a constant."""
    now, old = [-1.0, -2.0, -0.5], [-1.1, -1.9, -0.6]
    terms, lengths = [-math.exp(a - b) for a, b in zip(now, old)], [2, 1]
    expected = {"sample": ((terms[0] + terms[1]) / 2 + terms[2]) / 2, "token": sum(terms) / 3, "constant": sum(terms) / (2 * 8)}
    for how, value in expected.items():
        batch = batch_of(old, 1, samples=[0, 0, 1], weights=[token_weight(how, n) for n in lengths for _ in range(n)])
        assert measure(Objective(), now, batch)[0] / normaliser(how, lengths, 8) == pytest.approx(value, rel=1e-5)


def test_rows_that_do_not_count_never_reach_the_head():
    hidden = torch.tensor([[0.1, 0.2], [math.nan, 1.0], [0.3, -0.2]], requires_grad=True)
    batch = batch_of(OLD, 1, weights=[1, 0, 0.5])
    loss = policy_loss(Objective())(hidden, EYE, batch)
    loss.total.backward()
    assert loss.total.isfinite() and hidden.grad[1].eq(0).all() and loss.stats["policy_tokens"] == 2 and loss.nll_T[1] == 0
    nothing = policy_loss(Objective("gspo", sequence_mask=0.5))(hidden, EYE, batch_of(OLD, 1, weights=[0, 0, 0]))
    nothing.total.backward()
    assert nothing.total == 0 and all(value == 0 for value in nothing.stats.values())


def test_statistics_of_micro_batches_add_up(tiny_model):
    model = tiny_model("qwen2")
    first, second = ([Lesson(t, a, 1.0) for t, a in zip(group(model, seed=s), (1.0, -1.0, 0.5, -0.5))] for s in range(2))
    batches = [[pack_lessons(first + second)], [pack_lessons(first), pack_lessons(second)]]
    for batch in [b for part in batches for b in part]:
        batch.old_logps_T = batch.logps_T - 0.3 * (batch.samples_T % 2)
    one, two = (Trainer(model, mtp_weight=0).forward_backward(part, policy_loss(Objective(importance_cap=1.2)), 7.0) for part in batches)
    assert one.loss == pytest.approx(two.loss, rel=1e-4)
    assert one.stats.keys() == two.stats.keys()
    for name, value in one.stats.items():
        assert value == pytest.approx(two.stats[name], rel=1e-3, abs=1e-4), name


def test_ratios_are_one_in_the_distribution_drawn_from():
    """At temperature 0.7 inside a nucleus of 0.9 the sampler's log-probabilities are the trainer's, where it knows the support."""
    T, W, params = 40, 50, SamplingParams(temperature=0.7, top_p=0.9)
    hidden, head = (torch.randn(n, 16, generator=torch.Generator().manual_seed(n)).requires_grad_() for n in (T, W))
    drawn_from = sampling_logps((hidden @ head.t()).detach(), params)
    targets = torch.multinomial(drawn_from.exp(), 1, generator=torch.Generator().manual_seed(0)).squeeze(1)
    batch = batch_of(drawn_from[torch.arange(T), targets].tolist(), 1, targets=targets.tolist())
    batch.temperature = 0.7
    inside = drawn_from > -math.inf
    batch.supports = inside.nonzero()[:, 1].int(), torch.cat((torch.zeros(1, dtype=torch.int64), inside.sum(-1).cumsum(0)))
    stats = policy_loss(Objective())(hidden, head, batch).stats
    assert stats["max_ratio"] == pytest.approx(1, abs=1e-5) and stats["max_mismatch"] < 1e-5
    batch.supports = None  # what goes wrong without: the ratio is less than 1 although nothing has moved
    assert policy_loss(Objective())(hidden, head, batch).stats["ratio"] / T < 0.95
