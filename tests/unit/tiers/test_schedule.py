"""Which tiers are due when."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nestune.tiers.schedule import TierSchedule, describe_period

PERIODS = st.lists(st.one_of(st.none(), st.integers(1, 50)), min_size=1, max_size=8)


def test_tier_with_period_4_is_due_at_steps_4_8_12() -> None:
    schedule = TierSchedule((1, 2, 4))
    assert [step for step in range(1, 13) if 2 in schedule.due(step)] == [4, 8, 12]
    assert [sorted(schedule.due(step)) for step in (1, 2, 3, 4)] == [[0], [0, 1], [0], [0, 1, 2]]


@pytest.mark.parametrize(
    ("steps", "counts"),
    [(16, (16, 8, 4)), (17, (17, 8, 4)), (18, (18, 9, 4)), (20, (20, 10, 5)), (10, (10, 5, 2))],
)
def test_update_counts_are_those_of_the_published_run(steps: int, counts: tuple[int, ...]) -> None:
    assert TierSchedule((1, 2, 4)).update_counts(steps) == counts


def test_update_counts_are_those_of_the_continuum_memory_reference() -> None:
    assert TierSchedule((1, 8, 16)).update_counts(50) == (50, 6, 3)


def test_step_0_does_not_exist() -> None:
    with pytest.raises(ValueError, match="counted from 1"):
        TierSchedule((1,)).due(0)


@given(PERIODS, st.integers(1, 300))
def test_a_tier_is_due_exactly_at_the_multiples_of_its_period(periods: list[int | None], last: int) -> None:
    schedule = TierSchedule(tuple(periods))
    due = {step: schedule.due(step) for step in range(1, last + 1)}
    for tier, period in enumerate(periods):
        multiples = [] if period is None else list(range(period, last + 1, period))
        assert [step for step, tiers in due.items() if tier in tiers] == multiples
        assert schedule.update_counts(last)[tier] == len(multiples)
    assert schedule.steps_with_an_update(last) == sum(bool(tiers) for tiers in due.values())


def test_a_period_is_told_in_words() -> None:
    assert [describe_period(period) for period in (1, 8, None)] == ["every step", "every 8 steps", "never"]
