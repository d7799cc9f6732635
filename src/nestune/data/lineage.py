"""The tasks that an adapter was trained on before, and where their rows are found again.

An adapter's metadata list them under `lineage`, the earliest first. A task's sets are known by their SHA-256: whatever
is found in their place is taken only when it has that. They are looked for in the task's run, in the files that it
named, and in DVC at the git commit of its training, from whose records its sets are divided anew.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import pydantic
from pydantic import ConfigDict, Field, ValidationError, field_validator

from nestune.config import DataConfig, RetentionConfig
from nestune.config.faults import explain
from nestune.data.records import Record, read_records
from nestune.data.report import valid_is_halved
from nestune.data.revisions import read_at_revision, tracked_hashes
from nestune.data.splits import choose_half, choose_held_out
from nestune.errors import ConfigError, DataError
from nestune.files import read_json, sha256_file, write_bytes
from nestune.foreign_files import parse_json, read_bounded
from nestune.runs import NAME, RunPaths

LINEAGE = "lineage"
PUT_BACK = "Put one of them back (dvc fetch gets what is in a remote)"
REMEDY = f"{PUT_BACK}, or set retention.replay.earlier_tasks=false and name files in retention.replay.files."


# They become parts of paths, and arguments of git.
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Set = Literal["train", "valid", "test"]


class EarlierTask(pydantic.BaseModel):
    """A task that an adapter was trained on.

    sets: `train`, `valid` and, where there is one, `test` -> SHA-256 of its file in the run's dataset; sources: those
    of them that were made of files -> path -> SHA-256; held_out: the fraction of train that became valid, None where
    valid was files; halved: whether half of valid became test; dvc: tracked path -> its hash in DVC.
    """

    model_config = ConfigDict(strict=True, frozen=True)

    run: Annotated[str, Field(pattern=f"^{NAME.pattern}$")]
    dataset_sha256: Sha256
    sets: dict[Set, Sha256]
    sources: dict[Set, dict[str, Sha256]]
    held_out: Annotated[float, Field(gt=0, lt=1)] | None
    halved: bool
    git_commit: Annotated[str, Field(pattern="^[0-9a-f]{7,64}$")] | None
    dvc: dict[str, str]

    @field_validator("sets")
    @classmethod
    def _some_are_there(cls, sets: dict[Set, str]) -> dict[Set, str]:
        if not {"train", "valid"} <= sets.keys():
            raise ValueError("train and valid must be among them")
        return sets

    @property
    def scored_set(self) -> Set:
        """The set whose rows chose nothing: `test`, else `valid`."""
        return "test" if "test" in self.sets else "valid"


def task_of(run: RunPaths, data: DataConfig, retention: RetentionConfig, git_commit: str | None) -> EarlierTask:
    """The task of a run whose dataset is built; raises RunError when its report is missing."""
    keys = ["outputs", "sources", "files", "sha256"]
    report = read_json(run.dataset / "report.json", "Run nestune validate again.", keys=keys)
    sets: tuple[Set, ...] = get_args(Set)
    sources: dict[Set, dict[str, str]] = {
        name: {file: report["sources"][file] for file in report["files"][name]}
        for name in sets
        if name in report["files"]
    }
    return EarlierTask(
        run=run.root.name,
        dataset_sha256=report["sha256"],
        sets={name: report["outputs"][f"{name}.jsonl"] for name in sets if f"{name}.jsonl" in report["outputs"]},
        sources=sources,
        held_out=data.valid if isinstance(data.valid, float) else None,
        halved=valid_is_halved(data, retention),
        git_commit=git_commit,
        dvc=tracked_hashes([Path(file) for files in sources.values() for file in files]),
    )


def earlier_tasks(adapter: Path) -> list[EarlierTask]:
    """The tasks that an adapter was trained on, the earliest first; none where its metadata tell of none.

    Raises ConfigError when they cannot be read.
    """
    path = adapter / "metadata.json"
    if not path.is_file():
        return []
    try:
        content = parse_json(read_bounded(path))
        told = content.get(LINEAGE, []) if isinstance(content, dict) else []
        return [EarlierTask.model_validate(task) for task in told]
    except ValidationError as error:
        fault = explain(error, EarlierTask)[0]
    except (OSError, ValueError, TypeError) as error:
        fault = str(error)
    raise ConfigError(
        f"{path}: its {LINEAGE} cannot be read: {fault:.300}. Take another copy of the adapter, or set "
        "retention.replay.earlier_tasks=false."
    )


def rows_of(task: EarlierTask, name: Set, runs: Path, into: Path, remedy: str = REMEDY) -> Path:
    """The file of a set of a task, `train` or what it held out, with the bytes that it had.

    runs: the folder of all runs; into: the folder that takes a set which is divided anew from its sources.
    Raises ConfigError with the task, everything that was looked for, and the remedy.
    """
    sha256 = task.sets[name]
    of_run, rebuilt = runs / task.run / "dataset" / f"{name}.jsonl", into / f"{sha256}.jsonl"
    for path in (of_run, rebuilt):
        if path.is_file() and sha256_file(path) == sha256:
            return path
    tried = [f"{of_run}: {'has other content' if of_run.is_file() else 'is not there'}"]
    contents: dict[str, list[bytes]] = {}
    for of, files in task.sources.items():
        for path_of_file, expected in files.items():
            content = _content(task, Path(path_of_file), expected, tried)
            if content is not None:
                contents.setdefault(of, []).append(content)
    if all(len(contents.get(of, [])) == len(files) for of, files in task.sources.items()):
        divided = _divide(task, contents).get(name)
        if divided is not None:
            write_bytes(rebuilt, divided)
            if sha256_file(rebuilt) == sha256:
                return rebuilt
            rebuilt.unlink()
        tried.append(
            f"the files that {name} was made of are there, but divided anew they make other rows: some were left out "
            "then, or replayed and so not held out"
        )
    looked_for = "\n".join(f"  {where}" for where in tried)
    raise ConfigError(
        f"the {name} rows of the earlier task {task.run} (sha256 {sha256[:12]}) are not found. Looked for:\n"
        f"{looked_for}\n{remedy}"
    )


def unique_names(tasks: Sequence[EarlierTask], taken: Sequence[str]) -> list[str]:
    """A name for each task, `task_<run>`, with a number behind it where that is taken."""
    names: list[str] = []
    for task in tasks:
        first = name = f"task_{task.run}"
        number = 1
        while name in (*taken, *names):
            number += 1
            name = f"{first}_{number}"
        names.append(name)
    return names


def _content(task: EarlierTask, path: Path, sha256: str, tried: list[str]) -> bytes | None:
    """The bytes that a source file had, from the disk or from DVC; None, and why in `tried`, when neither has them."""
    if path.is_file() and sha256_file(path) == sha256:
        return path.read_bytes()
    here = "has other content" if path.is_file() else "is not there"
    tried.append(f"{path} (sha256 {sha256[:12]}): {here}")
    if task.git_commit is None:
        tried.append(f"{path} in DVC: the task was trained outside of git")
        return None
    found = read_at_revision(path, task.git_commit, sha256)
    if isinstance(found, str):
        tried.append(f"{path} in DVC at commit {task.git_commit[:12]}: {found}")
        return None
    return found


def _divide(task: EarlierTask, contents: Mapping[str, Sequence[bytes]]) -> dict[str, bytes]:
    """The sets of a task, as its stage `validate` divided them; those that cannot be are missing."""
    sets = {name: _lines(files) for name, files in contents.items()}
    try:
        if task.held_out is not None:
            chosen = choose_held_out([digest for digest, _ in sets["train"]], task.held_out, never=())
            sets["train"], sets["valid"] = _apart(sets["train"], chosen)
        if task.halved:
            chosen = choose_half([digest for digest, _ in sets["valid"]])
            sets["valid"], sets["test"] = _apart(sets["valid"], chosen)
    except (DataError, KeyError):
        return {}
    return {name: b"".join(line for _, line in lines) for name, lines in sets.items()}


def _lines(files: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    """The digest and the line of every good record."""
    found: list[tuple[bytes, bytes]] = []
    for content in files:
        with tempfile.NamedTemporaryFile(suffix=".jsonl") as file:
            file.write(content)
            file.flush()
            records: list[Any] = list(read_records(Path(file.name), max_line_bytes=max(1, len(content))))
        good = [record for record in records if isinstance(record, Record)]
        found += [(record.digest, record.as_json().encode("utf-8") + b"\n") for record in good]
    return found


def _apart(
    lines: Sequence[tuple[bytes, bytes]], chosen: set[bytes]
) -> tuple[list[tuple[bytes, bytes]], list[tuple[bytes, bytes]]]:
    """Those that stay, and those that are chosen, each in their order."""
    return [line for line in lines if line[0] not in chosen], [line for line in lines if line[0] in chosen]
