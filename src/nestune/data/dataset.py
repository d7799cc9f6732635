"""Reads a built dataset back, after making sure that it is the one that was validated."""

from dataclasses import dataclass
from pathlib import Path

from nestune.config import DataConfig, ReplayConfig
from nestune.data.records import read_records
from nestune.data.report import settings_of
from nestune.data.tokens import Row, Tokenizer, encode_all
from nestune.errors import Fault, RunError
from nestune.runs import read_json, sha256_file

REMEDY = "Run nestune validate again."


@dataclass(frozen=True)
class Dataset:
    """The rows of a run: what is trained on, validated with, measured for retention (by name), and replayed."""

    train: list[Row]
    valid: list[Row]
    retention: dict[str, list[Row]]
    replay: list[list[Row]]
    sha256: str


def check_settings(folder: Path, data: DataConfig, replay: ReplayConfig) -> None:
    """Raise RunError when the dataset in a folder was made with other settings than these."""
    made_with = read_json(folder / "report.json", REMEDY, keys=["settings"])["settings"]
    asked = settings_of(data, replay)
    differing = [key for key in asked if made_with.get(key) != asked[key]]
    if differing:
        raise RunError(f"{folder} was made with other settings ({', '.join(differing)} differ). {REMEDY}")


def load_dataset(folder: Path, tokenizer: Tokenizer, max_length: int) -> Dataset:
    """The dataset in a run's folder as rows.

    Raises RunError when it is missing, has changed since it was validated, or does not suit the tokenizer.
    """
    report = read_json(folder / "report.json", REMEDY, keys=["outputs", "sets", "sha256"])
    changed = [name for name, sha256 in report["outputs"].items() if _hash(folder / name) != sha256]
    if changed:
        raise RunError(f"{folder}: {', '.join(changed)} changed since validation. {REMEDY}")
    rows = {name: _read_rows(folder / f"{name}.jsonl", tokenizer, max_length) for name in report["sets"]}
    return Dataset(
        train=rows["train"],
        valid=rows["valid"],
        retention={
            name.removeprefix("retention/"): rows for name, rows in rows.items() if name.startswith("retention/")
        },
        replay=[rows for name, rows in rows.items() if name.startswith("replay/")],
        sha256=report["sha256"],
    )


def _hash(path: Path) -> str | None:
    return sha256_file(path) if path.is_file() else None


def _read_rows(path: Path, tokenizer: Tokenizer, max_length: int) -> list[Row]:
    rows = []
    for outcome in encode_all(read_records(path, path.stat().st_size), tokenizer, max_length):
        if isinstance(outcome, Fault):
            raise RunError(f"{outcome}. It was good when it was validated, with other settings. {REMEDY}")
        rows.append(outcome[1])
    return rows
