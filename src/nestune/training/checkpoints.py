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
from nestune.errors import RunError
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
                    "update_every": list(self._config.tiers.update_every),
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
    """Raise RunError when the run's folder holds checkpoints that another configuration trained."""
    metadata = run.checkpoints / "final" / METADATA
    if not metadata.exists():
        return
    trained = read_json(metadata, "Pass --overwrite to train anew.")["config"]
    wanted = config.model_dump(mode="json")
    differing = [block for block in SHAPES_TRAINING if trained.get(block) != wanted[block]]
    if differing:
        raise RunError(
            f"{run.checkpoints} holds an adapter trained with another configuration (blocks {', '.join(differing)} "
            "differ). Pass --overwrite to replace it, or another --name to keep it."
        )
