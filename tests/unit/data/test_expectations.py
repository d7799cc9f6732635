import re

import numpy as np
import pytest

from nestune.data.expectations import check_profile
from nestune.data.profile import Profile
from nestune.data.records import Record
from nestune.data.tokens import Row
from nestune.errors import DataError


def profile(rows: int = 4):
    """A profile of good records, all in train but the last."""
    built = Profile()
    for line in range(1, rows + 1):
        name = "valid" if line == rows else "train"
        tokens, supervised = np.arange(10, dtype=np.int32), np.arange(10) > 0
        record = Record(f"{name}.jsonl", line, "text", {"text": str(line)})
        built.add(name, record, record.digest, Row(tokens, supervised, None, None))
    return built.frame()


def check(frame, tmp_path, written=4, allow_duplicates=False, sets=("train", "valid")):
    return check_profile(frame, sets, written, 16, allow_duplicates, tmp_path / "docs")


def changed(column: str, value: object):
    frame = profile().astype({"set": object, "kind": object})
    frame.loc[1, column] = value
    return frame


def test_a_good_profile_meets_every_expectation_and_each_has_its_reason(tmp_path):
    summary = check(profile(), tmp_path)
    assert len(summary) >= 10
    assert all(expectation["met"] and expectation["reason"] for expectation in summary)


@pytest.mark.parametrize(
    ("column", "value", "expectation"),
    [
        ("supervised", 0, "expect_column_values_to_be_between"),
        ("supervised", 10, "expect_column_pair_values_a_to_be_greater_than_b"),
        ("tokens", 17, "expect_column_values_to_be_between"),
        ("tokens", 1, "expect_column_values_to_be_between"),
        ("line", 0, "expect_column_values_to_be_between"),
        ("line", 1, "expect_compound_columns_to_be_unique"),
        ("kind", "image", "expect_column_values_to_be_in_set"),
        ("kind", None, "expect_column_values_to_not_be_null"),
    ],
)
def test_an_expectation_not_met_is_named_with_its_rows(tmp_path, column, value, expectation):
    with pytest.raises(DataError, match=expectation) as error:
        check(changed(column, value), tmp_path)
    assert "train.jsonl" in {fault.file for fault in error.value.faults}


def test_a_repeated_record_is_named_unless_allowed(tmp_path):
    frame = changed("digest", profile()["digest"][0])
    with pytest.raises(DataError, match="expect_compound_columns_to_be_unique") as error:
        check(frame, tmp_path)
    assert [(fault.file, fault.line) for fault in error.value.faults] == [("train.jsonl", 1), ("train.jsonl", 2)]
    assert check(frame, tmp_path, allow_duplicates=True)


def test_an_empty_set_and_a_lost_record_are_told(tmp_path):
    with pytest.raises(DataError, match="expect_column_distinct_values_to_equal_set"):
        check(profile(), tmp_path, sets=("train", "valid", "retention/old"))
    with pytest.raises(DataError, match="expect_table_row_count_to_equal"):
        check(profile(), tmp_path, written=5)


def test_a_missing_column_is_told(tmp_path):
    with pytest.raises(DataError, match="could not be checked"):
        check(profile().drop(columns="tokens"), tmp_path)


def test_data_docs_show_the_expectations_and_load_no_logo_from_the_web(tmp_path):
    check(profile(), tmp_path)
    (page,) = (tmp_path / "docs" / "expectations").rglob("*.html")
    text = page.read_text(encoding="utf-8")
    assert "a repeated record counts double in the loss" in text
    logos = re.findall(r'src="([^"]*logo-long[^"]*)"', text)
    assert logos
    assert all((page.parent / logo).is_file() for logo in logos)
