"""The sets of rows of a run as MLflow shows them: its dataset inputs, each with what it was used for."""

import json
from typing import Any

from nestune.files import read_json
from nestune.runs import RunPaths

CONTEXT = "mlflow.data.context"
CONTEXTS = {"train": "training", "valid": "validation", "test": "testing"}
# What MLflow takes as the digest of a dataset.
DIGEST_CHARACTERS = 36


def dataset_inputs(run: RunPaths) -> list[Any]:
    """An `mlflow.entities.DatasetInput` for each set of the validated dataset; none where the run has no dataset.

    Its digest is the start of the SHA-256 of the set's file; its source names that file, and its profile counts its
    records and tokens. Its context is training, validation, testing, retention or replay.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag

    path = run.dataset / "report.json"
    if not path.exists():
        return []
    report = read_json(path, "Run nestune validate again.", keys=["sets", "outputs"])
    found = []
    for name, told in report["sets"].items():
        file = f"{name}.jsonl"
        dataset = Dataset(
            name=name,
            digest=report["outputs"][file][:DIGEST_CHARACTERS],
            source_type="local",
            source=json.dumps({"uri": (run.dataset / file).as_posix()}),
            profile=json.dumps({"records": told["records"], "tokens": told["tokens"]}),
        )
        context = CONTEXTS.get(name, name.partition("/")[0])
        found.append(DatasetInput(dataset, [InputTag(CONTEXT, context)]))
    return found
