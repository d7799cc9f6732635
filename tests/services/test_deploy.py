"""`nestune deploy`: one process of a name, which ends whole when asked to, and what is gone on with afterwards."""

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import yaml
from tests.services.conftest import Prefect, configuration, end, until

from nestune.config import RegistryConfig
from nestune.registry.promotion import history_of

pytestmark = pytest.mark.services

COMMAND = ("-m", "nestune.cli", "deploy", "--config", "weekly.yaml", "--cron", "0 3 * * 1")
DEPLOYMENT = "/deployments/name/retrain/weekly"
STEPS = 300


@contextmanager
def deployed(prefect: Prefect) -> Iterator["subprocess.Popen[bytes]"]:
    """The flow, served by a process of its own."""
    process = prefect.start(*COMMAND, log="deploy.log")
    try:
        until(lambda: "serving retrain/weekly" in said(prefect), "the flow to be served", process)
        yield process
    finally:
        end(process)


def said(prefect: Prefect) -> str:
    return (prefect.folder / "deploy.log").read_text()


def started(prefect: Prefect) -> str:
    """The id of a flow run of the deployment, with what the deployment asks for."""
    deployment = prefect.api.get(DEPLOYMENT).raise_for_status().json()["id"]
    return str(prefect.api.post(f"/deployments/{deployment}/create_flow_run", json={}).raise_for_status().json()["id"])


def terminated(prefect: Prefect, process: "subprocess.Popen[bytes]") -> None:
    """Ask it to end, as the system does that goes down."""
    process.send_signal(signal.SIGTERM)
    assert process.wait(300) == 0, said(prefect)
    assert "Traceback" not in said(prefect)
    assert prefect.api.get(DEPLOYMENT).json()["paused"]


def test_what_serves_ends_with_a_checkpoint_or_an_open_question_and_both_are_taken_up_again(prefect: Prefect) -> None:
    content = configuration(
        "weekly",
        model={"backend": "torch"},
        training={"steps": STEPS, "eval_every": None},
        registry={"registered_model": "weekly", "promote": "approve"},
    )
    (prefect.folder / "weekly.yaml").write_text(yaml.safe_dump(content))
    with deployed(prefect) as process:
        second = prefect.run(*COMMAND)
        assert second.returncode == 1
        assert f"the deployment retrain/weekly at {prefect.environment['PREFECT_API_URL']} is in use by process " in (
            second.stderr
        )
        assert str(process.pid) in second.stderr
        flow_run = started(prefect)
        until(lambda: prefect.progress(flow_run) is not None, "training to begin", process)
        terminated(prefect, process)
    name = prefect.api.get(f"/flow_runs/{flow_run}").json()["name"]
    status = prefect.status(name)
    assert (status["state"], status["stage"]) == ("stopped", "train")
    assert 0 < status["step"] < STEPS

    with deployed(prefect) as process:
        flow_run = started(prefect)
        until(lambda: prefect.state(flow_run)["type"] in ("PAUSED", "FAILED", "COMPLETED"), "the question", process)
        assert prefect.state(flow_run)["type"] == "PAUSED", said(prefect)
        assert f"went on after step {status['step']}" in said(prefect)
        terminated(prefect, process)

    registry = RegistryConfig(tracking_uri=f"sqlite:///{prefect.folder}/mlflow/mlflow.db", registered_model="weekly")
    assert history_of(registry).champion is None
    with deployed(prefect) as process:
        flow_run = started(prefect)
        until(lambda: prefect.state(flow_run)["type"] in ("PAUSED", "FAILED", "COMPLETED"), "the question", process)
        assert prefect.state(flow_run)["type"] == "PAUSED", said(prefect)
        answer = prefect.api.post(
            f"/flow_runs/{flow_run}/resume", json={"run_input": {"approve": True, "reason": "ok"}}
        )
        assert answer.json()["status"] == "ACCEPT"
        until(lambda: prefect.state(flow_run)["type"] in ("COMPLETED", "FAILED", "CRASHED"), "the end", process)
        assert prefect.state(flow_run)["type"] == "COMPLETED", said(prefect)
        assert history_of(registry).champion == "1"
        terminated(prefect, process)
