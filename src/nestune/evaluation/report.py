"""The report of an evaluation: as JSON for programs, as flat metrics for DVC, as one page for people."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from nestune.base_model import BaseModel
from nestune.config import RunConfig
from nestune.evaluation.gate import NEW_TASK, Verdict
from nestune.evaluation.history import History
from nestune.evaluation.scores import Score, Scores, columns
from nestune.evaluation.uncertainty import Interval, score_interval

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATE = "report.html.j2"
DECIMALS = 3  # of the scores in the table


@dataclass(frozen=True)
class Evaluation:
    """All that was found out about a candidate.

    `adapters`: model -> SHA-256 of its adapter's weights, None for the base without one; `rows`: set -> how
    many rows; `candidate_step`: the step at which its checkpoint was written; `champion_version`: the version
    compared with, None when there is none; `strength`: how the factor on what was learned was chosen, and
    `compression`: what cutting down the rank did to the adapter, `texts`: what the teacher wrote, and how much of each
    set it mentions, None where that was not done.
    """

    config: RunConfig
    base: BaseModel
    dataset_sha256: str
    rows: Mapping[str, int]
    history: History
    adapters: Mapping[str, str | None]
    candidate_step: int
    champion_version: str | None
    scores: Scores
    verdict: Verdict
    strength: Mapping[str, Any] | None = None
    compression: Mapping[str, Any] | None = None
    texts: Mapping[str, Any] | None = None


def build_report(evaluation: Evaluation) -> dict[str, Any]:
    """The report as a JSON object; equal for equal inputs, as it holds no times and no places."""
    config, base, history = evaluation.config, evaluation.base, evaluation.history
    scores = {
        model: {name: score_as_json(score, config.gate.confidence) for name, score in by_set.items()}
        for model, by_set in evaluation.scores.items()
    }
    wrong_answers = {name: score["examples"] for name, score in scores["candidate"].items() if score["examples"]}
    return {
        "name": config.name,
        **evaluation.verdict.as_dict(),
        "champion_version": evaluation.champion_version,
        "scores": {
            model: {name: _without(score, "examples") for name, score in by_set.items()}
            for model, by_set in scores.items()
        },
        "wrong_answers": wrong_answers,
        "candidate": {
            "checkpoint": config.evaluation.checkpoint,
            "step": evaluation.candidate_step,
            "steps": history.steps[-1],
        },
        "strength": evaluation.strength and dict(evaluation.strength),
        "texts": evaluation.texts and dict(evaluation.texts),
        "compression": evaluation.compression and _compression(evaluation, scores),
        "adapters": dict(evaluation.adapters),
        "base": {"reference": base.reference, "revision": base.revision, "sha256": base.sha256},
        "dataset": {"sha256": evaluation.dataset_sha256, "rows": dict(evaluation.rows)},
        "tiers": {
            "strategy": config.tiers.strategy,
            "update_every": list(config.tiers.periods),
            "update_counts": list(history.update_counts[-1]),
        },
        "config": config.model_dump(mode="json"),
    }


def score_as_json(score: Score, confidence: float) -> dict[str, Any]:
    """A score with the interval of what its set is judged by: both ends, None where its rows are not known."""
    interval = score_interval(score, confidence)
    return score.as_dict() | {"interval": interval.as_list() if interval else None}


def flat_metrics(report: Mapping[str, Any]) -> dict[str, Any]:
    """The candidate's numbers and the verdict, as `dvc metrics show` lists them."""
    numbers = {
        name: {score["metric"] or key: score[key] for key in ("exact_match", "loss") if score[key] is not None}
        for name, score in report["scores"]["candidate"].items()
    }
    return {
        NEW_TASK: numbers.pop(NEW_TASK),
        "retention": numbers,
        "gate_passed": report["passed"],
    }


