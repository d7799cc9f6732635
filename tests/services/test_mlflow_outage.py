"""A real MLflow server and a real training, each killed at will: every number arrives exactly once, in one run."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.pipeline.conftest import Configured, configured, project, world  # noqa: F401

from nestune import cli

pytestmark = pytest.mark.services

PATIENCE_S = 240
# Runs the command line with the patience of a test, and waits at some steps until a file allows the next one, so that
# a server has the time to start again before training is over.
TRAINER = """
import sys, time
from pathlib import Path
from nestune import cli
from nestune.registry import tracking
tracking.SEND_EVERY_S, tracking.RETRY_EVERY_S, tracking.TIME_SHARE = 0.1, 0.3, 0
gates = [int(step) for step in sys.argv[1].split(",") if step]
log_metrics = tracking.TrackedRun.log_metrics
def gated(self, step, values, *rest):
    log_metrics(self, step, values, *rest)
    while step in gates and not Path(f"gate-{step}").exists():
        time.sleep(0.05)
tracking.TrackedRun.log_metrics = gated
sys.exit(cli.main(sys.argv[2:]))
"""
TIMES = {"train/tokens_per_s"}


class Server:
    """`mlflow server` on loopback with a SQLite store, in processes of its own."""

    def __init__(self, home: Path) -> None:
        with socket.socket() as opened:
            opened.bind(("127.0.0.1", 0))
            self.port = opened.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.home = home
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        from urllib.error import URLError
        from urllib.request import urlopen

        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", self.port, "--workers", 1]
        command += ["--backend-store-uri", f"sqlite:///{self.home}/mlflow.db"]
        command += ["--artifacts-destination", self.home / "artifacts"]
        with (self.home / "server.log").open("ab") as log:
            self._process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log, start_new_session=True)

        def answers() -> bool:
            try:
                with urlopen(f"{self.uri}/health", timeout=5) as answer:
                    return bool(answer.status == 200)
            except (URLError, OSError):
                return False

        wait_for(answers, "the server answers", self._process)

    def kill(self) -> None:
        """End it and its workers at once, with whatever they are doing."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


def wait_for(condition: Callable[[], bool], what: str, process: subprocess.Popen[Any] | None) -> None:
    until = time.monotonic() + PATIENCE_S
    while not condition():
        assert process is None or process.poll() is None, f"ended before {what}"
        assert time.monotonic() < until, f"not within {PATIENCE_S} s: {what}"
        time.sleep(0.02)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    home = tmp_path / "server"
    home.mkdir()
    server = Server(home)
    yield server
    server.kill()


@pytest.fixture
def prepared(configured: Configured, server: Server) -> Path:  # noqa: F811
    """The configuration of a run of 240 steps that is ready to be trained."""
    training = {"steps": 240, "eval_every": 15, "checkpoint_every": 20}
    path = configured(training=training, registry={"tracking_uri": server.uri}, tiers={"update_every": [1, 2, 4]})
    for command in ("validate", "tiers"):
        assert cli.main([command, "--config", str(path)]) == 0
    return path


RUN = Path("runs/demo-nestune")


def start_training(path: Path, *options: str, gates: str = "") -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", TRAINER, gates, "train", "--config", str(path), *options]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def lines_of(name: str) -> list[dict[str, Any]]:
    path = RUN / "metrics" / name
    whole = path.read_text().rpartition("\n")[0] if path.exists() else ""
    return [json.loads(line) for line in whole.splitlines()]


def wait_for_steps(count: int, training: subprocess.Popen[str]) -> None:
    wait_for(lambda: len(lines_of("train_metrics.jsonl")) >= count, f"{count} steps", training)


def finished(training: subprocess.Popen[str]) -> str:
    said = training.communicate(timeout=PATIENCE_S)[0]
    assert training.returncode == 0, said
    return said


def check_mirrored(server: Server) -> None:
    """MLflow has one run, finished, with each number of the metrics files once."""
    from mlflow import MlflowClient

    expected: dict[str, list[tuple[int, float]]] = {}
    for line in lines_of("train_metrics.jsonl"):
        for key in ("loss", "learning_rate", "grad_norm", "tokens_per_s"):
            expected.setdefault(f"train/{key}", []).append((line["step"], line[key]))
        for tier, count in enumerate(line["update_counts"]):
            expected.setdefault(f"tiers/updates_{tier}", []).append((line["step"], count))
    expected["train/valid_loss"] = [(line["step"], line["valid_loss"]) for line in lines_of("eval_metrics.jsonl")]
    assert [step for step, _ in expected["train/loss"]] == list(range(1, 241))

    client = MlflowClient(server.uri)
    experiment = client.get_experiment_by_name("nestune")
    assert experiment is not None
    [run] = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert set(run.data.metrics) == set(expected)
    for name, numbers in expected.items():
        history = sorted((metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, name))
        assert [step for step, _ in history] == [step for step, _ in numbers], name
        if name not in TIMES:  # steps that are taken again take another time
            assert history == numbers, name


def test_a_server_that_is_killed_at_the_start_in_the_middle_and_at_the_end_has_each_metric_once(
    prepared: Path, server: Server
) -> None:
    training = start_training(prepared, gates="40,100,160")
    wait_for_steps(40, training)  # down at the start
    for gate in (40, 100, 160):
        server.start()
        Path(f"gate-{gate}").touch()
        wait_for_steps(gate + 25, training)
        server.kill()  # while steps go by: on a busy machine perhaps before the run was made
        if gate < 160:
            wait_for_steps(gate + 60, training)
    said = finished(training)  # down at the end
    assert "Training goes on" in said
    assert "will be sent by register or train" in said
    server.start()
    assert "training had ended at step 240 already" in finished(start_training(prepared, "--resume"))
    check_mirrored(server)


def test_a_training_that_is_killed_and_goes_on_has_each_metric_once_in_one_run(prepared: Path, server: Server) -> None:
    server.start()
    training = start_training(prepared)
    for kill_after in (50, 113):
        wait_for_steps(kill_after, training)
        training.kill()
        training.communicate()
        training = start_training(prepared, "--resume")
    finished(training)
    check_mirrored(server)


def test_both_killed_at_once_and_the_server_back_later_lose_and_double_nothing(prepared: Path, server: Server) -> None:
    server.start()
    training = start_training(prepared)
    wait_for_steps(70, training)
    server.kill()
    wait_for_steps(90, training)
    training.kill()
    training.communicate()
    training = start_training(prepared, "--resume", gates="150")
    wait_for_steps(150, training)
    server.start()
    Path("gate-150").touch()
    finished(training)
    check_mirrored(server)
