"""The description of a run: defaults, overrides, and every fault at once with its remedy."""

from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from nestune.config import (
    RetentionConfig,
    RunConfig,
    TierConfig,
    change_recipe,
    dump_config,
    load_config,
    parse_config,
)
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
    assert config.tiers.update_every == (1, 1, 1)


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
        ("tiers.assignments={'*': 5}", "remove it, or set tiers.strategy to manual"),
        ("tiers.strategy=manual", "strategy manual needs patterns"),
        ("tiers.strategy=deep", "'layer_depth'"),
        ("data.valid=1.5", "data.valid: must be a fraction of train between 0 and 1, e.g. 0.1, or files (seen: 1.5)"),
        ("training.eval_every=0", "training.eval_every: must be a number above 0 (seen: 0)"),
        ("training.learning_rate=.nan", "finite number"),
        ("name=../escape", "name: must be letters, digits, '.', '_' and '-'"),
        ("data.retention={'../x': a}", "data.retention.../x: must be letters, digits"),
        ("data.retention.train=TRAIN", "train is taken by the run; use another name (seen: 'train')"),
        (
            "model=org/base",
            "model: must be a block of keys: adapter, backend, base, dtype, revision (seen: 'org/base')",
        ),
        ("training.early_stopping=5", "training.early_stopping: must be a block of keys: min_delta, patience"),
        ("data.retention=[a]", "data.retention: must be a block of keys"),
        ("tiers.lr_scale=fast", "tiers.lr_scale: must be 'equal' or 'inverse_period', or a list (seen: 'fast')"),
        ("tiers.update_every=[]", "tiers.update_every: must be a list, at least 1 long"),
        ("data.on_invalid=skip", "must be 'fail' or 'quarantine' (seen: 'skip')"),
        ("model.base=./nowhere", "there is no file or folder ./nowhere"),
    ],
)
def test_a_fault_names_what_is_allowed(written: Path, override: str, expected: str) -> None:
    override = override.replace("TRAIN", str(written.parent / "train.jsonl"))
    assert any(expected in fault for fault in faults_of(written, override)), faults_of(written, override)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.valid=no.jsonl", "data.valid.0: there is no file"),
        ("data.valid={}", "data.valid: must be a fraction"),
        ("data.valid=true", "data.valid: must be a fraction"),
        ("data.valid='2'", "data.valid: must be a fraction"),
        ("data.train=no.jsonl", "data.train.0: there is no file"),
        ("data.retention={a-b.c: no.jsonl}", "data.retention.a-b.c.0: there is no file"),
        ("lora.targets=3", "lora.targets: must be 'all-linear', or a list"),
        ("lora.targets=[3]", "lora.targets.0: must be text"),
        ("lora.targets=[]", "lora.targets: must name at least one module"),
        ("tiers.lr_scale=[1, fast, 1]", "tiers.lr_scale.1: must be a number"),
        ("tiers.lr_scale=[0, 1, 1]", "tiers.lr_scale.0: must be a number above 0"),
    ],
)
def test_one_wrong_value_is_one_fault_at_a_place_the_file_has(written: Path, override: str, expected: str) -> None:
    (fault,) = faults_of(written, override)
    assert fault.strip().startswith(expected)


def test_a_wrong_name_and_a_missing_file_of_a_retention_set_are_both_told(written: Path) -> None:
    places = [fault.split(": ")[0].strip() for fault in faults_of(written, "data.retention={a b: no.jsonl}")]
    assert places == ["data.retention.a b", "data.retention.a b.0"]


@pytest.mark.parametrize("key", ["training.steps", "training.seed", "lora.rank", "tiers.update_every"])
@pytest.mark.parametrize("value", ["true", "'20'", "2.5"])
def test_a_count_is_a_whole_number_and_neither_text_nor_a_truth_value(written: Path, key: str, value: str) -> None:
    (fault,) = faults_of(written, f"{key}=[{value}, 2]" if key == "tiers.update_every" else f"{key}={value}")
    assert f"{key}.0: must be a whole number" in fault or f"{key}: must be a whole number" in fault


@pytest.mark.parametrize("key", ["training.learning_rate", "lora.dropout", "gate.min_gain", "training.max_grad_norm"])
def test_a_number_is_no_truth_value(written: Path, key: str) -> None:
    assert faults_of(written, f"{key}=true") == [f"  {key}: must be a number (seen: True)."]


