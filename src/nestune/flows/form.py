"""What the form of a flow run, or REST, has sent as its configuration."""

from typing import Any
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.runtime import deployment, flow_run

from nestune.config import RunConfig, change_recipe, parse_config


def run_name() -> str:
    """The name of the run that a flow run is asked for, before anything of it has been checked."""
    config = flow_run.parameters["config"]
    return str(config.name if isinstance(config, RunConfig) else config.get("name"))


def as_given(config: RunConfig | dict[str, Any]) -> RunConfig:
    """The configuration of a flow run. Raises ConfigError with every fault of what the form, or REST, has sent."""
    if isinstance(config, RunConfig):
        return config
    retention = config.get("retention")
    if isinstance(retention, dict):
        config = config | {"retention": change_recipe(retention, _served_configuration().get("retention", {}))}
    return parse_config(config, source="the form")


def _served_configuration() -> dict[str, Any]:
    """What the form was filled with at first; empty where the flow run has none."""
    if not deployment.id:
        return {}
    with get_client(sync_client=True) as client:
        return dict(client.read_deployment(UUID(deployment.id)).parameters.get("config", {}))
