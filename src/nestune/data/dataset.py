"""Reads a built dataset back, after making sure that it is the one that was validated."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pydantic
from pydantic import ConfigDict, ValidationError

from nestune.config import DataConfig, RetentionConfig
from nestune.config.faults import explain
from nestune.data.records import read_records
from nestune.data.report import EarlierSets, set_names, settings_of
from nestune.data.tokens import Row, Tokenizer, encode_all
from nestune.errors import Fault, RunError
from nestune.files import read_json, sha256_if_file

REMEDY = "Run nestune validate again."


@dataclass(frozen=True)
class Dataset:
    """The rows of a run: what is trained on, validated with, scored, measured for retention (by name), and replayed.

    `scored` are the rows of the new task that have chosen nothing: `test`, where there is such a set, else `valid`.
    `sha256` is the hash of them all. A set is read when it is first asked for, as rows of at most `max_length` tokens;
    that raises RunError when it does not suit the tokenizer, ConfigError when its tokens are not all among the
    base's `vocabulary`.
    """

    folder: Path
    sets: tuple[str, ...]
    sha256: str
    tokenizer: Tokenizer
    max_length: int
    vocabulary: int | None = None

    @cached_property
    def train(self) -> list[Row]:
        return self._rows("train")

    @cached_property
    def valid(self) -> list[Row]:
        return self._rows("valid")

    @cached_property
    def scored(self) -> list[Row]:
        return self._rows("test") if "test" in self.sets else self.valid

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
        records = read_records(path, path.stat().st_size)
        for outcome in encode_all(records, self.tokenizer, self.max_length, self.vocabulary):
            if isinstance(outcome, Fault):
                raise RunError(f"{outcome}. It was good when it was validated, with other settings. {REMEDY}")
            rows.append(outcome[1])
        return rows


def load_dataset(
    data: DataConfig,
    retention: RetentionConfig,
    tokenizer: Tokenizer,
    max_length: int,
    folder: Path,
    vocabulary: int | None = None,
    earlier: Sequence[EarlierSets] = (),
    seed: int = 0,
) -> Dataset:
    """The dataset that was built into a folder, of the same earlier tasks, its store drawn by the same seed.

    Raises RunError when it is missing, was made with other settings than these, or has changed since it was validated.
    """
    written = folder / "report.json"
    remedy = REMEDY if written.exists() else "Run nestune validate."
    try:
        report = _Report.model_validate(read_json(written, remedy, keys=["settings", "outputs", "sets", "sha256"]))
    except ValidationError as error:
        raise RunError(f"{written} is no report of a dataset: {explain(error, _Report)[0]} {REMEDY}") from None
    asked = settings_of(data, retention, earlier, seed)
    differing = [key for key in asked if report.settings.get(key) != asked[key]]
    if differing:
        raise RunError(f"{folder} was made with other settings ({', '.join(differing)} differ). {REMEDY}")
    # Which files are read is not for a file to say: it follows from the settings.
    names = set_names(data, retention, earlier)
    if set(report.sets) != set(names) or set(report.outputs) != {f"{name}.jsonl" for name in names}:
        raise RunError(f"{written} names other sets than its settings make. {REMEDY}")
    changed = [name for name, sha256 in report.outputs.items() if sha256_if_file(folder / name) != sha256]
    if changed:
        raise RunError(f"{folder}: {', '.join(changed)} changed since validation. {REMEDY}")
    return Dataset(folder, tuple(report.sets), report.sha256, tokenizer, max_length, vocabulary)


class _Report(pydantic.BaseModel):
    model_config = ConfigDict(strict=True)

    settings: dict[str, Any]
    sets: dict[str, Any]
    outputs: dict[str, str]
    sha256: str
