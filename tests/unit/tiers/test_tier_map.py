"""The tier map: what a sound one is, and its file."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from lora_matrices import parameters

from nestune.config import TierConfig
from nestune.errors import RunError
from nestune.tiers.parameters import LoraParameter
from nestune.tiers.tier_map import (
    TierMap,
    assign_tiers,
    find_fault,
    read_fitting_tier_map,
    read_tier_map,
    write_tier_map,
)

A = "layers.0.self_attn.q_proj.lora_a"
STACKED = TierConfig(strategy="stacked")


def test_the_hash_tells_periods_and_assignment_but_not_how_they_were_found() -> None:
    tier_map = TierMap("manual", (1, 2), {"a": 0, "b": 1})
    assert TierMap("random", (1, 2), {"b": 1, "a": 0}, ("a warning",), {"seed": 3}).sha256 == tier_map.sha256
    assert TierMap("manual", (1, 4), {"a": 0, "b": 1}).sha256 != tier_map.sha256
    assert TierMap("manual", (1, 2), {"a": 1, "b": 0}).sha256 != tier_map.sha256
    assert TierMap("manual", (1, None), {"a": 0, "b": 1}).sha256 != tier_map.sha256


def test_a_map_names_the_matrices_in_the_order_of_the_model() -> None:
    described = parameters(6)
    for config in (TierConfig(strategy="random"), STACKED):
        matrices = [name.partition("[")[0] for name in assign_tiers(described, config).tier_of]
        assert list(dict.fromkeys(matrices)) == [p.name for p in described]


def test_a_sound_map_has_no_fault() -> None:
    for config in (TierConfig(), STACKED):
        assert find_fault(assign_tiers(parameters(3), config).tier_of, parameters(3)) is None


@pytest.mark.parametrize(
    ("config", "removed", "added", "expected"),
    [
        (TierConfig(), [A], [], f"{A} is on no tier"),
        (TierConfig(), [], ["layers.9.mlp.up_proj.lora_a"], "layers.9.mlp.up_proj.lora_a is no parameter"),
        (TierConfig(), [], [f"{A}[0:1]"], f"{A} has ranks [0, 0, 1, 2, 3, 4, 5, 6, 7]"),
        (STACKED, [f"{A}[0:3]", f"{A}[3:6]", f"{A}[6:8]"], [], f"{A} is on no tier"),
        (STACKED, [f"{A}[3:6]"], [], f"{A} has ranks [0, 1, 2, 6, 7] on tiers, not each of 0 to 7 once"),
        (STACKED, [f"{A}[3:6]"], [f"{A}[2:6]"], f"{A} has ranks [0, 1, 2, 2, 3, 4, 5, 6, 7]"),
        (STACKED, [f"{A}[3:6]"], [f"{A}[2:5]"], f"{A} has ranks [0, 1, 2, 2, 3, 4, 6, 7]"),
        (STACKED, [f"{A}[6:8]"], [f"{A}[6:9]"], f"{A} has ranks [0, 1, 2, 3, 4, 5, 6, 7, 8]"),
        (STACKED, [f"{A}[6:8]"], [f"{A}[6:6]"], f"{A} has ranks [0, 1, 2, 3, 4, 5]"),
    ],
)
def test_a_damaged_map_is_found_out(config: TierConfig, removed: list[str], added: list[str], expected: str) -> None:
    tier_of = assign_tiers(parameters(3), config).tier_of
    assert set(removed) <= set(tier_of)
    damaged = {name: tier for name, tier in tier_of.items() if name not in removed} | dict.fromkeys(added, 0)
    fault = find_fault(damaged, parameters(3))
    assert fault is not None
    assert fault.startswith(expected)


@pytest.mark.parametrize(
    "config", [TierConfig(), STACKED, TierConfig(strategy="frozen_slow")], ids=lambda c: c.strategy
)
def test_a_map_read_back_is_the_map_written(tmp_path: Path, config: TierConfig) -> None:
    tier_map = assign_tiers(parameters(6), config)
    write_tier_map(tier_map, tmp_path / "tiers.json")
    assert read_tier_map(tmp_path / "tiers.json") == tier_map
    assert read_fitting_tier_map(tmp_path / "tiers.json", parameters(6), config) == tier_map


@pytest.mark.parametrize(
    ("changed", "config", "expected"),
    [
        (parameters(6), TierConfig(update_every=(1, 2, 8)), r"periods \[1, 1, 1\]; the configuration says .*1, 2, 8"),
        (parameters(6), TierConfig(strategy="layer_depth"), "the configuration says layer_depth"),
        (parameters(6), TierConfig(strategy="frozen_slow"), r"the configuration says frozen_slow and \[1, 1, None\]"),
        (parameters(7), TierConfig(), r"is for other parameters: layers\.6\.self_attn\.q_proj\.lora_a is on no tier"),
        (parameters(5), TierConfig(), r"for other parameters: layers\.5\.self_attn\.q_proj\.lora_a is no parameter"),
    ],
)
def test_a_map_made_for_something_else_is_refused(
    tmp_path: Path, changed: Sequence[LoraParameter], config: TierConfig, expected: str
) -> None:
    write_tier_map(assign_tiers(parameters(6), TierConfig()), tmp_path / "tiers.json")
    with pytest.raises(RunError, match=f"{expected}.*Run nestune tiers again"):
        read_fitting_tier_map(tmp_path / "tiers.json", changed, config)


def test_a_stacked_map_of_another_rank_is_refused(tmp_path: Path) -> None:
    write_tier_map(assign_tiers(parameters(6), STACKED), tmp_path / "tiers.json")
    with pytest.raises(
        RunError, match=r"for other parameters: .*ranks \[0, .*, 7\] on tiers, not each of 0 to 15 once"
    ):
        read_fitting_tier_map(tmp_path / "tiers.json", parameters(6, rank=16), STACKED)


def test_a_map_made_from_something_else_is_refused_with_what_differs(tmp_path: Path) -> None:
    made = assign_tiers(parameters(6), TierConfig())
    path = tmp_path / "tiers.json"
    write_tier_map(TierMap(made.strategy, made.update_every, made.tier_of, made_from={"data": "x", "seed": 1}), path)
    assert read_fitting_tier_map(path, parameters(6), TierConfig(), {"seed": 1, "data": "x"}).tier_of == made.tier_of
    with pytest.raises(RunError, match=r"made from something else \(data differs\)"):
        read_fitting_tier_map(path, parameters(6), TierConfig(), {"seed": 1, "data": "y"})
    with pytest.raises(RunError, match=r"made from something else \(data, seed differ\)"):
        read_fitting_tier_map(path, parameters(6), TierConfig())


def test_a_map_changed_by_hand_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tiers.json"
    write_tier_map(assign_tiers(parameters(6), TierConfig()), path)
    path.write_text(path.read_text().replace('q_proj.lora_a": 2', 'q_proj.lora_a": 0', 1))
    with pytest.raises(RunError, match=r"changed by hand.*strategy manual"):
        read_tier_map(path)


def test_a_map_with_a_tier_that_has_no_period_is_refused(tmp_path: Path) -> None:
    write_tier_map(TierMap("manual", (1, 2), {A: 2}), tmp_path / "tiers.json")
    with pytest.raises(RunError, match="names a tier outside 0 to 1"):
        read_tier_map(tmp_path / "tiers.json")


def without(key: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda content: {name: value for name, value in content.items() if name != key}


@pytest.mark.parametrize(
    "damage",
    [
        without("tiers"),
        without("update_every"),
        without("sha256"),
        lambda c: c | {"tiers": {A: "fast"}},
        lambda c: c | {"tiers": 3},
    ],
    ids=["no tiers", "no periods", "no hash", "a tier in words", "tiers that are a number"],
)
def test_a_file_that_is_no_map_is_refused(tmp_path: Path, damage: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    path = tmp_path / "tiers.json"
    write_tier_map(assign_tiers(parameters(6), TierConfig()), path)
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    with pytest.raises(RunError, match=r"is not a tier map|was changed by hand"):
        read_tier_map(path)


def test_a_missing_map_tells_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="Run nestune tiers"):
        read_tier_map(tmp_path / "tiers.json")
