import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tiny_tokenizer import build_tokenizer, chat

from nestune.config import DataConfig, RetentionConfig
from nestune.data.dataset import load_dataset
from nestune.data.records import Record
from nestune.data.splits import choose_held_out, keep_some
from nestune.data.validation import build_dataset
from nestune.errors import ConfigError, DataError, Fault, RunError
from nestune.files import sha256_file


def texts(*numbers: int) -> list[dict]:
    return [{"text": f"the sea is {number}"} for number in numbers]


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def build(tmp_path, tokenizer):
    """Builds a dataset in the test's folder from the data block of a configuration."""

    def build(replay=(), strength=None, **data):
        replay = replay if isinstance(replay, dict) else {"files": replay}
        retention = RetentionConfig(recipe="none", replay=replay, strength=strength)
        return build_dataset(DataConfig(**data), retention, tokenizer, tmp_path / "dataset")

    return build


def test_every_set_gets_its_file_with_the_records_as_they_were(build, write, tmp_path):
    mixed = [chat("hi", "hello"), {"prompt": "the", "completion": " sea", "id": 1}, *texts(1)]
    build(
        train=write("train.jsonl", mixed),
        valid=write("valid.jsonl", texts(2)),
        retention={"old": write("old.jsonl", texts(3)), "skill": write("skill.jsonl", texts(4))},
        replay=(write("r0.jsonl", texts(5, 6)), write("r1.jsonl", texts(7))),
    )
    folder = tmp_path / "dataset"
    contents = {path.relative_to(folder).as_posix(): lines_of(path) for path in folder.rglob("*.jsonl")}
    assert contents == {
        "train.jsonl": mixed,
        "valid.jsonl": texts(2),
        "retention/old.jsonl": texts(3),
        "retention/skill.jsonl": texts(4),
        "replay/0.jsonl": texts(5, 6),
        "replay/1.jsonl": texts(7),
        "rejected.jsonl": [],
    }
    assert (folder / "data_docs" / "index.html").is_file()


def test_the_dataset_is_read_back_as_it_was_written(build, write, tmp_path, tokenizer):
    train = write("train.jsonl", [chat("hi", "hello"), *texts(1)])
    valid, old = write("valid.jsonl", texts(2)), write("old.jsonl", texts(3))
    replay = (write("r0.jsonl", texts(5, 6)), write("r1.jsonl", texts(7)))
    report = build(train=train, valid=valid, retention={"old": old}, replay=replay)
    data = DataConfig(train=train, valid=valid, retention={"old": old})
    dataset = load_dataset(
        data, RetentionConfig(recipe="none", replay={"files": replay}), tokenizer, 2048, tmp_path / "dataset"
    )
    assert dataset.sha256 == report.sha256
    assert [row.answer for row in dataset.train] == ["hello", None]
    decoded = [[tokenizer.decode(row.tokens) for row in rows] for rows in [dataset.valid, *dataset.replay]]
    assert decoded == [[f"the sea is {n}<|endoftext|>" for n in numbers] for numbers in ([2], [5, 6], [7])]
    assert list(dataset.retention) == ["old"]


def test_a_dataset_changed_since_validation_is_refused(build, write, tmp_path, tokenizer):
    train = write("train.jsonl", texts(*range(10)))
    build(train=train)
    data, replay, folder = DataConfig(train=train), RetentionConfig(recipe="none"), tmp_path / "dataset"
    with pytest.raises(RunError, match="good when it was validated, with other settings"):
        _ = load_dataset(data, replay, tokenizer, 1, folder).train
    other = DataConfig(train=train, valid=0.3, allow_duplicates=True)
    with pytest.raises(RunError, match=r"other settings \(valid, allow_duplicates differ\)\. Run nestune validate"):
        load_dataset(other, replay, tokenizer, 2048, folder)
    (folder / "train.jsonl").write_bytes((folder / "train.jsonl").read_bytes() + b'{"text": "more"}\n')
    (folder / "valid.jsonl").unlink()
    with pytest.raises(RunError, match=r"train\.jsonl, valid\.jsonl changed since validation\. Run nestune validate"):
        load_dataset(data, replay, tokenizer, 2048, folder)
    with pytest.raises(RunError, match=r"cannot read .*Run nestune validate"):
        load_dataset(data, replay, tokenizer, 2048, tmp_path / "nowhere")


