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
from nestune.registry.versions import MODEL_SETTINGS, adapter_folder, check_version

REPORT, REPORT_SHA256 = "report.json", "report_sha256"
GATE, STEP = "gate", "step"
RETENTION = "retention"
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


def figures_of(scores: Mapping[str, Mapping[str, Any]]) -> dict[tuple[str, str], float]:
    """The figures of one model in a report, by set and measure."""
    return {
        (name, score.get("metric") or measure): score[measure]
        for name, score in scores.items()
        for measure in ("loss", "exact_match")
        if score[measure] is not None
    }


def metrics_of(report: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a report by the names that they have in MLflow, retention[/<model>]/<set>.<measure>.

    MLflow's pages put together what is the same before the last slash: `retention` has what the candidate scored, on
    the new task too, and `retention/<model>` what each of the others did.
    """
    return {
        f"{RETENTION}{'' if model == 'candidate' else f'/{model}'}/{name}.{measure}": figure
        for model, by_set in report["scores"].items()
        for (name, measure), figure in figures_of(by_set).items()
    }


def read_gate_record(registry: RegistryConfig, version: str) -> GateRecord:
    """The record of a version.

    Raises ConfigError when there is no such version; RunError, with everything that does not agree, when the report is
    not there or was changed, is of another adapter, or the adapter's weights, the tags or metrics in MLflow were.
    """
    check_version(registry, version)
    adapter_folder(registry, version)
    client, uri, name = connect(registry), tracking_uri(registry), registry.registered_model
    with speaking_to(uri):
        found = client.get_model_version(name, version)
    with tempfile.TemporaryDirectory() as scratch:
        path = _download_report(client, name, version, Path(scratch))
        sha256 = sha256_file(path)
        report = read_json(path, AGAIN)
    try:
        faults = _contradictions(report, sha256, found.tags)
        with speaking_to(uri):
            faults += _edited_metrics(client, name, found, report)
    except (KeyError, TypeError, AttributeError):
        faults = [f"its report, with sha256 {sha256[:12]}, lacks what a report has"]
    if faults:
        lines = [f"version {version} of {name} is not as it was evaluated:", *faults, AGAIN]
        raise RunError("\n  ".join(lines))
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


def _contradictions(report: Mapping[str, Any], sha256: str, tags: Mapping[str, str]) -> list[str]:
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
    return faults


def _edited_metrics(client: Any, name: str, found: Any, report: Mapping[str, Any]) -> list[str]:
    """Metrics of a version's run that are not what its report says.

    A run that went on, or whose candidate was made otherwise, has several versions, the newest of which logged last at
    its step; of an older one the value is still in the history.
    """
    of_run = client.search_model_versions(f"name='{name}' and run_id='{found.run_id}'")
    is_newest = int(found.version) == max(int(version.version) for version in of_run)
    steps = {int(version.tags[STEP]) for version in of_run if STEP in version.tags}
    step, faults = int(report["candidate"]["step"]), []
    for key, value in metrics_of(report).items():
        # In the order in which they were logged.
        logged = sorted(client.get_metric_history(found.run_id, key), key=lambda metric: metric.timestamp)
        values = [metric.value for metric in logged if metric.step == step]
        strange = [metric for metric in logged if metric.step not in steps]
        if not any(_same(one, value) for one in (values[-1:] if is_newest else values)):
            faults.append(f"its metric {key} is {values[-1] if values else None}, the report says {value}")
        elif strange:
            at = f"{strange[-1].value} at step {strange[-1].step}"
            faults.append(f"its metric {key} is {at}, at which nothing was registered; the report says {value}")
    return faults


def _same(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=1e-9) or (math.isnan(one) and math.isnan(other))
