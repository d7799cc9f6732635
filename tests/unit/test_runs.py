"""Files appear whole or not at all, and the manifest names their hashes."""

import hashlib
import json
from pathlib import Path

import pytest

from nestune.errors import RunError
from nestune.files import (
    continued,
    kept_until_replaced,
    read_json,
    replaced_folder,
    sha256_file,
    sha256_files,
    write_json,
    write_text,
)
from nestune.runs import RunPaths, record_stage


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_written_file_replaces_the_old_one_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    write_text(path, "one")
    write_text(path, "zwölf")
    assert path.read_text(encoding="utf-8") == "zwölf"
    assert names(path.parent) == ["file.txt"]


def test_json_without_a_value_for_nan_is_refused_and_the_old_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    write_json(path, {"loss": 1.0})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"loss": float("nan")})
    assert json.loads(path.read_text()) == {"loss": 1.0}


def test_a_replaced_folder_holds_only_what_the_block_wrote(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").touch()
    with replaced_folder(target) as folder:
        (folder / "new").touch()
    assert names(target) == ["new"]
    assert names(tmp_path) == ["out"]


def fail_within(target: Path) -> None:
    with replaced_folder(target) as folder:
        (folder / "half").touch()
        raise RuntimeError("disk full")


def test_a_block_that_fails_leaves_the_old_folder_as_it_was(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").touch()
    with pytest.raises(RuntimeError, match="disk full"):
        fail_within(target)
    assert names(target) == ["old"]
    assert names(tmp_path) == ["out"]


def test_a_block_that_fails_leaves_no_folder_behind(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="disk full"):
        fail_within(tmp_path / "runs" / "name" / "out")
    assert names(tmp_path) == []


def make_anew(*paths: Path, fail: bool) -> None:
    with kept_until_replaced(*paths):
        for path in paths:
            assert not path.exists()
        write_text(paths[0] / "new", "new")
        if fail:
            raise RuntimeError("diverged")


def test_what_is_set_aside_is_gone_once_the_new_is_complete(tmp_path: Path) -> None:
    folder, file = tmp_path / "checkpoints", tmp_path / "tracking.json"
    write_text(folder / "old", "old")
    write_text(file, "old")
    make_anew(folder, file, fail=False)
    assert names(folder) == ["new"]
    assert names(tmp_path) == ["checkpoints"]


def test_what_is_set_aside_comes_back_when_the_new_fails(tmp_path: Path) -> None:
    folder, file = tmp_path / "checkpoints", tmp_path / "tracking.json"
    write_text(folder / "old", "old")
    write_text(file, "old")
    with pytest.raises(RuntimeError, match="diverged"):
        make_anew(folder, file, fail=True)
    assert names(folder) == ["old"]
    assert file.read_text() == "old"
    assert names(tmp_path) == ["checkpoints", "tracking.json"]


def test_what_a_first_attempt_made_stays_when_it_fails(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="diverged"):
        make_anew(tmp_path / "checkpoints", fail=True)
    assert names(tmp_path / "checkpoints") == ["new"]


def test_what_a_killed_process_set_aside_comes_back_before_the_next_attempt(tmp_path: Path) -> None:
    write_text(tmp_path / ".checkpoints.previous" / "old", "old")
    write_text(tmp_path / "checkpoints" / "half", "half")
    with pytest.raises(RuntimeError, match="diverged"):
        make_anew(tmp_path / "checkpoints", fail=True)
    assert names(tmp_path) == ["checkpoints"]
    assert names(tmp_path / "checkpoints") == ["old"]


@pytest.mark.parametrize("fails", [False, True])
def test_what_is_gone_on_with_stays_and_what_was_set_aside_before_goes_once_that_ends_well(
    tmp_path: Path, fails: bool
) -> None:
    folder, aside = tmp_path / "checkpoints", tmp_path / ".checkpoints.previous"
    write_text(aside / "old", "old")
    write_text(folder / "begun", "begun")
    try:
        with continued(folder, tmp_path / "tracking.json"):
            write_text(folder / "more", "more")
            if fails:
                raise RuntimeError("diverged")
    except RuntimeError:
        pass
    assert names(folder) == ["begun", "more"]
    assert aside.exists() == fails


def test_a_file_of_a_run_that_lacks_a_key_names_it(tmp_path: Path) -> None:
    write_json(tmp_path / "tracking.json", {"a": 1})
    with pytest.raises(RunError, match=r"tracking\.json lacks run_id\. Again\."):
        read_json(tmp_path / "tracking.json", "Again.", keys=["a", "run_id"])


def test_hashes_are_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_file(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()


def test_the_hash_over_files_depends_on_names_and_contents_not_on_order(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text("1")
    two.write_text("2")
    whole = sha256_files(tmp_path, [one, two])
    assert whole == sha256_files(tmp_path, [two, one])
    two.write_text("3")
    assert whole != sha256_files(tmp_path, [one, two])


def test_the_manifest_holds_the_latest_hashes_of_each_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = RunPaths.of("r")
    write_text(run.config, "name: r")
    write_text(run.dataset / "train.jsonl", "{}")
    record_stage(run, "validate", [run.config], [run.dataset])
    write_text(run.dataset / "train.jsonl", "{}\n")
    record_stage(run, "validate", [run.config], [run.dataset])
    record_stage(run, "train", [run.dataset], [])
    digest = hashlib.sha256(b"{}\n").hexdigest()
    assert json.loads(run.manifest.read_text()) == {
        "validate": {
            "inputs": {"runs/r/config.yaml": hashlib.sha256(b"name: r").hexdigest()},
            "outputs": {"runs/r/dataset/train.jsonl": digest},
        },
        "train": {"inputs": {"runs/r/dataset/train.jsonl": digest}, "outputs": {}},
    }


@pytest.mark.parametrize("content", [None, "{", "\xff", "[]"])
def test_a_file_of_a_run_that_cannot_be_read_tells_the_remedy(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "report.json"
    if content is not None:
        path.write_bytes(content.encode("latin-1"))
    with pytest.raises(RunError, match="Run nestune evaluate first"):
        read_json(path, "Run nestune evaluate first.")