def test_the_report_counts_what_is_in_each_set(build, write, tokenizer):
    train = write("train.jsonl", b'{"text": "the sea", "id": 1}\n\n{"text": "the sea is blue at noon."}\n')
    report = build(train=train, valid=write("valid.jsonl", [chat("hi", "hello")]), max_seq_length=30)
    lengths = [len(tokenizer(text)["input_ids"]) + 1 for text in ("the sea", "the sea is blue at noon.")]
    found = report.sets["train"]
    assert (found.records, found.formats, found.blank_lines) == (2, {"text": 2}, 1)
    assert found.ignored_keys == {"id": 1}
    assert found.tokens == sum(lengths)
    assert found.supervised_tokens == sum(lengths) - 2
    assert found.tokens_of_a_record == {"min": min(lengths), "median": sum(lengths) / 2, "max": max(lengths)}
    assert report.sets["valid"].formats == {"messages": 1}
    assert report.sources[train] == sha256_file(Path(train))
    first, *others = (tokenizer.decode(token) for token in [*tokenizer("the sea")["input_ids"], tokenizer.eos_token_id])
    assert report.supervised_example == f"{first}»{''.join(others)}«"
    assert all(expectation["met"] for expectation in report.expectations)


def test_truncated_records_are_counted(build, write):
    report = build(
        train=write("train.jsonl", [{"text": "a"}, {"text": "what colour is the sea?" * 9}]),
        valid=write("valid.jsonl", [{"text": "b"}]),
        max_seq_length=8,
    )
    assert report.sets["train"].truncated == 1
    assert report.sets["train"].tokens_of_a_record["max"] == 8


def test_the_same_input_gives_the_same_bytes(build, write, tmp_path):
    train, replay = write("train.jsonl", texts(*range(30))), write("old.jsonl", texts(50, 51))

    def files() -> dict[str, str]:
        build(train=train, replay=(replay,))
        folder = tmp_path / "dataset"
        return {str(path.relative_to(folder)): sha256_file(path) for path in folder.rglob("*") if path.is_file()}

    assert files() == files()


BAD = b'{"text": ""}\n{"text": "the sea"}\n{"text": NaN\n\xff\n["a"]\n'


def test_fail_tells_every_fault_of_every_set_and_writes_nothing(build, write, tmp_path):
    build(train=write("good.jsonl", texts(1, 2)))
    before = sha256_file(tmp_path / "dataset" / "report.json")
    with pytest.raises(DataError) as error:
        build(
            train=write("train.jsonl", BAD),
            valid=write("valid.jsonl", b""),
            retention={"old": write("old.jsonl", [chat("hi", "hello", "bye")])},
            replay=(write("replay.jsonl", b"{"),),
        )
    text = str(error.value)
    assert text.startswith("6 of 7 records and 1 empty file(s) cannot be used; nothing was written")
    where = [(Path(fault.file).name, fault.line) for fault in error.value.faults]
    assert where == [
        *[("train.jsonl", line) for line in (1, 3, 4, 5)],
        ("replay.jsonl", 1),
        ("valid.jsonl", 0),
        ("old.jsonl", 1),
    ]
    assert "data.on_invalid=quarantine" in text
    assert error.value.exit_code == 2
    assert sha256_file(tmp_path / "dataset" / "report.json") == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_quarantine_sets_bad_records_aside_with_their_reason_and_goes_on(build, write, tmp_path):
    train = write("train.jsonl", BAD)
    report = build(train=train, valid=write("valid.jsonl", texts(2)), on_invalid="quarantine")
    folder = tmp_path / "dataset"
    assert lines_of(folder / "train.jsonl") == [{"text": "the sea"}]
    rejected = lines_of(folder / "rejected.jsonl")
    assert [(entry["set"], entry["file"], entry["line"], entry["raw"]) for entry in rejected] == [
        ("train", train, 1, '{"text": ""}'),
        ("train", train, 3, '{"text": NaN'),
        ("train", train, 4, "\ufffd"),
        ("train", train, 5, '["a"]'),
    ]
    assert rejected[0]["field"] == "text"
    assert all(entry["problem"] and entry["remedy"] for entry in rejected)
    assert report.rejected == report.sets["train"].rejected == 4
    assert report.sets["train"].faults == {"broken JSON": 1, "empty": 1, "not UTF-8": 1, "not an object": 1}


def test_a_long_rejected_line_is_kept_in_part(build, write, tmp_path):
    train = write("train.jsonl", b'{"text": "' + b"x" * 50_000 + b'"}\n{"text": "the sea"}\n')
    build(train=train, valid=write("valid.jsonl", texts(2)), on_invalid="quarantine", max_line_bytes=10_000)
    (entry,) = lines_of(tmp_path / "dataset" / "rejected.jsonl")
    assert entry["raw"] == '{"text": "' + "x" * 1990
    assert entry["problem"].startswith("line too long: 50012 bytes")


