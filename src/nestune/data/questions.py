"""What a model is asked: a text, or the turns of a chat; what is wrong with a question becomes faults."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from nestune.data.records import (
    MAX_FAULTS_OF_A_RECORD,
    Finding,
    decode,
    json_type,
    keys_of,
    read_lines,
    text_findings,
    turn_findings,
    value_findings,
)
from nestune.errors import DataError, Fault

Turns = Sequence[Mapping[str, str]]
Question = str | Turns

SHAPES = '{"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}, ...]}'


def read_questions(path: Path, max_line_bytes: int) -> list[Question]:
    """The questions of a JSONL file, in order; raises DataError with the faults of all of them."""
    questions: list[Question] = []
    faults: list[Fault] = []
    for line in read_lines(path, max_line_bytes):
        if line.is_blank:
            continue
        content, unreadable = decode(line, SHAPES)
        findings = list(islice(unreadable, MAX_FAULTS_OF_A_RECORD)) or list(_shape_findings(content))
        faults += [Fault(str(path), line.number, *finding) for finding in findings]
        if not findings:
            questions.append(_asked_in(content))
    if faults:
        raise DataError(f"{path}: not every line is a question.", faults)
    if not questions:
        raise DataError(f"{path} holds no questions. Write one a line: {SHAPES}.")
    return questions


def check_questions(values: Sequence[Any], name: str) -> list[Question]:
    """Values of a request as questions: texts, or the objects of a file; raises DataError with the faults of all.

    name: what the faults call them, with their place counted from 0.
    """
    faults = [
        Fault(f"{name}[{place}]", 0, *finding) for place, value in enumerate(values) for finding in _findings(value)
    ]
    if faults:
        raise DataError(f"not every one of {name} is a question.", faults)
    return [_asked_in(value) for value in values]


def _asked_in(value: Any) -> Question:
    if isinstance(value, str):
        return value
    question: Question = value["messages"] if "messages" in value else value["prompt"]
    return question


def _findings(value: Any) -> list[Finding]:
    try:
        bad_values = list(islice(value_findings(value), MAX_FAULTS_OF_A_RECORD))
    except RecursionError:
        return [("", "nested too deeply", "Flatten it")]
    return bad_values or list(islice(_shape_findings(value), MAX_FAULTS_OF_A_RECORD))


def _shape_findings(value: Any) -> Iterator[Finding]:
    if isinstance(value, str):
        yield from (("", problem, remedy) for _, problem, remedy in text_findings({"text": value}, "text", ""))
    elif not isinstance(value, dict):
        yield "", f"not a question: {json_type(value)}, {value!r:.60}", f"Write a text, {SHAPES}"
    elif list(value) == ["messages"]:
        yield from turn_findings(value["messages"])
        yield from _last_turn_findings(value["messages"])
    elif list(value) == ["prompt"]:
        yield from text_findings(value, "prompt", "")
    else:
        yield "", f"not a question: {keys_of(value)}", f"Write {SHAPES}, and nothing beside it"


def _last_turn_findings(messages: Any) -> Iterator[Finding]:
    last = messages[-1] if isinstance(messages, list) and messages else None
    if isinstance(last, dict) and last.get("role") == "assistant":
        yield f"messages[{len(messages) - 1}].role", "last turn the assistant's", "End with the turn to be answered"
