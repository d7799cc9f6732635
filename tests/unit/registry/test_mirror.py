"""What of the metrics files goes to MLflow, by which names, and when it was measured."""

import json
from pathlib import Path

import pytest
from run_folders import start_tracking

from nestune.config import RunConfig
from nestune.registry.mirror import StepMetrics, metrics_of_step, metrics_of_validation, recorded_metrics
from nestune.registry.tracking import TrackedRun
from nestune.runs import RunPaths

STEP = {
    "step": 3,
    "loss": 2.5,
    "tokens": 7,
    "learning_rate": 1e-4,
    "grad_norm": 0.5,
    "step_time_s": 0.1,
    "tokens_per_s": 80.0,
    "due": [0],
    "update_counts": [3, 1],
}
OF_STEP = {
    "train/loss": 2.5,
    "train/learning_rate": 1e-4,
    "train/grad_norm": 0.5,
    "train/tokens_per_s": 80.0,
    "tiers/updates_0": 3,
    "tiers/updates_1": 1,
}
VALIDATION = {"step": 3, "valid_loss": 1.25, "tokens": 9, "best": True}


def write(path: Path, *lines: object, end: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + end)


def test_a_line_has_the_same_names_whether_it_is_sent_live_or_from_the_files(tmp_path: Path) -> None:
    write(tmp_path / "train_metrics.jsonl", STEP | {"time": 1000.5})
    write(tmp_path / "eval_metrics.jsonl", VALIDATION | {"time": 1001.5})
    assert (metrics_of_step(STEP), metrics_of_validation(VALIDATION)) == (OF_STEP, {"train/valid_loss": 1.25})
    assert list(recorded_metrics(tmp_path, 0.0)) == [
        StepMetrics(3, 1000.5, OF_STEP),
        StepMetrics(3, 1001.5, {"train/valid_loss": 1.25}),
    ]


@pytest.mark.parametrize("end", ['{"step": 4, "loss"', '{"step": 4}', "\x00\x00\x00", "\n"])
def test_a_line_that_a_killed_process_left_half_written_is_no_line(tmp_path: Path, end: str) -> None:
    write(tmp_path / "train_metrics.jsonl", STEP, end=end)
    assert [metrics.step for metrics in recorded_metrics(tmp_path, 0.0)] == [3]


def test_without_files_nothing_is_recorded(tmp_path: Path) -> None:
    assert list(recorded_metrics(tmp_path / "none", 0.0)) == []


def test_a_line_that_does_not_tell_its_time_counts_as_measured_when_it_is_said_to_be(tmp_path: Path) -> None:
    write(tmp_path / "train_metrics.jsonl", STEP, STEP | {"step": 4, "time": 7.0})
    assert [metrics.time_s for metrics in recorded_metrics(tmp_path, 5.0)] == [5.0, 7.0]


def test_what_an_earlier_process_recorded_comes_before_what_this_one_measures(
    config: RunConfig, tmp_path: Path
) -> None:
    run = RunPaths(tmp_path / "run")
    write(run.metrics / "train_metrics.jsonl", *(STEP | {"step": step} for step in range(1, 4)))
    tracked = TrackedRun(config, run, {}, goes_on=True)
    for step in range(4, 7):
        tracked.log_metrics(step, metrics_of_step(STEP))
    tracked.finish()
    assert tracked.mlflow_run is not None
    history = tracked.mlflow_run.client.get_metric_history(tracked.mlflow_run.run_id, "train/loss")
    assert [metric.step for metric in history] == [1, 2, 3, 4, 5, 6]  # MLflow's order is that of the clock


def test_mlflow_shows_when_a_step_was_measured_and_not_when_it_was_sent(config: RunConfig, tmp_path: Path) -> None:
    tracked = TrackedRun(config, RunPaths(tmp_path / "run"), {})
    tracked.log_metrics(1, {"loss": 1.0}, time_s=1000.25)
    tracked.finish()
    assert tracked.mlflow_run is not None
    [metric] = tracked.mlflow_run.client.get_metric_history(tracked.mlflow_run.run_id, "loss")
    assert metric.timestamp == 1000250


def test_scores_that_are_registered_again_are_logged_once_unless_they_changed(
    config: RunConfig, tmp_path: Path
) -> None:
    run = start_tracking(config, RunPaths(tmp_path / "run"), {})

    def history(name: str) -> list[tuple[int, float]]:
        return [(metric.step, metric.value) for metric in run.client.get_metric_history(run.run_id, name)]

    for _ in range(2):
        run.log_scores(20, {"evaluation/loss": 0.5, "evaluation/exact_match": 0.75})
    run.log_scores(20, {"evaluation/loss": 0.25, "evaluation/exact_match": 0.75})
    assert history("evaluation/loss") == [(20, 0.5), (20, 0.25)]
    assert history("evaluation/exact_match") == [(20, 0.75)]
    assert run.client.get_run(run.run_id).data.metrics["evaluation/exact_match"] == 0.75
