"""The report: complete, deterministic, and safe to open."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from nestune.base_model import BaseModel
from nestune.config import RunConfig
from nestune.evaluation.gate import decide
from nestune.evaluation.history import History
from nestune.evaluation.report import Evaluation, build_report, flat_metrics, render_html
from nestune.evaluation.scores import Example, Outcomes, Score, columns

CONFIG = RunConfig.model_validate({"name": "weekly", "model": {"base": "base"}, "data": {"train": ["new.jsonl"]}})
HISTORY = History((1, 2), (2.0, 1.0), (frozenset({0}), frozenset({0, 1})), ((1, 0, 0), (2, 1, 0)), (2,), (1.1,))
IMAGES = {"loss": b"loss", "tiers": b"tiers", "retention": b"retention"}
UNTRAINED = {"new_task": Score(3.0, 40, 0.0, 10), "general": Score(0.1, 80, 1.0, 20), "prose": Score(1.0, 99, None, 0)}


def evaluation(candidate: dict[str, Score], champion: dict[str, Score] | None = None) -> Evaluation:
    scores = {"base": UNTRAINED, "parent": UNTRAINED}
    scores |= {"champion": champion} if champion else {}
    scores |= {"candidate": candidate}
    return Evaluation(
        config=CONFIG,
        base=BaseModel("base", None, Path("/elsewhere/base"), "b" * 64, positions=None),
        dataset_sha256="d" * 64,
        rows={"train": 90, "new_task": 10, "general": 20, "prose": 5},
        history=HISTORY,
        adapters={"base": None, "parent": None, "candidate": "c" * 64},
        candidate_step=2,
        champion_version="7" if champion else None,
        scores=scores,
        verdict=decide(scores, CONFIG.gate),
    )


LEARNED = {**UNTRAINED, "new_task": Score(0.2, 40, 0.9, 10, (Example("Who <b>?", "A & B", "<script>x</script>"),))}
FORGOT = {**LEARNED, "general": Score(2.0, 80, 0.4, 20)}


def test_the_report_is_json_and_holds_the_verdict_and_what_it_rests_on() -> None:
    report = json.loads(json.dumps(build_report(evaluation(FORGOT)), allow_nan=False))
    assert report["passed"] is False
    assert report["reason"] == "forgot: general -0.60 (allowed 0.05 below the parent)"
    assert report["champion_version"] is None
    counted = {"loss": 2.0, "tokens": 80, "exact_match": 0.4, "answers": 20}
    assert report["scores"]["candidate"]["general"] == counted | {"metric": None, "interval": None}
    assert set(report["scores"]) == {"base", "parent", "candidate"}
    assert report["base"]["sha256"] == "b" * 64
    assert report["dataset"]["sha256"] == "d" * 64
    assert report["candidate"] == {"checkpoint": "best", "step": 2, "steps": 2}
    assert report["tiers"] == {
        "strategy": "layer_depth_reversed",
        "update_every": [1, 1, 1],
        "update_counts": [2, 1, 0],
    }
    assert report["config"] == CONFIG.model_dump(mode="json")
    (check,) = [check for check in report["checks"] if not check["passed"]]
    assert (check["rule"], check["against"], check["set"], check["limit"]) == ("kept", "parent", "general", 0.05)
    assert check["seen"] == pytest.approx(0.6)


def test_the_report_names_the_champion_that_was_compared_with() -> None:
    assert build_report(evaluation(LEARNED, champion=UNTRAINED))["champion_version"] == "7"


def test_the_report_tells_nothing_of_the_machine() -> None:
    assert "/elsewhere" not in json.dumps(build_report(evaluation(FORGOT)))


def test_a_loss_that_is_not_finite_is_null_in_json() -> None:
    broken = {**LEARNED, "prose": replace(UNTRAINED["prose"], loss=float("inf"))}
    report = build_report(evaluation(broken))
    assert json.loads(json.dumps(report, allow_nan=False))["scores"]["candidate"]["prose"]["loss"] is None
    assert "score is not a finite number" in render_html(report, IMAGES)


def test_metrics_are_the_candidates_numbers_where_it_has_them() -> None:
    assert flat_metrics(build_report(evaluation(FORGOT))) == {
        "new_task": {"exact_match": 0.9, "loss": 0.2},
        "retention": {"general": {"exact_match": 0.4, "loss": 2.0}, "prose": {"loss": 1.0}},
        "gate_passed": False,
    }


@pytest.mark.parametrize("candidate", [LEARNED, FORGOT])
@pytest.mark.parametrize("champion", [None, UNTRAINED])
def test_the_page_says_the_verdict_and_every_check(
    candidate: dict[str, Score], champion: dict[str, Score] | None
) -> None:
    report = build_report(evaluation(candidate, champion))
    page = render_html(report, IMAGES).replace("&#39;", "'")
    assert report["reason"] in page
    assert all(check["sentence"] in page for check in report["checks"])
    assert ("Passed the gate" in page) is (candidate is LEARNED)
    assert ("the champion, version 7" in page) is (champion is not None)


def test_the_page_shows_intervals_where_rows_are_known() -> None:
    def told(right: list[bool]) -> Score:
        return Score(0.1, 80, sum(right) / 20, 20, outcomes=Outcomes.of_answers(right))

    before, after = told([True] * 20), told([True] * 10 + [False] * 10)
    seen = replace(evaluation(LEARNED), scores={"parent": {**UNTRAINED, "general": before}})
    scores = {"base": seen.scores["parent"], "parent": seen.scores["parent"]}
    scores |= {"candidate": {**LEARNED, "general": after}}
    report = build_report(replace(seen, scores=scores, verdict=decide(scores, CONFIG.gate)))
    low, high = report["scores"]["candidate"]["general"]["interval"]
    assert low < 0.5 < high
    (row,) = re.findall(r'<th scope="row">general<.*?</tr>', render_html(report, IMAGES), flags=re.DOTALL)
    assert "[1.000, 1.000]" in row
    assert f"[{low:.3f}, {high:.3f}]" in row
    (check,) = [check for check in report["checks"] if check["set"] == "general"]
    lost_least, lost_most = check["interval"]
    assert f"[−{lost_most:.3f}, −{lost_least:.3f}]" in row
    assert "outcomes" not in json.dumps(report)


def test_the_page_colours_a_change_by_whether_it_is_for_the_better() -> None:
    """By the measure of the set, whether or not the gate allows it."""
    changes = {
        "general": {1.0: "equal", 0.99: "worse", 0.9: "worse"},
        "prose": {1.0: "equal", 1.00001: "equal", 1.05: "worse", 0.95: "better"},
    }
    for name, directions in changes.items():
        for value, direction in directions.items():
            before = UNTRAINED[name]
            now = replace(before, loss=value) if name == "prose" else replace(before, exact_match=value)
            page = render_html(build_report(evaluation({**LEARNED, name: now})), IMAGES)
            (row,) = re.findall(rf'<th scope="row">{name}<.*?</tr>', page, flags=re.DOTALL)
            assert re.findall(r'class="number (\w+)"', row) == [direction]


def test_rows_are_counted_in_words_that_fit() -> None:
    counted = replace(evaluation(LEARNED), rows={"train": 1, "new_task": 1, "general": 2, "prose": 1})
    page = render_html(build_report(counted), IMAGES)
    assert re.findall(r"(\d rows?), by", page) == ["1 row", "2 rows", "1 row"]
    assert "train 1, new_task 1, general 2, prose 1<" in page
    assert "1 rows" not in page


def test_the_page_loads_nothing() -> None:
    page = render_html(build_report(evaluation(LEARNED)), IMAGES)
    addresses = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')\s>]+)""", page)
    assert len(addresses) == len(IMAGES)
    assert all(address.startswith("data:image/png;base64,") for address in addresses)
    assert "@import" not in page


