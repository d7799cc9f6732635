"""One optimizer over tiers, against plain torch.optim: what moves, when, by how much, in loops as PyTorch has them."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nestune.backends.tiered_optimizer import TieredOptimizer
from nestune.errors import ConfigError, RunError

WIDTH, RANK, PERIODS = 5, 6, (1, 2, 4)
MAPS = ["whole", "stacked"]
POLICIES = ["drop", "accumulate"]


class Adapters(nn.Module):
    """Three layers x + tanh(B A x), named as LoRA matrices are; both sides start away from zero."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for layer in range(3):
            for side, shape in (("a", (RANK, WIDTH)), ("b", (WIDTH, RANK))):
                values = nn.Parameter(torch.randn(*shape, generator=generator) / 2)
                self.register_parameter(f"{layer}_{side}", values)

    @property
    def matrices(self) -> dict[str, nn.Parameter]:
        return {f"layers.{n[0]}.module.lora_{n[2]}": p for n, p in self.named_parameters()}

    def loss(self, step: int, layers: int = 3) -> Tensor:
        """The loss of a step's own data; deterministic."""
        p = dict(self.named_parameters())
        x, y = torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(step)).to(p["0_a"].dtype)
        for layer in range(layers):
            x = x + torch.tanh(x @ p[f"{layer}_a"].T @ p[f"{layer}_b"].T)
        return (x - y).square().mean()


def tiers_of(model: Adapters, how: str) -> dict[str, int]:
    """whole: the deepest layer is the fastest; stacked: each matrix's first ranks are."""
    if how == "whole":
        return {name: 2 - int(name.split(".")[1]) for name in model.matrices}
    third = RANK // 3
    return {f"{name}[{k * third}:{(k + 1) * third}]": k for name in model.matrices for k in range(3)}


def tiered(model: Adapters, how: str = "whole", periods: Any = PERIODS, **options: Any) -> TieredOptimizer:
    return TieredOptimizer(model.matrices, tiers_of(model, how), periods, **({"lr": 0.05} | options))


