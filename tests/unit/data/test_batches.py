from collections import Counter
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nestune.config import KlConfig, ReplayConfig, RetentionConfig, TrainingConfig
from nestune.data.batches import Earlier, collate, evaluation_batches, held_batches, training_steps
from nestune.data.tokens import Row
from nestune.errors import DataError

PAD = 0


def row(number: int, length: int) -> Row:
    """A row that its first token tells from all others; all but that token are supervised."""
    tokens = np.full(length, number, dtype=np.int32)
    supervised = np.arange(length) > 0
    return Row(tokens, supervised, None, None)


def rows_of(lengths: list[int], first: int = 1) -> list[Row]:
    return [row(number, length) for number, length in enumerate(lengths, start=first)]


def drawn(steps: list) -> list[list[list[int]]]:
    """The rows of each micro-batch of each step, by number."""
    return [[batch.tokens[:, 0].tolist() for batch in micro_batches] for micro_batches in steps]


def replaying(
    rows_per_step: float, every: int = 1, kl: KlConfig | None = None, balance: float = 0.0
) -> RetentionConfig:
    replay = ReplayConfig(files=("earlier.jsonl",), rows_per_step=rows_per_step, every=every, balance=balance)
    return RetentionConfig(recipe="none", replay=replay, kl=kl)


LENGTHS = st.lists(st.integers(2, 30), min_size=1, max_size=60)


@given(LENGTHS)
def test_a_batch_holds_every_row_padded_on_the_right(lengths):
    rows = rows_of(lengths)
    batch = collate(rows, PAD)
    assert batch.tokens.shape == batch.supervised.shape == (len(rows), max(lengths))
    assert batch.lengths.tolist() == lengths
    for index, row in enumerate(rows):
        assert batch.tokens[index, : lengths[index]].tolist() == row.tokens.tolist()
        assert batch.supervised[index, : lengths[index]].tolist() == row.supervised.tolist()
        assert (batch.tokens[index, lengths[index] :] == PAD).all()
        assert not batch.supervised[index, lengths[index] :].any()
    assert (batch.tokens.dtype, batch.supervised.dtype, batch.lengths.dtype) == (np.int32, bool, np.int32)


def test_the_first_token_of_a_row_is_never_supervised():
    everything = Row(np.ones(3, np.int32), np.ones(3, bool), None, None)
    assert collate([everything], PAD).supervised.tolist() == [[False, True, True]]


def test_a_batch_with_nothing_to_learn_is_an_error():
    with pytest.raises(DataError, match="no supervised token"):
        collate([Row(np.ones(3, np.int32), np.zeros(3, bool), None, None)], PAD)


@given(LENGTHS, st.integers(1, 9))
def test_evaluation_sees_every_row_once(lengths, batch_size):
    batches = list(evaluation_batches(rows_of(lengths), batch_size, PAD))
    seen = [number for batch in batches for number in batch.tokens[:, 0].tolist()]
    assert sorted(seen) == list(range(1, len(lengths) + 1))
    assert all(len(batch.lengths) == batch_size for batch in batches[:-1])


