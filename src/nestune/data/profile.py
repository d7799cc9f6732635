"""The profile of a dataset: one row for every accepted record, in columns of numbers."""

from array import array
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nestune.data.records import FORMATS, Record
from nestune.data.tokens import Row

if TYPE_CHECKING:
    import pandas

KINDS = tuple(FORMATS)


class Profile:
    """Where each record came from, the set it is in, and how many tokens it has; about 70 bytes a record."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._numbers: dict[str, int] = {}
        self._set, self._file, self._line = array("L"), array("L"), array("Q")
        self._kind, self._truncated = array("B"), array("B")
        self._tokens, self._supervised = array("L"), array("L")
        self._digests = bytearray()

    def __len__(self) -> int:
        return len(self._set)

    def add(self, set_name: str, record: Record, digest: bytes, row: Row) -> int:
        """Note an accepted record; returns its number, counted from 0."""
        self._set.append(self._number(set_name))
        self._file.append(self._number(record.file))
        self._line.append(record.line)
        self._kind.append(KINDS.index(record.kind))
        self._tokens.append(len(row.tokens))
        self._supervised.append(int(row.supervised.sum()))
        self._truncated.append(row.truncated)
        self._digests += digest
        return len(self) - 1

    def set_of(self, index: int) -> str:
        """The set that a record is in."""
        return self._names[self._set[index]]

    def move(self, index: int, set_name: str) -> None:
        """Put a record into another set."""
        self._set[index] = self._number(set_name)

    def rows_of(self, set_name: str) -> NDArray[np.int64]:
        """The numbers of the records of a set, in the order of its file."""
        return np.flatnonzero(np.asarray(self._set) == self._number(set_name))

    def digest(self, index: int) -> bytes:
        """What the record holds, as 32 bytes."""
        return bytes(self._digests[32 * index : 32 * index + 32])

    def where(self, index: int) -> str:
        """The record's place, as file:line."""
        return f"{self._names[self._file[index]]}:{self._line[index]}"

    def frame(self) -> "pandas.DataFrame":
        """The profile as a table, for Great Expectations and for summaries."""
        import pandas

        names = pandas.Index(self._names)
        digests = self._digests.hex()
        return pandas.DataFrame(
            {
                "set": pandas.Categorical.from_codes(np.asarray(self._set, dtype=np.int64), names),
                "file": pandas.Categorical.from_codes(np.asarray(self._file, dtype=np.int64), names),
                "line": np.asarray(self._line, dtype=np.int64),
                "kind": pandas.Categorical.from_codes(np.asarray(self._kind, dtype=np.int64), pandas.Index(KINDS)),
                "tokens": np.asarray(self._tokens, dtype=np.int64),
                "supervised": np.asarray(self._supervised, dtype=np.int64),
                "truncated": np.asarray(self._truncated, dtype=bool),
                "digest": [digests[start : start + 64] for start in range(0, len(digests), 64)],
            }
        )

    def _number(self, name: str) -> int:
        number = self._numbers.setdefault(name, len(self._names))
        if number == len(self._names):
            self._names.append(name)
        return number
