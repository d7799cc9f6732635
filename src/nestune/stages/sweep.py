"""A sweep: the same run with every combination of some settings; the best is chosen as the gate measures."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from nestune.config import RunConfig, load_config
from nestune.errors import ConfigError
from nestune.evaluation.gate import NEW_TASK
from nestune.files import read_json
from nestune.runs import RunPaths
from nestune.stages.evaluate import EVALUATE_AGAIN

MOST_POINTS = 1000


@dataclass(frozen=True)
class Point:
    """One combination: what is set, by the keys of the configuration, and the configuration that it makes."""

    values: Mapping[str, Any]
    config: RunConfig


@dataclass(frozen=True)
class Outcome:
    """What became of a point.

    learned: the share of what the parent got wrong on the new task that is gone; lost: the largest share of a set's
    score that was lost to the champion, or to the parent where there is none. Both are of exact match, or of the loss.
    """

    point: Point
    passed: bool
    learned: float
    lost: float
    reason: str

    @property
    def rank(self) -> tuple[bool, float]:
        """What the best has most of: the gate first, then what was learned less what was lost."""
        return self.passed, self.learned - self.lost


def points(path: Path, overrides: Sequence[str], name: str | None, grid: Mapping[str, Sequence[Any]]) -> list[Point]:
    """Every combination of a grid, in its order, each as a run of its own: `<name>-1`, `<name>-2`, ...

    Raises ConfigError when the grid is empty or too large, or with what is wrong with the first such configuration.
    """
    sizes = [len(values) for values in grid.values()]
    combinations = list(product(*grid.values())) if sizes and all(sizes) else []
    if not 0 < len(combinations) <= MOST_POINTS:
        raise ConfigError(
            f"the grid has {len(combinations)} points; 1 to {MOST_POINTS} are allowed. Give each key a list of values, "
            "e.g. --grid training.learning_rate='[1.0e-3, 2.0e-3]'."
        )
    of_all = load_config(path, overrides, name)
    # They compete for one champion.
    shared = f"registry.registered_model={of_all.registry.registered_model}"
    made = []
    for number, values in enumerate(combinations, start=1):
        chosen = dict(zip(grid, values, strict=True))
        given = [*overrides, shared, *(f"{key}={json.dumps(value)}" for key, value in chosen.items())]
        made.append(Point(chosen, load_config(path, given, f"{of_all.name}-{number}")))
    return made


def outcome_of(point: Point) -> Outcome:
    """What the evaluation of a point says; raises RunError when there is none."""
    path = RunPaths.of(point.config.name).evaluation / "report.json"
    report = read_json(path, EVALUATE_AGAIN, keys=["scores", "passed", "reason"])
    scores = report["scores"]
    reference = scores["champion" if "champion" in scores else "parent"]
    lost = [_lost(scores["candidate"][name], before) for name, before in reference.items() if name != NEW_TASK]
    learned = _learned(scores["candidate"][NEW_TASK], scores["parent"][NEW_TASK])
    return Outcome(point, report["passed"], learned, max([0.0, *lost]), report["reason"])


def ranked(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The best first; of equal ones, that which the grid has first."""
    return sorted(outcomes, key=lambda outcome: outcome.rank, reverse=True)


def table(outcomes: Sequence[Outcome]) -> list[list[str]]:
    """A row a point, in the order given, below a head."""
    keys = list(outcomes[0].point.values)
    rows = [["run", *keys, "gate", "learned", "lost"]]
    for one in outcomes:
        values = [json.dumps(one.point.values[key]) for key in keys]
        gate = "passed" if one.passed else "refused"
        rows.append([one.point.config.name, *values, gate, f"{one.learned:.3f}", f"{one.lost:.3f}"])
    return rows


def _learned(now: Mapping[str, Any], before: Mapping[str, Any]) -> float:
    if before["exact_match"] is not None:
        lacked = 1 - before["exact_match"]
        return (now["exact_match"] - before["exact_match"]) / lacked if lacked else 0.0
    return (before["loss"] - now["loss"]) / before["loss"] if before["loss"] else 0.0


def _lost(now: Mapping[str, Any], before: Mapping[str, Any]) -> float:
    if before["exact_match"] is not None:
        return (before["exact_match"] - now["exact_match"]) / before["exact_match"] if before["exact_match"] else 0.0
    return (now["loss"] - before["loss"]) / before["loss"] if before["loss"] else 0.0