@given(LENGTHS, st.integers(1, 9), st.integers(0, 2**32))
def test_an_epoch_of_training_sees_every_row_once_and_keeps_the_incomplete_batch(lengths, batch_size, seed):
    rows = rows_of(lengths)
    batches_of_an_epoch = -(-len(rows) // batch_size)
    steps = training_steps(rows, TrainingConfig(batch_size=batch_size, seed=seed), PAD)
    for _ in range(3):
        epoch = [batch for (batch,) in drawn(list(islice(steps, batches_of_an_epoch)))]
        assert sorted(number for batch in epoch for number in batch) == list(range(1, len(rows) + 1))
        sizes = Counter(map(len, epoch))
        rest = len(rows) % batch_size
        assert sizes == Counter({batch_size: len(rows) // batch_size}) + Counter([rest] if rest else [])


def test_the_order_depends_on_the_seed_alone():
    def order(seed: int) -> list:
        return drawn(list(islice(training_steps(rows_of([5] * 40), TrainingConfig(batch_size=4, seed=seed), PAD), 20)))

    assert order(1) == order(1)
    assert order(1) != order(2)
    assert order(1)[:10] != order(1)[10:]  # the second epoch is shuffled anew


def test_rows_of_like_length_share_a_batch():
    lengths = np.random.default_rng(0).integers(2, 200, size=1000).tolist()
    steps = training_steps(rows_of(lengths), TrainingConfig(batch_size=10), PAD)
    batches = [batch for (batch,) in islice(steps, 100)]
    padding = 1 - sum(lengths) / sum(batch.tokens.size for batch in batches)
    assert padding < 0.05  # in random batches of these lengths it is about 0.45
    means = np.array([batch.lengths.mean() for batch in batches])
    assert abs(np.corrcoef(means, np.arange(100))[0, 1]) < 0.3  # and short ones do not all come first


def test_a_step_has_as_many_micro_batches_as_gradients_are_accumulated():
    training = TrainingConfig(batch_size=2, gradient_accumulation_steps=3)
    steps = drawn(list(islice(training_steps(rows_of([4] * 12), training, PAD), 2)))
    assert [[len(batch) for batch in step] for step in steps] == [[2, 2, 2], [2, 2, 2]]
    assert sorted(number for step in steps for batch in step for number in batch) == list(range(1, 13))


def test_replayed_rows_spread_evenly_over_the_micro_batches_of_each_step():
    training = TrainingConfig(batch_size=2, gradient_accumulation_steps=3)
    replay = [rows_of([4] * 5, first=100), rows_of([4] * 3, first=200)]
    steps = drawn(list(islice(training_steps(rows_of([4] * 12), training, PAD, replaying(4), Earlier(replay)), 15)))
    assert all([len(batch) for batch in step] == [4, 3, 3] for step in steps)
    old = [[number for batch in step for number in batch if number >= 100] for step in steps]
    assert all(len(step) == 4 for step in old)
    # Drawn in turn from both sources, and each source is used up before it starts anew.
    assert all(Counter(number // 100 for number in step) == {1: 2, 2: 2} for step in old)
    assert Counter(number for step in old for number in step) == dict.fromkeys(range(100, 105), 6) | dict.fromkeys(
        range(200, 203), 10
    )


def test_sources_are_drawn_in_turn_across_steps():
    replay = [rows_of([4] * 2, first=100), rows_of([4] * 2, first=200), rows_of([4] * 2, first=300)]
    steps = training_steps(rows_of([4] * 4), TrainingConfig(batch_size=1), PAD, replaying(2), Earlier(replay))
    sources = [number // 100 for ((_, *old),) in drawn(list(islice(steps, 6))) for number in old]
    assert sources == [1, 2, 3] * 4


@given(st.lists(st.integers(1, 60), min_size=1, max_size=5), st.sampled_from([0.0, 0.5, 1.0]), st.integers(1, 90))
def test_a_source_of_n_rows_is_drawn_from_as_n_to_the_power_of_the_balance(sizes, balance, draws):
    replay = [rows_of([4] * size, 100 * number) for number, size in enumerate(sizes, start=1)]
    retention = replaying(1, balance=balance)
    steps = training_steps(rows_of([4] * 4), TrainingConfig(batch_size=1), PAD, retention, Earlier(replay))
    drawn_from = Counter(number // 100 for ((_, number),) in drawn(list(islice(steps, draws))))
    whole = sum(size**balance for size in sizes)
    for number, size in enumerate(sizes, start=1):
        assert abs(drawn_from[number] - draws * size**balance / whole) < len(sizes)


def test_a_source_is_shuffled_anew_each_time_it_is_used_up():
    steps = training_steps(
        rows_of([4]), TrainingConfig(batch_size=1), PAD, replaying(20), Earlier([rows_of([4] * 20, 100)])
    )
    first, second = ([number for number in batch if number >= 100] for (batch,) in drawn(list(islice(steps, 2))))
    assert sorted(first) == sorted(second) == list(range(100, 120))
    assert first != second


def test_replay_leaves_the_new_rows_in_their_order():
    rows, training = rows_of([4, 9, 3, 7, 5]), TrainingConfig(batch_size=2)
    plain = drawn(list(islice(training_steps(rows, training, PAD), 9)))
    replayed = drawn(
        list(islice(training_steps(rows, training, PAD, replaying(1), Earlier([rows_of([4] * 3, 100)])), 9))
    )
    assert [[batch[:-1] for batch in step] for step in replayed] == plain


def test_no_rows_are_an_error_not_an_endless_search():
    with pytest.raises(DataError, match="no rows"):
        next(training_steps([], TrainingConfig(), PAD))
    with pytest.raises(DataError, match="no rows"):
        next(training_steps(rows_of([4]), TrainingConfig(), PAD, replaying(1), Earlier([[]])))


@pytest.mark.parametrize(("share", "batch_size"), [(0.5, 16), (0.1, 10), (0.01, 16), (0.29, 100)])
def test_a_share_of_the_steps_rows_gives_way_to_replayed_ones(share, batch_size):
    training, new, earlier = TrainingConfig(batch_size=batch_size), rows_of([4] * 40), rows_of([4] * 7, 1000)
    steps = drawn(list(islice(training_steps(new, training, PAD, replaying(share), Earlier([earlier])), 100)))
    numbers = [number for (batch,) in steps for number in batch]
    assert {len(batch) for (batch,) in steps} == {batch_size}
    replayed = [number for number in numbers if number >= 1000]
    assert len(replayed) == round(share * batch_size * 100)
    # What gave way is not lost: the new rows come in whole epochs all the same.
    drawn_new = [number for number in numbers if number < 1000]
    whole = len(drawn_new) // 40 * 40
    assert Counter(Counter(drawn_new[:whole]).values()) == {len(drawn_new) // 40: 40}


def test_shares_of_replay_and_of_texts_give_way_side_by_side():
    training, kl = TrainingConfig(batch_size=16), KlConfig(rows_per_step=0.25, every=2)
    earlier = Earlier([rows_of([4] * 7, 100)], rows_of([4] * 5, 200))
    steps = drawn(list(islice(training_steps(rows_of([4] * 40), training, PAD, replaying(0.5, kl=kl), earlier), 6)))
    for step, (batch,) in enumerate(steps, start=1):
        kinds = Counter(number // 100 for number in batch)
        assert kinds == ({0: 4, 1: 8, 2: 4} if step % 2 == 0 else {0: 8, 1: 8})


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3))
def test_replay_and_texts_join_every_kth_step_only(every, kl_every, parts):
    training = TrainingConfig(batch_size=2, gradient_accumulation_steps=parts)
    kl = KlConfig(every=kl_every, rows_per_step=3, replayed=True)
    earlier = Earlier([rows_of([4] * 5, 100)], rows_of([5] * 4, 200))
    steps = islice(training_steps(rows_of([4] * 8), training, PAD, replaying(2, every, kl), earlier), 12)
    for step, micro_batches in enumerate(steps, start=1):
        replayed, texts = [], []
        for batch in micro_batches:
            for index, number in enumerate(batch.tokens[:, 0].tolist()):
                positions = (np.arange(batch.tokens.shape[1]) > 0) & (
                    np.arange(batch.tokens.shape[1]) < batch.lengths[index]
                )
                held = batch.held[index].tolist() if batch.held is not None else [False] * len(positions)
                is_held = step % kl_every == 0 and number >= 100
                assert held == (positions & is_held).tolist()
                assert batch.supervised[index].tolist() == (positions & (number < 200)).tolist()
                replayed += [number] if 100 <= number < 200 else []
                texts += [number] if number >= 200 else []
        assert len(replayed) == (2 if step % every == 0 else 0)
        assert len(texts) == (3 if step % kl_every == 0 else 0)


@given(st.fractions(0, 1).filter(lambda after: after < 1), st.integers(1, 12), st.integers(1, 3))
def test_texts_and_holding_begin_after_a_share_of_the_steps_as_if_they_had_never_begun_before(after, steps, every):
    training = TrainingConfig(batch_size=4, steps=steps)
    kl = KlConfig(after=float(after), every=every, rows_per_step=0.5, replayed=True)
    new, earlier = rows_of([4] * 8), Earlier([rows_of([4] * 5, 100)], rows_of([5] * 4, 200))
    held = list(islice(training_steps(new, training, PAD, replaying(2, kl=kl), earlier), steps))
    free = int(float(after) * steps)
    plain = list(islice(training_steps(new, training, PAD, replaying(2), replace(earlier, texts=())), free))
    assert drawn(held[:free]) == drawn(plain)
    for step, (batch,) in enumerate(held, start=1):
        is_held = step > free and step % every == 0
        assert (batch.held is not None) == is_held
        assert sum(number >= 200 for number in batch.tokens[:, 0].tolist()) == (2 if is_held else 0)


def test_a_weight_of_zero_gives_the_batches_of_a_run_without_kl():
    training, texts = TrainingConfig(batch_size=3), Earlier(texts=rows_of([6] * 4, 200))
    without = islice(training_steps(rows_of([4] * 8), training, PAD), 9)
    weightless = islice(training_steps(rows_of([4] * 8), training, PAD, replaying(8, kl=KlConfig(weight=0)), texts), 9)
    assert drawn(list(without)) == drawn(list(weightless))


@given(LENGTHS, st.integers(1, 9))
def test_held_batches_hold_every_row_once_and_learn_none(lengths, batch_size):
    batches = list(held_batches(rows_of(lengths), batch_size, PAD))
    assert sorted(number for batch in batches for number in batch.tokens[:, 0].tolist()) == list(
        range(1, len(lengths) + 1)
    )
    assert sum(int(batch.held.sum()) for batch in batches) == sum(length - 1 for length in lengths)
    assert not any(batch.supervised.any() for batch in batches)
