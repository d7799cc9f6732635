"""What MLflow was not told while a training went on: the next contact tells it."""

import logging
import time
from collections.abc import Mapping
from functools import partial

from nestune.config import RegistryConfig, RunConfig
from nestune.errors import RunError
from nestune.registry.connection import connect, impatience, speaking_to
from nestune.registry.mirror import Outbox, recorded_metrics
from nestune.registry.mlflow_run import MlflowRun, is_known, open_run, run_with_key
from nestune.registry.tracking_note import (
    Status,
    TrackingNote,
    note_of_training,
    read_note,
    untold,
    write_note,
)
from nestune.runs import RunPaths

log = logging.getLogger(__name__)


def resume_tracking(config: RunConfig, run: RunPaths, tags: Mapping[str, str]) -> MlflowRun:
    """The MLflow run of a training that has ended, with all its metrics; made now, tagged, where there is none.

    Raises ServiceError when MLflow does not answer, RunError when it does not know the run.
    """
    if not run.tracking.exists():  # trained on another machine, say
        write_note(run.tracking, note_of_training(config, tags).but(ended="FINISHED"))
    opened, note = open_run(config, run, read_note(run.tracking))
    if not note.complete:
        ended: Status = note.ended or ("FINISHED" if (run.checkpoints / "final").exists() else "KILLED")
        opened.end(ended)
        outbox = Outbox(partial(recorded_metrics, run.metrics, time.time()), sent_before=True)
        with speaking_to(opened.uri):
            outbox.send(opened.client, opened.run_id)
        write_note(run.tracking, note.but(ended=ended, told=ended, complete=True))
    return opened


def send_what_is_missing(config: RunConfig, run: RunPaths) -> None:
    """Bring MLflow up to date with a training that has ended; does nothing where MLflow has all, or was never told.

    A server that is down is warned of.
    """
    if not run.tracking.exists():
        return
    try:
        if not read_note(run.tracking).complete:
            resume_tracking(config, run, {})
    except RunError as error:
        log.warning("%s MLflow lacks metrics of %s; they are sent with the next contact.", error, run.root)


def mark_killed(run: RunPaths) -> bool:
    """Let MLflow no longer show a run as running whose process is dead; True when it did so until now.

    The end may be one that a training could not tell. Without a note of such a run MLflow is not asked. Raises
    ServiceError when it does not answer.
    """
    was_running = False
    if run.tracking.exists():
        note = read_note(run.tracking)
        if note.told is None:
            was_running = _end(note)
            write_note(run.tracking, note.but(told=note.ended or "KILLED"))
    for path in untold(run):
        was_running |= _end(read_note(path))
        path.unlink()
    return was_running


def _end(note: TrackingNote) -> bool:
    """End the MLflow run of a note, if it is shown as running."""
    client = connect(RegistryConfig(tracking_uri=note.tracking_uri, experiment=note.experiment))
    with impatience():
        run_id = note.run_id
        if run_id is None:
            with speaking_to(note.tracking_uri):
                experiment = client.get_experiment_by_name(note.experiment)
                run_id = run_with_key(client, experiment.experiment_id, note.key) if experiment else None
        if run_id is None or not is_known(client, note.tracking_uri, run_id):
            return False
        dead = MlflowRun(client, note.tracking_uri, run_id)
        was_running = dead.is_running()
        if was_running:
            dead.end(note.ended or "KILLED")
    return was_running
