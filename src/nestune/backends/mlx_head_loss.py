"""Cross-entropy of a frozen language-model head on MLX, without ever holding the logits of a whole batch."""

from collections.abc import Callable
from functools import partial

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
    if len(hidden) <= positions_at_once:
        return _of_block(head, hidden, targets, weights)

    @mx.custom_function
    def in_blocks(hidden: mx.array) -> tuple[mx.array, mx.array]:
        with_gradient = mx.value_and_grad(partial(_of_block, head))
        loss = mx.zeros(())
        gradients: list[mx.array] = []
        for start in range(0, len(hidden), positions_at_once):
            block = slice(start, start + positions_at_once)
            # Or the logits of all blocks are made before the first are used up.
            seen = mx.depends([hidden[block]], [loss, *gradients[-1:]])[0]
            of_block, gradient = with_gradient(seen, targets[block], weights[block])
            loss = loss + of_block
            gradients.append(gradient)
        return loss, mx.concatenate(gradients)

    @in_blocks.vjp
    def backward(_: mx.array, upstream: tuple[mx.array, mx.array], outputs: tuple[mx.array, mx.array]) -> mx.array:
        return upstream[0] * outputs[1]

    outputs: tuple[mx.array, mx.array] = in_blocks(hidden)  # type: ignore[assignment]
    return outputs[0]


def _of_block(head: Head, hidden: mx.array, targets: mx.array, weights: mx.array) -> mx.array:
    logits = head(hidden).astype(mx.float32)
    return (nn.losses.cross_entropy(logits, targets) * weights).sum()
