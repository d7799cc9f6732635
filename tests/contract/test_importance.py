"""What a backend measures before training, against gradients of an ordinary PEFT model; and that it changes nothing."""

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from nestune.backends.base import Backend
from tests.contract.conftest import MakeBackend, random_batch
from tests.contract.reference import PlainGradients

Measure = Literal["gradient", "squared_gradient", "taylor"]
FORMULAS: dict[Measure, Callable[[NDArray[Any], NDArray[Any]], NDArray[Any]]] = {
    "gradient": lambda _, g: np.abs(g),
    "squared_gradient": lambda _, g: g**2,
    "taylor": lambda w, g: np.abs(w * g),
}
# Micro-batches of a step hold unequal numbers of tokens, so a mean of their means would be another gradient.
STEPS = [[random_batch(10 * step), random_batch(10 * step + 1, rows=2)] for step in range(1, 5)]


def trained(backend: Backend) -> Backend:
    """A backend whose B is no longer zero."""
    for step in range(1, 4):
        backend.train_step([random_batch(step)], frozenset({0, 1, 2}), 5e-3)
    return backend


@pytest.mark.parametrize("measure", FORMULAS)
def test_each_measure_is_its_mean_over_elements_and_steps(make: MakeBackend, measure: Measure) -> None:
    backend = trained(make())
    weights = backend.weights()
    assert all(w.any() for w in weights.values())
    reference = PlainGradients(weights)
    gradients = [reference.of(weights, micro_batches)[1] for micro_batches in STEPS]
    measured = backend.measure_importance(STEPS, measure)
    expected = {
        name: np.mean([FORMULAS[measure](w.astype(np.float64), g[name]).mean() for g in gradients])
        for name, w in weights.items()
    }
    assert measured == pytest.approx(expected, rel=1e-5, abs=0)
    deviation = max(abs(measured[name] / value - 1) for name, value in expected.items())
    print(f"{measure}: largest relative deviation {deviation:.2g} of {len(expected)} matrices")


def test_in_a_new_adapter_only_b_has_a_gradient_and_taylor_is_zero_everywhere(make: MakeBackend) -> None:
    backend = make()
    measured = backend.measure_importance(STEPS, "gradient")
    assert {name[-1] for name, value in measured.items() if value == 0} == {"a"}
    assert {name[-1] for name, value in measured.items() if value > 0} == {"b"}
    assert set(backend.measure_importance(STEPS, "taylor").values()) == {0.0}


@pytest.mark.parametrize("measure", FORMULAS)
def test_measuring_changes_no_weight_and_nothing_of_the_training_after_it(make: MakeBackend, measure: Measure) -> None:
    def bits(measured_before: bool) -> list[dict[str, bytes]]:
        backend = make(lora={"dropout": 0.2})
        if measured_before:
            backend.measure_importance(STEPS, measure)
        # As the stage does it: the optimizers are made after the pass.
        backend.prepare_training({p.name: 2 - p.layer // 2 for p in backend.lora_parameters()})
        states = [backend.weights()]
        for step, due in enumerate([{0}, {0, 1}, {0}, {0, 1, 2}], start=1):
            backend.train_step([random_batch(step)], frozenset(due), 1e-3)
            states.append(backend.weights())
        return [{name: w.tobytes() for name, w in state.items()} for state in states]

    assert bits(measured_before=True) == bits(measured_before=False)


def test_the_same_steps_give_the_same_bits_also_with_dropout(make: MakeBackend) -> None:
    backend = make(lora={"dropout": 0.2})
    measured = backend.measure_importance(STEPS, "gradient")
    assert backend.measure_importance(STEPS, "gradient") == measured
    assert backend.measure_importance(STEPS[:3], "gradient") != measured
