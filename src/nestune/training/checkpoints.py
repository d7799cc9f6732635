"""Checkpoints: folders that appear whole or not at all."""

import math
import shutil
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from nestune.backends.adapters import METADATA
from nestune.backends.base import Backend
from nestune.base_model import BaseModel
from nestune.config import RunConfig
from nestune.errors import ConfigError, RunError
from nestune.runs import RunPaths, read_json, replaced_folder, write_json

PERIODIC = "checkpoint_"
SHAPES_TRAINING = ("model", "lora", "data", "tiers", "retention", "training")


class Checkpoints:
    """Writes the adapter of a backend below one folder, with what it is and where it comes from."""

    def __init__(self, folder: Path, backend: Backend, base: BaseModel, config: RunConfig) -> None:
        self._folder = folder
        self._backend = backend
        self._base = base
        self._config = config

    def save(self, name: str, step: int, best_validation_loss: float, update_counts: Sequence[int]) -> None:
        """Write the checkpoint `name` (best, final), in place of an earlier one."""
        with replaced_folder(self._folder / name) as folder:
            self._backend.save_adapter(folder)
            metadata = {
                "step": step,
                # JSON has no infinity: before the first validation there is no best loss.
                "best_validation_loss": best_validation_loss if math.isfinite(best_validation_loss) else None,
                "base": {
                    "reference": self._base.reference,
                    "revision": self._base.revision,
                    "sha256": self._base.sha256,
                },
                "tier_statistics": {
                    "update_every": list(self._config.tiers.periods),
                    "update_counts": list(update_counts),
                },
                "backend": self._backend.name,
                "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
                "config": self._config.model_dump(mode="json"),
            }
            write_json(folder / METADATA, metadata)

    def save_periodic(self, step: int, best_validation_loss: float, update_counts: Sequence[int]) -> None:
        """Write `checkpoint_<step>` and delete the oldest beyond `keep_last`."""
        self.save(f"{PERIODIC}{step:07d}", step, best_validation_loss, update_counts)
        for old in sorted(self._folder.glob(f"{PERIODIC}*"))[: -self._config.training.keep_last]:
            shutil.rmtree(old)


def refuse_other_checkpoints(config: RunConfig, run: RunPaths) -> None:
    """Raise ConfigError when the run's folder holds checkpoints that another configuration trained."""
    for name in ("final", "best"):
        metadata = run.checkpoints / name / METADATA
        differing = _differing_blocks(metadata, config) if metadata.exists() else []
        if differing:
            raise ConfigError(
                f"{run.checkpoints} holds an adapter trained with another configuration (blocks {differing} differ). "
                "Pass --overwrite to replace it, or another --name to keep it."
            )


def check_trained(config: RunConfig, run: RunPaths) -> None:
    """Raise RunError unless the run's folder holds a training that went to its end with this configuration."""
    metadata = run.checkpoints / "final" / METADATA
    train = f"Run nestune train --name {config.name}"
    if not metadata.exists():
        raise RunError(f"there is no {metadata.parent}: training has not been run, or not to its end. {train}.")
    differing = _differing_blocks(metadata, config)
    if differing:
        raise RunError(
            f"{run.checkpoints} was trained with another configuration (blocks {differing} differ). {train} "
            "--overwrite, or use the configuration it was trained with."
        )


def _differing_blocks(metadata: Path, config: RunConfig) -> str:
    """The names of the blocks that shape training and differ, empty when none does.

    Retention sets are only measured, so that more may be named after training.
    """
    trained = read_json(metadata, "Train again with --overwrite.", keys=["config"])["config"]
    wanted = config.model_dump(mode="json")
    for content in (trained, wanted):
        content.get("data", {}).pop("retention", None)
    return ", ".join(block for block in SHAPES_TRAINING if trained.get(block) != wanted[block])
