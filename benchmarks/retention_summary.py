"""What the cells of benchmarks/retention.py add up to: figures by method with their intervals, and the bars.

Scores are digits, one a row: the share of 1 is the exact match. `general` is the mean over all rows of the general
sets. Intervals are those of the mean, by bootstrap over seeds, or over sequences (percentiles, 95 %).
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nestune.evaluation.continual import metrics_of
from nestune.evaluation.uncertainty import CONFIDENCE, RESAMPLES, percentiles
from retention_cell import NEW
from retention_cells import Cell
from retention_methods import (
    JOINT,
    NO_OLD_DATA,
    PLAIN,
    QUARTER,
    RECIPE_QUESTIONS,
    REPLAY_QUARTER,
    STORED,
    WITH_REPLAY,
    Method,
    SequenceMethod,
)

TIE = 0.03
ENOUGH = 0.95
SEQUENCE_FIGURES = (
    "average_accuracy",
    "of_joint",
    "backward_transfer",
    "forgetting",
    "general",
    "uncovered",
    "step_cpu_s",
    "last_cpu_s",
    "cost_of_joint",
)
Results = Iterable[tuple[Cell, dict[str, Any]]]
Masks = Callable[[Cell], Mapping[str, str]]


@dataclass(frozen=True)
class Bar:
    """What was promised, what was measured (None: nothing), and whether it holds."""

    what: str
    bar: float
    value: float | None
    at_least: bool = True

    @property
    def met(self) -> bool:
        """Whether the promise holds; nothing measured is a miss."""
        if self.value is None:
            return False
        return self.value >= self.bar if self.at_least else self.value <= self.bar

    def as_dict(self) -> dict[str, Any]:
        """The bar as JSON."""
        return {"what": self.what, "bar": self.bar, "at_least": self.at_least, "value": self.value, "met": self.met}


def share(right: Iterable[str]) -> float | None:
    """The share of 1 among all digits; None when there are none."""
    every = "".join(right)
    return every.count("1") / len(every) if every else None


def where(right: Mapping[str, str], *masks: Mapping[str, str]) -> str:
    """The digits of the rows at which every mask has a 1, all sets one after the other."""
    found = []
    for name in masks[0]:
        rows = zip(right[name], *(mask[name] for mask in masks), strict=True)
        found += [row[0] for row in rows if all(one == "1" for one in row[1:])]
    return "".join(found)


def but(mask: Mapping[str, str]) -> dict[str, str]:
    """The other rows."""
    return {name: digits.translate(str.maketrans("01", "10")) for name, digits in mask.items()}


def interval_of(values: Sequence[float]) -> list[float] | None:
    """Between which numbers their mean lies, by bootstrap; None of a single one."""
    if len(values) < 2:
        return None
    drawn = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    return percentiles(np.array(values)[drawn].mean(axis=1), CONFIDENCE).as_list()


def mean(values: Iterable[float | None]) -> float | None:
    """Their mean; None where one is missing, or all are."""
    known = list(values)
    return float(np.mean([value for value in known if value is not None])) if known and None not in known else None


def one_task_rows(results: Results) -> list[dict[str, Any]]:
    """The figures of each method on one task, in the order of the methods; compared with the best plain LoRA."""
    methods: dict[str, Method] = {}
    by_method: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    for cell, result in results:
        if isinstance(cell.method, Method):
            methods[cell.method.name] = cell.method
            by_method[cell.method.name][cell.world.seed] = seed_figures(result, cell.world.general)
    rows = [row_of(methods[name], seeds) for name, seeds in by_method.items()]
    best = best_plain(rows)
    for row in rows:
        compare(row, best)
    return rows


def seed_figures(result: Mapping[str, Any], general: Sequence[str]) -> dict[str, Any]:
    """The figures of one training."""
    told: dict[str, Any] = {"factor": result["factor"], "reached": result["reached"]}
    for at in ("full", "chosen"):
        right = result[at]
        told[at] = {"new": share([right[NEW]]), "general": share(right[name] for name in general)}
        told[at] |= {name: share([right[name]]) for name in general}
    if result["mentioned"]:
        unseen = where(result["chosen"], but(result["mentioned"]))
        told["unmentioned"] = {"right": unseen.count("1"), "rows": len(unseen)}
    costs = ("train_cpu_s", "step_cpu_s", "steps", "cpu")
    return told | {name: result[name] for name in costs}


def row_of(method: Method, seeds: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    """A method's figures: means over its seeds; what was not reached on every seed has no mean."""
    every = [seeds[seed] for seed in sorted(seeds)]
    reached = [one["reached"] for one in every]
    sets = every[0]["full"]
    return {
        "method": method.name,
        "group": method.group,
        "learning_rate": method.learning_rate,
        "seeds": sorted(seeds),
        "full": {name: mean(one["full"][name] for one in every) for name in sets},
        "chosen": {name: mean(one["chosen"][name] for one in every) for name in sets},
        "factor": mean(one["factor"] for one in every),
        "unmentioned": pooled(one.get("unmentioned") for one in every),
        "reached": sum(one is not None for one in reached),
        "steps_to_target": mean(one and one["step"] for one in reached),
        "cpu_to_target_s": mean(one and one["cpu_s"] for one in reached),
        "steps": every[0]["steps"],
        "step_cpu_s": mean(one["step_cpu_s"] for one in every),
        "train_cpu_s": mean(one["train_cpu_s"] for one in every),
        "strength_cpu_s": mean(one["cpu"]["strength"] for one in every),
        "by_seed": {str(seed): seeds[seed] for seed in sorted(seeds)},
    }


