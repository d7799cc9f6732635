"""Serving the flow: Prefect's pages start it, or a schedule does, one run at a time."""

import asyncio
import hashlib
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import httpx
import psutil
from prefect.runner import Runner
from prefect.schedules import Cron, Schedule
from prefect.settings import get_current_settings
from prefect.types.entrypoint import EntrypointType
from pydantic import ValidationError

from nestune.config import RunConfig
from nestune.errors import ConfigError, ServiceError
from nestune.flows.retrain import retrain
from nestune.locks import held, lock_of

UTC = "UTC"
# A step, and a checkpoint of a large model.
END_AFTER_S = 600.0


def deploy(config: RunConfig, cron: str | None = None, timezone: str | None = None, from_champion: bool = True) -> None:
    """Serve the flow until the process is ended, with this configuration in its form, and started by a schedule.

    One run at a time; a further one waits its turn. Ctrl-C and SIGTERM end a run under way at its next step, and take
    the schedule away. timezone: of the schedule, by default UTC.
    Raises ConfigError for a schedule that is none, ServiceError where no Prefect server answers, BusyError where
    another process of this user serves that name there.
    """
    schedule = read_schedule(cron, timezone)
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
    when = f", at {cron} ({timezone or UTC})" if cron is not None else ""
    what, command = f"the deployment retrain/{config.name} at {address}", f"nestune deploy --name {config.name}"
    lock = lock_of(f"serving-{hashlib.sha256(what.encode()).hexdigest()[:16]}")
    with held(lock, command, what, remedy="End that process, or serve under another --name"):
        runner = _Runner(name=config.name, limit=1)
        runner.add_flow(
            retrain,
            name=config.name,
            schedule=schedule,
            parameters={"config": config.model_dump(mode="json"), "from_champion": from_champion},
            # What a module is called is found wherever nestune is installed.
            entrypoint_type=EntrypointType.MODULE_PATH,
        )
        print(f"serving retrain/{config.name} to {address}{when}; Ctrl-C ends", file=sys.stderr)
        with suppress(KeyboardInterrupt, asyncio.CancelledError):
            asyncio.run(runner.serve())


class _Runner(Runner):
    """Prefect's runner, which on SIGTERM ends only once the runs that it has started have ended at their next step."""

    async def serve(self) -> None:
        self._served_by, self._serving = asyncio.get_running_loop(), asyncio.current_task()
        await self.start()

    def handle_sigterm(self, *_: Any, **__: Any) -> None:
        started = [child for child in psutil.Process().children() if not _is_of_python(child)]
        for process in started:
            with suppress(psutil.NoSuchProcess):
                process.terminate()
        threading.Thread(target=self._end_after, args=(started,), daemon=True).start()

    def _end_after(self, started: Sequence[psutil.Process]) -> None:
        # Looked at only: that they have ended, the runner is to hear from the system itself.
        give_up_at = time.monotonic() + END_AFTER_S
        while any(map(_is_at_work, started)) and time.monotonic() < give_up_at:
            time.sleep(0.2)
        assert self._serving is not None
        self._served_by.call_soon_threadsafe(self._serving.cancel)


def _is_of_python(process: psutil.Process) -> bool:
    """Whether it is a helper of Python's own, which takes no signal, and ends with its parent."""
    try:
        return any("resource_tracker" in part for part in process.cmdline())
    except psutil.NoSuchProcess:
        return True


def _is_at_work(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def read_schedule(cron: str | None, timezone: str | None) -> Schedule | None:
    """A schedule in cron's words, e.g. `0 3 * * 1`, Mondays at three; raises ConfigError when it says no time."""
    from prefect.client.schemas.schedules import CronSchedule

    if cron is None:
        if timezone is not None:
            raise ConfigError(f"--timezone {timezone} is of a schedule, and there is none. Name one, by --cron.")
        return None
    zone = timezone or UTC
    try:
        CronSchedule(cron=cron, timezone=zone)
    except ValidationError as error:
        told = "; ".join(fault["msg"].removeprefix("Value error, ") for fault in error.errors())
        raise ConfigError(
            f"{cron!r} in {zone!r} is no schedule: {told}. Write minute, hour, day of the month, month and day of "
            "the week, e.g. --cron '0 3 * * 1' for Mondays at three, and a zone such as --timezone Europe/Berlin."
        ) from None
    return Cron(cron, timezone=zone)
