"""JSON lines from anywhere: each line becomes a record or faults, and a dataset is built, or refused with a remedy."""

import gzip
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given

from nestune.cli import main
from nestune.config import DataConfig, RetentionConfig
from nestune.data.dataset import Dataset, load_dataset
from nestune.data.find_files import find_files
from nestune.data.records import FORMATS, Record, read_records
from nestune.data.tokens import load_tokenizer
from nestune.data.validation import build_dataset
from nestune.errors import DataError
from tests.fuzz.hostile import ROOT, altered, as_json, damaged, fuzz, outcome

LIMIT = 100_000
RECORDS: list[dict[str, Any]] = [
    {"text": "the sea is blue"},
    {"prompt": "2 + 2 = ", "completion": "4", "id": 7},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}], "source": {"a": [1]}},
]
VALID = b"".join(json.dumps(record).encode() + b"\n" for record in RECORDS)
HAND_MADE = {
    "nothing": b"",
    "blank lines": b"\n \n\r\n\t\n",
    "byte order mark": b"\xef\xbb\xbf" + VALID,
    "UTF-16": VALID.decode().encode("utf-16"),
    "UTF-32": VALID.decode().encode("utf-32"),
    "NUL bytes": b"\0" * 5000,
    "one long line": b'{"text": "' + b"a" * 300_000 + b'"}',
    "no end of line": b'{"text": "a"',
    "deep lists": b"[" * 50_000,
    "deep objects": b'{"text": ' * 9000,
    "deep within": b'{"text": "a", "x": ' + b"[" * 500 + b"]" * 500 + b"}",
    "5000 digits": b'{"text": "a", "id": ' + b"9" * 5000 + b"}",
    "4000 digits": b'{"text": "a", "id": ' + b"9" * 4000 + b"}",
    "4000 digits as text": b'{"text": ' + b"9" * 4000 + b"}",
    "4000 digits alone": b"9" * 4000,
    "no numbers": b'{"text": "a", "x": NaN}\n{"text": "b", "x": -Infinity}\n{"text": "c", "x": 1e999}',
    "half a pair": b'{"text": "\\ud800"}\n{"\\udfff": 1, "text": "a"}',
    "surrogates in UTF-8": b'{"text": "\xed\xa0\x80"}',
    "overlong UTF-8": b'{"text": "\xc0\xaf"}',
    "repeated keys": b'{"text": "a", "text": "b"}',
    "a million faults": b'{"messages": [' + b"0," * 40_000 + b"0]}",
    "long keys": b'{"' + b"k" * 90_000 + b'": 1}',
    "many keys": b"{" + b",".join(b'"k%d": 1' % k for k in range(5000)) + b"}",
    "other separators": '{"text": "a\u2028b"}\u2028{"text": "c"}\x85'.encode(),
    "carriage returns alone": VALID.replace(b"\n", b"\r"),
    "an array of records": b"[" + b",".join(VALID.splitlines()) + b"]",
    "a role that is a list": b'{"messages": [{"role": ["user"], "content": "a"}]}',
    "a role that is an object": b'{"messages": [{"role": {}, "content": {}}]}',
    "controls": b'{"text": "\x01\x02"}',
    "a right-to-left override": '{"text": "\u202eabc"}'.encode(),
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data") / "train.jsonl"


def check(path: Path) -> None:
    """Every line that is not blank is a record of a known shape, or has faults with remedies; nothing is lost."""
    read = outcome(lambda: list(read_records(path, LIMIT)))
    assert not isinstance(read, str)
    seen = {item.line for item in read if item.line}
    lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    assert seen == {number for number, line in enumerate(lines, start=1) if line.strip() or len(line) > LIMIT}
    for item in read:
        if isinstance(item, Record):
            assert all(key in item.content for key in FORMATS[item.kind])
            item.as_json().encode("utf-8")
        else:
            assert item.problem
            assert item.remedy
            assert len(str(item)) < 1000


@pytest.mark.parametrize("content", HAND_MADE.values(), ids=HAND_MADE)
def test_lines_made_by_hand_become_records_or_faults(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    check(path)


@fuzz
@given(content=damaged(VALID))
def test_damaged_lines_become_records_or_faults(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    check(path)


@fuzz
@given(records=altered(RECORDS))
@example(records=RECORDS)
def test_values_of_other_types_become_records_or_faults(path: Path, records: Any) -> None:
    path.write_bytes(b"\n".join(map(as_json, records if isinstance(records, list) else [records])))
    check(path)


def build(folder: Path, *files: Path, on_invalid: str = "quarantine") -> Any:
    """The report, or the text of the error."""
    data = DataConfig.model_validate({"train": [str(file) for file in files], "valid": 0.3, "on_invalid": on_invalid})
    tokenizer = load_tokenizer(ROOT / "demo" / "base")
    return outcome(lambda: build_dataset(data, RetentionConfig(), tokenizer, folder / "dataset"))


def test_a_dataset_is_built_from_what_is_good_beside_them_or_refused(tmp_path: Path) -> None:
    good = tmp_path / "good.jsonl"
    good.write_text("".join(json.dumps({"text": f"the number {number}"}) + "\n" for number in range(4)))
    bad = [tmp_path / f"{number}.jsonl" for number in range(len(HAND_MADE))]
    for path, content in zip(bad, HAND_MADE.values(), strict=True):
        path.write_bytes(content)
    assert not isinstance(build(tmp_path, good), str), "the libraries are loaded here, which takes a while"
    assert not isinstance(build(tmp_path, good, *bad), str)
    assert "cannot be used; nothing was written" in build(tmp_path, good, *bad, on_invalid="fail")


def test_the_command_line_shows_no_traceback(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(b"\n".join(HAND_MADE.values()))
    config = tmp_path / "run.yaml"
    config.write_bytes(
        as_json({"name": "r", "model": {"base": str(ROOT / "demo" / "base")}, "data": {"train": str(bad)}})
    )
    assert main(["validate", "--config", str(config)]) == 2
    told = capfd.readouterr()
    assert "Traceback" not in told.out + told.err
    assert "cannot be used" in told.err


# What a folder may hold beside its records.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(VALID)
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "mine.jsonl").write_bytes(VALID)
    return folder


def faults_of(*paths: Path) -> list[str]:
    with pytest.raises(DataError) as caught:
        find_files([str(path) for path in paths])
    return [f"{Path(fault.file).name}: {fault.problem}. {fault.remedy}" for fault in caught.value.faults]


def test_links_that_lead_out_of_a_data_folder_are_refused_all_at_once(folder: Path) -> None:
    (folder / "a.jsonl").symlink_to(folder.parent / "secret" / "mine.jsonl")
    (folder / "b.jsonl").symlink_to("../secret/mine.jsonl")
    (folder / "c.jsonl").symlink_to("nowhere.jsonl")
    (folder / "d").symlink_to(folder.parent / "secret")
    (folder / "notes").symlink_to("/etc/passwd")
    told = faults_of(folder)
    assert [fault.partition(":")[0] for fault in told] == ["a.jsonl", "b.jsonl", "c.jsonl", "d"]
    assert sum("leads out of its folder" in fault for fault in told) == 3
    assert all("in the configuration" in fault for fault in told if "leads out" in fault)


def test_links_within_the_folder_a_link_that_is_named_and_those_of_dvc_are_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    cached = folder.parent / ".dvc" / "cache" / "files" / "md5" / "ab" / "cdef"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(VALID)
    (folder / "dvc.jsonl").symlink_to(cached)
    (folder / "same.jsonl").symlink_to("train.jsonl")
    assert [path.name for path in find_files([str(folder)])] == ["dvc.jsonl", "same.jsonl", "train.jsonl"]
    (folder.parent / "named").symlink_to(folder.parent / "secret")
    (folder.parent / "named.jsonl").symlink_to(folder.parent / "secret" / "mine.jsonl")
    assert [path.name for path in find_files(["named", "named.jsonl"])] == ["mine.jsonl", "named.jsonl"]


@pytest.mark.parametrize("name", ["more.jsonl.gz", "more.zip", "more.tar.gz", "more.tgz", "more.tar", "MORE.JSONL.ZST"])
def test_an_archive_in_a_data_folder_is_refused_and_not_passed_over(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"x")
    (folder / "weights.gz").write_bytes(b"not of records")
    (told,) = faults_of(folder)
    assert told.startswith(f"{name}: archive")
    assert "Unpack it" in told


def test_an_archive_is_known_by_its_content_whatever_it_is_called(tmp_path: Path) -> None:
    packed, bundle = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    packed.write_bytes(gzip.compress(VALID))
    with tarfile.open(bundle, "w") as file:
        file.add(packed, "../../evil.jsonl")
    assert faults_of(packed, bundle) == [
        "a.jsonl: archive: its content is gzip. Unpack it, and name what is in it",
        "b.jsonl: archive: its content is tar. Unpack it, and name what is in it",
    ]


def test_what_is_no_file_is_refused_and_not_waited_for(folder: Path) -> None:
    os.mkfifo(folder / "pipe.jsonl")
    told = outcome(lambda: find_files([str(folder), "/dev/zero"]))
    assert "pipe.jsonl: no ordinary file: a named pipe" in str(told)
    assert "/dev/zero: no ordinary file: a device" in str(told)


# A built dataset, whose report somebody changed.


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": f"number {number}"}) + "\n" for number in range(6)))
    assert not isinstance(build(folder, folder / "train.jsonl"), str)
    return folder / "dataset"


def load(dataset: Path) -> Dataset | str:
    train = str(dataset.parent / "train.jsonl")
    data = DataConfig.model_validate({"train": train, "valid": 0.3, "on_invalid": "quarantine"})
    tokenizer = load_tokenizer(ROOT / "demo" / "base")
    return outcome(lambda: load_dataset(data, RetentionConfig(), tokenizer, 64, dataset))


def test_a_report_cannot_name_files_outside_its_folder(dataset: Path) -> None:
    report = json.loads((dataset / "report.json").read_text())
    assert isinstance(load(dataset), Dataset)
    for sets, outputs in (
        ({"../train": {}}, {}),
        ({"retention/../../x": {}}, {}),
        ({}, {"../train.jsonl": "0"}),
        ({}, {"/etc/passwd": "0"}),
    ):
        changed = report | {"sets": report["sets"] | sets, "outputs": report["outputs"] | outputs}
        (dataset / "report.json").write_text(json.dumps(changed))
        assert "names other sets than its settings make" in str(load(dataset))
    (dataset / "report.json").write_text(json.dumps(report))


@fuzz
@given(
    content=altered(
        {"settings": {"train": ["a"]}, "sets": {"train": {}}, "outputs": {"train.jsonl": "0"}, "sha256": ""}
    )
)
def test_an_altered_report_is_refused_with_a_remedy(dataset: Path, content: Any) -> None:
    report = (dataset / "report.json").read_text()
    try:
        (dataset / "report.json").write_bytes(as_json(content))
        assert isinstance(load(dataset), str)
    finally:
        (dataset / "report.json").write_text(report)
