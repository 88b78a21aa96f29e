"""Cross-entropy of a language-model head without the (tokens x vocabulary) matrix.

Problem: logits of 4,096 tokens over 129,280 words are 2 GB in fp32, several times over with their gradient. Approach:
walk over chunks of tokens; where the per-token weights of the loss are known beforehand (pretraining, fine-tuning,
distillation on hard targets) the gradient of a chunk can be made while its logits are at hand, so the backward pass only
scales what the forward pass left. Not done: chunking over the vocabulary (a chunk of 512 tokens is small enough), and
the recomputing variant for losses whose weights depend on the log-probabilities.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**22  # logits in flight: 16 MB in fp32; smaller chunks add up the head's gradient too often
CHUNK_ROWS = 256  # at least: of a large vocabulary every chunk reads the whole head and adds to its whole gradient


def cross_entropy_ref(hidden_TD: Tensor, head_WD: Tensor, targets_T: Tensor, weights_T: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of weighted negative log-likelihoods, and the likelihoods themselves: (), (T,) in fp32."""
    logits_TW = (hidden_TD @ head_WD.t()).float()
    nll_T = torch.nn.functional.cross_entropy(logits_TW, targets_T, reduction="none")
    return (nll_T * weights_T).sum(), nll_T.detach()


def cross_entropy(hidden_TD: Tensor, head_WD: Tensor, targets_T: Tensor, weights_T: Tensor) -> tuple[Tensor, Tensor]:
    """The same as `cross_entropy_ref`, chunk by chunk. Gradients reach hidden_TD and head_WD, not weights_T."""
    return _CrossEntropy.apply(hidden_TD, head_WD, targets_T, weights_T)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, head_WD: Tensor, targets_T: Tensor, weights_T: Tensor) -> tuple[Tensor, Tensor]:
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        nll_T = torch.empty(len(targets_T), dtype=torch.float32, device=hidden_TD.device)
        grad_hidden_TD = torch.empty_like(hidden_TD) if needs_hidden else None
        grad_head_WD = torch.zeros_like(head_WD, dtype=torch.float32) if needs_head else None
        chunk = max(CHUNK_ROWS, CHUNK_ELEMENTS // head_WD.shape[0])
        for start in range(0, len(targets_T), chunk):
            rows = slice(start, start + chunk)
            logits_CW = (hidden_TD[rows] @ head_WD.t()).float()
            target_C1 = targets_T[rows, None]
            logp_CW = logits_CW.log_softmax(-1)
            nll_T[rows] = -logp_CW.gather(1, target_C1).squeeze(1)
            if grad_hidden_TD is None and grad_head_WD is None:
                continue
            # d nll / d logits = softmax - onehot, scaled by the token's weight
            grad_CW = logp_CW.exp_()
            grad_CW.scatter_add_(1, target_C1, grad_CW.new_full((1, 1), -1.0).expand_as(target_C1))
            grad_CW = grad_CW.mul_(weights_T[rows, None]).to(hidden_TD.dtype)
            if grad_hidden_TD is not None:
                torch.mm(grad_CW, head_WD, out=grad_hidden_TD[rows])
            if grad_head_WD is not None:
                grad_head_WD += grad_CW.t() @ hidden_TD[rows]
        ctx.save_for_backward(*(g for g in (grad_hidden_TD, grad_head_WD) if g is not None))
        ctx.mark_non_differentiable(nll_T)
        ctx.head_dtype = head_WD.dtype
        return (nll_T * weights_T).sum(), nll_T

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        saved = list(ctx.saved_tensors)
        grad_hidden_TD = saved.pop(0) if ctx.needs_input_grad[0] else None
        grad_head_WD = saved.pop(0) if ctx.needs_input_grad[1] else None
        scale = grads[0]
        return (
            None if grad_hidden_TD is None else grad_hidden_TD * scale.to(grad_hidden_TD.dtype),
            None if grad_head_WD is None else (grad_head_WD * scale).to(ctx.head_dtype),
            None,
            None,
        )
