import json
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizer import chat

from nestune.data.find_files import find_files
from nestune.data.records import Line, Record, parse, read_lines, read_records
from nestune.errors import DataError, Fault

LIMIT = 10_000_000
GOOD = b'{"text": "the sea is blue"}'


def parse_line(content: bytes, number: int = 1) -> Record | list[Fault]:
    return parse("a.jsonl", Line(number, content, len(content), LIMIT))


def turns(*messages: object) -> bytes:
    return json.dumps({"messages": messages}).encode()


USER = {"role": "user", "content": "what colour?"}
ASSISTANT = {"role": "assistant", "content": "blue"}

HOSTILE = {
    "broken JSON": (b'{"text": "a" "b"}', "", "broken JSON: Expecting ',' delimiter at column 14, seen '\"b\"}'"),
    "line that ends early": (b'{"text": "a"', "", "broken JSON: Expecting ',' delimiter at column 13, the line ends"),
    "number of 5000 digits": (b'{"text": ' + b"1" * 5000 + b"}", "", "broken JSON: Exceeds the limit"),
    "not UTF-8": (b'{"text": "caf\xe9"}', "", "not UTF-8: byte 0xe9 at byte 14 of the line"),
    "UTF-16": ('{"text": "a"}'.encode("utf-16"), "", "not UTF-8: byte 0xff at byte 1"),
    "raw NUL": (b'{"text": "a\x00b"}', "", "NUL character: at column 12"),
    "escaped NUL": (b'{"text": "a\\u0000b"}', "text", "NUL character: at character 2"),
    "NUL in a key": (b'{"text": "a", "\\u0000": 1}', "['\\x00']", "NUL character: at character 1"),
    "unpaired surrogate": (b'{"text": "a\\ud800"}', "text", "unpaired surrogate: U+D800 at character 2"),
    "NaN": (b'{"text": "a", "weight": NaN}', "weight", "not a finite number: nan"),
    "Infinity": (b'{"text": "a", "w": [1, -Infinity]}', "w[1]", "not a finite number: -inf"),
    "number beyond floats": (b'{"text": "a", "w": 1e999}', "w", "not a finite number: inf"),
    "repeated key": (b'{"text": "a", "text": "b"}', "text", "repeated key"),
    "list": (b'[{"text": "a"}]', "", "not an object: a list, [{'text': 'a'}]"),
    "string": (b'"a"', "", "not an object: a string, 'a'"),
    "null": (b"null", "", "not an object: null"),
    "100000 brackets": (b"[" * 100_000, "", "nested too deeply"),
    "65 levels": (b'{"text": "a", "b": ' + b"[" * 65 + b"]" * 65 + b"}", "", "nested too deeply: more than 64"),
    "unknown shape": (b'{"input": "a", "output": "b"}', "", "unknown shape: the keys are 'input', 'output'"),
    "no keys": (b"{}", "", "unknown shape: the object has no keys"),
    "two shapes": (b'{"text": "a", "prompt": "b"}', "", "more than one shape: the keys are 'text', 'prompt'"),
    "text not a string": (b'{"text": 3}', "text", "not a text: a number, 3"),
    "empty text": (b'{"text": " \\n"}', "text", "empty: ' \\n'"),
    "empty completion": (b'{"prompt": "a", "completion": ""}', "completion", "empty: ''"),
    "missing completion": (b'{"prompt": "a"}', "completion", "missing: the keys are 'prompt'"),
    "missing prompt": (b'{"completion": "a"}', "prompt", "missing: the keys are 'completion'"),
    "messages not a list": (b'{"messages": "hi"}', "messages", "not a list of turns: 'hi'"),
    "no messages": (b'{"messages": []}', "messages", "not a list of turns: []"),
    "turn not an object": (turns(USER, "hi"), "messages[1]", "not an object: a string, 'hi'"),
    "no role": (turns(USER, {"content": "a"}), "messages[1].role", "missing: the keys are 'content'"),
    "wrong role": (turns(USER, {"role": "bot", "content": "a"}), "messages[1].role", "wrong role: 'bot'"),
    "role that is a list": (turns(USER, {"role": [], "content": "a"}), "messages[1].role", "wrong role: []"),
    "no content": (turns(USER, {"role": "assistant"}), "messages[1].content", "missing: the keys are 'role'"),
    "content not a string": (turns(USER, ASSISTANT | {"content": None}), "messages[1].content", "not a text: null"),
    "empty content": (turns(USER, ASSISTANT | {"content": "\t"}), "messages[1].content", "empty: '\\t'"),
    "last turn the user's": (turns(USER, ASSISTANT, USER), "messages[2].role", "last turn not the assistant's: 'user'"),
    "assistant first": (turns(ASSISTANT), "messages[0].role", "no user turn before it"),
    "system in the middle": (
        turns(USER, {"role": "system", "content": "be kind"}, ASSISTANT),
        "messages[1].role",
        "system turn not first: it is turn 2",
    ),
}


