"""The logit check: what another program computes with an export, against what nestune computes with the adapter."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from nestune.backends.base import Backend
from nestune.errors import RunError

ROWS, TOKENS = 4, 32
# What is left of float32 when two programs sum in another order, in nats.
ROUNDING = 1e-4
# The part of the adapter's effect that may be lost where its sum with the base is rounded to a type.
LOST_TO_ROUNDING = {"float32": 0.001, "bfloat16": 0.1, "float16": 0.1}

# One row of token ids (T,) -> the logits after each of them, float32 (T, vocabulary).
Logits: TypeAlias = Callable[[Sequence[int]], NDArray[Any]]


@dataclass(frozen=True, eq=False)
class Reference:
    """Rows of tokens, and the log-probabilities (T, vocabulary) in nats after each, with the adapter and without."""

    rows: list[list[int]]
    adapted: list[NDArray[np.float64]]
    untouched: list[NDArray[np.float64]]

    @property
    def effect(self) -> float:
        """The largest difference that the adapter makes to a log-probability."""
        return _largest_difference(self.adapted, self.untouched)


@dataclass(frozen=True)
class Check:
    """The largest deviation of a log-probability, what is allowed, and the adapter's own effect; all in nats."""

    deviation: float
    allowed: float
    effect: float
    tokens: int


def make_reference(backend: Backend, adapter: Path, positions: int | None) -> Reference:
    """What a backend, which computes in float32, makes of an adapter on random rows: the same rows every time.

    positions: the most tokens that the base reads. Raises ConfigError when the adapter does not fit.
    """
    backend.show_adapter(None)
    vocabulary = backend.logits([0]).shape[-1]
    length = min(TOKENS, positions or TOKENS)
    rows = np.random.default_rng(0).integers(vocabulary, size=(ROWS, length)).tolist()
    untouched = _log_probabilities(backend.logits, rows)
    backend.show_adapter(adapter)
    return Reference(rows, _log_probabilities(backend.logits, rows), untouched)


def check_logits(logits: Logits, reference: Reference, rounded_to: str | None, remedy: str) -> Check:
    """Compare what an export computes with the reference; raises RunError with the remedy when it is something else.

    rounded_to: the type in which the export holds sums of base and adapter; None: it holds the adapter alone.
    """
    deviation = _largest_difference(_log_probabilities(logits, reference.rows), reference.adapted)
    effect = reference.effect
    allowed = max(ROUNDING, LOST_TO_ROUNDING[rounded_to] * effect) if rounded_to else ROUNDING
    if not deviation <= allowed:  # so that NaN is refused too
        raise RunError(
            f"the export computes something else than the adapter: log-probabilities deviate by up to {deviation:.2g} "
            f"nats, allowed is {allowed:.2g}; the adapter's own effect is {effect:.2g}. Nothing was written. {remedy}"
        )
    return Check(deviation, allowed, effect, tokens=sum(map(len, reference.rows)))


def _log_probabilities(logits: Logits, rows: Sequence[Sequence[int]]) -> list[NDArray[np.float64]]:
    found = []
    for row in rows:
        values = logits(row).astype(np.float64)
        values -= values.max(axis=-1, keepdims=True)
        found.append(values - np.log(np.exp(values).sum(axis=-1, keepdims=True)))
    return found


def _largest_difference(ones: Sequence[NDArray[np.float64]], others: Sequence[NDArray[np.float64]]) -> float:
    """NaN where one of them holds NaN; infinite where their vocabularies differ in size."""
    if any(one.shape != other.shape for one, other in zip(ones, others, strict=True)):
        return math.inf
    return float(np.max([np.abs(one - other).max() for one, other in zip(ones, others, strict=True)]))
