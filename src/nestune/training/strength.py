"""How much of a learned change is kept: the change at a factor, and the choice among factors.

Source: WiSE-FT, Wortsman et al. 2022, arXiv:2109.01903: weights between those before and after fine-tuning keep more
of the old at little cost for the new. Here the weights are the effects of adapters.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from nestune.backends.lora_sum import Adapter, split, weighted_sum


@dataclass(frozen=True)
class Point:
    """What one factor keeps and costs.

    score: on the new task, exact match or loss; share: what of the whole change's gain over the parent it keeps, None
    where the whole change gains nothing; divergence: KL(parent || adapter), in nats per position.
    """

    factor: float
    score: float
    share: float | None
    divergence: float


def scaled(trained: Adapter, parent: Adapter | None, factor: float, own_ranks: int | None) -> Adapter:
    """The adapter parent + factor * (trained - parent); without a parent, factor * trained.

    own_ranks: how many of the last ranks of `trained` are the change, the ranks before being the parent's; None: all
    of its matrices moved. Factor 1 gives `trained` as it is, factor 0 the parent.
    """
    if factor == 1:
        return trained
    if parent is None:
        return weighted_sum([(trained, factor)], trained.scale)
    if factor == 0:
        return parent
    if own_ranks is None:
        return weighted_sum([(parent, 1 - factor), (trained, factor)], trained.scale)
    before, change = split(trained, own_ranks)
    return weighted_sum([(before, 1.0), (change, factor)], trained.scale)


def share_of_gain(gain: float, whole: float) -> float | None:
    """What share of the whole change's gain another gain is; None where the whole change gains nothing."""
    return gain / whole if whole > 0 else None


def choose(points: Sequence[Point], min_share: float) -> Point:
    """The point with the least divergence of those that keep at least `min_share` of the gain; the whole change counts.

    Where the whole change gains nothing, no factor is better than another, and it stays whole. One of the points must
    be that of factor 1.
    """
    (whole,) = (point for point in points if point.factor == 1)
    # A share of exactly the minimum is enough, whatever the rounding of floats.
    enough = [point for point in points if point.share is not None and point.share >= min_share - 1e-9]
    return min([whole, *enough] if enough else [whole], key=lambda point: (point.divergence, point.factor))
