"""Records of JSONL files, read line by line; what is wrong with a line becomes faults, never an exception."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, Literal

from nestune.errors import DataError, Fault

Kind = Literal["messages", "completion", "text"]

FORMATS: dict[Kind, tuple[str, ...]] = {
    "messages": ("messages",),
    "completion": ("prompt", "completion"),
    "text": ("text",),
}
ROLES = ("system", "user", "assistant", "tool")
MAX_DEPTH = 64
# A hostile line can hold a million faults; its first ones tell enough.
MAX_FAULTS_OF_A_RECORD = 20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
SHAPES = '{"messages": [...]}, {"prompt": "...", "completion": "..."} or {"text": "..."}'

# Field, problem and remedy. A problem reads `kind: value seen`, so that a report can count kinds.
Finding = tuple[str, str, str]


@dataclass(frozen=True)
class Line:
    """A line of a file; `content` has no byte order mark and no line end.

    `size` counts the bytes of the whole line; of one longer than `limit` only the beginning is in `content`.
    """

    number: int
    content: bytes
    size: int
    limit: int

    @property
    def is_blank(self) -> bool:
        return self.size <= self.limit and not self.content.strip()


@dataclass(frozen=True)
class Record:
    """One good record: where it stands, its format, and all its keys as they were."""

    file: str
    line: int
    kind: Kind
    content: dict[str, Any]

    @property
    def digest(self) -> bytes:
        """SHA-256 of what is learned, as canonical JSON: two records that differ only in an `id` are the same."""
        learned = {key: self.content[key] for key in FORMATS[self.kind]}
        return hashlib.sha256(_dump(learned, sort_keys=True).encode("utf-8")).digest()

    @property
    def ignored_keys(self) -> list[str]:
        """Keys beside those of the format, such as `id` or `source`."""
        return [key for key in self.content if key not in FORMATS[self.kind]]

    def as_json(self) -> str:
        """The record on one line."""
        return _dump(self.content)


def read_records(path: Path, max_line_bytes: int, tally: Counter[str] | None = None) -> Iterator[Record | Fault]:
    """The records of a file in order, and every fault of those that cannot be used; a blank line is neither.

    `tally` counts `lines` that are not blank and `blank_lines`. Raises DataError when the file cannot be opened.
    """
    tally = Counter() if tally is None else tally
    empty = True
    for line in read_lines(path, max_line_bytes):
        if line.is_blank:
            tally["blank_lines"] += 1
            continue
        empty = False
        tally["lines"] += 1
        outcome = parse(str(path), line)
        if isinstance(outcome, Record):
            yield outcome
        else:
            yield from outcome
    if empty:
        yield Fault(str(path), 0, "", "empty file: no records", "Write a record a line into it, or leave it out")


def digests_in(paths: Iterable[Path]) -> set[bytes]:
    """The digest of each good record of some files."""
    return {
        record.digest
        for path in paths
        for record in read_records(path, max(1, path.stat().st_size))
        if isinstance(record, Record)
    }


def read_lines(path: Path, max_line_bytes: int) -> Iterator[Line]:
    """The lines of a file; never holds more than `max_line_bytes` of one."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}. Check its permissions.") from None
    with file:
        if file.peek(len(BYTE_ORDER_MARK)).startswith(BYTE_ORDER_MARK):
            file.read(len(BYTE_ORDER_MARK))
        for number in count(1):
            content = file.readline(max_line_bytes + 1)
            if not content:
                return
            size = len(content.rstrip(b"\n"))
            rest = content
            while size > max_line_bytes and not rest.endswith(b"\n") and (rest := file.readline(max_line_bytes)):
                size += len(rest.rstrip(b"\n"))
            yield Line(number, content[:max_line_bytes].rstrip(b"\r\n"), size, max_line_bytes)


def parse(file: str, line: Line) -> Record | list[Fault]:
    """The record on a line, or all its faults (the first 20)."""
    content, findings = decode(line, SHAPES)
    if isinstance(content, dict):
        findings = chain(findings, _shape_findings(content))
    faults = [Fault(file, line.number, *finding) for finding in islice(findings, MAX_FAULTS_OF_A_RECORD)]
    if faults:
        return faults
    kind = next(kind for kind, keys in FORMATS.items() if keys[0] in content)
    return Record(file, line.number, kind, content)


def decode(line: Line, shapes: str) -> tuple[Any, Iterator[Finding]]:
    """The JSON value on a line with what is wrong with its values; None where it cannot be read.

    shapes: the objects that are taken, for the remedy of a line that holds none.
    """
    mend = "Write each record as one JSON object on one line"
    if line.size > line.limit:
        problem = f"line too long: {line.size} bytes; data.max_line_bytes is {line.limit}"
        return None, iter([("", problem, "Split the record, or raise data.max_line_bytes")])
    repeated: list[str] = []
    try:
        text = line.content.decode("utf-8")
        value = json.loads(text, object_pairs_hook=lambda pairs: _object_noting_repeated_keys(pairs, repeated))
        bad_values = list(islice(value_findings(value), MAX_FAULTS_OF_A_RECORD))
    except UnicodeDecodeError as error:
        problem = f"not UTF-8: byte 0x{line.content[error.start]:02x} at byte {error.start + 1} of the line"
        return None, iter([("", problem, "Save the file as UTF-8")])
    except json.JSONDecodeError as error:
        if "\0" in text:
            problem = f"NUL character: at column {text.index(chr(0)) + 1}"
            return None, iter([("", problem, "Remove it; if the file is UTF-16, save it as UTF-8")])
        seen = f"seen {text[error.pos : error.pos + 20]!r}" if error.pos < len(text) else "the line ends there"
        return None, iter([("", f"broken JSON: {error.msg} at column {error.colno}, {seen}", mend)])
    except RecursionError:
        return None, iter([("", f"nested too deeply: more than {MAX_DEPTH} levels of brackets", "Flatten the record")])
    except ValueError as error:
        return None, iter([("", f"broken JSON: {error}", mend)])
    findings = [
        (_path("", key), "repeated key: the object has it more than once", "Keep one of them") for key in repeated
    ]
    if not isinstance(value, dict):
        problem = f"not an object: {json_type(value)}, {value!r:.60}"
        findings.append(("", problem, f"Write each record as one object on one line: {shapes}"))
    return value, chain(findings, bad_values)


