"""What Prefect's server shows of a flow run, where the flow itself has to ask for it or to say it."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import datetime, timedelta
from uuid import UUID

import httpx
from prefect import get_run_logger
from prefect.client.orchestration import get_client
from prefect.client.schemas import State
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.exceptions import PrefectException
from prefect.runtime import flow_run
from prefect.settings import get_current_settings
from prefect.states import Crashed, Running

from nestune.errors import ServiceError
from nestune.locks import Owner
from nestune.run_state import RunState, owned
from nestune.runs import RunPaths

# A flow run that became Running later than a stage of it was noted is at work again; clocks are not that far apart.
CLOCKS_DIFFER = timedelta(seconds=5)
WAITING = "Waiting"


def has_server() -> bool:
    """Whether a Prefect server is there to show a form, and not only for the time of the run."""
    return bool(get_current_settings().api.url)


def is_being_cancelled() -> bool:
    """Whether this flow run was cancelled in Prefect, whose runner then sends a signal; False where none can tell."""
    state = _own_state()
    return state is not None and state.is_cancelling()


def alone(run: RunPaths) -> AbstractContextManager[Owner]:
    """Have a run alone; while another process has it, it is waited for, and the flow run is shown as Waiting."""
    return owned(run, f"Prefect flow run {flow_run.name}", turn_shown())


def turn_shown() -> Callable[[Owner | None], None]:
    """What a lock is to call while it is waited for: the flow run is then shown as Waiting, and why, until it has it.

    It is called with the owner of the lock, again and again, and with None when the wait is over.
    """
    told: set[str] = set()

    def tell(owner: Owner | None) -> None:
        if owner is None:
            _show(Running())
        elif owner.token not in told:
            told.add(owner.token)
            message = f"waits until {owner} has ended"
            get_run_logger().warning("%s", message)
            _show(Running(name=WAITING, message=message))

    return tell


def name_flow_run(name: str) -> None:
    """Give this flow run the name of the run that it trains; where Prefect does not take it, it keeps its own."""
    try:
        with get_client(sync_client=True) as client:
            client.update_flow_run(UUID(flow_run.id), name=name)
    except (PrefectException, httpx.HTTPError) as error:
        get_run_logger().warning("Prefect was not told that the run is %s: %s", name, error)


def end_flow_run(crashed: RunState) -> None:
    """Set the flow run of a crashed run, which Prefect shows as running for ever, to Crashed.

    One that has ended is left alone, as is one that is at work anew. Raises ServiceError when Prefect does not answer.
    """
    if crashed.flow_run in (None, flow_run.id) or crashed.since is None:
        return
    known = FlowRunFilter(id=FlowRunFilterId(any_=[UUID(crashed.flow_run)]))
    try:
        with get_client(sync_client=True) as client:
            for found in client.read_flow_runs(flow_run_filter=known):
                state = found.state
                if state is None or not (state.is_running() or state.is_cancelling()):
                    continue
                if state.timestamp < datetime.fromisoformat(crashed.since) + CLOCKS_DIFFER:
                    client.set_flow_run_state(found.id, Crashed(message=crashed.reason), force=True)
    except (PrefectException, httpx.HTTPError) as error:
        raise ServiceError(f"Prefect does not answer: {error}. See that its server runs.") from error


def _own_state() -> State | None:
    try:
        with get_client(sync_client=True) as client:
            return client.read_flow_run(UUID(flow_run.id)).state
    except (PrefectException, httpx.HTTPError):
        return None


def _show(state: State) -> None:
    """Set the state of this flow run, unless it is to be cancelled; that it could not be shown is no failure."""
    now = _own_state()
    if now is None or not now.is_running():
        return
    try:
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(UUID(flow_run.id), state, force=True)
    except (PrefectException, httpx.HTTPError) as error:
        get_run_logger().warning("Prefect was not told that the run is %s: %s", state.name, error)