@pytest.mark.parametrize(("line", "field", "problem"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_line_becomes_one_fault_with_file_line_field_value_and_remedy(line, field, problem):
    (fault,) = parse_line(line, number=7)
    assert (fault.file, fault.line, fault.field) == ("a.jsonl", 7, field)
    assert fault.problem.startswith(problem)
    assert fault.remedy
    assert len(str(fault)) < 300


def test_all_faults_of_a_record_are_told_at_once():
    faults = parse_line(turns({"role": "bot", "content": ""}, {"role": "user"}))
    assert [(fault.field, fault.problem.partition(":")[0]) for fault in faults] == [
        ("messages[0].role", "wrong role"),
        ("messages[0].content", "empty"),
        ("messages[1].content", "missing"),
        ("messages[1].role", "last turn not the assistant's"),
    ]


def test_a_line_with_a_million_faults_tells_the_first_20():
    assert len(parse_line(b'{"text": "a", "w": [' + b"NaN," * 1_000_000 + b"0]}")) == 20


@pytest.mark.parametrize(
    ("record", "kind"),
    [
        (chat("hi", "hello", "bye", "see you"), "messages"),
        ({"messages": [{"role": "system", "content": "be kind"}, USER, ASSISTANT]}, "messages"),
        ({"messages": [USER, ASSISTANT, {"role": "tool", "content": "42"}, ASSISTANT]}, "messages"),
        ({"prompt": "a", "completion": " b"}, "completion"),
        ({"text": "a", "id": 3, "source": {"name": "x"}}, "text"),
    ],
)
def test_a_good_record_keeps_all_its_keys(record, kind):
    parsed = parse_line(json.dumps(record).encode())
    assert parsed == Record("a.jsonl", 1, kind, record)
    assert json.loads(parsed.as_json()) == record


def test_keys_beside_the_format_are_named_and_make_no_different_record():
    plain, labelled = parse_line(GOOD), parse_line(GOOD[:-1] + b', "id": 1, "source": "x"}')
    assert labelled.ignored_keys == ["id", "source"]
    assert plain.digest == labelled.digest != parse_line(b'{"text": "the sea is red"}').digest


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + GOOD + b"\n" + GOOD + b"\n",
        GOOD + b"\r\n" + GOOD + b"\r\n",
        GOOD + b"\n" + GOOD,
        b"\xef\xbb\xbf" + GOOD + b"\r\n" + GOOD,
    ],
    ids=["byte order mark", "CRLF", "no last line end", "all of them"],
)
def test_line_ends_and_byte_order_marks_of_all_systems_are_read(write, content):
    records = list(read_records(Path(write("a.jsonl", content)), LIMIT))
    assert [(record.line, record.content) for record in records] == [(n, {"text": "the sea is blue"}) for n in (1, 2)]


def test_a_byte_order_mark_within_a_file_is_a_fault(write):
    path = Path(write("a.jsonl", GOOD + b"\n\xef\xbb\xbf" + GOOD))
    first, second = read_records(path, LIMIT)
    assert isinstance(first, Record)
    assert second.problem.startswith("broken JSON: ")


