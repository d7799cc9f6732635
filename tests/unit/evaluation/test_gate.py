"""The gate's rules, by the formulas that its docstrings state."""

import math
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nestune.config import GateConfig
from nestune.errors import RunError
from nestune.evaluation.gate import decide, lowest_passing
from nestune.evaluation.scores import Outcomes, Score

GATE = GateConfig(min_gain=0.05, min_loss_gain=0.0, max_drop=0.05, max_loss_rise=0.1)
LENIENT = GATE.model_copy(update={"require_retention": False})
rates = st.integers(0, 200).map(lambda right: right / 200)
losses = st.floats(0, 20)


def answered(exact_match: float, loss: float = 1.0) -> Score:
    return Score(loss, tokens=400, exact_match=exact_match, answers=200)


def text(loss: float) -> Score:
    return Score(loss, tokens=400, exact_match=None, answers=0)


def scores(new_task: dict[str, Score], **retention: dict[str, Score]) -> dict[str, dict[str, Score]]:
    """scores[model][set] from scores of each set by model."""
    sets = {"new_task": new_task, **retention}
    return {model: {name: by_model[model] for name, by_model in sets.items()} for model in new_task}


LEARNED = {"parent": answered(0.0), "candidate": answered(0.94)}


def test_a_candidate_that_learned_and_kept_passes() -> None:
    verdict = decide(scores(LEARNED, general={"parent": answered(0.99), "candidate": answered(0.97)}), GATE)
    assert verdict.passed
    assert verdict.compared_with == "parent"
    assert verdict.reason == "learned +0.94 on new_task; largest drop 0.02 on general, below the parent"


def test_a_candidate_that_forgot_is_refused_with_every_set_named() -> None:
    verdict = decide(
        scores(
            LEARNED,
            covered={"parent": answered(0.99), "candidate": answered(0.58)},
            skill={"parent": answered(0.97), "candidate": answered(0.85)},
            uncovered={"parent": answered(0.97), "candidate": answered(0.95)},
        ),
        GATE,
    )
    assert not verdict.passed
    assert verdict.reason == "forgot: covered -0.41, skill -0.12 (allowed 0.05 below the parent)"
    failed = [check.set for check in verdict.checks if not check.passed]
    assert failed == ["covered", "skill"]
    assert verdict.checks[1].sentence == (
        "covered: exact match 0.58, 0.41 below the parent's 0.99; at most 0.05 below is allowed"
    )


def test_one_reason_names_all_that_failed_in_the_unit_of_each() -> None:
    verdict = decide(
        scores(
            {"parent": answered(0.50), "candidate": answered(0.51)},
            general={"parent": answered(0.99), "candidate": answered(0.58)},
            prose={"parent": text(1.0), "candidate": text(1.3)},
        ),
        GATE,
    )
    assert verdict.reason == (
        "did not learn: new_task +0.01 (asked 0.05 above the parent); "
        "forgot: general -0.41 (allowed 0.05 below the parent), prose loss +0.30 (allowed 0.10 above the parent)"
    )


@given(start=st.integers(0, 200), limit=st.integers(0, 200))
def test_a_drop_of_exactly_the_limit_passes_and_one_more_wrong_answer_fails(start: int, limit: int) -> None:
    gate = GATE.model_copy(update={"max_drop": limit / 200})
    for more, passes in ((0, True), (1, False)):
        left = start - limit - more
        if left >= 0:
            pair = {"parent": answered(start / 200), "candidate": answered(left / 200)}
            assert decide(scores(LEARNED, general=pair), gate).passed is passes


@given(start=st.integers(0, 200), gain=st.integers(1, 200))
def test_a_gain_of_exactly_the_minimum_is_learned_and_one_right_answer_less_is_not(start: int, gain: int) -> None:
    gate = LENIENT.model_copy(update={"min_gain": gain / 200})
    for less, passes in ((0, True), (1, False)):
        now = start + gain - less
        if now <= 200:
            pair = {"parent": answered(start / 200), "candidate": answered(now / 200)}
            assert decide(scores(pair), gate).passed is passes


