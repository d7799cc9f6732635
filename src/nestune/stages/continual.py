"""Tasks in sequence: each starts from the adapter of the one before; in the end every model is scored on all tasks."""

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nestune.backends.adapters import misfits, weights_file
from nestune.backends.base import Backend
from nestune.backends.factory import make_backend
from nestune.base_model import BaseModel, resolve_base
from nestune.config import RunConfig, parse_config
from nestune.errors import ConfigError, RunError
from nestune.evaluation.continual import Lineage, lineage_report
from nestune.evaluation.continual_page import heatmap, metric_lines, render_page, row_titles
from nestune.evaluation.gate import NEW_TASK
from nestune.evaluation.scores import Score
from nestune.files import read_json, sha256_file, write_bytes, write_json, write_text
from nestune.registry.parent_run import adopt, open_parent
from nestune.registry.versions import resolve_adapter
from nestune.run_state import owned, recorded
from nestune.runs import RunPaths
from nestune.stages.assign import assign
from nestune.stages.commit import commit, commits
from nestune.stages.evaluate import evaluate
from nestune.stages.finished import check_before_running, is_evaluated
from nestune.stages.result import Result
from nestune.stages.scoring import HeldOut, held_out_file, read_held_out, score_adapter
from nestune.stages.train import train
from nestune.stages.validate import validate
from nestune.stopping import StopRequests
from nestune.training.checkpoints import newest_checkpoint

EARLIER = "task_"  # before the name of an earlier task, as a retention set of a later one
STAGES: dict[str, Callable[[RunConfig, RunPaths, bool], Result]] = {
    "validate": lambda config, run, _: validate(config, run),
    "tiers": lambda config, run, _: assign(config, run),
    "train": lambda config, run, force: train(config, run, force=force),
    "evaluate": lambda config, run, _: evaluate(config, run),
}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ContinualResult:
    """The report of a sequence, as it is written to `continual.json`, and the page about it."""

    report: Mapping[str, Any]
    page: Path

    def as_dict(self) -> dict[str, Any]:
        """The result as JSON."""
        return {**self.report, "page": self.page.as_posix()}

    def summary(self) -> list[str]:
        """The result for a person: the scores along the sequence, and the metrics of them."""
        parts = [self.report[key] for key in ("tasks", "general")]
        titles = row_titles(self.report)
        width = max(map(len, titles))
        names = [name for part in parts for name in part["names"]]
        lines = [f"{'':{width}}  {'  '.join(names)}"]
        for place, title in enumerate(titles):
            cells = [cell["value"] for part in parts for cell in part["scores"][place]]
            shown = ["-" if value is None else f"{value:.3f}" for value in cells]
            lines.append(
                f"{title:{width}}  {'  '.join(f'{cell:>{len(name)}}' for cell, name in zip(shown, names, strict=True))}"
            )
        metrics = [f"{m['title']}: {m['value']} {m['interval']}".rstrip() for m in metric_lines(self.report)]
        return [*lines, *metrics, f"report: {self.page}"]


def continual(
    configs: Sequence[RunConfig],
    name: str,
    joint: str | None = None,
    force: bool = False,
    tell: Callable[[str, Sequence[str]], None] = lambda *_: None,
) -> ContinualResult:
    """Train tasks one after the other, evaluate each, and write the report of the sequence into runs/<name>.

    The first starts as its configuration says, each other one from the adapter of the one before. What the earlier
    tasks hold out joins the retention sets of the later ones, as task_<run>. A task that has been trained and evaluated
    so is not trained again, so that the same call goes on where it was ended. Nothing is registered.
    joint: an adapter trained on all tasks at once, to compare with; force: train all anew, also what another
    configuration has trained under the same names; tell: hears a title and lines of every stage.

    Raises ConfigError when the configurations make no sequence, and whatever the stages raise; StoppedError when the
    sequence, between two stages, or the run under way is asked to stop.
    """
    base = _common_base(configs, name)
    upper = _to_compare_with(joint, configs[-1], base) if joint else None
    sequence = RunPaths.of(name)
    command = f"nestune continual --name {name}"
    with owned(sequence, command), recorded(sequence, "continual"):
        stop = StopRequests(sequence)
        done: list[RunConfig] = []
        for config in configs:
            done.append(_following(config, done))
            _run_task(done[-1], command, force, stop, tell)
        report = _report(done, base, name, upper, stop)
        image = heatmap(report)
        write_json(sequence.root / "continual.json", report)
        write_bytes(sequence.root / "continual.png", image)
        write_text(sequence.root / "continual.html", render_page(report, image))
        _show_in_mlflow(done, sequence, report)
    return ContinualResult(report, sequence.root / "continual.html")


