"""One training at a time on an accelerator: others wait, are refused, or share it, as they are configured."""

import logging
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nestune.backends.accelerator import accelerator_held
from nestune.errors import BusyError, StoppedError
from nestune.locks import LOCKS, owner_of

HOLD = """
import sys
from nestune.backends.accelerator import accelerator_held
with accelerator_held("cuda-0", "nestune train --name first", "refuse", lambda: None):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(LOCKS, str(tmp_path / "locks"))
    return tmp_path / "locks" / f"{socket.gethostname()}-cuda-0.lock"


@contextmanager
def in_use() -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-c", HOLD]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def use(when_busy: str, check: object = None, name: str | None = "cuda-0") -> None:
    with accelerator_held(name, "nestune train", when_busy, check or (lambda: None)):  # type: ignore[arg-type]
        pass


def test_a_free_accelerator_is_held_until_the_block_ends(lock: Path) -> None:
    with accelerator_held("cuda-0", "nestune train", "refuse", lambda: None):
        owner = owner_of(lock)
        assert owner is not None
        assert owner.command == "nestune train"
        use("refuse", name="cuda-1")
    assert owner_of(lock) is None


def test_refuse_names_the_process_that_has_it(lock: Path) -> None:
    with in_use() as other, pytest.raises(BusyError, match=rf"cuda-0 is in use by process {other.pid} .+when_busy"):
        use("refuse")


def test_wait_goes_on_once_it_is_free_and_tells_once_what_it_waits_for(
    lock: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked = 0

    def check() -> None:
        nonlocal asked
        asked += 1
        if asked == 3:
            other.kill()

    with in_use() as other, caplog.at_level(logging.WARNING):
        use("wait", check)
    assert asked >= 3
    assert [str(other.pid) in message for message in caplog.messages] == [True]


def test_a_stop_ends_the_waiting(lock: Path) -> None:
    def check() -> None:
        raise StoppedError("stopped on request")

    with in_use(), pytest.raises(StoppedError):
        use("wait", check)


def test_share_and_the_cpu_ask_for_nothing(lock: Path) -> None:
    with in_use():
        use("share")
        use("refuse", name=None)
    lock.unlink()
    use("share")
    use("wait", name=None)
    assert not lock.exists()
