"""How each strategy divides parameters among tiers."""

import random
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lora_matrices import ATTENTION, MLP, MODULES, layers_of, on_tier, parameters, times_named

from nestune.config import TierConfig
from nestune.errors import ConfigError
from nestune.tiers.parameters import LoraParameter
from nestune.tiers.strategies import STRATEGIES
from nestune.tiers.tier_map import assign_tiers


def modules_of(tier_of: dict[str, int], tier: int) -> set[str]:
    return {name.split(".", 2)[2].rpartition(".")[0] for name in on_tier(tier_of, tier)}


def test_every_strategy_that_a_configuration_accepts_can_run() -> None:
    accepted = get_args(TierConfig.model_fields["strategy"].annotation)
    assert set(accepted) == set(STRATEGIES)


def test_layer_depth_puts_shallow_layers_on_the_fast_tier() -> None:
    tier_of = assign_tiers(parameters(6), TierConfig(strategy="layer_depth")).tier_of
    assert [layers_of(tier_of, tier) for tier in range(3)] == [{0, 1}, {2, 3}, {4, 5}]


def test_reversed_depth_puts_deep_layers_on_the_fast_tier() -> None:
    tier_of = assign_tiers(parameters(6), TierConfig(strategy="layer_depth_reversed")).tier_of
    assert [layers_of(tier_of, tier) for tier in range(3)] == [{4, 5}, {2, 3}, {0, 1}]


@given(
    layers=st.sets(st.integers(0, 60), min_size=8, max_size=40),
    n_tiers=st.integers(2, 8),
    strategy=st.sampled_from(["layer_depth", "layer_depth_reversed", "frozen_slow"]),
)
def test_depth_never_splits_a_layer_and_keeps_the_layers_in_order(
    layers: set[int], n_tiers: int, strategy: Any
) -> None:
    config = TierConfig(strategy=strategy, update_every=tuple(range(1, n_tiers + 1)))
    tier_of = assign_tiers(parameters(sorted(layers)), config).tier_of
    held = [layers_of(tier_of, tier) for tier in range(n_tiers)]
    assert sum(len(of) for of in held) == len(layers)
    assert max(map(len, held)) - min(map(len, held)) <= 1
    from_shallow = held if strategy == "layer_depth" else held[::-1]
    assert [layer for of in from_shallow for layer in sorted(of)] == sorted(layers)


def test_frozen_slow_is_reversed_depth_with_a_slowest_tier_that_never_moves() -> None:
    frozen = assign_tiers(parameters(6), TierConfig(strategy="frozen_slow", update_every=(1, 2, 4)))
    assert frozen.tier_of == assign_tiers(parameters(6), TierConfig(strategy="layer_depth_reversed")).tier_of
    assert frozen.update_every == (1, 2, None)


# Importance


def measured(values: dict[tuple[int, str], tuple[float, float]]) -> dict[str, float]:
    """Importances by name, from (layer, module) -> measures of A and of B."""
    return {
        f"layers.{layer}.{module}.lora_{side}": value
        for (layer, module), sides in values.items()
        for side, value in zip("ab", sides, strict=True)
    }


def by_importance(
    described: list[LoraParameter], importance: dict[str, float], n_tiers: int = 3, **options: Any
) -> dict[str, int]:
    config = TierConfig(strategy="parameter_importance", update_every=tuple(range(1, n_tiers + 1)), importance=options)
    return assign_tiers(described, config, importance).tier_of


def test_importance_puts_the_top_third_on_the_fast_tier_a_and_b_of_a_module_together() -> None:
    q, up = MODULES
    importance = measured(
        {(0, q): (0, 3.0), (0, up): (0, 1.0), (1, q): (0, 5.0), (1, up): (0, 2.0), (2, q): (0, 4.0), (2, up): (0, 6.0)}
    )
    tier_of = by_importance(parameters(3), importance)
    ranked = [(2, up), (1, q), (2, q), (0, q), (1, up), (0, up)]
    for tier in range(3):
        assert on_tier(tier_of, tier) == {
            f"layers.{layer}.{module}.lora_{side}" for layer, module in ranked[2 * tier : 2 * tier + 2] for side in "ab"
        }


def test_a_module_is_ranked_by_the_sum_of_both_its_matrices() -> None:
    q, up = MODULES
    tier_of = by_importance(parameters(1), measured({(0, q): (0.0, 3.0), (0, up): (2.0, 2.0)}), n_tiers=2)
    assert [modules_of(tier_of, tier) for tier in (0, 1)] == [{up}, {q}]


