"""The tiered optimizer on MLX: every rule of PyTorch's, given the same gradients; and its state between steps."""

from dataclasses import replace
from typing import Any

import fast_mlx  # noqa: F401 - before mlx
import mlx.core as mx
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from nestune.backends import tiered_optimizer
from nestune.backends.mlx_optimizer import TieredOptimizer
from nestune.backends.torch_backend import OPTIMIZERS
from nestune.backends.torch_state import read_state
from nestune.config import TierConfig, TrainingConfig
from nestune.errors import DivergedError
from nestune.tiers.schedule import TierSchedule

Values = dict[str, NDArray[Any]]
RANK, INPUTS, OUTPUTS, LAYERS = 6, 5, 4, 3
SHAPES = {
    f"layers.{layer}.mlp.up_proj.lora_{side}": shape
    for layer in range(LAYERS)
    for side, shape in (("a", (RANK, INPUTS)), ("b", (OUTPUTS, RANK)))
}
MAPS = {
    "whole": {name: 2 - int(name.split(".")[1]) for name in SHAPES},
    "stacked": {f"{name}[{2 * tier}:{2 * tier + 2}]": tier for name in SHAPES for tier in range(3)},
    "some of each": {
        name + ranks: tier
        for name in SHAPES
        for ranks, tier in ([("", 0)] if ".0." in name else [("[0:5]", 2), ("[5:6]", 1)])
    },
}
EVERY_MAP = pytest.mark.parametrize("how", MAPS)
EVERY_POLICY = pytest.mark.parametrize("policy", ["drop", "accumulate"])


def drawn(seed: int, scale: float = 1.0) -> Values:
    random = np.random.default_rng(seed)
    return {name: (scale * random.normal(size=shape)).astype(np.float32) for name, shape in SHAPES.items()}


def as_mlx(values: NDArray[Any]) -> mx.array:
    return mx.array(np.ascontiguousarray(values.T))


class Mlx:
    """Matrices, and the optimizer that moves them, in PEFT's orientation outside."""

    def __init__(self, how: str, tiers: TierConfig, training: TrainingConfig, first: int = 0) -> None:
        self.matrices = {name: as_mlx(values) for name, values in drawn(first).items()}
        self.optimizer = TieredOptimizer(self.matrices, MAPS[how], tiers, training)
        self.schedule = TierSchedule(tiers.periods)

    def step(self, gradients: Values, lr: float = 0.05) -> float:
        due = self.schedule.due(self.optimizer.steps + 1)
        needed = {name: as_mlx(gradients[name]) for name in self.optimizer.needs(due)}
        moved, norm = self.optimizer.update(self.matrices, needed, due, lr)
        self.matrices |= moved
        return norm

    def train(self, first: int, last: int) -> None:
        for step in range(first, last + 1):
            self.step(drawn(step))

    @property
    def values(self) -> Values:
        return {name: np.array(matrix).T for name, matrix in self.matrices.items()}


def configured(policy: str = "drop", **blocks: Any) -> tuple[TierConfig, TrainingConfig]:
    training = {"weight_decay": 0.1, "max_grad_norm": 1.0} | blocks.pop("training", {})
    blocks = {"update_every": (1, 2, 4)} | blocks
    return TierConfig(inactive_gradients=policy, **blocks), TrainingConfig(**training)  # type: ignore[arg-type]


def bits(values: Values) -> dict[str, bytes]:
    return {name: np.ascontiguousarray(array).tobytes() for name, array in values.items()}


@EVERY_MAP
@EVERY_POLICY
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    "tiers",
    [{}, {"strategy": "frozen_slow", "lr_scale": (1.0, 0.5, 0.25)}, {"update_every": (2, 3, 6)}],
    ids=["1, 2, 4", "slowest frozen", "2, 3, 6"],
)
def test_every_step_is_that_of_the_optimizer_on_pytorch(
    how: str, policy: str, optimizer: str, tiers: dict[str, Any]
) -> None:
    config, training = configured(policy, training={"optimizer": optimizer}, **tiers)
    ours = Mlx(how, config, training)
    parameters = {name: torch.nn.Parameter(torch.from_numpy(values)) for name, values in drawn(0).items()}
    theirs = tiered_optimizer.TieredOptimizer(
        parameters,
        MAPS[how],
        config.periods,
        lr=0.05,
        lr_scales=config.lr_scales,
        inactive_gradients=config.inactive_gradients,
        max_grad_norm=training.max_grad_norm,
        optimizer=OPTIMIZERS[optimizer],
        weight_decay=training.weight_decay,
    )
    for step in range(1, 14):
        # Of a norm that is clipped at some steps and not at others.
        gradients = drawn(step, scale=0.02 if step % 3 else 3.0)
        for name, parameter in parameters.items():
            parameter.grad = torch.from_numpy(gradients[name].copy())
        due = theirs.schedule.due(step)
        norm = theirs.update(due)
        assert ours.step(gradients) == pytest.approx(norm, rel=1e-5)
        for name, parameter in parameters.items():
            np.testing.assert_allclose(ours.values[name], parameter.detach().numpy(), atol=2e-5, err_msg=name)
    state, reference = ours.optimizer.state(), read_state(theirs, optimizer, training.seed)
    assert replace(state, arrays={}).__dict__ == replace(reference, arrays={}).__dict__
    assert state.arrays.keys() == reference.arrays.keys()
    for key, array in state.arrays.items():
        np.testing.assert_allclose(array, reference.arrays[key], rtol=1e-4, atol=1e-6, err_msg=key)
        assert array.dtype == np.float32
        assert array.flags.c_contiguous


