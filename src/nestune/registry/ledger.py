"""Which version was champion, since when and why: a list in MLflow that grows at its end and never changes otherwise.

MLflow moves an alias for whoever asks last, so of two promotions at once both would believe that they won. What it
does promise is that a parameter of a run has the value that it was first given: entry n of the list is such a
parameter, and of all who want to write it one succeeds. The alias `champion` follows the list.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from nestune.errors import RunError

ENTRY, APPLIED = "promotion.", "applied."
# So long whoever made the experiment may take until its run is there.
MAKING_S = 10.0
REASON_CHARACTERS = 2000
MODEL_TAG = "nestune.promotions_of"

Action = Literal["promoted", "forced", "rolled back", "moved by hand"]


@dataclass(frozen=True)
class Promotion:
    """One entry: what became champion (None: the alias was taken away) in the place of what, how, by whom, when.

    number: its place in the list, from 1. report_sha256: of the report that the gate decided by, where it was asked.
    """

    number: int
    version: str | None
    before: str | None
    action: Action
    by: str
    at: str
    reason: str
    report_sha256: str | None = None


class Ledger:
    """The list of one registered model; its methods raise what MLflow raises."""

    def __init__(self, client: Any, model: str, artifacts: str | None = None) -> None:
        self._client = client
        self._model = model
        self._artifacts = artifacts
        self._run_id: str | None = None

    def entries(self) -> tuple[list[Promotion], bool]:
        """All of it, the earliest first, and whether the aliases were moved after the last one."""
        run_id = self._run_id or self._find()
        if run_id is None:
            return [], True
        params = self._client.get_run(run_id).data.params
        told = [json.loads(value) for key, value in params.items() if key.startswith(ENTRY)]
        entries = sorted((Promotion(**one) for one in told), key=lambda entry: entry.number)
        return entries, not entries or f"{APPLIED}{entries[-1].number}" in params

    def add(self, entry: Promotion) -> bool:
        """Write an entry; False, and nothing written, where another one has its number.

        A reason is cut at REASON_CHARACTERS, as MLflow would cut the whole, in silence.
        """
        from mlflow.exceptions import MlflowException

        run_id, key = self._run_id or self._find() or self._make(), f"{ENTRY}{entry.number}"
        short = replace(entry, reason=entry.reason[:REASON_CHARACTERS])
        try:
            self._client.log_param(run_id, key, json.dumps(asdict(short), ensure_ascii=False))
        except MlflowException:
            # One that is there has another value.
            if key not in self._client.get_run(run_id).data.params:
                raise
            return False
        return True

    def set_applied(self, number: int) -> None:
        """Note that the aliases were moved after an entry; as often as you like."""
        run_id = self._run_id or self._find()
        self._client.log_param(run_id, f"{APPLIED}{number}", "yes")

    @property
    def _experiment(self) -> str:
        return f"{self._model}: promotions"

    def _find(self) -> str | None:
        from mlflow.entities import ViewType

        experiment = self._client.get_experiment_by_name(self._experiment)
        if experiment is None:
            return None
        if experiment.lifecycle_stage == "deleted":
            raise RunError(
                f"the history of {self._model}, the experiment {self._experiment!r}, is deleted in MLflow. Restore it "
                f"with mlflow experiments restore --experiment-id {experiment.experiment_id}."
            )
        # Had two been made after all, everybody takes the same one; a deleted one still tells.
        runs = self._client.search_runs([experiment.experiment_id], run_view_type=ViewType.ALL)
        if runs:
            self._run_id = str(min((run.info.start_time, run.info.run_id) for run in runs)[1])
        return self._run_id

    def _make(self) -> str:
        """The run, made by the one process that makes its experiment; the others wait for it."""
        from mlflow.exceptions import MlflowException

        until = 0.0
        try:
            self._client.create_experiment(self._experiment, artifact_location=self._artifacts)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            until = time.monotonic() + MAKING_S
        while (found := self._find()) is None and time.monotonic() < until:
            time.sleep(0.1)
        if found is None:
            experiment = self._client.get_experiment_by_name(self._experiment)
            tags = {MODEL_TAG: self._model, "mlflow.note.content": f"Who made which version of {self._model} champion."}
            made = self._client.create_run(experiment.experiment_id, tags=tags, run_name="promotions")
            self._client.set_terminated(made.info.run_id)
            found = self._find()
        assert found is not None, "it was just made"
        return found


def told(entry: Promotion) -> str:
    """An entry in one line, e.g. `forced by ada@lab at 2026-01-05T03:00:00+00:00: the set was wrong`."""
    return f"{entry.action} by {entry.by} at {entry.at}{f': {entry.reason}' if entry.reason else ''}"


def champions(entries: Sequence[Promotion]) -> list[str | None]:
    """What a rollback goes back through: the last one is the champion, None where the alias was taken away.

    A promotion adds to them, a rollback takes off what came after the version that it went back to.
    """
    line: list[str | None] = []
    for entry in entries:
        if entry.action == "rolled back" and entry.version in line:
            line = line[: len(line) - line[::-1].index(entry.version)]
        elif line[-1:] != [entry.version]:
            line.append(entry.version)
    return line
