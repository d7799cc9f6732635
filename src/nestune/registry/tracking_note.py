"""What a run's folder remembers of its MLflow run: the file `tracking.json`."""

import logging
import subprocess
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from nestune.config import RunConfig
from nestune.errors import RunError, ServiceError
from nestune.files import read_json, write_json
from nestune.registry.connection import tracking_uri
from nestune.registry.versions import pin_adapter
from nestune.runs import RunPaths

Status = Literal["FINISHED", "FAILED", "KILLED"]
REMEDY = "Run nestune train first."
UNTOLD = ".tracking.{}.untold.json"

log = logging.getLogger(__name__)


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


def note_of_training(config: RunConfig, tags: Mapping[str, str]) -> TrackingNote:
    """The note of a training of which MLflow knows nothing yet.

    Besides `tags`, it is to be tagged with its name, the git commit and the parent adapter, whose alias becomes the
    version that it points at now; it stays an alias when MLflow does not answer.
    """
    parent = config.model.adapter or "none"
    try:
        parent = pin_adapter(parent, config.registry)
    except ServiceError as error:
        log.warning("%s The tag parent is not pinned to a version.", error)
    return TrackingNote(
        tracking_uri=tracking_uri(config.registry),
        experiment=config.registry.experiment,
        run_id=None,
        key=uuid.uuid4().hex,
        tags={"run": config.name, "parent": parent, "git_commit": git_commit(), **tags},
    )


def read_note(path: Path) -> TrackingNote:
    """The note in a file; raises RunError where it is missing or broken."""
    content = read_json(path, REMEDY, keys=["run_id", "tracking_uri"])
    try:
        return TrackingNote.model_validate(content)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise RunError(f"{path} is no note of an MLflow run: {faults}. Delete it to track it anew.") from None


def write_note(path: Path, note: TrackingNote) -> None:
    """Write the note into a file."""
    write_json(path, note.model_dump(mode="json"))


def untold(run: RunPaths) -> list[Path]:
    """The notes of runs that ended while MLflow did not answer, and whose `tracking.json` may be gone."""
    return sorted(run.root.glob(UNTOLD.format("*")))


def keep_untold(run: RunPaths, note: TrackingNote) -> None:
    """Keep a note of a run that ended untold: a training that fails may bring an older `tracking.json` back."""
    write_note(run.root / UNTOLD.format(note.key), note)


def git_commit() -> str:
    """The commit of the current folder, with `-dirty` where tracked files differ from it; `none` outside of git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "none"
    return said.stdout.strip()
