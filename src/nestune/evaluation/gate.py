"""The gate: a candidate may become champion when it learned the new task and shows that it forgot nothing."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from nestune.config import GateConfig
from nestune.errors import RunError
from nestune.evaluation.scores import Score, Scores

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
    the set's measure: exact match (0 to 1), or loss in nats per token.
    `shown`: there are at least `limit` retention sets to compare it with `against` on.
    """

    kind: Literal["learned", "kept", "shown"]
    against: str
    limit: float


@dataclass(frozen=True)
class Check:
    """A rule as it turned out.

    `seen`: what was gained (`learned`) or lost (`kept`), None where a score is not finite; or how many sets
    there are (`shown`).
    """

    rule: Rule
    set: str
    measure: str
    seen: float | None
    passed: bool
    sentence: str

    def as_dict(self) -> dict[str, Any]:
        """The check as a flat JSON object."""
        return asdict(self) | {"rule": self.rule.kind, "against": self.rule.against, "limit": self.rule.limit}


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
        _check(rule, set_name, candidate, scores[rule.against][set_name])
        for set_name, candidate in scores["candidate"].items()
        for rule in _rules(scores, set_name, gate)
    ]
    if gate.require_retention and not _shows_what_was_kept(checks):
        rule = Rule("shown", _compared_with(scores), limit=1)
        checks.append(Check(rule, "retention", "sets", seen=0, passed=False, sentence=UNSHOWN_SENTENCE))
    return Verdict(all(check.passed for check in checks), _compared_with(scores), tuple(checks))


def lowest_passing(scores: Scores, set_name: str, gate: GateConfig) -> float:
    """The worst score of a set that would pass: an exact match, or a loss where the set has no answers."""
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
        yield Rule("learned", "parent", gate.min_gain if by_answers else gate.min_loss_gain)
    if set_name != NEW_TASK or compared_with == "champion":
        yield Rule("kept", compared_with, gate.max_drop if by_answers else gate.max_loss_rise)


def _check(rule: Rule, set_name: str, candidate: Score, reference: Score) -> Check:
    measure = candidate.measure
    if not (_is_finite(candidate) and _is_finite(reference)):
        whose = rule.against if _is_finite(candidate) else "candidate"
        sentence = f"{set_name}: the {whose}'s score is not a finite number, with which nothing passes"
        return Check(rule, set_name, measure, None, False, sentence)
    if rule.kind == "learned":
        seen = _good(candidate) - _good(reference)
        # A loss that stayed where it was is nothing learned.
        passed = seen > 0 if _any_fall_will_do(rule, measure) else seen >= rule.limit - TOLERANCE
    else:
        seen = _good(reference) - _good(candidate)
        passed = seen <= rule.limit + TOLERANCE
    return Check(rule, set_name, measure, seen, passed, _sentence(rule, set_name, candidate, reference, seen))


def _shows_what_was_kept(checks: Iterable[Check]) -> bool:
    return any(check.set != NEW_TASK for check in checks)


def _any_fall_will_do(rule: Rule, measure: str) -> bool:
    return (rule.kind, measure, rule.limit) == ("learned", "loss", 0)


def _sentence(rule: Rule, set_name: str, candidate: Score, reference: Score, seen: float) -> str:
    """E.g. `general: exact match 0.58, 0.41 below the parent's 0.99; at most 0.05 below is allowed`."""
    decimals = _decimals(seen, rule.limit)
    up, down = ("above", "below") if candidate.measure == "exact_match" else ("below", "above")
    value, compared = candidate.value, reference.value
    side = "above" if value > compared else "below"
    change = f"{abs(seen):.{decimals}f} {side}" if round(seen, decimals) else "equal to"
    limit = f"{rule.limit:.{decimals}f}"
    if rule.kind == "kept":
        asked = f"at most {limit} {down} is allowed"
    elif _any_fall_will_do(rule, candidate.measure):
        asked = "any fall is asked"
    else:
        asked = f"at least {limit} {up} is asked"
    return (
        f"{set_name}: {candidate.measure.replace('_', ' ')} {value:.{decimals}f}, "
        f"{change} the {rule.against}'s {compared:.{decimals}f}; {asked}"
    )


def _praise(checks: Sequence[Check]) -> str:
    (gain,) = (check for check in checks if check.rule.kind == "learned")
    kept = [(check.seen, check) for check in checks if check.rule.kind == "kept" and check.seen is not None]
    beyond = f", {_side(gain)}" if any(c.rule.against != gain.rule.against for _, c in kept) else ""
    parts = [f"learned {_change(gain)} on {gain.set}{beyond}"]
    if kept:
        # Measures have different units, so the largest is the one that used up most of its limit.
        seen, worst = max(kept, key=lambda one: one[0] / (one[1].rule.limit or TOLERANCE))
        what = "largest drop" if worst.measure == "exact_match" else "largest rise of loss"
        lost = f"{what} {seen:.{_decimals(seen, worst.rule.limit)}f} on {worst.set}, {_side(worst)}"
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
                groups.append(f"{', '.join(f'{check.set} {_change(check)}' for check in group)} ({_limit(group[0])})")
        if groups:
            parts.append(f"{says}: {', '.join(groups)}")
    if any(check.rule.kind == "shown" for check in failed):
        parts.append(UNSHOWN)
    return "; ".join(parts)


def _limit(check: Check) -> str:
    """What the rule asks or allows, e.g. `allowed 0.05 below the champion`."""
    limit = check.rule.limit
    amount = "any fall" if _any_fall_will_do(check.rule, check.measure) else f"{limit:.{_decimals(limit, limit)}f}"
    return f"{'asked' if check.rule.kind == 'learned' else 'allowed'} {amount} {_side(check)}"


def _side(check: Check) -> str:
    """Where the rule looks from its reference: gains of exact match and rises of loss are above it."""
    above = (check.rule.kind == "learned") == (check.measure == "exact_match")
    return f"{'above' if above else 'below'} the {check.rule.against}"


def _change(check: Check) -> str:
    """How the score changed, e.g. `+0.94`, or `loss -0.31`."""
    assert check.seen is not None
    rose = (check.rule.kind == "learned") == (check.measure == "exact_match")
    change = f"{check.seen if rose else -check.seen:+z.{_decimals(check.seen, check.rule.limit)}f}"
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


def _rows(score: Score) -> tuple[int, int, str]:
    return score.tokens, score.answers, score.measure


def _good(score: Score) -> float:
    """The score's value, such that more is better."""
    return score.value if score.measure == "exact_match" else -score.value


def _is_finite(score: Score) -> bool:
    return math.isfinite(score.loss) and math.isfinite(score.value)


def _decimals(seen: float, limit: float) -> int:
    """Two decimals, or as many as it takes to show the limit as it is and that `seen` is not the limit."""
    differ = abs(abs(seen) - limit) > TOLERANCE
    enough = (
        decimals
        for decimals in range(2, 9)
        if abs(round(limit, decimals) - limit) <= TOLERANCE
        and not (differ and round(abs(seen), decimals) == round(limit, decimals))
    )
    return next(enough, 9)