def test_a_layer_is_ranked_by_the_mean_over_its_modules_however_many_it_has() -> None:
    q, up = MODULES
    described = parameters(1) + parameters([1], modules=[q])
    importance = measured({(0, q): (0, 3.0), (0, up): (0, 3.0), (1, q): (0, 4.0)})
    tier_of = by_importance(described, importance, n_tiers=2, aggregate="layer")
    assert [layers_of(tier_of, tier) for tier in (0, 1)] == [{1}, {0}]


def test_single_matrices_may_be_ranked_so_that_a_and_b_part() -> None:
    q, up = MODULES
    importance = measured({(0, q): (0.0, 3.0), (0, up): (1.0, 2.0)})
    tier_of = by_importance(parameters(1), importance, n_tiers=2, aggregate="parameter")
    assert on_tier(tier_of, 0) == {f"layers.0.{q}.lora_b", f"layers.0.{up}.lora_b"}


@pytest.mark.parametrize("aggregate", ["parameter", "module", "layer"])
def test_reversed_importance_makes_the_most_important_slow(aggregate: str) -> None:
    described = parameters(6)
    values = random.Random(0).sample(range(1, 1000), len(described))
    importance = {p.name: float(value) for p, value in zip(described, values, strict=True)}
    tier_of = by_importance(described, importance, aggregate=aggregate)
    mirrored = by_importance(described, importance, aggregate=aggregate, reversed=True)
    assert mirrored == {name: 2 - tier for name, tier in tier_of.items()}


@pytest.mark.parametrize("order", [False, True], ids=["", "reversed"])
@pytest.mark.parametrize("aggregate", ["parameter", "module", "layer"])
def test_equally_important_ones_are_in_the_order_of_the_model(aggregate: str, order: bool) -> None:
    described = parameters(6)
    tier_of = by_importance(described, {p.name: 1.0 for p in described}, aggregate=aggregate, reversed=order)
    assert [tier_of[p.name] for p in described] == [0] * 8 + [1] * 8 + [2] * 8


def test_importance_that_was_not_measured_is_asked_for() -> None:
    with pytest.raises(ConfigError, match=r"parameter_importance needs gradients .*`nestune tiers`"):
        assign_tiers(parameters(3), TierConfig(strategy="parameter_importance"))


# Module types


def module_type(n_tiers: int, modules: tuple[str, ...] = ATTENTION + MLP) -> list[set[str]]:
    config = TierConfig(strategy="module_type", update_every=tuple(range(1, n_tiers + 1)))
    tier_of = assign_tiers(parameters(2, modules), config).tier_of
    return [modules_of(tier_of, tier) for tier in range(n_tiers)]


def test_module_type_with_two_tiers_makes_attention_fast_and_mlp_slow() -> None:
    assert module_type(2) == [set(ATTENTION), set(MLP)]
    assert module_type(2, (ATTENTION[0], *MLP)) == [{ATTENTION[0]}, set(MLP)]


def test_module_type_with_more_tiers_divides_the_kinds_of_modules_in_the_order_of_the_model() -> None:
    kinds = ATTENTION + MLP
    assert module_type(3) == [set(kinds[:3]), set(kinds[3:5]), set(kinds[5:])]
    assert module_type(7) == [{kind} for kind in kinds]


def test_module_type_with_more_tiers_than_kinds_is_refused() -> None:
    with pytest.raises(ConfigError, match="3 periods, but the adapter has only 2 kinds of modules"):
        module_type(3, MODULES)


# Stacked ranks


def test_stacked_divides_the_ranks_of_every_matrix() -> None:
    tier_of = assign_tiers(parameters(2), TierConfig(strategy="stacked", update_every=(1, 2, 4))).tier_of
    assert tier_of == {
        f"layers.{layer}.{module}.lora_{side}{ranks}": tier
        for layer in (0, 1)
        for module in MODULES
        for side in "ab"
        for tier, ranks in enumerate(["[0:3]", "[3:6]", "[6:8]"])
    }


def test_stacked_with_more_tiers_than_ranks_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"3 periods, but the adapter has only 2 ranks.* Use fewer tiers"):
        assign_tiers(parameters(6, rank=2), TierConfig(strategy="stacked"))


# Random


def test_random_is_decided_by_its_seed_whatever_the_order_of_the_parameters() -> None:
    described = parameters(6)
    first, again, other = (
        assign_tiers(order, TierConfig(strategy="random", seed=seed)).tier_of
        for order, seed in ((described, 3), (described[::-1], 3), (described, 4))
    )
    assert first == again
    assert first != other


def test_random_keeps_a_and_b_of_a_module_together_and_tiers_of_one_size() -> None:
    tier_of = assign_tiers(parameters(6), TierConfig(strategy="random")).tier_of
    assert [len(on_tier(tier_of, tier)) for tier in range(3)] == [8, 8, 8]
    assert all(tier_of[name] == tier_of[name[:-1] + "b"] for name in tier_of if name.endswith("lora_a"))