def test_a_set_of_which_nothing_is_left_stops_the_stage_also_under_quarantine(build, write, tmp_path):
    with pytest.raises(DataError, match=r"retention/old: not one of its records can be used; nothing was written"):
        build(
            train=write("train.jsonl", texts(1, 2)),
            retention={"old": write("old.jsonl", b"{\n")},
            on_invalid="quarantine",
        )
    assert not (tmp_path / "dataset").exists()


@pytest.mark.parametrize("on_invalid", ["fail", "quarantine"])
def test_all_rows_masked_is_an_error(build, write, on_invalid):
    long_question = "what colour is the sea at noon? " * 5
    train = write("train.jsonl", [chat(f"{long_question}{number}", "blue") for number in range(3)])
    with pytest.raises(DataError, match="nothing to learn") as error:
        build(train=train, max_seq_length=16, on_invalid=on_invalid)
    assert [(fault.line, fault.field) for fault in error.value.faults] == [
        (1, "messages"),
        (2, "messages"),
        (3, "messages"),
    ]


def test_a_base_without_chat_template_refuses_chats_and_writes_nothing(write, tmp_path):
    data = DataConfig(train=write("train.jsonl", [*texts(1), chat("hi", "hello")]))
    with pytest.raises(ConfigError, match=r"models/tiny has no chat template, and .*train\.jsonl:2 is a chat"):
        build_dataset(data, RetentionConfig(recipe="none"), build_tokenizer(chat_template=None), tmp_path / "dataset")
    assert not (tmp_path / "dataset").exists()


def test_a_record_repeated_within_a_set_is_a_fault_that_names_the_first(build, write, tmp_path):
    train = write("train.jsonl", [*texts(1, 2), {"text": "the sea is 1", "id": 9}])
    with pytest.raises(DataError, match=rf"train\.jsonl:3: duplicate: the same record as {train}:1\."):
        build(train=train)
    report = build(train=train, on_invalid="quarantine", valid=write("valid.jsonl", texts(5)))
    assert lines_of(tmp_path / "dataset" / "train.jsonl") == texts(1, 2)
    assert report.sets["train"].faults == {"duplicate": 1}


def test_duplicates_can_be_allowed_and_are_counted(build, write, tmp_path):
    train = write("train.jsonl", texts(1, 2, 1))
    report = build(train=train, valid=write("valid.jsonl", texts(5)), allow_duplicates=True)
    assert lines_of(tmp_path / "dataset" / "train.jsonl") == texts(1, 2, 1)
    assert (report.sets["train"].duplicates, report.rejected) == (1, 0)


@pytest.mark.parametrize("measured", ["valid", "test", "retention"])
@pytest.mark.parametrize("trained", ["train", "replay"])
@pytest.mark.parametrize("allow_duplicates", [False, True])
def test_what_is_trained_on_may_not_be_measured_on(build, write, measured, trained, allow_duplicates):
    files = {name: write(f"{name}.jsonl", texts(number)) for number, name in enumerate(["train", "replay", "other"])}
    leak = write("leak.jsonl", [*texts(7), *json.loads("[" + Path(files[trained]).read_text() + "]")])
    with pytest.raises(
        DataError, match=rf"leak\.jsonl:2: also (trained on|replayed): the same record as {files[trained]}:1\."
    ):
        build(
            train=files["train"],
            replay=(files["replay"],),
            valid=leak if measured == "valid" else files["other"],
            test=(leak,) if measured == "test" else (),
            retention={"old": leak if measured == "retention" else files["other"]},
            allow_duplicates=allow_duplicates,
        )


def test_a_fraction_is_held_out_of_train(build, write, tmp_path):
    build(train=write("train.jsonl", texts(*range(10))), valid=0.25)
    train, valid = (lines_of(tmp_path / "dataset" / f"{name}.jsonl") for name in ("train", "valid"))
    assert (len(train), len(valid)) == (7, 3)  # 2.5 rounded up
    assert sorted(json.dumps(record) for record in train + valid) == sorted(map(json.dumps, texts(*range(10))))
    assert train == sorted(train, key=lambda record: record["text"])  # in the order of the file


def test_what_is_replayed_is_not_held_out(build, write, tmp_path):
    build(train=write("train.jsonl", texts(*range(10))), valid=0.5, replay=(write("old.jsonl", texts(*range(8))),))
    assert sorted(record["text"] for record in lines_of(tmp_path / "dataset" / "valid.jsonl")) == [
        "the sea is 8",
        "the sea is 9",
    ]


