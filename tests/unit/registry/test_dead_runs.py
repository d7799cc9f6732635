"""What runs whose process died have left open is ended by whoever starts next."""

import json
import logging
import subprocess
import sys

import pytest

from nestune.config import RunConfig
from nestune.errors import ServiceError
from nestune.registry.connection import connect
from nestune.registry.tracking import TrackedRun
from nestune.run_state import RunState, crashed_runs, read_state
from nestune.runs import RunPaths
from nestune.stages.dead_runs import end_dead_runs

DIE = """
import os, sys
from nestune.run_state import owned, recorded
from nestune.runs import RunPaths
run = RunPaths.of(sys.argv[1])
with owned(run, "nestune train"), recorded(run, "train", sys.argv[2] or None):
    os.kill(os.getpid(), 9)
"""


def die(config: RunConfig, name: str, flow_run: str) -> str:
    """A run whose process was killed in training; the id of its MLflow run, which is shown as running."""
    assert subprocess.run([sys.executable, "-c", DIE, name, flow_run], check=False).returncode == -9
    tracked = TrackedRun(config, RunPaths.of(name), {})
    assert tracked.mlflow_run is not None
    assert status(config, tracked.mlflow_run.run_id) == "RUNNING"
    return tracked.mlflow_run.run_id


def status(config: RunConfig, run_id: str) -> str:
    return str(connect(config.registry).get_run(run_id).info.status)


@pytest.fixture(autouse=True)
def folder(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(str(tmp_path))


def test_mlflow_shows_no_dead_run_as_running_and_its_folder_says_that_it_crashed(config: RunConfig) -> None:
    run_id = die(config, "dead", "")
    end_dead_runs()
    assert status(config, run_id) == "KILLED"
    assert json.loads(RunPaths.of("dead").state.read_text())["state"] == "crashed"
    assert read_state(RunPaths.of("dead")).state == "crashed"


def test_a_part_of_a_flow_run_is_left_to_what_can_end_that(config: RunConfig) -> None:
    run_id = die(config, "dead", "5e0e3a4c-0000-4000-8000-000000000000")
    end_dead_runs()
    assert status(config, run_id) == "RUNNING"
    heard: list[RunState] = []
    end_dead_runs(heard.append)
    assert [state.flow_run for state in heard] == ["5e0e3a4c-0000-4000-8000-000000000000"]
    assert status(config, run_id) == "KILLED"
    end_dead_runs(heard.append)
    assert len(heard) == 1
    assert crashed_runs() == {}


def test_what_could_not_be_told_is_told_at_the_next_start(config: RunConfig, caplog: pytest.LogCaptureFixture) -> None:
    run_id = die(config, "dead", "5e0e3a4c-0000-4000-8000-000000000000")

    def unreachable(_: RunState) -> None:
        raise ServiceError("Prefect does not answer.")

    with caplog.at_level(logging.WARNING):
        end_dead_runs(unreachable)
    assert "Prefect does not answer. That run dead crashed is told at the next start." in caplog.text
    assert json.loads(RunPaths.of("dead").state.read_text())["state"] == "running"
    end_dead_runs(lambda _: None)
    assert status(config, run_id) == "KILLED"