def train(model: Adapters, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """The loop of PyTorch's tutorials."""
    for step in steps:
        optimizer.zero_grad()
        model.loss(step).backward()
        optimizer.step()


def weights(model: Adapters) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.matrices.items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def ranks_of_tier(name: str, matrix: Tensor, tier: int, how: str) -> Tensor:
    """The part of a matrix that a tier holds; of a whole map all or nothing."""
    if how == "whole":
        return matrix if 2 - int(name.split(".")[1]) == tier else matrix[:0]
    third = RANK // 3
    return matrix.narrow(0 if name.endswith("a") else 1, tier * third, third)


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


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
def test_a_copy_is_refused_as_its_parts_would_be_of_no_model(copied: Callable[[object], object]) -> None:
    with pytest.raises(TypeError, match="state_dict"):
        copied(tiered(Adapters()))


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


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("how", MAPS)
@pytest.mark.parametrize("cut", [1, 3, 4, 6])
def test_a_saved_state_goes_on_to_the_same_bits_in_the_middle_of_a_window(
    tmp_path: Path, cut: int, how: str, policy: str
) -> None:
    unbroken, killed, resumed = Adapters(), Adapters(), Adapters()
    train(unbroken, tiered(unbroken, how, inactive_gradients=policy), range(1, 12))
    optimizer = tiered(killed, how, inactive_gradients=policy)
    train(killed, optimizer, range(1, cut + 1))
    torch.save({"model": killed.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    goes_on = tiered(resumed, how, inactive_gradients=policy)
    resumed.load_state_dict(saved["model"])
    goes_on.load_state_dict(saved["optimizer"])
    train(resumed, goes_on, range(cut + 1, 12))
    assert goes_on.update_counts == [11, 5, 2]
    assert same(weights(resumed), weights(unbroken))


def test_a_state_of_other_tiers_is_refused_with_all_that_differs() -> None:
    model = Adapters()
    optimizer = tiered(model)
    with pytest.raises(ConfigError) as refused:
        optimizer.load_state_dict(tiered(model, periods=(1, 3, 9), inactive_gradients="accumulate").state_dict())
    for told in ("update_every is [1, 3, 9]", "[1, 2, 4]", "inactive_gradients is ['accumulate'", "['drop'"):
        assert told in str(refused.value)
    shallow_fast = {name: int(name.split(".")[1]) for name in model.matrices}
    mirrored = TieredOptimizer(model.matrices, shallow_fast, PERIODS, lr=0.05)
    with pytest.raises(ConfigError, match=r"layers\.0.*on tier 0, this optimizer layers\.2.*on tier 0"):
        optimizer.load_state_dict(mirrored.state_dict())


def test_a_state_of_another_optimizer_or_of_other_shapes_is_refused() -> None:
    model, wider = Adapters(), Adapters()
    optimizer = tiered(model)
    sgd = tiered(model, optimizer=torch.optim.SGD)
    with pytest.raises(ConfigError, match=r"another optimizer, without .*betas.*eps"):
        optimizer.load_state_dict(sgd.state_dict())
    for name in ("0_a", "0_b"):
        matrix = dict(wider.named_parameters())[name]
        matrix.data = matrix.detach().repeat(2, 2)
    with pytest.raises(ConfigError, match=r"layers\.0\.module\.lora_a \[12, 10\] .*lora_a \[6, 5\]"):
        optimizer.load_state_dict(tiered(wider).state_dict())


def test_further_parameters_are_refused() -> None:
    with pytest.raises(ConfigError, match="tier map"):
        tiered(Adapters()).add_param_group({"params": [nn.Parameter(torch.zeros(2))]})


def test_reset_starts_again_as_a_new_optimizer() -> None:
    model = Adapters()
    used = tiered(model, inactive_gradients="accumulate")
    train(model, used, range(1, 7))
    used.reset()
    twin = copy.deepcopy(model)
    train(model, used, range(1, 9))
    train(twin, tiered(twin, inactive_gradients="accumulate"), range(1, 9))
    assert used.update_counts == [8, 4, 2]
    assert same(weights(model), weights(twin))


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("how", MAPS)
def test_a_model_that_is_cast_after_the_optimizer_was_made_trains_as_one_cast_before(how: str, steps: int) -> None:
    """Trainers move and cast the model they are given, then load the optimizer's state: empty, or a saved one."""
    late, early = Adapters(), Adapters().to(torch.float64)
    optimizer, reference = tiered(late, how), tiered(early, how)
    train(early, reference, range(1, steps + 1))
    late.to(torch.float64).load_state_dict(early.state_dict())
    optimizer.load_state_dict(copy.deepcopy(reference.state_dict()))
    for model, of in ((late, optimizer), (early, reference)):
        train(model, of, range(steps + 1, 9))
    assert all(p.dtype == torch.float64 for p in late.parameters())
    assert same(weights(late), weights(early))


@pytest.mark.parametrize("how", MAPS)
def test_a_window_is_applied_also_when_its_last_step_brings_no_gradient(how: str) -> None:
    """Step 2 uses the first two layers only: the third moves by half of what step 1 asked for."""
    model = Adapters()
    optimizer = tiered(
        model, how, (2, 2, 2), inactive_gradients="accumulate", optimizer=torch.optim.SGD, lr=1.0, max_grad_norm=1e-3
    )
    before = weights(model)
    model.loss(1).backward()
    gradients = {name: p.grad.clone() for name, p in model.matrices.items() if p.grad is not None}
    optimizer.step()
    optimizer.zero_grad()
    model.loss(2, layers=2).backward()
    for name, p in model.matrices.items():
        gradients[name] = (gradients[name] + (0 if p.grad is None else p.grad)) / 2
    norm = torch.sqrt(sum((g.square().sum() for g in gradients.values()), torch.zeros(())))
    optimizer.step()
    assert optimizer.grad_norm == pytest.approx(norm.item(), rel=1e-6)
    for name, after in weights(model).items():
        torch.testing.assert_close(before[name] - after, gradients[name] * 1e-3 / norm, rtol=1e-3, atol=1e-7)


def test_an_open_window_is_its_own_memory() -> None:
    """Distributed training hands out gradients that are views of buffers which it writes again."""
    model, plain = Adapters(), Adapters()
    optimizer = tiered(model, inactive_gradients="accumulate")
    for step in range(1, 9):
        optimizer.zero_grad()
        model.loss(step).backward()
        buffers = [p.grad for p in model.parameters() if p.grad is not None]
        optimizer.step()
        for buffer in buffers:
            buffer.fill_(7.0)
    train(plain, tiered(plain, inactive_gradients="accumulate"), range(1, 9))
    assert same(weights(model), weights(plain))


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("how", MAPS)
def test_zero_grad_forgets_gradients_and_keeps_windows(how: str, set_to_none: bool) -> None:
    model, plain = Adapters(), Adapters()
    optimizer = tiered(model, how, inactive_gradients="accumulate")
    for step in range(1, 9):
        model.loss(100 + step).backward()
        optimizer.zero_grad(set_to_none)
        model.loss(step).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none)
        assert all(p.grad is None or not (set_to_none or p.grad.any()) for p in model.parameters())
    train(plain, tiered(plain, how, inactive_gradients="accumulate"), range(1, 9))
    assert same(weights(model), weights(plain))


def test_a_gradient_that_is_not_finite_ends_training_with_a_remedy() -> None:
    model = Adapters()
    optimizer = tiered(model)
    (model.loss(1) * torch.nan).backward()
    with pytest.raises(RunError, match=r"training diverged.*learning rate"):
        optimizer.step()
