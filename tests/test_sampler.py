"""The engine as sampler of reinforcement learning: groups, routes, supports, new weights, memory that comes and goes."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from functools import cache

import pytest
import torch

from jevons.engine.engine import Engine
from jevons.engine.packed import pack_model
from jevons.engine.sampling import sample as drawn_from
from jevons.engine.sampling import sampling_logps
from jevons.engine.sequence import Sample, SamplingParams
from jevons.kernels import native
from jevons.model.attend import Packed
from jevons.model.config import ModelConfig
from jevons.model.transformer import Transformer

BASE = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "max_position_embeddings": 256}
BASE |= {"initializer_range": 0.2, "num_attention_heads": 4}
MLA = {"kv_lora_rank": 20, "qk_nope_head_dim": 8, "qk_rope_head_dim": 6, "v_head_dim": 10, "q_lora_rank": 12}
MOE = {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 16, "n_shared_experts": 1, "first_k_dense_replace": 1}
CONFIGS = {
    "deepseek_v3": ModelConfig(**(BASE | MLA | MOE), num_nextn_predict_layers=1),
    "qwen2": ModelConfig(**BASE, model_type="qwen2", num_key_value_heads=2),
}
DRAWN = SamplingParams(max_tokens=16, temperature=0.8)


def made(family: str, seed: int = 0) -> Transformer:
    model = Transformer(CONFIGS[family])
    model.init_weights(torch.Generator().manual_seed(seed))
    return model.requires_grad_(False)


tiny = cache(made)


def prompt(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(61), k=length)


def seeds(count: int, params: SamplingParams = DRAWN) -> list[SamplingParams]:
    return [replace(params, seed=i) for i in range(count)]


def same(a: Sample, b: Sample) -> None:
    assert (a.tokens, a.stop_reason) == (b.tokens, b.stop_reason)
    torch.testing.assert_close(torch.tensor(a.logps), torch.tensor(b.logps), rtol=1e-5, atol=1e-5)


def hidden(model: Transformer, text: list[int], routes: dict[int, torch.Tensor] | None = None) -> torch.Tensor:
    return model(torch.tensor(text), torch.arange(len(text)), Packed(torch.tensor([0, len(text)])), routes).hidden_TD


# --- groups -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 9, 16, 17, 30])  # within a block, at its edge, several
@pytest.mark.parametrize("family", CONFIGS)
def test_a_group_reads_its_prompt_once(family: str, length: int) -> None:
    model, text = tiny(family), prompt(0, length)
    engine = Engine(model, block_size=8)
    got = engine.generate([text] * 5, seeds(5))
    assert engine.prompt_tokens == (length - 1 if length != 2 else 5)  # one token more is not worth a step's waiting
    alone = Engine(model, share_prefixes=False)
    for sample, params in zip(got, seeds(5)):
        same(sample, alone.generate([text], params)[0])
    assert (engine.pool.used, engine.pool.free) == (0, engine.pool.num_blocks)


@pytest.mark.parametrize(
    "options",
    [{"max_batch_tokens": 9, "max_sequences": 6}, {"num_blocks": 22}, {"draft": "mtp"}]
    + [pytest.param({"draft": "ngram"}, marks=pytest.mark.slow)],
)
def test_groups_under_chunks_preemption_and_drafts(options: dict[str, int]) -> None:
    model = tiny("deepseek_v3")
    prompts = [text for i, n in enumerate((21, 34, 7)) for text in [prompt(i, n)] * 4]
    params = seeds(12, replace(DRAWN, max_tokens=24))
    want = [Engine(model, share_prefixes=False).generate([p], q)[0] for p, q in zip(prompts, params)]
    engine = Engine(model, block_size=4, **options)  # type: ignore[arg-type]
    for a, b in zip(engine.generate(prompts, params), want):
        same(a, b)
    assert engine.pool.used == 0 and not engine.pool._starts and not engine.pool._start_of
    assert bool(engine.scheduler.preemptions) == ("num_blocks" in options)


def test_who_waits_for_a_reader_keeps_its_place() -> None:
    engine = Engine(tiny("qwen2"), max_sequences=2, block_size=4)
    a, b = prompt(1, 20), prompt(2, 20)
    ids = [engine.submit(text, DRAWN) for text in (a, a, b)]
    engine.step()
    assert [s.id for s in engine.scheduler.running] == ids[:1] and [s.id for s in engine.scheduler.waiting] == ids[1:]
    engine.step()
    assert [s.id for s in engine.scheduler.running] == ids[:2]
    engine.abort_all()
    small = Engine(tiny("qwen2"), num_blocks=10, block_size=4)  # b would leave nothing for the second a
    ids = [small.submit(text, DRAWN) for text in (a, a, b)]
    small.step()
    assert [s.id for s in small.scheduler.running] == ids[:1]
    small.step()
    assert [s.id for s in small.scheduler.running] == ids[:2]


def test_nobody_waits_for_those_behind_it() -> None:
    engine, text = Engine(tiny("qwen2"), max_batch_tokens=16, max_sequences=4, block_size=4), prompt(1, 40)
    slow = engine.submit(text, DRAWN)
    assert engine.step() == engine.step() == []  # 32 of 40 are read
    urgent = engine.submit(text, replace(DRAWN, priority=1))
    behind = engine.submit(text, DRAWN)
    assert {event.id for event in engine.step()} == {slow, urgent}
    assert {event.id for event in engine.step()} == {slow, urgent, behind} and engine._sequences[behind].cached == 39
    engine.abort_all()


def test_a_reader_that_leaves_is_not_waited_for() -> None:
    engine, text = Engine(tiny("qwen2"), max_batch_tokens=8, max_sequences=4, block_size=4), prompt(1, 40)
    first, second = engine.submit(text, DRAWN), engine.submit(text, seeds(1)[0])
    engine.step()
    assert engine._sequences[second].state == "waiting"
    engine.abort(first)
    engine.step()
    assert engine._sequences[second].state == "running" and engine._sequences[second].computed == 16  # eight were read already
    while engine.has_work:
        events = engine.step()
    assert events[-1].sample is not None
    same(events[-1].sample, Engine(tiny("qwen2")).generate([text], seeds(1)[0])[0])


# --- routes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"max_batch_tokens": 9, "max_sequences": 6}, {"num_blocks": 26}, {"draft": "mtp"}, {"draft": "ngram"}]
)
def test_routes_of_shared_prefixes_come_along(options: dict[str, int]) -> None:
    model = tiny("deepseek_v3")
    engine = Engine(model, block_size=4, **options)  # type: ignore[arg-type]
    run_one = engine.generate([prompt(9, 12)], DRAWN)[0]  # known, but without routes: nobody who records may use it
    prompts = [text for text in ([*prompt(9, 12), *run_one.tokens[:4]], prompt(1, 31)) for _ in range(4)]
    params = seeds(8, replace(DRAWN, record_routes=True))
    turns = engine.generate(prompts, params)
    more = [text + turn.tokens + prompt(3, 5) for text, turn in zip(prompts, turns)]
    read = engine.prompt_tokens
    again = engine.generate(more, params)
    if not options:
        assert read < 16 + 12 + 31 and engine.prompt_tokens - read < 8 * 10
        assert all(sample.cached >= len(text) - 10 for sample, text in zip(again, more))
    for text, sample in zip(prompts + more, turns + again):
        fed = text + sample.tokens[:-1]
        assert sample.routes is not None and sample.routes.shape == (len(fed), 2, 3) and sample.routes.dtype == torch.int16
        assert not sample.routes.is_inference()  # autograd will save them
        plain = model(torch.tensor(fed), torch.arange(len(fed)), Packed(torch.tensor([0, len(fed)])))
        assert [sorted(row) for row in sample.routes.flatten(0, 1).tolist()] == [
            sorted(row) for row in torch.stack([r.experts_TK for r in plain.routing], 1).flatten(0, 1).tolist()
        ]
        torch.testing.assert_close(hidden(model, fed, {i + 1: sample.routes[:, i].long() for i in range(2)}), plain.hidden_TD)
    assert engine.pool.routes is not None and engine.pool.routes.dtype == torch.uint8


def test_routes_that_made_the_answer_survive_new_weights() -> None:
    model = made("deepseek_v3")
    engine = Engine(model, block_size=4)
    before = engine.generate([prompt(1, 14)], SamplingParams(temperature=0, max_tokens=8, record_routes=True))[0]
    engine.new_weights(1)
    id = engine.submit(prompt(1, 14), SamplingParams(temperature=0, max_tokens=20, record_routes=True))
    for _ in range(8):
        engine.step()
    model.load_state_dict(tiny("deepseek_v3", 5).state_dict())
    engine.new_weights(2)
    while engine.has_work:
        events = engine.step()
    sample = events[0].sample
    assert sample is not None and sample.routes is not None and before.routes is not None and sample.tokens[:8] == before.tokens
    assert torch.equal(sample.routes[:21], before.routes)  # not those of reading it again
    fed = prompt(1, 14) + sample.tokens[:-1]
    other = model(torch.tensor(fed), torch.arange(len(fed)), Packed(torch.tensor([0, len(fed)])))
    assert torch.equal(sample.routes[21:, 0].long().sort().values, other.routing[0].experts_TK[21:].sort().values)
    assert not torch.equal(sample.routes[:21, 0].long().sort().values, other.routing[0].experts_TK[:21].sort().values)
    assert id == events[0].id


# --- supports ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"num_blocks": 16, "block_size": 4}, {"draft": "ngram", "draft_tokens": 3}])
@pytest.mark.parametrize("filters", [{"top_p": 0.8}, {"top_k": 5}, {"min_p": 0.1, "top_p": 0.95}, {"top_k": 40, "top_p": 0.5}])
def test_supports_are_what_was_drawn_from(options: dict[str, int], filters: dict[str, float]) -> None:
    model = tiny("qwen2")
    params = seeds(4, replace(DRAWN, record_support=True, **filters))  # type: ignore[arg-type]
    text = prompt(1, 4) * 5
    for sample in Engine(model, **options).generate([text] * 4, params):  # type: ignore[arg-type]
        logits = model.logits(hidden(model, text + sample.tokens)[len(text) - 1 : -1])
        logps = sampling_logps(logits, params[0])
        assert sample.supports is not None and len(sample.supports) == len(sample.tokens)
        for row, token, logp, support in zip(logits, sample.tokens, sample.logps, sample.supports):
            assert support is not None and support.dtype == torch.int32 and not support.is_inference() and token in support
            assert abs((row[support.long()] / 0.8).log_softmax(-1)[support.tolist().index(token)].item() - logp) < 1e-5
        assert [s.tolist() for s in sample.supports if s is not None] == [row.isfinite().nonzero()[:, 0].tolist() for row in logps]


def test_what_is_not_cut_has_no_support() -> None:
    engine = Engine(tiny("qwen2"))
    recorded = replace(DRAWN, record_support=True)
    whole, wide, greedy, silent, early = engine.generate(
        [prompt(1, 5)] * 5,
        [
            recorded,
            replace(recorded, top_k=61),
            replace(recorded, temperature=0),
            replace(DRAWN, top_p=0.5),
            replace(recorded, min_tokens=3, stop_ids=(7, 8)),
        ],
    )
    assert whole.supports == wide.supports == [None] * 16 and silent.supports is None
    assert greedy.supports is not None and [s.tolist() for s in greedy.supports if s is not None] == [[t] for t in greedy.tokens]
    assert early.supports is not None  # what a rule forbids is cut too
    assert [None if s is None else len(s) for s in early.supports[:4]] == [59, 59, 59, None][: len(early.supports)]


@pytest.mark.skipif(not native.available(), reason=native.reason() or "native kernels")
@pytest.mark.parametrize("words", [61, 1000, 5000, 40000])
def test_native_draws_are_those_of_torch(words: int) -> None:
    rng, generator = random.Random(words), torch.Generator().manual_seed(words)
    for spread in (0.5, 2.0, 5.0):
        logits = torch.randn(24, words, generator=generator) * spread
        logits[:, 5] = logits[:, 3]  # a tie
        allowed = logits.masked_fill(torch.rand(24, words, generator=generator) < 0.3, -math.inf)
        params = [
            SamplingParams(
                temperature=rng.choice((0, 0.5, 0.7, 1, 1, 1.7)),
                top_p=rng.choice((1, 1, 0.9, 0.5, 0.99)),
                top_k=rng.choice((0, 0, 1, 5, 40, 3000)),
                min_p=rng.choice((0, 0, 0.05, 0.3)),
                record_support=True,
            )
            for _ in logits
        ]
        uniforms = [rng.choice((0.0, rng.random(), rng.random())) for _ in logits]
        for given in (None, allowed):
            want, got = (drawn_from(logits, params, uniforms, given, use_native=wanted) for wanted in (False, True))
            assert got.tokens == want.tokens
            torch.testing.assert_close(torch.tensor(got.logps), torch.tensor(want.logps), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(torch.tensor(got.raw_logps), torch.tensor(want.raw_logps), rtol=1e-5, atol=1e-5)
            assert [None if s is None else s.tolist() for s in got.supports] == [None if s is None else s.tolist() for s in want.supports]
        last = drawn_from(logits, params, [1 - 2**-53] * 24, allowed, use_native=True)
        assert all(allowed[row, token] > -math.inf and math.isfinite(last.logps[row]) for row, token in enumerate(last.tokens))
    logits[3, 7] = math.nan
    for wanted in (False, True):
        with pytest.raises(ValueError, match="not finite"):
            drawn_from(logits, params, uniforms, use_native=wanted)


# --- weights and memory -----------------------------------------------------------------------------------------------


def test_weights_changed_in_place_are_new_weights() -> None:
    model, other = made("qwen2"), tiny("qwen2", 1)
    engine, text = Engine(model), prompt(1, 40)
    greedy = replace(DRAWN, temperature=0)
    engine.generate([text], greedy)
    assert engine.pool.idle
    id = engine.submit(prompt(2, 12), greedy)
    first = [engine.step()[0].token for _ in range(5)]
    pointers = [p.data_ptr() for p in model.parameters()]
    model.load_state_dict(other.state_dict())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        engine.new_weights(7)
    assert not profile.events()  # no tensor is touched, so it takes no time
    assert engine.version == 7 and engine.pool.used == engine.pool.idle == 0 and [p.data_ptr() for p in model.parameters()] == pointers
    while engine.has_work:
        [event] = engine.step()
    assert event.id == id and event.sample is not None
    [rest] = Engine(other).generate([prompt(2, 12) + first], replace(greedy, max_tokens=11))
    assert event.sample.tokens == first + rest.tokens and event.sample.version == 0
    [again] = engine.generate([text], greedy)
    same(again, Engine(other).generate([text], greedy)[0])
    assert (again.cached, again.version) == (0, 7)


@pytest.mark.skipif(not native.available(), reason=native.reason() or "native kernels")
def test_packed_weights_cannot_be_new() -> None:
    model = made("qwen2")
    pack_model(model, "fp32")
    with pytest.raises(ValueError, match=r"new_weights.*packed"):
        Engine(model).new_weights(1)


@pytest.mark.parametrize("family", CONFIGS)
def test_released_memory_is_taken_again(family: str) -> None:
    engine, text = Engine(tiny(family)), prompt(1, 20)
    record = replace(DRAWN, record_routes=family == "deepseek_v3", seed=1)
    [want] = engine.generate([text], record)
    engine.release()
    assert not engine.pool.layers and engine.pool.routes is None and engine.pool.idle == 0
    assert engine.snapshot()["used_blocks"] == 0 and engine.step() == []
    engine.release()  # again: nothing left to give
    [got] = engine.generate([text], record)
    same(got, want)
    assert got.cached == 0 and engine.pool.layers and (engine.pool.routes is not None) == (family == "deepseek_v3")
    engine.submit(text, record)
    with pytest.raises(ValueError, match="release: requests are under way"):
        engine.release()
    engine.abort_all()
