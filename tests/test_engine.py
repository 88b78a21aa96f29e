"""The engine against the plain forward, against transformers, and against itself under any schedule."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from functools import cache

import pytest
import torch

from jevons.engine.cache import Paged
from jevons.engine.engine import Engine
from jevons.engine.pool import Pool, bytes_per_token
from jevons.engine.sampling import sample, sampling_logps
from jevons.engine.sequence import Sample, SamplingParams
from jevons.kernels.attention import absorbed_attention, causal_attention_ref, chunk_attention, row_attention
from jevons.model.attend import Packed, expand_latent
from jevons.model.config import ModelConfig
from jevons.model.folder import disk_tensors, save_model
from jevons.model.transformer import Transformer

BASE = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "max_position_embeddings": 256}
BASE |= {"initializer_range": 0.2}  # far from uniform, so that argmaxes are not ties
MLA = BASE | {"num_attention_heads": 4, "kv_lora_rank": 20, "qk_nope_head_dim": 8, "qk_rope_head_dim": 6, "v_head_dim": 10}
MOE = {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 16}
SOFTMAX = {"scoring_func": "softmax", "topk_method": "greedy"}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "mscale": 1.0, "mscale_all_dim": 1.0}
CONFIGS = {
    "deepseek_v3": ModelConfig(
        **(MLA | MOE | {"q_lora_rank": 12, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2}),
        routed_scaling_factor=2.5,
        rope_scaling=YARN,
    ),
    "deepseek_v2": ModelConfig(
        **(MLA | MOE | SOFTMAX), model_type="deepseek_v2", n_shared_experts=1, first_k_dense_replace=1, norm_topk_prob=False
    ),
    "llama": ModelConfig(**BASE, model_type="llama", num_attention_heads=8, num_key_value_heads=2, head_dim=8),
    "qwen2": ModelConfig(**BASE, model_type="qwen2", num_attention_heads=4, num_key_value_heads=1, tie_word_embeddings=True),
    "qwen3": ModelConfig(**BASE, model_type="qwen3", num_attention_heads=4, num_key_value_heads=2, head_dim=16),
    "qwen3_moe": ModelConfig(**(BASE | MOE | SOFTMAX), model_type="qwen3_moe", num_attention_heads=4, num_key_value_heads=4, head_dim=8),
}
FAMILIES = list(CONFIGS)
GREEDY = SamplingParams(temperature=0, max_tokens=24)


@cache
def tiny(family: str, seed: int = 0) -> Transformer:
    model = Transformer(CONFIGS[family])
    model.init_weights(torch.Generator().manual_seed(seed))
    return model.requires_grad_(False)


def prompt(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(61), k=length)


def packed(model: Transformer, *documents: list[int], routes: dict[int, torch.Tensor] | None = None) -> torch.Tensor:
    lengths = torch.tensor([0, *map(len, documents)])
    positions = torch.cat([torch.arange(len(d)) for d in documents])
    return model(torch.tensor([t for d in documents for t in d]), positions, Packed(lengths.cumsum(0)), routes).hidden_TD


def pool_of(model: Transformer, num_blocks: int = 40, block_size: int = 4) -> Pool:
    pool = Pool(model.config, dtype=torch.float32, device=torch.device("cpu"), num_blocks=num_blocks, block_size=block_size)
    pool.native = False  # these tests are of the torch path; tests/test_packed.py has the other
    for layer in pool.layers:
        for memory in layer:
            memory.fill_(math.nan)  # nobody may read what nobody wrote
    return pool


def paged(
    model: Transformer, pool: Pool, tables: list[list[int]], documents: list[list[int]], cached: list[int], new: list[int]
) -> list[torch.Tensor]:
    """Hidden states of tokens cached[i] : cached[i] + new[i] of each document, split by document."""
    attend = Paged(pool, tables, cached, new)
    tokens = torch.tensor([t for d, c, n in zip(documents, cached, new) for t in d[c : c + n]])
    return list(model(tokens, attend.positions_T, attend).hidden_TD.split(new))


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def same(a: Sample, b: Sample) -> None:
    assert (a.tokens, a.stop_reason) == (b.tokens, b.stop_reason)
    close(torch.tensor(a.logps), torch.tensor(b.logps))
    close(torch.tensor(a.raw_logps), torch.tensor(b.raw_logps))


# --- the seam ---------------------------------------------------------------------------------------------------------


def test_attention_kernels_match_the_reference() -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 9, heads, width, generator=g) for heads, width in ((6, 8), (2, 8), (2, 5)))
    truth = causal_attention_ref(q, k, v, 0.3)
    bias_LC = torch.full((4, 9), -math.inf).triu(6)
    close(chunk_attention(q[0, 5:], k[0], v[0], bias_LC, 0.3), truth[0, 5:])
    close(row_attention(q[:, 8], k, v, None, 0.3), truth[:, 8])
    bias_SC = torch.tensor([[0.0] * 9, [0.0] * 6 + [-math.inf] * 3])
    close(row_attention(torch.stack((q[0, 8], q[1, 5])), k, v, bias_SC, 0.3), torch.stack((truth[0, 8], truth[1, 5])))


def test_absorbed_attention_is_expanded_attention() -> None:
    g = torch.Generator().manual_seed(1)
    N, nope, V, C, R, rows = 4, 8, 10, 20, 6, 13
    q, cache_CX = torch.randn(1, N, nope + R, generator=g), torch.randn(rows, C + R, generator=g)
    w_kvb = torch.randn(N * (nope + V), C, generator=g) / 4
    k, v = expand_latent(cache_CX[:, :C], cache_CX[:, C:], w_kvb, N, V)
    score_NC = torch.einsum("nh,cnh->nc", q[0], k) * 0.2
    close(absorbed_attention(q, cache_CX[None], None, w_kvb, V, 0.2)[0], torch.einsum("nc,cnv->nv", score_NC.softmax(-1), v))


@pytest.mark.parametrize("family", FAMILIES)
def test_paged_prefill_chunks_and_decode_are_the_packed_forward(family: str) -> None:
    model, pool = tiny(family), pool_of(tiny(family))
    documents = [prompt(i, n) for i, n in enumerate((23, 37, 5))]
    truth = list(packed(model, *documents).split([23, 37, 5]))
    tables = [pool.allocate(pool.blocks_for(len(d))) for d in documents]
    tables[0] = tables[0][::-1]  # blocks need not follow each other

    for got, want in zip(paged(model, pool, tables, documents, [0, 0, 0], [23, 37, 5]), truth):  # one shot
        close(got, want)
    cached, pieces = [0, 0, 0], [[], [], []]
    # chunks, single tokens and new prompts in one batch, in any order
    for new in ((9, 30, 0), (1, 1, 0), (6, 1, 4), (1, 4, 1), (6, 1, 0)):
        who = [i for i in range(3) if new[i]]
        got = paged(model, pool, [tables[i] for i in who], [documents[i] for i in who], [cached[i] for i in who], [new[i] for i in who])
        for i, hidden in zip(who, got):
            pieces[i].append(hidden)
            cached[i] += new[i]
    assert cached == [23, 37, 5]
    for piece, want in zip(pieces, truth):
        close(torch.cat(piece), want)
    fresh = pool_of(model)  # token by token: MLA never expands
    table = fresh.allocate(6)
    close(torch.cat([paged(model, fresh, [table], documents[:1], [t], [1])[0] for t in range(23)]), truth[0])


def test_single_tokens_of_very_different_length_share_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jevons.engine.cache.SHORT", 4)
    model, pool = tiny("llama"), pool_of(tiny("llama"))
    documents = [prompt(i, n) for i, n in enumerate((3, 7, 60))]
    tables = [pool.allocate(pool.blocks_for(len(d))) for d in documents]
    lengths = [len(d) - 1 for d in documents]
    paged(model, pool, tables, documents, [0, 0, 0], lengths)
    assert len(Paged(pool, tables, lengths, [1, 1, 1]).parts) == 3
    for got, document in zip(paged(model, pool, tables, documents, lengths, [1, 1, 1]), documents):
        close(got, packed(model, document)[-1:])


def test_cache_bytes_per_token() -> None:
    v3 = CONFIGS["deepseek_v3"]
    assert bytes_per_token(v3, torch.bfloat16) == (20 + 6) * 3 * 2
    assert bytes_per_token(replace(v3, num_nextn_predict_layers=1), torch.bfloat16) == (20 + 6) * 4 * 2  # MTP modules cache too
    assert bytes_per_token(CONFIGS["llama"], torch.float32) == 2 * 2 * 8 * 3 * 4
    held = sum(m.nbytes for layer in pool_of(tiny("deepseek_v3")).layers for m in layer)
    assert held == 40 * 4 * bytes_per_token(v3, torch.float32)


# --- whole answers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_transformers(family: str, tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    save_model(tiny(family), tmp_path / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    tokens = prompt(7, 19)
    want = theirs.generate(torch.tensor([tokens]), max_new_tokens=64, do_sample=False, pad_token_id=0)[0, 19:].tolist()
    [got] = Engine(tiny(family)).generate([tokens], SamplingParams(temperature=0, max_tokens=64))
    assert got.tokens == want and got.stop_reason == "length"


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3"])
def test_an_answer_does_not_depend_on_the_batch_the_chunks_or_preemption(family: str) -> None:
    model = tiny(family)
    prompts = [prompt(i, n) for i, n in enumerate((30, 3, 17, 1, 45, 8))]
    params = [SamplingParams(max_tokens=20, seed=i, temperature=0.9, top_p=(1.0, 0.9)[i % 2]) for i in range(5)] + [GREEDY]
    alone = [Engine(model).generate([p], q)[0] for p, q in zip(prompts, params)]
    tight = Engine(model, num_blocks=20, block_size=4)  # 80 tokens for 224
    preempted: list[int] = []
    give_up = tight.scheduler._preempt
    tight.scheduler._preempt = lambda victim: (preempted.append(victim.id), give_up(victim))[1]  # type: ignore[method-assign]
    for engine in (Engine(model), Engine(model, max_batch_tokens=7, max_sequences=7, block_size=5), Engine(model, max_sequences=2), tight):
        for a, b in zip(engine.generate(prompts, params), alone):
            same(a, b)
        assert (engine.pool.free, engine.pool.used) == (engine.pool.num_blocks, 0)
    assert preempted


def test_seeds_and_fresh_draws() -> None:
    engine, params = Engine(tiny("llama")), SamplingParams(max_tokens=30)
    a, b, c = engine.generate([prompt(0, 5)] * 3, [replace(params, seed=s) for s in (5, 5, 6)])
    assert a.tokens == b.tokens != c.tokens
    d, e = engine.generate([prompt(0, 5)] * 2, params)
    assert d.tokens != e.tokens


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen2"])
def test_logps_are_those_of_the_packed_forward(family: str) -> None:
    model, tokens = tiny(family), prompt(3, 11)
    params = SamplingParams(max_tokens=40, temperature=0.7, top_p=0.8, seed=1, logprobs=3)
    [got] = Engine(model, max_batch_tokens=64).generate([tokens], params)
    logits = model.logits(packed(model, tokens + got.tokens)[10:-1])
    chosen = torch.tensor(got.tokens)[:, None]
    raw = logits.log_softmax(-1)
    close(torch.tensor(got.raw_logps), raw.gather(1, chosen)[:, 0])
    probabilities, order = (logits / 0.7).softmax(-1).sort(descending=True)
    before = probabilities.cumsum(-1) - probabilities
    nucleus = torch.zeros_like(logits).scatter_(1, order, torch.where(before < 0.8, probabilities, 0.0))
    close(torch.tensor(got.logps), (nucleus / nucleus.sum(-1, keepdim=True)).log().gather(1, chosen)[:, 0])
    assert got.logprobs is not None
    assert [[i for i, _ in row] for row in got.logprobs] == raw.topk(3).indices.tolist()
    close(torch.tensor([[p for _, p in row] for row in got.logprobs]), raw.topk(3).values)
    [greedy] = Engine(model).generate([tokens], GREEDY)
    assert set(greedy.logps) == {0.0} and all(p < 0 for p in greedy.raw_logps)


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe"])
def test_recorded_routes_replay(family: str) -> None:
    model, tokens = tiny(family), prompt(4, 30)
    params = SamplingParams(max_tokens=20, seed=0, record_routes=True)
    layers = [i for i in range(3) if model.config.is_moe(i)]
    prompts = [tokens, tokens[:20], tokens[:9]]
    engine = Engine(model, num_blocks=18, block_size=4, max_batch_tokens=9, max_sequences=4)  # chunked, and preempted
    for start, got in zip(prompts, engine.generate(prompts, params)):
        fed = start + got.tokens[:-1]
        assert got.routes is not None and got.routes.shape == (len(fed), len(layers), 3)
        assert not got.routes.is_inference()  # autograd will save them
        routes = {layer: got.routes[:, i].long() for i, layer in enumerate(layers)}
        close(packed(model, fed, routes=routes), packed(model, fed))
        other = {layer: (r + 1) % 8 for layer, r in routes.items()}
        assert not torch.allclose(packed(model, fed, routes=other), packed(model, fed), atol=1e-3)


def test_stopping() -> None:
    model = tiny("llama")
    [free] = Engine(model).generate([prompt(1, 4)], GREEDY)
    stop = free.tokens[5]
    first = free.tokens.index(stop)
    [got] = Engine(model).generate([prompt(1, 4)], replace(GREEDY, stop_ids=(stop,)))
    assert (got.tokens, got.stop_reason) == (free.tokens[: first + 1], "stop")
    [got] = Engine(model, stop_ids=[stop]).generate([prompt(1, 4)], GREEDY)
    assert got.stop_reason == "stop"
    [full] = Engine(model).generate([prompt(1, 250)], GREEDY)
    assert (len(full.tokens), full.stop_reason) == (6, "length")  # the model has 256 positions
    [small] = Engine(model, num_blocks=3, block_size=4).generate([prompt(1, 4)], GREEDY)
    assert (len(small.tokens), small.stop_reason) == (8, "length") and small.tokens == free.tokens[:8]


def test_errors_name_the_cause() -> None:
    engine = Engine(tiny("llama"), num_blocks=3, block_size=16)
    bad_prompts = {"empty": [], "token 1 is 61": [1, 61], "token 0 is -1": [-1], "positions": [0] * 256, "num_blocks": [0] * 48}
    for message, bad in bad_prompts.items():
        with pytest.raises(ValueError, match=message):
            engine.submit(bad, GREEDY)
    with pytest.raises(ValueError, match="record_routes"):
        engine.submit([1], SamplingParams(record_routes=True))
    with pytest.raises(ValueError, match="no request 99"):
        engine.abort(99)
    with pytest.raises(ValueError, match="3 for 1 prompts"):
        engine.generate([[1]], [GREEDY] * 3)
    with pytest.raises(ValueError, match="token 0"):
        engine.generate([[1], [99]], GREEDY)
    assert not engine.has_work  # the first prompt did not stay behind
    wrong = {"max_tokens": 0, "temperature": -1.0, "top_k": -1, "top_p": 0.0, "min_p": 1.5, "seed": 2**64, "logprobs": -1}
    for field, value in (wrong | {"stop_ids": (-1,)}).items():
        with pytest.raises(ValueError, match=field):
            SamplingParams(**{field: value})


def test_stream_and_abort_leave_nothing_behind() -> None:
    engine = Engine(tiny("qwen3"))
    [want] = engine.generate([prompt(0, 9)], GREEDY)
    assert list(engine.stream(prompt(0, 9), GREEDY)) == want.tokens
    listener = engine.stream(prompt(0, 9), GREEDY)
    assert [next(listener), next(listener)] == want.tokens[:2]
    with pytest.raises(ValueError, match="under way"):
        engine.generate([[1]], GREEDY)
    listener.close()  # type: ignore[attr-defined]
    assert not engine.has_work and engine.pool.used == 0
    id = engine.submit(prompt(0, 9), GREEDY)
    for _ in range(3):
        engine.step()
    partial = engine.abort(id)
    assert (partial.tokens, partial.stop_reason) == (want.tokens[:3], "abort") and engine.pool.used == 0


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen2"])
def test_load_weights_under_way(family: str) -> None:
    model, other = Transformer(CONFIGS[family]), tiny(family, seed=1)
    model.load_state_dict(tiny(family).state_dict())
    engine = Engine(model)
    id = engine.submit(prompt(2, 12), GREEDY)
    first = [engine.step()[0].token for _ in range(5)]
    engine.load_weights(disk_tensors(other) if family == "deepseek_v3" else other.named_parameters(), version=3)
    assert engine.pool.used == 0
    event = None
    while engine.has_work:
        [event] = engine.step()
    assert event is not None and event.sample is not None and event.id == id
    [rest] = Engine(other).generate([prompt(2, 12) + first], replace(GREEDY, max_tokens=19))
    assert event.sample.tokens == first + rest.tokens and event.sample.version == 0 and engine.version == 3
    items = dict(disk_tensors(other))
    for broken, message in (
        ({k: v for k, v in items.items() if k != "model.norm.weight"}, "missing.*model.norm.weight"),
        (items | {"model.layers.9.x": torch.ones(1)}, "model.layers.9.x"),
        (items | {"model.norm.weight": torch.ones(3)}, r"model.norm.weight is \(3,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.load_weights(broken.items(), version=4)


@pytest.mark.parametrize("seed", range(6))
def test_any_schedule_conserves_blocks(seed: int) -> None:
    rng = random.Random(seed)
    engine = Engine(tiny("deepseek_v3"), num_blocks=rng.randint(8, 14), block_size=4, max_batch_tokens=rng.randint(4, 30), max_sequences=4)
    pool, alive, answers = engine.pool, {}, {}
    for _ in range(120):
        action = rng.random()
        if action < 0.35 and len(alive) < 9:
            params = SamplingParams(max_tokens=rng.randint(1, 12), seed=rng.randrange(9))
            request = (prompt(rng.randrange(1000), rng.randint(1, 28)), params)
            alive[engine.submit(*request)] = request
        elif action < 0.45 and alive:
            id = rng.choice(list(alive))
            engine.abort(id)
            del alive[id]
        else:
            for event in engine.step():
                if event.sample:
                    answers[event.id] = (alive.pop(event.id), event.sample)
        assert pool.free + pool.used == pool.num_blocks
        held = {b for s in engine.scheduler.running for b in s.blocks}
        assert len(held) == pool.used and engine.has_work == bool(alive)
        assert not any(s.blocks for s in engine.scheduler.waiting)
    steps = 0
    while engine.has_work:
        answers |= {e.id: (alive.pop(e.id), e.sample) for e in engine.step() if e.sample}
        steps += 1
        assert steps < 1000
    assert pool.used == 0 and answers
    for (tokens, params), got in list(answers.values())[:5]:
        limit = min(params.max_tokens, pool.num_blocks * 4 - len(tokens))
        same(got, Engine(tiny("deepseek_v3")).generate([tokens], replace(params, max_tokens=limit))[0])


def test_double_free_is_caught() -> None:
    pool = pool_of(tiny("llama"), num_blocks=2)
    blocks = pool.allocate(2)
    pool.release(blocks)
    with pytest.raises(AssertionError, match="twice"):
        pool.release(blocks)


# --- drawing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "support"),
    [
        ({"top_k": 2}, {1, 3}),
        ({"top_p": 0.75}, {1, 3, 0}),
        ({"top_p": 0.69}, {1, 3}),
        ({"top_p": 1e-9}, {1}),
        ({"min_p": 0.3}, {1, 3, 0}),
        ({"min_p": 0.6}, {1, 3}),
        ({"temperature": 0.5, "min_p": 0.3}, {1, 3}),  # 0.15/0.4 squared is 0.14
        ({"top_k": 2, "top_p": 0.55}, {1}),  # 0.4/0.7 of what top-k left; 0.4 of the whole would keep two
        ({"temperature": 2.0, "top_p": 0.6}, {1, 3, 0}),  # flatter first: roots .632 .548 .387 .316 .224, sum 2.107
        ({"top_k": 99}, {0, 1, 2, 3, 4}),
        ({"top_k": 1, "temperature": 1e-4}, {1}),
    ],
)
def test_support_of_each_filter(params: dict[str, float], support: set[int]) -> None:
    probabilities = torch.tensor([[0.15, 0.4, 0.05, 0.3, 0.1]])
    settings = SamplingParams(**params)  # type: ignore[arg-type]
    logps = sampling_logps(probabilities.log() + 3.0, settings)
    assert set(logps.isfinite().nonzero()[:, 1].tolist()) == support
    kept = sorted(support)
    close(logps[0, kept], (probabilities[0, kept].log() / settings.temperature).log_softmax(-1))


def test_filters_are_those_of_transformers() -> None:
    lp = pytest.importorskip("transformers.generation.logits_process")
    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(0)) * 2
    for t, k, p, m in ((0.7, 40, 0.9, 0.0), (1.3, 0, 0.8, 0.02), (1.0, 20, 1.0, 0.1), (0.5, 100, 0.95, 0.05)):
        chain = [lp.TemperatureLogitsWarper(t), *([lp.TopKLogitsWarper(k)] if k else []), lp.TopPLogitsWarper(p), lp.MinPLogitsWarper(m)]
        want = logits
        for warp in chain:
            want = warp(None, want)
        close(sampling_logps(logits, SamplingParams(temperature=t, top_k=k, top_p=p, min_p=m)), want.log_softmax(-1))


def test_wide_nucleus_and_ties() -> None:
    flat = torch.zeros(1, 5000)
    flat[0, 7] = 1.0
    assert int(sampling_logps(flat, SamplingParams(top_p=0.9)).isfinite().sum()) == 5000  # equals at the edge stay together
    slope = -torch.arange(5000.0)[None] / 2000
    kept = int(sampling_logps(slope, SamplingParams(top_p=0.9)).isfinite().sum())  # past the first candidates
    mass = slope[0].softmax(-1).cumsum(0)
    assert kept == int((mass < 0.9).sum()) + 1 > 1024


def test_frequencies_match_probabilities() -> None:
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0, 1.0, -math.inf, -0.5])
    for settings in (SamplingParams(), SamplingParams(temperature=1.7, top_k=5), SamplingParams(temperature=0.8, top_p=0.9)):
        n = 20000
        uniforms = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).tolist()
        drawn = sample(logits.expand(n, -1), [settings] * n, uniforms)
        expected = sampling_logps(logits[None], settings)[0].exp() * n
        counts = torch.bincount(torch.tensor(drawn.tokens), minlength=7).float()
        inside = expected > 0
        assert counts[~inside].sum() == 0
        chi2 = ((counts - expected)[inside] ** 2 / expected[inside]).sum().item()
        assert chi2 < 22.5, (settings, chi2)  # 0.1 % of draws with 6 degrees of freedom


def test_mixed_rows_draw_as_alone() -> None:
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(3)) * 2
    params = [SamplingParams(), SamplingParams(temperature=0), SamplingParams(top_k=3), SamplingParams(), SamplingParams(temperature=1e-9)]
    uniforms = [0.9, 0.1, 0.5, 0.3, 0.7]
    together = sample(logits, params, uniforms)
    for i in range(5):
        alone = sample(logits[i : i + 1], params[i : i + 1], uniforms[i : i + 1])
        assert (alone.tokens[0], alone.logps[0], alone.raw_logps[0]) == (together.tokens[i], together.logps[i], together.raw_logps[i])
    assert together.tokens[1] == logits[1].argmax() and together.tokens[4] == logits[4].argmax()


def test_broken_weights_are_reported() -> None:
    with pytest.raises(ValueError, match="not finite"):
        sample(torch.tensor([[0.0, math.nan]]), [SamplingParams()], [0.5])