@pytest.mark.parametrize(
    ("fall", "asked", "passes"),
    [(0.0, 0.0, False), (1e-6, 0.0, True), (-0.1, 0.0, False), (0.25, 0.25, True), (0.24, 0.25, False)],
)
def test_a_new_task_without_answers_is_learned_when_its_loss_falls(fall: float, asked: float, passes: bool) -> None:
    gate = LENIENT.model_copy(update={"min_loss_gain": asked})
    pair = {"parent": text(2.0), "candidate": text(2.0 - fall)}
    assert decide(scores(pair), gate).passed is passes


def test_a_loss_that_did_not_fall_is_said_to_be_asked_for_any_fall() -> None:
    verdict = decide(scores({"parent": text(2.0), "candidate": text(2.0)}), LENIENT)
    assert verdict.reason == "did not learn: new_task loss +0.00 (asked any fall below the parent)"
    assert verdict.checks[0].sentence == "new_task: loss 2.00, equal to the parent's 2.00; any fall is asked"


@pytest.mark.parametrize(("rise", "passes"), [(-1.0, True), (0.0, True), (0.1, True), (0.101, False)])
def test_a_set_without_answers_is_kept_while_its_loss_rises_no_more_than_allowed(rise: float, passes: bool) -> None:
    pair = {"parent": text(0.7), "candidate": text(0.7 + rise)}
    assert decide(scores(LEARNED, prose=pair), GATE).passed is passes


def test_a_better_loss_does_not_make_up_for_lost_answers() -> None:
    pair = {"parent": answered(0.99, loss=2.0), "candidate": answered(0.90, loss=0.1)}
    assert not decide(scores(LEARNED, general=pair), GATE).passed


def test_learning_is_measured_against_the_parent_and_keeping_against_the_champion() -> None:
    new_task = {"parent": answered(0.1), "champion": answered(0.6), "candidate": answered(0.5)}
    general = {"parent": answered(0.5), "champion": answered(0.9), "candidate": answered(0.9)}
    verdict = decide(scores(new_task, general=general), GATE)
    assert verdict.compared_with == "champion"
    assert [(c.rule.kind, c.set, c.rule.against, c.passed) for c in verdict.checks] == [
        ("learned", "new_task", "parent", True),
        ("kept", "new_task", "champion", False),
        ("kept", "general", "champion", True),
    ]
    assert verdict.reason == "forgot: new_task -0.10 (allowed 0.05 below the champion)"


def test_the_reason_says_against_whom_it_was_learned_and_kept() -> None:
    new_task = {"parent": answered(0.1), "champion": answered(0.4), "candidate": answered(0.5)}
    for now, lost in (
        (0.8, "nothing worse than the champion"),
        (0.75, "largest rise of loss 0.05 on prose, above the champion"),
    ):
        prose = {"parent": text(0.9), "champion": text(0.8), "candidate": text(1.6 - now)}
        verdict = decide(scores(new_task, prose=prose), GATE)
        assert verdict.reason == f"learned +0.40 on new_task, above the parent; {lost}"


def test_without_a_champion_the_new_task_need_only_be_learned() -> None:
    assert [check.rule.kind for check in decide(scores(LEARNED), LENIENT).checks] == ["learned"]


@pytest.mark.parametrize("with_champion", [False, True])
def test_a_candidate_passes_without_a_retention_set_only_where_none_is_required(with_champion: bool) -> None:
    new_task = LEARNED | ({"champion": answered(0.9)} if with_champion else {})
    refused = decide(scores(new_task), GATE)
    assert not refused.passed
    assert refused.reason == "no retention set shows what was kept"
    (failed,) = [check for check in refused.checks if not check.passed]
    assert failed.sentence == (
        "no retention set: nothing shows what was kept; "
        "name some in data.retention, or set gate.require_retention=false"
    )
    passed = decide(scores(new_task), LENIENT)
    assert passed.passed
    assert passed.reason == (
        "learned +0.94 on new_task, above the parent; nothing worse than the champion; "
        "no retention set shows what was kept"
        if with_champion
        else "learned +0.94 on new_task; no retention set shows what was kept"
    )


