"""Which checkpoint a run is at; which of them are broken, and what is done without those."""

import json
import logging
from pathlib import Path

import pytest
from checkpoint_folders import CONFIG, write_checkpoint

from nestune.errors import RunError
from nestune.files import SEAL, seal, sha256_file, write_json
from nestune.runs import RunPaths
from nestune.training.best_loss import BestLoss
from nestune.training.checkpoints import NEEDED, Checkpoints, newest_checkpoint, read_checkpoints


@pytest.fixture
def run(tmp_path: Path) -> RunPaths:
    return RunPaths(tmp_path / "runs" / "contract")


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
        write_checkpoint(run, name, step)
    newest = newest_checkpoint(run)
    assert newest is not None
    assert (newest.folder, newest.step) == (run.checkpoints / expected, steps[expected])


def test_a_run_without_checkpoints_has_no_newest_one(run: RunPaths) -> None:
    assert newest_checkpoint(run) is None


@pytest.mark.parametrize("file", [*NEEDED, SEAL])
@pytest.mark.parametrize("damage", ["empty", "truncated", "flipped", "deleted"])
def test_a_broken_checkpoint_is_passed_over_and_that_is_told(
    run: RunPaths, caplog: pytest.LogCaptureFixture, file: str, damage: str
) -> None:
    write_checkpoint(run, "checkpoint_0000004", 4)
    write_checkpoint(run, "checkpoint_0000008", 8)
    path = run.checkpoints / "checkpoint_0000008" / file
    content = path.read_bytes()
    if damage == "deleted":
        path.unlink()
    else:
        flipped = content[:-20] + bytes([content[-20] ^ 1]) + content[-19:]
        path.write_bytes({"empty": b"", "truncated": content[: len(content) // 2], "flipped": flipped}[damage])
    with caplog.at_level(logging.WARNING):
        newest = newest_checkpoint(run)
    assert newest is not None
    assert newest.step == 4
    assert "checkpoint is broken and is not used: " in caplog.text
    # Where the seal itself says something else, what it says it of does not match.
    assert f"{path.parent}: {file if (file, damage) != (SEAL, 'flipped') else ''}" in caplog.text


def test_metadata_that_says_too_little_is_broken(run: RunPaths) -> None:
    write_checkpoint(run, "final", 8)
    path = run.checkpoints / "final" / "metadata.json"
    write_json(path, {"step": 8})
    (path.parent / SEAL).unlink()
    seal(path.parent)
    assert read_checkpoints(run)[0].faults == ("metadata.json says too little",)


def test_without_a_sound_one_nothing_is_begun_unasked(run: RunPaths) -> None:
    for name, step in (("best", 4), ("checkpoint_0000006", 6)):
        write_checkpoint(run, name, step)
        (run.checkpoints / name / "metadata.json").write_text("{")
    with pytest.raises(RunError, match=r"no checkpoint in .* can be used: .*metadata.json changed.* pass --force"):
        newest_checkpoint(run)


def test_a_broken_best_is_replaced_by_its_twin(run: RunPaths, caplog: pytest.LogCaptureFixture) -> None:
    write_checkpoint(run, "checkpoint_0000004", 4, best_step=4)
    write_checkpoint(run, "best", 4, best_step=4)
    write_checkpoint(run, "checkpoint_0000006", 6, best_step=4)
    (run.checkpoints / "best" / NEEDED[1]).write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        newest = newest_checkpoint(run)
    assert newest is not None
    assert newest.step == 6
    assert "checkpoint_0000004 is taken in its place" in caplog.text
    mended = {path.name: sha256_file(path) for path in (run.checkpoints / "best").iterdir()}
    assert mended == {path.name: sha256_file(path) for path in (run.checkpoints / "checkpoint_0000004").iterdir()}


def test_without_the_best_of_then_training_goes_on_from_before_it(run: RunPaths) -> None:
    """From after it, the best weights would never come again."""
    write_checkpoint(run, "checkpoint_0000002", 2, best_step=0)
    write_checkpoint(run, "best", 4, best_step=4)
    write_checkpoint(run, "checkpoint_0000006", 6, best_step=4)
    (run.checkpoints / "best" / NEEDED[1]).write_bytes(b"")
    newest = newest_checkpoint(run)
    assert newest is not None
    assert newest.step == 2


class Saving(Checkpoints):
    """Checkpoints of no backend."""

    def __init__(self, run: RunPaths, keep_last: int, damage: bool = False) -> None:
        training = CONFIG.training.model_copy(update={"keep_last": keep_last})
        super().__init__(run.checkpoints, None, None, CONFIG.model_copy(update={"training": training}), "0")  # type: ignore[arg-type]
        self.run, self.damage = run, damage

    def save(self, name: str, best: BestLoss, on_the_way: bool = False) -> None:
        write_checkpoint(self.run, name, int(name.partition("_")[2] or 99))
        if on_the_way:
            path = self.run.checkpoints / name / "metadata.json"
            write_json(path, json.loads(path.read_text()) | {"on_the_way": True})
            (path.parent / SEAL).unlink()
            seal(path.parent)
        if self.damage:
            (self.run.checkpoints / name / NEEDED[1]).write_bytes(b"")


def names(run: RunPaths) -> list[str]:
    return sorted(path.name for path in run.checkpoints.iterdir())


def test_the_newest_periodic_checkpoints_are_kept_by_step_not_by_name(run: RunPaths) -> None:
    saving = Saving(run, keep_last=2)
    for step in (9_999_998, 9_999_999, 10_000_000, 10_000_001):
        saving.save_periodic(step, BestLoss(None))
    assert names(run) == ["checkpoint_10000000", "checkpoint_10000001"]


def test_nothing_is_deleted_for_one_that_cannot_be_read_back(run: RunPaths, caplog: pytest.LogCaptureFixture) -> None:
    Saving(run, keep_last=1).save_periodic(4, BestLoss(None))
    with caplog.at_level(logging.WARNING):
        Saving(run, keep_last=1, damage=True).save_periodic(8, BestLoss(None))
    assert names(run) == ["checkpoint_0000004", "checkpoint_0000008"]
    assert "older checkpoints are kept" in caplog.text
    newest = newest_checkpoint(run)
    assert newest is not None
    assert newest.step == 4


def test_what_was_only_there_because_training_was_stopped_goes_when_it_has_ended(run: RunPaths) -> None:
    saving = Saving(run, keep_last=3)
    saving.save_periodic(4, BestLoss(None))
    saving.save_stopped(6, BestLoss(None))
    assert names(run) == ["checkpoint_0000004", "checkpoint_0000006"]
    saving.save_final(BestLoss(None))
    assert names(run) == ["checkpoint_0000004", "final"]
