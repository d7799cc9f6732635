"""Which tiers are due when, and which parameters they hold."""

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nestune.config import TierConfig
from nestune.errors import ConfigError, RunError
from nestune.tiers.parameters import LoraParameter, parse_parameter
from nestune.tiers.schedule import TierSchedule
from nestune.tiers.strategies import STRATEGIES
from nestune.tiers.tier_map import assign_tiers, read_tier_map, write_tier_map

MODULES = ("self_attn.q_proj", "mlp.up_proj")


def parameters(n_layers: int) -> list[LoraParameter]:
    return [
        LoraParameter(layer, module, side, (8, 8)) for layer in range(n_layers) for module in MODULES for side in "ab"
    ]


def layers_of(tier_of: dict[str, int], tier: int) -> set[int]:
    return {int(name.split(".")[1]) for name, of in tier_of.items() if of == tier}


def test_tier_with_period_4_is_due_at_steps_4_8_12() -> None:
    schedule = TierSchedule((1, 2, 4))
    assert [step for step in range(1, 13) if 2 in schedule.due(step)] == [4, 8, 12]
    assert [sorted(schedule.due(step)) for step in (1, 2, 3, 4)] == [[0], [0, 1], [0], [0, 1, 2]]


@pytest.mark.parametrize(
    ("steps", "counts"),
    [(16, (16, 8, 4)), (17, (17, 8, 4)), (18, (18, 9, 4)), (20, (20, 10, 5)), (10, (10, 5, 2))],
)
def test_update_counts_are_those_of_the_published_run(steps: int, counts: tuple[int, ...]) -> None:
    assert TierSchedule((1, 2, 4)).update_counts(steps) == counts


def test_step_0_does_not_exist() -> None:
    with pytest.raises(ValueError, match="counted from 1"):
        TierSchedule((1,)).due(0)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=8), st.integers(1, 300))
def test_counts_are_the_sum_of_the_steps_at_which_a_tier_is_due(periods: list[int], steps: int) -> None:
    schedule = TierSchedule(tuple(sorted(periods)))
    due = [schedule.due(step) for step in range(1, steps + 1)]
    assert schedule.update_counts(steps) == tuple(sum(k in d for d in due) for k in range(len(periods)))


def test_layer_depth_puts_shallow_layers_on_the_fast_tier() -> None:
    tier_of = assign_tiers(parameters(6), TierConfig(strategy="layer_depth")).tier_of
    assert [layers_of(tier_of, tier) for tier in range(3)] == [{0, 1}, {2, 3}, {4, 5}]


def test_reversed_depth_puts_deep_layers_on_the_fast_tier() -> None:
    tier_of = assign_tiers(parameters(6), TierConfig(strategy="layer_depth_reversed")).tier_of
    assert [layers_of(tier_of, tier) for tier in range(3)] == [{4, 5}, {2, 3}, {0, 1}]


@given(
    n_layers=st.integers(1, 40),
    n_tiers=st.integers(1, 8),
    strategy=st.sampled_from(["layer_depth", "layer_depth_reversed"]),
)
def test_depth_never_splits_a_layer_and_never_leaves_a_tier_empty(n_layers: int, n_tiers: int, strategy: str) -> None:
    config = TierConfig(strategy=strategy, update_every=tuple(range(1, n_tiers + 1)))  # type: ignore[arg-type]
    if n_layers < n_tiers:
        with pytest.raises(ConfigError, match="Use fewer tiers"):
            assign_tiers(parameters(n_layers), config)
        return
    tier_of = assign_tiers(parameters(n_layers), config).tier_of
    held = [layers_of(tier_of, tier) for tier in range(n_tiers)]
    assert sum(len(layers) for layers in held) == n_layers
    assert set().union(*held) == set(range(n_layers))
    assert max(map(len, held)) - min(map(len, held)) <= 1


def manual(assignments: dict[str, int]) -> TierConfig:
    return TierConfig(strategy="manual", update_every=(1, 4), assignments=assignments)


