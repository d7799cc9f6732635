"""`nestune stop`: ask the process that is at work on a run to stop, and wait until it has."""

import os
import socket
import time
from dataclasses import asdict, dataclass
from typing import Any

from nestune.errors import BusyError, ConfigError, RunError
from nestune.files import write_json
from nestune.locks import owner_of
from nestune.run_state import read_state
from nestune.runs import RUNS, RunPaths

ASK_EVERY_S = 0.2


@dataclass(frozen=True)
class StopResult:
    """How the run stands after it was asked to stop."""

    run: str
    state: str
    reason: str | None

    def as_dict(self) -> dict[str, Any]:
        """The result as JSON."""
        return asdict(self)

    def summary(self) -> list[str]:
        """The result for a person."""
        return [f"{self.run}: {self.state}{f', {self.reason}' if self.reason else ''}"]


def stop(run: RunPaths, patience_s: float) -> StopResult:
    """Ask the owner of a run to stop at its next step, and wait for it as long as that.

    Raises ConfigError when there is no such run, RunError when nobody is at work on it, BusyError when its owner has
    not stopped in time; the request stays.
    """
    owner = owner_of(run.lock)
    if owner is None and not run.root.is_dir():
        raise ConfigError(f"there is no run {run.root.name} in {RUNS.absolute()}. `nestune status` lists the runs.")
    if owner is None:
        raise RunError(
            f"nobody is at work on run {run.root.name}: it is {read_state(run).state}. There is nothing to stop."
        )
    write_json(run.stop_request, {"token": owner.token, "by": f"process {os.getpid()} on {socket.gethostname()}"})
    give_up_at = time.monotonic() + patience_s
    while (now := owner_of(run.lock)) is not None and now.token == owner.token:
        if time.monotonic() > give_up_at:
            raise BusyError(
                f"run {run.root.name} has been asked to stop, and {owner} has not in {patience_s:g} s. It will at its "
                f"next step or batch; to end it at once: kill -9 {owner.pid}. The next start goes on from its last "
                "checkpoint."
            )
        time.sleep(ASK_EVERY_S)
    after = read_state(run)
    return StopResult(run.root.name, after.state, after.reason)
