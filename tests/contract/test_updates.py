"""Which parameters move at a step and by how much, on every backend."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from nestune.errors import RunError
from nestune.tiers.schedule import TierSchedule
from tests.contract.conftest import MakeBackend, random_batch
from tests.contract.reference import NumpyTieredAdamW, PlainGradients

Weights = dict[str, NDArray[Any]]


def changed(before: Weights, after: Weights) -> set[str]:
    return {name for name in before if before[name].tobytes() != after[name].tobytes()}


@pytest.mark.parametrize("policy", ["drop", "accumulate"])
@pytest.mark.parametrize("strategy", ["layer_depth", "layer_depth_reversed"])
def test_due_parameters_change_and_all_others_stay_bit_equal(make: MakeBackend, strategy: str, policy: str) -> None:
    backend = make(tiers={"strategy": strategy, "inactive_gradients": policy})
    schedule = TierSchedule((1, 2, 4))
    layer_of = {p.name: p.layer for p in backend.lora_parameters()}
    third = {"layer_depth": lambda layer: layer // 2, "layer_depth_reversed": lambda layer: 2 - layer // 2}[strategy]
    states = [backend.weights()]
    for step in range(1, 9):
        backend.train_step([random_batch(step)], schedule.due(step), 1e-3)
        states.append(backend.weights())
    for step, (before, after) in enumerate(pairwise(states), start=1):
        moved = {name for name in layer_of if third(layer_of[name]) in schedule.due(step)}
        # A has no gradient as long as its B is zero, so at a tier's first update under `drop` only B moves.
        first = {name for name in moved if name.endswith("lora_a") and not states[step - 1][name[:-1] + "b"].any()}
        assert changed(before, after) == moved - first


@pytest.mark.parametrize("policy", ["drop", "accumulate"])
@pytest.mark.parametrize("strategy", ["layer_depth_reversed", "stacked"])
def test_fifty_steps_agree_with_a_numpy_reference(make: MakeBackend, strategy: str, policy: str) -> None:
    rate, steps = 1e-3, 50
    backend = make(
        tiers={"strategy": strategy, "inactive_gradients": policy},
        training={"weight_decay": 0.01, "max_grad_norm": 1.0},
    )
    schedule = TierSchedule((1, 2, 4))
    gradients = PlainGradients(backend.weights())
    tier_of = {
        "layer_depth_reversed": {p.name: 2 - p.layer // 2 for p in backend.lora_parameters()},
        "stacked": {
            f"{p.name}{ranks}": tier
            for p in backend.lora_parameters()
            for tier, ranks in enumerate(["[0:3]", "[3:6]", "[6:8]"])
        },
    }[strategy]
    reference = NumpyTieredAdamW(
        backend.weights(),
        tier_of,
        (1, 2, 4),
        accumulate=policy == "accumulate",
        weight_decay=0.01,
        max_norm=1.0,
    )
    for step in range(1, steps + 1):
        micro_batches = [random_batch(2 * step), random_batch(2 * step + 1, rows=2)]
        expected_loss, gradient = gradients.of(reference.weights, micro_batches)
        result = backend.train_step(micro_batches, schedule.due(step), rate)
        reference.step(step, gradient, rate)
        assert result.loss == pytest.approx(expected_loss, rel=1e-4)
    ours = backend.weights()
    deviations = np.concatenate([np.abs(ours[name] - w).ravel() for name, w in reference.weights.items()])
    difference = np.linalg.norm(deviations)
    size = np.sqrt(sum(float((w**2).sum()) for w in reference.weights.values()))
    moved = np.sqrt(sum(float(((w - reference.initial[n]) ** 2).sum()) for n, w in reference.weights.items()))
    assert moved / size > 1e-2
    print(f"relative deviation {difference / size:.2g} of the weights, {difference / moved:.2g} of their movement")
    assert np.quantile(deviations, 0.99) < 1e-2 * rate
    # Adam's update is about `rate` however small the gradient. Where that is within rounding of zero, so is its sign:
    # the few such elements make up nearly all of the norm.
    assert difference / size < 1e-3


def test_a_step_is_the_mean_over_all_its_supervised_tokens_not_of_micro_batch_means(make: MakeBackend) -> None:
    long, short = random_batch(1, rows=6), random_batch(2, rows=1)
    split, whole = make(), make()
    result = split.train_step([long, short], frozenset({0, 1, 2}), 1e-3)
    counts = [int(batch.supervised.sum()) for batch in (long, short)]
    losses = [whole.loss([batch]) for batch in (long, short)]
    assert result.tokens == sum(counts)
    assert result.loss == pytest.approx(sum(loss.nats for loss in losses) / sum(counts), rel=1e-5)
    assert losses[0].mean != pytest.approx(losses[1].mean, rel=1e-3)


def test_nothing_due_moves_nothing_and_still_tells_the_loss(make: MakeBackend) -> None:
    backend = make(tiers={"update_every": [2, 4, 8]})
    before = backend.weights()
    result = backend.train_step([random_batch(1)], frozenset(), 1e-3)
    assert changed(before, backend.weights()) == set()
    assert result.loss > 0
    assert result.grad_norm == 0


def test_lr_scale_of_a_tier_scales_its_update(make: MakeBackend) -> None:
    def moved(scale: list[float]) -> Weights:
        backend = make(
            tiers={"update_every": [1, 1, 1], "lr_scale": scale}, training={"optimizer": "sgd", "max_grad_norm": None}
        )
        before = backend.weights()
        backend.train_step([random_batch(1)], frozenset({0, 1, 2}), 0.1)
        return {name: value - before[name] for name, value in backend.weights().items()}

    plain, scaled = moved([1, 1, 1]), moved([1, 0.5, 0.25])
    for name, difference in scaled.items():
        factor = {5: 1, 4: 1, 3: 0.5, 2: 0.5, 1: 0.25, 0: 0.25}[int(name.split(".")[1])]
        np.testing.assert_allclose(difference, plain[name] * factor, rtol=1e-3, atol=1e-9)


def test_a_loss_that_is_not_finite_ends_training_with_a_remedy(make: MakeBackend) -> None:
    backend = make(training={"optimizer": "sgd", "max_grad_norm": None})

    def train() -> None:
        for seed in range(20):
            backend.train_step([random_batch(seed)], frozenset({0, 1, 2}), 1e12)

    with pytest.raises(RunError, match=r"training diverged.*learning_rate"):
        train()


def test_the_same_seed_gives_the_same_bits(make: MakeBackend) -> None:
    def trained(seed: int) -> Weights:
        backend = make(training={"seed": seed}, lora={"dropout": 0.2})
        for step in range(1, 6):
            backend.train_step([random_batch(step)], TierSchedule((1, 2, 4)).due(step), 1e-3)
        return backend.weights()

    assert changed(trained(3), trained(3)) == set()
    assert changed(trained(3), trained(4)) != set()


def test_dropout_acts_in_training_and_in_no_loss(make: MakeBackend) -> None:
    plain, dropping = make(), make(lora={"dropout": 0.5})
    for backend in (plain, dropping):
        for step in range(1, 4):
            backend.train_step([random_batch(step)], frozenset({0, 1, 2}), 1e-3)
    assert changed(plain.weights(), dropping.weights()) == set(plain.weights())
    assert dropping.loss([random_batch(9)]) == dropping.loss([random_batch(9)])


@pytest.mark.parametrize("policy", ["drop", "accumulate"])
@pytest.mark.parametrize("strategy", ["layer_depth", "layer_depth_reversed", "stacked"])
def test_gradient_checkpointing_changes_no_bit_of_what_is_learned(
    make: MakeBackend, strategy: str, policy: str
) -> None:
    def trained(checkpointing: bool) -> Weights:
        backend = make(
            tiers={"strategy": strategy, "inactive_gradients": policy},
            training={"gradient_checkpointing": checkpointing},
            lora={"dropout": 0.1},
        )
        for step in range(1, 9):
            backend.train_step([random_batch(step)], TierSchedule((1, 2, 4)).due(step), 1e-3)
        return backend.weights()

    assert changed(trained(False), trained(True)) == set()
