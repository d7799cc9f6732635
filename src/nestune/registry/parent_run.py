"""One MLflow run above several: that of a sweep, or of a sequence of tasks."""

from collections.abc import Mapping

from nestune.config import RegistryConfig
from nestune.registry.connection import connect, find_experiment, impatience, speaking_to, tracking_uri
from nestune.registry.mlflow_run import KEY_TAG, MlflowRun, run_with_key
from nestune.registry.tracking_note import read_note
from nestune.runs import RunPaths

PARENT_TAG = "mlflow.parentRunId"


def open_parent(registry: RegistryConfig, kind: str, name: str, tags: Mapping[str, str]) -> MlflowRun:
    """The MLflow run of a series of runs, such as `sweep` or `sequence`; it is made once, and found again later.

    Raises ServiceError, within seconds, when MLflow does not answer.
    """
    client, uri = connect(registry), tracking_uri(registry)
    key = f"{kind} {name}"
    with impatience(), speaking_to(uri):
        experiment_id = find_experiment(client, registry)
        run_id = run_with_key(client, experiment_id, key)
        if run_id is None:
            made = client.create_run(experiment_id, tags={KEY_TAG: key}, run_name=f"{name} ({kind})")
            run_id = str(made.info.run_id)
    parent = MlflowRun(client, uri, run_id)
    parent.set_tags(tags)
    parent.go_on()
    return parent


def adopt(run: RunPaths, parent: MlflowRun) -> None:
    """Show the MLflow run of a training below that of its series."""
    run_id = read_note(run.tracking).run_id
    if run_id is not None:
        MlflowRun(parent.client, parent.uri, run_id).set_tags({PARENT_TAG: parent.run_id})
