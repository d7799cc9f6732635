"""Prefect flow: from JSONL to a registered adapter, a task for each stage.

    python flows/retrain.py --config configs/demo_nestune.yaml [--serve]

No Prefect server is needed: without one, Prefect starts its own for the time of the run.
"""

# ruff: noqa: E402 - the environment is settled before Prefect reads its settings
import argparse
import functools
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from nestune.environment import set_defaults

set_defaults()

import httpx
from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact, create_progress_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas import State
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.exceptions import CancelledRun, PrefectException, TerminationSignal
from prefect.flow_runs import pause_flow_run
from prefect.input import RunInput
from prefect.runtime import deployment, flow_run
from prefect.settings import get_current_settings
from prefect.states import Cancelled, Crashed
from pydantic import Field

from nestune.cli import Result, exit_code_of
from nestune.cli_parser import add_run_options
from nestune.config import RunConfig, change_recipe, load_config, parse_config
from nestune.errors import NestuneError, ServiceError, StoppedError
from nestune.run_state import RunState, owned, recorded
from nestune.runs import RunPaths
from nestune.stages.dead_runs import end_dead_runs
from nestune.stages.finished import check_before_running
from nestune.stages.status import read_status
from nestune.training.recorder import TRAIN_METRICS

LEAVE_AFTER_S = 5.0
TELL_EVERY_S = 2.0
# Whoever is to approve a promotion may be away for two weeks.
APPROVAL_S = 14 * 24 * 3600
# A flow run that became Running later than a stage of it was noted is at work again; clocks are not that far apart.
CLOCKS_DIFFER = timedelta(seconds=5)


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
            if not _is_being_cancelled():
                raise
            stopped_for_it = isinstance(signalled.__context__, StoppedError)
            return Cancelled(
                message=str(signalled.__context__) if stopped_for_it else f"cancelled during {stage.__name__}"
            )

    return noted


def _is_being_cancelled() -> bool:
    """Whether this flow run was cancelled in Prefect, whose runner then sends a signal; False where none can tell."""
    try:
        with get_client(sync_client=True) as client:
            state = client.read_flow_run(UUID(flow_run.id)).state
    except (PrefectException, httpx.HTTPError):
        return False
    return state is not None and state.is_cancelling()


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
    with _progress_shown(run):
        return stage(config, run, force=force, resume=resume)


@contextmanager
def _progress_shown(run: RunPaths) -> Iterator[None]:
    """Show in Prefect how far a training is, in an artifact that moves: what `nestune status` reads from its folder.

    A thread reads and tells, so that training waits neither for the disk nor for the server.
    """
    if not _has_server():
        yield
        return
    ended = threading.Event()
    # Where the artifact belongs, Prefect knows from the context of the task.
    told = threading.Thread(target=copy_context().run, args=(_tell_progress, run, ended), daemon=True)
    told.start()
    try:
        yield
    finally:
        ended.set()
        told.join(timeout=TELL_EVERY_S)


def _tell_progress(run: RunPaths, ended: threading.Event) -> None:
    artifact: UUID | None = None
    last, began, metrics = False, time.time(), run.metrics / TRAIN_METRICS
    while not last:
        last = ended.wait(TELL_EVERY_S)
        # What an earlier training left there is no progress of this one.
        if not metrics.exists() or metrics.stat().st_mtime < began:
            continue
        status = read_status(run)
        if not (status.step and status.steps):
            continue
        if last:  # it has ended, or was stopped: no time is left
            status = replace(status, left_s=None)
        progress, lines = 100 * status.step / status.steps, "\n".join(f"- {line}" for line in status.progress())
        try:
            if artifact is None:
                artifact = create_progress_artifact(progress, key=_artifact_key(run), description=lines)
            else:
                update_progress_artifact(artifact, progress, description=lines)
        except (PrefectException, httpx.HTTPError):
            # The next one tells more.
            continue


def _artifact_key(run: RunPaths) -> str:
    """The name of a run as Prefect's keys have it: small letters, digits, dashes."""
    return "progress-" + re.sub("[^a-z0-9]+", "-", run.root.name.lower()).strip("-")


