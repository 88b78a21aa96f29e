"""What the engine saves without changing a word: shared prefixes, drafted tokens; and who is served first."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jevons.engine.draft import NGram
from jevons.engine.engine import Engine
from jevons.engine.pool import Pool, chain_digest, salt
from jevons.engine.sequence import Sample, SamplingParams, Sequence
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
GREEDY = SamplingParams(temperature=0, max_tokens=24)


@cache
def tiny(family: str, seed: int = 0) -> Transformer:
    model = Transformer(CONFIGS[family])
    model.init_weights(torch.Generator().manual_seed(seed))
    return model.requires_grad_(False)


def prompt(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(61), k=length)


def same(a: Sample, b: Sample) -> None:
    assert (a.tokens, a.stop_reason) == (b.tokens, b.stop_reason)
    torch.testing.assert_close(torch.tensor(a.logps), torch.tensor(b.logps), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.tensor(a.raw_logps), torch.tensor(b.raw_logps), rtol=1e-5, atol=1e-5)


def run(engine: Engine, tokens: list[int], params: SamplingParams, tenant: str = "") -> Sample:
    engine.submit(tokens, params, tenant=tenant)
    while True:
        for event in engine.step():
            if event.sample:
                return event.sample


# --- prefixes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CONFIGS)
def test_a_known_prefix_is_not_read_again_and_changes_nothing(family: str) -> None:
    engine, base = Engine(tiny(family), block_size=4), prompt(0, 30)
    first = run(engine, base, GREEDY)
    assert first.cached == 0
    read = engine.prompt_tokens
    again = run(engine, base, GREEDY)
    same(again, first)
    assert again.cached == 28 and engine.prompt_tokens - read == 1  # one of the last two tokens is drawn from, not read for its own sake
    # the next turn of the conversation: prompt and answer are known, what follows is new
    turn = base + first.tokens + prompt(1, 7)
    got = run(engine, turn, replace(GREEDY, seed=1, temperature=1.0))
    assert got.cached == (len(base) + len(first.tokens) - 1) // 4 * 4
    same(got, run(Engine(tiny(family), share_prefixes=False), turn, replace(GREEDY, seed=1, temperature=1.0)))
    other = run(engine, base[:13] + prompt(2, 9), GREEDY)  # parts company inside a block
    assert other.cached == 12
    same(other, run(Engine(tiny(family)), base[:13] + prompt(2, 9), GREEDY))


def test_prefixes_are_kept_apart_by_tenant_and_weights() -> None:
    engine, tokens = Engine(tiny("qwen2"), block_size=4), prompt(0, 30)
    assert run(engine, tokens, GREEDY, "a").cached == 0
    assert run(engine, tokens, GREEDY, "b").cached == 0  # nothing to observe of a's
    assert run(engine, tokens, GREEDY, "a").cached == 28
    engine.load_weights(tiny("qwen2", seed=0).named_parameters(), version=1)
    assert run(engine, tokens, GREEDY, "a").cached == 0
    assert salt(0, "a") != salt(0, "b") != salt(1, "b") and chain_digest(salt(0, ""), [1, 2]) != chain_digest(salt(0, ""), [513])


def test_least_recently_used_prefixes_make_room() -> None:
    engine = Engine(tiny("qwen2"), num_blocks=12, block_size=4)
    a, b, c = prompt(1, 17), prompt(2, 17), prompt(3, 17)
    short = replace(GREEDY, max_tokens=1)
    run(engine, a, short), run(engine, b, short)
    assert engine.pool.idle == 8
    assert run(engine, a, short).cached == 16  # a is now the younger
    run(engine, c, short)
    assert run(engine, a, short).cached == 16 and run(engine, b, short).cached < 16
    assert engine.pool.free == 12 and engine.pool.used == 0


def test_what_is_wanted_of_every_prompt_token_is_computed() -> None:
    engine, tokens = Engine(tiny("deepseek_v3"), block_size=4), prompt(0, 30)
    run(engine, tokens, GREEDY)
    assert run(engine, tokens, replace(GREEDY, record_routes=True)).routes.shape[0] == 30 + 24 - 1  # type: ignore[union-attr]
    assert run(engine, tokens, replace(GREEDY, prompt_logprobs=0)).cached == 0


@pytest.mark.parametrize("budget", [7, 2048])
def test_prompt_logprobs_are_those_of_the_packed_forward(budget: int) -> None:
    model, tokens = tiny("deepseek_v3"), prompt(5, 40)
    engine = Engine(model, max_batch_tokens=budget, max_sequences=2, num_blocks=18, block_size=4)
    ids = [engine.submit(t, replace(GREEDY, prompt_logprobs=2)) for t in (tokens, tokens[:25])]  # the pool holds one and a half: preempted
    done = {}
    while engine.has_work:
        done |= {e.id: e.sample for e in engine.step() if e.sample}
    for id, text in zip(ids, (tokens, tokens[:25])):
        T = len(text)
        logps = model.logits(model(torch.tensor(text), torch.arange(T), Packed(torch.tensor([0, T]))).hidden_TD).log_softmax(-1)[:-1]
        got = done[id].prompt_logprobs
        assert got is not None and len(got) == T - 1
        torch.testing.assert_close(torch.tensor([p for p, _ in got]), logps.gather(1, torch.tensor(text[1:])[:, None])[:, 0])
        assert [[i for i, _ in best] for _, best in got] == logps.topk(2).indices.tolist()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5)), min_size=1, max_size=30), st.integers(3, 8))
def test_the_pool_conserves_blocks_whatever_is_shared(actions: list[tuple[int, int]], size: int) -> None:
    pool = Pool(CONFIGS["qwen2"], dtype=torch.float32, device=torch.device("cpu"), num_blocks=size, block_size=2)
    held: list[list[int]] = []
    digests = [bytes([i]) for i in range(5)]
    for action, n in actions:
        if action == 0 and n <= pool.free:
            held.append(pool.allocate(n))
            for block, digest in zip(held[-1], digests):
                pool.publish(block, digest)
        elif action == 1 and held:
            pool.release(held.pop(n % len(held)))
        elif action == 2:
            held.append(pool.take_known(digests[:n]))
        elif action == 3:
            pool.forget_all()
        assert pool.free + pool.used == size and pool.used == len({b for blocks in held for b in blocks})
        assert 0 <= pool.idle <= pool.free
    for blocks in held:
        pool.release(blocks)
    assert pool.free == size


# --- drafts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "draft", "count"), [("deepseek_v3", "mtp", 1), ("deepseek_v3", "mtp", 3), ("deepseek_v3", "ngram", 3), ("qwen2", "ngram", 4)]
)
def test_drafts_change_no_text(family: str, draft: str, count: int) -> None:
    model = tiny(family)
    loop = prompt(1, 5) * 6  # repeats itself, so n-grams have something to say
    prompts = [loop, prompt(2, 9), loop[3:], prompt(4, 21)]
    params = [GREEDY, replace(GREEDY, temperature=0.3, seed=3), replace(GREEDY, temperature=0.5, top_p=0.9, seed=4, max_tokens=40), GREEDY]
    plain = Engine(model, share_prefixes=False)
    want = [run(plain, p, q) for p, q in zip(prompts, params)]
    for options in ({}, {"num_blocks": 22, "block_size": 4}, {"max_batch_tokens": 9, "max_sequences": 4}):
        engine = Engine(model, draft=draft, draft_tokens=count, draft_rows=32, **options)  # type: ignore[arg-type]
        for a, b in zip(engine.generate(prompts, params), want):
            same(a, b)
        assert engine.drafted > 0 and engine.pool.used == 0
    if draft == "ngram":
        assert engine.accepted > 0
    assert plain.drafted == 0


def test_the_mtp_module_guesses_as_its_own_forward_does() -> None:
    model, tokens = tiny("deepseek_v3"), prompt(7, 20)
    engine = Engine(model, draft="mtp", draft_rows=8)
    id = engine.submit(tokens, GREEDY)
    engine.step()
    for _ in range(6):
        sequence = engine._sequences[id]
        T = len(sequence.tokens) - 1
        text, attend, positions = torch.tensor(sequence.tokens), Packed(torch.tensor([0, T])), torch.arange(T)
        hidden = model(text[:-1], positions, attend).hidden_TD
        want = model.logits(model.mtp(hidden, text[1:], positions, attend).hidden_TD)[-1].argmax().item()
        assert sequence.draft == [want]
        engine.step()


def test_an_accepted_draft_saves_a_step() -> None:
    model = tiny("qwen2")
    loop = run(Engine(model), prompt(1, 5), replace(GREEDY, max_tokens=200)).tokens  # a random model falls into a loop
    engine, plain = Engine(model, draft="ngram", draft_tokens=4), Engine(model)
    text = prompt(1, 5) + loop[:150]
    same(run(engine, text, GREEDY), run(plain, text, GREEDY))
    assert engine.accepted > 10 and engine.steps < plain.steps / 2


def test_ngram_proposals() -> None:
    drafts, sequence = NGram(), Sequence(0, [1, 2, 3, 4, 9, 2, 3], GREEDY, stop_ids=frozenset(), max_length=99)
    assert drafts.propose(sequence, 3) == [4, 9, 2]
    assert drafts.propose(sequence, 7) == [4, 9, 2, 3, 4, 9, 2]  # a loop goes on
    sequence.tokens += [4, 5]
    assert drafts.propose(sequence, 3) == []
    sequence.tokens += [2, 3, 4]  # after 2 3 4 came 9, later 5
    assert drafts.propose(sequence, 2) == [5, 2]


# --- order of service -------------------------------------------------------------------------------------------------


def order_of_service(requests: list[tuple[str, int]]) -> list[int]:
    engine = Engine(tiny("qwen2"), max_sequences=1)
    ids = [engine.submit([1, 2, 3], replace(GREEDY, max_tokens=1, priority=priority), tenant=tenant) for tenant, priority in requests]
    out: list[int] = []
    while engine.has_work:
        out += [ids.index(event.id) for event in engine.step()]
    return out


def test_priorities_then_fairness_then_order() -> None:
    assert order_of_service([("a", 0)] * 4) == [0, 1, 2, 3]
    assert order_of_service([("a", 0), ("a", 0), ("a", 5), ("a", 1)]) == [2, 3, 0, 1]
    # a sends five before b's two: b does not wait for all of them
    assert order_of_service([("a", 0)] * 5 + [("b", 0)] * 2) == [0, 5, 1, 6, 2, 3, 4]


def test_embeddings_are_the_mean_of_hidden_states() -> None:
    model = tiny("qwen2")
    engine = Engine(model, max_batch_tokens=8, max_sequences=2, num_blocks=8, block_size=4)  # chunked, and preempted
    texts = [prompt(1, 21), prompt(2, 9), prompt(1, 21)]
    for text, got in zip(texts, engine.generate(texts, SamplingParams(max_tokens=1, embed=True))):
        T = len(text)
        want = model(torch.tensor(text), torch.arange(T), Packed(torch.tensor([0, T]))).hidden_TD.mean(0)
        assert got.embedding is not None
        torch.testing.assert_close(got.embedding, want)
    # the last token of this prompt is read alone, as drawn ones are, so it may bring a draft
    again, params = [texts[0][i % 3] for i in range(17)], SamplingParams(max_tokens=4, embed=True)
    plain, drafting = (Engine(model, max_batch_tokens=8, max_sequences=1, draft=draft) for draft in (None, "ngram"))
    (a,), (b,) = (each.generate([again], params) for each in (plain, drafting))
    assert drafting.drafted
    torch.testing.assert_close(a.embedding, b.embedding)
