"""How far scores may be from what they would be on other rows of the same kind: the bootstrap over rows.

The units of a set are drawn anew, with replacement, as many as there are, RESAMPLES times; the interval holds the
middle share of what the score then is (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13: the
percentile interval). Models are compared on the same draws of the same rows, so what makes a row hard for both takes
no part. Of very few rows it tells little: where every row came out alike, it has no width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nestune.evaluation.scores import Outcomes, Score

CONFIDENCE = 0.95
RESAMPLES = 4000


@dataclass(frozen=True)
class Interval:
    """The ends between which a number lies with the confidence that was asked for."""

    low: float
    high: float

    def __neg__(self) -> "Interval":
        return Interval(-self.high, -self.low)

    def as_list(self) -> list[float]:
        """Both ends, as JSON has them."""
        return [self.low, self.high]

    def text(self, decimals: int, sign: str = "") -> str:
        """E.g. `[0.93, 0.97]`, or with sign + `[-0.02, +0.01]`."""
        return f"[{self.low:{sign}z.{decimals}f}, {self.high:{sign}z.{decimals}f}]"


def score_interval(score: Score, confidence: float = CONFIDENCE) -> Interval | None:
    """The interval of what a set is judged by; None where its outcomes are not known or not finite."""
    if score.outcomes is None or not _finite(score.outcomes):
        return None
    return percentiles(resampled_scores([score.outcomes])[:, 0], confidence)


def gain_interval(candidate: Score, reference: Score, confidence: float = CONFIDENCE) -> Interval | None:
    """The interval of how much better the candidate is: its exact match less the reference's, or its loss from theirs.

    None where the outcomes of one are not known or not finite; they must be of the same rows.
    """
    outcomes = [score.outcomes for score in (candidate, reference) if score.outcomes is not None]
    if len(outcomes) < 2 or not all(map(_finite, outcomes)):
        return None
    drawn = resampled_scores(outcomes)
    difference = percentiles(drawn[:, 0] - drawn[:, 1], confidence)
    return -difference if candidate.measure == "loss" else difference


def resampled_scores(models: Sequence[Outcomes], seed: int | Sequence[int] = 0) -> NDArray[np.float64]:
    """Scores (RESAMPLES, models) of several models on the same rows, each time on the same draw of them.

    Rows that came out alike for every model are interchangeable, so how often each kind is drawn is drawn at once
    (multinomial): the same distribution as that of drawing row by row. Raises ValueError for outcomes of other rows.
    """
    if len({model.weights for model in models}) != 1:
        raise ValueError("outcomes of different rows cannot be compared row by row")
    rows = np.array([models[0].weights, *(model.amounts for model in models)], dtype=np.float64)
    kinds, counts = np.unique(rows, axis=1, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(counts.sum(), counts / counts.sum(), size=RESAMPLES)
    sums: NDArray[np.float64] = drawn @ kinds.T
    return sums[:, 1:] / sums[:, :1]


def percentiles(values: NDArray[np.float64], confidence: float) -> Interval:
    """The interval that leaves out (1 - confidence) / 2 of the values at either end."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return Interval(float(low), float(high))


def _finite(outcomes: Outcomes) -> bool:
    return all(map(math.isfinite, outcomes.amounts))
