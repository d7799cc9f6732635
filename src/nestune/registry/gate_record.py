"""What the gate decided about a version, kept with it in such a way that a later edit is seen.

A version holds the report of its evaluation; its tag `report_sha256` names that report, whose figures are also metrics
of the MLflow run. A promotion reads the report, and refuses where any of the others says something else.
"""

import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nestune.config import RegistryConfig
from nestune.errors import RunError
from nestune.files import read_json, sha256_file
from nestune.registry.connection import connect, environment_defaults, speaking_to, tracking_uri
from nestune.registry.versions import MODEL_SETTINGS, check_version

REPORT, REPORT_SHA256 = "report.json", "report_sha256"
GATE = "gate"
AGAIN = "Evaluate and register it again, or promote it with --force and a --reason."


@dataclass(frozen=True)
class GateRecord:
    """A version's report, which nothing contradicts, and its SHA-256."""

    version: str
    report: Mapping[str, Any]
    sha256: str

    @property
    def passed(self) -> bool:
        """Whether the gate let the candidate pass."""
        return bool(self.report["passed"])

    @property
    def compared_with(self) -> str | None:
        """The champion at the time; None while there was none."""
        champion = self.report["champion_version"]
        return None if champion is None else str(champion)


def metrics_of(report: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a report by the names that they have in MLflow, evaluation/<model>/<set>/<measure>."""
    return {
        f"evaluation/{model}/{name}/{score.get('metric') or measure}": score[measure]
        for model, by_set in report["scores"].items()
        for name, score in by_set.items()
        for measure in ("loss", "exact_match")
        if score[measure] is not None
    }


def read_gate_record(registry: RegistryConfig, version: str) -> GateRecord:
    """The record of a version.

    Raises ConfigError when there is no such version; RunError, with everything that does not agree, when the report is
    not there or was changed, is of another adapter, or the tags or metrics in MLflow were.
    """
    check_version(registry, version)
    client, uri, name = connect(registry), tracking_uri(registry), registry.registered_model
    with speaking_to(uri):
        found = client.get_model_version(name, version)
        metrics = client.get_run(found.run_id).data.metrics
    with tempfile.TemporaryDirectory() as scratch:
        path = _download_report(client, name, version, Path(scratch))
        sha256 = sha256_file(path)
        report = read_json(path, AGAIN, keys=["passed", "champion_version", "scores", "adapters", "reason"])
    faults = _contradictions(report, sha256, found.tags, metrics)
    if faults:
        raise RunError(
            "\n  ".join([f"version {version} of {name} is not as it was evaluated:", *faults]) + f"\n  {AGAIN}"
        )
    return GateRecord(version, report, sha256)


def _download_report(client: Any, name: str, version: str, into: Path) -> Path:
    from mlflow.artifacts import download_artifacts

    try:
        with environment_defaults(MODEL_SETTINGS):
            source = client.get_model_version_download_uri(name, version)
            found = download_artifacts(f"{source}/{REPORT}", dst_path=str(into), tracking_uri=client.tracking_uri)
    except Exception as error:  # MLflow passes on errors of every artifact store, which share no ancestor
        raise RunError(
            f"version {version} of {name} has no report of its evaluation ({type(error).__name__}), by which the gate "
            f"could be asked. {AGAIN}"
        ) from None
    return Path(found)


def _contradictions(
    report: Mapping[str, Any], sha256: str, tags: Mapping[str, str], metrics: Mapping[str, float]
) -> list[str]:
    faults = []
    if tags.get(REPORT_SHA256) != sha256:
        faults.append(f"its report has sha256 {sha256[:12]}, registered was {tags.get(REPORT_SHA256, 'none')[:12]}")
    if tags.get("adapter_sha256") != report["adapters"]["candidate"]:
        faults.append(
            f"its adapter has sha256 {tags.get('adapter_sha256', 'none')[:12]}, the report is of "
            f"{report['adapters']['candidate']:.12}"
        )
    if report["passed"] != (tags.get(GATE) in ("passed", "outdated")):
        faults.append(
            f"its tag {GATE} is {tags.get(GATE)!r}; by the report it {'passed' if report['passed'] else 'was refused'}"
        )
    for key, value in metrics_of(report).items():
        now = metrics.get(key)
        if now is None or not (math.isclose(now, value, rel_tol=1e-9) or (math.isnan(now) and math.isnan(value))):
            faults.append(f"its metric {key} is {now}, the report says {value}")
    return faults
