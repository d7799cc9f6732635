"""How much each LoRA matrix matters to the new task, as its gradients before training tell.

Sources of the measures: mean |g|, system A's; mean g^2, the diagonal of the empirical Fisher information
(Kirkpatrick et al. 2017, arXiv:1612.00796, section 2); mean |w g|, the first-order Taylor estimate of what the loss
would change by without the weight (Molchanov et al. 2019, arXiv:1906.10771, equation 8, without the square).
"""

from collections.abc import Mapping, Sequence
from typing import Literal

from nestune.tiers.parameters import LoraParameter

Importance = Mapping[str, float]
"""Canonical name of a matrix -> its measure, the mean over its elements and over the measured steps."""


def rank_groups(
    parameters: Sequence[LoraParameter], importance: Importance, aggregate: Literal["parameter", "module", "layer"]
) -> list[list[LoraParameter]]:
    """Groups of matrices, the most important first; ties in the model's order.

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

    return sorted(groups.values(), key=measure, reverse=True)
