"""What a sequence of tasks has learned and forgotten: the matrix of its scores, and the published metrics of it.

R[i, j] is the score on task j after training on task i, for i, j from 1 to T; R[0, j] is that of the model that the
sequence began with. A score is an exact match, or, where not every task has answers, minus the loss in nats per token:
more is better in either case, and every metric is a difference in that unit (points of 1, not percent) or a mean.

    average_accuracy   mean over j of R[T, j]
    backward_transfer  mean over j < T of R[T, j] - R[j, j]; below 0: forgetting
    forward_transfer   mean over j > 1 of R[j-1, j] - b[j], b[j] being the score of an untrained model
    forgetting         mean over j < T of (max over i from j to T-1 of R[i, j]) - R[T, j]
    intransigence      mean over j of joint[j] - R[j, j], joint being a model trained on all tasks at once
    general_delta      mean over general sets of their score after task T, less that before the first

The transfers are those of GEM (Lopez-Paz and Ranzato 2017, arXiv:1706.08840), forgetting and intransigence those of
Chaudhry et al. 2018 (arXiv:1801.10112), the average and the delta those of TRACE (Wang et al. 2023, arXiv:2310.06762).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from nestune.errors import RunError
from nestune.evaluation.scores import Outcomes, Score
from nestune.evaluation.uncertainty import (
    CONFIDENCE,
    RESAMPLES,
    Interval,
    percentiles,
    resampled_scores,
    score_interval,
)

Numbers = NDArray[np.float64]
Measure = Literal["exact_match", "loss"]


@dataclass(frozen=True)
class Lineage:
    """The scores along a sequence of T tasks: `after[0]` of the model that it began with, `after[i]` after task i.

    Each has a score of every task and every general set, on the same rows; `joint`, of every task, is that of a model
    trained on all of them at once, None where there is none. Raises RunError when something is lacking.
    """

    tasks: tuple[str, ...]
    general: tuple[str, ...]
    after: tuple[Mapping[str, Score], ...]
    joint: Mapping[str, Score] | None = None

    def __post_init__(self) -> None:
        faults = [] if len(self.after) == len(self.tasks) + 1 else [f"{len(self.after)} models"]
        faults += [
            f"no score on {name} after task {place}"
            for place, scores in enumerate(self.after)
            for name in (*self.tasks, *self.general)
            if name not in scores
        ]
        faults += [f"no joint score on {name}" for name in self.tasks if self.joint and name not in self.joint]
        if faults or not self.tasks:
            raise RunError(
                f"scores of {len(self.tasks)} tasks in sequence need {len(self.tasks) + 1} models with a score of each "
                f"set; there is: {', '.join(faults) or 'no task'}. Score them again."
            )

    def measure(self, sets: Sequence[str]) -> Measure:
        """What these sets are judged by together: exact match where all have answers."""
        return "exact_match" if all(self.after[0][name].measure == "exact_match" for name in sets) else "loss"

    def matrix(self, sets: Sequence[str]) -> Numbers:
        """The scores (T + 1, sets) after each task, in the order of time."""
        measure = self.measure(sets)
        return np.array([[_number(scores[name], measure) for name in sets] for scores in self.after])

    def joint_scores(self) -> Numbers | None:
        """The scores (T,) of the model that was trained on all tasks at once."""
        measure = self.measure(self.tasks)
        return np.array([_number(self.joint[name], measure) for name in self.tasks]) if self.joint else None


@dataclass(frozen=True)
class Estimate:
    """A metric: its value, and where it lies; no interval where the rows behind a score are not known."""

    value: float
    interval: Interval | None

    def as_dict(self) -> dict[str, Any]:
        """The estimate as JSON."""
        return {"value": self.value, "interval": self.interval.as_list() if self.interval else None}


def metrics_of(
    scores: Numbers, joint: Numbers | None = None, general: Numbers | None = None, untrained: Numbers | None = None
) -> dict[str, Numbers]:
    """The metrics of R, `scores` (..., T + 1, T), each of shape (...); what there is nothing to say of is left out.

    joint (..., T); general (..., T + 1, sets), more is better in all; untrained (..., T): b of the forward transfer,
    by default R[0]. Of one task there is no transfer and no forgetting.
    """
    tasks = scores.shape[-1]
    each = np.arange(tasks)
    when_trained, last = scores[..., each + 1, each], scores[..., -1, :]
    found = {"average_accuracy": last.mean(axis=-1)}
    if tasks > 1:
        earlier = each[:-1]
        best = np.stack([scores[..., j + 1 : tasks, j].max(axis=-1) for j in earlier], axis=-1)
        before = scores[..., 0, :] if untrained is None else untrained
        found |= {
            "backward_transfer": (last - when_trained)[..., earlier].mean(axis=-1),
            "forward_transfer": (scores[..., each, each] - before)[..., 1:].mean(axis=-1),
            "forgetting": (best - last[..., earlier]).mean(axis=-1),
        }
    if joint is not None:
        found["intransigence"] = (joint - when_trained).mean(axis=-1)
    if general is not None and general.shape[-1]:
        found["general_delta"] = _general_delta(general)
    return found


def estimate_metrics(lineages: Sequence[Lineage], confidence: float = CONFIDENCE) -> dict[str, Estimate]:
    """The mean of each metric over lineages, one for each seed or order, with its interval by bootstrap.

    Rows of every set are drawn anew, the same ones for every model of a lineage; of several lineages, these too.
    Raises ValueError when the lineages do not have the same metrics, as some have joint scores or general sets.
    """
    values = [metrics_of(one.matrix(one.tasks), one.joint_scores(), one.matrix(one.general)) for one in lineages]
    if not values or any(one.keys() != values[0].keys() for one in values):
        raise ValueError("lineages whose metrics are to be averaged must have the same ones")
    drawn = [_resampled_metrics(lineage, place) for place, lineage in enumerate(lineages)]
    chosen = np.random.default_rng(len(lineages)).integers(len(lineages), size=(len(lineages), RESAMPLES))
    estimates = {}
    for name in values[0]:
        interval = None
        if all(name in one for one in drawn):
            of_each = np.stack([one[name] for one in drawn])
            interval = percentiles(np.take_along_axis(of_each, chosen, axis=0).mean(axis=0), confidence)
        estimates[name] = Estimate(float(np.mean([one[name] for one in values])), interval)
    return estimates


def lineage_report(lineage: Lineage, confidence: float = CONFIDENCE) -> dict[str, Any]:
    """The matrix, the general sets and the metrics as a JSON object; losses stand in it as losses."""
    return {
        "confidence": confidence,
        "tasks": _part(lineage, lineage.tasks, confidence),
        "general": _part(lineage, lineage.general, confidence),
        "metrics": {name: estimate.as_dict() for name, estimate in estimate_metrics([lineage], confidence).items()},
    }


def _part(lineage: Lineage, sets: Sequence[str], confidence: float) -> dict[str, Any]:
    measure = lineage.measure(sets)
    models = [*lineage.after, *([lineage.joint] if lineage.joint and sets == lineage.tasks else [])]
    told = [[_told(scores[name], measure, confidence) for name in sets] for scores in models]
    steps = len(lineage.after)
    return {
        "names": list(sets),
        "measure": measure,
        "scores": told[:steps],
        "joint": told[steps] if told[steps:] else None,
    }


def _told(score: Score, measure: Measure, confidence: float) -> dict[str, Any]:
    value = abs(_number(score, measure))
    interval = score_interval(score, confidence) if score.measure == measure else None
    return {"value": value if math.isfinite(value) else None, "interval": interval.as_list() if interval else None}


def _number(score: Score, measure: Measure) -> float:
    """The score such that more is better."""
    if measure == "loss":
        return math.nan if score.loss is None else -score.loss
    return score.value


def _outcomes(scores: Sequence[Score], measure: Measure) -> list[Outcomes] | None:
    """The outcomes of several models on one set such that more is better; None where those of one are not known."""
    found = []
    for score in scores:
        known = score.outcomes if score.measure == measure else None
        if known is None or not all(map(math.isfinite, known.amounts)):
            return None
        found.append(replace(known, amounts=tuple(-nats for nats in known.amounts)) if measure == "loss" else known)
    return found


def _resampled(lineage: Lineage, sets: Sequence[str], with_joint: bool, place: int) -> Numbers | None:
    """Scores (RESAMPLES, T + 1, sets) on rows drawn anew; with_joint: T + 2, that of the joint one last."""
    models = [*lineage.after, *([lineage.joint] if lineage.joint and with_joint else [])]
    drawn = []
    for column, name in enumerate(sets):
        outcomes = _outcomes([scores[name] for scores in models], lineage.measure(sets))
        if outcomes is None:
            return None
        drawn.append(resampled_scores(outcomes, seed=(place, with_joint, column)))
    return np.stack(drawn, axis=-1) if drawn else None


def _resampled_metrics(lineage: Lineage, place: int) -> dict[str, Numbers]:
    """Each metric (RESAMPLES,), where the rows behind it are known."""
    steps = len(lineage.after)
    found: dict[str, Numbers] = {}
    scores = _resampled(lineage, lineage.tasks, with_joint=True, place=place)
    if scores is not None:
        joint = scores[:, steps] if lineage.joint else None
        found |= metrics_of(scores[:, :steps], joint)
    general = _resampled(lineage, lineage.general, with_joint=False, place=place)
    if general is not None:
        found["general_delta"] = _general_delta(general)
    return found


def _general_delta(general: Numbers) -> Numbers:
    delta: Numbers = (general[..., -1, :] - general[..., 0, :]).mean(axis=-1)
    return delta
