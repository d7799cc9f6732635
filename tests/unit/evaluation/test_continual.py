"""The metrics of a sequence, against values computed by hand and rules that hold for every matrix."""

import json
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from nestune.errors import RunError
from nestune.evaluation.continual import Lineage, estimate_metrics, lineage_report, metrics_of
from nestune.evaluation.continual_page import heatmap, render_page
from nestune.evaluation.scores import Outcomes, Score

# Three tasks: rows are the base, then after each task.
HAND_MADE = np.array(
    [
        [0.1, 0.2, 0.0],
        [0.9, 0.3, 0.1],
        [0.6, 0.8, 0.2],
        [0.7, 0.5, 1.0],
    ]
)
JOINT = np.array([0.95, 0.9, 0.9])
GENERAL = np.array([[1.0, 0.8], [0.9, 0.8], [0.9, 0.7], [0.8, 0.6]])


def test_a_hand_made_matrix_has_the_metrics_computed_by_hand() -> None:
    found = metrics_of(HAND_MADE, JOINT, GENERAL)
    assert {name: float(value) for name, value in found.items()} == {
        "average_accuracy": pytest.approx((0.7 + 0.5 + 1.0) / 3),
        "backward_transfer": pytest.approx(((0.7 - 0.9) + (0.5 - 0.8)) / 2),
        "forward_transfer": pytest.approx(((0.3 - 0.2) + (0.2 - 0.0)) / 2),
        # Of task 1 the best before the last task was 0.9, of task 2 0.8.
        "forgetting": pytest.approx(((0.9 - 0.7) + (0.8 - 0.5)) / 2),
        "intransigence": pytest.approx(((0.95 - 0.9) + (0.9 - 0.8) + (0.9 - 1.0)) / 3),
        "general_delta": pytest.approx(((0.8 - 1.0) + (0.6 - 0.8)) / 2),
    }
    by_chance = metrics_of(HAND_MADE, untrained=np.array([0.0, 0.05, 0.05]))
    assert float(by_chance["forward_transfer"]) == pytest.approx(((0.3 - 0.05) + (0.2 - 0.05)) / 2)


def test_forgetting_looks_for_the_best_score_that_was_ever_reached() -> None:
    """Task 1 was best after task 2: 0.9, not the 0.5 right after it; so forgetting is not minus the transfer."""
    scores = np.array([[0.0, 0.0, 0.0], [0.5, 0.0, 0.0], [0.9, 0.5, 0.0], [0.6, 0.5, 0.5]])
    found = metrics_of(scores)
    assert float(found["forgetting"]) == pytest.approx(((0.9 - 0.6) + 0) / 2)
    assert float(found["backward_transfer"]) == pytest.approx(((0.6 - 0.5) + 0) / 2)


def test_a_task_that_ends_better_than_it_ever_was_is_forgotten_by_less_than_nothing() -> None:
    """The maximum is over what was before the last task (Chaudhry et al.), so it may be below the end."""
    scores = np.array([[0.0, 0.0], [0.5, 0.0], [0.8, 0.5]])
    assert float(metrics_of(scores)["forgetting"]) == pytest.approx(0.5 - 0.8)


def test_of_one_task_there_is_no_transfer() -> None:
    assert list(metrics_of(np.array([[0.1], [0.8]]))) == ["average_accuracy"]


matrices = st.integers(2, 5).flatmap(lambda tasks: arrays(np.float64, (tasks + 1, tasks), elements=st.floats(0, 1)))


@given(matrices)
def test_forgetting_is_at_least_what_the_transfer_back_lost(scores: np.ndarray) -> None:
    found = metrics_of(scores)
    assert float(found["forgetting"]) >= -float(found["backward_transfer"]) - 1e-12
    assert all(-1 <= float(value) <= 1 for value in found.values())


@given(matrices)
def test_a_model_that_never_changes_transfers_and_forgets_nothing(scores: np.ndarray) -> None:
    still = np.repeat(scores[:1], len(scores), axis=0)
    found = metrics_of(still)
    assert float(found["average_accuracy"]) == pytest.approx(scores[0].mean())
    assert all(float(found[name]) == 0 for name in ("backward_transfer", "forward_transfer", "forgetting"))


@given(matrices, st.floats(-1, 1))
def test_differences_do_not_see_a_constant(scores: np.ndarray, constant: float) -> None:
    before, after = metrics_of(scores, scores[-1]), metrics_of(scores + constant, scores[-1] + constant)
    for name, value in before.items():
        expected = float(value) + (constant if name == "average_accuracy" else 0)
        assert float(after[name]) == pytest.approx(expected, abs=1e-9)


@given(matrices, matrices)
def test_many_matrices_at_once_are_each_alone(one: np.ndarray, other: np.ndarray) -> None:
    if one.shape == other.shape:
        together = metrics_of(np.stack([one, other]))
        for name, values in together.items():
            assert values.tolist() == [float(metrics_of(scores)[name]) for scores in (one, other)]


def answered(right: int, rows: int = 100) -> Score:
    outcomes = Outcomes.of_answers([True] * right + [False] * (rows - right))
    return Score(1.0, 4 * rows, right / rows, rows, outcomes=outcomes)


def prose(nats: float) -> Score:
    amounts = tuple(nats * (1 + 0.2 * (place % 5 - 2)) for place in range(50))
    return Score(sum(amounts) / 50, 50, None, 0, outcomes=Outcomes(amounts, (1,) * 50))


