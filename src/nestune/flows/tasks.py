"""The stages of a run as Prefect tasks, of which the run's folder tells, too."""

import functools
from collections.abc import Callable
from typing import Any

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas import State
from prefect.exceptions import TerminationSignal
from prefect.runtime import flow_run
from prefect.states import Cancelled

from nestune.config import RunConfig
from nestune.errors import ServiceError, StoppedError
from nestune.flows.flow_state import is_being_cancelled, turn_shown
from nestune.flows.progress import progress_shown
from nestune.run_state import recorded
from nestune.runs import RunPaths
from nestune.stages.result import Result


def unless_stopped(result: Any) -> Any:
    """A task's result; raises StoppedError where it is the state Cancelled."""
    if isinstance(result, State):
        raise StoppedError(result.message)
    return result


def _noted(stage: Callable[..., Any]) -> Callable[..., Any]:
    """A stage of which the run's folder and the log tell; it returns its result as JSON.

    Where the run was asked to stop it returns the state Cancelled.
    """

    @functools.wraps(stage)
    def noted(config: RunConfig, *options: bool) -> Any:
        try:
            with recorded(RunPaths.of(config.name), stage.__name__, flow_run.id):
                result = stage(config, *options)
            get_run_logger().info("\n".join(result.summary()))
            return result.as_dict()
        except StoppedError as stopped:
            return Cancelled(message=str(stopped))
        except TerminationSignal as signalled:
            # Prefect's word for a signal that nobody in Prefect asked for is Crashed, and so it stays.
            if not is_being_cancelled():
                raise
            stopped_for_it = isinstance(signalled.__context__, StoppedError)
            return Cancelled(
                message=str(signalled.__context__) if stopped_for_it else f"cancelled during {stage.__name__}"
            )

    return noted


@task(task_run_name="validate", cache_policy=NO_CACHE)
@_noted
def validate(config: RunConfig) -> Result:
    """Check the JSONL, split it, and write the dataset of the run."""
    from nestune.stages.validate import validate as stage

    return stage(config, RunPaths.of(config.name))


@task(task_run_name="tiers", cache_policy=NO_CACHE)
@_noted
def tiers(config: RunConfig) -> Result:
    """Divide the LoRA parameters among the tiers."""
    from nestune.stages.assign import assign as stage

    return stage(config, RunPaths.of(config.name))


@task(task_run_name="train", cache_policy=NO_CACHE)
@_noted
def train(config: RunConfig, force: bool, resume: bool) -> Result:
    """Train the adapter, or go on with that. No retries: what failed once in training fails again."""
    from nestune.stages.train import train as stage

    run = RunPaths.of(config.name)
    with progress_shown(run):
        return stage(config, run, force=force, resume=resume, waiting=turn_shown())


@task(task_run_name="evaluate", cache_policy=NO_CACHE)
@_noted
def evaluate(config: RunConfig) -> Result:
    """Score base, parent, champion and candidate, and let the gate decide."""
    from nestune.stages.evaluate import evaluate as stage

    return stage(config, RunPaths.of(config.name))


def _may_succeed_later(_task: Any, _run: Any, state: Any) -> bool:
    return isinstance(state.result(raise_on_failure=False), ServiceError)


# What is across a network may answer later.
RETRIED: dict[str, Any] = {
    "cache_policy": NO_CACHE,
    "retries": 2,
    "retry_delay_seconds": 10,
    "retry_condition_fn": _may_succeed_later,
}


@task(task_run_name="register", **RETRIED)
@_noted
def register(config: RunConfig) -> Result:
    """Register the adapter, and promote it if the gate let it pass."""
    from nestune.stages.register import register as stage

    return stage(config, RunPaths.of(config.name))


@task(task_run_name="decide", **RETRIED)
def decide(config: RunConfig, approve: bool, reason: str) -> dict[str, Any]:
    """Do with the version that waits what a person has said of it."""
    from nestune.stages.register import decide as stage

    return stage(config, RunPaths.of(config.name), approve, reason)


@task(task_run_name="commit", **RETRIED)
@_noted
def commit(config: RunConfig) -> Result:
    """Put what the run left into DVC, and send it to a remote where one is set."""
    from nestune.stages.commit import commit as stage

    return stage(config, RunPaths.of(config.name))