def test_the_strength_is_chosen_on_one_half_of_valid_and_the_other_is_scored(build, write, tmp_path, tokenizer):
    data = {"train": write("train.jsonl", texts(*range(20))), "valid": write("valid.jsonl", texts(*range(50, 57)))}
    report = build(**data, strength={})
    halves = {name: lines_of(tmp_path / "dataset" / f"{name}.jsonl") for name in ("valid", "test")}
    assert [len(records) for records in halves.values()] == [3, 4]
    assert sorted(record["text"] for records in halves.values() for record in records) == [
        f"the sea is {number}" for number in range(50, 57)
    ]
    assert [report.sets[name].records for name in ("train", "valid", "test")] == [20, 3, 4]
    assert set(report.outputs) == {"train.jsonl", "valid.jsonl", "test.jsonl"}
    dataset = load_dataset(
        DataConfig(**data), RetentionConfig(recipe="none", strength={}), tokenizer, 99, tmp_path / "dataset"
    )
    assert [tokenizer.decode(row.tokens) for row in dataset.scored] == [
        f"{record['text']}<|endoftext|>" for record in halves["test"]
    ]
    with pytest.raises(RunError, match=r"other settings \(valid_is_halved differ\)"):
        load_dataset(DataConfig(**data), RetentionConfig(recipe="none"), tokenizer, 99, tmp_path / "dataset")


def test_a_fraction_that_is_held_out_is_halved_too_and_copies_stay_together(build, write, tmp_path):
    train = write("train.jsonl", texts(*range(20), *range(20)))
    build(train=train, valid=0.5, strength={}, allow_duplicates=True)
    sets = [
        [record["text"] for record in lines_of(tmp_path / "dataset" / f"{name}.jsonl")]
        for name in ("train", "valid", "test")
    ]
    assert [len(records) for records in sets] == [20, 10, 10]
    assert sum(len(set(records)) for records in sets) == 20


@pytest.mark.parametrize("strength", [None, {}])
def test_files_of_test_are_scored_and_valid_stays_whole(build, write, tmp_path, tokenizer, strength):
    data = {
        "train": write("train.jsonl", texts(*range(9))),
        "valid": write("valid.jsonl", texts(20, 21)),
        "test": (write("test.jsonl", texts(30, 31, 32)),),
    }
    report = build(**data, strength=strength)
    assert [report.sets[name].records for name in ("valid", "test")] == [2, 3]
    dataset = load_dataset(
        DataConfig(**data), RetentionConfig(recipe="none", strength=strength), tokenizer, 99, tmp_path / "dataset"
    )
    assert len(dataset.scored) == 3


def test_without_a_test_set_valid_is_scored(build, write, tmp_path, tokenizer):
    data = {"train": write("train.jsonl", texts(*range(9))), "valid": 0.3}
    report = build(**data)
    assert list(report.sets) == ["train", "valid"]
    dataset = load_dataset(DataConfig(**data), RetentionConfig(recipe="none"), tokenizer, 99, tmp_path / "dataset")
    assert dataset.scored is dataset.valid


def test_what_chooses_the_strength_is_not_scored(build, write):
    valid, test = write("valid.jsonl", texts(20, 21)), write("test.jsonl", texts(30, 21))
    with pytest.raises(DataError, match=rf"test\.jsonl:2: also in valid: the same record as {valid}:2\."):
        build(train=write("train.jsonl", texts(1)), valid=valid, test=(test,))


@pytest.mark.parametrize(("numbers", "told"), [([5], "only 1 record\\."), ([5, 5], "only 2 records, all the same\\.")])
def test_one_record_cannot_be_halved(build, write, numbers, told):
    valid = write("valid.jsonl", texts(*numbers))
    with pytest.raises(DataError, match=rf"valid has {told} Hold out more .*data\.test"):
        build(train=write("train.jsonl", texts(1)), valid=valid, strength={}, allow_duplicates=True)


def test_one_record_cannot_be_split(build, write):
    with pytest.raises(DataError, match="none can be held out"):
        build(train=write("train.jsonl", texts(1)))


DIGESTS = st.lists(st.integers(0, 99), min_size=2, max_size=60).map(lambda ns: [bytes([n]) * 32 for n in ns])


