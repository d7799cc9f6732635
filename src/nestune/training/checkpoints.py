"""Checkpoints: folders that appear whole or not at all, and from which training goes on."""

import shutil
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nestune.backends.adapters import METADATA
from nestune.backends.base import Backend
from nestune.backends.training_state import write_training_state
from nestune.base_model import BaseModel
from nestune.config import RunConfig
from nestune.errors import ConfigError, RunError
from nestune.files import read_json, replaced_folder, sha256_file, write_json
from nestune.runs import RunPaths
from nestune.training.stopping import BestLoss

FINAL = "final"
PERIODIC = "checkpoint_"
SHAPES_TRAINING = ("model", "lora", "data", "tiers", "retention", "training")
# Retention sets are only measured, so that more may be named after training.
NO_PART_OF_TRAINING = frozenset({"data.retention"})
MAY_CHANGE_ON_THE_WAY = frozenset(
    {"model.backend"}
    | {f"training.{key}" for key in ("steps", "eval_every", "checkpoint_every", "keep_last", "gradient_checkpointing")}
)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk: the step after which it was written, and what its `metadata.json` says."""

    folder: Path
    step: int
    metadata: Mapping[str, Any]

    @property
    def is_final(self) -> bool:
        """Whether training ended with it."""
        return self.folder.name == FINAL


class Checkpoints:
    """Writes checkpoints of a backend below one folder: adapter, training state, and where they come from.

    data_sha256: hash of the rows that are trained on, replayed and validated with.
    """

    def __init__(self, folder: Path, backend: Backend, base: BaseModel, config: RunConfig, data_sha256: str) -> None:
        self._folder = folder
        self._backend = backend
        self._base = base
        self._config = config
        self._data_sha256 = data_sha256

    def save(self, name: str, best: BestLoss) -> None:
        """Write the checkpoint `name` (best, final), in place of an earlier one."""
        state = self._backend.training_state()
        with replaced_folder(self._folder / name) as folder:
            self._backend.save_adapter(folder)
            write_training_state(folder, state)
            metadata = {
                "step": state.steps,
                "sha256": {path.name: sha256_file(path) for path in sorted(folder.iterdir())},
                **best.state(),
                "base": {
                    "reference": self._base.reference,
                    "revision": self._base.revision,
                    "sha256": self._base.sha256,
                },
                "data_sha256": self._data_sha256,
                "tier_statistics": {
                    "update_every": list(self._config.tiers.periods),
                    "update_counts": list(state.updates),
                },
                "backend": self._backend.name,
                "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
                "config": self._config.model_dump(mode="json"),
            }
            write_json(folder / METADATA, metadata)

    def save_periodic(self, step: int, best: BestLoss) -> None:
        """Write `checkpoint_<step>` and delete the oldest beyond `keep_last`."""
        self.save(f"{PERIODIC}{step:07d}", best)
        for old in sorted(self._folder.glob(f"{PERIODIC}*"))[: -self._config.training.keep_last]:
            shutil.rmtree(old)


def newest_checkpoint(run: RunPaths, keys: Sequence[str] = ("config",)) -> Checkpoint | None:
    """The checkpoint of the highest step, `final` where several have it; None when there is none.

    Raises RunError when the metadata of one cannot be read, or lacks one of `keys`.
    """
    found = []
    for path in run.checkpoints.glob(f"[!.]*/{METADATA}"):
        metadata = read_json(path, f"Delete {path.parent}, or train again with --overwrite.", keys=["step", *keys])
        found.append(Checkpoint(path.parent, metadata["step"], metadata))
    return max(found, key=lambda checkpoint: (checkpoint.step, checkpoint.is_final), default=None)


def checkpoint_to_go_on_from(config: RunConfig, run: RunPaths) -> Checkpoint:
    """The newest checkpoint of a run, when training can go on from there as configured.

    Raises RunError when there is none, or its files are not those that were saved; ConfigError when what shapes
    training is configured otherwise than it was, but for the backend, more steps, and what changes no weight.
    """
    keys = ["config", "sha256", "data_sha256", "tier_statistics", "backend", *BestLoss.STATE]
    newest = newest_checkpoint(run, keys)
    if newest is None:
        raise RunError(
            f"there is no checkpoint in {run.checkpoints} to go on from. Run nestune train --name {config.name} "
            "without --resume."
        )
    _check_files(newest)
    faults = [
        f"{key} was {was!r}, now {now!r}"
        for key, (was, now) in _differing(newest, config, NO_PART_OF_TRAINING | MAY_CHANGE_ON_THE_WAY).items()
    ]
    steps_before = newest.metadata["config"]["training"]["steps"]
    if config.training.steps < steps_before:
        faults.append(f"training.steps was {steps_before}, now {config.training.steps}: it may only grow")
    if faults:
        may_change = ", ".join(sorted(MAY_CHANGE_ON_THE_WAY))
        lines = [f"training cannot go on from {newest.folder} with another configuration:", *faults]
        remedy = f"On the way only {may_change} may change. Set the others back, or train under another --name."
        raise ConfigError("\n  ".join([*lines, remedy]))
    return newest


def _check_files(checkpoint: Checkpoint) -> None:
    """Raise RunError unless a checkpoint's files are those that were saved together."""
    saved: Mapping[str, str] = checkpoint.metadata["sha256"]
    paths = [checkpoint.folder / name for name in saved]
    missing = [path.name for path in paths if not path.is_file()]
    changed = [path.name for path in paths if path.is_file() and sha256_file(path) != saved[path.name]]
    faults = [f"{', '.join(missing)} missing"] * bool(missing) + [f"{', '.join(changed)} changed"] * bool(changed)
    if faults:
        raise RunError(
            f"{checkpoint.folder} is not as it was saved after step {checkpoint.step}: {'; '.join(faults)}. Restore "
            "it, or delete that folder to go on from the checkpoint before it."
        )


