"""The change at a factor, and which factor is chosen."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from nestune.backends.lora_sum import Adapter, weighted_sum
from nestune.training.strength import Point, choose, scaled, share_of_gain

INPUTS, OUTPUTS = 7, 5
MODULE = "layers.0.mlp.down_proj.lora"
FACTORS = st.floats(0, 1, width=16)


def adapter(rank: int, scale: float = 2.0, seed: int = 0) -> Adapter:
    random = np.random.default_rng(seed)
    a, b = random.normal(size=(rank, INPUTS)), random.normal(size=(OUTPUTS, rank))
    return Adapter({f"{MODULE}_a": a.astype(np.float32), f"{MODULE}_b": b.astype(np.float32)}, scale)


def effect(of: Adapter | None) -> NDArray[np.float64]:
    if of is None:
        return np.zeros((OUTPUTS, INPUTS))
    product: NDArray[np.float64] = of.scale * (of.weights[f"{MODULE}_b"].astype(np.float64) @ of.weights[f"{MODULE}_a"])
    return product


def trained_upon(parent: Adapter | None, fresh: bool) -> Adapter:
    """What training leaves: beside the parent, its ranks and three new ones; else matrices of its own."""
    if parent is not None and fresh:
        return weighted_sum([(parent, 1.0), (adapter(3, seed=2), 1.0)], 2.0)
    return adapter(parent.rank if parent else 3, seed=2)


@given(
    factor=FACTORS,
    parent=st.sampled_from([None, adapter(2, 2.0, 1), adapter(4, 0.5, 1)]),
    fresh=st.booleans(),
)
def test_the_effect_lies_between_the_parent_and_what_was_learned(
    factor: float, parent: Adapter | None, fresh: bool
) -> None:
    trained = trained_upon(parent, fresh)
    found = scaled(trained, parent, factor, 3 if parent and fresh else None)
    expected = effect(parent) + factor * (effect(trained) - effect(parent))
    np.testing.assert_allclose(effect(found), expected, atol=1e-5)


@pytest.mark.parametrize("parent", [None, adapter(2, seed=1)])
@pytest.mark.parametrize("fresh", [True, False])
def test_factor_1_is_the_trained_adapter_and_factor_0_the_parent(parent: Adapter | None, fresh: bool) -> None:
    trained = trained_upon(parent, fresh)
    own = 3 if parent and fresh else None
    assert scaled(trained, parent, 1.0, own) is trained
    nothing = scaled(trained, parent, 0.0, own)
    assert nothing is parent if parent else not effect(nothing).any()


def test_beside_the_parent_only_the_new_ranks_of_b_change() -> None:
    parent = adapter(2, seed=1)
    trained = trained_upon(parent, fresh=True)
    half = scaled(trained, parent, 0.5, 3)
    assert np.array_equal(half.weights[f"{MODULE}_a"], trained.weights[f"{MODULE}_a"])
    assert np.array_equal(half.weights[f"{MODULE}_b"][:, :2], parent.weights[f"{MODULE}_b"])
    assert np.array_equal(half.weights[f"{MODULE}_b"][:, 2:], trained.weights[f"{MODULE}_b"][:, 2:] / 2)


def points(*shares_and_divergences: tuple[float | None, float]) -> list[Point]:
    """At factors 0.1, 0.2 and so on; the last one at 1."""
    factors = [number / 10 for number in range(1, len(shares_and_divergences))] + [1.0]
    return [
        Point(factor, 0.0, share, divergence)
        for factor, (share, divergence) in zip(factors, shares_and_divergences, strict=True)
    ]


def test_of_those_that_keep_enough_the_least_divergent_is_chosen() -> None:
    assert choose(points((0.5, 0.1), (0.97, 0.2), (0.99, 0.3), (1.0, 0.4)), 0.97).factor == 0.2
    assert choose(points((0.5, 0.1), (0.969, 0.2), (0.99, 0.3), (1.0, 0.4)), 0.97).factor == 0.3
    assert choose(points((0.5, 0.1), (1.2, 0.5), (1.0, 0.4)), 0.97).factor == 1.0
    # A share of 0.9 - 0.1 - 0.1 of 0.7 is exactly the minimum, but for rounding.
    assert choose(points(((0.9 - 0.1 - 0.1) / 0.7, 0.1), (1.0, 0.4)), 1.0).factor == 0.1


def test_of_the_same_divergence_the_smaller_factor_is_chosen() -> None:
    assert choose(points((1.0, 0.1), (1.0, 0.1), (1.0, 0.1)), 0.9).factor == 0.1


def test_where_nothing_was_learned_the_change_stays_whole() -> None:
    assert share_of_gain(0.3, 0.0) is None
    assert share_of_gain(0.3, -0.1) is None
    assert choose(points((None, 0.0), (None, 0.4)), 0.97).factor == 1.0


@given(st.lists(st.tuples(st.floats(-1, 2), st.floats(0, 3)), min_size=1, max_size=8), st.floats(0.1, 1))
def test_the_choice_keeps_enough_and_never_diverges_more_than_the_whole(
    others: list[tuple[float, float]], min_share: float
) -> None:
    curve = points(*others, (1.0, 1.5))
    chosen = choose(curve, min_share)
    assert chosen in curve
    assert chosen.share is not None
    assert chosen.share >= min_share - 1e-9
    assert chosen.divergence <= 1.5
    assert not any(p.divergence < chosen.divergence and (p.share or 0) >= min_share for p in curve)
