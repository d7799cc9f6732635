"""Checkpoints: folders that appear whole or not at all, and from which training goes on."""

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nestune.backends.adapters import METADATA, WEIGHTS
from nestune.backends.base import Backend
from nestune.backends.training_state import FILE as TRAINING_STATE
from nestune.backends.training_state import write_training_state
from nestune.base_model import BaseModel
from nestune.config import RunConfig
from nestune.errors import RunError
from nestune.files import read_json, remove, replaced_folder, seal, seal_faults, write_json
from nestune.runs import RunPaths
from nestune.training.best_loss import BestLoss

BEST = "best"
FINAL = "final"
PERIODIC = re.compile(r"checkpoint_(?P<step>\d+)")
NEEDED = (METADATA, WEIGHTS, TRAINING_STATE)
KEYS = ("step", "config", "data_sha256", "tier_statistics", "backend", *BestLoss.STATE)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk: the step after which it was written, and what its `metadata.json` says.

    faults: what of it is not as it was saved; one that has any is not to be used.
    """

    folder: Path
    step: int
    metadata: dict[str, Any]
    faults: tuple[str, ...] = ()

    @property
    def is_final(self) -> bool:
        """Whether training ended with it."""
        return self.folder.name == FINAL

    @property
    def best_step(self) -> int:
        """The step of the checkpoint `best` at the time; 0: there was none yet."""
        return int(self.metadata["best_step"])

    def __str__(self) -> str:
        broken = f": {'; '.join(self.faults)}" if self.faults else ""
        return f"{self.folder}{broken}"


class Checkpoints:
    """Writes checkpoints of a backend below one folder: adapter, training state, and where they come from.

    data_sha256: hash of the rows that are trained on, replayed and validated with; parent_sha256: of the weights of the
    parent adapter. before_save: called before each one, as what a checkpoint builds upon must be on the disk before it.
    """

    def __init__(
        self,
        folder: Path,
        backend: Backend,
        base: BaseModel,
        config: RunConfig,
        data_sha256: str,
        before_save: Callable[[], None] = lambda: None,
        parent_sha256: str | None = None,
    ) -> None:
        self._folder = folder
        self._backend = backend
        self._base = base
        self._config = config
        self._data_sha256 = data_sha256
        self._before_save = before_save
        self._parent_sha256 = parent_sha256

    def save(self, name: str, best: BestLoss, on_the_way: bool = False) -> None:
        """Write the checkpoint `name`, in place of an earlier one; on_the_way: it goes when training has ended."""
        self._before_save()
        state = self._backend.training_state()
        with replaced_folder(self._folder / name) as folder:
            self._backend.save_adapter(folder)
            write_training_state(folder, state)
            metadata = {
                "step": state.steps,
                **best.state(),
                "base": {
                    "reference": self._base.reference,
                    "revision": self._base.revision,
                    "sha256": self._base.sha256,
                },
                "data_sha256": self._data_sha256,
                "parent_sha256": self._parent_sha256,
                "tier_statistics": {
                    "update_every": list(self._config.tiers.periods),
                    "update_counts": list(state.updates),
                },
                "backend": self._backend.name,
                "on_the_way": on_the_way,
                "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
                "config": self._config.model_dump(mode="json"),
            }
            write_json(folder / METADATA, metadata)
            seal(folder)

    def save_best(self, best: BestLoss) -> None:
        """Write the checkpoint `best`."""
        self.save(BEST, best)

    def save_periodic(self, step: int, best: BestLoss) -> None:
        """Write `checkpoint_<step>`, and delete the oldest beyond `keep_last`."""
        self.save(_name(step), best)
        old = _periodic(self._folder)[: -self._config.training.keep_last]
        if self._is_on_disk(_name(step), old):
            _remove_all(old)

    def save_stopped(self, step: int, best: BestLoss) -> Path:
        """Write `checkpoint_<step>` of a training that is stopped there; returns its folder."""
        self.save(_name(step), best, on_the_way=True)
        return self._folder / _name(step)

    def save_final(self, best: BestLoss) -> None:
        """Write the checkpoint `final`; those that were only there because training was stopped go."""
        self.save(FINAL, best)
        if self._is_on_disk(FINAL, _periodic(self._folder)):
            discard_stopped(self._folder)

    def _is_on_disk(self, name: str, older: Sequence[Path]) -> bool:
        """Whether a checkpoint that was just written reads back as it should; asked where older ones are to go."""
        faults = seal_faults(self._folder / name, NEEDED) if older else []
        if faults:
            log.warning("%s is not as it was saved (%s), so older checkpoints are kept", name, "; ".join(faults))
        return not faults


def discard_stopped(folder: Path) -> None:
    """Delete the checkpoints of a training that has ended which were only there because it was stopped on the way."""
    _remove_all([path for path in _periodic(folder) if _read(path).metadata.get("on_the_way")])


def read_checkpoints(run: RunPaths) -> list[Checkpoint]:
    """All checkpoints of a run, the highest step first, `final` before others of its step; broken ones have faults."""
    found = [_read(path) for path in run.checkpoints.glob("[!.]*") if path.is_dir()]
    return sorted(found, key=lambda checkpoint: (checkpoint.step, checkpoint.is_final), reverse=True)


def newest_checkpoint(run: RunPaths) -> Checkpoint | None:
    """The newest checkpoint from which training can go on; None when there is none. Broken ones are warned of.

    With it, the checkpoint `best` is what it was then: where that one is broken or lost, another of the same step takes
    its place, and where there is none, training goes on from before.
    Raises RunError when there are checkpoints, and none can be used.
    """
    found = read_checkpoints(run)
    sound = [checkpoint for checkpoint in found if not checkpoint.faults]
    for checkpoint in found:
        if checkpoint.faults:
            log.warning("a checkpoint is broken and is not used: %s", checkpoint)
    for newest in sound:
        if newest.best_step == 0:
            return newest
        twins = [checkpoint for checkpoint in sound if checkpoint.step == newest.best_step]
        if twins:
            _take_as_best(run, twins)
            return newest
        log.warning("%s is not used: the best checkpoint, of step %d, is broken", newest, newest.best_step)
    if found:
        raise RunError(
            f"no checkpoint in {run.checkpoints} can be used: {', '.join(map(str, found))}. Restore them, or pass "
            "--force to train anew."
        )
    return None


def _take_as_best(run: RunPaths, twins: Sequence[Checkpoint]) -> None:
    """Let `best` be one of these checkpoints of the same step."""
    if any(checkpoint.folder.name == BEST for checkpoint in twins):
        return
    log.warning("%s was broken or lost; %s is taken in its place", run.checkpoints / BEST, twins[0])
    with replaced_folder(run.checkpoints / BEST) as folder:
        for path in twins[0].folder.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())


def _read(folder: Path) -> Checkpoint:
    faults = seal_faults(folder, NEEDED)
    try:
        metadata = read_json(folder / METADATA, "", keys=KEYS)
        return Checkpoint(folder, int(metadata["step"]), metadata, tuple(faults))
    except (RunError, TypeError, ValueError, OverflowError):
        return Checkpoint(folder, _step(folder), {}, tuple(faults or [f"{METADATA} says too little"]))


def _periodic(folder: Path) -> list[Path]:
    """The periodic checkpoints in a folder, the oldest first."""
    return sorted((path for path in folder.iterdir() if PERIODIC.fullmatch(path.name)), key=_step)


def _remove_all(folders: Sequence[Path]) -> None:
    for folder in folders:
        remove(folder)


def _name(step: int) -> str:
    return f"checkpoint_{step:07d}"


def _step(folder: Path) -> int:
    """The step in the name of a periodic checkpoint; 0 of others."""
    found = PERIODIC.fullmatch(folder.name)
    return int(found["step"]) if found else 0
