"""`nestune stop`: its request reaches the owner at work, and no other."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nestune import cli
from nestune.errors import BusyError, ConfigError, RunError, StoppedError
from nestune.files import write_json
from nestune.run_state import owned, read_state, stop_token
from nestune.runs import RunPaths
from nestune.stages.stop import stop
from nestune.stopping import StopRequests

# Looks for requests between two steps, as training does; `deaf` never does.
WORK = """
import sys, time
from nestune.run_state import owned, recorded
from nestune.runs import RunPaths
from nestune.stopping import StopRequests
run = RunPaths.of("r")
with owned(run, "nestune train --name r"), recorded(run, "train"):
    stop = StopRequests(run)
    print("there", flush=True)
    while True:
        time.sleep(0.01)
        if sys.argv[1] != "deaf":
            stop.check()
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunPaths:
    monkeypatch.chdir(tmp_path)
    return RunPaths.of("r")


@contextmanager
def at_work(how: str) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-c", WORK, how]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n"
        try:
            yield process
        finally:
            process.kill()


def test_the_owner_stops_and_the_request_goes(run: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    with at_work("listening") as process:
        assert cli.main(["stop", "r"]) == 0
        assert capsys.readouterr().out == "r: stopped, stopped on request (nestune stop)\n"
        process.wait(timeout=10)
    assert read_state(run).state == "stopped"
    assert not run.stop_request.exists()


def test_an_owner_that_does_not_stop_in_time_is_named_and_stays_asked(run: RunPaths) -> None:
    with at_work("deaf") as process:
        owner = read_state(run).owner
        assert owner is not None
        began = time.monotonic()
        with pytest.raises(BusyError, match=rf"process {process.pid} .+ has not in 0\.3 s.+kill -9 {process.pid}"):
            stop(run, 0.3)
        assert time.monotonic() - began < 5
        assert stop_token(run) == owner.token
        assert read_state(run).state == "running"


def test_where_nobody_is_at_work_there_is_nothing_to_stop(run: RunPaths) -> None:
    with pytest.raises(ConfigError, match=r"there is no run r in .+`nestune status` lists"):
        stop(run, 1)
    with at_work("listening") as process:
        process.kill()
        process.wait()
    with pytest.raises(RunError, match=r"nobody is at work on run r: it is crashed\."):
        stop(run, 1)
    assert not run.stop_request.exists()


def test_a_request_to_an_earlier_owner_stops_no_later_one(run: RunPaths) -> None:
    with owned(run, "nestune train"):
        write_json(run.stop_request, {"token": "of somebody else"})
        StopRequests(run).check()
        assert list(StopRequests(run).watched(range(2))) == [0, 1]


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_a_request_that_cannot_be_read_stops_nobody(run: RunPaths, content: str) -> None:
    with owned(run, "nestune train"):
        run.stop_request.write_text(content)
        StopRequests(run).check()
        assert list(StopRequests(run).watched(range(2))) == [0, 1]


def test_a_stop_is_raised_before_the_next_item(run: RunPaths) -> None:
    with owned(run, "nestune train") as owner:
        items = StopRequests(run).watched(range(5))
        assert [next(items), next(items), next(items)] == [0, 1, 2]
        write_json(run.stop_request, {"token": owner.token})
        with pytest.raises(StoppedError, match=r"stopped on request \(nestune stop\)"):
            next(items)


@pytest.mark.parametrize("name", ["../x", "a/b", "/etc", "a" * 65, "a\n", "a\nb", ".", "..", "-x", "ä", "a b"])
@pytest.mark.parametrize("command", ["status", "stop"])
def test_a_name_that_no_run_can_have_is_refused(
    run: RunPaths, capsys: pytest.CaptureFixture[str], command: str, name: str
) -> None:
    assert cli.main([command, "--", name]) == 2
    error = capsys.readouterr().err
    assert "is no name of a run" in error
    assert len(error.splitlines()) == 1
    assert list(Path.cwd().iterdir()) == []