def test_blank_lines_are_counted_and_passed_over(write):
    tally = Counter()
    path = Path(write("a.jsonl", b"\n" + GOOD + b"\n  \t\n\r\n" + GOOD + b"\n\n"))
    assert [record.line for record in read_records(path, LIMIT, tally)] == [2, 5]
    assert tally == {"lines": 2, "blank_lines": 4}


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf"])
def test_a_file_without_records_is_a_fault_of_the_whole_file(write, content):
    (fault,) = read_records(Path(write("a.jsonl", content)), LIMIT)
    assert (fault.line, fault.problem) == (0, "empty file: no records")


def test_a_line_of_50_megabytes_is_told_without_being_held(write):
    path = Path(write("a.jsonl", b""))
    with path.open("wb") as file:
        file.write(GOOD + b'\n{"text": "')
        for _ in range(50):
            file.write(b"x" * 1_000_000)
        file.write(b'"}\n' + GOOD + b"\n")
    tracemalloc.start()
    try:
        first, fault, last = read_records(path, max_line_bytes=1_000_000)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert fault.problem == "line too long: 50000012 bytes; data.max_line_bytes is 1000000"
    assert (first.line, fault.line, last.line) == (1, 2, 3)
    assert peak < 10_000_000


@pytest.mark.parametrize("end", [b"", b"\n"])
def test_the_longest_line_allowed_is_read_and_one_byte_more_is_not(write, end):
    path = Path(write("a.jsonl", GOOD + end))
    assert isinstance(next(read_records(path, len(GOOD))), Record)
    assert isinstance(next(read_records(path, len(GOOD) - 1)), Fault)


@given(content=st.binary(), limit=st.integers(1, 20))
def test_lines_never_exceed_the_limit_and_add_up_to_the_file(tmp_path_factory, content, limit):
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    path.write_bytes(content)
    lines = list(read_lines(path, limit))
    expected = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    expected = expected[:-1] if expected[-1] == b"" else expected
    assert [line.size for line in lines] == [len(line) for line in expected]
    assert [line.content for line in lines] == [line[:limit].rstrip(b"\r\n") for line in expected]
    assert [line.number for line in lines] == list(range(1, len(expected) + 1))


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(st.characters()) | st.sampled_from(["user"]),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["role", "content", "x"]) | st.text(), inner),
    max_leaves=10,
)


@given(st.binary() | st.dictionaries(st.sampled_from(["messages", "text", "prompt"]), json_values).map(json.dumps))
def test_no_line_makes_parsing_raise_and_every_fault_can_be_printed(content):
    outcome = parse_line(content.encode() if isinstance(content, str) else content)
    if isinstance(outcome, Record):
        outcome.as_json().encode("utf-8")
        assert len(outcome.digest) == 32
    else:
        assert outcome
        for fault in outcome:
            str(fault).encode("utf-8")


@given(st.dictionaries(st.text(st.characters(codec="utf-8")), st.text(st.characters(codec="utf-8"))))
def test_a_record_written_and_read_again_is_the_same(extra):
    record = Record("a.jsonl", 1, "text", {"text": "the sea"} | {f"_{key}": value for key, value in extra.items()})
    outcome = parse_line(record.as_json().encode())
    if not any("\0" in text for pair in extra.items() for text in pair):
        assert outcome == record
        assert "\n" not in record.as_json()


def test_folders_are_searched_for_jsonl_in_a_fixed_order(write, tmp_path):
    for name in ("data/b.jsonl", "data/a.jsonl", "data/deep/c.jsonl", "data/notes.txt", "extra.json"):
        write(name, GOOD)
    found = find_files([str(tmp_path / "extra.json"), str(tmp_path / "data")])
    names = [path.relative_to(tmp_path).as_posix() for path in found]
    assert names == ["extra.json", "data/a.jsonl", "data/b.jsonl", "data/deep/c.jsonl"]


def test_a_folder_without_jsonl_and_a_path_that_is_not_there_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"holds no \*\.jsonl"):
        find_files([str(tmp_path)])
    with pytest.raises(DataError, match=r"none\.jsonl does not exist"):
        find_files([str(tmp_path / "none.jsonl")])


def test_a_file_that_cannot_be_opened_is_named(tmp_path):
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(DataError, match=r"cannot read .*folder\.jsonl"):
        list(read_records(tmp_path / "folder.jsonl", LIMIT))