def hand_made(joint: bool = True, general: bool = True) -> Lineage:
    tasks, sets = ("facts", "style", "skill"), ("covered", "words") if general else ()
    after = tuple(
        {name: answered(round(100 * value)) for name, value in zip((*tasks, *sets), (*row, *more), strict=False)}
        for row, more in zip(HAND_MADE, GENERAL, strict=True)
    )
    return Lineage(tasks, sets, after, dict(zip(tasks, map(answered, (95, 90, 90)), strict=True)) if joint else None)


def test_estimates_are_the_metrics_of_the_scores_within_their_intervals() -> None:
    found = estimate_metrics([hand_made()])
    for name, expected in metrics_of(HAND_MADE, JOINT, GENERAL).items():
        estimate = found[name]
        assert estimate.value == pytest.approx(float(expected))
        assert estimate.interval is not None
        assert estimate.interval.low < estimate.value < estimate.interval.high


def test_the_interval_of_the_average_is_that_of_independent_rows() -> None:
    """The standard error of a mean of three rates on 100 rows each; 1.96 of them on each side."""
    interval = estimate_metrics([hand_made()])["average_accuracy"].interval
    assert interval is not None
    error = np.sqrt(sum(p * (1 - p) / 100 for p in HAND_MADE[-1])) / 3
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * error, rel=0.08)


def test_of_several_seeds_the_metrics_are_averaged_and_their_differences_widen_the_interval() -> None:
    one = hand_made(joint=False)
    other = replace(one, after=(*one.after[:-1], {name: answered(20) for name in one.after[-1]}))
    alone, both = estimate_metrics([one]), estimate_metrics([one, other])
    name = "average_accuracy"
    assert both[name].value == pytest.approx((HAND_MADE[-1].mean() + 0.2) / 2)
    narrow, wide = alone[name].interval, both[name].interval
    assert narrow is not None
    assert wide is not None
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)
    with pytest.raises(ValueError, match="must have the same"):
        estimate_metrics([one, hand_made(joint=True)])


def test_where_a_task_has_no_answers_losses_are_compared_and_told_as_losses() -> None:
    tasks = ("facts", "prose")
    after = tuple({"facts": answered(90), "prose": prose(nats)} for nats in (3.0, 2.0, 1.0))
    mixed = Lineage(tasks, (), after)
    report = lineage_report(mixed)
    assert report["tasks"]["measure"] == "loss"
    assert [row[1]["value"] for row in report["tasks"]["scores"]] == pytest.approx([3.0, 2.0, 1.0])
    assert report["metrics"]["average_accuracy"]["value"] == pytest.approx(-(1.0 + 1.0) / 2)
    assert report["metrics"]["average_accuracy"]["interval"] is None  # of facts only the sum of the loss is known
    fell = Lineage(("one", "two"), (), tuple({"one": prose(n), "two": prose(n)} for n in (3.0, 2.0, 1.0)))
    transfer = estimate_metrics([fell])["backward_transfer"]
    assert transfer.value == pytest.approx(1.0)
    assert transfer.interval is not None


def test_the_report_is_json_and_holds_the_matrix() -> None:
    report = json.loads(json.dumps(lineage_report(hand_made()), allow_nan=False))
    assert [[cell["value"] for cell in row] for row in report["tasks"]["scores"]] == HAND_MADE.tolist()
    assert [cell["value"] for cell in report["tasks"]["joint"]] == JOINT.tolist()
    assert [[cell["value"] for cell in row] for row in report["general"]["scores"]] == GENERAL.tolist()
    assert report == lineage_report(hand_made())
    low, high = report["tasks"]["scores"][1][0]["interval"]
    assert low < 0.9 < high


def test_a_matrix_with_a_hole_is_refused_with_every_hole_named() -> None:
    whole = hand_made()
    with_holes = [dict(scores) for scores in whole.after]
    del with_holes[0]["skill"], with_holes[2]["covered"]
    with pytest.raises(RunError, match="no score on skill after task 0, no score on covered after task 2"):
        replace(whole, after=tuple(with_holes))
    with pytest.raises(RunError, match=r"need 4 models.*there is: 3 models"):
        replace(whole, after=whole.after[:3])


def page_of(lineage: Lineage) -> tuple[dict[str, Any], bytes, str]:
    facts = {"name": "facts", "adapter_sha256": "a" * 64, "dataset_sha256": "d" * 64}
    report = {"name": "<b>", "base": {"reference": "base", "sha256": "b" * 64}, "lineage": [facts]}
    report |= lineage_report(lineage)
    image = heatmap(report)
    return report, image, render_page(report, image)


def test_the_page_shows_every_metric_and_score_and_loads_nothing() -> None:
    report, image, page = page_of(hand_made())
    assert image.startswith(b"\x89PNG\r\n\x1a\n")
    assert image == heatmap(report)
    assert page == render_page(report, image)
    rows = re.findall(r'<th scope="row">(.*?)</th>', page)
    scores = ["before", "after facts", "after style", "after skill"]
    assert rows == [
        *("average", "backward transfer", "forward transfer", "forgetting", "intransigence", "general delta"),
        *(*scores, "all tasks at once"),
        *scores,
    ]
    assert '<td class="number">−0.250<span class="small">[−0.3' in page  # the backward transfer
    assert "&lt;b&gt;" in page
    addresses = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')\s>]+)""", page)
    assert len(addresses) == 1
    assert addresses[0].startswith("data:image/png;base64,")


def test_one_task_alone_and_losses_that_are_not_finite_can_be_drawn() -> None:
    _, image, page = page_of(Lineage(("prose",), (), ({"prose": prose(2.0)}, {"prose": prose(float("nan"))})))
    assert image.startswith(b"\x89PNG")
    assert '<td class="number">–<span' in page