def test_a_retention_set_is_required_unless_the_configuration_says_otherwise() -> None:
    assert not decide(scores(LEARNED), GateConfig()).passed
    assert decide(scores(LEARNED, general={"parent": answered(0.9), "candidate": answered(0.9)}), GateConfig()).passed


@pytest.mark.parametrize(("fall", "passes"), [(0.001, False), (0.0099, False), (0.01, True)])
def test_a_loss_that_fell_by_next_to_nothing_is_nothing_learned(fall: float, passes: bool) -> None:
    kept = {"parent": answered(0.9), "candidate": answered(0.9)}
    verdict = decide(scores({"parent": text(2.0), "candidate": text(2.0 - fall)}, general=kept), GateConfig())
    assert verdict.passed is passes


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("model", ["parent", "candidate"])
@pytest.mark.parametrize("set_name", ["new_task", "general", "prose"])
def test_a_score_that_is_not_finite_fails(broken: float, model: str, set_name: str) -> None:
    given_scores = scores(
        LEARNED,
        general={"parent": answered(0.9), "candidate": answered(0.9)},
        prose={"parent": text(1.0), "candidate": text(1.0)},
    )
    assert decide(given_scores, GATE).passed
    given_scores[model][set_name] = replace(given_scores[model][set_name], loss=broken)
    verdict = decide(given_scores, GATE)
    assert not verdict.passed
    assert verdict.reason == f"scores not finite: {set_name}"


@pytest.mark.parametrize("model", ["parent", "champion", "candidate"])
def test_a_set_that_a_model_was_not_scored_on_is_an_error(model: str) -> None:
    three = {name: answered(0.5) for name in ("parent", "champion", "candidate")}
    incomplete = scores(three, general=three)
    del incomplete[model]["general"]
    with pytest.raises(RunError, match=f"the {model} has no score on general"):
        decide(incomplete, GATE)


def test_scores_without_the_new_task_are_an_error() -> None:
    with pytest.raises(RunError, match="no score on new_task"):
        decide({"parent": {"general": answered(1.0)}, "candidate": {"general": answered(1.0)}}, GATE)


def test_scores_on_different_rows_are_an_error() -> None:
    pair = {"parent": answered(0.5), "candidate": replace(answered(0.9), answers=100)}
    with pytest.raises(RunError, match="different rows of general"):
        decide(scores(LEARNED, general=pair), GATE)


def test_figures_have_the_decimals_it_takes_to_tell_them_from_the_limit() -> None:
    pair = {"parent": answered(0.99), "candidate": answered(0.9351)}
    verdict = decide(scores(LEARNED, general=pair), GATE)
    assert verdict.reason == "forgot: general -0.055 (allowed 0.05 below the parent)"
    close = {"parent": answered(0.99), "candidate": answered(0.9399)}
    (sentence,) = [c.sentence for c in decide(scores(LEARNED, general=close), GATE).checks if c.set == "general"]
    assert sentence == (
        "general: exact match 0.9399, 0.0501 below the parent's 0.9900; at most 0.0500 below is allowed"
    )


worlds = st.fixed_dictionaries(
    {
        "new_task": st.tuples(rates, rates, rates),
        "general": st.tuples(rates, rates, rates),
        "prose": st.tuples(losses, losses, losses),
    }
)


def judged(world: dict[str, tuple[float, float, float]], with_champion: bool) -> dict[str, dict[str, Score]]:
    models = ("parent", "candidate", "champion") if with_champion else ("parent", "candidate")
    make = {"new_task": answered, "general": answered, "prose": text}
    return {m: {name: make[name](values[place]) for name, values in world.items()} for place, m in enumerate(models)}


@given(world=worlds, with_champion=st.booleans())
def test_the_verdict_is_the_formula(world: dict[str, tuple[float, float, float]], with_champion: bool) -> None:
    against = 2 if with_champion else 0
    (new_parent, new, _), general, prose = world["new_task"], world["general"], world["prose"]
    margins = [new - new_parent - 0.05, 0.05 - (general[against] - general[1]), 0.1 - (prose[1] - prose[against])]
    margins += [0.05 - (world["new_task"][2] - new)] if with_champion else []
    if all(abs(margin) > 1e-6 for margin in margins):
        verdict = decide(judged(world, with_champion), GATE)
        assert verdict.passed is all(margin > 0 for margin in margins)


