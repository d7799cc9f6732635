"""Every strategy, policy and number of tiers: each part of each matrix moves at the multiples of its period, only."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nestune.backends.factory import make_backend
from nestune.tiers.schedule import TierSchedule
from nestune.tiers.strategies import STRATEGIES
from tests.contract.conftest import configuration, random_batch, tier_map_for
from tests.contract.reference import part_of

STEPS = 40
# With four tiers there are steps at which nothing is due, and periods that do not divide each other.
PERIODS = {2: [1, 3], 3: [1, 2, 4], 4: [2, 3, 7, 16]}
LORA = {"rank": 4, "targets": ["q_proj", "v_proj", "up_proj", "down_proj"]}


def tiers_block(strategy: str, policy: str, n_tiers: int) -> dict[str, Any]:
    block: dict[str, Any] = {
        "strategy": strategy,
        "inactive_gradients": policy,
        "update_every": PERIODS[n_tiers],
    }
    if strategy == "manual":
        slowest = n_tiers - 1
        by_layer = {f"layers.{tier - 1}.*": tier for tier in range(1, n_tiers)}
        block["assignments"] = {"*.v_proj.lora_a": slowest, **by_layer, "*": 0}
    return block


@pytest.mark.parametrize("n_tiers", PERIODS)
@pytest.mark.parametrize("policy", ["drop", "accumulate"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_each_part_moves_exactly_at_the_steps_of_its_one_tier(
    backend_name: str, small_base: Path, strategy: str, policy: str, n_tiers: int
) -> None:
    config = configuration(backend_name, base=small_base, lora=LORA, tiers=tiers_block(strategy, policy, n_tiers))
    backend = make_backend(config)
    tier_map = tier_map_for(backend, config.tiers)
    backend.prepare_training(tier_map.tier_of)
    # One step of all tiers moves every B away from zero, so that every A has a gradient; then training starts anew.
    backend.train_step([random_batch(0)], frozenset(range(n_tiers)), 1e-2)
    backend.prepare_training(tier_map.tier_of)

    schedule = TierSchedule(tier_map.update_every)
    states = [backend.weights()]
    for step in range(1, STEPS + 1):
        backend.train_step([random_batch(step, rows=2)], schedule.due(step), 1e-3)
        states.append(backend.weights())
    moved = {
        name: [
            step
            for step, (before, after) in enumerate(pairwise(states), start=1)
            if part_of(before, name).tobytes() != part_of(after, name).tobytes()
        ]
        for name in tier_map.tier_of
    }

    periods: list[int | None] = [*PERIODS[n_tiers]]
    if strategy == "frozen_slow":
        periods[-1] = None
    steps_of = [[] if period is None else list(range(period, STEPS + 1, period)) for period in periods]
    assert moved == {name: steps_of[tier] for name, tier in tier_map.tier_of.items()}
    assert [len(steps) for steps in steps_of] == [STEPS // period if period else 0 for period in periods]
    assert set(tier_map.tier_of.values()) == set(range(n_tiers))
    named = {name: np.zeros(array.shape, int) for name, array in states[0].items()}
    for name in tier_map.tier_of:
        part_of(named, name)[...] += 1
    assert all((times == 1).all() for times in named.values())
