"""A person's word before a promotion: the flow run pauses on a real Prefect server, and goes on as its form says."""

from typing import Any

import pytest
from tests.services.conftest import Prefect, configuration, until

from nestune.config import RegistryConfig
from nestune.registry.promotion import history_of
from nestune.registry.versions import list_versions

pytestmark = pytest.mark.services


def pausing(served: Prefect, name: str) -> str:
    """The id of a flow run that has paused to ask."""
    blocks: dict[str, Any] = {
        "training": {"steps": 8, "eval_every": 4},
        "registry": {"registered_model": "asked", "promote": "approve"},
    }
    flow_run = served.create(configuration(name, **blocks))
    until(lambda: served.state(flow_run)["type"] in ("PAUSED", "FAILED", "CRASHED", "COMPLETED"), "the flow to pause")
    assert served.state(flow_run)["type"] == "PAUSED", (served.folder / "runner.log").read_text()
    return flow_run


def say(served: Prefect, flow_run: str, **form: object) -> None:
    """As the form of Prefect's page does, and wait for the end."""
    answer = served.api.post(f"/flow_runs/{flow_run}/resume", json={"run_input": form}).raise_for_status().json()
    assert answer["status"] == "ACCEPT", answer
    until(lambda: served.state(flow_run)["type"] in ("COMPLETED", "FAILED", "CRASHED"), "the flow run to end")
    assert served.state(flow_run)["type"] == "COMPLETED", (served.folder / "runner.log").read_text()


def test_a_version_becomes_champion_when_a_person_says_so_and_not_otherwise(served: Prefect) -> None:
    registry = RegistryConfig(tracking_uri=f"sqlite:///{served.folder}/mlflow/mlflow.db", registered_model="asked")
    first = pausing(served, "first")
    assert history_of(registry).champion is None
    say(served, first, approve=True, reason="read the report")
    (entry,) = history_of(registry).entries
    assert (entry.version, entry.action, entry.reason) == ("1", "promoted", "approved: read the report")

    second = pausing(served, "second")
    refused = served.api.post(f"/flow_runs/{second}/resume", json={"run_input": {"approve": "perhaps"}}).json()
    assert refused["status"] == "REJECT"
    say(served, second, approve=False, reason="too rude")
    assert history_of(registry).champion == "1"
    versions = {version.number: version.tags["approval"] for version in list_versions(registry)}
    assert versions == {"1": "approved: read the report", "2": "not approved: too rude"}
