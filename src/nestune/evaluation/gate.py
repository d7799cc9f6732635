"""The gate: a candidate may become champion when it learned the new task and shows that it forgot nothing.

Both are judged beyond noise, as far as the rows tell (`nestune.evaluation.uncertainty`): what was gained counts as
learned only where the whole interval of the gain is above 0, and a drop beyond its limit as forgotten only where the
whole interval of the drop is. Scores whose rows are not known are taken as exact.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from nestune.config import GateConfig
from nestune.errors import RunError
from nestune.evaluation.scores import Score, Scores
from nestune.evaluation.uncertainty import Interval, gain_interval

NEW_TASK = "new_task"
UNSHOWN = "no retention set shows what was kept"
UNSHOWN_SENTENCE = (
    "no retention set: nothing shows what was kept; name some in data.retention, or set gate.require_retention=false"
)
TOLERANCE = 1e-9  # a drop of exactly the limit passes, whatever the rounding of floats


@dataclass(frozen=True)
class Rule:
    """What is asked of the candidate on one set.

    `learned`: it gained at least `limit` over `against`; `kept`: it lost at most `limit` to it. In the unit of
    the set's measure: exact match (0 to 1), or loss in nats per token. `share`: what the limit is of the score of
    `against` (for `learned`, of what that lacks), None where the limit was given as it is.
    `shown`: there are at least `limit` retention sets to compare it with `against` on.
    """

    kind: Literal["learned", "kept", "shown"]
    against: str
    limit: float
    share: float | None = None


@dataclass(frozen=True)
class Check:
    """A rule as it turned out.

    `seen`: what was gained (`learned`) or lost (`kept`), None where a score is not finite; or how many sets
    there are (`shown`). `interval`: where it lies with the gate's confidence, None where the rows are not known.
    """

    rule: Rule
    set: str
    measure: str
    seen: float | None
    passed: bool
    sentence: str
    interval: Interval | None = None

    @property
    def within_noise(self) -> bool:
        """Whether the rows leave open that nothing was gained, or lost, at all."""
        return self.interval is not None and self.interval.low <= 0

    def as_dict(self) -> dict[str, Any]:
        """The check as a flat JSON object."""
        return asdict(self) | {
            "rule": self.rule.kind,
            "against": self.rule.against,
            "limit": self.rule.limit,
            "interval": self.interval.as_list() if self.interval else None,
        }


@dataclass(frozen=True)
class Verdict:
    """What the gate says of a candidate; `compared_with` is `champion`, or `parent` while there is none."""

    passed: bool
    compared_with: str
    checks: tuple[Check, ...]

    @property
    def reason(self) -> str:
        """Why, in one line: what was learned and the largest drop, or else everything that failed."""
        return _praise(self.checks) if self.passed else _blame(self.checks)

    def as_dict(self) -> dict[str, Any]:
        """The verdict as a JSON object."""
        return {
            "passed": self.passed,
            "reason": self.reason,
            "compared_with": self.compared_with,
            "checks": [check.as_dict() for check in self.checks],
        }


def decide(scores: Scores, gate: GateConfig) -> Verdict:
    """Whether the candidate learned the new task and kept what was known, by `scores[model][set]`.

    Models: `candidate` and `parent`, and `champion` where there is one; else the parent is compared with.
    The new task's set is called `new_task`; with a champion it must be kept as well as learned. The others are
    the retention sets; without any nothing is promoted, unless `require_retention` is off.
    Raises RunError when a model lacks the score of a set, or was scored on other rows.
    """
    _refuse_what_cannot_be_compared(scores)
    checks = [
        _check(rule, set_name, candidate, scores[rule.against][set_name], gate.confidence)
        for set_name, candidate in scores["candidate"].items()
        for rule in _rules(scores, set_name, gate)
    ]
    if gate.require_retention and not _shows_what_was_kept(checks):
        rule = Rule("shown", _compared_with(scores), limit=1)
        checks.append(Check(rule, "retention", "sets", seen=0, passed=False, sentence=UNSHOWN_SENTENCE))
    return Verdict(all(check.passed for check in checks), _compared_with(scores), tuple(checks))


def lowest_passing(scores: Scores, set_name: str, gate: GateConfig) -> float:
    """The worst score of a set that passes whatever its rows say of noise: an exact match, or a loss."""
    worst = max(
        _good(scores[rule.against][set_name]) + (rule.limit if rule.kind == "learned" else -rule.limit)
        for rule in _rules(scores, set_name, gate)
    )
    return worst if scores["candidate"][set_name].measure == "exact_match" else -worst


def _compared_with(scores: Scores) -> str:
    return "champion" if "champion" in scores else "parent"


def _rules(scores: Scores, set_name: str, gate: GateConfig) -> Iterator[Rule]:
    by_answers = scores["candidate"][set_name].measure == "exact_match"
    compared_with = _compared_with(scores)
    if set_name == NEW_TASK:
        parent, share = scores["parent"][set_name].value, gate.min_relative_gain
        fixed = gate.min_gain if by_answers else gate.min_loss_gain
        yield Rule(
            "learned", "parent", fixed if share is None else share * (1 - parent if by_answers else parent), share
        )
    if set_name != NEW_TASK or compared_with == "champion":
        reference, share = scores[compared_with][set_name].value, gate.max_relative_drop
        fixed = gate.max_drop if by_answers else gate.max_loss_rise
        yield Rule("kept", compared_with, fixed if share is None else share * reference, share)


def _check(rule: Rule, set_name: str, candidate: Score, reference: Score, confidence: float) -> Check:
    measure = candidate.measure
    if not (_is_finite(candidate) and _is_finite(reference)):
        whose = rule.against if _is_finite(candidate) else "candidate"
        sentence = f"{set_name}: the {whose}'s score is not a finite number, with which nothing passes"
        return Check(rule, set_name, measure, None, False, sentence)
    gain = gain_interval(candidate, reference, confidence)
    if rule.kind == "learned":
        seen, interval = _good(candidate) - _good(reference), gain
        # A loss that stayed where it was is nothing learned.
        enough = seen > 0 if _any_fall_will_do(rule, measure) else seen >= rule.limit - TOLERANCE
        passed = enough and (interval is None or interval.low > 0 or _nothing_asked(rule, measure))
    else:
        seen, interval = _good(reference) - _good(candidate), -gain if gain else None
        passed = seen <= rule.limit + TOLERANCE or (interval is not None and interval.low <= 0)
    check = Check(rule, set_name, measure, seen, passed, sentence="", interval=interval)
    return replace(check, sentence=_sentence(check, candidate, reference.value, confidence))


def _shows_what_was_kept(checks: Iterable[Check]) -> bool:
    return any(check.set != NEW_TASK for check in checks)


def _any_fall_will_do(rule: Rule, measure: str) -> bool:
    return (rule.kind, measure, rule.limit) == ("learned", "loss", 0)


def _nothing_asked(rule: Rule, measure: str) -> bool:
    return (rule.kind, measure, rule.limit) == ("learned", "exact_match", 0)


def _sentence(check: Check, candidate: Score, compared: float, confidence: float) -> str:
    """What was seen and what is asked.

    E.g. `general: exact match 0.58, 0.41 below the parent's 0.99 (95 % interval [0.35, 0.47]); at most 0.05 below is
    allowed`.
    """
    rule, measure, value, seen = check.rule, check.measure, candidate.value, check.seen or 0.0
    decimals = _decimals(seen, rule)
    up, down = ("above", "below") if measure == "exact_match" else ("below", "above")
    side = "above" if value > compared else "below"
    change = f"{abs(seen):.{decimals}f} {side}" if round(seen, decimals) else "equal to"
    limit = f"{rule.limit:.{decimals}f}"
    share = "" if rule.share is None else f", {_share(check)},"
    if rule.kind == "kept":
        asked = f"at most {limit} {down}{share} is allowed"
    elif _any_fall_will_do(rule, measure):
        asked = "any fall is asked"
    else:
        asked = f"at least {limit} {up}{share} is asked"
    if check.within_noise and seen > TOLERANCE and check.passed == (rule.kind == "kept" and seen > rule.limit):
        what = "gain" if rule.kind == "learned" else "drop" if measure == "exact_match" else "rise"
        asked += f", and this {what} is within noise"
    # As the change is told: so far above, or below.
    interval = check.interval if seen >= 0 or check.interval is None else -check.interval
    between = f" ({100 * confidence:g} % interval {interval.text(decimals)})" if interval else ""
    return (
        f"{check.set}: {candidate.called} {value:.{decimals}f}, "
        f"{change} the {rule.against}'s {compared:.{decimals}f}{between}; {asked}"
    )


def _share(check: Check) -> str:
    """A relative limit, e.g. `5 % of that`."""
    lacks = check.rule.kind == "learned" and check.measure == "exact_match"
    return f"{100 * (check.rule.share or 0):g} % of {f'what the {check.rule.against} lacks' if lacks else 'that'}"


def _praise(checks: Sequence[Check]) -> str:
    (gain,) = (check for check in checks if check.rule.kind == "learned")
    kept = [(check.seen, check) for check in checks if check.rule.kind == "kept" and check.seen is not None]
    beyond = f", {_side(gain)}" if any(c.rule.against != gain.rule.against for _, c in kept) else ""
    nothing = gain.seen is not None and gain.seen <= TOLERANCE
    learned = "learned nothing, which is allowed," if nothing else f"learned {_change(gain)}"
    parts = [f"{learned} on {gain.set}{beyond}{_noise(gain)}"]
    if kept:
        # Measures have different units, so the largest is the one that used up most of its limit.
        seen, worst = max(kept, key=lambda one: one[0] / (one[1].rule.limit or TOLERANCE))
        what = "largest drop" if worst.measure == "exact_match" else "largest rise of loss"
        decimals = _decimals(seen, worst.rule)
        interval = f" {worst.interval.text(decimals)}" if worst.interval else ""
        lost = f"{what} {seen:.{decimals}f}{interval} on {worst.set}, {_side(worst)}{_noise(worst)}"
        parts.append(lost if seen > TOLERANCE else f"nothing worse than the {worst.rule.against}")
    if not _shows_what_was_kept(checks):
        parts.append(UNSHOWN)
    return "; ".join(parts)


def _blame(checks: Sequence[Check]) -> str:
    failed = [check for check in checks if not check.passed]
    broken = dict.fromkeys(check.set for check in failed if check.seen is None)
    parts = [f"scores not finite: {', '.join(broken)}"] if broken else []
    for kind, says in (("learned", "did not learn"), ("kept", "forgot")):
        groups = []
        for measure in ("exact_match", "loss"):
            group = [c for c in failed if (c.rule.kind, c.measure) == (kind, measure) and c.seen is not None]
            if group:
                groups.append(f"{', '.join(map(_failure, group))} ({_limit(group[0])})")
        if groups:
            parts.append(f"{says}: {', '.join(groups)}")
    if any(check.rule.kind == "shown" for check in failed):
        parts.append(UNSHOWN)
    return "; ".join(parts)


def _failure(check: Check) -> str:
    return f"{check.set} {_change(check)}{_noise(check)}"


def _noise(check: Check) -> str:
    """That what was gained, or lost, may be chance, where anything was."""
    return ", within noise" if check.within_noise and (check.seen or 0) > TOLERANCE else ""


def _limit(check: Check) -> str:
    """What the rule asks or allows, e.g. `allowed 0.05 below the champion`."""
    limit = check.rule.limit
    if check.rule.share is not None:
        amount = f"{100 * check.rule.share:g} %"
    else:
        exact = f"{limit:.{_decimals(limit, check.rule)}f}"
        amount = "any fall" if _any_fall_will_do(check.rule, check.measure) else exact
    return f"{'asked' if check.rule.kind == 'learned' else 'allowed'} {amount} {_side(check)}"


def _side(check: Check) -> str:
    """Where the rule looks from its reference: gains of exact match and rises of loss are above it."""
    above = (check.rule.kind == "learned") == (check.measure == "exact_match")
    return f"{'above' if above else 'below'} the {check.rule.against}"


def _change(check: Check) -> str:
    """How the score changed, and between what it may have: e.g. `+0.94 [+0.90, +0.97]`, or `loss -0.31`."""
    assert check.seen is not None
    rose = (check.rule.kind == "learned") == (check.measure == "exact_match")
    decimals = _decimals(check.seen, check.rule)
    change = f"{check.seen if rose else -check.seen:+z.{decimals}f}"
    if check.interval is not None:
        change += f" {(check.interval if rose else -check.interval).text(decimals, sign='+')}"
    return change if check.measure == "exact_match" else f"loss {change}"


def _refuse_what_cannot_be_compared(scores: Scores) -> None:
    remedy = "Run nestune evaluate again."
    missing = [model for model in ("candidate", "parent") if model not in scores]
    if missing:
        raise RunError(f"the gate needs the scores of the {' and of the '.join(missing)}. {remedy}")
    sets = dict.fromkeys([NEW_TASK, *(set_name for of_model in scores.values() for set_name in of_model)])
    faults = [
        f"the {model} has no score on {name}"
        for model, of_model in scores.items()
        for name in sets
        if name not in of_model
    ]
    for name in sets:
        rows = {_rows(of_model[name]) for of_model in scores.values() if name in of_model}
        faults += [f"the models were scored on different rows of {name}"] if len(rows) > 1 else []
    if faults:
        raise RunError(f"scores that cannot be compared: {'; '.join(faults)}. {remedy}")


def _rows(score: Score) -> tuple[int, int, str, tuple[int, ...] | None]:
    return score.tokens, score.answers, score.measure, score.outcomes.weights if score.outcomes else None


def _good(score: Score) -> float:
    """The score's value, such that more is better."""
    return score.value if score.measure == "exact_match" else -score.value


def _is_finite(score: Score) -> bool:
    return math.isfinite(score.value) and (score.loss is None or math.isfinite(score.loss))


def _decimals(seen: float, rule: Rule) -> int:
    """Two decimals, or as many as it takes to show a limit that was given as it is, and that `seen` is another."""
    limit = rule.limit if rule.share is None else round(rule.limit, 3)
    differ = abs(abs(seen) - limit) > TOLERANCE
    enough = (
        decimals
        for decimals in range(2, 9)
        if abs(round(limit, decimals) - limit) <= TOLERANCE
        and not (differ and round(abs(seen), decimals) == round(limit, decimals))
    )
    return next(enough, 9)
