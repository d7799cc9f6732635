"""The tier map: canonical parameter name -> tier, checked, and kept as a JSON file."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nestune.config import TierConfig
from nestune.errors import ConfigError, RunError
from nestune.runs import read_json, write_json
from nestune.tiers.parameters import LoraParameter
from nestune.tiers.strategies import STRATEGIES


@dataclass(frozen=True)
class TierMap:
    """Every trainable matrix on exactly one tier, no tier empty; how it was made; what deserves a warning."""

    strategy: str
    update_every: tuple[int, ...]
    tier_of: dict[str, int]
    warnings: tuple[str, ...] = ()

    @property
    def sha256(self) -> str:
        """Hash over periods and assignment, in hex: equal for equal training behaviour, however it was made."""
        content = json.dumps([self.update_every, sorted(self.tier_of.items())])
        return hashlib.sha256(content.encode()).hexdigest()

    def members(self, tier: int) -> list[str]:
        """The names on a tier, in the order of the map."""
        return [name for name, of in self.tier_of.items() if of == tier]

    def as_dict(self) -> dict[str, Any]:
        """The map as the JSON object that `tiers.json` holds."""
        return {
            "strategy": self.strategy,
            "update_every": list(self.update_every),
            "parameters_per_tier": [len(self.members(tier)) for tier in range(len(self.update_every))],
            "warnings": list(self.warnings),
            "sha256": self.sha256,
            "tiers": self.tier_of,
        }


def assign_tiers(parameters: Sequence[LoraParameter], tiers: TierConfig) -> TierMap:
    """Divide the parameters among the tiers by the configured strategy.

    A parameter that the strategy leaves out goes to the slowest tier, with a warning.
    Raises ConfigError when a tier would be empty.
    """
    chosen = STRATEGIES[tiers.strategy](parameters, tiers)
    slowest = len(tiers.update_every) - 1
    unmapped = [p.name for p in parameters if p.name not in chosen]
    tier_of = {p.name: chosen.get(p.name, slowest) for p in parameters}
    empty = sorted(set(range(slowest + 1)) - set(tier_of.values()))
    if empty:
        raise ConfigError(
            f"tiers: no parameter is on tier {', '.join(map(str, empty))} of {slowest + 1}. "
            "Assign some to it, or take its period out of tiers.update_every."
        )
    warnings: tuple[str, ...] = ()
    if unmapped:
        warnings = (
            f"{len(unmapped)} parameters on no tier go to the slowest, {slowest}: "
            f"{', '.join(unmapped[:3])}{' ...' if len(unmapped) > 3 else ''}",
        )
    return TierMap(tiers.strategy, tiers.update_every, tier_of, warnings)


def write_tier_map(tier_map: TierMap, path: Path) -> None:
    """Write the map as JSON, whole or not at all."""
    write_json(path, tier_map.as_dict())


def read_tier_map(path: Path, parameters: Sequence[LoraParameter], tiers: TierConfig) -> TierMap:
    """The map in a file, checked against the model's parameters and the configuration.

    Raises RunError when the file is missing, or was made for other parameters, periods or another strategy.
    """
    remedy = "Run nestune tiers again."
    content = read_json(path, remedy)
    try:
        tier_map = TierMap(
            content["strategy"],
            tuple(content["update_every"]),
            {str(name): int(tier) for name, tier in content["tiers"].items()},
            tuple(content["warnings"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunError(f"{path} is not a tier map: {type(error).__name__} {error}. {remedy}") from None
    if content.get("sha256") != tier_map.sha256:
        raise RunError(f"{path} was changed by hand; to choose tiers yourself, use tiers.strategy manual. {remedy}")
    if tier_map.update_every != tiers.update_every or tier_map.strategy != tiers.strategy:
        raise RunError(
            f"{path} was made with strategy {tier_map.strategy} and periods {list(tier_map.update_every)}; the "
            f"configuration says {tiers.strategy} and {list(tiers.update_every)}. {remedy}"
        )
    if set(tier_map.tier_of) != {p.name for p in parameters}:
        differing = sorted(set(tier_map.tier_of) ^ {p.name for p in parameters})
        raise RunError(f"{path} is for other parameters: {len(differing)} differ, first {differing[0]}. {remedy}")
    if not set(tier_map.tier_of.values()) <= set(range(len(tiers.update_every))):
        raise RunError(f"{path} names a tier outside 0 to {len(tiers.update_every) - 1}. {remedy}")
    return tier_map