def _object_noting_repeated_keys(pairs: list[tuple[str, Any]], repeated: list[str]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        repeated += [key for key, times in Counter(key for key, _ in pairs).items() if times > 1]
    return result


def value_findings(value: Any, path: str = "", depth: int = 0) -> Iterator[Finding]:
    """Numbers and characters that no JSON or no UTF-8 file can hold; raises RecursionError below 64 levels."""
    if depth > MAX_DEPTH:
        raise RecursionError
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _bad_characters(key, _path(path, key))
            yield from value_findings(item, _path(path, key), depth + 1)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from value_findings(item, f"{path}[{index}]", depth + 1)
    elif isinstance(value, str):
        yield from _bad_characters(value, path)
    elif isinstance(value, float) and not math.isfinite(value):
        yield path, f"not a finite number: {value}", "JSON has no such number; write null, or leave the key out"


def _bad_characters(text: str, path: str) -> Iterator[Finding]:
    if "\0" in text:
        yield path, f"NUL character: at character {text.index(chr(0)) + 1} of the text", "Remove it"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        seen = f"U+{ord(text[error.start]):04X} at character {error.start + 1} of the text"
        yield path, f"unpaired surrogate: {seen}", "Remove it, or write the whole pair"


def _shape_findings(content: dict[str, Any]) -> Iterator[Finding]:
    kinds = [kind for kind, keys in FORMATS.items() if any(key in content for key in keys)]
    if len(kinds) != 1:
        which = "unknown shape" if not kinds else "more than one shape"
        yield "", f"{which}: {keys_of(content)}", f"Write each record as {SHAPES}"
    elif kinds == ["messages"]:
        yield from turn_findings(content["messages"])
        yield from _last_turn_findings(content["messages"])
    else:
        for key in FORMATS[kinds[0]]:
            yield from text_findings(content, key, "")


def turn_findings(messages: Any) -> Iterator[Finding]:
    """What is wrong with the turns of a chat, whoever speaks last."""
    if not isinstance(messages, list) or not messages:
        problem = f"not a list of turns: {messages!r:.60}"
        yield "messages", problem, 'Write [{"role": "user", "content": "..."}, {"role": "assistant", ...}]'
        return
    user_spoke = False
    for index, message in enumerate(messages):
        field = f"messages[{index}]"
        if not isinstance(message, dict):
            problem = f"not an object: {json_type(message)}, {message!r:.60}"
            yield field, problem, 'Write each turn as {"role": "...", "content": "..."}'
            continue
        role = message.get("role")
        user_spoke = user_spoke or role == "user"
        if "role" not in message:
            yield f"{field}.role", f"missing: {keys_of(message)}", f"Add it: one of {', '.join(ROLES)}"
        elif role not in ROLES:
            yield f"{field}.role", f"wrong role: {role!r:.60}", f"Use one of {', '.join(ROLES)}"
        elif role == "system" and index > 0:
            yield f"{field}.role", f"system turn not first: it is turn {index + 1}", "Move it to the front"
        elif role == "assistant" and not user_spoke:
            yield f"{field}.role", "no user turn before it: the assistant speaks first", "Put a user's turn before it"
        yield from text_findings(message, "content", field)


def _last_turn_findings(messages: Any) -> Iterator[Finding]:
    last = messages[-1] if isinstance(messages, list) and messages else None
    if isinstance(last, dict) and last.get("role") in ROLES and last["role"] != "assistant":
        problem = f"last turn not the assistant's: {last['role']!r}"
        yield f"messages[{len(messages) - 1}].role", problem, "End with the assistant's turn; that is what is learned"


def text_findings(owner: Mapping[str, Any], key: str, path: str) -> Iterator[Finding]:
    """What is wrong with the text under a key of an object."""
    field = _path(path, key)
    if key not in owner:
        yield field, f"missing: {keys_of(owner)}", "Add it"
    elif not isinstance(owner[key], str):
        yield field, f"not a text: {json_type(owner[key])}, {owner[key]!r:.60}", "Write it as a string"
    elif not owner[key].strip():
        yield field, f"empty: {owner[key]!r:.60}", "Fill it in, or remove the record"


def keys_of(content: Mapping[str, Any]) -> str:
    """The keys of an object, the first ones, as a finding tells them."""
    if not content:
        return "the object has no keys"
    shown = [f"{key!r:.40}" for key in islice(content, 8)]
    return f"the keys are {', '.join(shown)}{', ...' if len(content) > len(shown) else ''}"


def _path(parent: str, key: str) -> str:
    if not key.isidentifier():
        return f"{parent}[{key!r:.40}]"
    return f"{parent}.{key}" if parent else key


def json_type(value: Any) -> str:
    """What a value is called in JSON."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _dump(value: Any, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"), sort_keys=sort_keys)
