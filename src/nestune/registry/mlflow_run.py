"""An MLflow run that answers: made once, with the configuration that was asked for, and the files that it leaves."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from nestune.config import RunConfig, dump_config
from nestune.errors import RunError
from nestune.registry.connection import (
    HTTP,
    OF_TRAINING,
    connect,
    find_experiment,
    impatience,
    speaking_to,
    tracking_uri,
    unrepeated,
)
from nestune.registry.dataset_inputs import dataset_inputs
from nestune.registry.mirror import send_scores
from nestune.registry.tracking_note import Status, TrackingNote, write_note
from nestune.registry.versions import TAG_CHARACTERS
from nestune.runs import RunPaths

# What one call of MLflow's log_batch takes.
BATCH_PARAMS = 100
PARAM_CHARACTERS = 6000

KEY_TAG = "tracking_key"
NOTE_TAG = "mlflow.note.content"
LOCAL_SERVER = "http://127.0.0.1:5000"  # where `mlflow ui` listens unless told otherwise


class UnknownRunError(RunError):
    """MLflow does not have the run that `tracking.json` names."""


class MlflowRun:
    """One run of MLflow; each method raises ServiceError when MLflow fails."""

    def __init__(self, client: Any, uri: str, run_id: str) -> None:
        self.client = client
        self.uri = uri
        self.run_id = run_id

    def log_files(self, *paths: Path, folder: str | None = None) -> None:
        """Upload files, and folders with all their files, below `folder` of the run's artifacts."""
        with speaking_to(self.uri):
            for path in paths:
                if path.is_dir():
                    self.client.log_artifacts(self.run_id, str(path), folder)
                else:
                    self.client.log_artifact(self.run_id, str(path), folder)

    def log_scores(self, step: int, values: Mapping[str, float]) -> None:
        """Log numbers of a checkpoint; numbers that the run has already are not logged again."""
        with speaking_to(self.uri):
            send_scores(self.client, self.run_id, step, values)

    def set_configuration(self, config: RunConfig) -> None:
        """Give the run the configuration, as parameters and as a file.

        MLflow's parameters cannot change: what is configured otherwise than before becomes a tag of the same name.
        """
        from mlflow.entities import Param

        values = {key: value[:PARAM_CHARACTERS] for key, value in flatten(config).items()}
        with speaking_to(self.uri):
            before = self.client.get_run(self.run_id).data.params
            params = [Param(key, value) for key, value in values.items() if key not in before]
            for start in range(0, len(params), BATCH_PARAMS):
                self.client.log_batch(self.run_id, params=params[start : start + BATCH_PARAMS])
            self.client.log_text(self.run_id, dump_config(config), "config.yaml")
        changed = {key: value for key, value in values.items() if key in before and before[key] != value}
        if changed:
            self.set_tags(changed)

    def log_datasets(self, inputs: Sequence[Any]) -> None:
        """Show which rows the run is made of; those of the same name and digest are shown once."""
        if inputs:
            with speaking_to(self.uri):
                self.client.log_inputs(self.run_id, datasets=inputs)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set or replace tags of the run."""
        from mlflow.entities import RunTag

        with speaking_to(self.uri):
            self.client.log_batch(
                self.run_id, tags=[RunTag(key, value[:TAG_CHARACTERS]) for key, value in tags.items()]
            )

    def describe(self, text: str) -> None:
        """Set or replace the description of the run, in Markdown."""
        self.set_tags({NOTE_TAG: text})

    def tags(self) -> dict[str, str]:
        """All tags of the run."""
        with speaking_to(self.uri):
            return dict(self.client.get_run(self.run_id).data.tags)

    def is_running(self) -> bool:
        """Whether MLflow shows the run, and as one that goes on."""
        with speaking_to(self.uri):
            info = self.client.get_run(self.run_id).info
        return bool(info.status == "RUNNING" and info.lifecycle_stage == "active")

    def go_on(self) -> None:
        """Let the run be shown as running again."""
        with speaking_to(self.uri):
            self.client.update_run(self.run_id, status="RUNNING")

    def end(self, status: Status) -> None:
        """End the run."""
        with speaking_to(self.uri):
            self.client.set_terminated(self.run_id, status)

    def page(self) -> str:
        """The address of the run's page in MLflow, once its server runs."""
        with speaking_to(self.uri):
            experiment_id = self.client.get_run(self.run_id).info.experiment_id
        server = self.uri.rstrip("/") if self.uri.startswith(HTTP) else LOCAL_SERVER
        return f"{server}/#/experiments/{experiment_id}/runs/{self.run_id}{OF_TRAINING}"

    def open_with(self) -> str | None:
        """The command that starts a server for the page; None where one is running."""
        return None if self.uri.startswith(HTTP) else f"mlflow ui --backend-store-uri {self.uri}"


def open_run(config: RunConfig, run: RunPaths, note: TrackingNote) -> tuple[MlflowRun, TrackingNote]:
    """The MLflow run of a note, which is made, once, where MLflow does not have it yet, and the note that names it.

    Raises ServiceError, within seconds, when MLflow does not answer, UnknownRunError when it has lost the run.
    """
    client, uri = connect(config.registry), tracking_uri(config.registry)
    with impatience(), unrepeated():
        if note.run_id is not None:
            if not is_known(client, uri, note.run_id):
                raise UnknownRunError(
                    f"{run.tracking} says the run is tracked as {note.run_id} at {note.tracking_uri}, but {uri} does "
                    f"not have it. Correct registry.tracking_uri, or delete {run.tracking} to track it anew."
                )
            return MlflowRun(client, uri, note.run_id), note
        with speaking_to(uri):
            experiment_id = find_experiment(client, config.registry)
            run_id = run_with_key(client, experiment_id, note.key)
            if run_id is None:
                tags = {**note.tags, KEY_TAG: note.key}
                run_id = str(client.create_run(experiment_id, tags=tags, run_name=config.name).info.run_id)
        opened = MlflowRun(client, uri, run_id)
        opened.set_configuration(config)
        opened.log_datasets(dataset_inputs(run))
    note = note.but(run_id=run_id, tracking_uri=uri, experiment=config.registry.experiment)
    write_note(run.tracking, note)
    return opened, note


def run_with_key(client: Any, experiment_id: str, key: str) -> str | None:
    """The id of the MLflow run that was made for a `tracking.json`, if there is one."""
    found = client.search_runs([experiment_id], f"tags.{KEY_TAG} = '{key}'", order_by=["attributes.start_time ASC"])
    return str(found[0].info.run_id) if found else None


def is_known(client: Any, uri: str, run_id: str) -> bool:
    """Whether MLflow has a run of that id."""
    from mlflow.exceptions import MlflowException

    with speaking_to(uri):
        try:
            client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False
    return True


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
