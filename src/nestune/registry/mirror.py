"""The numbers of the metrics files on their way to an MLflow run, where each arrives exactly once."""

import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from nestune.registry.connection import unrepeated
from nestune.training.recorder import EVAL_METRICS, TRAIN_METRICS, lines_until

# What one call of MLflow's log_batch takes.
BATCH_METRICS = 1000


@dataclass(frozen=True)
class StepMetrics:
    """MLflow's metrics of a step, and when they were measured, in seconds since 1970."""

    step: int
    time_s: float
    values: Mapping[str, float]


def metrics_of_step(line: Mapping[str, Any]) -> dict[str, float]:
    """MLflow's metrics of a line of the training metrics."""
    counts = {f"tiers/updates_{tier}": count for tier, count in enumerate(line["update_counts"])}
    values = ("loss", "kl", "learning_rate", "grad_norm", "tokens_per_s")
    return {f"train/{key}": line[key] for key in values if key in line} | counts


def metrics_of_validation(line: Mapping[str, Any]) -> dict[str, float]:
    """MLflow's metrics of a line of the validation metrics."""
    return {"train/valid_loss": line["valid_loss"]}


def recorded_metrics(folder: Path, time_s: float) -> Iterator[StepMetrics]:
    """All that the metrics files of a run tell, but for a last line that a killed process left half-written.

    A line that does not say its `time` counts as measured at `time_s`.
    """
    for name, metrics_of in ((TRAIN_METRICS, metrics_of_step), (EVAL_METRICS, metrics_of_validation)):
        if (folder / name).exists():
            with (folder / name).open(encoding="utf-8", errors="replace") as file:
                for line in map(json.loads, lines_until(sys.maxsize, file)):
                    yield StepMetrics(line["step"], line.get("time", time_s), metrics_of(line))


class Outbox:
    """The metrics that an MLflow run does not have yet.

    Whenever it is unsure which have arrived, it asks MLflow before it sends: after any failure, for the server may
    have stored what it did not confirm, and at first where another process has sent before (`sent_before`).
    `recorded` tells what the metrics files hold; they are read only when another process may have left something.
    """

    def __init__(self, recorded: Callable[[], Iterable[StepMetrics]], sent_before: bool) -> None:
        self._recorded = recorded
        self._unsure = self._unread = sent_before
        self._waiting: dict[tuple[str, int], Any] = {}
        self._arrived: dict[str, int] = {}  # the last step of each metric that MLflow has

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, metrics: StepMetrics) -> None:
        """Take the metrics of a step, unless MLflow has them or those of a later step."""
        for name, value in metrics.values.items():
            if metrics.step > self._arrived.get(name, -1):
                self._add(name, value, metrics)

    def read_files(self) -> None:
        """Before the next sending, take from the metrics files what was not put."""
        self._unsure = self._unread = True

    def send(self, client: Any, run_id: str, until: float = math.inf) -> None:
        """Send what waits, at most until `until` by the monotonic clock; what MLflow did not take goes on waiting."""
        with unrepeated():
            if self._unsure:
                self._ask(client, run_id)
            while self._waiting and time.monotonic() < until:
                batch = dict(islice(self._waiting.items(), BATCH_METRICS))
                self._unsure = True  # until all is noted down: a signal may end this at any line
                client.log_batch(run_id, metrics=list(batch.values()))
                for name, step in batch:
                    del self._waiting[name, step]
                    self._arrived[name] = max(step, self._arrived.get(name, -1))
                self._unsure = False

    def _ask(self, client: Any, run_id: str) -> None:
        """Leave waiting only the steps of each metric that MLflow does not have."""
        names = client.get_run(run_id).data.metrics
        there = {name: {metric.step for metric in client.get_metric_history(run_id, name)} for name in names}
        if self._unread:
            for metrics in self._recorded():
                for name, value in metrics.values.items():
                    if metrics.step not in there.get(name, ()):
                        self._add(name, value, metrics)
        self._waiting = {key: metric for key, metric in self._waiting.items() if key[1] not in there.get(key[0], ())}
        self._arrived = {name: max(steps) for name, steps in there.items()}
        self._unsure = self._unread = False

    def _add(self, name: str, value: float, metrics: StepMetrics) -> None:
        from mlflow.entities import Metric

        metric = Metric(name, float(value), int(metrics.time_s * 1000), metrics.step)
        self._waiting.setdefault((name, metrics.step), metric)


def send_scores(client: Any, run_id: str, step: int, values: Mapping[str, float]) -> None:
    """Send numbers that may be measured again: those that differ from what MLflow was told of the step last."""
    now = time.time()
    told = {name: client.get_metric_history(run_id, name) for name in client.get_run(run_id).data.metrics}
    last = {name: max(history, key=lambda metric: metric.timestamp) for name, history in told.items()}
    changed = {
        name: value
        for name, value in values.items()
        if name not in last or (last[name].step, last[name].value) != (step, value)
    }
    outbox = Outbox(recorded=list, sent_before=False)
    outbox.put(StepMetrics(step, now, changed))
    outbox.send(client, run_id)
