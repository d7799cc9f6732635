"""What happened at each step and validation: two JSONL files, and whoever else listens."""

import json
import logging
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from nestune.backends.base import Loss, StepResult
from nestune.files import write_text, writing

TRAIN_METRICS = "train_metrics.jsonl"
EVAL_METRICS = "eval_metrics.jsonl"

log = logging.getLogger(__name__)


class Listener(Protocol):
    """Hears of every step and validation while training runs; both are the lines of the metrics files."""

    def on_step(self, line: dict[str, Any]) -> None:
        """Hear of a step: step, loss, tokens, tokens_per_s, learning_rate, grad_norm, due, update_counts, time, ...

        And `kl`, where the model was held to its teacher.
        """
        ...

    def on_validation(self, line: dict[str, Any]) -> None:
        """Hear of a validation: step, valid_loss, best, time."""
        ...


class Recorder:
    """Appends a line to the metrics files at each step and validation, so that they can be read meanwhile.

    last_step, update_counts: how far training is when it begins, or goes on; validated_step: the step after which its
    last validation was. Lines of the files up to there stay, later ones go: what they tell of is done again.
    Raises StorageError when the disk does not take a line.
    """

    def __init__(
        self,
        folder: Path,
        update_counts: Sequence[int],
        listeners: Sequence[Listener] = (),
        last_step: int = 0,
        validated_step: int = 0,
    ) -> None:
        self.last_step = last_step
        self.update_counts = list(update_counts)
        self._train_path, self._eval_path = folder / TRAIN_METRICS, folder / EVAL_METRICS
        kept = _cut_off_after(last_step, self._train_path)
        if kept != last_step:
            log.warning("%s tells of %d steps only; training goes on after %d", self._train_path, kept, last_step)
        _cut_off_after(validated_step, self._eval_path)
        with writing(folder):
            # Without buffers, in which a line would wait that the disk has not taken.
            self._train = self._train_path.open("ab", buffering=0)
            self._eval = self._eval_path.open("ab", buffering=0)
        self._listeners = listeners
        self._step_began = time.perf_counter()

    def step(self, step: int, result: StepResult, due: frozenset[int], learning_rate: float) -> None:
        """Record a step. Its time runs from the end of the step or validation before."""
        seconds = time.perf_counter() - self._step_began
        self.last_step = step
        for tier in due:
            self.update_counts[tier] += 1
        line = {
            "step": step,
            "loss": result.loss,
            "tokens": result.tokens,
            **({} if result.kl is None else {"kl": result.kl}),
            "learning_rate": learning_rate,
            "grad_norm": result.grad_norm,
            "step_time_s": seconds,
            "tokens_per_s": result.positions / seconds,
            "due": sorted(due),
            "update_counts": list(self.update_counts),
            "time": _now_s(),
        }
        _append(self._train, line)
        for listener in self._listeners:
            listener.on_step(line)
        self._step_began = time.perf_counter()

    def validation(self, step: int, loss: Loss, best: bool) -> None:
        """Record a validation after a step."""
        line = {"step": step, "valid_loss": loss.mean, "tokens": loss.tokens, "best": best, "time": _now_s()}
        _append(self._eval, line)
        for listener in self._listeners:
            listener.on_validation(line)
        self._step_began = time.perf_counter()

    def sync(self) -> None:
        """Make sure that all lines are on the disk, as a checkpoint that comes after them will be."""
        for file in (self._train, self._eval):
            with writing(Path(file.name)):
                os.fsync(file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._train.close()
        self._eval.close()


def _now_s() -> float:
    """Seconds since 1970, to the millisecond, as MLflow counts."""
    return round(time.time(), 3)


def _append(file: FileIO, line: dict[str, Any]) -> None:
    left = json.dumps(line, allow_nan=False).encode() + b"\n"
    with writing(Path(str(file.name))):
        while left:
            left = left[file.write(left) :]


def lines_until(step: int, lines: Iterable[str]) -> Iterator[str]:
    """The lines of a metrics file up to a step; they end before one that a killed process left half-written."""
    for line in lines:
        try:
            if not line.endswith("\n") or json.loads(line)["step"] > step:
                return
        except (ValueError, KeyError, TypeError):
            return
        yield line


def _cut_off_after(step: int, path: Path) -> int:
    """Leave only the lines up to a step in a metrics file, which need not exist; returns how many."""
    written = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    kept = list(lines_until(step, written.splitlines(keepends=True)))
    write_text(path, "".join(kept))
    return len(kept)
