"""What the training stage leaves, beyond the published run: early stopping, checkpoints, parents, replay."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from tests.pipeline.conftest import Configured

from nestune import cli
from nestune.files import sha256_file

RUN = Path("runs/demo-nestune")


def train(path: Path, *overrides: str, name: str = "demo-nestune") -> None:
    flags = [flag for override in overrides for flag in ("--set", override)]
    for command in ("validate", "tiers", "train"):
        force = ["--force"] if command == "train" else []
        assert cli.main([command, "--config", str(path), "--name", name, *flags, *force]) == 0


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_early_stopping_ends_training_after_patience_validations_without_improvement(configured: Configured) -> None:
    # No fall of the loss is ever as large as min_delta, so only the first validation counts as an improvement.
    stopping = {"patience": 2, "min_delta": 100.0}
    train(configured(training={"steps": 50, "eval_every": 2, "early_stopping": stopping}))
    assert [line["step"] for line in lines(RUN / "metrics" / "eval_metrics.jsonl")] == [2, 4, 6]
    assert len(lines(RUN / "metrics" / "train_metrics.jsonl")) == 6
    assert json.loads((RUN / "checkpoints" / "final" / "metadata.json").read_text())["step"] == 6


def test_only_the_last_periodic_checkpoints_are_kept(configured: Configured) -> None:
    train(configured(training={"steps": 8, "checkpoint_every": 2, "keep_last": 2}))
    kept = sorted(folder.name for folder in (RUN / "checkpoints").glob("checkpoint_*"))
    assert kept == ["checkpoint_0000006", "checkpoint_0000008"]


def test_training_starts_from_the_parent_adapter(configured: Configured) -> None:
    path = configured()
    train(path)
    parent = load_file(RUN / "checkpoints" / "final" / "adapter_model.safetensors")
    hardly = ["training.optimizer=sgd", "training.learning_rate=1e-12", "training.steps=1"]
    for start in ("fresh", "continue"):
        train(path, *hardly, f"model.adapter={RUN}/checkpoints/final", f"retention.start={start}", name=start)
        child = load_file(Path(f"runs/{start}/checkpoints/final/adapter_model.safetensors"))
        assert child.keys() == parent.keys()
        for key, value in parent.items():
            # The ranks of a fresh adapter come behind those of the parent.
            ranks = value.shape[0 if "lora_A" in key else 1]
            of_parent = child[key][:ranks] if "lora_A" in key else child[key][:, :ranks]
            assert child[key].size == (2 if start == "fresh" else 1) * value.size
            np.testing.assert_allclose(of_parent, value, atol=1e-9)
    assert any(np.abs(value).max() > 0 for key, value in parent.items() if "lora_B" in key)


def test_an_adapter_as_mlx_lm_leaves_it_is_a_parent_in_training_and_evaluation(configured: Configured) -> None:
    path = configured()
    train(path)
    parent = shutil.copytree(RUN / "checkpoints" / "final", Path("of-mlx-lm"))
    (parent / "adapter_model.safetensors").unlink()
    (parent / "metadata.json").unlink()
    parent_set = f"model.adapter={parent}"
    train(path, parent_set, name="child")
    assert cli.main(["evaluate", "--config", str(path), "--name", "child", "--set", parent_set]) == 0
    report = json.loads(Path("runs/child/evaluation/report.json").read_text())
    assert report["adapters"]["parent"] == sha256_file(parent / "adapters.safetensors")


@pytest.mark.parametrize("accumulation", [1, 3])
def test_replayed_rows_join_every_step(configured: Configured, accumulation: int) -> None:
    path = configured(training={"steps": 6, "eval_every": None, "gradient_accumulation_steps": accumulation})

    def tokens_of_steps(*overrides: str) -> list[int]:
        train(path, *overrides)
        return [line["tokens"] for line in lines(RUN / "metrics" / "train_metrics.jsonl")]

    with_replay = tokens_of_steps()
    without = tokens_of_steps("retention.replay.files=[]")
    # 16 replayed rows bring at least one supervised token each.
    assert all(more >= fewer + 16 for more, fewer in zip(with_replay, without, strict=True))
