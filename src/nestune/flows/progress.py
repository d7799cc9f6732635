"""How far a training is, in Prefect: an artifact that moves."""

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import replace
from typing import cast
from uuid import UUID

import httpx
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.exceptions import PrefectException

from nestune.flows.flow_state import has_server
from nestune.runs import RunPaths
from nestune.stages.status import read_status
from nestune.training.recorder import TRAIN_METRICS

TELL_EVERY_S = 2.0


@contextmanager
def progress_shown(run: RunPaths) -> Iterator[None]:
    """Show in Prefect how far a training is, in an artifact that moves: what `nestune status` reads from its folder.

    A thread reads and tells, so that training waits neither for the disk nor for the server.
    """
    if not has_server():
        yield
        return
    ended = threading.Event()
    # Where the artifact belongs, Prefect knows from the context of the task.
    told = threading.Thread(target=copy_context().run, args=(_tell_progress, run, ended), daemon=True)
    told.start()
    try:
        yield
    finally:
        ended.set()
        told.join(timeout=TELL_EVERY_S)


def artifact_key(what: str, name: str) -> str:
    """The key of an artifact about a run, e.g. `progress-<run>`: small letters, digits, dashes, as Prefect has it."""
    return f"{what}-" + re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")


def _tell_progress(run: RunPaths, ended: threading.Event) -> None:
    artifact: UUID | None = None
    last, began, metrics = False, time.time(), run.metrics / TRAIN_METRICS
    while not last:
        last = ended.wait(TELL_EVERY_S)
        # What an earlier training left there is no progress of this one.
        if not metrics.exists() or metrics.stat().st_mtime < began:
            continue
        status = read_status(run)
        if not (status.step and status.steps):
            continue
        progress = 100 * status.step / status.steps
        if last:  # it has ended, or was stopped: no time is left
            status = replace(status, left_s=None)
        lines = "\n".join(f"- {line}" for line in status.progress())
        try:
            if artifact is None:
                key = artifact_key("progress", run.root.name)
                # In a thread of its own, it answers itself, not by a coroutine.
                artifact = cast(UUID, create_progress_artifact(progress, key=key, description=lines))
            else:
                update_progress_artifact(artifact, progress, description=lines)
        except (PrefectException, httpx.HTTPError):
            # The next one tells more.
            continue
