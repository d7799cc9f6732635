"""What a run's folder remembers of its MLflow run: the file `tracking.json`."""

import uuid
from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from nestune.config import RegistryConfig
from nestune.errors import RunError
from nestune.files import read_json, write_json
from nestune.registry.connection import tracking_uri
from nestune.runs import RunPaths

Status = Literal["FINISHED", "FAILED", "KILLED"]
REMEDY = "Run nestune train first."


class TrackingNote(BaseModel):
    """Where a run is tracked, and what MLflow has of it. Files of earlier versions name less.

    run_id: the MLflow run; none until it is there with its configuration.
    key: a tag by which that run is found although the answer that named it got lost.
    tags: what the MLflow run is tagged with when it is made.
    ended: how training ended; none while it goes on, and after a kill.
    told: the end that MLflow was told of.
    complete: whether MLflow has every number of the metrics files.
    """

    model_config = ConfigDict(frozen=True)

    tracking_uri: str
    experiment: str = "nestune"
    run_id: str | None
    key: str = ""
    tags: dict[str, str] = {}
    ended: Status | None = None
    told: Status | None = None
    complete: bool = False

    def but(self, **changes: object) -> "TrackingNote":
        """The note with some fields changed."""
        return self.model_copy(update=changes)


def new_note(registry: RegistryConfig, tags: Mapping[str, str]) -> TrackingNote:
    """The note of a run that MLflow knows nothing of."""
    return TrackingNote(
        tracking_uri=tracking_uri(registry),
        experiment=registry.experiment,
        run_id=None,
        key=uuid.uuid4().hex,
        tags=dict(tags),
    )


def read_note(run: RunPaths) -> TrackingNote:
    """The note in a run's folder; raises RunError where it is missing or broken."""
    content = read_json(run.tracking, REMEDY, keys=["run_id", "tracking_uri"])
    try:
        return TrackingNote.model_validate(content)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise RunError(f"{run.tracking} is no note of an MLflow run: {faults}. Delete it to track it anew.") from None


def write_note(run: RunPaths, note: TrackingNote) -> None:
    """Write the note into the run's folder."""
    write_json(run.tracking, note.model_dump(mode="json"))
