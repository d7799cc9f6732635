"""What a tiered optimizer keeps between steps: windows, moments, counts; saved, loaded, refused."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_adapters import (
    MAPS,
    PERIODS,
    POLICIES,
    Adapters,
    same,
    tiered,
    train,
    weights,
)
from torch import nn

from nestune.backends.tiered_optimizer import TieredOptimizer
from nestune.errors import ConfigError


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
def test_a_copy_is_refused_as_its_parts_would_be_of_no_model(copied: Callable[[object], object]) -> None:
    with pytest.raises(TypeError, match="state_dict"):
        copied(tiered(Adapters()))


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