def test_manual_takes_the_first_pattern_that_matches_whatever_the_case() -> None:
    tier_of = assign_tiers(parameters(2), manual({"LAYERS.0.*.q_proj.*": 0, "layers.*": 1})).tier_of
    assert {name for name, tier in tier_of.items() if tier == 0} == {
        "layers.0.self_attn.q_proj.lora_a",
        "layers.0.self_attn.q_proj.lora_b",
    }


def test_an_unmapped_parameter_goes_to_the_slowest_tier_with_a_warning() -> None:
    tier_map = assign_tiers(parameters(2), manual({"layers.0.*": 0}))
    assert layers_of(tier_map.tier_of, 1) == {1}
    assert "4 parameters on no tier go to the slowest, 1" in tier_map.warnings[0]


def test_a_pattern_that_matches_nothing_is_refused_with_what_names_look_like() -> None:
    with pytest.raises(ConfigError, match=r"'layers\.9\.\*' match no .*layers\.0\.self_attn\.q_proj\.lora_a"):
        assign_tiers(parameters(2), manual({"layers.9.*": 0, "layers.*": 1}))


def test_an_empty_tier_is_refused() -> None:
    with pytest.raises(ConfigError, match="no parameter is on tier 0 of 2"):
        assign_tiers(parameters(2), manual({"layers.*": 1}))


def test_every_strategy_that_a_configuration_accepts_can_run() -> None:
    accepted = get_args(TierConfig.model_fields["strategy"].annotation)
    assert set(accepted) == set(STRATEGIES)


def test_a_map_read_back_is_the_map_written(tmp_path: Path) -> None:
    tier_map = assign_tiers(parameters(6), TierConfig())
    write_tier_map(tier_map, tmp_path / "tiers.json")
    assert read_tier_map(tmp_path / "tiers.json", parameters(6), TierConfig()) == tier_map


@pytest.mark.parametrize(
    ("changed", "config", "expected"),
    [
        (parameters(6), TierConfig(update_every=(1, 2, 8)), "the configuration says"),
        (parameters(6), TierConfig(strategy="layer_depth"), "the configuration says"),
        (parameters(7), TierConfig(), "is for other parameters: 4 differ"),
    ],
)
def test_a_map_made_for_something_else_is_refused(
    tmp_path: Path, changed: Sequence[LoraParameter], config: TierConfig, expected: str
) -> None:
    write_tier_map(assign_tiers(parameters(6), TierConfig()), tmp_path / "tiers.json")
    with pytest.raises(RunError, match=expected):
        read_tier_map(tmp_path / "tiers.json", changed, config)


def test_a_map_changed_by_hand_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tiers.json"
    write_tier_map(assign_tiers(parameters(6), TierConfig()), path)
    path.write_text(path.read_text().replace('q_proj.lora_a": 2', 'q_proj.lora_a": 0', 1))
    with pytest.raises(RunError, match=r"changed by hand.*strategy manual"):
        read_tier_map(path, parameters(6), TierConfig())


def test_a_missing_map_tells_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="Run nestune tiers"):
        read_tier_map(tmp_path / "tiers.json", parameters(6), TierConfig())


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.model.layers.3.self_attn.q_proj.lora_A.default.weight",
        "model.layers.3.self_attn.q_proj.lora_a",
        "layers.3.self_attn.q_proj.LORA_A.weight",
        "layers.3.self_attn.q_proj.Adapter_a",
    ],
)
def test_names_of_every_framework_become_the_canonical_one(name: str) -> None:
    found = parse_parameter(name, (8, 96))
    assert found is not None
    assert found.name == "layers.3.self_attn.q_proj.lora_a"


@pytest.mark.parametrize("name", ["model.layers.3.self_attn.q_proj.weight", "lm_head.lora_A.weight"])
def test_what_is_no_lora_matrix_of_a_layer_has_no_canonical_name(name: str) -> None:
    assert parse_parameter(name, (8, 96)) is None
