"""Losses of a frozen language-model head on MLX, without ever holding the logits of a whole batch."""

from collections.abc import Callable

import mlx.core as mx
from mlx import nn

Head = Callable[[mx.array], mx.array]


def head_loss(hidden: mx.array, targets: mx.array, weights: mx.array, head: Head, positions_at_once: int) -> mx.array:
    """Cross-entropy, in nats, of N positions, summed with their weights; a scalar.

    hidden (N, H) what the head sees; targets (N,) int token ids; weights (N,); head: (n, H) -> (n, V) logits, its
    parameters frozen. More than `positions_at_once` pass through the head in blocks of as many, one after the other,
    and the gradient of `hidden` is made with the loss of each, so that the logits of one block are there at a time.
    Source: as `nestune.backends.head_loss`.
    """

    def of_block(seen: mx.array, targets: mx.array, weights: mx.array) -> mx.array:
        return (nn.losses.cross_entropy(head(seen).astype(mx.float32), targets) * weights).sum()

    return _in_blocks(of_block, hidden, (targets, weights), positions_at_once)


def head_divergence(
    hidden: mx.array, teacher: mx.array, weights: mx.array, head: Head, positions_at_once: int
) -> mx.array:
    """KL(teacher || model), in nats, of N positions, summed with their weights; a scalar.

    hidden and teacher (N, H): what the head sees of the model and of its teacher; the rest as in `head_loss`.
    """

    def of_block(seen: mx.array, teacher: mx.array, weights: mx.array) -> mx.array:
        of_model, of_teacher = (nn.log_softmax(head(states).astype(mx.float32), axis=-1) for states in (seen, teacher))
        summed: mx.array = ((mx.exp(of_teacher) * (of_teacher - of_model)).sum(axis=-1) * weights).sum()
        return summed

    return _in_blocks(of_block, hidden, (mx.stop_gradient(teacher), weights), positions_at_once)


def _in_blocks(
    of_block: Callable[..., mx.array], hidden: mx.array, besides: tuple[mx.array, ...], positions_at_once: int
) -> mx.array:
    """The loss of N positions, block by block; `besides`: what else a block needs, (N, ...) each."""
    if len(hidden) <= positions_at_once:
        return of_block(hidden, *besides)

    @mx.custom_function
    def in_blocks(hidden: mx.array) -> tuple[mx.array, mx.array]:
        with_gradient = mx.value_and_grad(of_block)
        loss = mx.zeros(())
        gradients: list[mx.array] = []
        for start in range(0, len(hidden), positions_at_once):
            block = slice(start, start + positions_at_once)
            # Or the logits of all blocks are made before the first are used up.
            seen = mx.depends([hidden[block]], [loss, *gradients[-1:]])[0]
            loss_of_block, gradient = with_gradient(seen, *(array[block] for array in besides))
            loss = loss + loss_of_block
            gradients.append(gradient)
        return loss, mx.concatenate(gradients)

    @in_blocks.vjp
    def backward(_: mx.array, upstream: tuple[mx.array, mx.array], outputs: tuple[mx.array, mx.array]) -> mx.array:
        return upstream[0] * outputs[1]

    outputs: tuple[mx.array, mx.array] = in_blocks(hidden)  # type: ignore[assignment]
    return outputs[0]
