"""A forced training stands in an earlier one's place only when it is complete, wherever it is killed."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoint_folders import write_checkpoint

from nestune.errors import DivergedError, StoppedError
from nestune.files import tidy, write_text
from nestune.runs import RunPaths
from nestune.training import replacement
from nestune.training.replacement import bring_back_unreplaced, forget_replaced, in_place_of_earlier


@pytest.fixture
def run(tmp_path: Path) -> RunPaths:
    """A run with an earlier training in it."""
    run = RunPaths(tmp_path / "runs" / "contract")
    write_earlier(run)
    return run


def write_earlier(run: RunPaths) -> None:
    write_checkpoint(run, "final", 8, training__seed=1)
    write_text(run.metrics / "train_metrics.jsonl", "earlier")
    write_text(run.tracking, "earlier")


def write_new(run: RunPaths) -> None:
    write_text(run.tracking, "new")
    write_text(run.metrics / "train_metrics.jsonl", "new")
    write_checkpoint(run, "checkpoint_0000004", 4)


def contents(run: RunPaths) -> dict[str, bytes]:
    return {path.relative_to(run.root).as_posix(): path.read_bytes() for path in run.root.rglob("*") if path.is_file()}


def test_the_earlier_one_goes_once_the_new_one_is_complete(run: RunPaths) -> None:
    with in_place_of_earlier(run):
        assert not run.checkpoints.exists()
        write_new(run)
    assert run.tracking.read_text() == "new"
    assert sorted(path.name for path in run.root.iterdir()) == ["checkpoints", "metrics", "tracking.json"]
    assert [path.name for path in run.checkpoints.iterdir()] == ["checkpoint_0000004"]


@pytest.mark.parametrize(
    ("error", "new", "comes_back"),
    [
        # Training on would diverge again.
        (DivergedError("the loss is nan"), True, True),
        (StoppedError("stopped"), True, False),
        (KeyboardInterrupt(), True, False),
        (OSError("disk full"), True, False),
        (OSError("disk full"), False, True),
    ],
)
def test_what_ends_the_new_one_decides_which_of_them_stays(
    run: RunPaths, error: BaseException, new: bool, comes_back: bool
) -> None:
    before = contents(run)

    def train() -> None:
        with in_place_of_earlier(run):
            write_text(run.tracking, "new")
            if new:
                write_new(run)
            raise error

    with pytest.raises(type(error)):
        train()
    if comes_back:
        assert contents(run) == before
    else:
        assert run.tracking.read_text() == "new"
        assert (run.root / ".checkpoints.previous" / "final").is_dir()


class KilledError(BaseException):
    """What ends a process as a kill does: nothing of the block runs after it."""


def killed_at(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the number-th change of a name, or deletion, never come."""
    calls: Iterator[int] = iter(range(1, 1000))

    def counted(function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            if next(calls) == number:
                raise KilledError
            return function(*arguments)

        return call

    monkeypatch.setattr(replacement.os, "replace", counted(os.replace))
    monkeypatch.setattr(replacement, "remove", counted(replacement.remove))


@pytest.mark.parametrize("number", range(1, 12))
@pytest.mark.parametrize("during", ["setting aside", "bringing back", "forgetting"])
def test_killed_at_any_moment_the_run_has_either_training_whole(
    run: RunPaths, monkeypatch: pytest.MonkeyPatch, during: str, number: int
) -> None:
    earlier = contents(run)
    with monkeypatch.context() as patched:
        if during != "setting aside":
            replacement._set_aside(run)
            write_new(run)
        new = contents(RunPaths(run.root))
        killed_at(number, patched)
        with contextlib.suppress(KilledError):
            {
                "setting aside": replacement._set_aside,
                "bringing back": replacement._bring_back,
                "forgetting": forget_replaced,
            }[during](run)
    # As the next process begins.
    tidy(run.root)
    bring_back_unreplaced(run)
    after = contents(run)
    visible = {name: content for name, content in after.items() if ".previous" not in name}
    complete_new = {name: content for name, content in new.items() if ".previous" not in name}
    assert visible in (earlier, complete_new)