@task(task_run_name="evaluate", cache_policy=NO_CACHE)
@_noted
def evaluate(config: RunConfig) -> Result:
    """Score base, parent, champion and candidate, and let the gate decide."""
    from nestune.stages.evaluate import evaluate as stage

    return stage(config, RunPaths.of(config.name))


def _may_succeed_later(_task: Any, _run: Any, state: Any) -> bool:
    return isinstance(state.result(raise_on_failure=False), ServiceError)


@task(
    task_run_name="register",
    cache_policy=NO_CACHE,
    retries=2,
    retry_delay_seconds=10,
    retry_condition_fn=_may_succeed_later,
)
@_noted
def register(config: RunConfig) -> Result:
    """Register the adapter, and promote it if the gate let it pass. The registry may be across a network."""
    from nestune.stages.register import register as stage

    return stage(config, RunPaths.of(config.name))


class Approval(RunInput):
    """What a person says of a candidate that passed the gate: the form in which the flow run pauses."""

    approve: bool = Field(False, description="on: the version becomes champion; off: it stays what it is")
    reason: str = Field("", description="why; it is kept with the version")


@task(
    task_run_name="decide",
    cache_policy=NO_CACHE,
    retries=2,
    retry_delay_seconds=10,
    retry_condition_fn=_may_succeed_later,
)
def decide(config: RunConfig, approve: bool, reason: str) -> dict[str, Any]:
    """Do with the version that waits what a person has said of it."""
    from nestune.stages.register import decide as stage

    return stage(config, RunPaths.of(config.name), approve, reason)


def _asked(config: RunConfig, registered: dict[str, Any]) -> dict[str, Any]:
    """What became of a version once a person has said in Prefect whether it is promoted; as it is, where none waits.

    A flow run whose process ends before that asks again when it is started again.
    """
    if not (registered.get("waits") and _has_server()):
        return registered
    form = Approval.with_initial_data(description=_as_markdown(RunPaths.of(config.name), registered))
    said = pause_flow_run(wait_for_input=form, timeout=APPROVAL_S, key="approval")
    return decide(config, said.approve, said.reason)


def _as_markdown(run: RunPaths, registered: dict[str, Any]) -> str:
    from nestune.stages.register import as_markdown

    return as_markdown(run, registered)


def _has_server() -> bool:
    """Whether a Prefect server is there to show a form, and not only for the time of the run."""
    return bool(get_current_settings().api.url)


def _unless_stopped(result: Any) -> Any:
    """A task's result; raises StoppedError where it is the state Cancelled."""
    if isinstance(result, State):
        raise StoppedError(result.message)
    return result


def _run_name() -> str:
    config = flow_run.parameters["config"]
    return str(config.name if isinstance(config, RunConfig) else config.get("name"))


def _as_given(config: RunConfig | dict[str, Any]) -> RunConfig:
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


# Prefect would tell what is wrong with the parameters where nobody looks: the log of such a run stays empty.
@flow(name="retrain", flow_run_name=_run_name, validate_parameters=False)
def retrain(config: RunConfig, force: bool = False, resume: bool = False) -> Any:
    """From JSONL to a registered adapter; champion, if it learned and nothing was forgotten.

    A training that was interrupted goes on. Returns each stage's result, or the state Cancelled when the run was asked
    to stop.

    Args:
        config: one run, as in a YAML file
        force: on: train anew what another configuration has trained under the same name, or what is trained already
        resume: on: go on also on the other backend, or with more steps
    """
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).addFilter(_told_once)
    logging.getLogger("prefect.flow_runs").addFilter(_is_no_cancelled_run)
    config = _as_given(config)
    run = RunPaths.of(config.name)
    end_dead_runs(end_flow_run)
    with owned(run, f"Prefect flow run {flow_run.name}"):
        finished = check_before_running(config, run, force, resume)
        if finished is not None:
            get_run_logger().info("%s", ": ".join(finished.summary()))
            return {"register": _asked(config, finished.as_dict())}
        # Called, not submitted: training stays in the main thread, where a signal reaches it.
        try:
            results = {
                "validate": _unless_stopped(validate(config)),
                "tiers": _unless_stopped(tiers(config)),
                "train": _unless_stopped(train(config, force, resume)),
                "evaluate": _unless_stopped(evaluate(config)),
                "register": _unless_stopped(register(config)),
            }
        except StoppedError as stopped:
            return Cancelled(message=str(stopped))
    results["register"] = _asked(config, results["register"])
    summary = _as_markdown(run, results["register"])
    create_markdown_artifact(summary, key="retrain-report", description=f"what became of {config.name}")
    get_run_logger().info("%(model)s version %(version)s, gate %(gate)s: %(reason)s", results["register"])
    return results


