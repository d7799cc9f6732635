"""The published run of system A: 20 steps, batch 2, 9 training rows and 1 validation row of text."""

import json
from pathlib import Path
from typing import Any

import pytest

from nestune.config import parse_config
from nestune.runs import RunPaths
from nestune.stages.assign import assign
from nestune.stages.train import train
from nestune.stages.validate import validate


@pytest.fixture
def run(project: Path) -> RunPaths:
    texts = [f"Note {i}: the lamp in room {i} is lit after dusk." for i in range(10)]
    for name, part in (("train", texts[:9]), ("valid", texts[9:])):
        (project / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    config = parse_config(
        {
            "name": "published",
            "model": {"base": "demo/base"},
            "data": {"train": "train.jsonl", "valid": "valid.jsonl"},
            "tiers": {"strategy": "layer_depth", "update_every": [1, 2, 4]},
            "retention": {"recipe": "none"},
            "training": {
                "steps": 20,
                "batch_size": 2,
                "learning_rate": 1e-5,
                "warmup_steps": 100,
                "checkpoint_every": 10,
                "eval_every": 10,
            },
        }
    )
    run = RunPaths.of("published")
    validate(config, run)
    assign(config, run)
    train(config, run)
    return run


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_published_update_counts_at_every_step(run: RunPaths) -> None:
    steps = lines(run.metrics / "train_metrics.jsonl")
    assert [line["step"] for line in steps] == list(range(1, 21))
    counts = [line["update_counts"] for line in steps]
    # The publication counts steps from 0.
    assert [counts[step] for step in (15, 16, 17, 19)] == [[16, 8, 4], [17, 8, 4], [18, 9, 4], [20, 10, 5]]
    assert counts == [[t, t // 2, t // 4] for t in range(1, 21)]
    assert [line["learning_rate"] for line in steps] == pytest.approx([1e-5 * t / 100 for t in range(1, 21)])


def test_checkpoints_tell_what_they_are(run: RunPaths) -> None:
    assert sorted(folder.name for folder in run.checkpoints.iterdir()) == [
        "best",
        "checkpoint_0000010",
        "checkpoint_0000020",
        "final",
    ]
    metadata = json.loads((run.checkpoints / "final" / "metadata.json").read_text())
    assert metadata["step"] == 20
    assert metadata["tier_statistics"] == {"update_every": [1, 2, 4], "update_counts": [20, 10, 5]}
    assert metadata["config"]["training"]["batch_size"] == 2
    validations = lines(run.metrics / "eval_metrics.jsonl")
    assert [line["step"] for line in validations] == [10, 20]
    assert metadata["best_validation_loss"] == min(line["valid_loss"] for line in validations)
    best = json.loads((run.checkpoints / "best" / "metadata.json").read_text())
    assert best["step"] == min(validations, key=lambda line: line["valid_loss"])["step"]


def test_the_manifest_names_the_hash_of_everything_that_went_in_and_came_out(run: RunPaths) -> None:
    manifest = json.loads(run.manifest.read_text())
    assert set(manifest) == {"validate", "tiers", "train"}
    written = manifest["train"]["outputs"]
    assert "runs/published/checkpoints/best/adapter_model.safetensors" in written
    from nestune.files import sha256_file

    assert {path: sha256_file(Path(path)) for path in written} == written
