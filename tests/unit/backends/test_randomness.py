"""What is random is a function of the seed: first weights by their law, one seed for each step."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nestune.backends.randomness import initial_weights, step_seed
from nestune.tiers.parameters import LoraParameter

RANK, INPUTS, OUTPUTS = 16, 1024, 48
SEEDS = st.integers(0, 2**63 - 1)


def matrices(*layers: int) -> list[LoraParameter]:
    return [
        LoraParameter(layer, module, side, (RANK, INPUTS) if side == "a" else (OUTPUTS, RANK))
        for layer in layers
        for module in ("self_attn.q_proj", "mlp.up_proj")
        for side in ("a", "b")
    ]


def test_every_b_is_zero_and_every_matrix_float32_of_its_shape() -> None:
    parameters = matrices(0, 1)
    weights = initial_weights(parameters, 3)
    assert list(weights) == [p.name for p in parameters]
    for parameter in parameters:
        assert weights[parameter.name].shape == parameter.shape
        assert weights[parameter.name].dtype == np.float32
        assert weights[parameter.name].any() == (parameter.side == "a")


def test_a_is_uniform_within_the_reciprocal_root_of_its_inputs() -> None:
    """Mean 0, variance bound^2 / 3, fourth moment bound^4 / 5: each within five standard errors."""
    values = np.concatenate([a.ravel() for n, a in initial_weights(matrices(*range(8)), 5).items() if n[-1] == "a"])
    scaled = values.astype(np.float64) * np.sqrt(INPUTS)
    assert np.abs(scaled).max() <= 1
    assert np.abs(scaled).max() > 1 - 50 / scaled.size
    # E[x^p] = 1 / (p + 1) for even p, and so on for its variance.
    for power, expected in ((1, 0), (2, 1 / 3), (3, 0), (4, 1 / 5)):
        variance = 1 / (2 * power + 1) - expected**2
        assert abs((scaled**power).mean() - expected) < 5 * np.sqrt(variance / scaled.size)


def test_matrices_are_independent_of_each_other() -> None:
    drawn = [a.ravel() for name, a in initial_weights(matrices(0, 1, 2), 0).items() if name.endswith("a")]
    correlations = np.corrcoef(drawn) - np.eye(len(drawn))
    assert np.abs(correlations).max() < 5 / np.sqrt(RANK * INPUTS)


@given(seed=SEEDS, layers=st.sets(st.integers(0, 40), min_size=1, max_size=3))
def test_a_matrix_does_not_depend_on_what_else_is_trained(seed: int, layers: set[int]) -> None:
    parameters = [LoraParameter(layer, "self_attn.q_proj", "a", (2, 4)) for layer in range(41)]
    every = initial_weights(parameters, seed)
    some = initial_weights([parameters[layer] for layer in sorted(layers, reverse=True)], seed)
    assert {name: a.tobytes() for name, a in some.items()} == {name: every[name].tobytes() for name in some}


def test_another_seed_or_another_name_is_another_draw() -> None:
    drawn = [initial_weights(matrices(0, 10, 100), seed) for seed in (0, 1, 2**40)]
    bits = {a.tobytes() for weights in drawn for name, a in weights.items() if name.endswith("a")}
    assert len(bits) == 3 * 3 * 2


@given(st.lists(st.tuples(SEEDS, st.integers(1, 10**9)), min_size=2, max_size=50, unique=True))
def test_every_step_of_every_seed_has_a_seed_of_its_own(pairs: list[tuple[int, int]]) -> None:
    seeds = [step_seed(seed, step) for seed, step in pairs]
    assert len(set(seeds)) == len(pairs)
    assert all(isinstance(seed, int) and 0 <= seed < 2**63 for seed in seeds)


def test_steps_of_neighbouring_seeds_do_not_meet() -> None:
    """As they would if seed and step were added: seed 0 at step 5 would draw what seed 1 draws at step 4."""
    seeds = {step_seed(seed, step) for seed in range(30) for step in range(1, 301)}
    assert len(seeds) == 30 * 300
    bits = np.array([[(seed >> bit) & 1 for bit in range(63)] for seed in seeds])
    assert np.abs(bits.mean(0) - 0.5).max() < 5 * 0.5 / np.sqrt(len(seeds))
