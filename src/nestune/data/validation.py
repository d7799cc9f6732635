"""Builds a run's dataset: good records go into its files, bad ones stop it or are set aside, a report says which."""

import json
from collections import ChainMap, Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from nestune.config import DataConfig, RetentionConfig
from nestune.data.expectations import check_profile
from nestune.data.find_files import find_files
from nestune.data.profile import Profile
from nestune.data.records import Record, read_lines, read_records
from nestune.data.report import (
    DatasetReport,
    EarlierSets,
    SetReport,
    rejected_lines,
    replayed,
    report_set,
    set_names,
    settings_of,
    valid_is_halved,
)
from nestune.data.splits import choose_half, choose_held_out, keep_some
from nestune.data.tokens import Tokenizer, encode_all, marked_text
from nestune.errors import DataError, Fault
from nestune.files import replaced_folder, sha256_file, sha256_files, write_json

if TYPE_CHECKING:
    import pandas

RAW_BYTES_OF_A_REJECTED_LINE = 2000


def build_dataset(
    data: DataConfig,
    retention: RetentionConfig,
    tokenizer: Tokenizer,
    folder: Path,
    vocabulary: int | None = None,
    earlier: Sequence[EarlierSets] = (),
    seed: int = 0,
    known: Container[bytes] = frozenset(),
) -> DatasetReport:
    """Write the files of a dataset, its report and Data Docs into `folder`, which appears whole or not at all.

    earlier: tasks whose rows are replayed and measured, too; seed: draws the rows that `retention.replay.store` keeps;
    known: digests of records that are left out of train, and counted.
    Raises DataError with every fault when records cannot be used and data.on_invalid is fail, when no record of a
    set can, or when an expectation is not met; ConfigError when the tokenizer cannot render a chat, or writes tokens
    beyond the base's `vocabulary`.
    """
    with replaced_folder(folder) as new:
        builder = _Builder(data, retention, tokenizer, vocabulary, new, earlier, seed)
        train = builder.read("train", find_files(data.train), trained={}, known=known)
        sources = [find_files([entry]) for entry in retention.replay.files]
        sources += [[sets.train] for sets in earlier if sets.train is not None]
        store = retention.replay.store
        read = [builder.read(f"replay/{number}", files, trained={}, most=store) for number, files in enumerate(sources)]
        # What is trained on says nothing when it is measured on.
        trained = ChainMap(train, *read)
        valid = {} if isinstance(data.valid, float) else builder.read("valid", find_files(data.valid), trained)
        if data.test:
            builder.read("test", find_files(data.test), ChainMap(valid, *trained.maps))
        for name, paths in data.retention.items():
            builder.read(f"retention/{name}", find_files(paths), trained)
        for sets in earlier:
            if sets.held_out is not None:
                builder.read(f"retention/{sets.task}", [sets.held_out], trained)
        builder.reject_faults()
        if isinstance(data.valid, float):
            builder.hold_out(data.valid, never=ChainMap(*read))
        if valid_is_halved(data, retention):
            builder.move("valid", "test", choose_half(builder.digests_of("valid")))
        return builder.report()


