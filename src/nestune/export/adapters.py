"""The adapter alone, for PEFT or for mlx-lm: a folder with that library's files and keys only."""

import json
import shutil
from collections.abc import Collection
from pathlib import Path

from nestune.backends.adapter_config import CONFIG
from nestune.backends.adapters import MLX_WEIGHTS, WEIGHTS
from nestune.export.job import Job
from nestune.files import write_json

KEYS_OF_MLX = frozenset({"fine_tune_type", "num_layers", "lora_parameters"})


def write_peft(job: Job, folder: Path) -> list[str]:
    """Write what `PeftModel.from_pretrained` loads into an existing folder; nothing is to be noted."""
    keys = json.loads((job.adapter / CONFIG).read_text(encoding="utf-8")).keys()
    _write(job, folder, WEIGHTS, keys - KEYS_OF_MLX)
    return []


def write_mlx(job: Job, folder: Path) -> list[str]:
    """Write what `mlx_lm.load(..., adapter_path=...)` loads into an existing folder; nothing is to be noted."""
    _write(job, folder, MLX_WEIGHTS, KEYS_OF_MLX)
    return []


def _write(job: Job, folder: Path, weights: str, keys: Collection[str]) -> None:
    config = json.loads((job.adapter / CONFIG).read_text(encoding="utf-8"))
    write_json(folder / CONFIG, {key: value for key, value in config.items() if key in keys})
    shutil.copyfile(job.adapter / weights, folder / weights)
