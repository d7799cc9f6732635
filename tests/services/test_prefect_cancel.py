"""Cancelling through a real Prefect server and runner, as its page does, and what becomes of flow runs that died."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from tests.pipeline.conftest import ROOT

from nestune.config import RunConfig
from nestune.files import read_json, seal_faults, sha256_file
from nestune.runs import RunPaths
from nestune.training.checkpoints import NEEDED

pytestmark = pytest.mark.services

KILLED_AFTER_S = 30  # by the runner, after its SIGTERM
PATIENCE_S = 400
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
from flows.retrain import end_dead_runs, end_flow_run
flow(name="next")(lambda: end_dead_runs(end_flow_run))()
"""


@dataclass(frozen=True)
class Prefect:
    """A server, and the folder and environment in which flows run."""

    api: httpx.Client
    folder: Path
    environment: dict[str, str]

    def create(self, config: dict[str, Any]) -> str:
        """Have the deployment run a configuration; the id of the flow run."""
        deployment = self.api.get("/deployments/name/retrain/retrain").raise_for_status().json()
        created = self.api.post(
            f"/deployments/{deployment['id']}/create_flow_run", json={"parameters": {"config": config}}
        )
        return str(created.raise_for_status().json()["id"])

    def cancel(self, flow_run: str) -> None:
        """As the button of Prefect's page does."""
        state = {"type": "CANCELLING", "name": "Cancelling"}
        self.api.post(f"/flow_runs/{flow_run}/set_state", json={"state": state}).raise_for_status()

    def state(self, flow_run: str) -> dict[str, Any]:
        return dict(self.api.get(f"/flow_runs/{flow_run}").raise_for_status().json()["state"])

    def states(self, flow_run: str) -> list[str]:
        found = self.api.get("/flow_run_states/", params={"flow_run_id": flow_run}).raise_for_status().json()
        return [state["type"] for state in sorted(found, key=lambda state: state["timestamp"])]

    def task_states(self, flow_run: str) -> dict[str, str]:
        chosen = {"flow_runs": {"id": {"any_": [flow_run]}}}
        found = self.api.post("/task_runs/filter", json=chosen).raise_for_status().json()
        return {task["name"]: task["state_type"] for task in found}

    def run(self, *command: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *map(str, command)], cwd=self.folder, env=self.environment, capture_output=True, text=True
        )

    def start(self, *command: object, log: str) -> "subprocess.Popen[bytes]":
        with (self.folder / log).open("wb") as file:
            return subprocess.Popen(
                [sys.executable, *map(str, command)], cwd=self.folder, env=self.environment, stdout=file, stderr=file
            )

    def paths(self, name: str) -> RunPaths:
        return RunPaths(self.folder / "runs" / name)

    def noted(self, name: str) -> dict[str, Any]:
        """What the run's folder says of it."""
        path = self.paths(name).state
        return dict(read_json(path, "")) if path.exists() else {}

    def status(self, name: str) -> dict[str, Any]:
        done = self.run("-m", "nestune.cli", "status", name, "--json")
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))


@pytest.fixture(scope="module")
def prefect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prefect]:
    """A server on this machine with a home of its own."""
    folder = tmp_path_factory.mktemp("prefect")
    subprocess.run(
        [sys.executable, ROOT / "demo" / "world.py", "--out", folder / "data"], check=True, capture_output=True
    )
    (folder / "demo").mkdir()
    (folder / "demo" / "base").symlink_to(ROOT / "demo" / "base")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "PREFECT_HOME": str(folder / "home"),
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_RUNNER_POLL_FREQUENCY": "1",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    }
    here = Prefect(httpx.Client(base_url=environment["PREFECT_API_URL"], timeout=60), folder, environment)
    server = here.start("-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", port, log="server.log")
    try:
        until(lambda: _answers(here), "the server to answer", server)
        yield here
    finally:
        _end(server)
        here.api.close()


@pytest.fixture(scope="module")
def served(prefect: Prefect) -> Iterator[Prefect]:
    """The server, and a process that serves the flow."""
    entry = f"{ROOT / 'flows' / 'retrain.py'}:retrain"
    runner = prefect.start("-m", "prefect", "flow", "serve", entry, "--name", "retrain", log="runner.log")
    try:
        until(lambda: prefect.api.get("/deployments/name/retrain/retrain").is_success, "the flow to be served", runner)
        yield prefect
    finally:
        _end(runner)


def configuration(name: str, **blocks: dict[str, Any]) -> dict[str, Any]:
    """The demo's, without retention sets and with a gate that lets all pass."""
    content = yaml.safe_load((ROOT / "configs" / "demo_nestune.yaml").read_text())
    content["name"] = name
    content["data"]["retention"] = {}
    content["tiers"] = {"update_every": [1, 2, 4]}
    content["retention"] = {"recipe": "none", "replay": {"files": "data/general/replay.jsonl", "rows_per_step": 16}}
    content["gate"] = {"min_gain": 0.0, "max_drop": 1.0, "require_retention": False}
    for block, values in blocks.items():
        content[block] = content.get(block, {}) | values
    return RunConfig.model_validate(content).model_dump(mode="json")


def test_a_training_cancelled_in_prefect_is_kept_whole_and_the_next_flow_run_goes_on_with_it(served: Prefect) -> None:
    config = configuration("cut", training={"steps": STEPS, "eval_every": 50})
    run = served.paths("cut")
    cancelled = served.create(config)
    until(lambda: trained_steps(run) >= 3, "training to begin")
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


def until(happened: Callable[[], bool], what: str, process: "subprocess.Popen[bytes] | None" = None) -> None:
    give_up_at = time.monotonic() + PATIENCE_S
    while not happened():
        assert process is None or process.poll() is None, f"a process ended while waiting for {what}"
        assert time.monotonic() < give_up_at, f"waited in vain for {what}"
        time.sleep(0.2)


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


def _answers(prefect: Prefect) -> bool:
    try:
        return prefect.api.get("/health").is_success
    except httpx.TransportError:
        return False


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(timeout=45)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
