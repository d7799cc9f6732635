"""Files that somebody else may have made: read only when they are ordinary files of a bearable size and depth."""

import json
import stat
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 2**25
MAX_DEPTH = 64
# As far as 64 bits count; Python itself would go on without end.
MAX_NUMBER = 2**64
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def read_bounded(path: Path, max_bytes: int = MAX_JSON_BYTES) -> bytes:
    """The content of an ordinary file. Raises OSError, or ValueError when it is none, or larger than `max_bytes`.

    A named pipe would keep its reader waiting for ever, and a device may have no end.
    """
    kind = kind_of(path)
    if kind is not None:
        raise ValueError(f"it is {kind}, not a file")
    with path.open("rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"it has {path.stat().st_size} bytes, and at most {max_bytes} are read")
    return content


def kind_of(path: Path) -> str | None:
    """What is at a path, links followed; None: an ordinary file. Raises OSError when there is nothing."""
    try:
        mode = path.stat().st_mode
    except ValueError as error:  # a NUL character in the name
        raise FileNotFoundError(2, f"no such file ({error})") from None
    return None if stat.S_ISREG(mode) else KINDS.get(stat.S_IFMT(mode), "something else")


def folder_at(path: str) -> Path | None:
    """The folder that a path means, `~` written out; None when there is none, or no path can be like that."""
    try:
        folder = Path(path).expanduser()
        return folder if folder.is_dir() else None
    except (OSError, RuntimeError, ValueError):  # a name longer than names can be; the home of nobody
        return None


def parse_json(content: bytes, any_number: bool = False) -> Any:
    """The value of a JSON text in UTF-8, whose depth any reader can bear, and whose whole numbers have 64 bits at most.

    `any_number` is for readers that look at every number themselves. Raises ValueError when it is not so.
    """
    try:
        value = json.loads(content.decode("utf-8"))
    except RecursionError:
        raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep") from None
    _check(value, any_number)
    return value


def _check(value: Any, any_number: bool) -> None:
    """Level by level, so that no depth is too much for it."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = list(chain.from_iterable(_parts(part, any_number) for part in level))
        if not level:
            return
    raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")


def _parts(value: Any, any_number: bool) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value.keys()
        yield from value.values()
    elif isinstance(value, list):
        yield from value
    elif isinstance(value, str):
        value.encode("utf-8")  # UnicodeEncodeError, a ValueError, for half a surrogate pair
    elif isinstance(value, int) and abs(value) >= MAX_NUMBER and not any_number:
        raise ValueError(f"it holds a whole number of {value.bit_length()} bits; at most 64 are read")
