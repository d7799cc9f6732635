"""The description of a run: defaults, overrides, and every fault at once with its remedy."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from nestune.config import RunConfig, TierConfig, dump_config, load_config, parse_config
from nestune.errors import ConfigError


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A minimal configuration in a file, naming data that exists."""
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    content = {"name": "r", "model": {"base": "org/base"}, "data": {"train": str(tmp_path / "train.jsonl")}}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def faults_of(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value).splitlines()[1:]


def test_defaults_are_those_of_the_lora_that_system_a_used(written: Path) -> None:
    config = load_config(written)
    assert (config.lora.rank, config.lora.alpha, config.lora.dropout) == (8, 16, 0)
    assert config.tiers.update_every == (1, 2, 4)


def test_override_wins_over_the_file_and_is_read_as_yaml(written: Path) -> None:
    config = load_config(written, ["training.steps=20", "tiers.update_every=[1, 8, 64]", "gate.max_drop=0.1"], "other")
    assert (config.training.steps, config.tiers.update_every, config.gate.max_drop) == (20, (1, 8, 64), 0.1)
    assert config.name == "other"


def test_all_faults_of_a_file_are_told_at_once_with_a_remedy(written: Path) -> None:
    faults = faults_of(
        written,
        "tiers.update_every=[4, 2]",
        "training.step=3",
        "data.train=missing.jsonl",
        "lora.rank=many",
        "tiers.lr_scale=[1, 2, 3]",
    )
    text = "\n".join(faults)
    assert "tiers.update_every: periods must ascend, tier 0 being the fastest; write [2, 4]" in text
    assert "training.step: unknown key; did you mean steps?" in text
    assert "data.train.0: there is no file or folder missing.jsonl" in text
    assert "lora.rank" in text
    assert "seen: 'many'" in text


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("tiers.lr_scale=[1, 2]", "2 factors for 3 tiers"),
        ("tiers.assignments={'*': 5}", "remove them, or set tiers.strategy to manual"),
        ("tiers.strategy=manual", "strategy manual needs patterns"),
        ("tiers.strategy=deep", "'layer_depth'"),
        ("data.valid=1.5", "lies between 0 and 1"),
        ("training.eval_every=0", "greater than 0"),
        ("training.learning_rate=.nan", "finite number"),
        ("name=../escape", "string should match pattern"),
        ("data.retention={'../x': a}", "string should match pattern"),
        ("data.retention.train=TRAIN", "is taken by the run"),
        ("model.base=./nowhere", "there is no file or folder ./nowhere"),
    ],
)
def test_a_fault_names_what_is_allowed(written: Path, override: str, expected: str) -> None:
    override = override.replace("TRAIN", str(written.parent / "train.jsonl"))
    assert any(expected in fault for fault in faults_of(written, override)), faults_of(written, override)


def test_manual_tier_out_of_range_is_refused(written: Path) -> None:
    faults = faults_of(written, "tiers.strategy=manual", "tiers.assignments={'*': 3}")
    assert any("with 3 tiers use 0 to 2" in fault for fault in faults)


def test_early_stopping_without_validation_is_refused(written: Path) -> None:
    faults = faults_of(written, "training.eval_every=null", "training.early_stopping={}")
    assert any("set training.eval_every" in fault for fault in faults)


@pytest.mark.parametrize("override", ["training", "=3", "training..steps=3"])
def test_an_override_that_is_no_assignment_is_refused(written: Path, override: str) -> None:
    with pytest.raises(ConfigError, match=r"--set"):
        load_config(written, [override])


@pytest.mark.parametrize("content", ["- a\n- b\n", "name: [", "\xff"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        load_config(path)


def test_the_resolved_configuration_loads_back_equal(written: Path) -> None:
    config = load_config(written, ["training.early_stopping={patience: 2}", "tiers.lr_scale=inverse_period"])
    assert parse_config(yaml.safe_load(dump_config(config))) == config


def test_every_field_tells_what_it_means() -> None:
    def undescribed(schema: dict[str, Any]) -> list[str]:
        blocks = {"RunConfig": schema, **schema["$defs"]}
        return [
            f"{block}.{name}"
            for block, content in blocks.items()
            for name, field in content["properties"].items()
            if "description" not in field and "$ref" not in str(field)
        ]

    assert undescribed(RunConfig.model_json_schema()) == []


@given(st.lists(st.integers(1, 64), min_size=1, max_size=8))
def test_periods_are_accepted_exactly_when_they_ascend(periods: list[int]) -> None:
    if periods == sorted(periods):
        assert TierConfig(update_every=tuple(periods)).lr_scales == (1.0,) * len(periods)
    else:
        with pytest.raises(ValueError, match="ascend"):
            TierConfig(update_every=tuple(periods))


def test_inverse_period_scales_by_one_over_the_period() -> None:
    assert TierConfig(update_every=(1, 8, 16), lr_scale="inverse_period").lr_scales == (1, 1 / 8, 1 / 16)
