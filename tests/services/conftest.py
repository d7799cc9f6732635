"""Real servers: Prefect's with a process that serves the flow, and one of S3's protocol."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from tests.pipeline.conftest import ROOT

from nestune.config import RunConfig
from nestune.files import read_json
from nestune.runs import RunPaths

PATIENCE_S = 400

S3_KEY, S3_SECRET = "nestune-key-id", "nestune-secret"


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

    def progress(self, flow_run: str) -> dict[str, Any] | None:
        """The artifact that shows how far the training of a flow run is; None where there is none yet."""
        chosen = {"artifacts": {"type": {"any_": ["progress"]}, "flow_run_id": {"any_": [flow_run]}}}
        found = self.api.post("/artifacts/filter", json=chosen).raise_for_status().json()
        return dict(found[0]) if found else None

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
    port = free_port()
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}",
        # A weekly schedule is played for more weeks than Prefect plans ahead.
        "PREFECT_SERVER_SERVICES_SCHEDULER_MIN_RUNS": "8",
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
        end(server)
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
        end(runner)


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


@contextmanager
def s3_server(folder: Path) -> Iterator[str]:
    """A server of S3's protocol whose buckets are the folders of a folder; its address. Keys: S3_KEY, S3_SECRET."""
    port = free_port()
    # Beside the interpreter: it came with a package, and the venv's commands need not be on the PATH.
    rclone = Path(sys.executable).with_name("rclone")
    command = [rclone, "serve", "s3", "--addr", f"127.0.0.1:{port}", "--auth-key", f"{S3_KEY},{S3_SECRET}", folder]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        until(lambda: _listens(port), "S3 to answer", server)
        yield f"http://127.0.0.1:{port}"
    finally:
        end(server)


def _listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def free_port() -> int:
    """A port of this machine at which nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def until(happened: Callable[[], bool], what: str, process: "subprocess.Popen[bytes] | None" = None) -> None:
    give_up_at = time.monotonic() + PATIENCE_S
    while not happened():
        assert process is None or process.poll() is None, f"a process ended while waiting for {what}"
        assert time.monotonic() < give_up_at, f"waited in vain for {what}"
        time.sleep(0.2)


def _answers(prefect: Prefect) -> bool:
    try:
        return prefect.api.get("/health").is_success
    except httpx.TransportError:
        return False


def end(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(timeout=45)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
