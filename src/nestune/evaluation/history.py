"""What training wrote down, read back: losses, due tiers and update counts over its steps."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nestune.errors import RunError

REMEDY = "Run nestune train again."


@dataclass(frozen=True)
class History:
    """The course of a training run.

    For each step of `steps`: its loss in nats per token, the tiers due, and how often each tier was updated
    until then; `valid_loss` at `valid_steps`.
    """

    steps: tuple[int, ...]
    loss: tuple[float, ...]
    due: tuple[frozenset[int], ...]
    update_counts: tuple[tuple[int, ...], ...]
    valid_steps: tuple[int, ...]
    valid_loss: tuple[float, ...]


def read_history(metrics: Path) -> History:
    """Read the two metrics files; raises RunError when one is missing, broken or empty."""
    try:
        train = list(_lines(metrics / "train_metrics.jsonl"))
        valid = list(_lines(metrics / "eval_metrics.jsonl"))
        return History(
            steps=tuple(line["step"] for line in train),
            loss=tuple(line["loss"] for line in train),
            due=tuple(frozenset(line["due"]) for line in train),
            update_counts=tuple(tuple(line["update_counts"]) for line in train),
            valid_steps=tuple(line["step"] for line in valid),
            valid_loss=tuple(line["valid_loss"] for line in valid),
        )
    except KeyError as error:
        raise RunError(f"{metrics}: a line has no {error}. {REMEDY}") from None


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}. {REMEDY}") from None
    if not lines:
        raise RunError(f"{path} is empty. {REMEDY}")
    for number, line in enumerate(lines, start=1):
        try:
            yield json.loads(line)
        except ValueError as error:
            raise RunError(f"{path}:{number} is not JSON: {error}. {REMEDY}") from None
