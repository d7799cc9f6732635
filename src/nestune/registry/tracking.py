"""MLflow runs: what training was asked for, its numbers while it goes on, and the files that it leaves."""

import json
import logging
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from nestune.config import RunConfig, dump_config
from nestune.errors import RunError, ServiceError, StoppedError
from nestune.files import read_json, write_json
from nestune.registry.connection import HTTP, connect, find_experiment, impatience, speaking_to, tracking_uri
from nestune.registry.versions import TAG_CHARACTERS, pin_adapter
from nestune.runs import RunPaths

SEND_EVERY_S = 2.0
RETRY_EVERY_S = 60.0
# What one call of MLflow's log_batch takes.
BATCH_METRICS = 1000
BATCH_PARAMS = 100
PARAM_CHARACTERS = 6000

LOCAL_SERVER = "http://127.0.0.1:5000"  # where `mlflow ui` listens unless told otherwise

Status = Literal["FINISHED", "FAILED", "KILLED"]
log = logging.getLogger(__name__)


class TrackedRun:
    """One MLflow run. Its metrics are gathered and sent together every two seconds: live, and cheap.

    A server that fails in between does not end the training: metrics are kept and sent when it answers again.
    """

    def __init__(self, client: Any, uri: str, run_id: str) -> None:
        self.client = client
        self.uri = uri
        self.run_id = run_id
        self._waiting: list[Any] = []
        self._send_at = time.monotonic() + SEND_EVERY_S
        self._sent_before: dict[str, int] = {}

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Take the metrics of a step; they are sent now, or with those of the next steps."""
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        self._waiting += [
            Metric(name, float(value), now_ms, step)
            for name, value in values.items()
            if step > self._sent_before.get(name, -1)
        ]
        if time.monotonic() >= self._send_at:
            try:
                self.flush()
            except ServiceError as error:
                log.warning("%s Training goes on; the metrics wait until it answers.", error)

    def skip_steps_sent_before(self) -> None:
        """From now on take no metric of a step, or an earlier one, of which MLflow already has it."""
        with speaking_to(self.uri):
            for name in self.client.get_run(self.run_id).data.metrics:
                history = self.client.get_metric_history(self.run_id, name)
                self._sent_before[name] = max(metric.step for metric in history)

    def flush(self) -> None:
        """Send now what waits; raises ServiceError when MLflow fails, and keeps what it did not take."""
        self._send_at = time.monotonic() + RETRY_EVERY_S
        with speaking_to(self.uri), impatience():
            while self._waiting:
                self.client.log_batch(self.run_id, metrics=self._waiting[:BATCH_METRICS])
                del self._waiting[:BATCH_METRICS]
        self._send_at = time.monotonic() + SEND_EVERY_S

    def log_files(self, *paths: Path, folder: str | None = None) -> None:
        """Upload files, and folders with all their files, below `folder` of the run's artifacts."""
        with speaking_to(self.uri):
            for path in paths:
                if path.is_dir():
                    self.client.log_artifacts(self.run_id, str(path), folder)
                else:
                    self.client.log_artifact(self.run_id, str(path), folder)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set or replace tags of the run."""
        from mlflow.entities import RunTag

        with speaking_to(self.uri):
            self.client.log_batch(
                self.run_id, tags=[RunTag(key, value[:TAG_CHARACTERS]) for key, value in tags.items()]
            )

    def tags(self) -> dict[str, str]:
        """All tags of the run."""
        with speaking_to(self.uri):
            return dict(self.client.get_run(self.run_id).data.tags)

    def page(self) -> str:
        """The address of the run's page in MLflow, once its server runs."""
        with speaking_to(self.uri):
            experiment_id = self.client.get_run(self.run_id).info.experiment_id
        server = self.uri.rstrip("/") if self.uri.startswith(HTTP) else LOCAL_SERVER
        return f"{server}/#/experiments/{experiment_id}/runs/{self.run_id}"

    def open_with(self) -> str | None:
        """The command that starts a server for the page; None where one is running."""
        return None if self.uri.startswith(HTTP) else f"mlflow ui --backend-store-uri {self.uri}"

    def finish(self, status: Status = "FINISHED") -> None:
        """Send what waits and end the run. A server that is down now is warned of: nothing else is lost by it."""
        try:
            self.flush()
            with speaking_to(self.uri), impatience():
                self.client.set_terminated(self.run_id, status)
        except ServiceError as error:
            log.warning("%s MLflow lacks %d metrics; the run's folder has them.", error, len(self._waiting))