class _Builder:
    """The sets of a dataset as far as they are read: their files in `folder`, profile, faults and tallies."""

    def __init__(
        self,
        data: DataConfig,
        retention: RetentionConfig,
        tokenizer: Tokenizer,
        vocabulary: int | None,
        folder: Path,
        earlier: Sequence[EarlierSets],
        seed: int,
    ) -> None:
        self.data, self.retention, self.tokenizer, self.folder = data, retention, tokenizer, folder
        self.earlier, self.seed = earlier, seed
        self.vocabulary = vocabulary
        self.profile = Profile()
        self.sources: dict[str, list[Path]] = {}
        self.faults: dict[str, list[Fault]] = {}
        self.tallies: dict[str, Counter[str]] = {}
        self.ignored_keys: dict[str, Counter[str]] = {}
        self.example = ""

    def read(
        self,
        name: str,
        files: Sequence[Path],
        trained: Mapping[bytes, int],
        most: int | None = None,
        known: Container[bytes] = frozenset(),
    ) -> dict[bytes, int]:
        """Write the good records of `files`, drawn at random where there are more than `most`; note every fault.

        Those that are `known` are only counted.

        Returns the digest of each record with its number in the profile. Records that are in `trained` are
        faults, as are repeated ones unless they are allowed.
        """
        self.sources[name] = list(files)
        faults = self.faults[name] = []
        tally = self.tallies[name] = Counter()
        ignored_keys = self.ignored_keys[name] = Counter()
        seen: dict[bytes, int] = {}
        path = self._file_of(name)
        path.parent.mkdir(exist_ok=True)
        records = (record for file in files for record in read_records(file, self.data.max_line_bytes, tally))
        outcomes = encode_all(records, self.tokenizer, self.data.max_seq_length, self.vocabulary)
        with path.open("wb") as file:
            for outcome in outcomes if most is None else keep_some(outcomes, most, self.seed, tally):
                if isinstance(outcome, Fault):
                    faults.append(outcome)
                    continue
                record, row = outcome
                digest = record.digest
                if digest in known:
                    tally["known"] += 1
                    continue
                repetition = self._repetition(record, digest, seen, trained)
                if repetition is not None:
                    faults.append(repetition)
                    continue
                number = self.profile.add(name, record, digest, row)
                seen.setdefault(digest, number)
                ignored_keys.update(record.ignored_keys)
                file.write(record.as_json().encode("utf-8") + b"\n")
                if number == 0:
                    self.example = marked_text(row, self.tokenizer)
        return seen

    def reject_faults(self) -> None:
        """Stop at the faults, or move them to rejected.jsonl, as the configuration says."""
        faults = [fault for found in self.faults.values() for fault in found]
        if faults and self.data.on_invalid == "fail":
            rejected = sum(len(rejected_lines(found)) for found in self.faults.values())
            lines = sum(tally["lines"] for tally in self.tallies.values())
            empty_files = len({fault.file for fault in faults if not fault.line})
            raise DataError(
                f"{rejected} of {lines} records{f' and {empty_files} empty file(s)' if empty_files else ''} cannot be "
                "used; nothing was written. Mend them, or set data.on_invalid=quarantine to go on without them",
                faults,
            )
        for name, found in self.faults.items():
            if not len(self.profile.rows_of(name)):
                known = self.tallies[name]["known"]
                left_out = f", {known} being of an earlier task (data.only_new)" if known else ""
                raise DataError(
                    f"{name}: not one of its records can be used{left_out}; nothing was written. Mend them", found
                )
        with (self.folder / "rejected.jsonl").open("w", encoding="utf-8", newline="\n") as file:
            for name, found in self.faults.items():
                for fault, raw in _with_raw_lines(found):
                    rejection = {"set": name, **fault.as_dict(), "raw": raw}
                    file.write(json.dumps(rejection, ensure_ascii=False) + "\n")

    def hold_out(self, fraction: float, never: Container[bytes]) -> None:
        """Move a fraction of train to valid, at least one record, but none that is in `never`."""
        self.move("train", "valid", choose_held_out(self.digests_of("train"), fraction, never))

    def digests_of(self, name: str) -> list[bytes]:
        """What each record of a set holds, in the order of its file."""
        return [self.profile.digest(number) for number in self.profile.rows_of(name)]

    def move(self, name: str, to: str, chosen: Container[bytes]) -> None:
        """Make a new set of those records of another one that have these digests."""
        numbers = self.profile.rows_of(name).tolist()
        everything = self.folder / "everything.jsonl"
        self._file_of(name).rename(everything)
        with (
            everything.open("rb") as lines,
            self._file_of(name).open("wb") as kept,
            self._file_of(to).open("wb") as moved,
        ):
            for number, line in zip(numbers, lines, strict=True):
                goes = self.profile.digest(number) in chosen
                if goes:
                    self.profile.move(number, to)
                (moved if goes else kept).write(line)
        everything.unlink()

    def report(self) -> DatasetReport:
        """Hold the dataset against the expectations, and write what it is to report.json."""
        frame = self.profile.frame()
        sets = set_names(self.data, self.retention, self.earlier)
        files = [self._file_of(name) for name in sets]
        expectations = check_profile(
            frame,
            sets,
            written=sum(_count_lines(file) for file in files),
            max_length=self.data.max_seq_length,
            allow_duplicates=self.data.allow_duplicates,
            docs=self.folder / "data_docs",
        )
        report = DatasetReport(
            settings=settings_of(self.data, self.retention, self.earlier, self.seed),
            sha256=sha256_files(self.folder, files),
            sets={name: self._report_set(name, frame) for name in sets},
            sources={str(path): sha256_file(path) for paths in self.sources.values() for path in paths},
            outputs={file.relative_to(self.folder).as_posix(): sha256_file(file) for file in files},
            supervised_example=self.example,
            expectations=expectations,
            replayed=replayed(self.retention, self.earlier),
            files={name: list(map(str, paths)) for name, paths in self.sources.items()},
        )
        write_json(self.folder / "report.json", report.as_dict())
        return report

    def _file_of(self, name: str) -> Path:
        return self.folder / f"{name}.jsonl"

    def _repetition(
        self, record: Record, digest: bytes, seen: Mapping[bytes, int], trained: Mapping[bytes, int]
    ) -> Fault | None:
        if digest in trained and self.profile.set_of(trained[digest]) == "valid":
            problem = f"also in valid: the same record as {self.profile.where(trained[digest])}"
            remedy = "Remove it here or there; a score on what chose the adapter's strength would say too much"
        elif digest in trained:
            replayed = self.profile.set_of(trained[digest]).startswith("replay/")
            how, key = ("replayed", "retention.replay") if replayed else ("trained on", "data.train")
            problem = f"also {how}: the same record as {self.profile.where(trained[digest])}"
            remedy = f"Leave it out of {key}, or of this set; a score on what was {how} would say nothing"
        elif digest in seen and not self.data.allow_duplicates:
            problem = f"duplicate: the same record as {self.profile.where(seen[digest])}"
            remedy = "Remove one, or set data.allow_duplicates=true"
        else:
            return None
        return Fault(record.file, record.line, "", problem, remedy)

    def _report_set(self, name: str, frame: "pandas.DataFrame") -> SetReport:
        # What is wrong with a file that was split is told once, under train.
        nothing: Counter[str] = Counter()
        return report_set(
            frame[frame["set"] == name],
            self.faults.get(name, []),
            self.tallies.get(name, nothing),
            self.ignored_keys.get(name, nothing),
        )


def _with_raw_lines(faults: Iterable[Fault]) -> Iterator[tuple[Fault, str]]:
    """The faults by file and line, each with the beginning of its line as it stands in the file."""
    in_order = sorted(faults, key=lambda fault: (fault.file, fault.line))
    for file, group in groupby(in_order, key=lambda fault: fault.file):
        lines = read_lines(Path(file), RAW_BYTES_OF_A_REJECTED_LINE)
        number, raw = 0, ""
        for fault in group:
            while number < fault.line:
                line = next(lines)
                number, raw = line.number, line.content.decode("utf-8", errors="replace")
            yield fault, raw


def _count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)
