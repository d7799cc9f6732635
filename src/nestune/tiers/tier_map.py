"""The tier map: every trainable matrix, or some ranks of one, on one tier; checked, and kept as a JSON file."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import pydantic
from pydantic import ConfigDict, Field, ValidationError

from nestune.config import TierConfig
from nestune.config.faults import explain
from nestune.errors import ConfigError, RunError
from nestune.files import read_json, write_json
from nestune.tiers.importance import Importance
from nestune.tiers.parameters import LoraParameter, model_order, split_name
from nestune.tiers.strategies import STRATEGIES

TOO_MANY_RANKS = 64
# As many as a configuration can have.
MOST_TIERS = 8


@dataclass(frozen=True)
class TierMap:
    """Every trainable matrix on exactly one tier, no tier empty; how it was made; what deserves a warning.

    A name in `tier_of` is a matrix (`layers.3.self_attn.q_proj.lora_a`) or, where its ranks are on different tiers,
    some of its ranks (`layers.3.self_attn.q_proj.lora_a[0:3]`). `update_every` has None for a tier that never moves.
    `made_from`: what else decided it, by name.
    """

    strategy: str
    update_every: tuple[int | None, ...]
    tier_of: dict[str, int]
    warnings: tuple[str, ...] = ()
    made_from: Mapping[str, Any] = field(default_factory=dict)

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
            "made_from": dict(self.made_from),
            "sha256": self.sha256,
            "tiers": self.tier_of,
        }


def assign_tiers(
    parameters: Sequence[LoraParameter], tiers: TierConfig, importance: Importance | None = None
) -> TierMap:
    """Divide the parameters among the tiers by the configured strategy.

    A parameter that the strategy leaves out goes to the slowest tier, with a warning. `importance` is needed by
    strategy parameter_importance alone. Raises ConfigError when it is missing, or a tier would be empty.
    """
    if tiers.strategy == "parameter_importance" and not importance:
        raise ConfigError(
            "tiers.strategy parameter_importance needs gradients measured on the task's data: `nestune tiers` measures "
            "them. Where there is no run, take another strategy, or the tiers.json of a run."
        )
    parameters = sorted(parameters, key=model_order)
    chosen = STRATEGIES[tiers.strategy](parameters, tiers, importance or {})
    slowest = len(tiers.update_every) - 1
    mapped = {split_name(name)[0] for name in chosen}
    unmapped = [p.name for p in parameters if p.name not in mapped]
    tier_of = {**chosen, **dict.fromkeys(unmapped, slowest)}
    fault = find_fault(tier_of, parameters)
    if fault is not None:
        raise ValueError(f"strategy {tiers.strategy} made a map in which {fault}")
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
    order = {p.name: index for index, p in enumerate(parameters)}
    in_order = sorted(tier_of.items(), key=lambda item: order[split_name(item[0])[0]])
    return TierMap(tiers.strategy, tiers.periods, dict(in_order), warnings)


def find_fault(tier_of: Mapping[str, int], parameters: Sequence[LoraParameter]) -> str | None:
    """What keeps a map from naming every rank of every matrix exactly once; None when it does."""
    ranks_of = {p.name: p.rank for p in parameters}
    seen: dict[str, list[int]] = {name: [] for name in ranks_of}
    for name in tier_of:
        matrix, ranks = split_name(name)
        if matrix not in seen:
            return f"{name:.200} is no parameter of this model"
        rank, found = ranks_of[matrix], seen[matrix]
        # A file can name more ranks than fit into memory; a few too many are enough to tell that there are.
        if len(found) <= rank:
            found += range(rank) if ranks is None else ranks[: rank + TOO_MANY_RANKS]
    for name, found in seen.items():
        if not found:
            return f"{name} is on no tier"
        if sorted(found) != list(range(ranks_of[name])):
            return f"{name} has ranks {sorted(found)} on tiers, not each of 0 to {ranks_of[name] - 1} once"
    empty = next((name for name in tier_of if split_name(name)[1] == range(0)), None)
    return None if empty is None else f"{empty} names no rank"


def write_tier_map(tier_map: TierMap, path: Path) -> None:
    """Write the map as JSON, whole or not at all."""
    write_json(path, tier_map.as_dict())


def read_tier_map(path: Path) -> TierMap:
    """The map in a file. Raises RunError when the file is missing, is no tier map, or was changed by hand."""
    remedy = "Run nestune tiers again."
    try:
        content = _TierMapFile.model_validate(read_json(path, remedy))
    except ValidationError as error:
        faults = explain(error, _TierMapFile)
        more = f" (and {len(faults) - 1} more faults)" if len(faults) > 1 else ""
        raise RunError(f"{path} is not a tier map: {faults[0]}{more} {remedy}") from None
    tier_map = TierMap(
        content.strategy,
        tuple(content.update_every),
        content.tiers,
        tuple(content.warnings),
        content.made_from,
    )
    if content.sha256 != tier_map.sha256:
        raise RunError(f"{path} was changed by hand; to choose tiers yourself, use tiers.strategy manual. {remedy}")
    if not set(tier_map.tier_of.values()) <= set(range(len(tier_map.update_every))):
        raise RunError(f"{path} names a tier outside 0 to {len(tier_map.update_every) - 1}. {remedy}")
    return tier_map


def read_fitting_tier_map(
    path: Path, parameters: Sequence[LoraParameter], tiers: TierConfig, made_from: Mapping[str, Any] | None = None
) -> TierMap:
    """The map in a file that was made for these parameters with this configuration, from `made_from`.

    Raises what `read_tier_map` raises, and RunError when it was made for other parameters, periods or strategy, or
    from something else.
    """
    remedy = "Run nestune tiers again."
    tier_map = read_tier_map(path)
    if tier_map.update_every != tiers.periods or tier_map.strategy != tiers.strategy:
        raise RunError(
            f"{path} was made with strategy {tier_map.strategy:.80} and periods {list(tier_map.update_every)}; the "
            f"configuration says {tiers.strategy} and {list(tiers.periods)}. {remedy}"
        )
    differing = _differing(tier_map.made_from, made_from or {})
    if differing:
        verb = "differs" if len(differing) == 1 else "differ"
        raise RunError(f"{path} was made from something else ({', '.join(differing):.500} {verb}). {remedy}")
    fault = find_fault(tier_map.tier_of, parameters)
    if fault is not None:
        raise RunError(f"{path} is for other parameters: {fault}. {remedy}")
    return tier_map


class _TierMapFile(pydantic.BaseModel):
    model_config = ConfigDict(strict=True)

    strategy: str
    update_every: Annotated[list[Annotated[int, Field(gt=0)] | None], Field(max_length=MOST_TIERS)]
    tiers: dict[str, Annotated[int, Field(ge=0)]]
    warnings: list[str]
    made_from: dict[str, Any]
    sha256: str


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The names whose values differ; as JSON text, since of patterns the first that matches counts."""
    return [name for name in {**one, **other} if json.dumps(one.get(name)) != json.dumps(other.get(name))]
