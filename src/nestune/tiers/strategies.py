"""How parameters are divided among tiers: one plain function a strategy, one dictionary of them all.

To add one: write a function with this signature, enter it in STRATEGIES, add its name to `TierConfig.strategy`.
"""

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase

from nestune.config import TierConfig
from nestune.errors import ConfigError
from nestune.tiers.parameters import LoraParameter

Strategy = Callable[[Sequence[LoraParameter], TierConfig], Mapping[str, int]]


def by_depth(parameters: Sequence[LoraParameter], tiers: TierConfig) -> dict[str, int]:
    """Shallow layers fast (system A's default); a layer is never split. Keeps less than plain LoRA does."""
    tier_of = _split_by_depth(parameters, len(tiers.update_every))
    return {p.name: tier_of[p.layer] for p in parameters}


def by_reversed_depth(parameters: Sequence[LoraParameter], tiers: TierConfig) -> dict[str, int]:
    """Deep layers fast; a layer is never split. The backward pass ends early at most steps."""
    layers = sorted({p.layer for p in parameters})
    mirrored = dict(zip(layers, reversed(layers), strict=True))
    tier_of = _split_by_depth(parameters, len(tiers.update_every))
    return {p.name: tier_of[mirrored[p.layer]] for p in parameters}


def by_pattern(parameters: Sequence[LoraParameter], tiers: TierConfig) -> dict[str, int]:
    """The tier of the first pattern that matches a name, upper and lower case being alike.

    A name that no pattern matches is left out: the tier map puts it into the slowest tier, with a warning.
    Raises ConfigError when a pattern matches nothing.
    """
    names = [p.name for p in parameters]
    matched = {
        pattern: [name for name in names if fnmatchcase(name.lower(), pattern.lower())] for pattern in tiers.assignments
    }
    idle = [pattern for pattern, found in matched.items() if not found]
    if idle:
        raise ConfigError(
            f"tiers.assignments: {', '.join(map(repr, idle))} match no LoRA parameter. "
            f"Names look like {names[0]} ... {names[-1]}; mend the pattern or remove it."
        )
    tier_of: dict[str, int] = {}
    for pattern, found in matched.items():
        for name in found:
            tier_of.setdefault(name, tiers.assignments[pattern])
    return tier_of


STRATEGIES: dict[str, Strategy] = {
    "layer_depth": by_depth,
    "layer_depth_reversed": by_reversed_depth,
    "manual": by_pattern,
}


def _split_by_depth(parameters: Sequence[LoraParameter], n_tiers: int) -> dict[int, int]:
    """Layer -> tier, shallow layers in tier 0; the parts differ by at most one layer."""
    layers = sorted({p.layer for p in parameters})
    if len(layers) < n_tiers:
        raise ConfigError(
            f"tiers.update_every has {n_tiers} periods, but only {len(layers)} layers have LoRA parameters, "
            "and a layer is never split. Use fewer tiers, or strategy manual."
        )
    return {layer: i * n_tiers // len(layers) for i, layer in enumerate(layers)}
