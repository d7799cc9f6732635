"""What happened at each step and validation: two JSONL files, and whoever else listens."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from nestune.backends.base import Loss, StepResult

TRAIN_METRICS = "train_metrics.jsonl"
EVAL_METRICS = "eval_metrics.jsonl"


class Listener(Protocol):
    """Hears of every step and validation while training runs; both are the lines of the metrics files."""

    def on_step(self, line: dict[str, Any]) -> None:
        """Hear of a step: step, loss, tokens, tokens_per_s, learning_rate, grad_norm, due, update_counts, ..."""
        ...

    def on_validation(self, line: dict[str, Any]) -> None:
        """Hear of a validation: step, valid_loss, best."""
        ...


class Recorder:
    """Appends a line to the metrics files at each step and validation, so that they can be read meanwhile."""

    def __init__(self, folder: Path, n_tiers: int, listeners: Sequence[Listener] = ()) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.last_step = 0
        self.update_counts = [0] * n_tiers
        self._train = (folder / TRAIN_METRICS).open("w", encoding="utf-8", buffering=1)
        self._eval = (folder / EVAL_METRICS).open("w", encoding="utf-8", buffering=1)
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
            "learning_rate": learning_rate,
            "grad_norm": result.grad_norm,
            "step_time_s": seconds,
            "tokens_per_s": result.positions / seconds,
            "due": sorted(due),
            "update_counts": list(self.update_counts),
        }
        self._train.write(json.dumps(line, allow_nan=False) + "\n")
        for listener in self._listeners:
            listener.on_step(line)
        self._step_began = time.perf_counter()

    def validation(self, step: int, loss: Loss, best: bool) -> None:
        """Record a validation after a step."""
        line = {"step": step, "valid_loss": loss.mean, "tokens": loss.tokens, "best": best}
        self._eval.write(json.dumps(line, allow_nan=False) + "\n")
        for listener in self._listeners:
            listener.on_validation(line)
        self._step_began = time.perf_counter()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._train.close()
        self._eval.close()
