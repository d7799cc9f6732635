"""Which checkpoint a run is at, and which configuration may go on from it, replace it, or evaluate it."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.contract.conftest import configuration

from nestune.config import RunConfig
from nestune.errors import ConfigError, RunError
from nestune.files import sha256_file, write_bytes, write_json
from nestune.runs import RunPaths
from nestune.training.checkpoints import (
    check_trained,
    checkpoint_to_go_on_from,
    newest_checkpoint,
    refuse_other_checkpoints,
)
from nestune.training.best_loss import BestLoss

CONFIG = configuration("torch", training={"steps": 8})
DUMPED = CONFIG.model_dump(mode="json")
SHAPING = [
    f"{block}.{key}" for block in ("model", "lora", "data", "tiers", "retention", "training") for key in DUMPED[block]
]
ON_THE_WAY = {
    "model.backend",
    "data.retention",
    "training.steps",
    "training.eval_every",
    "training.checkpoint_every",
    "training.keep_last",
    "training.gradient_checkpointing",
}


@pytest.fixture
def run(tmp_path: Path) -> RunPaths:
    return RunPaths(tmp_path / "runs" / "contract")


def write(run: RunPaths, name: str, step: int, **changed: Any) -> None:
    """Write what a checkpoint says of itself; `block__key`: how it was configured otherwise."""
    config = json.loads(json.dumps(DUMPED))
    for path, value in changed.items():
        block, _, key = path.partition("__")
        config[block][key] = value
    weights = run.checkpoints / name / "weights"
    write_bytes(weights, name.encode())
    hashes = {"weights": sha256_file(weights)}
    metadata = {"step": step, "data_sha256": "0", "tier_statistics": {}, "backend": "torch", "config": config}
    write_json(run.checkpoints / name / "metadata.json", metadata | {"sha256": hashes} | BestLoss(None).state())


def refused(check: Any, run: RunPaths, config: RunConfig = CONFIG) -> bool:
    try:
        check(config, run)
    except (ConfigError, RunError):
        return True
    return False


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ({"best": 4, "checkpoint_0000006": 6, "checkpoint_0000008": 8}, "checkpoint_0000008"),
        ({"best": 7, "checkpoint_0000006": 6}, "best"),
        # That training had ended, and then went on.
        ({"final": 4, "best": 4, "checkpoint_0000006": 6}, "checkpoint_0000006"),
        ({"final": 8, "best": 8, "checkpoint_0000008": 8}, "final"),
        ({"checkpoint_10000000": 10_000_000, "checkpoint_9999999": 9_999_999}, "checkpoint_10000000"),
        # What a process leaves that is killed while it writes.
        ({"best": 4, ".final.0a1b2c3d.tmp": 8}, "best"),
    ],
)
def test_the_newest_checkpoint_is_that_of_the_highest_step(run: RunPaths, steps: dict[str, int], expected: str) -> None:
    for name, step in steps.items():
        write(run, name, step)
    newest = newest_checkpoint(run)
    assert newest is not None
    assert (newest.folder, newest.step) == (run.checkpoints / expected, steps[expected])


def test_a_run_without_a_checkpoint_has_nothing_to_go_on_from(run: RunPaths) -> None:
    assert newest_checkpoint(run) is None
    with pytest.raises(
        RunError, match=r"no checkpoint in .* to go on from\. Run nestune train --name contract without"
    ):
        checkpoint_to_go_on_from(CONFIG, run)
    with pytest.raises(RunError, match=r"has not been run\. Run nestune train --name contract\."):
        check_trained(CONFIG, run)
    assert not refused(refuse_other_checkpoints, run)


@pytest.mark.parametrize("key", SHAPING)
def test_each_setting_that_shapes_training_may_be_another_only_where_that_changes_no_weight(
    run: RunPaths, key: str
) -> None:
    write(run, "final", 8, **{key.replace(".", "__"): 4 if key == "training.steps" else "something else"})
    assert refused(checkpoint_to_go_on_from, run) == (key not in ON_THE_WAY)
    assert refused(refuse_other_checkpoints, run) == (key != "data.retention")
    # What one backend has trained another evaluates.
    assert refused(check_trained, run) == (key not in ("data.retention", "model.backend"))


@pytest.mark.parametrize(("left", "told"), [(b"of another run", "weights changed"), (None, "weights missing")])
def test_files_that_are_not_those_that_were_saved_are_not_gone_on_from(
    run: RunPaths, left: bytes | None, told: str
) -> None:
    write(run, "checkpoint_0000004", 4)
    write(run, "final", 8)
    weights = run.checkpoints / "final" / "weights"
    weights.unlink()
    if left is not None:
        weights.write_bytes(left)
    with pytest.raises(RunError, match=rf"final is not as it was saved after step 8: {told}\. .*delete that folder"):
        checkpoint_to_go_on_from(CONFIG, run)


def test_all_that_differs_is_told_with_its_values(run: RunPaths) -> None:
    write(run, "checkpoint_0000004", 4, lora__rank=4, training__seed=3, training__steps=9)
    with pytest.raises(ConfigError) as refusal:
        checkpoint_to_go_on_from(CONFIG, run)
    for told in (
        "checkpoint_0000004 with another configuration",
        "lora.rank was 4, now 8",
        "training.seed was 3, now 0",
        "training.steps was 9, now 8: it may only grow",
        "only model.backend, training.checkpoint_every,",
    ):
        assert told in str(refusal.value)


def test_a_checkpoint_without_a_setting_was_trained_by_another_version(run: RunPaths) -> None:
    write(run, "final", 8)
    path = run.checkpoints / "final" / "metadata.json"
    metadata = json.loads(path.read_text())
    del metadata["config"]["retention"], metadata["config"]["training"]["seed"]
    write_json(path, metadata)
    with pytest.raises(RunError, match=r"\(retention\.replay, training\.seed differ\)"):
        check_trained(CONFIG, run)


def test_a_training_that_goes_on_has_not_ended_until_it_has(run: RunPaths) -> None:
    write(run, "final", 4, training__steps=4)
    write(run, "best", 6)
    with pytest.raises(RunError, match=r"to step 6, not to its end: .*best is the newest.* contract --resume\."):
        check_trained(CONFIG, run)
    write(run, "final", 8)
    check_trained(CONFIG, run)


def test_metadata_that_cannot_be_read_is_told_with_the_folder_to_delete(run: RunPaths) -> None:
    write(run, "best", 4)
    folder = run.checkpoints / "checkpoint_0000006"
    folder.mkdir()
    (folder / "metadata.json").write_text("{")
    with pytest.raises(RunError, match=rf"is not JSON.*Delete {folder}, or train again with --overwrite"):
        checkpoint_to_go_on_from(CONFIG, run)