@EVERY_MAP
@EVERY_POLICY
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("cut", [0, 1, 3, 4, 6])
def test_a_restored_state_goes_on_to_the_same_bits_in_the_middle_of_a_window(
    how: str, policy: str, optimizer: str, cut: int
) -> None:
    config = configured(policy, training={"optimizer": optimizer})
    unbroken, killed, resumed = Mlx(how, *config), Mlx(how, *config), Mlx(how, *config, first=77)
    unbroken.train(1, 11)
    killed.train(1, cut)
    # What it did before is forgotten.
    resumed.train(50, 55)
    resumed.optimizer.restore(killed.optimizer.state())
    resumed.matrices = dict(killed.matrices)
    resumed.train(cut + 1, 11)
    assert bits(resumed.values) == bits(unbroken.values)
    assert bits(resumed.optimizer.state().arrays) == bits(unbroken.optimizer.state().arrays)
    assert resumed.optimizer.state().updates == (11, 5, 2)


def test_a_state_is_a_copy() -> None:
    trained = Mlx("whole", *configured("accumulate"))
    trained.train(1, 3)
    state = trained.optimizer.state()
    before = bits(state.arrays)
    trained.train(4, 4)
    assert bits(state.arrays) == before
    assert state.updates == (3, 1, 0)
    assert state.window_steps == (0, 1, 3)


@EVERY_POLICY
def test_a_new_optimizer_has_no_arrays_and_an_open_window_is_kept_as_its_sum(policy: str) -> None:
    trained = Mlx("whole", *configured(policy))
    assert trained.optimizer.state().arrays == {}
    trained.train(1, 3)
    windows = trained.optimizer.state().of("window")
    sums = {name: drawn(1)[name] + drawn(2)[name] + drawn(3)[name] for name in SHAPES if MAPS["whole"][name] == 2}
    sums |= {name: drawn(3)[name] for name in SHAPES if MAPS["whole"][name] == 1}
    assert windows.keys() == (sums.keys() if policy == "accumulate" else set())
    for name, window in windows.items():
        np.testing.assert_allclose(window, sums[name], rtol=1e-6)


def test_what_is_needed_is_what_moves_and_under_accumulate_all_that_ever_does() -> None:
    needs = {
        (how, policy): Mlx(how, *configured(policy, strategy="frozen_slow")).optimizer.needs(frozenset({0}))
        for how in ("whole", "stacked")
        for policy in ("drop", "accumulate")
    }
    deepest, shallowest = ({n for n in SHAPES if n.startswith(f"layers.{layer}.")} for layer in (2, 0))
    assert needs["whole", "drop"] == deepest
    assert needs["whole", "accumulate"] == SHAPES.keys() - shallowest
    assert needs["stacked", "drop"] == needs["stacked", "accumulate"] == SHAPES.keys()


@EVERY_MAP
def test_what_moves_has_the_names_of_the_tier_map(how: str) -> None:
    optimizer = Mlx(how, *configured()).optimizer
    assert optimizer.names(frozenset()) == []
    assert optimizer.names(frozenset({0, 2})) == [name for name, tier in MAPS[how].items() if tier != 1]


@EVERY_MAP
def test_moments_of_a_tier_that_is_not_due_keep_their_bits(how: str) -> None:
    trained = Mlx(how, *configured())
    trained.train(1, 4)
    before = bits(trained.optimizer.state().arrays)
    trained.step(drawn(5))
    after = bits(trained.optimizer.state().arrays)
    assert {key.rpartition("/")[0] for key in after if after[key] != before[key]} == {
        name for name, tier in MAPS[how].items() if tier == 0
    }


def test_a_step_at_which_nothing_is_due_has_no_norm_and_moves_nothing() -> None:
    trained = Mlx("whole", *configured("accumulate", update_every=(2, 4, 8)))
    before = bits(trained.values)
    assert trained.step(drawn(1)) == 0
    assert bits(trained.values) == before
    assert trained.optimizer.steps == 1


def test_a_norm_that_is_not_finite_ends_training_with_a_remedy() -> None:
    with pytest.raises(DivergedError, match=r"the gradient's norm is (inf|nan).*learning_rate"):
        Mlx("whole", *configured()).step(drawn(1, scale=1e30))


@EVERY_MAP
def test_the_norm_of_the_same_gradients_has_the_same_bits_whatever_the_tiers(how: str) -> None:
    """Or the factor of clipping, and all that is learned, would depend on how matrices were divided."""
    periods = configured(update_every=(1, 1, 1))
    whole, other = Mlx("whole", *periods), Mlx(how, *periods)
    assert [other.step(drawn(step)) for step in range(1, 9)] == [whole.step(drawn(step)) for step in range(1, 9)]
    assert bits(other.values) == bits(whole.values)


def test_without_a_limit_nothing_is_clipped() -> None:
    config, training = configured(training={"optimizer": "sgd", "max_grad_norm": None, "weight_decay": 0.0})
    trained = Mlx("whole", config, training)
    gradients = drawn(1, scale=1e3)
    trained.step(gradients, lr=1e-3)
    for name, values in trained.values.items():
        expected = drawn(0)[name] - (1e-3 * gradients[name] if MAPS["whole"][name] == 0 else 0)
        np.testing.assert_allclose(values, expected, rtol=1e-6, atol=1e-6)


def test_the_learning_rate_is_that_of_each_step() -> None:
    config, training = configured(training={"optimizer": "sgd", "max_grad_norm": None, "weight_decay": 0.0})
    trained = Mlx("whole", config, training)
    deepest = "layers.2.mlp.up_proj.lora_a"
    for step, lr in enumerate((0.1, 0.0, 0.3), start=1):
        before = trained.values[deepest]
        trained.step(drawn(step), lr)
        np.testing.assert_allclose(before - trained.values[deepest], lr * drawn(step)[deepest], atol=1e-6)