def run_once(config: RunConfig, force: bool = False, resume: bool = False) -> Any:
    """As `retrain`; raises StoppedError when the run was asked to stop."""
    try:
        return retrain(config, force, resume)
    except CancelledRun as stopped:
        raise StoppedError(str(stopped)) from None


def behave_on_a_terminal() -> None:
    """Have Prefect log an error that says what to do once and without traceback, and let Ctrl-C end all soon."""
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).addFilter(_is_no_error_of_a_user)
    signal.signal(signal.SIGINT, _leave_soon)


def _leave_soon(*_: object) -> None:
    """Interrupt the flow, and end the process when Prefect does not.

    A terminal's Ctrl-C ends Prefect's temporary server too, which Prefect would then ask for minutes what to do.
    """
    logging.disable()
    print("interrupted", file=sys.stderr)
    timer = threading.Timer(LEAVE_AFTER_S, os._exit, [130])
    timer.daemon = True
    timer.start()
    raise KeyboardInterrupt


def _is_no_error_of_a_user(record: logging.LogRecord) -> bool:
    """False where Prefect would log an error that the command prints when it ends."""
    return not (record.exc_info and isinstance(record.exc_info[1], NestuneError))


def _is_no_cancelled_run(record: logging.LogRecord) -> bool:
    """False where Prefect would log the traceback of a state that says Cancelled, as the log has said before."""
    return not (record.exc_info and isinstance(record.exc_info[1], CancelledRun))


class _ToldOnce(logging.Filter):
    """Has an error that says what to do stand in the log once, by itself, without traceback."""

    _told: BaseException | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, NestuneError):
            if error is self._told:
                return False
            self._told = error
            record.msg, record.args, record.exc_info = str(error), (), None
        elif "Failed(" in record.getMessage():
            if self._told is not None:
                return False
            # Prefect shows the exception as Python writes it, its line breaks escaped.
            record.msg, record.args = record.getMessage().partition("\\n")[0], ()
        return True


_told_once = _ToldOnce()


def serve(config: RunConfig) -> None:
    """Serve the flow until the process is ended: on Prefect's pages it is started, with this configuration in the form.

    One run at a time; a further one waits its turn. Raises ServiceError where no Prefect server answers.
    """
    address = get_current_settings().api.url
    try:
        if not address:
            raise httpx.ConnectError("PREFECT_API_URL is not set")
        httpx.get(f"{address}/health", timeout=10).raise_for_status()
    except httpx.HTTPError as error:
        raise ServiceError(
            f"there is no Prefect server to serve to{f' at {address}' if address else ''}: {error}. Start one, `make "
            "prefect`, and name it: export PREFECT_API_URL=http://127.0.0.1:4200/api"
        ) from None
    print(f"serving retrain/{config.name} to {address}; Ctrl-C ends", file=sys.stderr)
    retrain.serve(name=config.name, parameters={"config": config.model_dump(mode="json")}, limit=1)


def main(arguments: list[str] | None = None) -> int:
    """Run the flow once; returns 0, 2 for wrong input, 1 for a failure, 3 when the run was stopped on request."""
    parser = argparse.ArgumentParser(description="From JSONL to a registered adapter, as a Prefect flow.")
    add_run_options(parser, trains=True)
    parser.add_argument(
        "--serve", action="store_true", help="do not run it: have it started, stopped and watched on Prefect's pages"
    )
    options = parser.parse_args(arguments)
    if options.serve and (options.force or options.resume):
        parser.error("--force and --resume are asked for in the form of each run, not with --serve")
    if options.serve:
        return exit_code_of(lambda: serve(load_config(options.config, options.set, options.name)))
    behave_on_a_terminal()
    return exit_code_of(
        lambda: run_once(load_config(options.config, options.set, options.name), options.force, options.resume)
    )


if __name__ == "__main__":
    sys.exit(main())
