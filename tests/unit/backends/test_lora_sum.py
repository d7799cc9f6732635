"""Sums of adapters and their compression, against the dense products and NumPy's own SVD."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from nestune.backends.lora_sum import (
    Adapter,
    compress,
    effective_rank,
    relative_error,
    singular_values,
    weighted_sum,
)

SIZES = {"layers.0.self_attn.q_proj": (6, 8), "layers.0.mlp.down_proj": (12, 5), "layers.1.mlp.down_proj": (12, 5)}
MODULES = tuple(f"{module}.lora" for module in SIZES)


def adapter(rank: int, scale: float = 2.0, seed: int = 0, modules: tuple[str, ...] = MODULES) -> Adapter:
    """Random matrices, each module's columns of B in another size, so that some directions count more."""
    random = np.random.default_rng([seed, rank])
    weights = {}
    for module in modules:
        outputs, inputs = SIZES[module.removesuffix(".lora")]
        weights[f"{module}_a"] = random.normal(size=(rank, inputs)).astype(np.float32)
        weights[f"{module}_b"] = (random.normal(size=(outputs, rank)) * 2.0 ** -np.arange(rank)).astype(np.float32)
    return Adapter(weights, scale)


def effect(of: Adapter, module: str) -> NDArray[np.float64]:
    """What is added to a module's weight, as one matrix."""
    if f"{module}_a" not in of.weights:
        outputs, inputs = SIZES[module.removesuffix(".lora")]
        return np.zeros((outputs, inputs))
    a, b = (of.weights[f"{module}_{side}"].astype(np.float64) for side in "ab")
    product: NDArray[np.float64] = of.scale * b @ a
    return product


def bits(of: Adapter) -> dict[str, bytes]:
    return {name: values.tobytes() for name, values in of.weights.items()}


@given(
    parts=st.lists(
        st.tuples(st.integers(1, 9), st.sampled_from([0.25, 1.0, 3.0]), st.floats(-2, 2, width=16)),
        min_size=1,
        max_size=4,
    ),
    scale=st.sampled_from([0.5, 2.0, 7.0]),
)
def test_the_effect_of_a_sum_is_the_weighted_sum_of_the_effects(
    parts: list[tuple[int, float, float]], scale: float
) -> None:
    adapters = [(adapter(rank, own, seed), factor) for seed, (rank, own, factor) in enumerate(parts)]
    total = weighted_sum(adapters, scale)
    assert (total.rank, total.scale) == (sum(rank for rank, _, _ in parts), scale)
    assert {values.dtype for values in total.weights.values()} == {np.dtype(np.float32)}
    for module in MODULES:
        expected = sum(factor * effect(part, module) for part, factor in adapters)
        size = sum(abs(factor) * np.linalg.norm(effect(part, module)) for part, factor in adapters)
        np.testing.assert_allclose(effect(total, module), expected, rtol=0, atol=1e-6 * float(size) + 1e-30)


@pytest.mark.parametrize("scale", [2.0, 0.1])
def test_one_part_of_factor_1_and_the_same_scale_keeps_its_bits(scale: float) -> None:
    one = adapter(4, scale)
    assert bits(weighted_sum([(one, 1.0)], scale)) == bits(one)


def test_parts_of_the_same_scale_stand_side_by_side_with_their_bits() -> None:
    parent, new = adapter(3, seed=1), adapter(4, seed=2)
    total = weighted_sum([(parent, 1.0), (new, 1.0)], 2.0)
    for module in MODULES:
        a, b = total.weights[f"{module}_a"], total.weights[f"{module}_b"]
        assert np.array_equal(a, np.concatenate([parent.weights[f"{module}_a"], new.weights[f"{module}_a"]]))
        assert np.array_equal(b[:, :3], parent.weights[f"{module}_b"])
        assert np.array_equal(b[:, 3:], new.weights[f"{module}_b"])


def test_a_part_that_lacks_a_module_adds_nothing_to_it() -> None:
    whole, last = adapter(3), adapter(2, modules=MODULES[2:])
    for parts in ([(whole, 1.0), (last, 1.0)], [(last, 1.0), (whole, 1.0)]):
        total = weighted_sum(parts, 2.0)
        assert {len(values) for name, values in total.weights.items() if name.endswith("_a")} == {5}
        for module in MODULES:
            np.testing.assert_allclose(effect(total, module), effect(whole, module) + effect(last, module), atol=1e-5)


def test_a_sum_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no adapters"):
        weighted_sum([], 1.0)


@settings(max_examples=40)
@given(rank=st.integers(1, 16), max_rank=st.integers(1, 16), seed=st.integers(0, 99))
def test_compression_is_the_best_approximation_of_its_rank(rank: int, max_rank: int, seed: int) -> None:
    whole = adapter(rank, seed=seed)
    small = compress(whole, max_rank)
    assert small.rank == min(rank, max_rank)
    for module in MODULES:
        dense = effect(whole, module)
        left, values, right = np.linalg.svd(dense, full_matrices=False)
        best = (left[:, :max_rank] * values[:max_rank]) @ right[:max_rank]
        # The error of the best approximation is unique, the approximation itself where singular values differ.
        error, least = np.linalg.norm(dense - effect(small, module)), np.linalg.norm(dense - best)
        assert error <= least + 1e-6 * np.linalg.norm(dense)


def test_nothing_is_lost_where_the_rank_that_is_there_fits() -> None:
    three = adapter(3)
    twice = weighted_sum([(three, 0.5), (three, 0.5)], 2.0)
    assert bits(compress(twice, 6)) == bits(twice)
    for module, values in singular_values(twice).items():
        assert (values[3:] < 1e-6 * values[0]).all()
        np.testing.assert_allclose(effect(compress(twice, 3), module), effect(three, module), atol=1e-5)
    assert relative_error(twice, compress(twice, 3)) < 1e-6


def test_singular_values_and_their_loss_are_those_of_the_dense_effects() -> None:
    whole = adapter(4)
    errors = []
    for module, values in singular_values(whole).items():
        expected = np.linalg.svd(effect(whole, module), compute_uv=False)
        np.testing.assert_allclose(values, expected[: len(values)], rtol=1e-9)
        errors.append(np.sqrt((expected[2:] ** 2).sum() / (expected**2).sum()))
    assert relative_error(whole, compress(whole, 2)) == pytest.approx(max(errors), rel=1e-4)
    assert relative_error(whole, whole) < 1e-7


def test_a_and_b_share_the_singular_values_evenly() -> None:
    small = compress(adapter(6), 3)
    for module in MODULES:
        a, b = small.weights[f"{module}_a"], small.weights[f"{module}_b"]
        np.testing.assert_allclose(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=0), rtol=1e-5)


@pytest.mark.parametrize(("values", "directions"), [([2.0, 2.0, 2.0], 3.0), ([5.0, 0.0], 1.0), ([0.0, 0.0], 0.0)])
def test_the_effective_rank_counts_directions_of_equal_size(values: list[float], directions: float) -> None:
    assert effective_rank(np.array(values)) == pytest.approx(directions)


def test_an_effect_of_nothing_has_no_error() -> None:
    zeros: dict[str, Any] = {name: np.zeros_like(values) for name, values in adapter(4).weights.items()}
    nothing = Adapter(zeros, 2.0)
    assert relative_error(nothing, compress(nothing, 2)) == 0
