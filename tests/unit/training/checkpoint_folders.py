"""Folders that say of themselves what checkpoints say, without a training."""

import json
from typing import Any

from tests.contract.conftest import configuration

from nestune.files import remove, seal, write_bytes, write_json
from nestune.runs import RunPaths
from nestune.training.best_loss import BestLoss
from nestune.training.checkpoints import NEEDED

CONFIG = configuration("torch", training={"steps": 8})
DUMPED = CONFIG.model_dump(mode="json")


def write_checkpoint(run: RunPaths, name: str, step: int, best_step: int = 0, **changed: Any) -> None:
    """Write a checkpoint; `block__key`: how it was configured otherwise."""
    config = json.loads(json.dumps(DUMPED))
    for path, value in changed.items():
        block, _, key = path.partition("__")
        config[block][key] = value
    folder = run.checkpoints / name
    remove(folder)
    for file in NEEDED:
        write_bytes(folder / file, f"{file} of step {step}".encode())
    state = BestLoss(None).state() | {"best_step": best_step}
    metadata = {"step": step, "data_sha256": "0", "tier_statistics": {}, "backend": "torch", "config": config}
    write_json(folder / "metadata.json", metadata | state)
    seal(folder)
