"""The best model for a budget: the law's own optimum, ranges that hold it, shapes of the wanted size that a recipe takes."""

import json
from itertools import pairwise

import pytest

from jevons.cost import shape
from jevons.cost.arithmetic import parameters, train_flops
from jevons.cost.hardware import Hardware, parse_cluster
from jevons.cost.memory import training_memory
from jevons.cost.scaling import (
    FULL_GAIN,
    LEVERAGE,
    NO_GAIN,
    SHARE_OF_N,
    SPARSE_SHARE,
    Measured,
    Range,
    best,
    flat,
    leverage,
    loss,
    optimum,
    read_measured,
    sizes,
)
from jevons.recipe import parse

HARDWARE = Hardware.load()
H100 = parse_cluster("8xH100", HARDWARE)


def test_law():
    chinchilla = 5.76e23  # FLOPs of the 70B model on 1.4T tokens
    assert optimum(chinchilla) == pytest.approx(70e9, rel=0.05) and chinchilla / 6 / optimum(chinchilla) == pytest.approx(1.4e12, rel=0.1)
    for flops in (1e18, 1e21, 1e24):
        size = optimum(flops)
        at = loss(size, flops / 6 / size)
        assert all(loss(size * x, flops / 6 / size / x) > at for x in (0.98, 1.02))
        assert optimum(100 * flops) / size == pytest.approx(100**SHARE_OF_N, rel=1e-3)
        for edge in flat(flops, size):
            assert loss(edge, flops / 6 / edge) == pytest.approx(1.01 * at, rel=1e-3)
        found = sizes(flops)
        assert found.low <= found.middle == size <= found.high
    assert sizes(1e26).high / sizes(1e26).low > sizes(1e21).high / sizes(1e21).low > 1  # less sure away from the fitted runs


def test_leverage():
    assert {round(e.leverage, 1) for e in LEVERAGE} >= {round(12.88 / 3.52, 1), round(2 * 0.68 / 0.35, 1), round(6.1 / 0.85, 1), 1 / 0.4}
    assert leverage(1e15) == leverage(NO_GAIN) and leverage(NO_GAIN).high * SPARSE_SHARE == pytest.approx(1)
    assert leverage(1e26) == leverage(FULL_GAIN) and (leverage(1e26).low, leverage(1e26).high) == (2.5, 7.2)
    curve = [leverage(10 ** (18 + i / 10)) for i in range(60)]
    assert all(a.middle <= b.middle and a.low <= a.middle <= a.high for a, b in pairwise(curve))
    here = Measured(Range(0.9, 1.0, 1.1), 1e14, 0.5, "cpu", "2026-11-27")
    assert leverage(1e13, here) == leverage(1e14, here) == here.leverage
    assert leverage(NO_GAIN, here).middle == pytest.approx(leverage(NO_GAIN).middle) and leverage(1e22, here) == leverage(1e22)


@pytest.mark.parametrize(("active", "vocab"), [(2e6, 1024), (2e7, 8192), (1.2e8, 32768), (1e9, 32768), (3.7e10, 129280)])
def test_shapes_have_the_wanted_size(active, vocab):
    plain = shape.dense(active, vocab_size=vocab)
    assert parameters(plain).active_without_embedding == pytest.approx(active, rel=0.05)
    for ratio in (5, 18):
        mixed = shape.sparse(active, ratio * active, vocab_size=vocab)
        counts = parameters(mixed)
        assert (counts.active_without_embedding, counts.total) == (pytest.approx(active, rel=0.05), pytest.approx(ratio * active, rel=0.05))
    for config in (plain, mixed):
        model = {key: list(value) if isinstance(value, tuple) else value for key, value in shape.fields(config).items()}
        assert parse({"name": "made", "model": model, "prepare": {"sources": ["x"]}}, "here").config() == config


def test_a_vocabulary_can_be_too_large():
    with pytest.raises(ValueError, match="vocab_size: 131,072 rows leave nothing of 1,000,000 parameters"):
        shape.dense(1e6, vocab_size=131072)


