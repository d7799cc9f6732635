"""What the logit check lets pass, on models that give two tokens fixed probabilities."""

from collections.abc import Sequence
from math import log
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from nestune.errors import RunError
from nestune.export.check import Logits, Reference, check_logits

ROWS = [[0, 1, 1], [1, 0]]


def model(first: float, second: float, *more: float) -> Logits:
    """Logits, up to a constant that softmax ignores, of these probabilities after any token."""

    def logits(tokens: Sequence[int]) -> NDArray[Any]:
        return np.tile(np.log([first, second, *more]) + 3, (len(tokens), 1)).astype(np.float32)

    return logits


def reference(adapted: float, untouched: float) -> Reference:
    """The first token's probability with the adapter, and without."""

    def rows(first: float) -> list[NDArray[np.float64]]:
        return [np.tile(np.log([first, 1 - first]), (len(row), 1)) for row in ROWS]

    return Reference(ROWS, rows(adapted), rows(untouched))


def test_the_figures_are_the_largest_differences_of_log_probabilities() -> None:
    check = check_logits(model(0.49, 0.51), reference(adapted=0.5, untouched=0.25), "bfloat16", "")
    assert check.deviation == pytest.approx(log(0.5 / 0.49), rel=1e-4)
    assert check.effect == pytest.approx(log(0.5 / 0.25))
    assert check.allowed == pytest.approx(0.1 * log(2))
    assert check.tokens == 5


@pytest.mark.parametrize(
    ("rounded_to", "allowed"), [(None, 1e-4), ("float32", 1e-3 * log(2)), ("bfloat16", 0.1 * log(2))]
)
def test_more_than_what_is_allowed_is_refused(rounded_to: str | None, allowed: float) -> None:
    within, beyond = 0.5 * np.exp(-0.9 * allowed), 0.5 * np.exp(-1.1 * allowed)
    to_match = reference(adapted=0.5, untouched=0.25)
    assert check_logits(model(within, 1 - within), to_match, rounded_to, "").deviation < allowed
    with pytest.raises(RunError, match=r"(?s)something else than the adapter.*effect is 0\.69.*Take care"):
        check_logits(model(beyond, 1 - beyond), to_match, rounded_to, "Take care.")


def test_an_adapter_that_changes_next_to_nothing_may_be_rounded_away() -> None:
    assert check_logits(model(0.5, 0.5), reference(adapted=0.50001, untouched=0.5), "bfloat16", "").allowed == 1e-4


@pytest.mark.parametrize("broken", [model(float("nan"), 0.5), model(0.5, 0.25, 0.25)], ids=["NaN", "more tokens"])
def test_what_cannot_be_compared_is_refused(broken: Logits) -> None:
    with pytest.raises(RunError, match="something else"):
        check_logits(broken, reference(adapted=0.5, untouched=0.01), "bfloat16", "")


def test_nan_in_one_row_is_not_hidden_by_the_others() -> None:
    def broken(tokens: Sequence[int]) -> NDArray[Any]:
        return model(0.5, 0.5)(tokens) * (1 if len(tokens) == 3 else np.nan)

    with pytest.raises(RunError, match="by up to nan nats"):
        check_logits(broken, reference(adapted=0.5, untouched=0.25), None, "")
