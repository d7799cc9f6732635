"""Stage tiers: divide the LoRA parameters among the tiers and write the map down."""

from dataclasses import dataclass, replace
from typing import Any

from nestune.backends.factory import make_backend
from nestune.config import RunConfig
from nestune.runs import RunPaths, record_stage, write_bytes
from nestune.tiers.picture import plot_tier_map
from nestune.tiers.tier_map import TierMap, assign_tiers, write_tier_map


@dataclass(frozen=True)
class AssignResult:
    """The map that training will follow."""

    tier_map: TierMap

    def as_dict(self) -> dict[str, Any]:
        """The result as JSON, without the map itself."""
        content = self.tier_map.as_dict()
        del content["tiers"]
        return content

    def summary(self) -> list[str]:
        """The result for a person."""
        tiers = [
            f"tier {tier}: {len(self.tier_map.members(tier))} matrices, every {period} step(s)"
            for tier, period in enumerate(self.tier_map.update_every)
        ]
        return [f"strategy: {self.tier_map.strategy}", *tiers, *(f"warning: {w}" for w in self.tier_map.warnings)]


def assign(config: RunConfig, run: RunPaths) -> AssignResult:
    """Write `tiers.json` and a picture of it. Raises ConfigError when a tier would be empty."""
    parameters = make_backend(config).lora_parameters()
    tier_map = assign_tiers(parameters, config.tiers)
    never = [
        f"tier {k} never moves: its period {period} is longer than the {config.training.steps} steps"
        for k, period in enumerate(config.tiers.update_every)
        if period > config.training.steps
    ]
    tier_map = replace(tier_map, warnings=(*tier_map.warnings, *never))
    write_tier_map(tier_map, run.tiers)
    write_bytes(run.tiers_picture, plot_tier_map(parameters, tier_map))
    record_stage(run, "tiers", [run.config], [run.tiers, run.tiers_picture])
    return AssignResult(tier_map)
