"""Which records are held out, scored, or kept of many: by the hash of what they hold, whatever their order."""

import hashlib
import heapq
import math
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence

from nestune.data.records import Record
from nestune.data.tokens import Row
from nestune.errors import DataError, Fault


def choose_held_out(digests: Sequence[bytes], fraction: float, never: Container[bytes]) -> set[bytes]:
    """The records to hold out: a fraction of them rounded up, those with the smallest hash of their digest.

    The choice depends on what the records hold, not on their order, and mostly stays when records are added. All
    copies of a record go together. Raises DataError when nothing can be held out with something left to train on.
    """
    held_out = _smallest_hashes(digests, fraction, never)
    if not held_out:
        raise DataError(
            f"data.valid is {fraction:g}, but of the {len(digests)} records to train on none can be held out so that "
            "one is left to train on and the held-out one is not replayed. Add records, or name files in data.valid."
        )
    return held_out


def choose_half(digests: Sequence[bytes]) -> set[bytes]:
    """The half of `valid` that becomes `test`, chosen as `choose_held_out` does: no record on both sides.

    Raises DataError when there is one record, or copies of one, which cannot be divided.
    """
    half = _smallest_hashes(digests, 0.5, never=())
    if not half:
        raise DataError(
            "retention.strength chooses on one half of valid, and the other half is scored, but valid has only "
            f"{len(digests)} record{'s, all the same' if len(digests) > 1 else ''}. Hold out more (data.valid), name "
            "files to score in data.test, or leave retention.strength off."
        )
    return half


def _smallest_hashes(digests: Sequence[bytes], fraction: float, never: Container[bytes]) -> set[bytes]:
    """The digests with the smallest hash that make up a fraction, but never all; empty when there are no such."""
    # The subtraction keeps 0.55 * 100, a little above 55 in floating point, from becoming 56.
    wanted = max(1, math.ceil(fraction * len(digests) - 1e-9))
    copies = Counter(digests)
    candidates = (digest for digest in copies if digest not in never)
    chosen: set[bytes] = set()
    number = 0
    for digest in sorted(candidates, key=lambda digest: hashlib.sha256(digest).digest()):
        if number >= wanted or number + copies[digest] == len(digests):
            break
        chosen.add(digest)
        number += copies[digest]
    return chosen


def keep_some(
    outcomes: Iterable[tuple[Record, Row] | Fault], most: int, seed: int, tally: Counter[str]
) -> Iterator[tuple[Record, Row] | Fault]:
    """Every fault, and at most so many of the good records: those with the smallest hash of their digest and the seed.

    What is kept comes in its order, after the faults; no more than that is in memory. `tally` counts `left_out` ones.
    """
    faults: list[Fault] = []

    def good() -> Iterator[tuple[bytes, int, tuple[Record, Row]]]:
        for number, outcome in enumerate(outcomes):
            if isinstance(outcome, Fault):
                faults.append(outcome)
            else:
                tally["left_out"] += 1
                yield hashlib.sha256(f"{seed}:".encode() + outcome[0].digest).digest(), number, outcome

    kept = heapq.nsmallest(most, good(), key=lambda item: item[:2])
    tally["left_out"] -= len(kept)
    yield from faults
    for _, _, outcome in sorted(kept, key=lambda item: item[1]):
        yield outcome
