"""Kernels: every fast path equals its plain reference, forward and backward; packed documents equal separate ones."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jevons.kernels import cross_entropy as loss_kernel
from jevons.kernels import segment
from jevons.kernels.attention import causal_attention_ref
from jevons.kernels.cross_entropy import cross_entropy, cross_entropy_ref
from jevons.kernels.experts import experts, experts_ref
from jevons.kernels.fused import PIECE, usable
from jevons.kernels.pointwise import rms_norm, swiglu
from jevons.kernels.segment import Bucket, segment_attention
from jevons.model.attend import Packed


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def gradients(output: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Gradients of a random projection of the output: of a plain sum some errors would cancel."""
    weight = normal(*output.shape, seed=99, dtype=output.dtype).detach()
    return list(torch.autograd.grad((output * weight).sum(), inputs))


# --- experts ---

E, D, F = 6, 20, 12


def choose(kind: str, tokens: int) -> torch.Tensor:
    """(T, 2) experts, two different ones for each token."""
    generator = torch.Generator().manual_seed(3)
    if kind == "even":  # all experts, equally often
        return (torch.arange(2 * tokens) % E).view(tokens, 2)
    if kind == "random":
        return torch.rand(tokens, E, generator=generator).topk(2).indices
    if kind == "some-empty":  # 0, 3 and 5 get nothing
        return torch.tensor([1, 2, 4])[torch.rand(tokens, 3, generator=generator).topk(2).indices]
    assert kind == "one-gets-all"
    return torch.tensor([[3, 0]]).repeat(tokens, 1)


@pytest.mark.parametrize("tokens", [1, 7, 100])  # one row, few (no padding), many (padded, or one batched product)
@pytest.mark.parametrize("kind", ["even", "random", "some-empty", "one-gets-all"])
def test_experts(assert_close, kind, tokens):
    inputs = [normal(tokens, D), normal(tokens, 2, seed=1), normal(E, 2 * F, D, seed=2), normal(E, D, F, seed=3)]
    x, weights, gate_up, down = inputs
    fast, plain = (f(x, choose(kind, tokens), weights, gate_up, down) for f in (experts, experts_ref))
    assert_close(fast, plain)
    for name, ours, theirs in zip(("x", "weights", "gate_up", "down"), gradients(fast, inputs), gradients(plain, inputs)):
        assert_close(ours, theirs, message=name)


@pytest.mark.parametrize(("width", "inner"), [(10, 12), (20, 7), (9, 5)])
def test_experts_of_any_width(assert_close, width, inner):
    # torch's grouped product refuses rows that are not whole 16 bytes
    x, chosen, weights = normal(50, width), choose("random", 50), normal(50, 2, seed=1)
    gate_up, down = normal(E, 2 * inner, width, seed=2), normal(E, width, inner, seed=3)
    assert_close(experts(x, chosen, weights, gate_up, down), experts_ref(x, chosen, weights, gate_up, down))


def test_experts_in_bf16(assert_close):
    # 8 bits of mantissa: 0.4 % a rounding, and each path rounds in its own places
    inputs = [normal(64, 32, dtype=torch.bfloat16), normal(64, 2, seed=1)]
    inputs += [normal(E, 48, 32, seed=2, dtype=torch.bfloat16), normal(E, 32, 24, seed=3, dtype=torch.bfloat16)]
    x, weights, gate_up, down = inputs
    fast, plain = (f(x, choose("random", 64), weights, gate_up, down) for f in (experts, experts_ref))
    assert fast.dtype == torch.bfloat16
    assert_close(fast, plain, 0.02)
    for ours, theirs in zip(gradients(fast, inputs), gradients(plain, inputs)):
        assert ours.dtype == theirs.dtype
        assert_close(ours, theirs, 0.02)


# --- between products ---


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0.01)])  # bf16: a rounding or two, 0.4 % each
@pytest.mark.parametrize(("rows", "width"), [(1, 8), (PIECE, 16), (2 * PIECE + 2, 48), (200, 129)])  # whole words and not, pieces and not
def test_norms_and_swiglu_are_torchs(assert_close, rows, width, dtype, tolerance):
    wide, up, scale = normal(rows, width + 6, dtype=dtype), normal(rows, width, seed=1, dtype=dtype), normal(width, seed=2, dtype=dtype)
    x = wide[:, :width]  # rows that lie apart, as the latent's do
    silu = torch.nn.functional.silu
    pairs = {
        "norm": (rms_norm(x, scale, 1e-6), torch.nn.functional.rms_norm(x, (width,), scale, 1e-6), [wide, scale]),
        "swiglu": (swiglu(x, up), silu(x) * up, [wide, up]),
        "scaled": (swiglu(x, up, up[:, :1]), silu(x) * up * up[:, :1], [wide, up]),
    }
    for name, (ours, theirs, inputs) in pairs.items():
        assert ours.dtype == dtype
        assert_close(ours, theirs, tolerance, message=name)
        for mine, expected in zip(gradients(ours, inputs), gradients(theirs, inputs)):
            assert_close(mine, expected, tolerance, message=name)