@given(DIGESTS, st.floats(0.01, 0.99), st.randoms())
def test_the_choice_depends_on_the_records_not_on_their_order(digests, fraction, random):
    if len(set(digests)) == 1:
        with pytest.raises(DataError):
            choose_held_out(digests, fraction, set())
        return
    held_out = choose_held_out(digests, fraction, set())
    assert 0 < sum(digest in held_out for digest in digests) < len(digests)
    shuffled = list(digests)
    random.shuffle(shuffled)
    assert choose_held_out(shuffled, fraction, set()) == held_out


@given(st.integers(2, 300), st.integers(1, 99))
@example(100, 55)  # in floating point 0.55 * 100 is more than 55
def test_the_number_held_out_is_the_fraction_rounded_up(number, percent):
    digests = [n.to_bytes(32, "big") for n in range(number)]
    assert len(choose_held_out(digests, percent / 100, set())) == min(-(-number * percent // 100), number - 1)


def test_the_choice_mostly_stays_when_records_are_added():
    digests = [number.to_bytes(32, "big") for number in range(1100)]
    before, after = choose_held_out(digests[:1000], 0.1, set()), choose_held_out(digests, 0.1, set())
    assert len(before) == 100
    assert len(after) == 110
    assert len(before & after) >= 90


def test_a_store_keeps_so_many_rows_of_each_source_drawn_by_the_seed(write, tmp_path, tokenizer):
    train = write("train.jsonl", texts(*range(500, 510)))
    many, few = texts(*range(100)), texts(*range(200, 205))
    files = (write("many.jsonl", many), write("few.jsonl", few))
    kept = {}
    for seed, folder in ((0, "a"), (0, "b"), (1, "c")):
        retention = RetentionConfig(recipe="none", replay={"files": files, "store": 10})
        data = DataConfig(train=train)
        report = build_dataset(data, retention, tokenizer, tmp_path / folder, seed=seed)
        kept[folder] = [lines_of(tmp_path / folder / f"replay/{number}.jsonl") for number in range(2)]
        assert [report.sets[f"replay/{number}"].left_out for number in range(2)] == [90, 0]
        load_dataset(data, retention, tokenizer, 99, tmp_path / folder, seed=seed)
        with pytest.raises(RunError, match=r"other settings \(store differ\)"):
            load_dataset(data, retention, tokenizer, 99, tmp_path / folder, seed=seed + 1)
    assert kept["a"] == kept["b"]
    assert [len(records) for records in kept["a"]] == [10, 5]
    assert kept["a"][0] != kept["c"][0]
    assert [record for record in many if record in kept["a"][0]] == kept["a"][0]  # in the order of the file


def test_what_a_store_leaves_out_may_be_measured_on_and_its_faults_are_told(build, write, tmp_path):
    files = write("many.jsonl", texts(*range(30)))
    train = write("train.jsonl", texts(*range(500, 510)))
    replay = {"files": files, "store": 3}
    build(replay=replay, train=train)
    kept = lines_of(tmp_path / "dataset" / "replay" / "0.jsonl")
    left_out = [record for record in texts(*range(30)) if record not in kept]
    build(replay=replay, train=train, retention={"old": write("old.jsonl", left_out)})
    with pytest.raises(DataError, match=r"also (trained on|replayed)"):
        build(replay=replay, train=train, retention={"old": write("old.jsonl", kept)})
    write("many.jsonl", b'{"text": "a"}\n{"text": 3}\n')
    with pytest.raises(DataError, match=r"many\.jsonl:2"):
        build(replay={**replay, "store": 1}, train=train)


@given(
    numbers=st.lists(st.integers(0, 40), max_size=30),
    most=st.integers(1, 12),
    seed=st.integers(0, 9),
    order=st.randoms(),
)
def test_the_rows_that_are_kept_depend_on_what_they_hold(numbers, most, seed, order):
    records = [Record("f", line, "text", {"text": str(number)}) for line, number in enumerate(numbers, 1)]
    faults = [Fault("f", 99, "", "bad", "mend it")]
    tally: Counter[str] = Counter()
    found = list(keep_some([*((record, None) for record in records), *faults], most, seed, tally))
    assert found[0] is faults[0]
    assert len(found) - 1 == min(most, len(records))
    assert tally["left_out"] == len(records) - len(found) + 1
    lines = [record.line for record, _ in found[1:]]
    assert lines == sorted(lines)
    shuffled = list(records)
    order.shuffle(shuffled)
    again = list(keep_some(((record, None) for record in shuffled), most, seed, tally))
    assert sorted(r.content["text"] for r, _ in again) == sorted(r.content["text"] for r, _ in found[1:])
