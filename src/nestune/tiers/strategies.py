"""How parameters are divided among tiers: one plain function a strategy, one dictionary of them all.

To add one: write a function with this signature, enter it in STRATEGIES, add its name to `TierConfig.strategy`.
What a strategy leaves out goes to the slowest tier, with a warning.
"""

import random
from collections.abc import Callable, Hashable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

from nestune.config import TierConfig
from nestune.errors import ConfigError
from nestune.tiers.importance import Importance, rank_groups
from nestune.tiers.parameters import LoraParameter, name_of_ranks

Part = TypeVar("Part", bound=Hashable)
Strategy = Callable[[Sequence[LoraParameter], TierConfig, Importance], Mapping[str, int]]


def by_depth(parameters: Sequence[LoraParameter], tiers: TierConfig, _: Importance) -> dict[str, int]:
    """Shallow layers fast (system A's default); a layer is never split. Keeps less than plain LoRA does."""
    tier_of = split_evenly(sorted({p.layer for p in parameters}), len(tiers.update_every), "layers")
    return {p.name: tier_of[p.layer] for p in parameters}


def by_reversed_depth(parameters: Sequence[LoraParameter], tiers: TierConfig, _: Importance) -> dict[str, int]:
    """Deep layers fast; a layer is never split. The backward pass ends early at most steps."""
    layers = sorted({p.layer for p in parameters})
    tier_of = split_evenly(layers, len(tiers.update_every), "layers")
    mirrored = dict(zip(layers, reversed(layers), strict=True))
    return {p.name: tier_of[mirrored[p.layer]] for p in parameters}


def by_importance(parameters: Sequence[LoraParameter], tiers: TierConfig, importance: Importance) -> dict[str, int]:
    """What the gradients of the new task ask to move most is fast (system A); `reversed`: slow.

    What is ranked is set by `tiers.importance.aggregate`. Ties are broken by the model's order.
    """
    settings = tiers.importance
    groups = rank_groups(parameters, importance, settings.aggregate, least_first=settings.reversed)
    names = [tuple(p.name for p in group) for group in groups]
    tier_of = split_evenly(names, len(tiers.update_every), f"{settings.aggregate}s")
    return {name: tier for group, tier in tier_of.items() for name in group}


def by_module_type(parameters: Sequence[LoraParameter], tiers: TierConfig, _: Importance) -> dict[str, int]:
    """Attention fast, MLP slow, in all layers alike.

    With more tiers than such blocks, the kinds of modules (q_proj, k_proj, ...) are divided in the model's order.
    """
    blocks = list(dict.fromkeys(_block(p) for p in parameters))
    n_tiers = len(tiers.update_every)
    if n_tiers <= len(blocks):
        tier_of = split_evenly(blocks, n_tiers, "blocks")
        return {p.name: tier_of[_block(p)] for p in parameters}
    tier_of = split_evenly(list(dict.fromkeys(p.module for p in parameters)), n_tiers, "kinds of modules")
    return {p.name: tier_of[p.module] for p in parameters}


def by_rank(parameters: Sequence[LoraParameter], tiers: TierConfig, _: Importance) -> dict[str, int]:
    """Stacked: the ranks of every matrix are divided, so that each module has a fast and a slow memory.

    The adapter stays one LoRA of the full rank. As every layer is always due, no backward pass is saved.
    """
    tier_of: dict[str, int] = {}
    for p in parameters:
        ranks = split_evenly(range(p.rank), len(tiers.update_every), "ranks")
        for tier in range(len(tiers.update_every)):
            members = [rank for rank, of in ranks.items() if of == tier]
            tier_of[name_of_ranks(p.name, range(members[0], members[-1] + 1))] = tier
    return tier_of


def by_pattern(parameters: Sequence[LoraParameter], tiers: TierConfig, _: Importance) -> dict[str, int]:
    """The tier of the first pattern that matches a name, upper and lower case being alike.

    Raises ConfigError with every pattern that decides nothing: it matches no name, or only names that an earlier
    pattern has taken.
    """
    tier_of: dict[str, int] = {}
    faults = []
    for pattern, tier in tiers.assignments.items():
        matched = [p.name for p in parameters if fnmatchcase(p.name.lower(), pattern.lower())]
        free = [name for name in matched if name not in tier_of]
        if not matched:
            faults.append(f"{pattern!r} matches no LoRA parameter")
        elif not free:
            faults.append(f"{pattern!r} matches only what earlier patterns have taken, such as {matched[0]}")
        tier_of |= dict.fromkeys(free, tier)
    if faults:
        names = f"Names look like {parameters[0].name} ... {parameters[-1].name}"
        raise ConfigError(
            f"tiers.assignments: {'; '.join(faults)}. {names}, and the first pattern that matches counts: "
            "mend these patterns, move them up, or remove them."
        )
    return tier_of


def at_random(parameters: Sequence[LoraParameter], tiers: TierConfig, _: Importance) -> dict[str, int]:
    """A control for every other strategy: modules, A and B together, in an order drawn from `tiers.seed`."""
    modules = sorted({(p.layer, p.module) for p in parameters})
    random.Random(tiers.seed).shuffle(modules)
    tier_of = split_evenly(modules, len(tiers.update_every), "modules")
    return {p.name: tier_of[p.layer, p.module] for p in parameters}


STRATEGIES: dict[str, Strategy] = {
    "layer_depth": by_depth,
    "layer_depth_reversed": by_reversed_depth,
    "parameter_importance": by_importance,
    "module_type": by_module_type,
    "stacked": by_rank,
    "manual": by_pattern,
    "random": at_random,
    # A control for the slowest tier's updates: where it is the same, what it does is nil; see TierConfig.periods.
    "frozen_slow": by_reversed_depth,
}


def split_evenly(parts: Sequence[Part], n_tiers: int, what: str) -> dict[Part, int]:
    """Part -> tier, the first parts on tier 0; tiers differ by at most one part.

    Raises ConfigError when there are fewer parts than tiers; `what` names them.
    """
    if len(parts) < n_tiers:
        raise ConfigError(
            f"tiers.update_every has {n_tiers} periods, but the adapter has only {len(parts)} {what} to divide among "
            "them. Use fewer tiers, or another tiers.strategy."
        )
    return {part: index * n_tiers // len(parts) for index, part in enumerate(parts)}


def _block(parameter: LoraParameter) -> str:
    """What a module is part of, e.g. `self_attn` for `self_attn.q_proj`."""
    return parameter.module.rpartition(".")[0]