@given(world=worlds, worse_by=st.tuples(rates, rates, losses), with_champion=st.booleans())
def test_a_worse_candidate_never_passes_where_a_better_one_is_refused(
    world: dict[str, tuple[float, float, float]], worse_by: tuple[float, float, float], with_champion: bool
) -> None:
    better = judged(world, with_champion)
    worse = judged(world, with_champion)
    for set_name, by in zip(world, worse_by, strict=True):
        before = better["candidate"][set_name]
        lower = replace(before, loss=before.loss + by)
        if before.exact_match is not None:
            lower = replace(before, exact_match=max(0.0, before.exact_match - by))
        worse["candidate"][set_name] = lower
    assert decide(better, GATE).passed or not decide(worse, GATE).passed


@given(world=worlds, with_champion=st.booleans())
def test_the_worst_score_that_passes_is_the_border(
    world: dict[str, tuple[float, float, float]], with_champion: bool
) -> None:
    given_scores = judged(world, with_champion)
    for set_name, step in (("new_task", -1e-4), ("general", -1e-4), ("prose", 1e-4)):
        border = lowest_passing(given_scores, set_name, GATE)
        for value, passes in ((border, True), (border + step, False)):
            score = answered(value) if set_name != "prose" else text(value)
            candidate = {**given_scores["candidate"], set_name: score}
            checks = decide({**given_scores, "candidate": candidate}, GATE).checks
            assert all(check.passed for check in checks if check.set == set_name) is passes


@given(world=worlds, with_champion=st.booleans())
def test_every_verdict_has_a_reason_of_one_line_and_each_check_a_sentence(
    world: dict[str, tuple[float, float, float]], with_champion: bool
) -> None:
    verdict = decide(judged(world, with_champion), GATE)
    assert re.fullmatch(r"(learned|forgot|did not learn).+", verdict.reason)
    assert verdict.reason.startswith("learned") is verdict.passed
    for check in verdict.checks:
        assert check.sentence.startswith(f"{check.set}: ")
        assert f"the {check.rule.against}'s" in check.sentence


def counted(both: int, lost: int, gained: int, neither: int) -> dict[str, Score]:
    """Parent and candidate on rows of four kinds: both are right, the parent alone, the candidate alone, neither."""
    parent = [True] * (both + lost) + [False] * (gained + neither)
    candidate = [True] * both + [False] * lost + [True] * gained + [False] * neither
    return {
        model: replace(answered(sum(right) / len(right)), answers=len(right), outcomes=Outcomes.of_answers(right))
        for model, right in {"parent": parent, "candidate": candidate}.items()
    }


SURE = counted(0, 0, 188, 12)  # +0.94 on 200 rows


def test_a_drop_beyond_its_limit_that_noise_explains_does_not_fail() -> None:
    """18 rows lost and 6 won of 200: -0.06, where the standard error is sqrt(24) / 200 = 0.024; of 20, 0.08."""
    sure = decide(scores(SURE, general=counted(170, 18, 6, 6)), GATE)
    assert sure.reason == "forgot: general -0.06 [-0.11, -0.01] (allowed 0.05 below the parent)"
    unsure = decide(scores(SURE, general=counted(14, 3, 1, 2)), GATE)
    assert unsure.passed
    assert unsure.reason == (
        "learned +0.94 [+0.91, +0.97] on new_task; "
        "largest drop 0.10 [-0.10, 0.30] on general, below the parent, within noise"
    )
    (check,) = [check for check in unsure.checks if check.set == "general"]
    assert check.within_noise
    assert check.sentence == (
        "general: exact match 0.75, 0.10 below the parent's 0.85 (95 % interval [-0.10, 0.30]); "
        "at most 0.05 below is allowed, and this drop is within noise"
    )


