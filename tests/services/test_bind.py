"""The pages that `make ui` and `make prefect` start are for this machine only."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.services

ROOT = Path(__file__).parents[2]
PATIENCE_S = 300
# As /proc/net/tcp and tcp6 write 127.0.0.1 and ::1.
LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
LISTENS = "0A"


def command_of(target: str) -> list[str]:
    """What a target of the Makefile runs, on the Python that runs the tests."""
    command = ["make", "--no-print-directory", "-n", "-o", "setup", target]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    program, *arguments = shlex.split(shown.stdout.strip().splitlines()[-1])
    return [sys.executable, "-m", Path(program).name, *arguments]


def listening(group: int) -> set[str]:
    """The addresses, as the kernel writes them, at which the processes of a group listen."""
    inodes = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(process.name)) == group:
                inodes |= {os.readlink(handle) for handle in (process / "fd").iterdir()}
        except OSError:
            continue  # it has ended meanwhile
    addresses = set()
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == LISTENS and f"socket:[{inode}]" in inodes:
                addresses.add(local.partition(":")[0])
    return addresses


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "mlflow").mkdir()
    return tmp_path


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/net")
@pytest.mark.parametrize("target", ["ui", "prefect"])
def test_only_this_machine_reaches_the_pages(target: str, home: Path) -> None:
    environment = os.environ | {"PREFECT_HOME": str(home / "prefect"), "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (home / "log").open("wb") as log:
        server = subprocess.Popen(
            command_of(target), cwd=home, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not (found := listening(server.pid)) and time.monotonic() < deadline and server.poll() is None:
            time.sleep(1)
        time.sleep(3)  # for what else it may open
        found |= listening(server.pid)
        assert found, (home / "log").read_text()
        assert found <= LOOPBACK
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
