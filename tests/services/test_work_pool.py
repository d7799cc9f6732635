"""A deployment of `prefect.yaml` in a work pool, whose worker is started and asked how it is as the Dockerfile says."""

import json
import subprocess
from typing import Any

import pytest
import yaml
from tests.pipeline.conftest import ROOT
from tests.services.conftest import Prefect, configuration, end, free_port, until

pytestmark = pytest.mark.services

DEPLOYMENT = "/deployments/name/retrain/weekly-process"
PORT = "8080"  # in a container


def words(instruction: str) -> list[str]:
    """The command of the Dockerfile's CMD, or of its HEALTHCHECK."""
    lines = (ROOT / "Dockerfile").read_text().replace("\\\n", "").splitlines()
    (line,) = [line for line in lines if line.startswith(f"{instruction} ")]
    command: list[str] = json.loads(line[line.index("[") :])
    return command


def test_a_worker_runs_what_prefect_yaml_deploys_and_tells_how_it_is(prefect: Prefect) -> None:
    weekly = configuration("weekly", model={"backend": "torch"}, training={"steps": 2, "eval_every": None})
    (prefect.folder / "weekly.yaml").write_text(yaml.safe_dump(weekly))
    described: dict[str, Any] = yaml.safe_load((ROOT / "prefect.yaml").read_text())
    described["build"][0]["nestune.flows.steps.read_config"]["path"] = "weekly.yaml"
    (prefect.folder / "prefect.yaml").write_text(yaml.safe_dump(described))
    program, *rest = words("CMD")
    assert program == "prefect"
    pool = rest[rest.index("--pool") + 1]
    for command in (
        ("work-pool", "create", pool, "--type", "process"),
        ("--no-prompt", "deploy", "--name", "weekly-process", "--pool", pool),
    ):
        done = prefect.run("-m", "prefect", *command)
        assert done.returncode == 0, done.stdout + done.stderr

    port = str(free_port())
    prefect.environment["PREFECT_WORKER_WEBSERVER_PORT"] = port
    asked = [word.replace(PORT, port) for word in words("HEALTHCHECK")]
    assert any(port in word for word in asked)

    def is_well() -> bool:
        return subprocess.run(asked, capture_output=True, check=False).returncode == 0

    assert not is_well()
    worker = prefect.start("-m", "prefect", *rest, log="worker.log")
    try:
        until(is_well, "the worker to be well", worker)
        deployment = prefect.api.get(DEPLOYMENT).raise_for_status().json()
        made = prefect.api.post(
            f"/deployments/{deployment['id']}/create_flow_run", json={"state": {"type": "SCHEDULED"}}
        )
        flow_run = made.raise_for_status().json()["id"]
        ended = ("COMPLETED", "FAILED", "CRASHED")
        until(lambda: prefect.state(flow_run)["type"] in ended, "the flow run to end", worker)
        assert prefect.state(flow_run)["type"] == "COMPLETED", (prefect.folder / "worker.log").read_text()
    finally:
        end(worker)
    # From the champion on: each of its runs is named after the day.
    name = prefect.api.get(f"/flow_runs/{flow_run}").json()["name"]
    assert name.startswith("weekly-20")
    assert prefect.status(name)["state"] == "finished"
    assert not is_well()
