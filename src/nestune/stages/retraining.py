"""Scheduled retraining: what has arrived since the champion was trained, and the run that is to learn it.

Data has arrived when no adapter behind the champion was trained on it: a file of `data.train` is known by the SHA-256
of its content, a record by what it says, so that a file that has grown counts with the records that are new in it. The
lineage of a version is in its adapter; one that the gate stopped is behind no champion, and so its data stays new.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import count
from pathlib import Path
from typing import Any

from nestune.base_model import resolve_base
from nestune.config import RunConfig, parse_config
from nestune.data.find_files import find_files
from nestune.data.lineage import EarlierTask, Set, earlier_tasks, rows_of, unique_names
from nestune.data.records import Record, digests_in, read_records
from nestune.files import read_json, sha256_file, write_json
from nestune.registry.gate_record import GATE
from nestune.registry.ledger import Promotion, told
from nestune.registry.promotion import history_of
from nestune.registry.versions import CHAMPION, Version, fitting_champion, list_versions, resolve_adapter
from nestune.runs import RUNS, RunPaths
from nestune.stages.earlier import KNOWN_REMEDY, known_files

ATTEMPT = "attempt_sha256"
ARRIVED = "arrived"


@dataclass(frozen=True)
class Retraining:
    """A retraining that is due.

    config: of a run of its own, upon the champion, or, while there is none, upon what it was asked to start from;
    arrived: the files that it learns; attempt: SHA-256 of all that decides how it ends, but for the code.
    """

    config: RunConfig
    champion: str | None
    arrived: tuple[str, ...]
    attempt: str

    def summary(self) -> str:
        """What is about to be trained, for a person."""
        upon = f"champion version {self.champion}" if self.champion else self.config.model.adapter or "the base"
        return f"{self.config.name}: {', '.join(self.arrived)} arrived since; training upon {upon}"

    def note(self, run: RunPaths) -> None:
        """Leave in the run's folder what this attempt is, which its version will be tagged with."""
        write_json(run.retraining, {ATTEMPT: self.attempt, ARRIVED: list(self.arrived)})


@dataclass(frozen=True)
class NothingToDo:
    """Why there is nothing to retrain."""

    reason: str


def plan_retraining(config: RunConfig, day: date, force: bool = False) -> Retraining | NothingToDo:
    """What a retraining of a series, as `config` describes it and names it, trains today.

    Each gets a run named `<series>-<day>`, or goes on with one that was interrupted. What a version was trained on so
    before that did not become champion is not tried again, unless `force` asks for it; the run of one that waits for a
    person's word is gone on with, so that it is asked for again. The held-out part of every earlier task joins the
    retention sets.
    Raises DataError for files that cannot be read, ConfigError when the champion is of another base, or when the rows
    of an earlier task are not found; ServiceError when MLflow does not answer.
    """
    registry, series = config.registry, RunPaths.of(config.name)
    current = fitting_champion(config, resolve_base(config.model))
    version = current.version if current else None
    parent = f"models:/{registry.registered_model}/{version}" if version else _first_parent(config)
    tasks = earlier_tasks(resolve_adapter(parent, registry)) if parent else []
    content = config.model_dump(mode="json")
    content["model"]["adapter"] = parent
    content["data"]["only_new"] = bool(tasks)

    files = find_files(config.data.train)
    behind = f"version {version}, or one behind it," if version else f"{parent}, or what is behind it,"
    arrived = _unknown(files, tasks, "train")
    if not arrived:
        return NothingToDo(f"nothing has arrived: {behind} was trained on every file of data.train ({len(files)})")
    if tasks:
        known = digests_in(known_files(_of(content, config), series))
        arrived = [file for file in arrived if _says_new(file, known, config.data.max_line_bytes)]
    if not arrived:
        return NothingToDo(f"nothing has arrived: {behind} knows every record of data.train")
    content["data"]["train"] = [str(file) for file in arrived]
    held_out: tuple[tuple[Set, Any], ...] = (("valid", config.data.valid), ("test", config.data.test))
    for name, paths in held_out:
        if not isinstance(paths, float):
            own = find_files(paths)
            content["data"][name] = [str(file) for file in _unknown(own, tasks, name) or own]

    attempt = _attempt(content, config)
    versions = list_versions(registry)
    same = [one for one in versions if one.tags.get(ATTEMPT) == attempt]
    tried = [one for one in same if one.tags.get(GATE) in ("passed", "refused")]
    if tried and not force:
        undone = history_of(registry).undone(tried[-1].number)
        if undone is not None or not _waits(tried[-1]):
            return NothingToDo(_tried(tried[-1], registry.registered_model, undone))
        content["name"] = tried[-1].tags["run"]
    else:
        content["name"] = _name(series, day, attempt, [one.tags.get("run", "") for one in versions])
    if not config.retention.replay.earlier_tasks:  # else they are found through the parent
        content["data"]["retention"] |= _held_out(tasks, config, series)
    return Retraining(_of(content, config), version, tuple(map(str, arrived)), attempt)


