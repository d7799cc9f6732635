"""Rows as padded batches, in an order that depends on the seed alone."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice

import numpy as np
from numpy.typing import NDArray

from nestune.config import TrainingConfig
from nestune.data.tokens import Row
from nestune.errors import DataError

# Rows are sorted by length within pools of this many batches: little padding, and still well mixed.
POOL_BATCHES = 32


@dataclass(frozen=True, eq=False)
class Batch:
    """B rows padded on the right to T tokens.

    tokens (B, T); supervised (B, T), False in padding and in column 0; lengths (B,) tokens of each row.
    """

    tokens: NDArray[np.int32]
    supervised: NDArray[np.bool_]
    lengths: NDArray[np.int32]


def collate(rows: Sequence[Row], pad_id: int) -> Batch:
    """The rows as one batch, in their order. Raises DataError when no token of theirs is supervised."""
    lengths = np.array([len(row.tokens) for row in rows], dtype=np.int32)
    tokens = np.full((len(rows), lengths.max()), pad_id, dtype=np.int32)
    supervised = np.zeros(tokens.shape, dtype=bool)
    for index, row in enumerate(rows):
        tokens[index, : lengths[index]] = row.tokens
        supervised[index, : lengths[index]] = row.supervised
    supervised[:, 0] = False
    if not supervised.any():
        raise DataError(f"a batch of {len(rows)} rows has no supervised token. Run nestune validate again.")
    return Batch(tokens, supervised, lengths)


def evaluation_batches(rows: Sequence[Row], batch_size: int, pad_id: int) -> Iterator[Batch]:
    """Every row once, from the shortest to the longest."""
    by_length = sorted(rows, key=lambda row: len(row.tokens))
    for start in range(0, len(rows), batch_size):
        yield collate(by_length[start : start + batch_size], pad_id)


def training_steps(
    rows: Sequence[Row],
    training: TrainingConfig,
    pad_id: int,
    replay: Sequence[Sequence[Row]] = (),
    replay_rows: int = 0,
    after: int = 0,
) -> Iterator[list[Batch]]:
    """The micro-batches of one step after the other, without end, from the step after `after` on.

    Every row comes once an epoch; the last micro-batch of an epoch is smaller when the rows do not divide.
    `replay_rows` rows of earlier data join each step, drawn in turn from the sources in `replay` and spread
    evenly over its micro-batches. Raises DataError when there are no rows, or none in a source.
    """
    if not rows or not all(replay):
        raise DataError("there are no rows to train on or to replay. Run nestune validate again.")
    new = _new_batches(rows, training.batch_size, training.seed)
    earlier = _replayed(replay, training.seed) if replay else iter(())
    parts = training.gradient_accumulation_steps
    for step in count(1):
        micro_batches = [[rows[index] for index in batch] for batch in islice(new, parts)]
        for index, row in enumerate(islice(earlier, replay_rows)):
            micro_batches[index % parts].append(row)
        if step > after:
            yield [collate(batch, pad_id) for batch in micro_batches]


def _new_batches(rows: Sequence[Row], batch_size: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Row numbers of one batch after the other, epoch after epoch."""
    lengths = np.array([len(row.tokens) for row in rows])
    for epoch in count():
        random = np.random.default_rng([seed, epoch])
        pools = _cut(random.permutation(len(rows)), POOL_BATCHES * batch_size)
        batches = [
            batch for pool in pools for batch in _cut(pool[np.argsort(lengths[pool], kind="stable")], batch_size)
        ]
        for index in random.permutation(len(batches)):
            yield batches[index]


def _replayed(sources: Sequence[Sequence[Row]], seed: int) -> Iterator[Row]:
    """One row from each source in turn; a source is shuffled anew each time it is used up."""
    turns = [_shuffled_passes(source, seed, number) for number, source in enumerate(sources, start=1)]
    while True:
        for turn in turns:
            yield next(turn)


def _shuffled_passes(rows: Sequence[Row], seed: int, source: int) -> Iterator[Row]:
    for number in count():
        # The third number, which is never 0, keeps this stream apart from that of the new rows.
        for index in np.random.default_rng([seed, number, source]).permutation(len(rows)):
            yield rows[index]


def _cut(numbers: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
    return [numbers[start : start + size] for start in range(0, len(numbers), size)]
