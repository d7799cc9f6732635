"""Stage commit: what a run leaves, dataset and adapter, is put into DVC, and sent to a remote where one is set.

A run that a `dvc.yaml` describes belongs to that pipeline, and goes into `dvc.lock`, after which `dvc repro` has
nothing to do. Any other one gets a file of its own, `adapters/<run>.dvc`.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from nestune.backends.adapters import WEIGHTS
from nestune.config import RunConfig, load_config
from nestune.dvc_project import DvcProject, Tracker, absolute, dvc_project, is_run_by_dvc, project_root
from nestune.errors import ConfigError, RunError
from nestune.files import read_json, sha256_if_file, write_bytes, write_text
from nestune.registry.mlflow_run import flatten
from nestune.registry.versions import tag_version
from nestune.runs import RUNS, RunPaths

POINTERS = Path("adapters")
# The tag of a version with what DVC calls its data and its adapter.
DVC = "dvc"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CommitResult:
    """What was put into DVC.

    files: those that git is to keep; tracked: path -> its hash in DVC, of the run's dataset and candidate, and of what
    its data lies in; remote: where it was sent, None where none is set.
    """

    files: tuple[str, ...]
    tracked: dict[str, str]
    remote: str | None

    def as_dict(self) -> dict[str, Any]:
        """The result as JSON."""
        return asdict(self) | {"files": list(self.files)}

    def summary(self) -> list[str]:
        """The result for a person."""
        sent = f"sent to the remote {self.remote}" if self.remote else "not sent: no remote is set, or dvc.push is off"
        return [
            *(f"{path}: {hashed}" for path, hashed in self.tracked.items()),
            sent,
            f"git keeps it: git add {' '.join(self.files)}",
        ]


def commits(config: RunConfig) -> bool:
    """Whether a run is put into DVC at its end: this is a DVC project, and DVC does not do it itself."""
    return config.dvc.commit and project_root() is not None and not is_run_by_dvc()


def check_commit(config: RunConfig, run: RunPaths) -> None:
    """Find out before training what would keep its adapter out of DVC.

    Raises ConfigError where a `dvc.yaml` says that this run is of another configuration, where git ignores what it is
    to keep, or where there is no such remote.
    """
    with dvc_project(config.dvc.wait_s) as project:
        _plan(project, config, run)
        project.remote(config.dvc.remote)


def commit(config: RunConfig, run: RunPaths) -> CommitResult:
    """Put what a run left into DVC, and data that changed since DVC saw it; send both; tag the version with the hashes.

    Data is left alone where it is no longer what the run was made of, with a warning.
    Raises RunError when the run has left no candidate, or with what DVC says; BusyError when other DVC processes do not
    end in time; ServiceError when the remote or the tracking server fails: then the same command does what is left.
    """
    if project_root() is None:
        raise ConfigError(f"{Path.cwd()} is in no DVC project. Make one: dvc init.")
    if is_run_by_dvc():
        raise ConfigError("DVC runs this as one of its stages, and itself keeps what the stage leaves. Leave it out.")
    if not (run.candidate / WEIGHTS).is_file():
        raise RunError(f"there is no {run.candidate / WEIGHTS}. Run nestune train --name {config.name}.")
    with dvc_project(config.dvc.wait_s) as project:
        addresses = _plan(project, config, run)
        if addresses is None:
            addresses = [_track(project, run)]
        else:
            for address in addresses:
                project.commit(address)
        addresses += _commit_data(project, run)
        remote = project.remote(config.dvc.remote) if config.dvc.push else None
        trackers = [tracker for tracker in project.trackers() if tracker.address in addresses]
        tracked = _hashes(trackers, run)
        if run.registration.exists():
            told = " ".join(f"{path}={hashed}" for path, hashed in tracked.items())
            version = read_json(run.registration, "Run nestune register again.", keys=["version"])["version"]
            tag_version(config.registry, version, {DVC: told})
        if remote is not None:
            project.push(addresses, remote)
    return CommitResult(tuple(dict.fromkeys(map(_file_of, addresses))), tracked, remote)


def pointer_of(run: RunPaths) -> Path:
    """The `.dvc` file of a run that no `dvc.yaml` describes."""
    return POINTERS / f"{run.root.name}.dvc"


def _plan(project: DvcProject, config: RunConfig, run: RunPaths) -> list[str] | None:
    """What tracks the run already, beside its own `.dvc` file; None where nothing does."""
    pointer = pointer_of(run)
    owners = [owner for owner in project.trackers() if owner.touches(run.root) and owner.address != pointer.as_posix()]
    for file in sorted({file for owner in owners for file in owner.parameters}):
        differing = _differing(config, file)
        if differing:
            raise ConfigError(
                f"{run.root} is what dvc.yaml makes of {file}, and this configuration is another one "
                f"({', '.join(differing)}). Take another --name, change {file}, or set dvc.commit=false."
            )
    if not owners and project.is_ignored(pointer):
        raise ConfigError(
            f"git ignores {pointer}, which is to tell where DVC has the adapter of {config.name}. Take it out of "
            ".gitignore, or set dvc.commit=false."
        )
    return [owner.address for owner in owners] or None


def _differing(config: RunConfig, file: Path) -> list[str]:
    """The keys in which a configuration is not that of a file."""
    try:
        described = flatten(load_config(file, name=config.name))
    except ConfigError:
        return [f"{file} is none"]
    asked = {key: value for key, value in flatten(config).items() if key.partition(".")[0] != DVC}
    return [key for key, value in asked.items() if described.get(key) != value]


def _track(project: DvcProject, run: RunPaths) -> str:
    """Write the run's own `.dvc` file, or bring it up to date; its path. It stays as it was where that fails."""
    pointer = pointer_of(run)
    before = pointer.read_bytes() if pointer.exists() else None
    left = [path for path in run.root.iterdir() if path != run.state and path.name[0] != "." and path.name != "export"]
    outputs = [{"path": Path(os.path.relpath(path, POINTERS.parent)).as_posix()} for path in sorted(left)]
    content = yaml.safe_dump({"wdir": "..", "outs": outputs}, sort_keys=False)
    write_text(pointer, f"# What the run {run.root.name} left. It comes back with: dvc checkout {pointer}\n{content}")
    try:
        project.commit(pointer.as_posix())
    except BaseException:
        if before is None:
            pointer.unlink(missing_ok=True)
        else:
            write_bytes(pointer, before)
        raise
    return pointer.as_posix()