def attempt_tags(run: RunPaths) -> dict[str, str]:
    """What the version of a run is tagged with that was planned here; nothing for others."""
    if not run.retraining.exists():
        return {}
    noted = read_json(run.retraining, "Delete it; the data then counts as not tried.", keys=[ATTEMPT, ARRIVED])
    return {ATTEMPT: noted[ATTEMPT], ARRIVED: " ".join(noted[ARRIVED])}


def _first_parent(config: RunConfig) -> str | None:
    """What is trained upon while there is no champion: the adapter of the configuration, but for that very alias."""
    adapter = config.model.adapter
    return None if adapter == f"models:/{config.registry.registered_model}@{CHAMPION}" else adapter


def _of(content: Mapping[str, Any], config: RunConfig) -> RunConfig:
    return parse_config(content, source=f"the retraining of {config.name}")


def _unknown(files: Sequence[Path], tasks: Sequence[EarlierTask], name: Set) -> list[Path]:
    """Those of the files that are, by their content, in no task's set of this name."""
    known = {sha256 for task in tasks for sha256 in task.sources.get(name, {}).values()}
    return [file for file in files if sha256_file(file) not in known]


def _says_new(file: Path, known: set[bytes], max_line_bytes: int) -> bool:
    """Whether a file has a record that is not known, or something that is wrong, which is to be told."""
    records = read_records(file, max_line_bytes)
    return any(not isinstance(record, Record) or record.digest not in known for record in records)


def _attempt(content: Mapping[str, Any], config: RunConfig) -> str:
    """SHA-256 of what decides how a training ends: the configuration, the parent, and the content of all its files."""
    data = content["data"]
    paths = [data["train"], *([] if isinstance(config.data.valid, float) else [data["valid"]]), data["test"]]
    paths += [*data["retention"].values(), content["retention"]["replay"]["files"]]
    files = {str(file): sha256_file(file) for named in paths if named for file in find_files(named)}
    decides = {key: block for key, block in content.items() if key not in ("name", "registry", "dvc")}
    return hashlib.sha256(json.dumps([decides, files], sort_keys=True).encode()).hexdigest()


def _waits(version: Version) -> bool:
    """Whether a person is still to say if a version is promoted: the flow run that asked has not had its answer."""
    registration = RunPaths.of(version.tags["run"]).registration
    return registration.exists() and bool(read_json(registration, "Run nestune register again.").get("waits"))


def _tried(version: Version, model: str, undone: Promotion | None) -> str:
    """What became of a version that was trained on the same."""
    tags = version.tags
    became = f"the gate {'refused it' if tags[GATE] == 'refused' else 'let it pass'}: {tags.get('gate_reason', '')}"
    word = f" ({tags['approval']})" if "approval" in tags else ""
    word += f"; {told(undone)}" if undone is not None else ""
    return (
        f"version {version.number} was trained on what has arrived, with this configuration, and is not champion: "
        f"{became}{word}. It would end so again: add data, change the configuration, promote it (nestune promote "
        f"{version.number} --model {model}), or force another attempt"
    )


def _name(series: RunPaths, day: date, attempt: str, registered: Sequence[str]) -> str:
    """The run that this attempt has begun and not ended, or a new one's name."""
    stem = f"{series.root.name}-{day.isoformat()}"
    for path in sorted(RUNS.glob(f"{series.root.name}-*/{series.retraining.name}"), reverse=True):
        begun = RunPaths(path.parent)
        if not begun.registration.exists() and attempt_tags(begun).get(ATTEMPT) == attempt:
            return begun.root.name
    names = (stem if number == 1 else f"{stem}-{number}" for number in count(1))
    return next(name for name in names if name not in registered and not RunPaths.of(name).root.exists())


def _held_out(tasks: Sequence[EarlierTask], config: RunConfig, series: RunPaths) -> dict[str, list[str]]:
    """What the earlier tasks held out, as retention sets."""
    names = unique_names(tasks, taken=list(config.data.retention))
    found = [rows_of(task, task.scored_set, RUNS, series.earlier, KNOWN_REMEDY) for task in tasks]
    return {name: [path.as_posix()] for name, path in zip(names, found, strict=True)}
