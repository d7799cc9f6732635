"""Cancelling through a real Prefect server and runner, as its page does, and what becomes of flow runs that died."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.pipeline.conftest import ROOT
from tests.services.conftest import Prefect, configuration, end, until

from nestune.files import read_json, seal_faults, sha256_file
from nestune.runs import RunPaths
from nestune.training.checkpoints import NEEDED

pytestmark = pytest.mark.services

KILLED_AFTER_S = 30  # by the runner, after its SIGTERM
STEPS = 400
# What a flow run does that trains, as far as its folder tells.
WORK = """
import sys, time
from nestune.run_state import owned, recorded
from nestune.runs import RunPaths
run = RunPaths.of(sys.argv[1])
with owned(run, "Prefect flow run"), recorded(run, "train", sys.argv[2]):
    time.sleep(600)
"""
NEXT_START = """
from prefect import flow
from nestune.flows.flow_state import end_flow_run
from nestune.stages.dead_runs import end_dead_runs
flow(name="next")(lambda: end_dead_runs(end_flow_run))()
"""


def test_a_training_cancelled_in_prefect_is_kept_whole_and_the_next_flow_run_goes_on_with_it(served: Prefect) -> None:
    config = configuration("cut", training={"steps": STEPS, "eval_every": 50})
    run = served.paths("cut")
    cancelled = served.create(config)
    until(lambda: trained_steps(run) >= 3, "training to begin")
    until(lambda: served.progress(cancelled) is not None, "the progress to be shown")
    shown = served.progress(cancelled)
    assert shown is not None
    assert f" of {STEPS}" in shown["description"]
    assert "updates of each tier: " in shown["description"]
    until(lambda: (served.progress(cancelled) or shown)["data"] > shown["data"], "the progress to move")
    pid = served.noted("cut")["owner"]["pid"]
    asked = time.monotonic()
    served.cancel(cancelled)
    until(lambda: served.state(cancelled)["type"] == "CANCELLED", "the flow run to be cancelled")
    until(lambda: not Path(f"/proc/{pid}").exists(), "its process to end")
    assert time.monotonic() - asked < KILLED_AFTER_S
    until(lambda: "cancelled successfully" in served.state(cancelled)["message"], "the runner to have done with it")
    assert "Traceback" not in (served.folder / "runner.log").read_text()

    assert set(served.states(cancelled)[-2:]) == {"CANCELLED"}
    assert "CRASHED" not in served.states(cancelled)
    assert served.task_states(cancelled) == {"validate": "COMPLETED", "tiers": "COMPLETED", "train": "CANCELLED"}
    status = served.status("cut")
    assert (status["state"], status["stage"], status["flow_run"]) == ("stopped", "train", cancelled)
    assert "stopped on request (SIGTERM)" in status["reason"]
    [checkpoint] = run.checkpoints.glob("checkpoint_*")
    step = int(checkpoint.name.removeprefix("checkpoint_"))
    assert 0 < step == trained_steps(run) < STEPS
    assert seal_faults(checkpoint, NEEDED) == []
    assert leftovers(run) == []
    assert mlflow_status(served, run) == "KILLED"

    going_on = served.create(config)
    until(lambda: served.state(going_on)["type"] in ("COMPLETED", "FAILED", "CRASHED"), "the next flow run to end")
    assert served.state(going_on)["type"] == "COMPLETED", (served.folder / "runner.log").read_text()
    assert [line["step"] for line in lines(run.metrics / "train_metrics.jsonl")] == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines(run.metrics / "eval_metrics.jsonl")] == list(range(50, STEPS + 1, 50))
    assert served.status("cut")["state"] == "finished"
    assert mlflow_status(served, run) == "FINISHED"

    (served.folder / "whole.yaml").write_text(yaml.safe_dump(config | {"name": "whole"}))
    for command in ("validate", "tiers", "train"):
        done = served.run("-m", "nestune.cli", command, "--config", "whole.yaml")
        assert done.returncode == 0, done.stderr
    ours, expected = (
        [sha256_file(file) for file in sorted(served.paths(name).checkpoints.glob("*/*.safetensors"))]
        for name in ("cut", "whole")
    )
    assert len(ours) == 6  # adapter in two formats, and training state, of best and of final
    assert ours == expected


def test_a_second_flow_run_is_shown_as_waiting_and_goes_on_where_the_first_has_stopped(served: Prefect) -> None:
    (served.folder / "twice.yaml").write_text(
        yaml.safe_dump(configuration("twice", training={"steps": 200, "eval_every": None}))
    )
    command = (ROOT / "flows" / "retrain.py", "--config", "twice.yaml")
    run = served.paths("twice")
    first = served.start(*command, log="first.log")
    until(lambda: trained_steps(run) >= 3, "training to begin", first)
    second = served.start(*command, log="second.log")
    try:
        until(lambda: bool(waiting(served)), "the second flow run to wait", second)
        (flow_run,) = waiting(served)
        assert f"waits until process {first.pid} on " in flow_run["state"]["message"]
        assert flow_run["state"]["type"] == "RUNNING"

        assert served.run("-m", "nestune.cli", "stop", "twice").returncode == 0
        assert first.wait(60) == 3
        until(lambda: served.state(flow_run["id"])["name"] == "Running", "the second flow run to have its turn", second)
        assert second.wait(400) == 0, (served.folder / "second.log").read_text()
    finally:
        for process in (first, second):
            end(process)
    assert served.state(flow_run["id"])["type"] == "COMPLETED"
    assert "went on after step " in (served.folder / "second.log").read_text()
    assert [line["step"] for line in lines(run.metrics / "train_metrics.jsonl")] == list(range(1, 201))


def waiting(prefect: Prefect) -> list[dict[str, Any]]:
    """The flow runs that are shown as Waiting."""
    chosen = {"flow_runs": {"state": {"name": {"any_": ["Waiting"]}}}}
    return list(prefect.api.post("/flow_runs/filter", json=chosen).raise_for_status().json())


def test_an_evaluation_cancelled_in_prefect_ends_soon_and_leaves_nothing_half_written(served: Prefect) -> None:
    # A row at a time, and long answers: minutes of it.
    retention = {"retention": {"skill": "data/general/skill.jsonl"}}
    slow = {"batch_size": 1, "max_answer_tokens": 64}
    blocks = {"training": {"steps": 8, "eval_every": 4}, "data": retention}
    run = served.paths("scored")
    cancelled = served.create(configuration("scored", **blocks, evaluation=slow))
    until(lambda: served.noted("scored").get("stage") == "evaluate", "the evaluation to begin")
    pid = served.noted("scored")["owner"]["pid"]
    time.sleep(5)
    asked = time.monotonic()
    served.cancel(cancelled)
    until(lambda: served.state(cancelled)["type"] == "CANCELLED", "the flow run to be cancelled")
    until(lambda: not Path(f"/proc/{pid}").exists(), "its process to end")
    assert time.monotonic() - asked < KILLED_AFTER_S
    until(lambda: "cancelled successfully" in served.state(cancelled)["message"], "the runner to have done with it")

    assert "CRASHED" not in served.states(cancelled)
    status = served.status("scored")
    assert (status["state"], status["stage"]) == ("stopped", "evaluate")
    assert not run.evaluation.exists()
    assert leftovers(run) == []

    trained = sha256_file(run.checkpoints / "final" / "adapter_model.safetensors")
    going_on = served.create(configuration("scored", **blocks))
    until(lambda: served.state(going_on)["type"] in ("COMPLETED", "FAILED", "CRASHED"), "the next flow run to end")
    assert served.state(going_on)["type"] == "COMPLETED", (served.folder / "runner.log").read_text()
    assert sha256_file(run.checkpoints / "final" / "adapter_model.safetensors") == trained
    assert len(lines(run.metrics / "train_metrics.jsonl")) == 8
    assert (run.evaluation / "report.json").exists()


def test_flow_runs_of_killed_processes_are_ended_by_the_next_start_and_others_are_left_alone(prefect: Prefect) -> None:
    flow = prefect.api.post("/flows/", json={"name": "retrain"}).raise_for_status().json()["id"]
    running = {"type": "RUNNING", "name": "Running"}
    names = ("dead", "alive", "anew")
    ids = {}
    for name in names:
        created = prefect.api.post("/flow_runs/", json={"flow_id": flow, "name": name, "state": running})
        assert created.is_success, created.text
        ids[name] = created.json()["id"]
    processes = {}
    try:
        for name in names:
            processes[name] = prefect.start("-c", WORK, name, ids[name], log=f"{name}.log")
            until(lambda name=name: prefect.noted(name) != {}, f"{name} to begin", processes[name])
        for name in ("dead", "anew"):
            processes[name].kill()
            processes[name].wait()
        assert prefect.status("dead")["state"] == "crashed"
        assert prefect.state(ids["dead"])["type"] == "RUNNING"
        # Prefect has begun this one again, after what its folder tells.
        time.sleep(6)
        again = {"state": running, "force": True}
        prefect.api.post(f"/flow_runs/{ids['anew']}/set_state", json=again).raise_for_status()

        done = prefect.run("-c", NEXT_START)
        assert done.returncode == 0, done.stderr
        assert {name: prefect.state(ids[name])["type"] for name in names} == {
            "dead": "CRASHED",
            "alive": "RUNNING",
            "anew": "RUNNING",
        }
        assert f"process {processes['dead'].pid} on" in prefect.state(ids["dead"])["message"]
        assert (prefect.noted("dead")["state"], prefect.noted("dead")["flow_run"]) == ("crashed", ids["dead"])
        assert prefect.status("alive")["state"] == "running"
    finally:
        for process in processes.values():
            process.kill()
            process.wait()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def trained_steps(run: RunPaths) -> int:
    path = run.metrics / "train_metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def leftovers(run: RunPaths) -> list[str]:
    """Hidden files and folders of a run but for its lock."""
    return [str(path) for path in run.root.rglob(".*") if path != run.lock]


def mlflow_status(prefect: Prefect, run: RunPaths) -> str:
    program = (
        "import sys; from mlflow import MlflowClient;"
        "print(MlflowClient('sqlite:///mlflow/mlflow.db').get_run(sys.argv[1]).info.status)"
    )
    done = prefect.run("-c", program, read_json(run.tracking, "")["run_id"])
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-1]
