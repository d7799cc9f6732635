"""Bootstrap intervals, against distributions that are known without drawing anything."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nestune.evaluation.scores import Outcomes, Score
from nestune.evaluation.uncertainty import Interval, gain_interval, percentiles, resampled_scores, score_interval


def answered(right: list[bool]) -> Score:
    return Score(1.0, 4 * len(right), sum(right) / len(right), len(right), outcomes=Outcomes.of_answers(right))


def text(nats: list[float], tokens: list[int]) -> Score:
    return Score(sum(nats) / sum(tokens), sum(tokens), None, 0, outcomes=Outcomes(tuple(nats), tuple(tokens)))


def binomial_quantile(probability: float, n: int, p: float) -> int:
    """The least k with P(Binomial(n, p) <= k) >= probability."""
    total = 0.0
    for k in range(n + 1):
        total += math.comb(n, k) * p**k * (1 - p) ** (n - k)
        if total >= probability:
            return k
    return n


@given(n=st.integers(5, 200), share=st.floats(0, 1), confidence=st.sampled_from([0.8, 0.95]))
def test_the_interval_of_an_exact_match_is_that_of_the_binomial_distribution(
    n: int, share: float, confidence: float
) -> None:
    """Drawing rows that are right or wrong, with replacement, makes a binomial count; so few draws may be one off."""
    right = round(share * n)
    interval = score_interval(answered([True] * right + [False] * (n - right)), confidence)
    assert interval is not None
    tail = (1 - confidence) / 2
    spread = math.sqrt(right * (n - right) / n)
    slack = (1 + 0.15 * spread) / n  # the quantiles are themselves drawn, 4000 times
    assert interval.low == pytest.approx(binomial_quantile(tail, n, right / n) / n, abs=slack)
    assert interval.high == pytest.approx(binomial_quantile(1 - tail, n, right / n) / n, abs=slack)


def test_a_gain_is_judged_on_the_same_rows_so_what_is_hard_for_both_takes_no_part() -> None:
    """5 of 100 rows gained and none lost: Binomial(100, 0.05), although each score alone is uncertain by 0.1."""
    reference = answered([True] * 50 + [False] * 50)
    interval = gain_interval(answered([True] * 55 + [False] * 45), reference)
    assert interval is not None
    assert (interval.low, interval.high) == (
        pytest.approx(binomial_quantile(0.025, 100, 0.05) / 100, abs=0.011),
        pytest.approx(binomial_quantile(0.975, 100, 0.05) / 100, abs=0.011),
    )
    # The same gain by 30 rows gained and 25 lost is within noise.
    mixed = gain_interval(answered([True] * 25 + [False] * 25 + [True] * 30 + [False] * 20), reference)
    assert mixed is not None
    assert mixed.low < 0 < mixed.high


def test_drawing_kinds_of_rows_is_drawing_rows() -> None:
    """Against the plain procedure: row numbers with replacement, one draw after the other."""
    random = np.random.default_rng(1)
    nats, tokens = random.gamma(2.0, 8.0, size=40), random.integers(1, 30, size=40)
    numbers = random.integers(0, 40, size=(20_000, 40))
    plain = nats[numbers].sum(axis=1) / tokens[numbers].sum(axis=1)
    interval = score_interval(text(nats.tolist(), tokens.tolist()))
    assert interval is not None
    spread = float(plain.std())
    for tail, seen in ((0.025, interval.low), (0.975, interval.high)):
        assert seen == pytest.approx(float(np.quantile(plain, tail)), abs=0.15 * spread)


def test_a_loss_that_fell_alike_on_every_token_has_a_gain_without_width() -> None:
    tokens = [3, 5, 9, 1]
    before, after = text([2.0 * n for n in tokens], tokens), text([1.5 * n for n in tokens], tokens)
    interval = gain_interval(after, before)
    assert interval is not None
    assert (interval.low, interval.high) == (pytest.approx(0.5), pytest.approx(0.5))


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_a_gain_seen_from_the_other_side_is_a_loss(rows: list[tuple[bool, bool]]) -> None:
    one, other = (answered([row[place] for row in rows]) for place in (0, 1))
    there, back = gain_interval(one, other), gain_interval(other, one)
    assert there is not None
    assert back is not None
    # The kinds of rows come in another order, so other draws are made: equal but for what a draw may differ.
    assert there.low == pytest.approx((-back).low, abs=0.25)
    assert there.high == pytest.approx((-back).high, abs=0.25)
    assert -1 <= there.low <= there.high <= 1


def test_the_same_rows_give_the_same_interval_and_a_model_no_gain_over_itself() -> None:
    score = answered([True, False, True, True, False])
    assert score_interval(score) == score_interval(score)
    assert gain_interval(score, score) == Interval(0.0, 0.0)


def test_scores_without_rows_or_with_a_loss_that_is_no_number_have_no_interval() -> None:
    known = text([1.0, 2.0], [1, 1])
    assert score_interval(replace(known, outcomes=None)) is None
    assert gain_interval(known, replace(known, outcomes=None)) is None
    assert gain_interval(known, text([1.0, math.inf], [1, 1])) is None


def test_outcomes_of_other_rows_are_not_compared() -> None:
    with pytest.raises(ValueError, match="different rows"):
        resampled_scores([Outcomes((1.0, 2.0), (1, 2)), Outcomes((1.0, 2.0), (2, 1))])


def test_percentiles_leave_out_the_same_share_at_both_ends() -> None:
    assert percentiles(np.arange(101, dtype=np.float64), 0.9) == Interval(pytest.approx(5.0), pytest.approx(95.0))
