"""`dvc repro` on a copy of the project: all stages, then none, then only what a changed parameter concerns."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.pipeline.dvc_projects import change, copy_project, dvc

STAGES = ["validate", "tiers", "train", "evaluate", "register"]
RUN = "runs/demo-nestune"


@pytest.fixture
def copy(tmp_path: Path, world: Path) -> Path:
    """A copy of the project with a training of few steps."""
    copy_project(tmp_path, world)
    change(tmp_path, "steps: 500", "steps: 12")
    change(tmp_path, "no_old_data", "no_old_data\n  kl: {self_written: {texts: 11, max_tokens: 24}}")
    return tmp_path


def stages_run(output: str) -> list[str]:
    return [name for name in STAGES if f"Running stage '{name}'" in output]


def test_repro_runs_what_has_changed_and_nothing_else(copy: Path) -> None:
    assert "modified" not in dvc(copy, "status", "data.dvc")  # generated anew, and still the bytes that are tracked
    assert stages_run(dvc(copy, "repro")) == STAGES
    again = dvc(copy, "repro")
    assert stages_run(again) == []
    assert "Data and pipelines are up to date" in again
    adapter = (copy / RUN / "checkpoints/final/adapter_model.safetensors").read_bytes()

    metrics = json.loads(dvc(copy, "metrics", "show", "--json"))
    shown = metrics[""]["data"][f"{RUN}/evaluation/metrics.json"]["data"]
    assert shown == json.loads((copy / RUN / "evaluation/metrics.json").read_text())
    dvc(copy, "plots", "show")
    page = (copy / "dvc_plots" / "index.html").read_text()
    assert "train_loss" in page
    assert "valid_loss" in page

    change(copy, "learning_rate: 2.0e-3", "learning_rate: 1.0e-3")
    assert stages_run(dvc(copy, "repro")) == ["train", "evaluate", "register"]
    assert (copy / RUN / "checkpoints/final/adapter_model.safetensors").read_bytes() != adapter

    # What DVC has in its cache it takes from there; but a version is registered, never taken from a cache.
    change(copy, "learning_rate: 1.0e-3", "learning_rate: 2.0e-3")
    assert stages_run(dvc(copy, "repro")) == ["register"]
    assert (copy / RUN / "checkpoints/final/adapter_model.safetensors").read_bytes() == adapter

    # The first steps are what importances are measured on, and their number decides whether a slow tier ever moves.
    for old, new in (("batch_size: 16", "batch_size: 8"), ("steps: 12", "steps: 3")):
        change(copy, old, new)
        assert set(json.loads(dvc(copy, "status", "--json"))) == {"tiers", "train"}
        change(copy, new, old)


def test_importances_are_measured_once_however_often_dvc_runs_the_stage(copy: Path) -> None:
    change(copy, "layer_depth_reversed", "parameter_importance\n  importance: {steps: 2}")
    assert "importance: measured, 2 steps" in dvc(copy, "repro", "tiers")
    assert "importance: taken from the earlier pass, 2 steps" in dvc(copy, "repro", "--force", "--single-item", "tiers")


def test_while_another_process_has_dvc_s_lock_nestune_works_and_dvc_waits_when_it_is_told_to(copy: Path) -> None:
    hold = "import sys; from dvc.repo import Repo\nwith Repo().lock: print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", hold]
    with subprocess.Popen(command, cwd=copy, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        config = ["--config", "configs/demo_nestune.yaml"]
        subprocess.run([sys.executable, "-m", "nestune.cli", "validate", *config], cwd=copy, check=True)
        waiting = subprocess.Popen(
            [sys.executable, "-m", "dvc", "--wait-for-lock", "status"], cwd=copy, stdout=subprocess.PIPE, text=True
        )
        # Without being told to, it gives up after three seconds.
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(timeout=6)
        holder.communicate("")
    told = waiting.communicate(timeout=60)[0]
    assert waiting.returncode == 0, told
    assert "train:" in told
