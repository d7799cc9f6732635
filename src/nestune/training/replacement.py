"""A training in place of an earlier one, which is set aside until the new one is complete."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nestune.errors import DivergedError
from nestune.files import remove, sync_folder, temporary_beside, writing
from nestune.runs import RunPaths
from nestune.training.checkpoints import read_checkpoints


@contextmanager
def in_place_of_earlier(run: RunPaths) -> Iterator[None]:
    """Set an earlier training aside while the block makes a new one; once that is complete, the earlier one goes.

    It comes back when the new one diverges, as it would again, or ends without a checkpoint to go on from.
    """
    _set_aside(run)
    try:
        yield
    except DivergedError:
        _bring_back(run)
        raise
    except BaseException:
        bring_back_unreplaced(run)
        raise
    forget_replaced(run)


def bring_back_unreplaced(run: RunPaths) -> None:
    """Bring an earlier training back where the one in its place has left no checkpoint to go on from."""
    if not any(not checkpoint.faults for checkpoint in read_checkpoints(run)):
        _bring_back(run)


def forget_replaced(run: RunPaths) -> None:
    """Delete an earlier training that was set aside."""
    for path in _paths(run):
        remove(_aside(path))


def _set_aside(run: RunPaths) -> None:
    for path in _paths(run):
        if _aside(path).exists():
            # The one in its place was itself not completed.
            remove(path)
        elif path.exists():
            _rename(path, _aside(path))


def _bring_back(run: RunPaths) -> None:
    """Killed at any moment and called again, it ends with the earlier training in its place."""
    if not any(_aside(path).exists() for path in _paths(run)):
        return
    # First, and at once: what tells a new training from none are its checkpoints.
    given_up = temporary_beside(run.checkpoints)
    if run.checkpoints.exists():
        _rename(run.checkpoints, given_up)
    for path in reversed(_paths(run)):
        if _aside(path).exists():
            remove(path)
            _rename(_aside(path), path)
    remove(given_up)


def _rename(path: Path, to: Path) -> None:
    with writing(to):
        os.replace(path, to)
        sync_folder(to.parent)


def _paths(run: RunPaths) -> tuple[Path, ...]:
    """What training makes, in the order in which it is set aside."""
    return run.checkpoints, run.metrics, run.tracking


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.previous")