def refuse_other_checkpoints(config: RunConfig, run: RunPaths) -> None:
    """Raise ConfigError when the run's folder holds checkpoints that another configuration trained."""
    newest = newest_checkpoint(run)
    differing = _differing(newest, config, NO_PART_OF_TRAINING) if newest else {}
    if differing:
        raise ConfigError(
            f"{run.checkpoints} holds an adapter trained with another configuration ({', '.join(differing)} differ). "
            "Pass --overwrite to replace it, or another --name to keep it."
        )


def check_trained(config: RunConfig, run: RunPaths) -> None:
    """Raise RunError unless the run's folder holds a training that went to its end with this configuration.

    The backend may be another: an adapter that one has trained, any other evaluates.
    """
    newest = newest_checkpoint(run)
    train = f"Run nestune train --name {config.name}"
    if newest is None:
        raise RunError(f"there is no checkpoint in {run.checkpoints}: training has not been run. {train}.")
    if not newest.is_final:
        raise RunError(
            f"training has been run to step {newest.step}, not to its end: {newest.folder} is the newest checkpoint. "
            f"{train} --resume."
        )
    differing = _differing(newest, config, NO_PART_OF_TRAINING | {"model.backend"})
    if differing:
        raise RunError(
            f"{run.checkpoints} was trained with another configuration ({', '.join(differing)} differ). {train} "
            "--overwrite, or use the configuration it was trained with."
        )


def _differing(checkpoint: Checkpoint, config: RunConfig, may_differ: Set[str]) -> dict[str, tuple[Any, Any]]:
    """What shapes training and is configured otherwise than it was: key -> its value then and now."""
    trained, wanted = checkpoint.metadata["config"], config.model_dump(mode="json")
    values = {
        f"{block}.{key}": (trained.get(block, {}).get(key), wanted[block].get(key))
        for block in SHAPES_TRAINING
        for key in {**trained.get(block, {}), **wanted[block]}
    }
    return {key: (was, now) for key, (was, now) in values.items() if was != now and key not in may_differ}
