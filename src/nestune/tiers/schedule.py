"""Which tiers are due at a step."""

from dataclasses import dataclass
from itertools import chain, combinations
from math import lcm


@dataclass(frozen=True)
class TierSchedule:
    """Tier k is due at step t (counted from 1) when t is a multiple of `update_every[k]`; None: never."""

    update_every: tuple[int | None, ...]

    def due(self, step: int) -> frozenset[int]:
        """The tiers that are updated at a step, e.g. {0} {0, 1} {0} {0, 1, 2} for periods 1, 2, 4."""
        if step < 1:
            raise ValueError(f"steps are counted from 1, seen {step}")
        return frozenset(tier for tier, period in enumerate(self.update_every) if period and step % period == 0)

    def update_counts(self, steps: int) -> tuple[int, ...]:
        """How often each tier is updated in the first `steps` steps: floor(steps / period)."""
        return tuple(steps // period if period else 0 for period in self.update_every)

    def steps_with_an_update(self, steps: int) -> int:
        """At how many of the first `steps` steps some tier is due; by inclusion and exclusion, as steps may be many."""
        periods = [period for period in self.update_every if period]
        chosen = chain.from_iterable(combinations(periods, number) for number in range(1, len(periods) + 1))
        return sum((-1) ** (len(some) + 1) * (steps // lcm(*some)) for some in chosen)


def describe_period(period: int | None) -> str:
    """When a tier of this period moves, in words."""
    return "never" if period is None else "every step" if period == 1 else f"every {period} steps"
