"""Who is at work on a run, on which stage, and how that ended; told by locks, so that no dead run looks alive."""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Literal

from nestune.errors import InputError, NestuneError, RunError, StoppedError, StorageError
from nestune.files import read_json, remove, tidy, write_bytes, write_json
from nestune.locks import Owner, held, owner_of
from nestune.runs import RUNS, RunPaths

State = Literal["new", "starting", "running", "finished", "stopped", "failed", "crashed"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunState:
    """How a run stands.

    state: `running` and `starting` have a living owner; `crashed`: its process died without a word. reason: of a run
    that was stopped or failed. since: when this state began, ISO 8601. flow_run: the id of its Prefect flow run.
    """

    state: State
    stage: str | None = None
    owner: Owner | None = None
    reason: str | None = None
    since: str | None = None
    flow_run: str | None = None


@contextmanager
def owned(run: RunPaths, command: str, waiting: Callable[[Owner | None], None] | None = None) -> Iterator[Owner]:
    """Be the only process at work on a run while the block runs; what a killed one left unfinished is ended first.

    While another process is at work on it, `waiting` is called again and again with that, and once the wait is over
    with None; without `waiting`, raises BusyError, with its process id. Raises StorageError when the run's folder
    cannot be written. A folder in which nothing was written goes again.
    """
    remedy = f"Wait for it to end, or end it: nestune stop {run.root.name}"
    made = [folder for folder in (run.root, *run.root.parents) if not folder.exists()]
    try:
        with held(run.lock, command, f"run {run.root.name}", waiting, remedy) as owner:
            tidy(run.root)
            if stop_token(run) != owner.token:
                remove(run.stop_request)
            try:
                yield owner
            finally:
                if stop_token(run) == owner.token:
                    remove(run.stop_request)
                if [*run.root.iterdir()] == [run.lock]:
                    run.lock.unlink()
    finally:
        for folder in made:
            # Not when there is anything in it, such as the lock of the next one.
            with suppress(OSError):
                folder.rmdir()


@contextmanager
def recorded(run: RunPaths, stage: str, flow_run: str | None = None) -> Iterator[None]:
    """Note in the run's folder that its owner is at a stage, and how that ends.

    Wrong input leaves what was noted before. flow_run: the id of the Prefect flow run that it is part of.
    """
    before = run.state.read_bytes() if run.state.exists() else None
    _note(run, RunState("running", stage, owner_of(run.lock), flow_run=flow_run))
    try:
        yield
    except InputError:
        _restore(run, before)
        raise
    except BaseException as error:
        _note_end(run, RunState(*_how(error, stage), flow_run=flow_run))
        raise
    _note(run, RunState("finished", stage, flow_run=flow_run))


def read_state(run: RunPaths) -> RunState:
    """How a run stands now."""
    noted, owner = _read(run), owner_of(run.lock)
    # A run that starts, or ends, between the two must not be taken for one whose process died.
    while (now := _read(run)) != noted:
        noted, owner = now, owner_of(run.lock)
    if owner is not None:
        mine = noted.owner is not None and noted.owner.token == owner.token
        since = noted.since if mine else owner.since
        return RunState("running" if mine else "starting", noted.stage if mine else None, owner, None, since)
    if noted.state == "running":
        reason = f"{noted.owner} ended without a word: it was killed, ran out of memory, or the machine went down"
        return RunState("crashed", noted.stage, noted.owner, reason, noted.since, noted.flow_run)
    return noted


def crashed_runs() -> dict[RunPaths, RunState]:
    """Every run below the current folder whose process died, of which its folder does not tell yet; how it stands."""
    runs = [RunPaths(folder) for folder in sorted(RUNS.iterdir())] if RUNS.is_dir() else []
    states = {run: read_state(run) for run in runs if _read(run).state == "running"}
    return {run: state for run, state in states.items() if state.state == "crashed"}


@contextmanager
def ending(run: RunPaths, crashed: RunState) -> Iterator[None]:
    """Be alone with a run that crashed while the block ends what it left open; then its folder tells it for good.

    Raises BusyError when somebody is at work on it again.
    """
    with held(run.lock, "ending what crashed", f"run {run.root.name}"):
        yield
        _note(run, crashed)


def stop_token(run: RunPaths) -> str | None:
    """The token of the owner that is asked to stop; None when nobody is."""
    if not run.stop_request.exists():
        return None
    try:
        return str(read_json(run.stop_request, "", keys=["token"])["token"])
    except RunError:
        return None


def _how(error: BaseException, stage: str) -> tuple[State, str, None, str]:
    """State, stage and reason after an exception."""
    # A signal is passed on once the run has stopped for it.
    stopped = error if isinstance(error, StoppedError) else error.__context__
    if isinstance(stopped, StoppedError):
        return "stopped", stage, None, str(stopped)
    if not isinstance(error, Exception):
        told = "SIGINT" if isinstance(error, KeyboardInterrupt) else "asked to end"
        return "stopped", stage, None, f"interrupted ({told})"
    text = str(error) if isinstance(error, NestuneError) else f"{type(error).__name__}: {error}"
    return "failed", stage, None, text


def _note(run: RunPaths, state: RunState) -> None:
    since = state.since or datetime.now(UTC).isoformat(timespec="seconds")
    write_json(run.state, asdict(state) | {"since": since})


def _note_end(run: RunPaths, state: RunState) -> None:
    """As `_note`, where a fault must not hide another one."""
    try:
        _note(run, state)
    except StorageError as error:
        log.warning("%s", error)


def _restore(run: RunPaths, before: bytes | None) -> None:
    if before is None:
        remove(run.state)
    else:
        write_bytes(run.state, before)


def _read(run: RunPaths) -> RunState:
    try:
        content = json.loads(run.state.read_bytes())
        owner = Owner(**content.pop("owner")) if content.get("owner") else content.pop("owner")
        return RunState(**content, owner=owner)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return RunState("new")
