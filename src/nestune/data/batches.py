"""Rows as padded batches, in an order that depends on the seed alone."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice

import numpy as np
from numpy.typing import NDArray

from nestune.config import RetentionConfig, TrainingConfig
from nestune.data.tokens import Row
from nestune.errors import DataError

# Rows are sorted by length within pools of this many batches: little padding, and still well mixed.
POOL_BATCHES = 32
# The number of the texts' random stream, which no source of replay has.
TEXTS = 2**32


@dataclass(frozen=True, eq=False)
class Batch:
    """B rows padded on the right to T tokens.

    tokens (B, T); lengths (B,) tokens of each row; and positions (B, T), False in padding and in column 0: supervised,
    whose token is learned; held, at which the model is held to its teacher; prompts, before what is learned, where
    `training.prompt_weight` counts them. The last two are None where there are none.
    """

    tokens: NDArray[np.int32]
    supervised: NDArray[np.bool_]
    lengths: NDArray[np.int32]
    held: NDArray[np.bool_] | None = None
    prompts: NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class Earlier:
    """What joins the new rows of a step: rows to replay, by source, and texts to be held on."""

    replay: Sequence[Sequence[Row]] = ()
    texts: Sequence[Row] = ()


NO_RETENTION = RetentionConfig(recipe="none")
NOTHING_EARLIER = Earlier()


@dataclass(frozen=True)
class _Use:
    """A row in a step, and what for: learned, held to the teacher, or both."""

    row: Row
    learned: bool = True
    held: bool = False


def collate(rows: Sequence[Row], pad_id: int) -> Batch:
    """The rows as one batch, in their order. Raises DataError when no token of theirs is supervised."""
    return _collate([_Use(row) for row in rows], pad_id)


def held_batches(rows: Sequence[Row], batch_size: int, pad_id: int) -> Iterator[Batch]:
    """Every row once, from the shortest to the longest, held at its supervised positions and learned at none."""
    by_length = sorted(rows, key=lambda row: len(row.tokens))
    for start in range(0, len(rows), batch_size):
        chosen = by_length[start : start + batch_size]
        yield _collate([_Use(row, learned=False, held=True) for row in chosen], pad_id)


def _collate(uses: Sequence[_Use], pad_id: int, with_prompts: bool = False) -> Batch:
    lengths = np.array([len(use.row.tokens) for use in uses], dtype=np.int32)
    tokens = np.full((len(uses), lengths.max()), pad_id, dtype=np.int32)
    supervised, held, prompts = (np.zeros(tokens.shape, dtype=bool) for _ in range(3))
    for index, use in enumerate(uses):
        tokens[index, : lengths[index]] = use.row.tokens
        for wanted, mask in ((use.learned, supervised), (use.held, held)):
            if wanted:
                mask[index, : lengths[index]] = use.row.supervised
        prompts[index, : lengths[index]] = use.learned & ~use.row.supervised
    supervised[:, 0] = held[:, 0] = prompts[:, 0] = False
    if not (supervised.any() or held.any()):
        raise DataError(f"a batch of {len(uses)} rows has no supervised token. Run nestune validate again.")
    counted = with_prompts and bool(prompts.any())
    return Batch(tokens, supervised, lengths, held if held.any() else None, prompts if counted else None)


def evaluation_batches(rows: Sequence[Row], batch_size: int, pad_id: int) -> Iterator[Batch]:
    """Every row once, from the shortest to the longest."""
    by_length = sorted(rows, key=lambda row: len(row.tokens))
    for start in range(0, len(rows), batch_size):
        yield collate(by_length[start : start + batch_size], pad_id)


def training_steps(
    rows: Sequence[Row],
    training: TrainingConfig,
    pad_id: int,
    retention: RetentionConfig = NO_RETENTION,
    earlier: Earlier = NOTHING_EARLIER,
    after: int = 0,
) -> Iterator[list[Batch]]:
    """The micro-batches of one step after the other, without end, from the step after `after` on.

    Every row comes once an epoch; the last micro-batch of an epoch is smaller when the rows do not divide. What
    `retention` says of replay and KL joins the steps that are its multiples (KL once it has begun), spread
    evenly over the micro-batches. Where a share of the rows gives way to it, so many fewer new ones are in a step.
    Raises DataError when there are no rows, or none in a source.
    """
    if not rows or not all(earlier.replay):
        raise DataError("there are no rows to train on or to replay. Run nestune validate again.")
    parts, whole = training.gradient_accumulation_steps, training.batch_size * training.gradient_accumulation_steps
    replay, kl = retention.replay, retention.kl if retention.kl is not None and retention.kl.weight else None
    batches = _new_batches(rows, training.batch_size, training.seed)
    singly = (index for batch in batches for index in batch)
    replayed = _replayed(earlier.replay, replay.balance, training.seed) if earlier.replay else iter(())
    texts = _shuffled_passes(earlier.texts, training.seed, TEXTS) if earlier.texts else iter(())
    shares = [
        joining.rows_per_step < 1
        for joining, there in ((replay, earlier.replay), (kl, earlier.texts))
        if joining is not None and there
    ]
    free = kl.free_steps(training.steps) if kl is not None else 0
    for step in count(1):
        held = kl is not None and step > free and step % kl.every == 0
        again = _due_rows(replay.rows_per_step, replay.every, step, whole) if earlier.replay else 0
        told = _due_rows(kl.rows_per_step, kl.every, step, whole) if held and kl is not None and earlier.texts else 0
        giving_way = (again if replay.rows_per_step < 1 else 0) + (told if kl and kl.rows_per_step < 1 else 0)
        sizes = [training.batch_size - (giving_way + parts - 1 - part) // parts for part in range(parts)]
        taken = [islice(singly, max(0, size)) for size in sizes] if any(shares) else islice(batches, parts)
        micro_batches = [[_Use(rows[index]) for index in batch] for batch in taken]
        extra = [_Use(row, held=held and kl is not None and kl.replayed) for row in islice(replayed, again)]
        extra += [_Use(row, learned=False, held=True) for row in islice(texts, told)]
        for index, use in enumerate(extra):
            micro_batches[index % parts].append(use)
        if step > after:
            yield [_collate(batch, pad_id, training.prompt_weight > 0) for batch in micro_batches]


def _due_rows(per_step: float, every: int, step: int, rows: int) -> int:
    """How many rows join a step of so many, when `per_step` of them, or that share, join every k-th one.

    What is left of a row when the shares of all steps so far are added up waits for a later step.
    """
    if step % every:
        return 0
    if per_step >= 1:
        return int(per_step)
    turn = step // every
    # The addition keeps 0.29 * 100, a little below 29 in floating point, from becoming 28.
    through, before = (math.floor(turns * per_step * rows + 1e-9) for turns in (turn, turn - 1))
    return through - before


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


def _replayed(sources: Sequence[Sequence[Row]], balance: float, seed: int) -> Iterator[Row]:
    """Rows of sources of n rows, each as often as n ** balance says, in turn; a source is shuffled anew when used up.

    The next row is of the source that is furthest behind its share, of several the first.
    """
    passes = [_shuffled_passes(source, seed, number) for number, source in enumerate(sources, start=1)]
    shares = np.array([float(len(source)) ** balance for source in sources])
    shares /= shares.sum()
    drawn = np.zeros(len(sources))
    for number in count(1):
        # The rounding keeps equal shares equal, whatever their sums are in floating point.
        source = int(np.argmax(np.round(number * shares - drawn, 9)))
        drawn[source] += 1
        yield next(passes[source])


def _shuffled_passes(rows: Sequence[Row], seed: int, source: int) -> Iterator[Row]:
    for number in count():
        # The third number, which is never 0, keeps this stream apart from that of the new rows.
        for index in np.random.default_rng([seed, number, source]).permutation(len(rows)):
            yield rows[index]


def _cut(numbers: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
    return [numbers[start : start + size] for start in range(0, len(numbers), size)]
