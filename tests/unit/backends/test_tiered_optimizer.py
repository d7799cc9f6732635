"""One optimizer over tiers, against plain torch.optim: what moves, when, by how much, in loops as PyTorch has them."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_adapters import (
    MAPS,
    PERIODS,
    POLICIES,
    Adapters,
    ranks_of_tier,
    same,
    tiered,
    train,
    weights,
)
from torch import nn

from nestune.errors import ConfigError, RunError


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("how", MAPS)
def test_periods_of_one_equal_adamw_and_clip_grad_norm_bit_for_bit(how: str, policy: str) -> None:
    model, plain = Adapters(), Adapters()
    optimizer = tiered(model, how, (1, 1, 1), weight_decay=0.1, max_grad_norm=0.3, inactive_gradients=policy)
    reference = torch.optim.AdamW(plain.parameters(), lr=0.05, weight_decay=0.1)
    for step in range(1, 21):
        train(model, optimizer, range(step, step + 1))
        reference.zero_grad()
        plain.loss(step).backward()
        norm = nn.utils.clip_grad_norm_(plain.parameters(), 0.3)
        reference.step()
        assert optimizer.grad_norm == norm.item()
    assert same(weights(model), weights(plain))


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("how", MAPS)
def test_each_tier_equals_an_optimizer_of_its_own_that_is_stepped_when_it_is_due(
    how: str, policy: str, kind: type[torch.optim.Optimizer]
) -> None:
    model, options = Adapters(), {"lr": 0.05, "weight_decay": 0.1}
    optimizer = tiered(model, how, inactive_gradients=policy, optimizer=kind, **options)
    alone = [
        {n: nn.Parameter(ranks_of_tier(n, m.detach(), tier, how).clone()) for n, m in model.matrices.items()}
        for tier in range(3)
    ]
    references = [kind(parts.values(), **options) for parts in alone]
    for step in range(1, 13):
        optimizer.zero_grad()
        model.loss(step).backward()
        for tier, period in enumerate(PERIODS):
            for name, part in alone[tier].items():
                gradient = model.matrices[name].grad
                assert gradient is not None
                gradient = ranks_of_tier(name, gradient, tier, how).clone()
                part.grad = gradient if policy == "drop" or part.grad is None else part.grad + gradient
            if step % period == 0:
                for part in alone[tier].values():
                    assert part.grad is not None
                    part.grad /= period if policy == "accumulate" else 1
                references[tier].step()
                references[tier].zero_grad()
        optimizer.step()
        for tier in range(3):
            for name, part in alone[tier].items():
                torch.testing.assert_close(ranks_of_tier(name, model.matrices[name].detach(), tier, how), part.detach())
    assert optimizer.update_counts == [12, 6, 3]
    assert optimizer.steps == 12


@pytest.mark.parametrize("how", MAPS)
def test_what_is_not_due_stays_bit_equal(how: str) -> None:
    model = Adapters()
    optimizer = tiered(model, how, (1, 2, None), inactive_gradients="accumulate", weight_decay=0.1)
    for step in range(1, 9):
        before = weights(model)
        train(model, optimizer, range(step, step + 1))
        for name, after in weights(model).items():
            for tier, due in enumerate((True, step % 2 == 0, False)):
                part, was = (ranks_of_tier(name, matrix, tier, how) for matrix in (after, before[name]))
                assert torch.equal(part, was) == (not due or part.numel() == 0)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("how", MAPS)
def test_gradients_that_are_switched_off_change_no_bit(how: str, policy: str) -> None:
    with_all, with_due = Adapters(), Adapters()
    everything, needed = (tiered(m, how, inactive_gradients=policy, max_grad_norm=0.3) for m in (with_all, with_due))
    for step in range(1, 13):
        needed.require_gradients()
        train(with_all, everything, range(step, step + 1))
        train(with_due, needed, range(step, step + 1))
    assert same(weights(with_all), weights(with_due))


def test_only_matrices_with_a_part_that_is_due_require_a_gradient() -> None:
    model = Adapters()
    optimizer = tiered(model)
    off = []
    for step in range(1, 5):
        optimizer.require_gradients()
        off.append([name[7] for name, p in model.matrices.items() if not p.requires_grad])
        train(model, optimizer, range(step, step + 1))
    assert off == [["0", "0", "1", "1"], ["0", "0"], ["0", "0", "1", "1"], []]


@pytest.mark.parametrize("how", MAPS)
def test_who_clips_the_model_clips_what_moves(how: str) -> None:
    """As trainers do it: torch's clipping over all parameters, before the optimizer's step."""
    ours, theirs = Adapters(), Adapters()
    clips, is_clipped = tiered(ours, how, max_grad_norm=0.1), tiered(theirs, how)
    for step in range(1, 9):
        clips.require_gradients()
        train(ours, clips, range(step, step + 1))
        is_clipped.zero_grad()
        is_clipped.require_gradients()
        theirs.loss(step).backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 0.1)
        is_clipped.step()
    assert same(weights(ours), weights(theirs))


def test_a_due_tier_whose_gradients_are_still_switched_off_is_an_error() -> None:
    model = Adapters()
    optimizer = tiered(model)
    optimizer.require_gradients()
    train(model, optimizer, range(1, 2))
    before = weights(model)
    with pytest.raises(RunError, match=r"tier 1 is due at step 2.*require_gradients\(\)"):
        train(model, optimizer, range(2, 3))
    assert same(weights(model), before)
    assert optimizer.steps == 1


def test_a_loop_may_run_its_backward_pass_at_steps_at_which_no_tier_is_due() -> None:
    model = Adapters()
    optimizer = tiered(model, periods=(2, 4, 8))
    before = weights(model)
    optimizer.require_gradients()
    train(model, optimizer, range(1, 2))
    assert same(weights(model), before)
    optimizer.require_gradients()
    train(model, optimizer, range(2, 3))
    assert optimizer.update_counts == [1, 0, 0]
    assert not same(weights(model), before)


def test_an_optimizer_that_is_done_leaves_the_next_ones_gradients_alone() -> None:
    model, fresh = Adapters(), Adapters()
    done = tiered(model, "stacked", (1, 4, 4))
    done.require_gradients()
    train(model, done, range(1, 2))
    with torch.no_grad():
        for name, matrix in model.matrices.items():
            matrix.copy_(fresh.matrices[name])
    train(model, tiered(model, "stacked", (1, 1, 1)), range(1, 4))
    train(fresh, tiered(fresh, "stacked", (1, 1, 1)), range(1, 4))
    assert same(weights(model), weights(fresh))


@pytest.mark.parametrize("how", MAPS)
@pytest.mark.parametrize("kernel", ["foreach", "fused"])
def test_other_kernels_move_what_is_due_and_nothing_else_or_are_refused(kernel: str, how: str) -> None:
    model = Adapters()
    if (kernel, how) == ("fused", "stacked"):
        with pytest.raises(ConfigError, match=r"fused.*leave it out"):
            tiered(model, how, **{kernel: True})
        return
    optimizer = tiered(model, how, weight_decay=0.1, **{kernel: True})
    for step in range(1, 5):
        before = weights(model)
        train(model, optimizer, range(step, step + 1))
        for name, matrix in model.matrices.items():
            for tier, period in enumerate(PERIODS):
                then, now = (ranks_of_tier(name, of, tier, how) for of in (before[name], matrix.detach()))
                assert torch.equal(then, now) if step % period else (then != now).all()


def test_a_closure_is_run_once_with_gradients_and_its_loss_returned() -> None:
    model, plain = Adapters(), Adapters()
    optimizer, losses = tiered(model), []

    def closure() -> float:
        optimizer.zero_grad()
        loss = model.loss(len(losses) + 1)
        loss.backward()
        losses.append(loss.item())
        return losses[-1]

    with torch.no_grad():
        returned = [optimizer.step(closure) for _ in range(8)]
    train(plain, tiered(plain), range(1, 9))
    assert returned == losses
    assert len(losses) == 8
    assert same(weights(model), weights(plain))


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]] = {
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda epoch: 1 / (1 + epoch)),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=10),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=[0.1, 0.05, 0.025], total_steps=20),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_sets_each_tiers_rate_as_it_does_for_adamw_with_these_groups(name: str) -> None:
    model, plain = Adapters(), Adapters()
    optimizer = tiered(model, periods=(1, 1, 1), lr=0.1, lr_scales=[1, 0.5, 0.25])
    groups: list[dict[str, Any]] = [
        {"params": [p for n, p in plain.matrices.items() if n[7] == str(2 - k)], "lr": 0.1 / 2**k} for k in range(3)
    ]
    reference = torch.optim.AdamW(groups, lr=0.1)
    ours, theirs = SCHEDULERS[name](optimizer), SCHEDULERS[name](reference)
    for step in range(1, 11):
        train(model, optimizer, range(step, step + 1))
        train(plain, reference, range(step, step + 1))
        ours.step()
        theirs.step()
        assert ours.get_last_lr() == theirs.get_last_lr()
    assert same(weights(model), weights(plain))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("how", MAPS)
def test_an_amp_scaler_changes_no_bit_and_skips_an_infinite_step_without_counting_it(how: str, policy: str) -> None:
    scaled, plain = Adapters(), Adapters()
    optimizer, reference = (tiered(m, how, inactive_gradients=policy, max_grad_norm=0.3) for m in (scaled, plain))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for step in range(1, 9):
        if step == 3:
            before, state = weights(scaled), copy.deepcopy(optimizer.state_dict())
            optimizer.require_gradients()
            optimizer.zero_grad()
            scaler.scale(scaled.loss(99) * torch.inf).backward()  # type: ignore[no-untyped-call]
            scaler.step(optimizer)
            scaler.update()
            assert scaler.get_scale() == 2.0**7
            assert same(weights(scaled), before)
            assert repr(optimizer.state_dict()) == repr(state)
        optimizer.require_gradients()
        optimizer.zero_grad()
        scaler.scale(scaled.loss(step)).backward()  # type: ignore[no-untyped-call]
        scaler.step(optimizer)
        scaler.update()
        train(plain, reference, range(step, step + 1))
    assert optimizer.update_counts == [8, 4, 2]
    assert same(weights(scaled), weights(plain))


def test_a_gradient_that_is_not_finite_ends_training_with_a_remedy() -> None:
    model = Adapters()
    optimizer = tiered(model)
    (model.loss(1) * torch.nan).backward()
    with pytest.raises(RunError, match=r"training diverged.*learning rate"):
        optimizer.step()
