"""Who is at work on a run and how that ended, as its locks and its state file tell, with real processes that die."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nestune.errors import BusyError, DataError, RunError, StoppedError
from nestune.files import write_json, write_text
from nestune.locks import owner_of
from nestune.run_state import crashed_runs, ending, owned, read_state, recorded, stop_token
from nestune.runs import RunPaths

# Be at work on a run, from its first stage on, until killed or told to end.
WORK = """
import sys
from nestune.run_state import owned, recorded
from nestune.runs import RunPaths
run = RunPaths.of(sys.argv[1])
with owned(run, "nestune run"):
    if sys.argv[2] == "starting":
        print("there", flush=True)
        sys.stdin.read()
    with recorded(run, "train", "5e0e3a4c-0000-4000-8000-000000000000"):
        print("there", flush=True)
        sys.stdin.read()
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunPaths:
    monkeypatch.chdir(tmp_path)
    return RunPaths.of("r")


@contextmanager
def at_work(run: RunPaths, how: str = "running") -> Iterator["subprocess.Popen[str]"]:
    """Another process that is at work on the run, until it is killed or the block ends."""
    command = [sys.executable, "-c", WORK, run.root.name, how]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n"
        try:
            yield process
        finally:
            process.kill()


def end_with(run: RunPaths, error: BaseException | None) -> None:
    """A stage that ends well, or with an error."""
    with owned(run, "nestune train"), recorded(run, "train"):
        if error is not None:
            raise error


def test_a_run_of_which_nothing_is_noted_is_new(run: RunPaths) -> None:
    assert read_state(run).state == "new"
    run.root.mkdir(parents=True)
    assert read_state(run).state == "new"


def test_a_run_is_starting_then_running_and_then_crashed_when_its_process_was_killed(run: RunPaths) -> None:
    with at_work(run, "starting") as process:
        state = read_state(run)
        assert (state.state, state.stage) == ("starting", None)
        assert state.owner is not None
        assert state.owner.pid == process.pid
    with at_work(run) as process:
        state = read_state(run)
        assert (state.state, state.stage) == ("running", "train")
        assert state.owner is not None
        assert state.owner.pid == process.pid
        process.kill()
        process.wait()
        crashed = read_state(run)
    assert (crashed.state, crashed.stage) == ("crashed", "train")
    assert crashed.flow_run == "5e0e3a4c-0000-4000-8000-000000000000"
    assert crashed.reason is not None
    assert f"process {process.pid} on" in crashed.reason
    assert crashed_runs() == {run: crashed}

    # A new owner that has not noted anything yet is not taken for the one that died.
    with at_work(run, "starting"):
        assert read_state(run).state == "starting"
        assert crashed_runs() == {}
        with pytest.raises(BusyError), ending(run, crashed):
            pass
        assert json.loads(run.state.read_text())["state"] == "running"
    with ending(run, crashed):
        assert owner_of(run.lock) is not None
    assert json.loads(run.state.read_text())["state"] == "crashed"
    assert read_state(run) == crashed


@pytest.mark.parametrize(
    ("error", "expected", "reason"),
    [
        (None, "finished", None),
        (StoppedError("stopped on request"), "stopped", "stopped on request"),
        (RunError("the disk is gone"), "failed", "the disk is gone"),
        (ValueError("no number"), "failed", "ValueError: no number"),
        (MemoryError(), "failed", "MemoryError: "),
        (KeyboardInterrupt(), "stopped", "interrupted (SIGINT)"),
        (SystemExit(143), "stopped", "interrupted (asked to end)"),
    ],
)
def test_how_a_stage_ends_is_noted(run: RunPaths, error: BaseException | None, expected: str, reason: str) -> None:
    if error is None:
        end_with(run, None)
    else:
        with pytest.raises(type(error)):
            end_with(run, error)
    state = read_state(run)
    assert (state.state, state.stage, state.owner, state.reason) == (expected, "train", None, reason)


def test_a_signal_that_is_passed_on_after_a_stop_is_noted_as_a_stop(run: RunPaths) -> None:
    signal = SystemExit(143)
    signal.__context__ = StoppedError("stopped on request (SIGTERM) after step 7")
    with pytest.raises(SystemExit):
        end_with(run, signal)
    assert (read_state(run).state, read_state(run).reason) == ("stopped", "stopped on request (SIGTERM) after step 7")


def test_wrong_input_leaves_what_was_noted_before_and_no_folder_where_there_was_none(run: RunPaths) -> None:
    with pytest.raises(DataError):
        end_with(run, DataError("a bad row"))
    assert not run.root.exists()
    end_with(run, None)
    before = run.state.read_bytes()
    with pytest.raises(DataError):
        end_with(run, DataError("a bad row"))
    assert run.state.read_bytes() == before


def test_a_second_owner_is_refused_with_the_process_id_of_the_first_and_touches_nothing(run: RunPaths) -> None:
    with at_work(run) as process:
        before = run.state.read_bytes()
        with pytest.raises(BusyError, match=rf"run r is in use by process {process.pid} .+nestune stop r") as refused:
            end_with(run, None)
        assert refused.value.exit_code == 1
        assert run.state.read_bytes() == before


def test_the_next_owner_ends_what_a_killed_one_left(run: RunPaths) -> None:
    with at_work(run) as process:
        owner = read_state(run).owner
        assert owner is not None
        write_json(run.stop_request, {"token": owner.token})
        write_text(run.root / "checkpoints" / ".best.0123abcd.tmp" / "half", "half")
        process.kill()
        process.wait()
    with owned(run, "nestune train"):
        assert stop_token(run) is None
        assert not (run.root / "checkpoints" / ".best.0123abcd.tmp").exists()
    # The lock has no owner; a state that is not noted anew tells of the one that was killed.
    assert read_state(run).state == "crashed"


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"state": "running"', '{"owner": {"pid": 1}}', "\xff"])
def test_a_state_file_that_cannot_be_read_says_nothing(run: RunPaths, content: str) -> None:
    run.root.mkdir(parents=True)
    run.state.write_bytes(content.encode("latin-1"))
    assert read_state(run).state == "new"
    assert crashed_runs() == {}
    end_with(run, None)
    assert read_state(run).state == "finished"


def test_a_run_that_starts_and_ends_while_it_is_looked_at_is_never_taken_for_crashed(run: RunPaths) -> None:
    program = (
        "from nestune.run_state import owned, recorded\n"
        "from nestune.runs import RunPaths\n"
        "run = RunPaths.of('r')\n"
        "for _ in range(100):\n"
        "    with owned(run, 'nestune train'), recorded(run, 'train'):\n"
        "        pass\n"
    )
    seen = set()
    with subprocess.Popen([sys.executable, "-c", program]) as process:
        while process.poll() is None:
            seen.add(read_state(run).state)
    assert process.returncode == 0
    assert seen <= {"new", "starting", "running", "finished"}
    assert {"running", "finished"} <= seen
