"""The pictures: valid PNG files, the same bytes for the same numbers, and drawn for every shape of input."""

import struct
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nestune.config import GateConfig
from nestune.evaluation.history import History
from nestune.evaluation.plots import loss_curves, loss_limits, retention_bars, tier_updates
from nestune.evaluation.scores import Score, Scores


def history(n_steps: int, update_every: Sequence[int] = (1, 2, 4)) -> History:
    """A run whose loss falls as 3 / step, validated at its end, with the due tiers of `update_every`."""
    steps = tuple(range(1, n_steps + 1))
    return History(
        steps=steps,
        loss=tuple(3 / step for step in steps),
        due=tuple(frozenset(k for k, every in enumerate(update_every) if step % every == 0) for step in steps),
        update_counts=tuple(tuple(step // every for every in update_every) for step in steps),
        valid_steps=(n_steps,),
        valid_loss=(3 / n_steps,),
    )


def scores(*models: str) -> Scores:
    answered, text = Score(1.0, 400, 0.5, 200), Score(2.0, 400, None, 0)
    return {model: {"new_task": answered, "general": answered, "prose": text} for model in models}


def chunks(png: bytes) -> list[bytes]:
    """The kinds of the chunks of a PNG file, in order (PNG specification, section 5)."""
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    kinds, place = [], 8
    while place < len(png):
        (length,) = struct.unpack(">I", png[place : place + 4])
        kinds.append(png[place + 4 : place + 8])
        place += 12 + length
    return kinds


THREE = ("base", "parent", "candidate")


def test_pictures_hold_no_time_and_no_software_version() -> None:
    for png in (
        loss_curves(history(20)),
        tier_updates(history(20), (1, 2, 4)),
        retention_bars(scores(*THREE), GateConfig()),
    ):
        assert set(chunks(png)) <= {b"IHDR", b"pHYs", b"IDAT", b"IEND"}


def test_equal_numbers_give_equal_bytes_and_other_numbers_others() -> None:
    assert loss_curves(history(20)) == loss_curves(history(20)) != loss_curves(history(21))
    slower = tier_updates(history(20, (1, 2, 8)), (1, 2, 8))
    assert tier_updates(history(20), (1, 2, 4)) == tier_updates(history(20), (1, 2, 4)) != slower
    gate = GateConfig()
    assert retention_bars(scores(*THREE), gate) == retention_bars(scores(*THREE), gate)
    assert retention_bars(scores(*THREE), gate) != retention_bars(scores(*THREE), GateConfig(max_drop=0.2))


@pytest.mark.parametrize("n_steps", [1, 2, 20, 1000])
@pytest.mark.parametrize("update_every", [(1,), (1, 1, 1), (1, 8, 64), (1, 2, 4, 8, 16, 32, 64, 128)])
def test_runs_of_any_length_and_number_of_tiers_are_drawn(n_steps: int, update_every: tuple[int, ...]) -> None:
    assert chunks(tier_updates(history(n_steps, update_every), update_every))[-1] == b"IEND"


def test_a_single_step_has_loss_curves() -> None:
    assert chunks(loss_curves(history(1)))[-1] == b"IEND"


@given(st.lists(st.floats(0, 100), min_size=1))
def test_every_loss_is_inside_the_limits_of_its_axis(losses: list[float]) -> None:
    low, high = loss_limits(losses)
    assert low <= min(losses) <= max(losses) < high


def test_a_loss_that_hardly_moves_fills_its_axis_and_one_that_falls_by_half_starts_at_zero() -> None:
    low, high = loss_limits([11.0, 11.3, 10.7])
    assert high - low < 2 * (11.3 - 10.7)
    assert loss_limits([4.0, 2.0])[0] == 0
    assert loss_limits([4.0, 2.1])[0] > 0


def test_losses_that_are_not_finite_do_not_move_the_limits() -> None:
    nan, inf = float("nan"), float("inf")
    assert loss_limits([nan, 3.0, inf, 1.0]) == loss_limits([3.0, 1.0])
    low, high = loss_limits([nan])
    assert low < high


def test_a_loss_that_is_not_finite_can_be_drawn() -> None:
    broken = {name: replace(score, loss=float("nan")) for name, score in scores("candidate")["candidate"].items()}
    assert chunks(retention_bars({**scores("base", "parent"), "candidate": broken}, GateConfig()))[-1] == b"IEND"