def _show_in_mlflow(tasks: Sequence[RunConfig], sequence: RunPaths, report: Mapping[str, Any]) -> None:
    """Put the MLflow runs of the tasks below one of the sequence, which has the report; warn where that fails."""
    try:
        names = json.dumps([task.name for task in tasks])
        parent = open_parent(tasks[-1].registry, "sequence", sequence.root.name, {"tasks": names})
        for task in tasks:
            adopt(RunPaths.of(task.name), parent)
        values = {name: estimate["value"] for name, estimate in report["metrics"].items()}
        finite = {f"sequence/{name}": value for name, value in values.items() if math.isfinite(value)}
        parent.log_scores(len(tasks), finite)
        parent.log_files(*(sequence.root / f"continual.{ending}" for ending in ("json", "png", "html")))
        parent.end("FINISHED")
    except RunError as error:
        log.warning("%s MLflow does not show the sequence; the same command again will.", error)


def _to_compare_with(joint: str, config: RunConfig, base: BaseModel) -> Path:
    folder = resolve_adapter(joint, config.registry)
    faults = misfits(folder, base)
    if faults:
        raise ConfigError(
            f"--joint {joint} cannot be compared with: {'; '.join(faults)}. Name an adapter of this base."
        )
    return folder


def _common_base(configs: Sequence[RunConfig], name: str) -> BaseModel:
    """The base of all tasks; raises ConfigError, with all faults, where the configurations make no sequence."""
    names = [config.name for config in configs]
    faults = [f"{one} is the name of {names.count(one)} tasks" for one in dict.fromkeys(names) if names.count(one) > 1]
    faults += [f"{name} is the name of a task and of the sequence"] if name in names else []
    bases = [resolve_base(config.model) for config in configs]
    faults += [
        f"{config.name} is trained on {base.reference}, {names[0]} on {bases[0].reference}"
        for config, base in zip(configs, bases, strict=True)
        if base.sha256 != bases[0].sha256
    ]
    for later in configs[1:]:
        if later.model.adapter is not None:
            faults.append(f"{later.name} sets model.adapter, which the task before it decides")
    files: dict[str, tuple[str, ...]] = {}
    for config in configs:
        for set_name, paths in config.data.retention.items():
            if files.setdefault(set_name, paths) != paths:
                faults.append(f"the retention set {set_name} of {config.name} has other files than before")
            if set_name in names or set_name.startswith(EARLIER):
                faults.append(f"the retention set {set_name} of {config.name} is named like a task")
    if faults:
        remedy = "Give each task its own name, one base, and no parent but the first's."
        raise ConfigError("\n  ".join(["these configurations make no sequence:", *faults, remedy]))
    return bases[0]


def _following(config: RunConfig, earlier: Sequence[RunConfig]) -> RunConfig:
    """The configuration of a task after others: their adapter is its parent, what they hold out its retention sets."""
    if not earlier:
        return config
    content = config.model_dump(mode="json")
    content["model"]["adapter"] = RunPaths.of(earlier[-1].name).candidate.as_posix()
    if not config.retention.replay.earlier_tasks:  # else they are found, and named so, through the parent
        content["data"]["retention"] |= {
            f"{EARLIER}{task.name}": [held_out_file(RunPaths.of(task.name)).as_posix()] for task in earlier
        }
    return parse_config(content, source=f"{config.name}, after {', '.join(task.name for task in earlier)}")


