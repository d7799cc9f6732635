"""The loss of the head in blocks is the plain loss, and so is its gradient."""

import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nestune.backends.head_loss import head_loss

WIDTH, VOCABULARY = 16, 50


def plain_loss(hidden: Tensor, targets: Tensor, head: nn.Linear, tokens: int) -> Tensor:
    """- sum_i log softmax(W h_i + b)[t_i] / tokens, in float64, every logit at once."""
    logits = hidden.double() @ head.weight.double().T + head.bias.double()
    return -logits.log_softmax(-1).gather(-1, targets[:, None]).sum() / tokens


def example(positions: int, seed: int) -> tuple[Tensor, Tensor, nn.Linear]:
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(WIDTH, VOCABULARY).requires_grad_(False)
    hidden = torch.randn(positions, WIDTH, generator=generator)
    return hidden, torch.randint(VOCABULARY, (positions,), generator=generator), head


@settings(max_examples=40, deadline=None)
@given(positions=st.integers(1, 40), at_once=st.integers(1, 50), tokens=st.integers(1, 100), seed=st.integers(0, 99))
def test_loss_and_gradient_in_blocks_of_any_size_are_the_plain_ones(
    positions: int, at_once: int, tokens: int, seed: int
) -> None:
    hidden, targets, head = example(positions, seed)
    reference = hidden.double().requires_grad_()
    expected = plain_loss(reference, targets, head, tokens)
    (expected_gradient,) = torch.autograd.grad(expected, reference)

    ours = hidden.clone().requires_grad_()
    loss = head_loss(ours, targets, head, tokens, at_once)
    (3 * loss).backward()

    assert ours.grad is not None
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    difference = (ours.grad.double() - 3 * expected_gradient).norm() / (3 * expected_gradient).norm()
    assert difference.item() < 1e-5


def test_one_block_has_the_bits_of_an_ordinary_cross_entropy() -> None:
    hidden, targets, head = example(12, seed=1)
    ordinary, ours = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    (nn.functional.cross_entropy(head(ordinary), targets, reduction="sum") / 7).backward()
    head_loss(ours, targets, head, 7, positions_at_once=12).backward()
    assert ordinary.grad is not None
    assert ours.grad is not None
    assert torch.equal(ours.grad, ordinary.grad)


@pytest.mark.parametrize("needs_gradient", [True, False])
def test_the_head_never_sees_more_positions_than_allowed_and_each_once(needs_gradient: bool) -> None:
    hidden, targets, head = example(11, seed=2)
    seen: list[Tensor] = []

    def watched(block: Tensor) -> Tensor:
        seen.append(block.detach())
        logits: Tensor = head(block)
        return logits

    loss = head_loss(hidden.requires_grad_(needs_gradient), targets, watched, 11, positions_at_once=4)
    assert loss.requires_grad is needs_gradient
    assert [len(block) for block in seen] == [4, 4, 3]
    assert torch.equal(torch.cat(seen), hidden)


def test_no_logits_wait_for_the_backward_pass() -> None:
    hidden, targets, head = example(11, seed=3)
    alive: list[weakref.ref[Tensor]] = []

    def watched(block: Tensor) -> Tensor:
        assert [logits for logits in alive if logits() is not None] == []
        logits: Tensor = head(block)
        alive.append(weakref.ref(logits))
        return logits

    loss = head_loss(hidden.requires_grad_(), targets, watched, 11, positions_at_once=4)
    assert [logits() for logits in alive] == [None, None, None]
    loss.backward()
    assert hidden.grad is not None
