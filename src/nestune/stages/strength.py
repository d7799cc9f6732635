"""Choosing the strength of a trained adapter: every factor scored on the new task and against the parent."""

import logging
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nestune.backends.base import Backend
from nestune.config import StrengthConfig
from nestune.data.batches import Batch, held_batches
from nestune.data.tokens import Row, load_tokenizer
from nestune.errors import StoppedError
from nestune.evaluation.scores import Score, score
from nestune.stages.inputs import TrainingInputs
from nestune.stopping import StopRequests
from nestune.training.progress import ProgressBar
from nestune.training.strength import Point, choose, share_of_gain

CHOOSING = "choosing the strength"
# Enough for a mean divergence; the choice is to cost a few evaluations.
MOST_ANCHORS = 512
# Fewer tell a share of 0.97 only by chance.
FEW_ROWS = 30

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Anchors:
    """Rows at whose held positions the divergence from the parent is measured, in batches, and what they are."""

    what: str
    batches: Sequence[Batch]

    @property
    def rows(self) -> int:
        """How many there are."""
        return sum(len(batch.lengths) for batch in self.batches)


def anchors_of(inputs: TrainingInputs) -> Anchors:
    """Rows of what the parent knew: texts that the teacher has written and no step has seen; else replayed rows; else
    the questions of `valid`, which the parent understands as well.

    Of many, some at even distances; the same ones at every call.
    """
    texts, replayed = list(inputs.measuring), [row for source in inputs.dataset.replay for row in source]
    what = "texts of the teacher" if texts else "replayed rows" if replayed else "questions of valid"
    rows = texts or replayed or [_question(row) for row in inputs.dataset.valid]
    places = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), MOST_ANCHORS)).astype(int))
    chosen = [rows[place] for place in places]
    return Anchors(what, tuple(held_batches(chosen, inputs.config.evaluation.batch_size, inputs.pad_id)))


def choose_strength(
    settings: StrengthConfig,
    inputs: TrainingInputs,
    backend: Backend,
    write: Callable[[float, Path], None],
    anchors: Anchors,
    stop: StopRequests,
) -> dict[str, Any]:
    """The factor that keeps enough of what was learned at the least divergence from the parent, and the whole curve.

    write: puts the adapter at a factor into an existing folder. Returns what `strength.json` holds; the same inputs
    give the same. Raises StoppedError between two batches when the run is asked to stop.
    """
    valid, evaluation = inputs.dataset.valid, inputs.config.evaluation
    if len(valid) < FEW_ROWS:
        log.warning(
            "retention.strength is chosen on %d rows of the new task, which is mostly chance: hold out %d or more "
            "(data.valid)",
            len(valid),
            FEW_ROWS,
        )
    tokenizer = load_tokenizer(inputs.base.folder)
    factors = sorted({*settings.factors, 1.0})
    scores: dict[float, Score] = {}
    divergences: dict[float, float] = {}
    with tempfile.TemporaryDirectory() as scratch, ProgressBar(len(factors), CHOOSING) as bar, _told_stopped():
        backend.show_adapter(inputs.parent)
        before = score(backend, valid, tokenizer, evaluation, stop)
        for number, factor in enumerate(factors, start=1):
            folder = Path(scratch, str(number))
            folder.mkdir()
            write(factor, folder)
            backend.show_adapter(folder)
            scores[factor] = score(backend, valid, tokenizer, evaluation, stop)
            divergences[factor] = backend.divergence(stop.watched(anchors.batches), inputs.parent).mean
            bar.show(number, f"{CHOOSING}: {factor:g}")
    measure = _measure(before, scores[1.0])
    values = {factor: _value(of, measure) for factor, of in scores.items()}
    # A loss is good where it falls.
    sign, parent = 1 if measure == "exact_match" else -1, _value(before, measure)
    whole = sign * (values[1.0] - parent)
    points = [
        Point(factor, value, share_of_gain(sign * (value - parent), whole), divergences[factor])
        for factor, value in values.items()
    ]
    chosen = choose(points, settings.min_share)
    return {
        "factor": chosen.factor,
        "min_share": settings.min_share,
        "measure": measure,
        "parent": _finite(parent),
        "learned": whole > 0,
        "rows": {"new task": f"{len(valid)} of valid", "divergence": f"{anchors.rows} {anchors.what}"},
        "curve": [{key: _finite(value) for key, value in asdict(point).items()} for point in points],
    }


@contextmanager
def _told_stopped() -> Iterator[None]:
    try:
        yield
    except StoppedError as stopped:
        told = "while the strength was chosen; training is complete, and the same command goes on from there"
        raise StoppedError(f"{stopped} {told}") from None


def _measure(before: Score, whole: Score) -> Literal["exact_match", "loss"]:
    """What learning is judged by: exact match, or the loss where no more answers are right, or there are none."""
    if before.exact_match is None or whole.exact_match is None:
        return "loss"
    fell = before.loss is not None and whole.loss is not None and whole.loss < before.loss
    return "loss" if fell and whole.exact_match <= before.exact_match else "exact_match"


def _value(score: Score, measure: Literal["exact_match", "loss"]) -> float:
    value = score.loss if measure == "loss" else score.exact_match
    assert value is not None, "valid has a loss always, and answers where it is judged by them"
    return value


def _question(row: Row) -> Row:
    """What stands before the answer, all of it held; a row without a question as it is."""
    if row.prompt is None or len(row.prompt) < 2:
        return row
    held = np.ones(len(row.prompt), dtype=bool)
    held[0] = False
    return replace(row, tokens=row.prompt, supervised=held)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
