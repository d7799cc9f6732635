"""A training that is killed and started again ends as one that never was, to the bit; `benchmarks/kill.py` has more."""

import importlib
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.pipeline.conftest import ROOT

pytest.importorskip("torch")

sys.path.append(str(ROOT / "benchmarks"))
kill = importlib.import_module("kill")
killing = importlib.import_module("killing")

STEPS, EVAL_EVERY, VALID_BATCHES, MICRO_BATCHES = 12, 3, 3, 2
FORWARD = "nestune.backends.torch_backend:TorchBackend._states_of"
STEP = "nestune.backends.torch_backend:TorchBackend.train_step"
BEST, ROTATING = "best in place of best", "periodic, rotating"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Steps 4, 8, 12 have a checkpoint, every third a validation; tiers move every step, every second, every third."""
    with killing.workplace(tmp_path_factory.mktemp("kills"), "torch", STEPS) as made:
        yield made


def lines(run: Path, file: str) -> list[dict[str, Any]]:
    return killing.metrics_lines(run / "metrics" / file)  # type: ignore[no-any-return]


def operation(place: Any, where: str, kind: str, inside: str, which: int = 0) -> dict[str, int]:
    """An operation of the first save of its kind, as the run that was never killed came by it."""
    numbers = [op.number for op in place.operations if (op.place, op.kind) == (where, kind) and inside in op.path]
    first = numbers[: next((i for i in range(1, len(numbers)) if numbers[i] <= numbers[i - 1]), None)]
    return {where: first[which]}


def goes_on(place: Any, run: Path, after: str, **options: Any) -> str:
    """Start it again, and check that it ends as the one that was never killed; returns what it says."""
    ended = place.start(run, **options)
    assert ended.status == 0, ended.said
    assert f"going on after step {after}\n" in ended.said
    assert killing.differences(place, run) == []
    return str(ended.said)


def killed(place: Any, **where: Any) -> Path:
    run: Path = place.fresh()
    ended = place.start(run, **where)
    assert ended.killed, ended.said
    return run


def test_killed_at_operations_of_every_save_and_at_random_moments(place: Any) -> None:
    """Two of each save, and three moments."""
    generator = random.Random(1)
    wanted = {name: sorted(generator.sample(found, 2)) for name, found in kill.operations_of(place).items()}
    chains = kill.kill_at_operations(place, wanted, generator)
    chains += kill.kill_at_random(place, 3, generator, real_every=None)
    assert [fault for chain in chains for fault in chain.faults] == []
    kills = [kill for chain in chains for kill in chain.kills]
    assert len(kills) == 2 * len(kill.PLACES) + 3


def test_killed_inside_an_accumulation_window(place: Any) -> None:
    """Step 4 has a checkpoint, in which the gradient of step 4 waits for the slowest tier to move at step 6."""
    run = killed(place, call=STEP, number=6)
    assert [line["step"] for line in lines(run, "train_metrics.jsonl")] == [1, 2, 3, 4, 5]
    goes_on(place, run, "4, from runs/" + run.name + "/checkpoints/checkpoint_0000004")


def test_killed_between_two_micro_batches_of_a_step(place: Any) -> None:
    run = killed(place, call=FORWARD, number=4 * MICRO_BATCHES + VALID_BATCHES + 2)
    assert [line["step"] for line in lines(run, "train_metrics.jsonl")] == [1, 2, 3, 4]
    goes_on(place, run, "4, from runs/" + run.name + "/checkpoints/checkpoint_0000004")


def test_killed_between_two_batches_of_a_validation(place: Any) -> None:
    run = killed(place, call=FORWARD, number=6 * MICRO_BATCHES + VALID_BATCHES + 2)
    assert len(lines(run, "train_metrics.jsonl")) == 6
    assert [line["step"] for line in lines(run, "eval_metrics.jsonl")] == [3]
    goes_on(place, run, "4, from runs/" + run.name + "/checkpoints/checkpoint_0000004")


def test_killed_while_an_old_checkpoint_is_deleted(place: Any) -> None:
    """Some of its files are gone by then."""
    run = killed(place, operations=operation(place, ROTATING, "delete", "checkpoints/checkpoint_0000004/", which=2))
    half_deleted = [*(run / "checkpoints" / "checkpoint_0000004").iterdir()]
    assert 0 < len(half_deleted) < 6
    assert "a checkpoint is broken and is not used" in goes_on(
        place, run, "12, from runs/" + run.name + "/checkpoints/best"
    )


def test_killed_between_the_two_renames_of_a_replacement(place: Any) -> None:
    run = killed(place, operations=operation(place, BEST, "rename", "", which=-1))
    checkpoints = run / "checkpoints"
    assert not (checkpoints / "best").exists()
    assert (checkpoints / ".best.old").exists()
    goes_on(place, run, "4, from runs/" + run.name + "/checkpoints/checkpoint_0000004")


def test_killed_after_the_last_checkpoint_its_manifest_and_its_tracked_run_are_ended(place: Any) -> None:
    run = killed(place, operations=operation(place, "end", "write", "manifest.json"))
    assert "train" not in json.loads((run / "manifest.json").read_text())
    ended = place.start(run)
    assert ended.status == 0, ended.said
    assert "training had ended at step 12 already" in ended.said
    assert killing.differences(place, run) == []

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{place.folder / 'mlflow' / 'mlflow.db'}")
    run_id = json.loads((run / "tracking.json").read_text())["run_id"]
    assert client.get_run(run_id).info.status == "FINISHED"
    assert [metric.step for metric in client.get_metric_history(run_id, "train/loss")] == [*range(1, STEPS + 1)]


def test_a_machine_that_goes_down_cuts_files_that_were_not_synced(place: Any) -> None:
    """The weights of the new best, and lines of the metrics: what was half-written is written again."""
    where = operation(place, BEST, "fsync", "adapter_model.safetensors")
    run = killed(place, operations=where, torn=3)
    whole = (place.reference / "checkpoints" / "best" / "adapter_model.safetensors").stat().st_size
    (cut,) = (run / "checkpoints").glob(".best.*.tmp/.adapter_model.safetensors.*.tmp")
    assert cut.stat().st_size < whole
    goes_on(place, run, "4, from runs/" + run.name + "/checkpoints/checkpoint_0000004")


def test_the_clock_goes_back_by_a_day_between_two_starts(place: Any) -> None:
    run = killed(place, call=STEP, number=6)
    goes_on(place, run, "4, from runs/" + run.name + "/checkpoints/checkpoint_0000004", clock_s=-86400.0)
    written = {
        name: json.loads((run / "checkpoints" / name / "metadata.json").read_text())["timestamp"]
        for name in ("checkpoint_0000012", "checkpoint_0000008")
    }
    reference = json.loads((place.reference / "checkpoints" / "final" / "metadata.json").read_text())["timestamp"]
    assert all(timestamp < reference for timestamp in written.values())
