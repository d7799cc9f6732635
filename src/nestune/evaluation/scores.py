"""How well a model does on one set of rows: its loss, and the answers it gets exactly right."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nestune.backends.base import Backend
from nestune.config import EvaluationConfig
from nestune.data.batches import evaluation_batches
from nestune.data.tokens import Row, Tokenizer
from nestune.errors import DataError
from nestune.stopping import StopRequests

KEPT_EXAMPLES = 5
MODELS = ("base", "parent", "champion", "uncompressed", "candidate")


@dataclass(frozen=True)
class Example:
    """One question that a model answered differently than expected."""

    question: str
    expected: str
    seen: str


@dataclass(frozen=True)
class Score:
    """One model on one set.

    `loss` in nats per supervised token, over `tokens` of them; `exact_match` the share (0 to 1) of the
    `answers` that are reproduced greedily, None when no row has an answer; `examples` the first wrong ones.
    """

    loss: float
    tokens: int
    exact_match: float | None
    answers: int
    examples: tuple[Example, ...] = ()

    @property
    def measure(self) -> str:
        """What the set is judged by: `exact_match` where its rows have answers, else `loss`."""
        return "loss" if self.exact_match is None else "exact_match"

    @property
    def value(self) -> float:
        """What the set is judged by, as a number: the exact match, or the loss where there are no answers."""
        return self.loss if self.exact_match is None else self.exact_match

    def as_dict(self) -> dict[str, Any]:
        """The score as a JSON object, in which a loss that is not finite is null."""
        return asdict(self) | {"loss": self.loss if math.isfinite(self.loss) else None}


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
    batches = evaluation_batches(rows, evaluation.batch_size, tokenizer.pad_token_id)
    loss = backend.loss(stop.watched(batches) if stop else batches)
    asked = [(r.prompt, r.answer.strip()) for r in rows if r.prompt is not None and r.answer is not None]
    if not asked:
        return Score(loss.mean, loss.tokens, exact_match=None, answers=0)
    seen = _greedy_answers(backend, [prompt.tolist() for prompt, _ in asked], tokenizer, evaluation, stop)
    wrong = [
        Example(tokenizer.decode(prompt, skip_special_tokens=True).strip(), expected, answer)
        for (prompt, expected), answer in zip(asked, seen, strict=True)
        if answer != expected
    ]
    right = len(asked) - len(wrong)
    return Score(loss.mean, loss.tokens, right / len(asked), len(asked), tuple(wrong[:KEPT_EXAMPLES]))


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
