"""`nestune ui`: both servers, for this machine only; also on a real PostgreSQL, with artifacts in a server of S3."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
from mlflow import MlflowClient
from tests.pipeline.conftest import Configured, configured, project, world  # noqa: F401
from tests.services.conftest import PATIENCE_S, S3_KEY, S3_SECRET, free_port, s3_server

from nestune import cli

pytestmark = pytest.mark.services

ROOT = Path(__file__).parents[2]
POSTGRESQL = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
SAID = "Ctrl-C ends both."


def until(happened: Callable[[], bool], what: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    give_up_at = time.monotonic() + PATIENCE_S
    while not happened():
        assert process.poll() is None, f"ended before {what}: {log.read_text()}"
        assert time.monotonic() < give_up_at, f"waited in vain for {what}: {log.read_text()}"
        time.sleep(0.2)


@contextmanager
def pages(folder: Path, **variables: object) -> Iterator[tuple["subprocess.Popen[bytes]", int, int]]:
    """`nestune ui` in a folder, its ports of MLflow and Prefect."""
    mlflow, prefect = free_port(), free_port()
    environment = os.environ | {"PREFECT_HOME": str(folder / "home"), "MLFLOW_PORT": str(mlflow)}
    environment |= {"PREFECT_SERVER_API_PORT": str(prefect)} | {name: str(value) for name, value in variables.items()}
    log = folder / "ui.log"
    with log.open("wb") as file:
        command = [sys.executable, "-m", "nestune.cli", "ui"]
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=file, stderr=file)
    try:
        until(lambda: SAID in log.read_text(), "both servers to answer", process, log)
        yield process, mlflow, prefect
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(60)


@contextmanager
def postgresql(folder: Path) -> Iterator[int]:
    """A server of its own data folder, which everybody on this machine may use; its port."""
    binaries, port = POSTGRESQL[-1], free_port()
    place = Path(subprocess.check_output(["runuser", "-u", "postgres", "--", "mktemp", "-d"], text=True).strip())

    def as_postgres(*command: object) -> None:
        log = folder / "postgresql.log"
        with log.open("ab") as file:
            done = subprocess.run(
                ["runuser", "-u", "postgres", "--", *map(str, command)], cwd="/", stdout=file, stderr=file
            )
        assert done.returncode == 0, log.read_text()

    try:
        as_postgres(binaries / "initdb", "--pgdata", place / "data", "--auth", "trust", "--no-sync")
        options = f"-p {port} -k {place} -c listen_addresses=127.0.0.1"
        ctl = (binaries / "pg_ctl", "--pgdata", place / "data", "--log", place / "log", "--wait")
        as_postgres(*ctl, "--options", options, "start")
        try:
            for database in ("mlflow", "prefect"):
                as_postgres(binaries / "createdb", "--host", "127.0.0.1", "--port", port, database)
            yield port
        finally:
            as_postgres(*ctl, "--mode", "fast", "stop")
    finally:
        shutil.rmtree(place)


def test_only_this_machine_reaches_the_pages_and_ctrl_c_ends_both(tmp_path: Path) -> None:
    # What a script runs in its background ignores Ctrl-C, and so would all that is started from there.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pages(tmp_path) as (process, mlflow, prefect):
        family = psutil.Process(process.pid).children(recursive=True)
        listening = [
            connection.laddr
            for member in family
            for connection in member.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        ]
        assert {mlflow, prefect} <= {address.port for address in listening}
        assert {address.ip for address in listening} <= {"127.0.0.1", "::1"}
        again = subprocess.run(
            [sys.executable, "-m", "nestune.cli", "ui"],
            env=os.environ | {"MLFLOW_PORT": str(mlflow), "PREFECT_SERVER_API_PORT": str(prefect)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert again.returncode == 2
        assert f"port {mlflow} is taken" in again.stderr
        assert f"PREFECT_SERVER_API_PORT={prefect + 1}" in again.stderr
        client = MlflowClient(f"http://127.0.0.1:{mlflow}")
        run_id = client.create_run(client.create_experiment("kept")).info.run_id
        client.log_text(run_id, "of a run", "note.txt")
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_S) == 0
    assert not [member for member in family if member.is_running() and member.status() != psutil.STATUS_ZOMBIE]
    # What was logged to the server is there without it, too.
    without = MlflowClient(f"sqlite:///{tmp_path}/mlflow/mlflow.db")
    assert Path(without.download_artifacts(run_id, "note.txt")).read_text() == "of a run"


def test_a_server_that_cannot_start_is_told_with_what_it_said(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "nestune.cli", "ui"],
        env=os.environ
        | {
            "MLFLOW_PORT": str(free_port()),
            "PREFECT_SERVER_API_PORT": str(free_port()),
            "PREFECT_HOME": str(tmp_path / "home"),
            "PREFECT_SERVER_DATABASE_CONNECTION_URL": "nonsense://",
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "Prefect has ended" in done.stderr
    assert "Traceback" not in done.stderr.partition("It said last")[0]


@pytest.mark.skipif(not POSTGRESQL or os.geteuid() != 0, reason="needs Debian's postgresql, and root to start it")
def test_a_pipeline_on_postgresql_with_artifacts_in_s3(
    configured: Configured,  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path_factory.mktemp("servers")
    with ExitStack() as servers:
        database = servers.enter_context(postgresql(folder))
        (folder / "s3" / "artifacts").mkdir(parents=True)
        address = servers.enter_context(s3_server(folder / "s3"))
        _, mlflow, prefect = servers.enter_context(
            pages(
                folder,
                MLFLOW_BACKEND_STORE_URI=f"postgresql+psycopg://postgres@127.0.0.1:{database}/mlflow",
                PREFECT_SERVER_DATABASE_CONNECTION_URL=f"postgresql+asyncpg://postgres@127.0.0.1:{database}/prefect",
                MLFLOW_ARTIFACTS_DESTINATION="s3://artifacts",
                MLFLOW_S3_ENDPOINT_URL=address,
                AWS_ACCESS_KEY_ID=S3_KEY,
                AWS_SECRET_ACCESS_KEY=S3_SECRET,
            )
        )
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{mlflow}")
        path = configured(gate={"min_gain": 0.0, "max_drop": 1.0, "require_retention": False})
        flow = subprocess.run(
            [sys.executable, ROOT / "flows" / "retrain.py", "--config", path],
            env=os.environ
            | {"PREFECT_API_URL": f"http://127.0.0.1:{prefect}/api", "PREFECT_HOME": str(folder / "client")},
            capture_output=True,
            text=True,
        )
        assert flow.returncode == 0, flow.stdout + flow.stderr
        assert list((folder / "s3" / "artifacts").rglob("adapter_model.safetensors"))
        assert not Path("mlflow", "mlflow.db").exists()
        [flow_run] = httpx.post(f"http://127.0.0.1:{prefect}/api/flow_runs/filter", json={}, timeout=60).json()
        assert flow_run["state"]["type"] == "COMPLETED"
        assert cli.main(["versions"]) == 0
        assert cli.main(["evaluate", "--config", str(path), "--adapter", "models:/demo@champion"]) == 0
