"""What validation found, as the numbers of report.json."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nestune.config import DataConfig, RetentionConfig
from nestune.errors import Fault

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class EarlierSets:
    """Rows of an earlier task: those it was trained on, to be replayed, and those held out, to be measured on.

    task: its name here; the SHA-256 of both sets as it had them; their files, which are needed to build a dataset.
    """

    task: str
    train_sha256: str
    held_out_sha256: str
    train: Path | None = None
    held_out: Path | None = None


@dataclass(frozen=True)
class SetReport:
    """One set of the dataset.

    records: accepted ones, by format in `formats`; tokens and supervised_tokens: their sums; tokens_of_a_record:
    min, median and max; truncated: records cut to data.max_seq_length; duplicates: accepted repetitions;
    rejected: lines that cannot be used, their faults by kind in `faults`; ignored_keys: how many records have keys
    beside those of their format; left_out: good ones beyond what `retention.replay.store` keeps; known: good ones that
    an earlier task has, left out by `data.only_new`.
    """

    records: int
    formats: dict[str, int]
    tokens: int
    tokens_of_a_record: dict[str, float]
    supervised_tokens: int
    truncated: int
    duplicates: int
    rejected: int
    faults: dict[str, int]
    blank_lines: int
    ignored_keys: dict[str, int]
    left_out: int = 0
    known: int = 0


@dataclass(frozen=True)
class DatasetReport:
    """A built dataset: its sets by name, and the SHA-256 of what it was made from and of what was written.

    settings: what was asked for; sha256: over all the files in `outputs`; supervised_example: the first good record
    of data.train, with what is learned between » and «; replayed: what each of the sets of replay is of;
    files: set -> those of the sources that it was read from.
    """

    settings: dict[str, Any]
    sha256: str
    sets: dict[str, SetReport]
    sources: dict[str, str]
    outputs: dict[str, str]
    supervised_example: str
    expectations: list[dict[str, Any]]
    replayed: dict[str, str]
    files: dict[str, list[str]]

    @property
    def rejected(self) -> int:
        """Lines of all sets that cannot be used."""
        return sum(report.rejected for report in self.sets.values())

    def as_dict(self) -> dict[str, Any]:
        """The report as a JSON object; the same input gives the same one."""
        return asdict(self)


def settings_of(
    data: DataConfig, retention: RetentionConfig, earlier: Sequence[EarlierSets], seed: int
) -> dict[str, Any]:
    """What decides which records a dataset holds: of a configuration, and of the tasks before."""
    store = retention.replay.store
    return data.model_dump(mode="json", include={"train", "valid", "test", "retention", "allow_duplicates"}) | {
        "replay": list(retention.replay.files),
        "earlier_tasks": [[sets.task, sets.train_sha256, sets.held_out_sha256] for sets in earlier],
        "store": {"rows": store, "seed": seed} if store else None,
        "valid_is_halved": valid_is_halved(data, retention),
        "only_new": data.only_new or None,
    }


def valid_is_halved(data: DataConfig, retention: RetentionConfig) -> bool:
    """Whether one half of `valid` becomes `test`, as no strength may be scored on the rows that chose it."""
    return retention.strength is not None and not data.test


def set_names(data: DataConfig, retention: RetentionConfig, earlier: Sequence[EarlierSets]) -> list[str]:
    """The sets that a dataset of these settings has."""
    test = ["test"] if data.test or valid_is_halved(data, retention) else []
    measured = [*data.retention, *(sets.task for sets in earlier)]
    return ["train", "valid", *test, *replayed(retention, earlier), *(f"retention/{name}" for name in measured)]


def replayed(retention: RetentionConfig, earlier: Sequence[EarlierSets]) -> dict[str, str]:
    """The sets of replay, and what each is of: the files that are named, then the earlier tasks."""
    sources = [*retention.replay.files, *(sets.task for sets in earlier)]
    return {f"replay/{number}": source for number, source in enumerate(sources)}


def report_set(
    records: "pandas.DataFrame", faults: Sequence[Fault], tally: Counter[str], ignored_keys: Counter[str]
) -> SetReport:
    """Sum up one set: `records` are its rows of the profile, at least one."""
    kinds = Counter(fault.problem.partition(":")[0] for fault in faults)
    tokens = records["tokens"]
    return SetReport(
        records=len(records),
        formats={str(kind): int(number) for kind, number in records["kind"].value_counts().items() if number},
        tokens=int(tokens.sum()),
        tokens_of_a_record={"min": int(tokens.min()), "median": float(tokens.median()), "max": int(tokens.max())},
        supervised_tokens=int(records["supervised"].sum()),
        truncated=int(records["truncated"].sum()),
        duplicates=int(records["digest"].duplicated().sum()),
        rejected=len(rejected_lines(faults)),
        faults=dict(sorted(kinds.items())),
        blank_lines=tally["blank_lines"],
        ignored_keys=dict(sorted(ignored_keys.items())),
        left_out=tally["left_out"],
        known=tally["known"],
    )


def rejected_lines(faults: Sequence[Fault]) -> set[tuple[str, int]]:
    """The lines, as file and number, that have a fault."""
    return {(fault.file, fault.line) for fault in faults if fault.line}