def test_answers_of_a_model_are_shown_as_text_not_run_as_markup() -> None:
    page = render_html(build_report(evaluation(LEARNED)), IMAGES)
    assert "<script>" not in page
    assert "&lt;script&gt;x&lt;/script&gt;" in page
    assert "A &amp; B" in page


def test_equal_inputs_give_equal_reports() -> None:
    first, second = build_report(evaluation(LEARNED)), build_report(evaluation(LEARNED))
    assert json.dumps(first) == json.dumps(second)
    assert render_html(first, IMAGES) == render_html(second, IMAGES)


def test_models_that_are_the_same_share_a_column_and_the_candidate_stands_alone() -> None:
    one, other = {"new_task": Score(1.0, 1, 0.5, 2)}, {"new_task": Score(1.0, 1, 1.0, 2)}
    assert columns({"base": one, "parent": one, "candidate": other}) == {
        "base = parent": "base",
        "candidate": "candidate",
    }
    assert columns({"base": one, "parent": other, "champion": other, "candidate": other}) == {
        "base": "base",
        "parent = champion": "parent",
        "candidate": "candidate",
    }


def test_texts_of_the_teacher_are_shown_escaped_with_how_much_of_each_set_they_mention() -> None:
    texts = {
        "held": 120,
        "measuring": 12,
        "tokens": 3456,
        "mentioned": {"new_task": 0.0, "general": 0.634, "prose": None},
        "examples": ["<|im_start|>user\nWho?"],
    }
    report = build_report(replace(evaluation(LEARNED), texts=texts))
    assert report["texts"] == texts
    page = render_html(report, IMAGES)
    assert "120 texts that the teacher wrote" in page
    assert re.search(r'>general</th><td class="number">63 %<', page)
    assert re.search(r'>prose</th><td class="number">–<', page)
    assert "<code>&lt;|im_start|&gt;user" in page
    assert "Texts of the teacher" not in render_html(build_report(evaluation(LEARNED)), IMAGES)