def render_html(report: Mapping[str, Any], images: Mapping[str, bytes]) -> str:
    """The report as one page that loads nothing.

    `images`: PNG bytes of `loss`, `tiers` and `retention`, of `importance` where it was measured, and of `strength`
    where it was chosen.
    """
    titles = columns(report["scores"])
    return (
        page_templates()
        .get_template(TEMPLATE)
        .render(
            report=report,
            titles=list(titles),
            table=[_table_row(report, name, titles) for name in report["scores"]["candidate"]],
            images={name: f"data:image/png;base64,{base64.b64encode(png).decode()}" for name, png in images.items()},
            config_yaml=yaml.safe_dump(report["config"], sort_keys=False, allow_unicode=True),
        )
    )


def page_templates() -> "Environment":
    """The templates of this package; what they are given is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("nestune.evaluation", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _compression(evaluation: Evaluation, scores: Mapping[str, Any]) -> dict[str, Any]:
    """What compression did to the adapter, and to its score on every set: the candidate's minus that before."""
    assert evaluation.compression is not None
    effect = {name: _differences(score, scores["uncompressed"][name]) for name, score in scores["candidate"].items()}
    return {**evaluation.compression, "effect": effect}


def _differences(candidate: Mapping[str, Any], reference: Mapping[str, Any]) -> dict[str, float | None]:
    return {
        key: None if candidate[key] is None or reference[key] is None else candidate[key] - reference[key]
        for key in ("exact_match", "loss")
    }


def _table_row(report: Mapping[str, Any], set_name: str, titles: Mapping[str, str]) -> dict[str, Any]:
    """One set as the table shows it: a cell for each column, and the candidate against the model compared with."""
    of_model = {model: by_set[set_name] for model, by_set in report["scores"].items()}
    candidate, reference = of_model["candidate"], of_model[report["compared_with"]]
    has_answers = candidate["exact_match"] is not None
    differences = _differences(candidate, reference)
    return {
        "set": set_name,
        "rows": report["dataset"]["rows"][set_name],
        "measure": candidate["metric"] or ("exact match" if has_answers else "loss"),
        "cells": [
            _cell(of_model[model], has_answers, sign="") | {"interval": _interval(of_model[model]["interval"], sign="")}
            for model in titles.values()
        ],
        "change": _cell(differences, has_answers, sign="+") | {"interval": _interval_of_change(report, set_name)},
        "direction": _direction(differences, has_answers),
    }


def _interval(ends: Sequence[float] | None, sign: str) -> str:
    return Interval(*ends).text(DECIMALS, sign).replace("-", "−") if ends else ""


def _interval_of_change(report: Mapping[str, Any], set_name: str) -> str:
    """Between what the candidate's score less that of the model compared with lies, as the gate has found."""
    for check in report["checks"]:
        if (check["set"], check["against"]) == (set_name, report["compared_with"]) and check["interval"]:
            interval = Interval(*check["interval"])
            rose = (check["rule"] == "learned") == (check["measure"] == "exact_match")
            return _interval((interval if rose else -interval).as_list(), sign="+")
    return ""


def _cell(numbers: Mapping[str, Any], has_answers: bool, sign: str) -> dict[str, str]:
    """What the set is judged by, in large, and the other number, in small."""
    shown = {
        key: "–" if numbers[key] is None else format(numbers[key], f"{sign}z.{DECIMALS}f").replace("-", "−")
        for key in ("exact_match", "loss")
    }
    judged, besides = (shown["exact_match"], shown["loss"]) if has_answers else (shown["loss"], "")
    return {"judged": judged, "besides": besides}


def _direction(differences: Mapping[str, float | None], has_answers: bool) -> str:
    """Whether the candidate is `better`, `worse` or `equal` by what the set is judged by, to the decimals shown."""
    difference = round(differences["exact_match" if has_answers else "loss"] or 0.0, DECIMALS)
    if difference == 0:
        return "equal"
    return "better" if (difference > 0) == has_answers else "worse"


def _without(content: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in content.items() if name != key}