def test_a_number_may_have_an_exponent_without_a_point(written: Path) -> None:
    config = load_config(written, ["training.learning_rate=1e-3", "lora.dropout=1e-2", "data.valid=2e-1"])
    assert (config.training.learning_rate, config.lora.dropout, config.data.valid) == (1e-3, 1e-2, 0.2)


def test_a_form_made_from_the_schema_asks_for_numbers() -> None:
    blocks = RunConfig.model_json_schema()["$defs"]
    fields = blocks["TrainingConfig"]["properties"]
    assert (fields["steps"]["type"], fields["learning_rate"]["type"]) == ("integer", "number")
    assert fields["steps"]["exclusiveMinimum"] == 0
    assert "default" not in blocks["RegistryConfig"]["properties"]["registered_model"]


def test_a_key_given_twice_is_refused_with_its_line(written: Path) -> None:
    written.write_text("name: r\ntraining:\n  steps: 3\n  seed: 1\n  steps: 4\n")
    with pytest.raises(ConfigError, match=r"run\.yaml cannot be read.* key steps is given twice(.|\n)*line 5"):
        load_config(written)
    written.write_text("name: r\n")
    with pytest.raises(ConfigError, match=r"--set training: .* key steps is given twice"):
        load_config(written, ["training={steps: 3, steps: 4}"])


def test_a_key_may_replace_that_of_a_merged_mapping(written: Path) -> None:
    content = written.read_text()
    written.write_text(content + "training: {<<: &a {steps: 3, seed: 1}, steps: 4}\n")
    config = load_config(written)
    assert (config.training.steps, config.training.seed) == (4, 1)


def test_one_target_needs_no_list(written: Path) -> None:
    assert load_config(written, ["lora.targets=q_proj"]).lora.targets == ("q_proj",)
    assert load_config(written, ["lora.targets=all-linear"]).lora.targets == "all-linear"


@pytest.mark.parametrize("overrides", [[], ["registry.experiment=e"], ["registry.registered_model=null"]])
def test_the_registered_model_has_the_name_of_the_run_unless_given(written: Path, overrides: list[str]) -> None:
    assert load_config(written, overrides).registry.registered_model == "r"
    assert load_config(written, overrides, name="x").registry.registered_model == "x"
    given = [*overrides, "registry.registered_model=given"]
    assert load_config(written, given, name="x").registry.registered_model == "given"


def test_a_wrong_name_of_the_run_is_no_fault_of_the_registry(written: Path) -> None:
    assert len(faults_of(written, "name=../escape")) == 1


def test_a_revision_of_a_folder_is_refused(written: Path) -> None:
    folder = written.parent
    (fault,) = faults_of(written, f"model.base={folder}", "model.revision=main")
    assert "model.revision: " in fault
    assert "remove model.revision" in fault
    assert load_config(written, ["model.revision=main"]).model.revision == "main"


def test_manual_tier_out_of_range_is_refused(written: Path) -> None:
    faults = faults_of(written, "tiers.strategy=manual", "tiers.assignments={'*': 3}")
    assert any("with 3 tiers use 0 to 2 (seen: {'*': 3})" in fault for fault in faults)


@pytest.mark.parametrize(
    ("option", "value", "reader"),
    [
        ("assignments", "{'*': 0}", "manual"),
        ("importance.steps", "50", "parameter_importance"),
        ("importance.reversed", "true", "parameter_importance"),
        ("seed", "3", "random"),
    ],
)
def test_an_option_that_the_strategy_ignores_is_refused(written: Path, option: str, value: str, reader: str) -> None:
    strategies = get_args(TierConfig.model_fields["strategy"].annotation)
    assert reader in strategies
    for strategy in strategies:
        given = [f"tiers.strategy={strategy}", f"tiers.{option}={value}"]
        if strategy == reader:
            assert load_config(written, given).tiers.strategy == reader
        elif strategy != "manual":  # which needs patterns, and is told so
            (fault,) = faults_of(written, *given)
            remedy = f"strategy {strategy} ignores this; remove it, or set tiers.strategy to {reader}"
            assert fault.strip().startswith(f"tiers.{option.partition('.')[0]}: {remedy}")


def test_every_ignored_option_is_told_at_once(written: Path) -> None:
    faults = faults_of(written, "tiers.strategy=stacked", "tiers.seed=1", "tiers.importance.measure=taylor")
    assert [fault.split(":")[0].strip() for fault in faults] == ["tiers.importance", "tiers.seed"]


