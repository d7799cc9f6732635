"""The flow `retrain`: from JSONL to a registered adapter; by a schedule, what has arrived, upon the champion."""

from typing import Any

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.exceptions import CancelledRun, TerminationSignal
from prefect.runtime import flow_run
from prefect.states import Cancelled, Completed

from nestune.config import RunConfig
from nestune.errors import DataError, StoppedError
from nestune.flows import tasks
from nestune.flows.approval import asked
from nestune.flows.flow_log import tell_errors_once
from nestune.flows.flow_state import alone, end_flow_run, is_being_cancelled, name_flow_run
from nestune.flows.form import as_given, run_name
from nestune.registry.model_card import markdown_table
from nestune.runs import RunPaths
from nestune.stages.commit import commits
from nestune.stages.dead_runs import end_dead_runs
from nestune.stages.finished import check_before_running
from nestune.stages.retraining import NothingToDo, Retraining, plan_retraining

SKIPPED = "Skipped"
REPORT = "retrain-report"


# Prefect would tell what is wrong with the parameters where nobody looks: the log of such a run stays empty.
@flow(name="retrain", flow_run_name=run_name, validate_parameters=False)
def retrain(
    config: RunConfig,
    force: bool = False,
    resume: bool = False,
    from_champion: bool = False,
) -> Any:
    """From JSONL to a registered adapter; champion, if it learned and nothing was forgotten.

    A training that was interrupted goes on. While another process is at work on the same run, or the same series, it
    waits, and is shown as Waiting. Returns each stage's result, the state Cancelled when the run was asked to stop, or
    the state Skipped when there is nothing to retrain.

    Args:
        config: one run, as in a YAML file
        force: on: train anew what another configuration has trained under the same name, or what is trained already;
            with from_champion: also what a version was trained on that did not become champion
        resume: on: go on also on the other backend, or with more training.steps
        from_champion: on: start from the champion, and learn of data.train what has arrived since it was trained, in a
            run of its own, named after this one and the day; nothing new: ends at once, as Skipped
    """
    tell_errors_once()
    config = as_given(config)
    end_dead_runs(end_flow_run)
    try:
        if from_champion:
            results, config = _of_what_arrived(config, force, resume)
        else:
            results = _through_all_stages(config, force, resume)
        if not isinstance(results, NothingToDo):
            return _committed(_asked_and_told(results, config), config)
    except StoppedError as stopped:
        return Cancelled(message=str(stopped))
    except TerminationSignal:
        # Tasks see to it themselves; this came while it waited.
        if not is_being_cancelled():
            raise
        return Cancelled(message="cancelled while it waited")
    get_run_logger().info("skipped: %s", results.reason)
    return Completed(name=SKIPPED, message=results.reason)


def run_once(config: RunConfig, force: bool = False, resume: bool = False, from_champion: bool = False) -> Any:
    """As `retrain`; raises StoppedError when the run was asked to stop."""
    try:
        return retrain(config, force, resume, from_champion)
    except CancelledRun as stopped:
        raise StoppedError(str(stopped)) from None


@task(task_run_name="plan", **tasks.RETRIED)
def plan(config: RunConfig, force: bool) -> Retraining | NothingToDo:
    """See what has arrived since the champion was trained."""
    return plan_retraining(config, flow_run.scheduled_start_time.astimezone().date(), force)


def _of_what_arrived(config: RunConfig, force: bool, resume: bool) -> tuple[dict[str, Any] | NothingToDo, RunConfig]:
    """Plan a retraining and train it, alone in its series, so that what comes second sees what the first has made."""
    with alone(RunPaths.of(config.name)):
        planned = plan(config, force)
        if isinstance(planned, NothingToDo):
            return planned, config
        get_run_logger().info("%s", planned.summary())
        name_flow_run(planned.config.name)
        return _through_all_stages(planned.config, False, resume, planned), planned.config


def _through_all_stages(
    config: RunConfig, force: bool, resume: bool, planned: Retraining | None = None
) -> dict[str, Any]:
    """The results of the stages; only that of the last one, where the run had finished."""
    run = RunPaths.of(config.name)
    with alone(run):
        finished = check_before_running(config, run, force, resume)
        if finished is not None:
            get_run_logger().info("%s", ": ".join(finished.summary()))
            return {"register": finished.as_dict()}
        # Called, not submitted: training stays in the main thread, where a signal reaches it.
        results = {"validate": _validated(config)}
        if planned is not None:
            planned.note(run)
        return results | {
            "tiers": tasks.unless_stopped(tasks.tiers(config)),
            "train": tasks.unless_stopped(tasks.train(config, force, resume)),
            "evaluate": tasks.unless_stopped(tasks.evaluate(config)),
            "register": tasks.unless_stopped(tasks.register(config)),
        }


def _validated(config: RunConfig) -> Any:
    """What validation found; an artifact lists what is wrong with the data, line by line, where it is refused."""
    try:
        return tasks.unless_stopped(tasks.validate(config))
    except DataError as error:
        create_markdown_artifact(_faults_as_markdown(error), key=REPORT, description=f"why {config.name} was refused")
        raise


def _faults_as_markdown(error: DataError) -> str:
    rows = [[fault.file, str(fault.line or ""), fault.field, fault.problem, fault.remedy] for fault in error.faults]
    table = markdown_table(["file", "line", "field", "problem", "what to do"], rows) if rows else []
    return "\n".join(["# Refused: the data", str(error).partition("\n")[0], "", *table])


def _asked_and_told(results: dict[str, Any], config: RunConfig) -> dict[str, Any]:
    """Ask whoever is to approve of the version, where it waits for that, and tell what became of it in an artifact."""
    from nestune.stages.register import as_markdown

    results["register"] = asked(config, results["register"])
    if "train" in results:
        summary = as_markdown(RunPaths.of(config.name), results["register"])
        create_markdown_artifact(summary, key=REPORT, description=f"what became of {config.name}")
        get_run_logger().info("%(model)s version %(version)s, gate %(gate)s: %(reason)s", results["register"])
    return results


def _committed(results: dict[str, Any], config: RunConfig) -> dict[str, Any]:
    """The results, in a DVC project with what was put into DVC."""
    if not commits(config):
        return results
    with alone(RunPaths.of(config.name)):
        return results | {"commit": tasks.unless_stopped(tasks.commit(config))}
