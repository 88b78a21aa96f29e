"""Log-probabilities of chosen words: the blocks equal the whole matrix, forward and backward, whatever is kept, and inside supports."""

from __future__ import annotations

import math

import pytest
import torch

from jevons.kernels import log_prob
from jevons.kernels.log_prob import Support, log_probs, log_probs_ref

T, D, W = 23, 8, 197


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def targets() -> torch.Tensor:
    return torch.arange(T) * 61 % W


def supports(kind: str) -> Support | None:
    """Of every row, of some (the others are drawn from all words), or none; a target is in its own."""
    if kind == "none":
        return None
    generator, rows = torch.Generator().manual_seed(5), []
    for i, target in enumerate(targets().tolist()):
        words = {target, *torch.randint(W, (i % 7,), generator=generator).tolist()}
        rows.append(sorted(words) if kind == "all" or i % 3 else [])
    return ragged(rows)


def ragged(rows: list[list[int]]) -> Support:
    return Support(torch.tensor([word for row in rows for word in row], dtype=torch.int32), torch.tensor([0, *map(len, rows)]).cumsum(0))


def both(hidden, head, targets, *options):
    """Log-probabilities, entropies and the gradients of a random projection of the former; ours and the plain ones."""
    weight = normal(len(targets), seed=9, dtype=hidden.dtype).detach()
    for f in (log_probs, log_probs_ref):
        logps, entropy = f(hidden, head, targets, *options)
        assert not entropy.requires_grad
        yield logps, entropy, *torch.autograd.grad((logps * weight).sum(), (hidden, head))


@pytest.mark.parametrize("restricted", ["none", "some", "all"])
@pytest.mark.parametrize("width", [64, 66, 196, 197, 1000])  # words a block: the last one is cut, whole, or the only one
@pytest.mark.parametrize("kept", [0, 2, 99])  # blocks whose logits wait for the backward pass
def test_log_probs(monkeypatch, assert_close, restricted, width, kept):
    hidden, head = normal(T, D), normal(W, D, seed=1)
    monkeypatch.setattr(log_prob, "BLOCK_ELEMENTS", width * T)
    monkeypatch.setattr(log_prob, "KEPT_BYTES", kept * width * T * 4)
    ours, theirs = both(hidden, head, targets(), 0.7, supports(restricted))
    for mine, plain in zip(ours, theirs):
        assert_close(mine, plain)


def test_plain_formula():
    """The reference itself, by its definition: softmax over the support's words alone."""
    hidden, head, support = normal(T, D), normal(W, D, seed=1), supports("some")
    logps, entropy = log_probs_ref(hidden, head, targets(), 0.7, support)
    for i, target in enumerate(targets().tolist()):
        words = support.ids[support.offsets[i] : support.offsets[i + 1]].tolist() or list(range(W))
        p = ((head[words] @ hidden[i]) / 0.7).softmax(-1)
        torch.testing.assert_close(logps[i], p[words.index(target)].log(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(entropy[i], -(p * p.log()).sum().detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("restricted", ["none", "some", "all"])
def test_gradients_are_the_derivatives(monkeypatch, restricted):
    monkeypatch.setattr(log_prob, "BLOCK_ELEMENTS", 64 * T)
    inputs = normal(T, D, dtype=torch.float64), normal(W, D, seed=1, dtype=torch.float64)
    support = supports(restricted)
    assert torch.autograd.gradcheck(lambda hidden, head: log_probs(hidden, head, targets(), 1.3, support)[0], inputs, fast_mode=True)


def test_in_bf16(assert_close):
    """The same roundings of hidden states, weights and logits; gradients differ by those of what is multiplied, 8 bits each."""
    hidden, head = normal(T, 64, dtype=torch.bfloat16), normal(W, 64, seed=1, dtype=torch.bfloat16)
    ours, theirs = both(hidden, head, targets(), 1.0, None)
    assert [x.dtype for x in ours] == [x.dtype for x in theirs] == [torch.float32] * 2 + [torch.bfloat16] * 2
    for mine, plain, tolerance in zip(ours, theirs, (1e-6, 1e-6, 0.01, 0.01)):
        assert_close(mine, plain, tolerance)


def test_a_sure_word_keeps_its_gradient(assert_close):
    """1 - p is subtracted before it is rounded: in bf16 p itself would be 1, and the gradient gone."""
    hidden, head = torch.tensor([[8.0, 0.0]]).bfloat16().requires_grad_(), torch.tensor([[1.0, 0.0], [0.0, 1.0]]).bfloat16()
    (gradient,) = torch.autograd.grad(log_probs(hidden, head, torch.tensor([0]))[0].sum(), hidden)
    p = 1 / (1 + math.exp(-8))
    assert_close(gradient.float(), torch.tensor([[1 - p, p - 1]]), 0.01)


@pytest.mark.parametrize("frozen", [0, 1], ids=["head-only", "hidden-only"])
def test_one_side_frozen(assert_close, frozen):
    sides = [normal(T, D), normal(W, D, seed=1)]
    expected = torch.autograd.grad(log_probs_ref(*sides, targets())[0].sum(), sides)[1 - frozen]
    sides[frozen] = sides[frozen].detach()
    (gradient,) = torch.autograd.grad(log_probs(*sides, targets())[0].sum(), sides[1 - frozen])
    assert_close(gradient, expected)
    assert not log_probs(*(x.detach() for x in sides), targets())[0].requires_grad


def test_no_rows_and_extreme_logits():
    head = normal(W, D, seed=1)
    for support in (None, ragged([])):
        hidden = normal(0, D)
        logps, entropy = log_probs(hidden, head, targets()[:0], 1.0, support)
        assert logps.shape == entropy.shape == (0,)
        gradients = torch.autograd.grad(logps.sum(), (hidden, head))
        assert gradients[1].eq(0).all()
    logps, entropy = log_probs(normal(T, D) * 1e4, head, targets(), 0.1)
    assert logps.isfinite().all() and entropy.isfinite().all() and entropy.ge(-1e-3).all()


def test_supports_of_some_rows():
    whole = supports("some")
    rows = torch.tensor([0, 7, 8, 7, 22])
    taken = whole.take(rows)
    for i, row in enumerate(rows.tolist()):
        ours, theirs = (s.ids[s.offsets[j] : s.offsets[j + 1]] for s, j in ((taken, i), (whole, row)))
        assert ours.tolist() == theirs.tolist()
    assert whole.take(rows[:0]).ids.numel() == 0
