"""Run folders as the stages before `register` leave them."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from nestune.config import RunConfig
from nestune.files import read_json, sha256_file, write_json, write_text
from nestune.registry.mlflow_run import MlflowRun
from nestune.registry.tracking import TrackedRun
from nestune.runs import RunPaths, record_stage
from nestune.stages.evaluate import seal

EvaluatedRun = Callable[..., RunPaths]


def write_evaluated_run(
    run: RunPaths, adapter: Path, factor: float, passed: bool, champion_version: str | None
) -> None:
    """Write a run whose candidate is `adapter` with scaled weights, and the report of its evaluation."""
    shutil.copytree(adapter, run.candidate)
    scale_adapter(run.candidate, factor)
    write_json(run.tiers, {"sha256": "tiers-hash", "tiers": {}})
    write_text(run.config, "name: run\n")
    write_json(run.dataset / "report.json", {"sha256": "data-hash", "sets": {}, "outputs": {}})
    score = {"loss": 0.5, "tokens": 10, "exact_match": 0.75, "answers": 4}
    of_base = read_json(run.candidate / "metadata.json", "")["base"]
    report = {
        "name": "week.1",
        "base": of_base,
        "passed": passed,
        "reason": "learned +0.50 on new_task" if passed else "forgot: old -0.50",
        "compared_with": "champion" if champion_version else "parent",
        "champion_version": champion_version,
        "scores": {"candidate": {"new_task": score, "old": score | {"exact_match": None}}},
        "candidate": {"checkpoint": "best", "step": 20},
        "adapters": {"candidate": sha256_file(run.candidate / "adapter_model.safetensors")},
        "dataset": {"sha256": "data-hash", "rows": {"train": 9, "new_task": 4, "old": 6}},
    }
    write_json(run.evaluation / "report.json", report)
    seal(run.evaluation, run.candidate)
    record_stage(run, "evaluate", [run.candidate], [run.evaluation])


def scale_adapter(folder: Path, factor: float) -> None:
    """Give an adapter other weights, for both libraries."""
    from safetensors.numpy import load_file, save_file

    for file, form in (("adapter_model.safetensors", "pt"), ("adapters.safetensors", "mlx")):
        weights = folder / file
        scaled = {key: (value * factor).astype("float32") for key, value in load_file(weights).items()}
        save_file(scaled, weights, metadata={"format": form})


def start_tracking(config: RunConfig, run: RunPaths, tags: Mapping[str, str]) -> MlflowRun:
    """The MLflow run of a training that has begun."""
    opened = TrackedRun(config, run, tags).mlflow_run
    assert opened is not None
    return opened
