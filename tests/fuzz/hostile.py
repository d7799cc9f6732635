"""Malformed inputs, made from valid ones or by hand, and the bounds in time and memory that each must keep."""

import json
import re
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from nestune.errors import NestuneError

Read = TypeVar("Read")

ROOT = Path(__file__).parents[2]

SECONDS = 60
MIBYTES = 256
ROOM = 2**32
REMEDY = re.compile(
    r"\b(add|choose|delete|flatten|give|go|keep|make|mend|move|must|name|pass|put|raise|read|remove|replace|restore|run|save|"
    r"see|set|shorten|split|take|train|unpack|use|write)\b",
    re.IGNORECASE,
)

# The same examples on every machine and at every run.
fuzz = settings(
    derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=False
)

# What numbers, texts and containers can be at their worst.
NASTY_NUMBERS = [0, -1, 2**31, 2**63, -(2**63), 2**64, 10**19, 10**400, 1.5, -0.0, 1e308, float("inf"), float("nan")]
NASTY_TEXTS = [
    "",
    " ",
    "\0",
    "\ud800",
    "../../x",
    "/etc/passwd",
    "~nobody-here/x",
    "a" * 5000,
    "\u202e",
    "\n",
    "{{7*7}}",
]
NASTY: list[Any] = [*NASTY_NUMBERS, *NASTY_TEXTS, None, True, [], {}, [[]], {"": ""}, [None], {"a": {"a": {"a": 1}}}]


def outcome(read: Callable[[], Read]) -> Read | str:
    """What reading gives, or the text of its error; fails on any other exception, a hang, or too much memory."""
    try:
        with bounded():
            return read()
    except NestuneError as error:
        text = str(error)
        assert REMEDY.search(text), f"no remedy in: {text}"
        assert len(text) < 20_000, "nobody reads that much"
        text.encode("utf-8", "backslashreplace")
        return text


@contextmanager
def bounded(seconds: float = SECONDS, mibytes: int = MIBYTES) -> Iterator[None]:
    """Fail when the block hangs, or when the process grows by more than so much at any time in it."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise AssertionError(f"still busy after {seconds} s")

    before = _restart_peak()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    if sys.platform == "linux":
        # What asks for more at once fails with MemoryError instead of taking the machine down.
        resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + ROOM, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        grown = (_peak() - before) / 2**20
        assert grown < mibytes, f"the process grew by {grown:.0f} MiB"


def _restart_peak() -> int:
    """Bytes in use now; from here on `_peak` counts anew, where the system can do that."""
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> int:
    if sys.platform == "linux":
        return _status("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _status(key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


@st.composite
def damaged(draw: st.DrawFn, valid: bytes) -> bytes:
    """A file with some bytes flipped, cut out, put in or repeated, or with its end cut off."""
    content = bytearray(valid)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content)))
        how = draw(st.sampled_from(["flip", "cut", "insert", "repeat", "end"]))
        if how == "flip" and at < len(content):
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "cut":
            del content[at : at + draw(st.integers(1, 20))]
        elif how == "insert":
            content[at:at] = draw(st.sampled_from(INSERTED))
        elif how == "repeat":
            content[at:at] = content[at : at + draw(st.integers(1, 200))]
        else:
            del content[at:]
    return bytes(content)


INSERTED = [
    *(b"\0", b"\xff", b"\xef\xbb\xbf", b"\r\n", b"\n", b"\t", b'"', b"'", b"{", b"}", b"[", b"]", b":", b",", b"\\"),
    *(b"&a ", b"*a", b"<<: ", b"!!", b"- ", b"? ", b"| ", b"> ", b"%", b"@", b"# ", b"---\n", b"...\n", b"\\ud800"),
    *(
        b"9" * 5000,
        b"[" * 3000,
        b'{"a":' * 3000,
        b"1e999",
        b"NaN",
        b"Infinity",
        b"-",
        b"0x" + b"F" * 9000,
        b"\xed\xa0\x80",
    ),
]


@st.composite
def altered(draw: st.DrawFn, valid: Any) -> Any:
    """A JSON value in which one to three parts are gone, of another type, renamed or nasty."""
    value = json.loads(json.dumps(valid))
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(value))
        if not places:
            return draw(st.sampled_from(NASTY))
        owner, key = draw(st.sampled_from(places))
        how = draw(st.sampled_from(["nasty", "nasty", "gone", "nested", "elsewhere"]))
        if how == "gone":
            del owner[key]
        elif how == "nested":
            owner[key] = _deep(owner[key], draw(st.sampled_from([1, 70, 400])))
        elif how == "elsewhere" and isinstance(owner, dict):
            owner[draw(st.sampled_from([text for text in NASTY_TEXTS if len(text) < 100]))] = owner.pop(key)
        else:
            owner[key] = draw(st.sampled_from(NASTY))
    return value


def _deep(value: Any, levels: int) -> Any:
    for _ in range(levels):
        value = [value]
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, dict | list):
        for key, item in list(value.items()) if isinstance(value, dict) else enumerate(value):
            yield value, key
            yield from _places(item)


def as_json(value: Any) -> bytes:
    """As JSON text, also what JSON does not have."""
    return json.dumps(value).encode("utf-8", "surrogatepass")
