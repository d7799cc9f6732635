"""The candidate: the adapter that is evaluated and registered, made of a checkpoint at the end of training.

runs/<name>/candidate/
    adapter_model.safetensors adapters.safetensors adapter_config.json   one ordinary LoRA, the factor folded in
    metadata.json       the checkpoint's, and what the adapter was made from and how
    strength.json       where a strength was chosen: the curve, and the rows that it was measured on
    uncompressed/       where the rank was cut down: the adapter before that, to be scored beside it
    sha256.json         of all these files
"""

import shutil
from pathlib import Path
from typing import Any

from nestune.backends.adapters import (
    METADATA,
    WEIGHTS,
    adapter_files,
    read_adapter_of_any_size,
    write_adapter_like,
)
from nestune.backends.base import Backend
from nestune.backends.lora_sum import Adapter, compress, effective_rank, relative_error, singular_values
from nestune.config import RunConfig
from nestune.data.lineage import LINEAGE, earlier_tasks, task_of
from nestune.errors import RunError
from nestune.files import read_json, replaced_folder, seal, seal_faults, sha256_file, write_json
from nestune.registry.tracking_note import git_commit
from nestune.runs import RunPaths
from nestune.stages.inputs import TrainingInputs
from nestune.stages.strength import anchors_of, choose_strength
from nestune.stages.texts import with_texts
from nestune.stopping import StopRequests
from nestune.training.strength import scaled

STRENGTH = "strength.json"
UNCOMPRESSED = "uncompressed"
NEEDED = (METADATA, WEIGHTS)
KEYS = ("step", "base", "config", "made_from", "factor", "compression")


def make_candidate(
    config: RunConfig, run: RunPaths, inputs: TrainingInputs, backend: Backend, stop: StopRequests
) -> None:
    """Make the candidate of a training that has ended; the same training gives the same bytes.

    The backend computes with other adapters afterwards. Raises StoppedError, and nothing is written, when the run is
    asked to stop while the strength is chosen; ConfigError when the parent does not fit.
    """
    checkpoint = run.checkpoints / config.evaluation.checkpoint
    described = backend.lora_parameters()
    trained = read_adapter_of_any_size(checkpoint, described, config.lora, inputs.base)
    parent = read_adapter_of_any_size(inputs.parent, described, config.lora, inputs.base) if inputs.parent else None
    own_ranks = config.lora.rank if parent is not None and config.retention.start == "fresh" else None

    def write(adapter: Adapter, folder: Path) -> None:
        if adapter is trained:
            for file in adapter_files(checkpoint):
                shutil.copyfile(file, folder / file.name)
        else:
            write_adapter_like(folder, checkpoint, adapter, config.lora, inputs.base)
            shutil.copyfile(checkpoint / METADATA, folder / METADATA)

    def write_at(factor: float, folder: Path) -> None:
        write(scaled(trained, parent, factor, own_ranks), folder)

    settings, strength = config.retention.strength, None
    if settings is not None:
        anchors = anchors_of(with_texts(inputs, backend, stop))
        strength = choose_strength(settings, inputs, backend, write_at, anchors, stop)
    factor = strength["factor"] if strength else 1.0
    whole = scaled(trained, parent, factor, own_ranks)
    small = compress(whole, config.lora.rank_limit)
    with replaced_folder(run.candidate) as folder:
        write(small, folder)
        metadata = read_json(checkpoint / METADATA, "Run nestune train again.")
        made = {"factor": factor, "compression": _compression(whole, small), "made_from": made_from(config, run)}
        write_json(folder / METADATA, metadata | made | {LINEAGE: _lineage(config, run, inputs.parent)})
        if strength is not None:
            write_json(folder / STRENGTH, strength)
        if small is not whole:
            (folder / UNCOMPRESSED).mkdir()
            write(whole, folder / UNCOMPRESSED)
            seal(folder / UNCOMPRESSED)
        seal(folder)


def made_from(config: RunConfig, run: RunPaths) -> dict[str, Any]:
    """What decides a run's candidate beside its training, by the keys of the configuration, and the checkpoint."""
    strength = config.retention.strength
    return {
        "evaluation.checkpoint": config.evaluation.checkpoint,
        "adapter_sha256": sha256_file(run.checkpoints / config.evaluation.checkpoint / WEIGHTS),
        "retention.strength": strength.model_dump(mode="json") if strength else None,
        "lora.max_rank": config.lora.rank_limit,
    }


def candidate_faults(config: RunConfig, run: RunPaths) -> list[str]:
    """Why a run's candidate is not that of its training with this configuration; empty when it is."""
    if not run.candidate.exists():
        return ["there is none"]
    faults = seal_faults(run.candidate, NEEDED)
    if (run.candidate / UNCOMPRESSED).exists():
        faults += [f"{UNCOMPRESSED}: {fault}" for fault in seal_faults(run.candidate / UNCOMPRESSED, NEEDED)]
    if faults:
        return faults
    try:
        told = read_json(run.candidate / METADATA, "", keys=KEYS)["made_from"]
    except RunError:
        return [f"{METADATA} says too little"]
    wanted = made_from(config, run)
    differing = [key for key in wanted if not isinstance(told, dict) or told.get(key) != wanted[key]]
    return [f"it was made with other settings ({', '.join(differing)} differ)"] if differing else []


def check_candidate(config: RunConfig, run: RunPaths) -> None:
    """Raise RunError unless a run's candidate is that of its training with this configuration, as it was written."""
    faults = candidate_faults(config, run)
    if faults:
        raise RunError(
            f"{run.candidate} is not the candidate of this training: {'; '.join(faults)}. Run nestune train --name "
            f"{config.name}, which makes it without training again."
        )


def read_strength(candidate: Path) -> dict[str, Any] | None:
    """How the strength of a candidate was chosen; None where none was."""
    path = candidate / STRENGTH
    return read_json(path, "Run nestune train again.") if path.exists() else None


def _lineage(config: RunConfig, run: RunPaths, parent: Path | None) -> list[dict[str, Any]]:
    """The tasks that the parent was trained on, and this one."""
    commit = git_commit().removesuffix("-dirty")
    task = task_of(run, config.data, config.retention, None if commit == "none" else commit)
    tasks = [*(earlier_tasks(parent) if parent is not None else []), task]
    return [task.model_dump(mode="json") for task in tasks]


def _compression(whole: Adapter, small: Adapter) -> dict[str, Any] | None:
    """What compression did to the effect of the module that it hit hardest; None where nothing was cut."""
    if small is whole:
        return None
    return {
        "rank_before": whole.rank,
        "rank": small.rank,
        "effective_rank": max(map(effective_rank, singular_values(whole).values())),
        "relative_error": relative_error(whole, small),
    }