def test_a_budget_is_spent():
    for budget, share in ((100, 0.3), (20_000, 0.4)):
        suggestion = best(budget, H100, share)
        for option in (suggestion.best, suggestion.other):
            assert option.hours * 8 * 2.5 == pytest.approx(budget)
            reached = share * (1 if option.kind == "dense" else SPARSE_SHARE)
            assert option.flops == pytest.approx(option.hours * 3600 * 8 * 989.5e12 * reached)
            assert option.flops == pytest.approx(option.tokens * train_flops(option.config, 4096, mtp=False))
            assert option.parameters == parameters(option.config) and option.config.max_position_embeddings == 4096
            assert option.flat[0] < option.active.low <= option.active.middle <= option.active.high < option.flat[1]
            assert option.active.middle == pytest.approx(option.parameters.active_without_embedding, rel=0.05)
            assert option.loss.low <= option.loss.middle <= option.loss.high
            memory = training_memory(option.config, tokens=4096, micro_batches=2, devices=8, recompute=option.recompute)
            assert option.memory == memory.total < 0.9 * 80e9
        assert suggestion.best.loss.middle < suggestion.other.loss.middle
    assert best(100, H100, 0.3, spot=True).best.flops == pytest.approx(best(100, H100, 0.3).best.flops * 2.5 / 1.5)


def test_dense_wins_small_and_a_mixture_large():
    small, large = best(20, parse_cluster("H100", HARDWARE), 0.2), best(20_000, H100, 0.4)
    assert (small.best.kind, small.sure, large.best.kind, large.sure) == ("dense", True, "moe", True)
    assert small.best.config.n_routed_experts == 0 and large.best.config.n_routed_experts >= 16
    assert "worse a second" in str(small) and "(published)" in str(large)
    assert str(small).startswith("A dense model, ") and "a mixture of experts is ahead over that whole range" in str(large)
    # a mixture that trains at a tenth of the speed does not pay at any leverage that was published
    assert best(20_000, H100, 0.4, sparse_share=0.04).best.kind == "dense"
    # on a scale that nobody measured it may go either way
    between = [best(money, H100, 0.4, sparse_share=0.2) for money in (200, 400, 700)]
    assert {s.sure for s in between} == {True, False} and any("behind at its other end" in str(s) for s in between)
    # less memory: fewer experts, then smaller models, on more tokens, and it says so
    roomy, cramped = best(3000, parse_cluster("B200", HARDWARE), 0.4), best(3000, parse_cluster("RTX 4090", HARDWARE), 0.4)
    assert not roomy.best.cramped and cramped.best.cramped and cramped.other.cramped and "for want of memory" in str(cramped)
    for option in (cramped.best, cramped.other):
        assert 0.7 * 24e9 < option.memory <= 0.9 * 24e9
        assert option.parameters.active_without_embedding < 0.7 * option.active.middle


def test_little_text_makes_a_larger_model():
    free, tight = best(100, H100, 0.3), best(100, H100, 0.3, text=1e9)
    assert (free.best.passes, tight.best.passes) == (None, pytest.approx(4, rel=0.2))
    assert tight.best.parameters.active > 2 * free.best.parameters.active and "Your text is read 3." in str(tight)
    assert best(100, H100, 0.3, text=1e12).best.config == free.best.config


def test_measured_results_are_read(tmp_path):
    file = tmp_path / "sparse.json"
    models = {"dense": {"flops": 1e7, "tokens_per_second": 1000}, "moe": {"flops": 1e7, "tokens_per_second": 400}}
    curves = {"dense": {"tokens": [[0, 9.0], [100, 6.0], [200, 5.0]]}, "moe": {"tokens": [[0, 9.0], [100, 5.0], [200, 4.0]]}}
    part = {"models": models, "curves": curves, "tokens": 200, "device": "cpu", "date": "2026-11-27"}
    file.write_text(json.dumps({"benchmark": "sparse", "ours": {"loss": part}}))
    found = read_measured(file)
    assert (found.leverage.middle, found.speed, found.flops) == (2.0, 0.4, 6e9)  # dense needs 200 tokens for what took the mixture 100
    curves["moe"]["tokens"] = [[0, 9.0], [100, 8.0], [200, 7.5]]
    file.write_text(json.dumps({"ours": {"loss": part}}))
    assert read_measured(file).leverage.middle == pytest.approx(0.25)
    cpu = parse_cluster("CPU", HARDWARE)
    slow = best(0.1, cpu, 0.25, vocab_size=2048, sequence_length=512, measured=found)
    assert slow.best.kind == "dense" and slow.other.flops == pytest.approx(0.4 * slow.best.flops)
    file.write_text(json.dumps({"ours": {"latency": {}}}))
    assert read_measured(file) is None
    for wrong in ("{", "[]", json.dumps({"ours": {"loss": {"curves": {}}}})):
        file.write_text(wrong)
        with pytest.raises(ValueError, match=r"sparse\.json: not what benchmarks/sparse\.py writes"):
            read_measured(file)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 0}, "budget: must be above 0"),
        ({"share": 1.2}, "share: must be above 0 and at most 1"),
        ({"sparse_share": -1.0}, "sparse_share: must be above 0"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        best(**{"budget": 100, "cluster": H100, "share": 0.3} | arguments)
