"""`nestune train --resume`: what goes on after a checkpoint ends as what was never interrupted."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.pipeline.conftest import Configured

from nestune import cli
from nestune.files import SEAL, sha256_file

# Gradients of open windows, dropout, replayed rows and texts: all that a training must remember or draw anew.
BLOCKS: dict[str, dict[str, Any]] = {
    "lora": {"dropout": 0.1},
    "tiers": {"update_every": [1, 2, 3], "inactive_gradients": "accumulate"},
    "retention": {"kl": {"every": 2, "replayed": True, "self_written": {"texts": 11, "max_tokens": 20}}, "l2": 1e-4},
    "training": {"schedule": "constant", "steps": 8, "eval_every": 2, "checkpoint_every": 4},
}
FILES = ("adapter_model.safetensors", "training_state.safetensors")


def nestune(command: str, path: Path, *options: str) -> int:
    return cli.main([command, "--config", str(path), *options])


def prepared(configured: Configured, name: str) -> Path:
    path = configured(**BLOCKS)
    for command in ("validate", "tiers"):
        assert nestune(command, path, "--name", name) == 0
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file but for what the clock says."""
    told = [json.loads(line) for line in path.read_text().splitlines()]
    clocks = ("step_time_s", "tokens_per_s", "time")
    return [{key: value for key, value in line.items() if key not in clocks} for line in told]


def hashes(folder: Path) -> dict[str, str]:
    """The files of a run but for what tells who is, or was, at work on it."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in (".lock", "state.json")]
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in files}


def steps_tracked(run: Path) -> list[list[int]]:
    """The steps of which MLflow has the loss, and the validation loss."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{Path('mlflow/mlflow.db').absolute()}")
    run_id = json.loads((run / "tracking.json").read_text())["run_id"]
    names = ("train/loss", "train/valid_loss")
    return [[metric.step for metric in client.get_metric_history(run_id, name)] for name in names]


def test_four_steps_and_four_more_equal_eight_and_are_one_tracked_run(
    configured: Configured, capsys: pytest.CaptureFixture[str]
) -> None:
    path = prepared(configured, "whole")
    assert nestune("train", path, "--name", "whole") == 0
    prepared(configured, "parts")
    assert nestune("train", path, "--name", "parts", "--set", "training.steps=4") == 0
    whole, parts = Path("runs/whole"), Path("runs/parts")
    tracking = (parts / "tracking.json").read_bytes()
    capsys.readouterr()
    assert nestune("train", path, "--name", "parts", "--resume") == 0
    shown = capsys.readouterr()
    assert "went on after step 4" in shown.out
    assert "steps: 8, updates of each tier: 8 / 4 / 2" in shown.out
    backend = next(line.strip() for line in shown.out.splitlines() if "backend: " in line)
    assert f"{backend}\ngoing on after step 4, from runs/parts/checkpoints/final\nstep 5/8" in shown.err

    for checkpoint in ("best", "final", "checkpoint_0000004", "checkpoint_0000008"):
        for file in FILES:
            ours, expected = (sha256_file(run / "checkpoints" / checkpoint / file) for run in (parts, whole))
            assert ours == expected, (checkpoint, file)
    for file in ("train_metrics.jsonl", "eval_metrics.jsonl"):
        assert lines(parts / "metrics" / file) == lines(whole / "metrics" / file)
    assert ["kl" in line for line in lines(whole / "metrics" / "train_metrics.jsonl")] == [False, True] * 4
    texts = json.loads((whole / "metrics" / "texts.json").read_text())
    assert (texts["held"], texts["measuring"]) == (11, 2)
    assert texts["mentioned"].keys() == {"new_task", "covered", "uncovered", "skill"}
    assert (parts / "metrics" / "texts.json").read_bytes() == (whole / "metrics" / "texts.json").read_bytes()

    assert (parts / "tracking.json").read_bytes() == tracking
    assert steps_tracked(parts) == [[1, 2, 3, 4, 5, 6, 7, 8], [2, 4, 6, 8]]

    before = hashes(parts)
    assert nestune("train", path, "--name", "parts", "--resume", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["steps"], result["went_on_after"], result["update_counts"]) == (8, 8, [8, 4, 2])
    assert hashes(parts) == before


def test_a_run_that_cannot_go_on_says_why_and_keeps_what_it_has(
    configured: Configured, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = (project / "data" / "new_facts" / "train.jsonl").read_text().splitlines(keepends=True)
    train = project / "train.jsonl"
    train.write_text("".join(rows))
    run, path = Path("runs/demo-nestune"), configured(**BLOCKS, data={"train": str(train)})

    def refused(*options: str, code: int) -> str:
        before = hashes(run)
        assert nestune("train", path, "--resume", *options) == code
        assert hashes(run) == before
        return capsys.readouterr().err

    for command in ("validate", "tiers"):
        assert nestune(command, path) == 0
    assert "no checkpoint in runs/demo-nestune/checkpoints to go on from" in refused(code=1)
    assert nestune("train", path, "--set", "training.steps=4") == 0
    assert "training.seed was 0, now 7" in refused("--set", "training.seed=7", code=2)
    assert "pass one of the two" in refused("--force", code=2)

    train.write_text("".join(rows[1:]))
    assert nestune("validate", path) == 0
    assert "holds other rows than runs/demo-nestune/checkpoints/final was trained on" in refused(code=1)
    train.write_text("".join(rows))
    fewer_measured = ["--set", "data.retention={}"]
    assert nestune("validate", path, *fewer_measured) == 0
    (run / "tracking.json").unlink()
    assert nestune("train", path, "--resume", *fewer_measured) == 0
    # Its MLflow run was gone, so there is a new one, which has the steps before as well.
    assert steps_tracked(run) == [[1, 2, 3, 4, 5, 6, 7, 8], [2, 4, 6, 8]]


def test_a_training_that_was_ended_early_stays_ended(
    configured: Configured, capsys: pytest.CaptureFixture[str]
) -> None:
    # No fall of the loss is ever as large as min_delta, so only the first validation counts as an improvement.
    stopping = {"steps": 50, "checkpoint_every": 2, "early_stopping": {"patience": 2, "min_delta": 100.0}}
    run, path = Path("runs/demo-nestune"), configured(**BLOCKS | {"training": BLOCKS["training"] | stopping})
    for command in ("validate", "tiers", "train"):
        assert nestune(command, path) == 0
    before = hashes(run)
    assert nestune("train", path, "--resume") == 0
    assert "training had ended at step 6 already: nothing was trained" in capsys.readouterr().out
    assert hashes(run) == before

    # As it was killed after its last checkpoint, and before the final one.
    shutil.rmtree(run / "checkpoints" / "final")
    assert nestune("train", path, "--resume") == 0
    after = hashes(run)
    assert {name for name in before if before[name] != after[name]} == {
        # The checkpoint of that step is written again, as it may have been lost on the way.
        *(f"checkpoints/{name}/{file}" for name in ("final", "checkpoint_0000006") for file in ("metadata.json", SEAL)),
        "manifest.json",
    }
