"""A training as MLflow shows it: live while the server answers, brought up to date when it does again.

The metrics files in the run's folder are the truth and MLflow is their mirror: it may be down at the start, in the
middle and at the end, and has every number exactly once as soon as it was reached again.
"""

import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial

from nestune.config import RunConfig
from nestune.errors import RunError, ServiceError, StoppedError, StorageError
from nestune.registry.connection import impatience, speaking_to, tracking_uri
from nestune.registry.mirror import Outbox, StepMetrics, recorded_metrics
from nestune.registry.mlflow_run import MlflowRun, UnknownRunError, open_run
from nestune.registry.tracking_note import (
    Status,
    TrackingNote,
    git_commit,
    keep_untold,
    note_of_training,
    read_note,
    write_note,
)
from nestune.runs import RunPaths

SEND_EVERY_S = 2.0
RETRY_EVERY_S = 60.0
# A server that is slow, or accepts and never answers, gets at most one part in so many of the training's time.
TIME_SHARE = 20
ATTEMPT_S = 10.0

log = logging.getLogger(__name__)


class TrackedRun:
    """The MLflow run of a training. Its metrics are gathered and sent together every two seconds: live, and cheap.

    `mlflow_run` is None until MLflow has answered once; it is asked again once a minute. Sending is done between two
    steps, not beside them: a thread of its own would change the environment, MLflow's only way to be told its
    patience, while the training reads it.
    """

    def __init__(self, config: RunConfig, run: RunPaths, tags: Mapping[str, str], goes_on: bool = False) -> None:
        self.mlflow_run: MlflowRun | None = None
        self._config, self._run, self._goes_on = config, run, goes_on
        self._tags = dict(tags)
        # Lines that this process did not write come before all that it measures.
        self._outbox = Outbox(partial(recorded_metrics, run.metrics, time.time()), sent_before=goes_on)
        self._is_down = False
        # Written before MLflow is asked, so that whoever comes later finds what was made there.
        self._note = self._first_note()
        self._keep_note(ended=None, told=None, complete=False)
        try:
            self._open()
        except ServiceError as error:
            self._next_at = time.monotonic() + RETRY_EVERY_S
            self._say_down(error)
        else:
            self._next_at = time.monotonic() + SEND_EVERY_S

    def log_metrics(self, step: int, values: Mapping[str, float], time_s: float | None = None) -> None:
        """Take metrics that the metrics files hold as well; they are sent now, or with those of the next steps.

        `time_s`: when they were measured, in seconds since 1970; by default now.
        """
        self._outbox.put(StepMetrics(step, time.time() if time_s is None else time_s, values))
        if time.monotonic() >= self._next_at:
            self._try_to_send()

    def finish(self, status: Status = "FINISHED") -> None:
        """End the run and send what waits. What a server that is down now does not learn, the next contact tells it.

        A training that was killed has only seconds: whoever asked it to end may end it the hard way.
        """
        until = time.monotonic() + ATTEMPT_S if status == "KILLED" else math.inf
        try:
            self._keep_note(ended=status)
            opened = self._open()
            with impatience():
                opened.end(status)
                self._keep_note(told=status)
                if status != "FINISHED":
                    self._outbox.read_files()  # the last line may have been written and not put
                self._send(opened, until)
            self._keep_note(complete=not self._outbox)
        except (RunError, OSError) as error:
            log.warning("%s What MLflow lacks is in %s and will be sent by register or train.", error, self._run.root)
            if self._note.told is None:
                # On a full disk, that it is full is what ended the training, and what is to be told.
                with suppress(StorageError):
                    keep_untold(self._run, self._note)

    def _first_note(self) -> TrackingNote:
        if self._goes_on:
            try:
                return read_note(self._run.tracking)
            except RunError as error:
                log.warning("%s It is tracked anew.", error)
        return note_of_training(self._config, self._tags)

    def _keep_note(self, **changes: object) -> None:
        self._note = self._note.but(**changes)
        write_note(self._run.tracking, self._note)

    def _open(self) -> MlflowRun:
        """Reach the MLflow run and let it say what is trained; raises RunError when it cannot be had now."""
        if self.mlflow_run is None:
            was_known = self._note.run_id is not None
            try:
                opened, self._note = open_run(self._config, self._run, self._note)
            except UnknownRunError as error:
                log.warning("%s It is tracked anew.", error)
                was_known = False
                self._note = note_of_training(self._config, self._tags)
                self._keep_note()
                opened, self._note = open_run(self._config, self._run, self._note)
            if self._goes_on:
                with impatience():
                    if was_known:
                        opened.set_configuration(self._config)
                        opened.set_tags({**self._tags, "git_commit": git_commit()})
                    opened.go_on()
            self.mlflow_run = opened
        return self.mlflow_run

    def _try_to_send(self) -> None:
        """One attempt; the time until the next one grows with the time that this one took."""
        began = time.monotonic()
        every_s = SEND_EVERY_S
        try:
            with impatience():
                self._send(self._open(), began + ATTEMPT_S)
        except (RunError, OSError) as error:
            every_s = RETRY_EVERY_S
            self._say_down(error)
        else:
            if self._is_down:
                log.warning("MLflow at %s answers again.", tracking_uri(self._config.registry))
            self._is_down = False
        now = time.monotonic()
        self._next_at = now + max(every_s, TIME_SHARE * (now - began))

    def _send(self, opened: MlflowRun, until: float) -> None:
        with speaking_to(opened.uri):
            self._outbox.send(opened.client, opened.run_id, until)

    def _say_down(self, error: Exception) -> None:
        if not self._is_down:
            log.warning("%s Training goes on; its metrics are kept and sent later.", error)
        self._is_down = True


@contextmanager
def tracked_run(
    config: RunConfig, run: RunPaths, tags: Mapping[str, str], goes_on: bool = False
) -> Iterator[TrackedRun]:
    """Track a training; when the block ends, so does the MLflow run: finished, failed or killed.

    It is tagged with `tags`, its name, the git commit and the parent adapter. `goes_on`: it is the MLflow run of
    before, running again; a new one where MLflow no longer has it. A server that is down is warned of, once.
    Raises ConfigError when the parent adapter is unknown, RunError when the experiment is deleted.
    """
    tracked = TrackedRun(config, run, tags, goes_on)
    try:
        yield tracked
    except Exception as error:
        tracked.finish("KILLED" if isinstance(error, StoppedError) else "FAILED")
        raise
    except BaseException:
        tracked.finish("KILLED")
        raise
    tracked.finish("FINISHED")
