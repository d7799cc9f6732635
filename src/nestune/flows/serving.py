"""Serving the flow: Prefect's pages start it, or a schedule does, one run at a time."""

import sys

import httpx
from prefect.schedules import Cron, Schedule
from prefect.settings import get_current_settings
from prefect.types.entrypoint import EntrypointType
from pydantic import ValidationError

from nestune.config import RunConfig
from nestune.errors import ConfigError, ServiceError
from nestune.flows.retrain import retrain


def deploy(config: RunConfig, cron: str | None = None, timezone: str = "UTC", from_champion: bool = True) -> None:
    """Serve the flow until the process is ended, with this configuration in its form, and started by a schedule.

    One run at a time; a further one waits its turn. Raises ConfigError for a schedule that is none, ServiceError where
    no Prefect server answers.
    """
    schedule = read_schedule(cron, timezone) if cron is not None else None
    address = get_current_settings().api.url
    try:
        if not address:
            raise httpx.ConnectError("PREFECT_API_URL is not set")
        httpx.get(f"{address}/health", timeout=10).raise_for_status()
    except httpx.HTTPError as error:
        raise ServiceError(
            f"there is no Prefect server to serve to{f' at {address}' if address else ''}: {error}. Start one, `make "
            "ui`, and name it: export PREFECT_API_URL=http://127.0.0.1:4200/api"
        ) from None
    when = f", at {cron} ({timezone})" if cron is not None else ""
    print(f"serving retrain/{config.name} to {address}{when}; Ctrl-C ends", file=sys.stderr)
    retrain.serve(
        name=config.name,
        schedule=schedule,
        parameters={"config": config.model_dump(mode="json"), "from_champion": from_champion},
        limit=1,
        # What a module is called is found wherever nestune is installed.
        entrypoint_type=EntrypointType.MODULE_PATH,
    )


def read_schedule(cron: str, timezone: str) -> Schedule:
    """A schedule in cron's words, e.g. `0 3 * * 1`, Mondays at three; raises ConfigError when it says no time."""
    from prefect.client.schemas.schedules import CronSchedule

    try:
        CronSchedule(cron=cron, timezone=timezone)
    except ValidationError as error:
        told = "; ".join(fault["msg"].removeprefix("Value error, ") for fault in error.errors())
        raise ConfigError(
            f"{cron!r} in {timezone!r} is no schedule: {told}. Write minute, hour, day of the month, month and day of "
            "the week, e.g. --cron '0 3 * * 1' for Mondays at three, and a zone such as --timezone Europe/Berlin."
        ) from None
    return Cron(cron, timezone=timezone)