def test_an_unknown_strategy_is_the_only_fault_of_its_options(written: Path) -> None:
    (fault,) = faults_of(written, "tiers.strategy=by_luck", "tiers.seed=1")
    assert "'random'" in fault


def test_taylor_importance_needs_a_parent_adapter(written: Path) -> None:
    taylor = ["tiers.strategy=parameter_importance", "tiers.importance.measure=taylor"]
    (fault,) = faults_of(written, *taylor)
    told = "in a new adapter tiers.importance.measure taylor is 0 everywhere; set model.adapter, or measure gradient."
    assert fault.strip() == f"tiers: {told}"
    (fault,) = faults_of(written, *taylor, "model.adapter=models:/r@champion")
    assert "start is fresh, and in a new adapter tiers.importance.measure taylor is 0 everywhere" in fault
    config = load_config(written, [*taylor, "model.adapter=models:/r@champion", "retention.start=continue"])
    assert config.tiers.importance.measure == "taylor"


def test_frozen_slow_needs_a_tier_that_moves(written: Path) -> None:
    (fault,) = faults_of(written, "tiers.strategy=frozen_slow", "tiers.update_every=[1]")
    assert "freezes the slowest of several tiers; give at least two periods" in fault
    tiers = load_config(written, ["tiers.strategy=frozen_slow", "tiers.update_every=[1, 2]"]).tiers
    assert tiers.periods == (1, None)


@pytest.mark.parametrize("strategy", ["layer_depth", "frozen_slow"])
def test_a_training_in_which_no_tier_ever_moves_is_refused(written: Path, strategy: str) -> None:
    tiers = [f"tiers.strategy={strategy}", "tiers.update_every=[4, 8]"]
    (fault,) = faults_of(written, *tiers, "training.steps=3")
    told = "no tier ever moves: the fastest has period 4, and training.steps is 3"
    assert fault.strip() == f"training: {told}; raise training.steps, or lower tiers.update_every."
    assert load_config(written, [*tiers, "training.steps=4"]).training.steps == 4


def test_the_default_number_of_steps_can_be_too_few_for_every_tier(written: Path) -> None:
    (fault,) = faults_of(written, "tiers.update_every=[2000]")
    assert fault.strip().startswith("training: no tier ever moves: the fastest has period 2000")
    assert "seen" not in fault


def test_every_other_strategy_moves_all_its_tiers() -> None:
    for strategy in get_args(TierConfig.model_fields["strategy"].annotation):
        options = {"assignments": {"*": 0}} if strategy == "manual" else {}
        periods = TierConfig(strategy=strategy, update_every=(1, 2, 4), **options).periods
        assert periods == ((1, 2, None) if strategy == "frozen_slow" else (1, 2, 4))


def test_there_are_at_most_eight_tiers(written: Path) -> None:
    assert len(load_config(written, [f"tiers.update_every={[*range(1, 9)]}"]).tiers.update_every) == 8
    (fault,) = faults_of(written, f"tiers.update_every={[*range(1, 10)]}")
    assert "must be a list, at most 8 long" in fault


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


def test_a_form_made_from_the_schema_calls_options_as_yaml_does() -> None:
    schema = RunConfig.model_json_schema()
    for block in (schema, *schema["$defs"].values()):
        titles = {key: field.get("title", key) for key, field in block["properties"].items()}
        assert list(titles) == list(titles.values())
    assert schema["$defs"]["EarlyStopping"]["title"] == "early_stopping"


def test_another_recipe_sets_what_the_former_had_set_and_leaves_what_was_set_by_hand() -> None:
    def block(**given: Any) -> dict[str, Any]:
        return RetentionConfig.model_validate(given).model_dump(mode="json")

    served = block(recipe="no_old_data", l2=0.5)
    form = change_recipe(served | {"recipe": "with_replay"}, served)
    assert RetentionConfig.model_validate(form) == RetentionConfig(recipe="with_replay", l2=0.5)
    by_hand = served | {"recipe": "with_replay", "strength": None}
    assert RetentionConfig.model_validate(change_recipe(by_hand, served)).strength is None
    to_none = change_recipe(served | {"recipe": "none"}, served)
    assert (RetentionConfig.model_validate(to_none).kl, RetentionConfig.model_validate(to_none).strength) == (
        None,
        None,
    )
    from_none = block(recipe="none")
    assert (
        RetentionConfig.model_validate(change_recipe(from_none | {"recipe": "no_old_data"}, from_none)).kl is not None
    )
    # One that was copied from a run with another recipe than was served.
    copied = block(recipe="with_replay") | {"recipe": "no_old_data"}
    assert not RetentionConfig.model_validate(change_recipe(copied, from_none)).replay.is_on
    unchanged = block(recipe="no_old_data", strength=None)
    assert change_recipe(unchanged, unchanged) == unchanged
    assert change_recipe(served, {}) == served


