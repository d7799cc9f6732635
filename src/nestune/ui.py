"""The pages: MLflow's and Prefect's servers on this machine, begun and ended together.

Ports, databases and the place of artifacts are told by the variables of MLflow and Prefect themselves.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path

from nestune.errors import ConfigError, ServiceError
from nestune.registry.connection import DEFAULT_TRACKING_URI, OF_TRAINING, artifact_location

HOST = "127.0.0.1"
HOME = Path("mlflow")
# Servers of one person on one machine: a process each, and no workers for MLflow's jobs, which nothing here asks for.
MLFLOW_DEFAULTS = {"MLFLOW_WORKERS": "1", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
END_AFTER_S = 30.0
LOOK_EVERY_S = 0.2
LINES_OF_A_LOG = 12


@dataclass(frozen=True)
class Server:
    """A server to be: what starts it, where it answers that it is well, and what it says in which file."""

    title: str
    port_variable: str
    port: int
    command: Sequence[str]
    health: str
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def address(self) -> str:
        """Where its pages are."""
        return f"http://{HOST}:{self.port}"

    def answers(self) -> bool:
        """Whether it answers and is well."""
        asked = HTTPConnection(HOST, self.port, timeout=5)
        try:
            asked.request("GET", self.health)
            return asked.getresponse().status == 200
        except (OSError, HTTPException):
            return False
        finally:
            asked.close()


def serve_pages() -> None:
    """Start MLflow and Prefect, print their addresses once both answer, and wait; Ctrl-C or SIGTERM ends both.

    Raises ConfigError when a port is taken or is none, ServiceError, with what it said last, when one of them ends.
    """
    servers = [mlflow_server(), prefect_server()]
    _check_ports(servers)
    print("Starting MLflow and Prefect. The first time, they set up their databases: a minute or so.", flush=True)
    with suppress(KeyboardInterrupt), _running(servers) as processes:
        waiting = list(servers)
        while True:
            for server, process in zip(servers, processes, strict=True):
                if process.poll() is not None:
                    raise _ended(server)
            if waiting:
                waiting = [server for server in waiting if not server.answers()]
                if not waiting:
                    _say_where(*servers)
            time.sleep(LOOK_EVERY_S)


def mlflow_server() -> Server:
    """MLflow on SQLite in the folder mlflow/, unless its variables name another database or place of artifacts.

    In that folder artifacts are known by their place, not by the server's address: what has been trained with the
    server is there without it, too.
    """
    artifacts = "MLFLOW_ARTIFACTS_DESTINATION"
    defaults = {
        "MLFLOW_BACKEND_STORE_URI": DEFAULT_TRACKING_URI,
        artifacts: str((HOME / "artifacts").absolute()),
        **MLFLOW_DEFAULTS,
    }
    if not (os.environ.get("MLFLOW_BACKEND_STORE_URI") or os.environ.get(artifacts)):
        defaults["MLFLOW_DEFAULT_ARTIFACT_ROOT"] = str(artifact_location(DEFAULT_TRACKING_URI))
    port = _port("MLFLOW_PORT", 5000)
    command = [sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port)]
    environment = {name: value for name, value in defaults.items() if not os.environ.get(name)}
    return Server("MLflow", "MLFLOW_PORT", port, command, "/health", HOME / "mlflow.log", environment)


def prefect_server() -> Server:
    """Prefect on its own SQLite, in the user's home, unless its variables name another database."""
    port = _port("PREFECT_SERVER_API_PORT", 4200)
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", HOST, "--port", str(port)]
    return Server("Prefect", "PREFECT_SERVER_API_PORT", port, command, "/api/health", HOME / "prefect.log")


def _port(variable: str, default: int) -> int:
    told = os.environ.get(variable) or str(default)
    if not (told.isdecimal() and 0 < int(told) < 2**16):
        raise ConfigError(f"{variable} is {told!r}; a port is a whole number from 1 to 65535.")
    return int(told)


def _check_ports(servers: Sequence[Server]) -> None:
    faults = [
        f"port {server.port} is taken, so {server.title} cannot have it. End what listens there, or choose another: "
        f"{server.port_variable}={server.port + 1}"
        for server in servers
        if _is_taken(server.port)
    ]
    if len({server.port for server in servers}) < len(servers):
        named = " and ".join(server.port_variable for server in servers)
        faults.append(f"{named} name the same port, {servers[0].port}. Choose two.")
    if faults:
        raise ConfigError("\n".join(faults))


def _is_taken(port: int) -> bool:
    """Whether somebody listens there; also at all addresses at once, where this one could be bound besides."""
    with socket.socket() as asked:
        asked.settimeout(5)
        if asked.connect_ex((HOST, port)) == 0:
            return True
    with socket.socket() as bound:
        # As servers do: what is left of connections that have ended does not hold a port.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind((HOST, port))
        except OSError:
            return True
    return False


@contextmanager
def _running(servers: Sequence[Server]) -> Iterator[list["subprocess.Popen[bytes]"]]:
    """The processes of the servers, each in a session of its own: a terminal's Ctrl-C reaches only this one."""
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for server in servers:
            server.log.parent.mkdir(parents=True, exist_ok=True)
            with server.log.open("wb") as log:
                processes.append(
                    subprocess.Popen(
                        server.command,
                        env={**os.environ, **server.environment},
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
        yield processes
    finally:
        _end(processes)


def _end(processes: Sequence["subprocess.Popen[bytes]"]) -> None:
    """End all of them with the processes that they have started; the hard way when asked a second time, or too slow."""
    try:
        for process in processes:
            _signal(process, signal.SIGTERM)
        until = time.monotonic() + END_AFTER_S
        for process in processes:
            process.wait(max(0.0, until - time.monotonic()))
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        pass
    finally:
        for process in processes:
            _signal(process, signal.SIGKILL)
            process.wait()


def _signal(process: "subprocess.Popen[bytes]", number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _ended(server: Server) -> ServiceError:
    said = server.log.read_text(encoding="utf-8", errors="replace").split("\n")
    last = [f"  {line}" for line in said if line.strip()][-LINES_OF_A_LOG:]
    return ServiceError(
        "\n".join(
            [
                f"{server.title} has ended; the other one is ended too. It said last:",
                *last,
                f"All of it is in {server.log}. Its database must be there and reachable; PostgreSQL and S3 need "
                "pip install 'nestune[servers]'.",
            ]
        )
    )


def _say_where(mlflow: Server, prefect: Server) -> None:
    print(
        f"MLflow   {mlflow.address}/#/experiments{OF_TRAINING}\n"
        f"Prefect  {prefect.address}\n"
        "Runs go there from a shell with\n"
        f"  export MLFLOW_TRACKING_URI={mlflow.address} PREFECT_API_URL={prefect.address}/api\n"
        f"Logs: {mlflow.log}, {prefect.log}. Ctrl-C ends both.",
        flush=True,
    )
