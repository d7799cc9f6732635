"""The block `tiers`: which parameters move how often, and how importances are measured."""

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from nestune.config.fields import NonNegativeInt, PositiveFloat, PositiveInt, Strict


class ImportanceConfig(Strict):
    """The pass before training that strategy parameter_importance needs: it measures gradients and changes nothing."""

    steps: PositiveInt = Field(100, description="training steps whose gradients are measured")
    measure: Literal["gradient", "squared_gradient", "taylor"] = Field(
        "gradient",
        description="gradient: mean |g|; squared_gradient: mean g^2, the diagonal of the Fisher information; "
        "taylor: mean |w g|, which needs a parent adapter, as w g is 0 everywhere in a new one",
    )
    aggregate: Literal["parameter", "module", "layer"] = Field(
        "module",
        description="what is ranked as one: each matrix; A and B of a module; all modules of a layer",
    )
    reversed: bool = Field(False, description="true: the most important is slow, not fast")


class TierConfig(Strict):
    """Which LoRA parameters form a tier and how often each tier moves; tier 0 is the fastest."""

    strategy: Literal[
        "layer_depth",
        "layer_depth_reversed",
        "parameter_importance",
        "module_type",
        "stacked",
        "manual",
        "random",
        "frozen_slow",
    ] = Field(
        "layer_depth_reversed",
        description="layer_depth: shallow layers fast; layer_depth_reversed: deep layers fast; "
        "parameter_importance: what has large gradients fast; module_type: attention fast, MLP slow; "
        "stacked: every matrix's rank divided among the tiers; manual: by the patterns in assignments; "
        "controls: random, and frozen_slow: deep layers fast, and the slowest tier never moves",
    )
    update_every: tuple[PositiveInt, ...] = Field(
        (1, 1, 1),
        min_length=1,
        max_length=8,
        description="steps between two updates of each tier, ascending; all 1: plain LoRA, which learns in the fewest "
        "steps; deep layers fast with [1, 2, 4]: a step costs 0.8 of that, learning takes twice the steps or more and "
        "no more is kept; shallow layers fast: less is kept (docs/retention.md)",
    )
    inactive_gradients: Literal["drop", "accumulate"] = Field(
        "drop",
        description="drop: a tier sees only the gradient of its own step, which saves the backward pass; "
        "accumulate: the mean over the steps since its last update, which needs every gradient at every step",
    )
    lr_scale: Literal["equal", "inverse_period"] | tuple[PositiveFloat, ...] = Field(
        "equal", description="factor on the learning rate for each tier; inverse_period: 1 / update_every"
    )
    assignments: dict[str, NonNegativeInt] = Field(
        default_factory=dict,
        description="for manual: pattern -> tier, e.g. {'layers.[0-3].*': 2}; the first that matches counts",
    )
    importance: ImportanceConfig = Field(ImportanceConfig(), description="for parameter_importance: how it is measured")
    seed: NonNegativeInt = Field(0, description="for random: its seed")

    @field_validator("update_every")
    @classmethod
    def _ascending(cls, periods: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
        if list(periods) != sorted(periods):
            raise ValueError(f"periods must ascend, tier 0 being the fastest; write {sorted(periods)}")
        if info.data.get("strategy") == "frozen_slow" and len(periods) == 1:
            raise ValueError("strategy frozen_slow freezes the slowest of several tiers; give at least two periods")
        return periods

    @field_validator("lr_scale")
    @classmethod
    def _one_scale_each_tier(cls, scale: object, info: ValidationInfo) -> object:
        tiers = len(info.data.get("update_every", ()))
        if isinstance(scale, tuple) and tiers and len(scale) != tiers:
            raise ValueError(f"{len(scale)} factors for {tiers} tiers; give one for each entry of update_every")
        return scale

    @field_validator("assignments", "importance", "seed")
    @classmethod
    def _only_where_it_counts(cls, value: object, info: ValidationInfo) -> object:
        reader = {"assignments": "manual", "importance": "parameter_importance", "seed": "random"}[str(info.field_name)]
        strategy = info.data.get("strategy")
        ignored = value not in ({}, ImportanceConfig(), 0)
        if ignored and strategy is not None and strategy != reader:
            raise ValueError(f"strategy {strategy} ignores this; remove it, or set tiers.strategy to {reader}")
        return value

    @field_validator("assignments")
    @classmethod
    def _in_range(cls, assignments: dict[str, int], info: ValidationInfo) -> dict[str, int]:
        tiers = len(info.data.get("update_every", ()))
        if info.data.get("strategy") == "manual" and not assignments:
            raise ValueError("strategy manual needs patterns, e.g. {'layers.[0-3].*': 2}")
        wrong = {pattern: tier for pattern, tier in assignments.items() if tiers and tier >= tiers}
        if wrong:
            raise ValueError(f"tier out of range in {wrong}; with {tiers} tiers use 0 to {tiers - 1}")
        return assignments

    @property
    def lr_scales(self) -> tuple[float, ...]:
        """The factor on the learning rate of each tier."""
        if self.lr_scale == "inverse_period":
            return tuple(1 / period for period in self.update_every)
        return tuple(1.0 for _ in self.update_every) if isinstance(self.lr_scale, str) else self.lr_scale

    @property
    def periods(self) -> tuple[int | None, ...]:
        """Steps between two updates of each tier; None for a tier that never moves."""
        return (*self.update_every[:-1], None) if self.strategy == "frozen_slow" else self.update_every