def pooled(parts: Iterable[Mapping[str, int] | None]) -> dict[str, Any] | None:
    """The share over the rows of all seeds together, and how many these are."""
    known = [part for part in parts if part is not None]
    rows = sum(part["rows"] for part in known)
    return {"share": sum(part["right"] for part in known) / rows, "rows": rows} if rows else None


def best_plain(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The plain LoRA that keeps most, with strength, of those that reach the target on every seed."""
    plain = [row for row in rows if row["group"] == PLAIN and row["reached"] == len(row["seeds"])]
    return max(plain, key=lambda row: row["chosen"]["general"], default=None)


def compare(row: dict[str, Any], best: Mapping[str, Any] | None) -> None:
    """Add to a row its difference from the best plain LoRA, paired by seed, and what that is called."""
    row |= {"against": best and best["method"], "difference": None, "interval": None, "cpu_ratio": None}
    if row["reached"] < len(row["seeds"]):
        row["verdict"] = "NOT REACHED"
    if best is None:
        row.setdefault("verdict", "")
        return
    common = [seed for seed in row["by_seed"] if seed in best["by_seed"]]
    paired = [(row["by_seed"][seed], best["by_seed"][seed]) for seed in common]
    differences = [one["chosen"]["general"] - other["chosen"]["general"] for one, other in paired]
    row["difference"] = mean(differences)
    row["interval"] = interval_of(differences)
    if row["cpu_to_target_s"] and best["cpu_to_target_s"]:
        row["cpu_ratio"] = row["cpu_to_target_s"] / best["cpu_to_target_s"]
    if row["method"] == best["method"]:
        row.setdefault("verdict", "best plain")
    difference = row["difference"]
    if difference is not None:
        row.setdefault("verdict", "tie" if abs(difference) < TIE else "keeps more" if difference > 0 else "keeps less")


def sequence_rows(results: Results, untouched: Masks) -> list[dict[str, Any]]:
    """The figures of each method on sequences, in the order of the methods.

    untouched: the rows of a cell's general sets that no replayed row and no task speaks of.
    """
    methods: dict[str, SequenceMethod] = {}
    by_method: dict[str, list[tuple[Cell, dict[str, Any]]]] = defaultdict(list)
    bases: dict[int, Mapping[str, str]] = {}
    for cell, result in results:
        if isinstance(cell.method, SequenceMethod):
            methods[cell.method.name] = cell.method
            by_method[cell.method.name].append((cell, result))
        elif cell.method is None:
            bases[cell.world.seed] = result["scores"]
    figures = {
        name: [lineage_figures(cell, result, bases.get(cell.world.seed), untouched(cell)) for cell, result in cells]
        for name, cells in by_method.items()
    }
    joint = {one["seed"]: one for name, every in figures.items() if methods[name].joint for one in every}
    for every in figures.values():
        for one in every:
            upper = joint.get(one["seed"])
            one["of_joint"] = ratio(one, upper, "average_accuracy")
            one["cost_of_joint"] = ratio(one, upper, "last_cpu_s")
    return [sequence_row(methods[name], every) for name, every in figures.items()]


def ratio(one: Mapping[str, Any], other: Mapping[str, Any] | None, name: str) -> float | None:
    """A figure, as a share of another's; None where that is not there, or 0."""
    return float(one[name] / other[name]) if other and other[name] else None


def lineage_figures(
    cell: Cell, result: Mapping[str, Any], base: Mapping[str, str] | None, untouched: Mapping[str, str]
) -> dict[str, Any]:
    """The figures of one sequence, or of one joint training; last_cpu_s: of its last task, everything in it."""
    general, tasks = cell.world.general, cell.order
    steps, last = result["steps"], result["steps"][-1]
    scores = [[share([step["chosen"][task]]) for task in tasks] for step in steps]
    told: dict[str, Any] = {"seed": cell.world.seed, "order": list(tasks), "scores": scores}
    if len(steps) == len(tasks) and base is not None:
        before = [share([base[task]]) for task in tasks]
        found = metrics_of(np.array([before, *scores], dtype=float))
        told |= {name: float(value) for name, value in found.items()}
    else:
        told["average_accuracy"] = mean(scores[-1])
    right = last["chosen"]
    told["general"] = share(right[name] for name in general)
    unseen = where(right, untouched)
    told["uncovered"] = share([unseen])
    if result["mentioned"]:
        unmentioned = where(right, untouched, but(result["mentioned"]))
        told["unmentioned"] = {"right": unmentioned.count("1"), "rows": len(unmentioned)}
    told["step_cpu_s"] = sum(step["cpu"]["steps"] for step in steps) / sum(step["steps"] for step in steps)
    told["last_cpu_s"] = sum(last["cpu"].values())
    return told | {"factors": [step["factor"] for step in steps]}


def sequence_row(method: SequenceMethod, every: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A method's figures: the mean over its sequences, and its interval."""
    row: dict[str, Any] = {"method": method.name, "sequences": len(every)}
    for name in SEQUENCE_FIGURES:
        values = [one.get(name) for one in every]
        known = [float(value) for value in values if value is not None]
        complete = len(known) == len(values)
        row[name] = {"value": mean(values), "interval": interval_of(known) if complete else None}
    row["unmentioned"] = pooled(one.get("unmentioned") for one in every)
    return row | {"replays_a_quarter": method.general == QUARTER, "each": list(every)}


def one_task_bars(rows: Sequence[Mapping[str, Any]]) -> list[Bar]:
    """What is promised of one task."""
    recipe = next((row for row in rows if row["method"] == NO_OLD_DATA), {})
    chosen = recipe.get("chosen", {})
    return [
        Bar(f"{NO_OLD_DATA}: general", 0.97, chosen.get("general")),
        Bar(f"{NO_OLD_DATA}: new", ENOUGH, chosen.get("new")),
        Bar(f"{NO_OLD_DATA}: general, more than the best plain LoRA", 0.10, recipe.get("difference")),
        Bar(f"{NO_OLD_DATA}: CPU time to the target, of plain LoRA's", 1.3, recipe.get("cpu_ratio"), False),
    ]


def sequence_bars(rows: Sequence[Mapping[str, Any]]) -> list[Bar]:
    """What is promised of a sequence."""
    by_name = {row["method"]: row for row in rows}

    def value(method: str, name: str) -> float | None:
        found: float | None = by_name[method][name]["value"] if method in by_name else None
        return found

    unmentioned = by_name.get(RECIPE_QUESTIONS, {}).get("unmentioned")
    steps = [value(method, "step_cpu_s") for method in (RECIPE_QUESTIONS, REPLAY_QUARTER)]
    dearer = steps[0] / steps[1] if steps[0] and steps[1] else None
    return [
        Bar(f"{WITH_REPLAY}: average accuracy, of {JOINT}'s", 0.98, value(WITH_REPLAY, "of_joint")),
        Bar(f"{WITH_REPLAY}: general", 0.95, value(WITH_REPLAY, "general")),
        Bar(f"{WITH_REPLAY}: backward transfer", -0.02, value(WITH_REPLAY, "backward_transfer")),
        Bar(f"{WITH_REPLAY}: CPU of the third task, of {JOINT}'s", 0.6, value(WITH_REPLAY, "cost_of_joint"), False),
        Bar(f"{STORED}: average accuracy, of {JOINT}'s", 0.85, value(STORED, "of_joint")),
        Bar(f"{RECIPE_QUESTIONS}: uncovered", 0.95, value(RECIPE_QUESTIONS, "uncovered")),
        Bar(f"{RECIPE_QUESTIONS}: unmentioned", 0.90, unmentioned and unmentioned["share"]),
        Bar(f"{RECIPE_QUESTIONS}: average accuracy", 0.93, value(RECIPE_QUESTIONS, "average_accuracy")),
        Bar(f"{RECIPE_QUESTIONS}: CPU of a step, of {REPLAY_QUARTER}'s", 1.4, dearer, False),
    ]
