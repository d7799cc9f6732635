"""The earlier tasks of a run: what its parent was trained on, to be replayed, and held out, to be measured on."""

from dataclasses import replace
from pathlib import Path

from nestune.config import RunConfig
from nestune.data.lineage import PUT_BACK, EarlierTask, Set, earlier_tasks, rows_of, unique_names
from nestune.data.report import EarlierSets
from nestune.errors import ConfigError
from nestune.registry.versions import resolve_adapter
from nestune.runs import RUNS, RunPaths

KNOWN_REMEDY = f"{PUT_BACK}; what was learned before cannot be told from what is new without them."


def earlier_sets(config: RunConfig, candidate: Path | None = None) -> list[EarlierSets]:
    """The sets of earlier tasks that belong to a run's dataset, the earliest first; their files are not looked for.

    None where `retention.replay.earlier_tasks` is off, or there is no parent. candidate: the adapter that was trained
    on them, whose lineage still tells them when the parent's alias has moved on. Raises ConfigError when the parent
    does not tell what it was trained on.
    """
    return [sets for _, sets in _tasks(config, candidate)]


def find_earlier_sets(config: RunConfig, run: RunPaths) -> list[EarlierSets]:
    """As `earlier_sets`, with their files; raises ConfigError with all that are not found."""
    found: list[EarlierSets] = []
    faults: list[str] = []
    for task, sets in _tasks(config):
        paths: list[Path] = []
        wanted: tuple[Set, ...] = ("train", task.scored_set)
        for name in wanted:
            try:
                paths.append(rows_of(task, name, RUNS, run.earlier))
            except ConfigError as error:
                faults.append(str(error))
        if len(paths) == 2:
            found.append(replace(sets, train=paths[0], held_out=paths[1]))
    if faults:
        raise ConfigError("\n".join(faults))
    return found


def known_files(config: RunConfig, run: RunPaths) -> list[Path]:
    """The files of all rows that the parent, and the adapters before it, were trained on or held out; none: no parent.

    Raises ConfigError with all that are not found.
    """
    if config.model.adapter is None:
        return []
    tasks = earlier_tasks(resolve_adapter(config.model.adapter, config.registry))
    found: list[Path] = []
    faults: list[str] = []
    for task in tasks:
        for name in task.sets:
            try:
                found.append(rows_of(task, name, RUNS, run.earlier, KNOWN_REMEDY))
            except ConfigError as error:
                faults.append(str(error))
    if faults:
        raise ConfigError("\n".join(faults))
    return found


def _tasks(config: RunConfig, candidate: Path | None = None) -> list[tuple[EarlierTask, EarlierSets]]:
    if not config.retention.replay.earlier_tasks or config.model.adapter is None:
        return []
    if candidate is not None:
        tasks = earlier_tasks(candidate)[:-1]
    else:
        tasks = earlier_tasks(resolve_adapter(config.model.adapter, config.registry))
    if not tasks:
        raise ConfigError(
            f"retention.replay.earlier_tasks is on, but the parent {config.model.adapter} does not tell what it was "
            "trained on. Name files in retention.replay.files and set earlier_tasks=false, or take a parent that "
            "nestune has trained."
        )
    names = unique_names(tasks, taken=list(config.data.retention))
    return [
        (task, EarlierSets(name, task.sets["train"], task.sets[task.scored_set]))
        for task, name in zip(tasks, names, strict=True)
    ]
