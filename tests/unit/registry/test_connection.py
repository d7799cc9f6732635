"""The way to MLflow: failures are noticed within seconds, named, and tell no secret."""

import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nestune.config import RegistryConfig
from nestune.errors import ServiceError
from nestune.registry import connection
from nestune.registry.connection import connect, impatience, speaking_to, unrepeated

RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"


@pytest.fixture(scope="module", autouse=True)
def _mlflow_is_imported() -> None:
    """Its import takes seconds, which are not those that are measured."""
    import mlflow  # noqa: F401


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """Accepts connections, and never answers."""
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        opened.listen(16)
        yield opened


def failure_of(uri: str) -> tuple[str, float]:
    """What the user is told of an address that fails, and after how many seconds."""
    began = time.monotonic()
    with pytest.raises(ServiceError, match=r"correct registry\.tracking_uri") as raised:
        connect(RegistryConfig(tracking_uri=uri))
    return str(raised.value), time.monotonic() - began


def test_a_server_that_refuses_is_named_within_seconds(listener: socket.socket) -> None:
    uri = f"http://127.0.0.1:{listener.getsockname()[1]}"
    listener.close()
    told, seconds = failure_of(uri)
    assert told.startswith(f"MLflow at {uri} fails: ")
    assert seconds < 5


def test_a_server_that_accepts_and_never_answers_is_waited_for_once(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    told, seconds = failure_of(f"http://127.0.0.1:{listener.getsockname()[1]}")
    assert "timed out" in told.lower()
    assert 2 <= seconds < 4


def test_without_a_setting_of_the_users_the_wait_is_ten_seconds_and_nothing_is_repeated() -> None:
    with impatience():
        environment = {name: connection.os.environ[name] for name in (RETRIES, "MLFLOW_HTTP_REQUEST_TIMEOUT")}
    assert environment == {RETRIES: "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}


def test_a_name_that_nobody_has_is_named_within_seconds() -> None:
    told, seconds = failure_of("http://mlflow.invalid:5000")
    assert "mlflow.invalid" in told
    assert seconds < 10


def test_a_folder_that_nothing_can_be_made_in_is_named(tmp_path: Path) -> None:
    (tmp_path / "mlflow").write_bytes(b"a file where a folder is needed")
    told, seconds = failure_of(f"sqlite:///{tmp_path}/mlflow/mlflow.db")
    assert "mlflow" in told
    assert "the database is there, whole and writable" in told
    assert seconds < 5


def test_a_database_that_is_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").mkdir()
    assert "unable to open database file" in failure_of(f"sqlite:///{tmp_path}/mlflow.db")[0]


def test_a_disk_that_is_full_is_named_within_seconds(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: SQLite meets both as a write that fails."""
    code = (
        "import resource, signal, sys, time, mlflow\n"
        "from nestune.config import RegistryConfig\n"
        "from nestune.errors import ServiceError\n"
        "from nestune.registry.connection import connect\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))\n"
        "began = time.monotonic()\n"
        "try:\n"
        "    connect(RegistryConfig(tracking_uri=sys.argv[1]))\n"
        "except ServiceError as error:\n"
        "    print(error, time.monotonic() - began < 20)\n"
    )
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    done = subprocess.run([sys.executable, "-c", code, uri], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"MLflow at {uri} fails: "), done.stdout + done.stderr
    assert done.stdout.endswith(" True\n")


def test_a_database_that_is_broken_is_an_error_without_a_logged_traceback(
    registry: RegistryConfig, caplog: pytest.LogCaptureFixture
) -> None:
    client = connect(registry)
    database = Path(str(registry.tracking_uri).removeprefix("sqlite:///"))
    broken = sqlite3.connect(database)
    broken.execute("DROP TABLE runs")
    broken.commit()
    with pytest.raises(ServiceError, match="no such table"), speaking_to(str(registry.tracking_uri)):
        client.create_run("0")
    assert "Traceback" not in caplog.text
    assert caplog.records == []


@pytest.mark.parametrize("name", ["MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME"])
def test_no_message_tells_what_the_environment_says_to_log_in_with(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # A line end at the end of a token is refused with a message that quotes the token.
    monkeypatch.setenv(name, "geheim-4711\n")
    if name.endswith("USERNAME"):
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "geheim-0815")
    with pytest.raises(ServiceError) as raised:
        connect(RegistryConfig(tracking_uri="http://127.0.0.1:9"))
    assert "geheim" not in str(raised.value)
    shown = raised.value.__cause__
    assert shown is None or "geheim" not in str(shown)


def test_what_may_not_be_repeated_is_not_whatever_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RETRIES, "5")
    with unrepeated():
        assert connection.os.environ[RETRIES] == "0"
    assert connection.os.environ[RETRIES] == "5"
    monkeypatch.delenv(RETRIES)
    with unrepeated():
        assert connection.os.environ[RETRIES] == "0"
    assert RETRIES not in connection.os.environ