def _run_task(
    config: RunConfig, command: str, force: bool, stop: StopRequests, tell: Callable[[str, Sequence[str]], None]
) -> None:
    run = RunPaths.of(config.name)
    with owned(run, command):
        check_before_running(config, run, force)
        if not force:
            _check_parent(config, run)
        if not force and is_evaluated(config, run):
            tell(config.name, ["was trained and evaluated already: nothing was done"])
            return
        for stage, action in STAGES.items():
            stop.check()
            with recorded(run, stage):
                result = action(config, run, force)
            tell(f"{config.name}, {stage}", result.summary())
        if commits(config):
            with recorded(run, "commit"):
                tell(f"{config.name}, commit", commit(config, run).summary())


def _check_parent(config: RunConfig, run: RunPaths) -> None:
    """Raise RunError where a task was trained from another adapter than the one before hands on now."""
    report = run.evaluation / "report.json"
    if config.model.adapter is None or not report.exists() or newest_checkpoint(run) is None:
        return
    now = sha256_file(weights_file(resolve_adapter(config.model.adapter, config.registry)))
    then = read_json(report, "Run nestune evaluate again.", keys=["adapters"])["adapters"].get("parent")
    if then != now:
        raise RunError(
            f"{config.name} was trained from an adapter with sha256 {then!s:.12}, and {config.model.adapter} now "
            f"holds {now:.12}. Train all anew with --force, or delete {run.root}."
        )


def _report(
    tasks: Sequence[RunConfig], base: BaseModel, name: str, upper: Path | None, stop: StopRequests
) -> dict[str, Any]:
    """Score every model of the sequence on every set, and report the matrix with its metrics."""
    held_out = {task.name: read_held_out(task, RunPaths.of(task.name), base) for task in tasks}
    parts = _parts(tasks, held_out)
    start = tasks[0].model.adapter
    models = [resolve_adapter(start, tasks[0].registry) if start else None]
    models += [RunPaths.of(task.name).candidate for task in tasks]
    backend = make_backend(tasks[-1])
    scored = [_score(backend, model, parts, stop) for model in models]
    of_joint = _score(backend, upper, parts, stop) if upper else None
    general = tuple(name for name in scored[0] if name not in held_out)
    lineage = Lineage(tuple(held_out), general, tuple(scored), of_joint)
    return {
        "name": name,
        "base": {"reference": base.reference, "revision": base.revision, "sha256": base.sha256},
        "lineage": [_link(task, model, held_out) for task, model in zip(tasks, models[1:], strict=True)],
        **lineage_report(lineage, tasks[-1].gate.confidence),
    }


def _link(task: RunConfig, adapter: Path | None, held_out: Mapping[str, HeldOut]) -> dict[str, Any]:
    """One task of the sequence: what came of it, and what its gate said."""
    verdict = read_json(RunPaths.of(task.name).evaluation / "report.json", "Run nestune evaluate again.")
    assert adapter is not None
    return {
        "name": task.name,
        "adapter_sha256": sha256_file(weights_file(adapter)),
        "dataset_sha256": held_out[task.name].dataset.sha256,
        "gate_passed": verdict["passed"],
        "gate_reason": verdict["reason"],
    }


def _parts(tasks: Sequence[RunConfig], held_out: Mapping[str, HeldOut]) -> list[HeldOut]:
    """Of each task what it is scored on: its own rows, under its name, and the general sets that no task before has."""
    parts: list[HeldOut] = []
    seen: set[str] = set()
    for task in tasks:
        own = held_out[task.name]
        general = [name for name in task.data.retention if not name.startswith(EARLIER) and name not in seen]
        seen.update(general)
        # What lm-evaluation-harness asks is the same at every task.
        evaluation = own.evaluation.model_copy(update={"lm_eval": None}) if parts else own.evaluation
        sets = {task.name: own.sets[NEW_TASK]} | {name: own.sets[name] for name in general}
        parts.append(replace(own, sets=sets, evaluation=evaluation))
    return parts


def _score(backend: Backend, model: Path | None, parts: Sequence[HeldOut], stop: StopRequests) -> dict[str, Score]:
    """The scores of one model on all that the tasks are scored on."""
    scores: dict[str, Score] = {}
    for part in parts:
        scores |= score_adapter(backend, model, part, stop)
    return scores
