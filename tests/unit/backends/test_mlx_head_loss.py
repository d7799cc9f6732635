"""On MLX too the loss of the head in blocks is the plain loss, and so is its gradient."""

from typing import Any

import fast_mlx  # noqa: F401 - before mlx
import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from nestune.backends.mlx_head_loss import head_loss

WIDTH, VOCABULARY = 16, 50
Example = tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]


def example(positions: int, seed: int) -> Example:
    """Hidden states, targets, weights, and the head's matrix."""
    random = np.random.default_rng(seed)
    weights = random.choice([0.0, 1.0, 0.5], positions).astype(np.float32)
    hidden, head = random.normal(size=(positions, WIDTH)), random.normal(size=(VOCABULARY, WIDTH))
    return hidden.astype(np.float32), random.integers(0, VOCABULARY, positions), weights, head.astype(np.float32)


def plain_loss(hidden: Any, targets: Any, weights: Any, head: Any) -> tuple[float, NDArray[Any]]:
    """- sum_i w_i log softmax(W h_i)[t_i] and its gradient, sum_i w_i (softmax(W h_i) - onehot(t_i)) W, in float64."""
    logits = hidden.astype(np.float64) @ head.astype(np.float64).T
    probabilities = np.exp(logits - logits.max(1, keepdims=True))
    probabilities /= probabilities.sum(1, keepdims=True)
    loss = -(weights * np.log(probabilities[np.arange(len(targets)), targets])).sum()
    return float(loss), (weights[:, None] * (probabilities - np.eye(VOCABULARY)[targets])) @ head


def ours(hidden: Any, targets: Any, weights: Any, head: Any, at_once: int) -> tuple[float, NDArray[Any]]:
    """The loss, and the gradient of three times the loss."""
    matrix = mx.array(head)

    def tripled(states: mx.array) -> mx.array:
        return 3 * head_loss(states, mx.array(targets), mx.array(weights), lambda seen: seen @ matrix.T, at_once)

    loss, gradient = mx.value_and_grad(tripled)(mx.array(hidden))
    return float(np.array(loss)) / 3, np.array(gradient)


@settings(max_examples=40, deadline=None)
@given(positions=st.integers(1, 40), at_once=st.integers(1, 50), seed=st.integers(0, 99))
def test_loss_and_gradient_in_blocks_of_any_size_are_the_plain_ones(positions: int, at_once: int, seed: int) -> None:
    given_ = example(positions, seed)
    expected, expected_gradient = plain_loss(*given_)
    loss, gradient = ours(*given_, at_once)
    assert loss == pytest.approx(expected, rel=1e-5, abs=1e-6)
    np.testing.assert_allclose(gradient, 3 * expected_gradient, atol=1e-5 * (1 + np.abs(expected_gradient).max()))


def test_the_head_never_sees_more_positions_than_allowed_and_each_once() -> None:
    hidden, targets, weights, head = example(11, seed=2)
    seen: list[mx.array] = []

    def watched(block: mx.array) -> mx.array:
        seen.append(block)
        return block @ mx.array(head).T

    loss = head_loss(mx.array(hidden), mx.array(targets), mx.array(weights), watched, positions_at_once=4)
    mx.eval(loss)
    assert [len(block) for block in seen] == [4, 4, 3]
    assert np.array_equal(np.concatenate([np.array(block) for block in seen]), hidden)


def test_logits_of_a_narrower_type_are_summed_in_float32() -> None:
    hidden, targets, weights, head = example(40, seed=3)
    expected, _ = plain_loss(hidden, targets, weights, head)
    arrays = mx.array(hidden).astype(mx.bfloat16), mx.array(targets), mx.array(weights)
    loss = head_loss(*arrays, lambda seen: seen @ mx.array(head).astype(mx.bfloat16).T, 7)
    assert loss.dtype == mx.float32
    assert float(np.array(loss)) == pytest.approx(expected, rel=1e-2)


def peak(positions: int, compiled: bool) -> int:
    """The bytes that a forward and a backward pass takes, in blocks of 128 positions."""
    vocabulary = 4096
    hidden = mx.random.normal((positions, WIDTH), key=mx.random.key(0))
    matrix = mx.random.normal((vocabulary, WIDTH), key=mx.random.key(1))
    targets, weights = mx.zeros(positions, mx.int32), mx.ones(positions)
    step = mx.value_and_grad(lambda states: head_loss(states, targets, weights, lambda seen: seen @ matrix.T, 128))
    if compiled:
        step = mx.compile(step)
    mx.eval(hidden, matrix, step(hidden))
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(step(hidden))
    return mx.get_peak_memory() - before


@pytest.mark.parametrize("compiled", [False, True])
def test_more_positions_take_no_more_logits(compiled: bool) -> None:
    few, many = peak(512, compiled), peak(4096, compiled)
    print(f"{few} and {many} bytes")
    assert many - few < 0.1 * 4 * (4096 - 512) * 4096