def test_norms_of_heads_and_of_frozen_weights(assert_close):
    x, scale = normal(5, 3, 16), normal(16, seed=1).detach()
    ours, theirs = rms_norm(x, scale, 1e-6), torch.nn.functional.rms_norm(x, (16,), scale, 1e-6)
    assert_close(ours, theirs, 1e-6)
    assert_close(*(gradients(y, [x])[0] for y in (ours, theirs)), 1e-6)


def test_large_gates_overflow_nothing(assert_close):
    gate = torch.tensor([[-1e4, -200.0, -89.0, 89.0, 1e4]]).requires_grad_()
    out = swiglu(gate, torch.ones(1, 5))
    assert_close(out, gate.detach().clamp_min(0))
    assert_close(torch.autograd.grad(out.sum(), gate)[0], (gate > 0).float())


def test_experts_without_native_kernels(monkeypatch, assert_close):
    inputs = [normal(100, D), normal(100, 2, seed=1), normal(E, 2 * F, D, seed=2), normal(E, D, F, seed=3)]
    x, weights, gate_up, down = inputs
    outputs = []
    for native in (True, False):
        monkeypatch.setattr("jevons.kernels.fused.usable", lambda *tensors, native=native: native and usable(*tensors))
        outputs.append(experts(x, choose("random", 100), weights, gate_up, down))
        outputs += gradients(outputs[-1], inputs)
    for ours, theirs in zip(outputs[:5], outputs[5:]):
        assert_close(ours, theirs)


# --- cross-entropy ---


def loss_inputs(tokens: int = 23, vocabulary: int = 31) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    targets = torch.arange(tokens) * 7 % vocabulary
    weights = torch.linspace(-1, 2, tokens)  # negative ones too: policy gradients use them
    weights[::5] = 0.0
    return normal(tokens, 8), normal(vocabulary, 8, seed=1), targets, weights


@pytest.mark.parametrize("chunk", [1, 5, 22, 23, 100])  # tokens a chunk: the last one is cut, whole, or the only one
def test_cross_entropy(monkeypatch, assert_close, chunk):
    hidden, head, targets, weights = loss_inputs()
    monkeypatch.setattr(loss_kernel, "CHUNK_ELEMENTS", chunk * len(head))
    monkeypatch.setattr(loss_kernel, "CHUNK_ROWS", 1)
    (loss, nll), (loss_ref, nll_ref) = (f(hidden, head, targets, weights) for f in (cross_entropy, cross_entropy_ref))
    assert_close(loss, loss_ref)
    assert_close(nll, nll_ref)
    assert not nll.requires_grad
    # an upstream gradient other than one, as from a mean or a sum of losses
    ours, theirs = (torch.autograd.grad(x * -0.3, (hidden, head)) for x in (loss, loss_ref))
    for mine, expected in zip(ours, theirs):
        assert_close(mine, expected)


@pytest.mark.parametrize("frozen", [0, 1], ids=["head-only", "hidden-only"])
def test_cross_entropy_with_one_side_frozen(assert_close, frozen):
    hidden, head, targets, weights = loss_inputs()
    sides = [hidden, head]
    sides[frozen] = sides[frozen].detach()
    expected = torch.autograd.grad(cross_entropy_ref(hidden, head, targets, weights)[0], (hidden, head))[1 - frozen]
    (gradient,) = torch.autograd.grad(cross_entropy(*sides, targets, weights)[0], sides[1 - frozen])
    assert_close(gradient, expected)
    assert not cross_entropy(hidden.detach(), head.detach(), targets, weights)[0].requires_grad


def test_a_token_of_weight_zero_leaves_no_gradient():
    hidden, head, targets, weights = loss_inputs()
    (gradient,) = torch.autograd.grad(cross_entropy(hidden, head, targets, weights)[0], hidden)
    assert gradient[::5].eq(0).all() and gradient[1].ne(0).all()


# --- attention ---


@pytest.mark.parametrize("plain_length", [1024, 0])  # the written-out backward, and torch's own for long segments
@pytest.mark.parametrize(("heads", "kv_heads", "value_width"), [(4, 4, 8), (4, 2, 8), (6, 1, 8), (4, 4, 5)])
def test_segment_attention(assert_close, monkeypatch, heads, kv_heads, value_width, plain_length):
    monkeypatch.setattr(segment, "PLAIN_LENGTH", plain_length)
    monkeypatch.setattr(segment, "CHUNK_SCORES", heads * 11 * 11 * 2)  # two segments at once, then one
    inputs = [normal(3, 11, heads, 8), normal(3, 11, kv_heads, 8, seed=1), normal(3, 11, kv_heads, value_width, seed=2)]
    flat = [x.flatten(0, 1) for x in inputs]
    fast = segment_attention(*flat, [Bucket(3, 11, None, None, None)], 0.3).unflatten(0, (3, 11))
    plain = causal_attention_ref(*inputs, scale=0.3)
    assert_close(fast, plain)
    for ours, theirs in zip(gradients(fast, inputs), gradients(plain, inputs)):
        assert_close(ours, theirs)


