"""Learning rate, best loss and early stopping, against their formulas."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nestune.config import EarlyStopping, TrainingConfig, parse_config
from nestune.training.best_loss import BestLoss
from nestune.training.learning_rate import learning_rate


def test_warm_up_is_system_a_s_rule() -> None:
    training = TrainingConfig(learning_rate=1e-5, warmup_steps=100, steps=20)
    # System A counts from 0: lr * (step + 1) / warmup_steps.
    assert [learning_rate(t, training) for t in (1, 2, 20)] == [1e-5 * (t0 + 1) / 100 for t0 in (0, 1, 19)]


def test_constant_stays_at_the_learning_rate_after_warm_up() -> None:
    training = TrainingConfig(learning_rate=0.5, warmup_steps=4, steps=20, schedule="constant")
    assert [learning_rate(t, training) for t in range(4, 21)] == [0.5] * 17


def test_cosine_starts_at_the_learning_rate_and_is_half_of_it_in_the_middle() -> None:
    training = TrainingConfig(learning_rate=1.0, warmup_steps=10, steps=110)
    assert learning_rate(11, training) == 1.0
    assert learning_rate(61, training) == pytest.approx(0.5)
    assert learning_rate(110, training) == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.99)))


@given(steps=st.integers(1, 200), warmup=st.integers(0, 250), schedule=st.sampled_from(["constant", "cosine"]))
def test_learning_rate_is_positive_and_never_above_the_configured(steps: int, warmup: int, schedule: str) -> None:
    training = TrainingConfig(learning_rate=0.5, warmup_steps=warmup, steps=steps, schedule=schedule)  # type: ignore[arg-type]
    assert all(0 < learning_rate(t, training) <= 0.5 for t in range(1, steps + 1))


def test_best_is_the_lowest_loss_so_far() -> None:
    best = BestLoss(None)
    assert [best.update(step, loss) for step, loss in enumerate((3.0, 2.0, 2.5, 2.0, 1.9), start=1)] == [
        *(True, True, False, False),
        True,
    ]
    assert (best.loss, best.best_step, best.validated_step) == (1.9, 5, 5)
    assert not best.should_stop


def test_training_stops_after_patience_validations_without_improvement() -> None:
    best = BestLoss(EarlyStopping(patience=2, min_delta=0.1))
    stops = []
    for step, loss in enumerate((3.0, 2.0, 1.95, 1.94)):  # the last two fall by less than min_delta below 2.0
        best.update(step, loss)
        stops.append(best.should_stop)
    assert stops == [False, False, False, True]
    assert best.loss == 1.94


def test_small_improvements_that_add_up_to_min_delta_keep_training_alive() -> None:
    best = BestLoss(EarlyStopping(patience=2, min_delta=0.1))
    for step, loss in enumerate((2.0, 1.95, 1.89, 1.85, 1.78)):
        best.update(step, loss)
        assert not best.should_stop


def test_what_was_validated_before_it_counts_is_neither_the_best_nor_a_lack_of_improvement() -> None:
    best = BestLoss(EarlyStopping(patience=1, min_delta=0.1), counts_from=30)
    assert [best.update(step, loss) for step, loss in ((10, 1.0), (20, 5.0), (30, 3.0))] == [False, False, True]
    assert (best.loss, best.best_step, best.validated_step) == (3.0, 30, 30)
    assert not best.should_stop
    assert not best.update(40, 3.0)
    assert best.should_stop


@pytest.mark.parametrize(
    ("kl", "counts_from"),
    [
        (None, 0),
        ({"after": 0.0}, 0),
        ({"after": 0.3}, 60),
        ({"after": 0.7}, 100),
        ({"after": 0.7, "weight": 0}, 0),
    ],
)
def test_a_checkpoint_counts_once_it_was_held_for_as_long_as_it_was_free(
    kl: dict[str, float] | None, counts_from: int, tmp_path: Path
) -> None:
    blocks = {"training": {"steps": 100, "eval_every": 1}, "retention": {"recipe": "none", "kl": kl}}
    best = BestLoss.of(parse_config({"name": "a", "model": {"base": "b"}, "data": {"train": str(tmp_path)}} | blocks))
    assert [best.update(step, 1.0 / step) for step in range(1, 101)] == [step >= counts_from for step in range(1, 101)]


@given(
    losses=st.lists(st.floats(0, 10), max_size=12),
    split=st.integers(0, 12),
    stopping=st.none() | st.builds(EarlyStopping, patience=st.integers(1, 3), min_delta=st.floats(0, 1)),
)
def test_what_is_restored_from_json_judges_every_further_loss_as_if_it_had_seen_all(
    losses: list[float], split: int, stopping: EarlyStopping | None
) -> None:
    whole, first, second = BestLoss(stopping), BestLoss(stopping), BestLoss(stopping)
    for step, loss in enumerate(losses[:split], start=1):
        whole.update(step, loss)
        first.update(step, loss)
    second.restore({"step": 3, **json.loads(json.dumps(first.state(), allow_nan=False))})
    assert second.state() == whole.state()
    for step, loss in enumerate(losses[split:], start=split + 1):
        assert second.update(step, loss) == whole.update(step, loss)
        assert (second.state(), second.should_stop) == (whole.state(), whole.should_stop)
