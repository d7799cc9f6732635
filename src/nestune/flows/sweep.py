"""The flow `sweep`: a run for every point of a grid, below one MLflow run; the best goes to the registry."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact
from prefect.exceptions import CancelledRun
from prefect.runtime import flow_run
from prefect.states import Cancelled

from nestune.config import load_config
from nestune.errors import StoppedError
from nestune.flows import tasks
from nestune.flows.flow_log import tell_errors_once
from nestune.flows.flow_state import alone, end_flow_run
from nestune.flows.progress import artifact_key
from nestune.registry.model_card import markdown_table
from nestune.registry.parent_run import adopt, open_parent
from nestune.runs import RunPaths
from nestune.stages.commit import commits
from nestune.stages.dead_runs import end_dead_runs
from nestune.stages.finished import is_evaluated
from nestune.stages.sweep import Point, outcome_of, points, ranked, table
from nestune.stages.tables import aligned


def series_name() -> str:
    """The name of the series that a flow run is asked for: its runs are `<series>-1`, `<series>-2`, ..."""
    asked = flow_run.parameters
    return load_config(Path(asked["path"]), asked["overrides"], asked["name"]).name


@flow(name="sweep", flow_run_name=series_name)
def sweep(
    path: str, grid: dict[str, list[Any]], overrides: tuple[str, ...] = (), name: str | None = None
) -> dict[str, Any] | Any:
    """Train and evaluate the configuration in a file at every point of a grid, and register the best.

    Best is what the gate lets pass, then what learned most less what it lost; where nothing passes, nothing is
    registered. The same call goes on where it was ended.
    """
    tell_errors_once()
    end_dead_runs(end_flow_run)
    made = points(Path(path), overrides, name, grid)
    series = made[0].config.name.rpartition("-")[0]
    parent = open_parent(made[0].config.registry, "sweep", series, {"grid": json.dumps(grid)})
    try:
        for point in made:
            _train(point)
            adopt(RunPaths.of(point.config.name), parent)
        outcomes = ranked([outcome_of(point) for point in made])
        best = outcomes[0]
        registered = _register(best.point) if best.passed else None
    except StoppedError as stopped:
        parent.end("KILLED")
        return Cancelled(message=str(stopped))
    except BaseException:
        parent.end("FAILED")
        raise
    parent.set_tags({"best": best.point.config.name if best.passed else "none"})
    parent.end("FINISHED")
    rows = table(outcomes)
    told = f"best: {best.point.config.name}" if best.passed else "no point passed the gate; nothing is registered"
    shown = "\n".join([told, "", *markdown_table(rows[0], rows[1:])])
    create_markdown_artifact(shown, key=artifact_key("sweep", series), description=told)
    get_run_logger().info("%s", "\n".join([*aligned(rows), told]))
    return {"best": best.point.config.name if best.passed else None, "rows": rows, "register": registered}


def sweep_once(path: Path, grid: Mapping[str, Sequence[Any]], overrides: Sequence[str], name: str | None) -> Any:
    """As `sweep`; raises StoppedError when a run was asked to stop.

    What is wrong with the grid, or a configuration that it makes, is raised before there is a flow run.
    """
    points(path, overrides, name, grid)
    try:
        return sweep(str(path), {key: list(values) for key, values in grid.items()}, tuple(overrides), name)
    except CancelledRun as stopped:
        raise StoppedError(str(stopped)) from None


def _train(point: Point) -> None:
    """Take a point through its stages up to the evaluation, unless it has been."""
    config, run = point.config, RunPaths.of(point.config.name)
    with alone(run):
        if is_evaluated(config, run):
            return
        for task in (tasks.validate, tasks.tiers):
            tasks.unless_stopped(task(config))
        tasks.unless_stopped(tasks.train(config, False, False))
        tasks.unless_stopped(tasks.evaluate(config))


def _register(point: Point) -> Any:
    with alone(RunPaths.of(point.config.name)):
        registered = tasks.unless_stopped(tasks.register(point.config))
        if commits(point.config):
            tasks.unless_stopped(tasks.commit(point.config))
    return registered
