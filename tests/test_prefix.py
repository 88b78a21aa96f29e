"""Shared prompts: samples that see one segment of their prompt equal samples that each bring a copy of it, outputs and gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from jevons.kernels import native, segment
from jevons.model import attend as attention
from jevons.model.attend import Packed, Shared

MODELS = {"mla": "deepseek_v3", "gqa-dense": "qwen2", "gqa-normed": "qwen3"}
Group = tuple[int, list[int]]  # prompt's length and its samples'; no samples: a plain document


@pytest.fixture(scope="module", params=MODELS)
def model(request, tiny_model):
    return tiny_model(MODELS[request.param], num_hidden_layers=2)


@pytest.fixture(params=["native", "torch"])
def way(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(attention, "usable", lambda q, v: False)
    elif not native.available():
        pytest.skip(native.reason())


def draw(groups: list[Group]) -> list[tuple[Tensor, list[Tensor]]]:
    generator = torch.Generator().manual_seed(1)
    return [tuple([torch.randint(97, (n,), generator=generator) for n in x] for x in ([p], own)) for p, own in groups]  # type: ignore[misc]


def shared(model, groups) -> tuple[Tensor, list[Tensor]]:
    """Hidden states of every prompt and every sample, each prompt computed once."""
    segments, positions, prefixes = [], [], []
    for [prompt], samples in groups:
        first = len(segments)
        segments += [prompt, *samples]
        positions += [torch.arange(len(prompt)), *(torch.arange(len(s)) + len(prompt) for s in samples)]
        prefixes += [-1, *[first] * len(samples)]
    bounds = torch.tensor([0, *(len(s) for s in segments)]).cumsum(0)
    attend = Shared(bounds, torch.tensor(prefixes, dtype=torch.int32))
    hidden = model(torch.cat(segments), torch.cat(positions), attend).hidden_TD.split([len(s) for s in segments])
    return [h for h, p in zip(hidden, prefixes) if p < 0], [h for h, p in zip(hidden, prefixes) if p >= 0]


def separate(model, groups) -> tuple[list[Tensor], list[Tensor]]:
    def run(tokens):
        return model(tokens, torch.arange(len(tokens)), Packed(torch.tensor([0, len(tokens)]))).hidden_TD

    prompts = [run(prompt) for [prompt], _ in groups if len(prompt)]
    return prompts, [run(torch.cat((prompt, s)))[len(prompt) :] for [prompt], samples in groups for s in samples if len(s)]


def assert_same(model, groups: list[Group], assert_close, prompts_too: bool = True) -> None:
    """Outputs, and parameters' gradients of a random projection of them; without `prompts_too` of the samples' outputs alone."""
    results = []
    for form in (shared, separate):
        model.zero_grad()
        prompts, samples = form(model, draw(groups))
        hidden_TD = torch.cat([*prompts, *samples])
        wanted = hidden_TD if prompts_too else torch.cat(samples)
        (wanted * torch.randn(wanted.shape, generator=torch.Generator().manual_seed(99))).sum().backward()
        results.append((hidden_TD, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (ours, gradients), (theirs, expected) = results
    assert_close(ours, theirs)
    # where a query sees one key only its gradient is rounding, to be measured by the other gradients
    floor = 0.01 * max(g.abs().max().item() for g in expected.values())
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(gradients[name], gradient, floor=floor, message=name)


CASES = {
    "one-group": [(7, [5, 5, 5, 5])],
    "two-ragged-groups": [(9, [1, 17, 4, 33, 16]), (20, [3, 40, 3])],
    "documents-between": [(6, []), (5, [8, 2]), (30, []), (4, [9])],
    "single-token-prompt": [(1, [6, 3])],
    "empty-prompt": [(0, [4, 20]), (3, [2])],
    "empty-sample": [(5, [0, 4, 0])],
    "documents-only": [(5, []), (12, [])],
}


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("groups", CASES.values(), ids=CASES)
def test_shared_is_separate(model, groups, assert_close):
    assert_same(model, groups, assert_close)


def test_a_prompt_learns_through_its_samples_alone(model, assert_close):
    assert_same(model, [(9, [6, 20, 3]), (4, [1])], assert_close, prompts_too=False)


@pytest.mark.parametrize(("plain_length", "chunk"), [(1024, 4 * 20 * 29), (0, 1)], ids=["sample-by-sample", "fused-backward"])
def test_long_samples(model, assert_close, monkeypatch, plain_length, chunk):
    monkeypatch.setattr(attention, "usable", lambda q, v: False)
    monkeypatch.setattr(segment, "PLAIN_LENGTH", plain_length)
    monkeypatch.setattr(segment, "CHUNK_SCORES", chunk)
    assert_same(model, CASES["two-ragged-groups"], assert_close)


@settings(max_examples=15, deadline=None)
@given(groups=st.lists(st.tuples(st.integers(0, 20), st.lists(st.integers(0, 40), max_size=4)), min_size=1, max_size=3))
def test_shared_is_separate_for_any_groups(model, assert_close, groups):
    if sum(p + sum(own) for p, own in groups):
        assert_same(model, groups, assert_close)


def test_samples_do_not_see_one_another(model):
    groups = draw([(6, [5, 5]), (6, [5])])
    _, before = shared(model, groups)
    groups[0][1][0][:] = 50
    _, after = shared(model, groups)
    assert not torch.allclose(after[0], before[0], atol=1e-3)
    for ours, theirs in zip(after[1:], before[1:]):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_a_prefix_comes_first_and_has_none():
    bounds = torch.tensor([0, 3, 6, 9])
    for prefixes in ([1, -1, -1], [-1, 0, 1], [0, -1, -1]):
        with pytest.raises(AssertionError):
            Shared(bounds, torch.tensor(prefixes))


# --- the native kernel ---

needs_native = pytest.mark.skipif(not native.available(), reason=native.reason() or "native kernels")


@needs_native
@settings(max_examples=25, deadline=None)
@given(
    groups=st.lists(st.tuples(st.integers(0, 130), st.lists(st.integers(0, 130), max_size=4)), min_size=1, max_size=3),
    heads=st.sampled_from([(4, 4), (4, 2), (6, 1)]),
    widths=st.sampled_from([(8, 8), (24, 18), (64, 64), (80, 34), (2, 2)]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
)
def test_native_is_plain(groups, heads, widths, dtype):
    lengths = [n for prompt, own in groups for n in (prompt, *own)]
    if not sum(lengths):
        return
    starts = torch.tensor([0, *(1 + len(own) for _, own in groups)]).cumsum(0)
    prefixes = [p for start, (_, own) in zip(starts.tolist(), groups) for p in (-1, *[start] * len(own))]
    attend = Shared(torch.tensor([0, *lengths]).cumsum(0), torch.tensor(prefixes))
    generator = torch.Generator().manual_seed(sum(lengths))
    (N, M), (H, V) = heads, widths
    if dtype == torch.float32 and H > 2:
        H, V = H - 1, V - 1  # which need not be even there
    q, k, v, push = (torch.randn(sum(lengths), n, h, generator=generator).to(dtype) for n, h in ((N, H), (M, H), (M, V), (N, V)))
    results = []
    for threads in (1, 3, 0):
        inputs = [x.to(dtype if threads else torch.float32).requires_grad_() for x in (q, k, v)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            out = attend.gqa(0, *inputs, H**-0.5) if threads else segment.segment_attention(*inputs, attend.buckets, H**-0.5)
            results.append([out, *torch.autograd.grad(out, inputs, push.to(out.dtype))])
    most = 1e-5 if dtype == torch.float32 else 0.01  # some roundings to 8 bits, each at most 0.4 %
    for ours, again, theirs in zip(*[[x.detach() for x in result] for result in results]):
        assert torch.equal(ours, again)
        assert float((ours.float() - theirs).norm()) <= most * max(float(theirs.norm()), 1e-3)


@needs_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_native_reads_rows_that_lie_apart(assert_close, dtype):
    # queries, keys and values as slices of one product's output; a gradient that is one row repeated
    whole = torch.randn(20, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    attend, results = Packed(torch.tensor([0, 7, 20])), []
    for parts in (whole.split((4, 2, 2), dim=1), [x.contiguous() for x in whole.split((4, 2, 2), dim=1)]):
        out = attend.gqa(0, *parts, 0.3)
        results.append((out, torch.autograd.grad(out, whole, torch.ones((), dtype=dtype).expand(out.shape))[0]))
    for ours, theirs in zip(*results):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2)])
def test_written_out_is_fused(heads, kv_heads, assert_close):
    # the CPU's own function against what a GPU runs, differentiated by torch
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(31, n, 8, generator=generator).requires_grad_() for n in (heads, kv_heads, kv_heads)]
    buckets = Shared(torch.tensor([0, 6, 16, 20, 31]), torch.tensor([-1, 0, 0, -1])).buckets
    results = []
    for run in (segment._CPUSegments.apply, segment._fused):
        out = run(*inputs, buckets, 0.3)
        results.append([out, *torch.autograd.grad((out * out.detach().cos()).sum(), inputs)])
    for ours, theirs in zip(*results):
        assert_close(ours, theirs)


def test_large_scores_in_bf16(assert_close):
    # keys and queries that share a large part give scores of 1,000, and their differences decide: Qwen2.5's first layers are so
    generator = torch.Generator().manual_seed(0)
    q, k, v, push = (torch.randn(24, 2, 16, generator=generator) for _ in range(4))
    attend = Packed(torch.tensor([0, 9, 24]))
    ways = [lambda *x: segment.segment_attention(*x, attend.buckets, 0.25), lambda *x: attend.gqa(0, *x, 0.25)]  # the second is native
    for way in ways:
        results = []
        for dtype in (torch.bfloat16, torch.float32):
            inputs = [x.bfloat16().to(dtype).requires_grad_() for x in (q + 20, k + 20, v)]
            results.append(torch.autograd.grad(way(*inputs), inputs, push.bfloat16().to(dtype)))
        for ours, theirs in zip(*results):
            assert_close(ours.float(), theirs, 0.03)