def _commit_data(project: DvcProject, run: RunPaths) -> list[str]:
    """Bring up to date what tracks the files that the run's dataset was made of; what that is."""
    report = run.dataset / "report.json"
    sources: dict[str, str] = read_json(report, "Run nestune validate again.", keys=["sources"])["sources"]
    changed = [path for path, sha256 in sources.items() if sha256_if_file(Path(path)) != sha256]
    found = []
    for tracker in project.trackers():
        if not tracker.is_data or any(absolute(path).is_relative_to(absolute(RUNS)) for path in tracker.outputs):
            continue
        if not any(tracker.touches(Path(path)) for path in sources):
            continue
        of_it = [path for path in changed if tracker.touches(Path(path))]
        if of_it:
            told = ", ".join(of_it)
            log.warning("%s changed since %s was made of it: %s stays as it is", told, run.root, tracker.address)
            continue
        if not project.is_clean(tracker.address):
            project.commit(tracker.address)
        found.append(tracker.address)
    return found


def _file_of(address: str) -> str:
    """The file in which the hashes of a tracker are: its own, or the lock beside its `dvc.yaml`."""
    if address.endswith(".dvc"):
        return address
    pipeline, _, stage = address.rpartition(":")
    return Path(pipeline).with_name("dvc.lock").as_posix() if pipeline and stage else "dvc.lock"


def _hashes(trackers: Sequence[Tracker], run: RunPaths) -> dict[str, str]:
    """Path -> hash, of the run's candidate and dataset, or what they are in, and of the data."""
    hashes: dict[str, str] = {}
    for tracker in trackers:
        of_run = tracker.touches(run.root)
        for path, hashed in tracker.outputs.items():
            if hashed is not None and (not of_run or path in (run.candidate, run.dataset, run.root)):
                hashes[path.as_posix()] = hashed
    return hashes