def start_tracking(config: RunConfig, run: RunPaths, tags: Mapping[str, str]) -> TrackedRun:
    """Start an MLflow run with the resolved configuration, and note it in the run's `tracking.json`.

    Besides `tags`, the run is tagged with its name, the git commit and the parent adapter, pinned to a version.
    Raises RunError when MLflow does not answer.
    """
    from mlflow.entities import Param

    client, uri = connect(config.registry), tracking_uri(config.registry)
    parent = pin_adapter(config.model.adapter, config.registry) if config.model.adapter else "none"
    lineage = {"run": config.name, "parent": parent, "git_commit": git_commit(), **tags}
    with speaking_to(uri):
        experiment_id = find_experiment(client, config.registry)
        run_id = str(client.create_run(experiment_id, tags=lineage, run_name=config.name).info.run_id)
        params = [Param(key, value[:PARAM_CHARACTERS]) for key, value in flatten(config).items()]
        for start in range(0, len(params), BATCH_PARAMS):
            client.log_batch(run_id, params=params[start : start + BATCH_PARAMS])
        client.log_text(run_id, dump_config(config), "config.yaml")
    experiment = config.registry.experiment
    write_json(run.tracking, {"tracking_uri": uri, "experiment": experiment, "run_id": run_id})
    return TrackedRun(client, uri, run_id)


def resume_tracking(config: RunConfig, run: RunPaths) -> TrackedRun:
    """The MLflow run that an earlier stage started.

    Raises RunError when `tracking.json` is missing, or MLflow does not know the run.
    """
    from mlflow.exceptions import MlflowException

    noted = read_json(run.tracking, "Run nestune train first.", keys=["run_id", "tracking_uri"])
    client, uri = connect(config.registry), tracking_uri(config.registry)
    with speaking_to(uri):
        try:
            client.get_run(noted["run_id"])
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            raise RunError(
                f"{run.tracking} says the run is tracked as {noted['run_id']} at {noted['tracking_uri']}, but {uri} "
                f"does not have it. Correct registry.tracking_uri, or delete {run.tracking} to track it anew."
            ) from None
    return TrackedRun(client, uri, noted["run_id"])


def go_on_tracking(config: RunConfig, run: RunPaths, tags: Mapping[str, str]) -> TrackedRun:
    """The MLflow run of a training that goes on, running again; a new one where MLflow no longer has it.

    MLflow's parameters cannot change: what is configured otherwise than before becomes a tag of the same name. Steps
    whose metrics MLflow already has are not sent again.
    """
    try:
        tracked = resume_tracking(config, run)
    except ServiceError:
        raise
    except RunError as error:
        log.warning("%s It is tracked anew.", error)
        return start_tracking(config, run, tags)
    with speaking_to(tracked.uri):
        before = tracked.client.get_run(tracked.run_id).data.params
        tracked.client.update_run(tracked.run_id, status="RUNNING")
        tracked.client.log_text(tracked.run_id, dump_config(config), "config.yaml")
    changed = {key: value for key, value in flatten(config).items() if before.get(key) != value[:PARAM_CHARACTERS]}
    tracked.set_tags({**tags, "git_commit": git_commit(), **changed})
    tracked.skip_steps_sent_before()
    return tracked


@contextmanager
def tracked_run(
    config: RunConfig, run: RunPaths, tags: Mapping[str, str], goes_on: bool = False
) -> Iterator[TrackedRun]:
    """As `start_tracking` or `go_on_tracking`; when the block ends, so does the run: finished, failed or killed."""
    tracked = (go_on_tracking if goes_on else start_tracking)(config, run, tags)
    try:
        yield tracked
    except Exception as error:
        tracked.finish("KILLED" if isinstance(error, StoppedError) else "FAILED")
        raise
    except BaseException:
        tracked.finish("KILLED")
        raise
    tracked.finish("FINISHED")


def flatten(block: BaseModel, prefix: str = "") -> dict[str, str]:
    """A configuration as dotted keys and text; lists and mappings as JSON."""
    flat: dict[str, str] = {}
    for key in type(block).model_fields:
        value = getattr(block, key)
        if isinstance(value, BaseModel):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, str) else json.dumps(value)
    return flat


def git_commit() -> str:
    """The commit of the current folder, with `-dirty` where tracked files differ from it; `none` outside of git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "none"
    return said.stdout.strip()
