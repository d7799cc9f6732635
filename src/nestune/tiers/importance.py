"""How much each LoRA matrix matters to the new task, as its gradients before training tell.

Sources of the measures: mean |g|, system A's; mean g^2, the diagonal of the empirical Fisher information
(Kirkpatrick et al. 2017, arXiv:1612.00796, section 2); mean |w g|, the first-order Taylor estimate of what the loss
would change by without the weight (Molchanov et al. 2019, arXiv:1906.10771, equation 8, without the square).
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import ConfigDict, Field, ValidationError

from nestune.config.faults import explain
from nestune.errors import ConfigError, RunError
from nestune.files import read_json, write_json
from nestune.tiers.parameters import LoraParameter

Importance = Mapping[str, float]
"""Canonical name of a matrix -> its measure, the mean over its elements and over the measured steps."""


@dataclass(frozen=True)
class Measured:
    """What a pass over the first training steps found, all that it depends on by name, and the seconds it took.

    `measured_on` has at least the `measure` and the number of `steps`.
    """

    importance: Importance
    measured_on: Mapping[str, Any]
    seconds: float

    @property
    def cost(self) -> dict[str, Any]:
        """How many steps were measured, and in what time."""
        steps = self.measured_on["steps"]
        return {"steps": steps, "seconds": self.seconds, "seconds_per_step": round(self.seconds / steps, 6)}


def rank_groups(
    parameters: Sequence[LoraParameter],
    importance: Importance,
    aggregate: Literal["parameter", "module", "layer"],
    least_first: bool = False,
) -> list[list[LoraParameter]]:
    """Groups of matrices, the most important first (or the least); ties in the model's order either way.

    A group's importance is the mean over its modules of (measure of A + measure of B). In a new adapter B is zero,
    so A has no gradient at all: taken together, B alone decides there, and neither A's size nor its zeros dilute it;
    from a parent adapter on both count. `parameter` ranks every matrix alone, so in a new adapter every A comes last.
    """
    groups: dict[tuple[object, ...], list[LoraParameter]] = {}
    for p in parameters:
        key = {"parameter": (p.name,), "module": (p.layer, p.module), "layer": (p.layer,)}[aggregate]
        groups.setdefault(key, []).append(p)

    def measure(group: list[LoraParameter]) -> float:
        return sum(importance[p.name] for p in group) / len({(p.layer, p.module) for p in group})

    return sorted(groups.values(), key=measure, reverse=not least_first)


def check_importance(importance: Importance, measure: str) -> None:
    """Raise ConfigError when the measures cannot rank anything: one is not finite, or all are zero."""
    infinite = [name for name, value in importance.items() if not math.isfinite(value)]
    if infinite:
        raise ConfigError(
            f"tiers.importance: the measure {measure} of {infinite[0]} is {importance[infinite[0]]}, and "
            f"{len(infinite)} of {len(importance)} are not finite. Compute in a wider type (training.precision, "
            "model.dtype), or take another tiers.strategy."
        )
    if not any(importance.values()):
        raise ConfigError(
            f"tiers.importance: the measure {measure} of every matrix is 0, so none is more important than another. "
            "Measure gradient, start from a trained adapter (model.adapter), or take another tiers.strategy."
        )


def write_importance(measured: Measured, path: Path) -> None:
    """Write a pass as JSON with the hash of its content, whole or not at all."""
    content = {**measured.cost, "measured_on": dict(measured.measured_on), "importance": dict(measured.importance)}
    write_json(path, {**content, "sha256": _sha256(content)})


def read_importance(path: Path) -> Measured:
    """The pass that a file keeps. Raises RunError when it is missing, holds something else, or was changed by hand."""
    remedy = "Delete it, and run nestune tiers again."
    content = read_json(path, remedy, keys=["measured_on", "importance", "seconds", "sha256"])
    if content.pop("sha256") != _sha256(content):
        raise RunError(f"{path} was changed by hand. {remedy}")
    try:
        kept = _MeasuredFile.model_validate(content)
    except ValidationError as error:
        raise RunError(f"{path} holds no importances: {explain(error, _MeasuredFile)[0]} {remedy}") from None
    return Measured(kept.importance, content["measured_on"], kept.seconds)


class _MeasuredOn(pydantic.BaseModel):
    model_config = ConfigDict(strict=True)

    measure: str
    steps: Annotated[int, Field(gt=0)]


class _MeasuredFile(pydantic.BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    importance: dict[str, float]
    measured_on: _MeasuredOn
    seconds: Annotated[float, Field(ge=0)]


def _sha256(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