def test_a_gain_that_noise_explains_is_nothing_learned() -> None:
    """12 rows won and 2 lost of 50: +0.20; 6 and 2 of 50: +0.08, where the standard error is sqrt(8) / 50 = 0.057."""
    assert decide(scores(counted(10, 2, 12, 26)), LENIENT).passed
    verdict = decide(scores(counted(10, 2, 6, 32)), LENIENT)
    assert verdict.reason == (
        "did not learn: new_task +0.08 [-0.02, +0.20], within noise (asked 0.05 above the parent)"
    )
    assert verdict.checks[0].sentence == (
        "new_task: exact match 0.32, 0.08 above the parent's 0.24 (95 % interval [-0.02, 0.20]); "
        "at least 0.05 above is asked, and this gain is within noise"
    )
    assert verdict.checks[0].as_dict()["interval"] == [pytest.approx(-0.02), pytest.approx(0.20)]


def test_where_no_gain_is_asked_noise_does_not_matter() -> None:
    verdict = decide(scores(counted(10, 2, 2, 36)), LENIENT.model_copy(update={"min_gain": 0.0}))
    assert verdict.passed
    assert verdict.reason.startswith("learned nothing, which is allowed, on new_task; ")


def test_how_sure_it_must_be_is_configured() -> None:
    """+0.08 with a standard error of 0.057 is beyond noise for an interval of 80 %, that is 1.28 of them."""
    pair = scores(counted(10, 2, 6, 32))
    assert not decide(pair, LENIENT).passed
    verdict = decide(pair, LENIENT.model_copy(update={"confidence": 0.8}))
    assert verdict.passed
    assert "(80 % interval [" in verdict.checks[0].sentence


@given(both=st.integers(0, 60), lost=st.integers(0, 60), gained=st.integers(0, 60), neither=st.integers(1, 60))
def test_noise_only_ever_forgives_a_drop_and_denies_a_gain(both: int, lost: int, gained: int, neither: int) -> None:
    pair = counted(both, lost, gained, neither)
    exact = {model: replace(score, outcomes=None) for model, score in pair.items()}
    kept, kept_exactly = (decide(scores(SURE, general=of), GATE).passed for of in (pair, exact))
    learned, learned_exactly = (decide(scores(of), LENIENT).passed for of in (pair, exact))
    assert kept >= kept_exactly
    assert learned <= learned_exactly
    if gained == 0 and lost >= 10:
        assert kept is kept_exactly  # nothing but losses, ten of them, are no noise


@pytest.mark.parametrize(
    ("candidate", "passes"), [(0.361, True), (0.35, False)]
)  # 10 % below 0.40 is 0.36, where 0.05 below it would be 0.35
def test_a_limit_may_be_a_share_of_what_is_compared_with(candidate: float, passes: bool) -> None:
    gate = GATE.model_copy(update={"max_relative_drop": 0.1})
    verdict = decide(scores(LEARNED, general={"parent": answered(0.4), "candidate": answered(candidate)}), gate)
    assert verdict.passed is passes
    if not passes:
        assert verdict.reason == "forgot: general -0.05 (allowed 10 % below the parent)"
        assert verdict.checks[1].sentence == (
            "general: exact match 0.35, 0.05 below the parent's 0.40; at most 0.04 below, 10 % of that, is allowed"
        )
    prose = {"parent": text(2.0), "candidate": text(2.25)}
    assert decide(scores(LEARNED, prose=prose), gate).reason == (
        "forgot: prose loss +0.25 (allowed 10 % above the parent)"
    )


@pytest.mark.parametrize(("candidate", "passes"), [(0.71, True), (0.69, False)])  # half of the 0.6 that 0.4 lacks
def test_a_gain_may_be_asked_as_a_share_of_what_is_lacking(candidate: float, passes: bool) -> None:
    gate = LENIENT.model_copy(update={"min_relative_gain": 0.5})
    verdict = decide(scores({"parent": answered(0.4), "candidate": answered(candidate)}), gate)
    assert verdict.passed is passes
    assert verdict.checks[0].sentence.endswith("; at least 0.30 above, 50 % of what the parent lacks, is asked")
    assert decide(scores({"parent": text(2.0), "candidate": text(0.9)}), gate).passed
    assert not decide(scores({"parent": text(2.0), "candidate": text(1.1)}), gate).passed
