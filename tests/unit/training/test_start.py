"""Where training begins: which configuration goes on from a checkpoint, replaces it, or may evaluate it."""

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoint_folders import CONFIG, DUMPED, write_checkpoint

from nestune.config import KlConfig, RunConfig
from nestune.errors import ConfigError, RunError
from nestune.files import SEAL, seal, write_json
from nestune.runs import RunPaths
from nestune.training.start import check_trained, has_ended, starting_point

SHAPING = [
    f"{block}.{key}" for block in ("model", "lora", "data", "tiers", "retention", "training") for key in DUMPED[block]
]
# They change no weight, or nothing that training sees.
NO_PART = {
    "data.retention",
    "data.test",
    "lora.max_rank",
    "retention.recipe",
    "retention.strength",
    "training.when_busy",
}
ON_THE_WAY = NO_PART | {
    "model.backend",
    "training.steps",
    "training.eval_every",
    "training.checkpoint_every",
    "training.keep_last",
    "training.gradient_checkpointing",
}


@pytest.fixture
def run(tmp_path: Path) -> RunPaths:
    return RunPaths(tmp_path / "runs" / "contract")


def refused(check: Any, run: RunPaths, config: RunConfig = CONFIG, **options: bool) -> bool:
    try:
        check(config, run, **options)
    except (ConfigError, RunError):
        return True
    return False


def test_without_a_checkpoint_training_begins_and_there_is_nothing_to_resume_or_evaluate(run: RunPaths) -> None:
    assert starting_point(CONFIG, run) is None
    with pytest.raises(
        RunError, match=r"no checkpoint in .* to go on from\. Run nestune train --name contract without"
    ):
        starting_point(CONFIG, run, resume=True)
    with pytest.raises(RunError, match=r"has not been run\. Run nestune train --name contract\."):
        check_trained(CONFIG, run)


@pytest.mark.parametrize("key", SHAPING)
def test_each_setting_that_shapes_training_may_be_another_only_where_that_changes_no_weight(
    run: RunPaths, key: str
) -> None:
    write_checkpoint(run, "final", 8, **{key.replace(".", "__"): 7 if key == "training.steps" else "something else"})
    assert refused(starting_point, run, resume=True) == (key not in ON_THE_WAY)
    assert refused(starting_point, run) == (key not in NO_PART)
    # What one backend has trained another evaluates.
    assert refused(check_trained, run) == (key not in NO_PART | {"model.backend"})


def test_the_same_configuration_goes_on_unasked_until_it_has_ended(run: RunPaths) -> None:
    write_checkpoint(run, "checkpoint_0000004", 4)
    point = starting_point(CONFIG, run)
    assert point is not None
    assert (point.step, has_ended(point, CONFIG)) == (4, False)
    write_checkpoint(run, "final", 8)
    point = starting_point(CONFIG, run)
    assert point is not None
    assert (point.step, has_ended(point, CONFIG)) == (8, True)


def test_force_goes_on_with_an_unfinished_training_of_the_same_configuration_only(run: RunPaths) -> None:
    """A forced training that was killed is started again by the same command, and must get to its end."""
    write_checkpoint(run, "checkpoint_0000004", 4)
    point = starting_point(CONFIG, run, force=True)
    assert point is not None
    assert point.step == 4
    write_checkpoint(run, "checkpoint_0000006", 6, training__seed=3)
    assert starting_point(CONFIG, run, force=True) is None
    write_checkpoint(run, "final", 8)
    assert starting_point(CONFIG, run, force=True) is None


def test_force_begins_anew_where_no_checkpoint_can_be_used(run: RunPaths) -> None:
    write_checkpoint(run, "checkpoint_0000004", 4)
    (run.checkpoints / "checkpoint_0000004" / "metadata.json").write_text("{")
    assert starting_point(CONFIG, run, force=True) is None


def test_with_more_steps_the_model_is_held_from_the_step_on_from_which_it_was(run: RunPaths) -> None:
    def held(after: float, steps: int) -> RunConfig:
        content = json.loads(json.dumps(DUMPED))
        content["retention"]["kl"] = KlConfig(after=after).model_dump(mode="json")
        content["training"]["steps"] = steps
        return RunConfig.model_validate(content)

    was = held(0.3, 100)
    write_checkpoint(
        run, "final", 100, retention__kl=was.model_dump(mode="json")["retention"]["kl"], training__steps=100
    )
    told = r"began to hold after step 30, and would now after step 210: .* set retention\.kl\.after=0\.042858"
    with pytest.raises(ConfigError, match=told):
        starting_point(held(0.3, 700), run, resume=True)
    assert starting_point(held(0.042858, 700), run, resume=True) is not None
    assert refused(starting_point, run, held(0.042858, 700))
    other = held(0.042858, 700).model_dump(mode="json")
    other["retention"]["kl"]["weight"] = 3.0
    with pytest.raises(ConfigError, match=r"retention\.kl was "):
        starting_point(RunConfig.model_validate(other), run, resume=True)


def test_resume_and_force_exclude_each_other(run: RunPaths) -> None:
    with pytest.raises(ConfigError, match="pass one of the two"):
        starting_point(CONFIG, run, force=True, resume=True)


def test_all_that_differs_is_told_with_its_values(run: RunPaths) -> None:
    write_checkpoint(run, "checkpoint_0000004", 4, lora__rank=4, training__seed=3, training__steps=9)
    with pytest.raises(ConfigError) as refusal:
        starting_point(CONFIG, run, resume=True)
    for told in (
        "checkpoint_0000004 with another configuration",
        "lora.rank was 4, now 8",
        "training.seed was 3, now 0",
        "training.steps was 9, now 8: it may only grow",
        "only model.backend, training.checkpoint_every,",
    ):
        assert told in str(refusal.value)


@pytest.mark.parametrize(
    ("changed", "way"),
    [({"training__steps": 4}, "--resume to go on from it so, --force"), ({"lora__rank": 4}, "--force")],
)
def test_a_refusal_names_each_way_on(run: RunPaths, changed: dict[str, Any], way: str) -> None:
    write_checkpoint(run, "checkpoint_0000004", 4, **changed)
    with pytest.raises(ConfigError, match=rf"differ\)\. Pass {way} to replace it, or another --name to keep it\."):
        starting_point(CONFIG, run)


def test_a_checkpoint_without_a_setting_was_trained_by_another_version(run: RunPaths) -> None:
    write_checkpoint(run, "final", 8)
    path = run.checkpoints / "final" / "metadata.json"
    metadata = json.loads(path.read_text())
    del metadata["config"]["retention"], metadata["config"]["training"]["seed"]
    write_json(path, metadata)
    (path.parent / SEAL).unlink()
    seal(path.parent)
    with pytest.raises(RunError, match=r"\(retention\.replay, .*training\.seed differ\)"):
        check_trained(CONFIG, run)


def test_a_training_that_goes_on_has_not_ended_until_it_has(run: RunPaths) -> None:
    write_checkpoint(run, "final", 4, training__steps=4)
    write_checkpoint(run, "best", 6)
    with pytest.raises(RunError, match=r"to step 6, not to its end: .*best is the newest.* contract, which goes on"):
        check_trained(CONFIG, run)
    write_checkpoint(run, "final", 8)
    check_trained(CONFIG, run)
