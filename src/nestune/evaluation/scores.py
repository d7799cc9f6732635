"""How well a model does on one set of rows: its loss, and the answers it gets exactly right, row by row."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from nestune.backends.base import Backend, Loss
from nestune.config import EvaluationConfig
from nestune.data.batches import collate, evaluation_batches
from nestune.data.tokens import Row, Tokenizer
from nestune.errors import DataError
from nestune.stopping import StopRequests

KEPT_EXAMPLES = 5
# Groups of rows whose loss is noted one by one where a set is judged by it: enough for an interval.
LOSS_GROUPS = 100
MODELS = ("base", "parent", "champion", "uncompressed", "candidate")


@dataclass(frozen=True)
class Example:
    """One question that a model answered differently than expected."""

    question: str
    expected: str
    seen: str


@dataclass(frozen=True)
class Outcomes:
    """What a score is made of, unit by unit: it is sum(amounts) / sum(weights).

    For exact match a unit is a row with an answer, its amount 1 where that was reproduced, its weight 1. For a loss it
    is a group of rows, its amount their nats, its weight their supervised tokens. The same rows of a set make the same
    units for every model, in the same order.
    """

    amounts: tuple[float, ...]
    weights: tuple[int, ...]

    @classmethod
    def of_answers(cls, right: Sequence[bool]) -> "Outcomes":
        """Those of an exact match."""
        return cls(tuple(map(float, right)), (1,) * len(right))

    def as_dict(self) -> dict[str, Any]:
        """The outcomes as JSON: `right` as one digit a row where each is 1 or 0, else `amounts` and `weights`."""
        if set(self.weights) <= {1} and set(self.amounts) <= {0.0, 1.0}:
            return {"right": "".join(str(int(amount)) for amount in self.amounts)}
        finite = [amount if math.isfinite(amount) else None for amount in self.amounts]
        return {"amounts": finite, "weights": list(self.weights)}


@dataclass(frozen=True)
class Score:
    """One model on one set.

    `loss` in nats per supervised token, over `tokens` of them; `exact_match` the share (0 to 1) of the
    `answers` that are reproduced greedily, None when no row has an answer; `examples` the first wrong ones;
    `outcomes` what `value` is made of, None where only the sum is known. Where another program has scored, `metric`
    names what stands in place of the exact match, and there is no loss.
    """

    loss: float | None
    tokens: int
    exact_match: float | None
    answers: int
    examples: tuple[Example, ...] = ()
    outcomes: Outcomes | None = None
    metric: str | None = None

    @property
    def measure(self) -> str:
        """What the set is judged by: `exact_match` where its rows have answers, else `loss`."""
        return "loss" if self.exact_match is None else "exact_match"

    @property
    def value(self) -> float:
        """What the set is judged by, as a number: the exact match, or the loss where there are no answers."""
        if self.exact_match is not None:
            return self.exact_match
        return math.nan if self.loss is None else self.loss

    @property
    def called(self) -> str:
        """The measure as people read it."""
        return self.metric or self.measure.replace("_", " ")

    def as_dict(self) -> dict[str, Any]:
        """The score as a JSON object without its outcomes, in which a loss that is not finite is null."""
        loss = self.loss if self.loss is not None and math.isfinite(self.loss) else None
        return {key: value for key, value in asdict(replace(self, outcomes=None)).items() if key != "outcomes"} | {
            "loss": loss
        }


Scores = Mapping[str, Mapping[str, Score]]
"""scores[model][set]; models are `base`, `parent`, `champion` and `uncompressed` (where there are any), `candidate`."""


def score(
    backend: Backend,
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    evaluation: EvaluationConfig,
    stop: StopRequests | None = None,
) -> Score:
    """The score of the backend's model, with the adapter that it has loaded now.

    Answers are compared as text, without special tokens and surrounding white space.
    Raises DataError when there are no rows: a loss of 0 would hide an empty set; StoppedError between two batches.
    """
    if not rows:
        raise DataError("there are no rows to score. Run nestune validate again.")
    asked = [(r.prompt, r.answer.strip()) for r in rows if r.prompt is not None and r.answer is not None]
    if not asked:
        parts = _losses_of_groups(backend, rows, tokenizer, evaluation, stop)
        outcomes = Outcomes(tuple(part.nats for part in parts), tuple(part.tokens for part in parts))
        loss = Loss(sum(outcomes.amounts), sum(outcomes.weights))
        return Score(loss.mean, loss.tokens, exact_match=None, answers=0, outcomes=outcomes)
    batches = evaluation_batches(rows, evaluation.batch_size, tokenizer.pad_token_id)
    loss = backend.loss(stop.watched(batches) if stop else batches)
    seen = _greedy_answers(backend, [prompt.tolist() for prompt, _ in asked], tokenizer, evaluation, stop)
    right = [answer == expected for (_, expected), answer in zip(asked, seen, strict=True)]
    wrong = tuple(
        Example(tokenizer.decode(prompt, skip_special_tokens=True).strip(), expected, answer)
        for (prompt, expected), answer in zip(asked, seen, strict=True)
        if answer != expected
    )
    rate, outcomes = sum(right) / len(asked), Outcomes.of_answers(right)
    return Score(loss.mean, loss.tokens, rate, len(asked), wrong[:KEPT_EXAMPLES], outcomes)


def rows_of(scores: Scores) -> dict[str, dict[str, Any]]:
    """What each row did, as JSON: set -> model -> its outcomes, where they are known."""
    return {
        name: {
            model: outcomes.as_dict()
            for model, of_model in scores.items()
            if (outcomes := of_model[name].outcomes) is not None
        }
        for name in scores["candidate"]
    }


def columns(scores: Mapping[str, object]) -> dict[str, str]:
    """Column title -> model, for tables and pictures; models known to be one and the same share a column.

    A new adapter's parent is the base, and the champion is often the parent: `parent = champion`.
    """
    titles: dict[str, str] = {}
    for model in (model for model in MODELS if model in scores):
        same = next((title for title, other in titles.items() if scores[other] == scores[model]), None)
        if same is None or model == "candidate":
            titles[model] = model
        else:
            titles[f"{same} = {model}"] = titles.pop(same)
    return titles


def _losses_of_groups(
    backend: Backend,
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    evaluation: EvaluationConfig,
    stop: StopRequests | None,
) -> list[Loss]:
    """The loss of each group of rows: single rows while they are few, whole batches where they are very many.

    The rows of a group are drawn by lot, the same for every model: were they of similar length, groups would differ
    by more than chance.
    """
    size = min(evaluation.batch_size, -(-len(rows) // LOSS_GROUPS))
    order = np.random.default_rng(0).permutation(len(rows))
    losses = []
    for start in range(0, len(rows), size):
        if stop is not None:
            stop.check()
        group = [rows[place] for place in order[start : start + size]]
        losses.append(backend.loss([collate(group, tokenizer.pad_token_id)]))
    return losses


def _greedy_answers(
    backend: Backend,
    prompts: Sequence[list[int]],
    tokenizer: Tokenizer,
    evaluation: EvaluationConfig,
    stop: StopRequests | None,
) -> list[str]:
    """The answers in the order of the prompts; batches of similar length, which need less padding."""
    by_length = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    answers = [""] * len(prompts)
    for start in range(0, len(by_length), evaluation.batch_size):
        if stop is not None:
            stop.check()
        places = by_length[start : start + evaluation.batch_size]
        generated = backend.generate([prompts[place] for place in places], evaluation.max_answer_tokens)
        for place, tokens in zip(places, generated, strict=True):
            answers[place] = tokenizer.decode(tokens, skip_special_tokens=True).strip()
    return answers
