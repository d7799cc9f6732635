"""Losses of a frozen language-model head, without ever holding the logits of a whole batch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

Head = Callable[[Tensor], Tensor]
# The loss of a block of positions: (hidden states (n, H), which positions they are) -> a scalar.
OfBlock = Callable[[Tensor, slice], Tensor]


def head_loss(hidden: Tensor, targets: Tensor, head: Head, tokens: int, positions_at_once: int) -> Tensor:
    """Cross-entropy, in nats, summed over N positions and divided by `tokens`; a scalar.

    hidden (N, H) what the head sees; targets (N,) int token ids; head: (n, H) -> (n, V) logits, its weights frozen;
    tokens: what the mean is over, e.g. the supervised tokens of the whole step. Positions pass through the head in
    blocks of `positions_at_once`. Where `hidden` requires a gradient, (softmax - onehot) W / tokens, a block's is
    computed with its loss, so that no logits wait for the backward pass and none are computed twice.
    Source: the fused linear cross-entropy of Hsu et al. 2024, arXiv:2410.10989, section 3.2. Differs: a frozen head
    needs no gradient of its own.
    """

    def of_block(seen: Tensor, block: slice) -> Tensor:
        return F.cross_entropy(head(seen).float(), targets[block], reduction="sum") / tokens

    return _in_blocks(hidden, of_block, positions_at_once)


def head_divergence(hidden: Tensor, teacher: Tensor, head: Head, tokens: int, positions_at_once: int) -> Tensor:
    """KL(teacher || model), in nats, summed over N positions and divided by `tokens`; a scalar.

    hidden and teacher (N, H): what the head sees of the model and of its teacher, which has no gradient; the rest as
    in `head_loss`. The gradient with respect to `hidden` is (softmax(model) - softmax(teacher)) W / tokens.
    """

    def of_block(seen: Tensor, block: slice) -> Tensor:
        return divergence(head(seen), head(teacher[block])) / tokens

    return _in_blocks(hidden, of_block, positions_at_once)


def divergence(logits: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || model) of two sets of logits (N, V), in nats, summed over the positions."""
    of_teacher = F.log_softmax(teacher.detach().float(), dim=-1)
    return F.kl_div(F.log_softmax(logits.float(), dim=-1), of_teacher, reduction="sum", log_target=True)


def _in_blocks(hidden: Tensor, of_block: OfBlock, positions_at_once: int) -> Tensor:
    if not hidden.requires_grad:
        return _sum_blocks(hidden, of_block, positions_at_once)
    loss: Tensor = _HeadLoss.apply(hidden, of_block, positions_at_once)  # type: ignore[no-untyped-call]
    return loss


class _HeadLoss(torch.autograd.Function):
    """A loss of blocks with the gradient of `hidden` made in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, of_block: OfBlock, positions_at_once: int) -> Tensor:
        gradient = torch.empty_like(hidden)
        loss = _sum_blocks(hidden, of_block, positions_at_once, gradient)
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream, None, None


def _sum_blocks(hidden: Tensor, of_block: OfBlock, positions_at_once: int, gradient: Tensor | None = None) -> Tensor:
    """The loss, block by block; writes its gradient with respect to `hidden` into `gradient`."""
    loss = torch.zeros((), device=hidden.device)
    for start in range(0, len(hidden), positions_at_once):
        block = slice(start, start + positions_at_once)
        seen = hidden[block].detach().requires_grad_(gradient is not None)
        with torch.set_grad_enabled(gradient is not None):
            loss_of_block = of_block(seen, block)
        if gradient is not None:
            (gradient[block],) = torch.autograd.grad(loss_of_block, seen)
        loss += loss_of_block.detach()
    return loss