# Manual patterns


def manual(assignments: dict[str, int]) -> TierConfig:
    return TierConfig(strategy="manual", update_every=(1, 4), assignments=assignments)


def test_manual_takes_the_first_pattern_that_matches_whatever_the_case() -> None:
    tier_of = assign_tiers(parameters(2), manual({"LAYERS.0.*.q_proj.*": 0, "layers.*": 1})).tier_of
    assert on_tier(tier_of, 0) == {"layers.0.self_attn.q_proj.lora_a", "layers.0.self_attn.q_proj.lora_b"}


def test_an_unmapped_parameter_goes_to_the_slowest_tier_with_a_warning() -> None:
    tier_map = assign_tiers(parameters(2), manual({"layers.0.*": 0}))
    assert layers_of(tier_map.tier_of, 1) == {1}
    assert "4 parameters on no tier go to the slowest, 1" in tier_map.warnings[0]


def test_a_pattern_that_matches_nothing_is_refused_with_what_names_look_like() -> None:
    expected = (
        r"'layers\.9\.\*' matches no LoRA parameter\. Names look like layers\.0\.self_attn\.q_proj\.lora_a \.\.\. "
        r"layers\.1\.mlp\.up_proj\.lora_b.*mend these patterns"
    )
    with pytest.raises(ConfigError, match=expected):
        assign_tiers(parameters(2), manual({"layers.9.*": 0, "layers.*": 1}))


def test_every_pattern_that_decides_nothing_is_told_and_no_other() -> None:
    with pytest.raises(ConfigError) as caught:
        assign_tiers(parameters(2), manual({"*.q_proj.*": 0, "layers.*": 1, "layers.1.*": 0, "x*": 0, "*.v_proj.*": 1}))
    message = str(caught.value)
    assert "'layers.1.*' matches only what earlier patterns have taken, such as layers.1.self_attn" in message
    assert "'x*' matches no LoRA parameter" in message
    assert "'*.v_proj.*' matches no LoRA parameter" in message
    assert "'*.q_proj.*'" not in message
    assert "'layers.*'" not in message


def test_an_empty_tier_is_refused() -> None:
    with pytest.raises(ConfigError, match="no parameter is on tier 0 of 2"):
        assign_tiers(parameters(2), manual({"layers.*": 1}))


# All of them


@st.composite
def assignments(draw: st.DrawFn) -> tuple[list[LoraParameter], TierConfig, dict[str, float], int]:
    """Matrices, a configuration, importances, and how many parts the strategy has to divide among the tiers."""
    strategy: Any = draw(st.sampled_from(sorted(STRATEGIES)))
    n_tiers = draw(st.integers(2 if strategy == "frozen_slow" else 1, 8))
    layers = sorted(draw(st.sets(st.integers(0, 40), min_size=1, max_size=10)))
    modules = draw(st.lists(st.sampled_from(ATTENTION + MLP), min_size=1, max_size=7, unique=True))
    rank = draw(st.integers(1, 12))
    described = parameters(layers, modules, rank)
    options: dict[str, Any] = {}
    if strategy == "manual":
        options["assignments"] = {f"layers.{layer}.*": draw(st.integers(0, n_tiers - 1)) for layer in layers}
    if strategy == "random":
        options["seed"] = draw(st.integers(0, 1000))
    if strategy == "parameter_importance":
        options["importance"] = {
            "aggregate": draw(st.sampled_from(["parameter", "module", "layer"])),
            "reversed": draw(st.booleans()),
        }
    parts = {
        "stacked": rank,
        "random": len(layers) * len(modules),
        "module_type": len(modules),
        "manual": len(set(options.get("assignments", {}).values())),
        "parameter_importance": {"parameter": len(described), "module": len(layers) * len(modules)}.get(
            options.get("importance", {}).get("aggregate"), len(layers)
        ),
    }.get(strategy, len(layers))
    importance = {p.name: draw(st.floats(0, 1)) for p in described} if strategy == "parameter_importance" else {}
    config = TierConfig(strategy=strategy, update_every=tuple(range(1, n_tiers + 1)), **options)
    return described, config, importance, parts


@given(assignments())
def test_every_rank_of_every_matrix_is_on_exactly_one_tier_and_no_tier_is_empty(
    case: tuple[list[LoraParameter], TierConfig, dict[str, float], int],
) -> None:
    described, config, importance, parts = case
    n_tiers = len(config.update_every)
    if parts < n_tiers:
        with pytest.raises(ConfigError, match=r"Use fewer tiers|take its period out"):
            assign_tiers(described, config, importance)
        return
    tier_of = assign_tiers(described, config, importance).tier_of
    assert times_named(tier_of, described) == {1}
    assert set(tier_of.values()) == set(range(n_tiers))
