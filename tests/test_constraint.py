"""Penalties, bias, minimums, thinking budgets and grammars, each against its definition."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from jevons.engine.constraint import Constraint
from jevons.engine.engine import Engine
from jevons.engine.sequence import Sample, SamplingParams, ThinkingBudget
from jevons.model.config import ModelConfig
from jevons.model.transformer import Transformer

END, WAIT, STOP, START = 5, 7, 2, 4


@pytest.fixture(scope="module")
def model() -> Transformer:
    config = ModelConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        model_type="qwen2",
        initializer_range=0.2,
        max_position_embeddings=256,
    )
    model = Transformer(config)
    model.init_weights(torch.Generator().manual_seed(0))
    return model.requires_grad_(False)


def answer(model: Transformer, params: SamplingParams, grammar: object = None, **options: object) -> Sample:
    engine = Engine(model, **({"stop_ids": [STOP]} | options))  # type: ignore[arg-type]
    engine.submit([1, 3, 9], params, grammar=grammar)  # type: ignore[arg-type]
    while True:
        for event in engine.step():
            if event.sample:
                return event.sample


def test_penalties_are_those_of_their_papers() -> None:
    params = SamplingParams(repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25, logit_bias=((3, 4.0), (0, -1.0)))
    rules = Constraint([3, 4, 4], params, frozenset(), None)
    for token in (1, 1, 4):
        rules.accept(token)
    row = torch.tensor([1.0, 2.0, 3.0, -4.0, 5.0])
    rules.apply(row)
    # 0: bias; 1: /2, twice in the answer; 2: untouched; 3: in the prompt, below 0 so times 2, and bias; 4: /2, once in the answer
    torch.testing.assert_close(row, torch.tensor([0.0, 1.0 - 0.5 - 0.5, 3.0, -8.0 + 4.0, 2.5 - 0.5 - 0.25]))


def test_repetition_penalty_is_that_of_transformers() -> None:
    lp = pytest.importorskip("transformers.generation.logits_process")
    row = torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[3, 8, 8, 20, 49]])
    want = lp.RepetitionPenaltyLogitsProcessor(1.3)(ids, row.clone())
    rules = Constraint(ids[0].tolist(), SamplingParams(repetition_penalty=1.3), frozenset(), None)
    rules.apply(row[0])
    torch.testing.assert_close(row, want)


def test_a_biased_or_penalised_draw_reports_both_distributions(model: Transformer) -> None:
    plain = answer(model, SamplingParams(temperature=0, max_tokens=8), stop_ids=())
    forced = answer(model, SamplingParams(temperature=1.0, max_tokens=8, seed=0, logit_bias=((11, 100.0),)))
    assert forced.tokens == [11] * 8 and forced.logps == pytest.approx([0.0] * 8, abs=1e-5)
    assert all(p < -1e-3 for p in forced.raw_logps)  # the model's own opinion, not the biased one
    varied = answer(model, SamplingParams(temperature=0, max_tokens=40, frequency_penalty=100.0), stop_ids=())
    assert len(set(varied.tokens)) == 40 and varied.tokens[0] == plain.tokens[0]


def test_minimum_length_forbids_every_stop(model: Transformer) -> None:
    free = answer(model, SamplingParams(temperature=0, max_tokens=30), stop_ids=())
    stop = free.tokens[3]
    early = answer(model, SamplingParams(temperature=0, max_tokens=30), stop_ids=[stop])
    assert len(early.tokens) <= 4 and early.stop_reason == "stop"
    late = answer(model, SamplingParams(temperature=0, max_tokens=30, min_tokens=12, stop_ids=(9,)), stop_ids=[stop])
    assert len(late.tokens) >= 13 and not {stop, 9} & set(late.tokens[:12])


def test_a_thinking_budget_is_never_passed(model: Transformer) -> None:
    for limit in (0, 1, 5):
        got = answer(model, SamplingParams(max_tokens=30, seed=1, thinking=ThinkingBudget(end_ids=(END, 6), max_tokens=limit)), stop_ids=())
        at = got.tokens.index(END)
        assert at <= limit and (at < limit or got.tokens[at + 1] == 6)
        if at == limit:
            assert got.logps[at : at + 2] == [0.0, 0.0]  # what is forced was certain
    assert got.raw_logps[at] < 0


def test_a_minimum_of_thinking_waits_or_forbids(model: Transformer) -> None:
    eager = SamplingParams(max_tokens=40, seed=2, logit_bias=((END, 50.0),))  # would end at once
    assert answer(model, eager).tokens[0] == END
    forbidden = answer(model, replace(eager, thinking=ThinkingBudget(end_ids=(END,), min_tokens=10)))
    assert forbidden.tokens.index(END) == 10 and STOP not in forbidden.tokens[:10]
    waiting = answer(model, replace(eager, thinking=ThinkingBudget(end_ids=(END,), min_tokens=6, wait_ids=(WAIT, 8))))
    assert waiting.tokens[:7] == [WAIT, 8, WAIT, 8, WAIT, 8, END]


def test_thinking_that_does_not_begin_is_not_bounded(model: Transformer) -> None:
    budget = ThinkingBudget(end_ids=(END,), start_ids=(START,), max_tokens=3)
    plain = SamplingParams(max_tokens=12, temperature=0)
    free = answer(model, plain, stop_ids=())
    assert free.tokens[0] != START
    assert answer(model, replace(plain, thinking=budget), stop_ids=()).tokens == free.tokens
    opened = answer(model, replace(plain, thinking=budget, logit_bias=((START, 50.0),)), stop_ids=())
    assert opened.tokens[:5] == [START, START, START, START, END]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 9), max_size=40), st.integers(0, 8), st.integers(0, 8), st.booleans())
def test_any_stream_of_draws_keeps_the_budget(draws: list[int], low: int, extra: int, wait: bool) -> None:
    """A scripted model: every draw is taken unless it is impossible; thinking stays inside its bounds."""
    budget = ThinkingBudget(end_ids=(END,), min_tokens=low, max_tokens=low + extra, wait_ids=(WAIT,) if wait else ())
    rules, out = Constraint([1], SamplingParams(thinking=budget), frozenset([STOP]), None), []
    for draw in draws:
        row = torch.zeros(10)
        row[draw] = 1.0
        rules.apply(row)
        token = rules.replace(int(row.argmax()))
        rules.accept(token)
        out.append(token)
    if END in out:
        assert low <= out.index(END) <= low + extra
    else:
        assert len(out) <= low + extra
    assert STOP not in out[: min(low, out.index(END) if END in out else low)]


class OnlyEven:
    """A grammar: even tokens, then the end."""

    def __init__(self, active_after: int = 0) -> None:
        self.seen: list[int] = []
        self.active_after = active_after

    def mask(self, words: Tensor) -> bool:
        if len(self.seen) < self.active_after:
            return False
        words.fill_(0x55555555)
        return True

    def accept(self, token: int) -> None:
        self.seen.append(token)

    @property
    def done(self) -> bool:
        return False


def test_a_grammar_masks_draws_once_it_is_active(model: Transformer) -> None:
    for temperature in (0.0, 1.5):
        grammar = OnlyEven(active_after=6)
        got = answer(model, SamplingParams(max_tokens=30, temperature=temperature, seed=0), grammar, stop_ids=())
        assert grammar.seen == got.tokens and all(t % 2 == 0 for t in got.tokens[6:]) and any(t % 2 for t in got.tokens[:6])
        assert all(math.isfinite(p) for p in got.logps + got.raw_logps)


class OnlyTheEnd(OnlyEven):
    def mask(self, words: Tensor) -> bool:
        words[STOP // 32] = 1 << STOP % 32
        return True


def test_a_grammar_that_is_over_beats_a_minimum(model: Transformer) -> None:
    got = answer(model, SamplingParams(max_tokens=30, min_tokens=9, seed=0), OnlyTheEnd())
    assert got.tokens == [STOP] and got.stop_reason == "stop"


def test_errors_name_the_field() -> None:
    wrong = {"min_tokens": -1, "repetition_penalty": 1e-9, "presence_penalty": math.inf, "frequency_penalty": math.nan}
    for field, value in (wrong | {"logit_bias": ((-1, 0.0),), "prompt_logprobs": -2}).items():
        with pytest.raises(ValueError, match=field):
            SamplingParams(**{field: value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="end_ids"):
        ThinkingBudget(end_ids=())
    with pytest.raises(ValueError, match="min_tokens"):
        ThinkingBudget(end_ids=(1,), min_tokens=5, max_tokens=4)