# --- the seam: packed documents = separate ones ---

MODELS = {
    "mla": ("deepseek_v3", {}),
    "gqa": ("qwen3_moe", {}),
    "gqa-dense": ("qwen2", {}),
}


def run(model, documents: list[torch.Tensor], packed: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits of all tokens, and gradients of a projection of them, with documents in one call or one call each."""
    model.zero_grad()
    groups = [documents] if packed else [[d] for d in documents if len(d)]
    logits = []
    for group in groups:
        bounds = torch.tensor([0, *(len(d) for d in group)]).cumsum(0)
        positions = torch.cat([torch.arange(len(d)) for d in group])
        logits.append(model.logits(model(torch.cat(group), positions, Packed(bounds)).hidden_TD))
    logits_TW = torch.cat(logits)
    (logits_TW * normal(*logits_TW.shape, seed=99).detach()).sum().backward()
    return logits_TW, {name: p.grad for name, p in model.named_parameters()}


def assert_packed_is_separate(model, lengths: list[int], assert_close) -> None:
    generator = torch.Generator().manual_seed(1)
    documents = [torch.randint(97, (length,), generator=generator) for length in lengths]
    (packed, grads), (separate, separate_grads) = (run(model, documents, packed=p) for p in (True, False))
    assert_close(packed, separate)
    # a query that sees one key only has no gradient: what stands there is rounding, to be measured by the other gradients
    floor = 0.01 * max(gradient.abs().max().item() for gradient in separate_grads.values())
    for name, gradient in separate_grads.items():
        assert_close(grads[name], gradient, floor=floor, message=name)


@pytest.fixture(scope="module", params=MODELS)
def model(request, tiny_model):
    model_type, changes = MODELS[request.param]
    return tiny_model(model_type, num_hidden_layers=2, **changes)


@pytest.mark.parametrize(
    "lengths",
    [
        pytest.param([9, 9, 9], id="uniform"),
        pytest.param([9, 0, 9, 0], id="uniform-with-empty"),
        pytest.param([1, 1, 1], id="single-tokens"),
        pytest.param([1, 33, 0, 16, 17, 3, 70, 1], id="buckets"),
    ],
)
def test_packed_is_separate(model, lengths, assert_close):
    assert_packed_is_separate(model, lengths, assert_close)


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(any))
def test_packed_is_separate_for_any_lengths(model, assert_close, lengths):
    assert_packed_is_separate(model, lengths, assert_close)


def test_the_future_and_other_documents_are_invisible(model):
    tokens, positions, attend = torch.arange(12), torch.cat((torch.arange(5), torch.arange(7))), Packed(torch.tensor([0, 5, 12]))
    before = model(tokens, positions, attend).hidden_TD
    for changed, untouched in ((4, [*range(4), *range(5, 12)]), (8, list(range(8)))):
        other = tokens.clone()
        other[changed] = 50
        after = model(other, positions, attend).hidden_TD
        torch.testing.assert_close(after[untouched], before[untouched], rtol=0, atol=1e-5)
        assert not torch.allclose(after[changed], before[changed], atol=1e-3)


# --- recorded routes ---


@pytest.mark.parametrize("model_type", ["deepseek_v3", "qwen3_moe"])
def test_replayed_routes(model_type, tiny_model, assert_close):
    model = tiny_model(model_type)
    arguments = torch.arange(20), torch.arange(20), Packed(torch.tensor([0, 20]))
    first = model(*arguments)
    routes = {r.layer: r.experts_TK for r in first.routing}
    assert routes.keys() == model.routers.keys()
    assert torch.equal(model(*arguments, routes=routes).hidden_TD, first.hidden_TD)

    forced = dict.fromkeys(routes, torch.tensor([[0, 5, 2]]).expand(20, 3))
    other = model(*arguments, routes=forced)
    assert not torch.allclose(other.hidden_TD, first.hidden_TD, atol=1e-3)
    for routing in other.routing:
        assert torch.equal(routing.experts_TK, forced[routing.layer])
        live = routing.scores_TE.gather(1, routing.experts_TK)  # this pass's own scores, so that gradients reach the router
        if model.config.norm_topk_prob:
            live = live / live.sum(-1, keepdim=True)
        assert_close(routing.weights_TK, live * model.config.routed_scaling_factor)
    other.hidden_TD.sum().backward()
    assert all(router.weight.grad.abs().sum() > 0 for router in model.routers.values())
    assert other.routing[0].loads_E().tolist() == [20, 0, 20, 0, 0, 20, 0, 0]


def test_logits_stay_finite_at_extreme_scores(tiny_model):
    # sigmoid saturates: all scores 0, and the renormalisation must not divide by it
    model = tiny_model()
    with torch.no_grad():
        for router in model.routers.values():
            router.weight.mul_(1e4)
            router.weight[router.weight > 0] = -1e4
    assert math.isfinite(model(torch.arange(9), torch.arange(9), Packed(torch.tensor([0, 9]))).hidden_TD.sum().item())
