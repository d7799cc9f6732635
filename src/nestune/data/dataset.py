"""Reads a built dataset back, after making sure that it is the one that was validated."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from nestune.config import DataConfig, ReplayConfig
from nestune.data.records import read_records
from nestune.data.report import settings_of
from nestune.data.tokens import Row, Tokenizer, encode_all
from nestune.errors import Fault, RunError
from nestune.files import read_json, sha256_file

REMEDY = "Run nestune validate again."


@dataclass(frozen=True)
class Dataset:
    """The rows of a run: what is trained on, validated with, measured for retention (by name), and replayed.

    `sha256` is the hash of them all. A set is read when it is first asked for, as rows of at most `max_length` tokens;
    that raises RunError when it does not suit the tokenizer.
    """

    folder: Path
    sets: tuple[str, ...]
    sha256: str
    tokenizer: Tokenizer
    max_length: int

    @cached_property
    def train(self) -> list[Row]:
        return self._rows("train")

    @cached_property
    def valid(self) -> list[Row]:
        return self._rows("valid")

    @cached_property
    def retention(self) -> dict[str, list[Row]]:
        names = [name for name in self.sets if name.startswith("retention/")]
        return {name.removeprefix("retention/"): self._rows(name) for name in names}

    @cached_property
    def replay(self) -> list[list[Row]]:
        return [self._rows(name) for name in self.sets if name.startswith("replay/")]

    def _rows(self, name: str) -> list[Row]:
        path = self.folder / f"{name}.jsonl"
        rows = []
        for outcome in encode_all(read_records(path, path.stat().st_size), self.tokenizer, self.max_length):
            if isinstance(outcome, Fault):
                raise RunError(f"{outcome}. It was good when it was validated, with other settings. {REMEDY}")
            rows.append(outcome[1])
        return rows


def load_dataset(
    data: DataConfig, replay: ReplayConfig, tokenizer: Tokenizer, max_length: int, folder: Path
) -> Dataset:
    """The dataset that was built into a folder.

    Raises RunError when it is missing, was made with other settings than these, or has changed since it was validated.
    """
    written = folder / "report.json"
    remedy = REMEDY if written.exists() else "Run nestune validate."
    report = read_json(written, remedy, keys=["settings", "outputs", "sets", "sha256"])
    asked = settings_of(data, replay)
    differing = [key for key in asked if report["settings"].get(key) != asked[key]]
    if differing:
        raise RunError(f"{folder} was made with other settings ({', '.join(differing)} differ). {REMEDY}")
    changed = [name for name, sha256 in report["outputs"].items() if _hash(folder / name) != sha256]
    if changed:
        raise RunError(f"{folder}: {', '.join(changed)} changed since validation. {REMEDY}")
    return Dataset(folder, tuple(report["sets"]), report["sha256"], tokenizer, max_length)


def _hash(path: Path) -> str | None:
    return sha256_file(path) if path.is_file() else None