@given(st.lists(st.integers(1, 64), min_size=1, max_size=8))
def test_periods_are_accepted_exactly_when_they_ascend(periods: list[int]) -> None:
    if periods == sorted(periods):
        assert TierConfig(update_every=tuple(periods)).lr_scales == (1.0,) * len(periods)
    else:
        with pytest.raises(ValueError, match="ascend"):
            TierConfig(update_every=tuple(periods))


def test_inverse_period_scales_by_one_over_the_period() -> None:
    assert TierConfig(update_every=(1, 8, 16), lr_scale="inverse_period").lr_scales == (1, 1 / 8, 1 / 16)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["kl={replayed: true}"], "retention.kl: replayed is true, and nothing is replayed"),
        (["kl={self_written: {texts: 0}}"], "retention.kl: there is nothing to hold the model on"),
        (
            ["replay={earlier_tasks: true, rows_per_step: 0.6}", "kl={rows_per_step: 0.5}"],
            "retention.kl: nothing new is left in a step: replay.rows_per_step and kl.rows_per_step are 1.1 of it",
        ),
        (["kl={prompts: {templates: ['Who is {name}?']}}"], "retention.kl.prompts.fillings: the templates have the bl"),
        (
            ["kl={prompts: {fillings: {name: [Ada]}}}"],
            "retention.kl.prompts.fillings: the templates have the b",
        ),
        (["kl={prompts: {templates: ['Who is {}?'], fillings: {'': [a]}}}"], "a blank must be a plain name in braces"),
        (["kl={prompts: {templates: ['{n!z}'], fillings: {n: [a]}}}"], "a blank must be a plain name in braces"),
        (["replay={store: 3}"], "retention.replay.store: nothing is replayed of which rows could be kept"),
        (["start=continue"], "retention: start is continue, and there is no parent to continue"),
        (["kl={every: 2000}"], "training: retention.kl never acts: in 700 steps of 4 rows"),
        (["kl={every: 600, after: 0.7}"], "training: retention.kl never acts: in 300 steps of 4 rows"),
        (["kl={after: 1}"], "retention.kl.after: must be a number below 1"),
        (["replay={earlier_tasks: true, rows_per_step: 0.0001}"], "training: retention.replay never acts"),
        (["kl={prompts: {templates: ['Who is {']}}"], "retention.kl.prompts.fillings: a template cannot be read"),
        (["strength={factors: [0.5, 0.4]}"], "retention.strength.factors: must ascend"),
        (["strength={factors: [1.5]}"], "retention.strength.factors: must ascend, each once, between 0 and 1"),
        (["recipe=some_old_data"], "retention.recipe: must be 'none', 'no_old_data' or 'with_replay'"),
    ],
    ids=str,
)
def test_what_makes_no_sense_of_retention_is_refused(written: Path, overrides: list[str], told: str) -> None:
    faults = faults_of(written, *(f"retention.{override}" for override in overrides))
    assert any(told in fault for fault in faults), faults


def test_a_recipe_sets_what_is_not_set(written: Path) -> None:
    def retention(*overrides: str) -> RetentionConfig:
        return load_config(written, [f"retention.{override}" for override in overrides]).retention

    none, default, replay = retention("recipe=none"), retention(), retention("recipe=with_replay")
    assert (none.kl, none.strength, none.replay.is_on) == (None, None, False)
    assert default == retention("recipe=no_old_data")
    assert default.kl is not None
    assert default.strength is not None
    assert replay.replay.earlier_tasks
    # What is set stays, and the recipe sets what is beside it.
    mixed = retention("recipe=no_old_data", "kl.weight=3.5", "strength=null")
    assert mixed.strength is None
    assert mixed.kl == default.kl.model_copy(update={"weight": 3.5})


def test_a_recipe_reads_back_as_it_was_written_out(written: Path, tmp_path: Path) -> None:
    config = load_config(written, ["retention.recipe=with_replay", "retention.kl.every=3"])
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml") == config
