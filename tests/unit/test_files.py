"""Files appear whole or not at all, and the manifest names their hashes."""

import hashlib
import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nestune.errors import RunError, StorageError
from nestune.files import (
    SEAL,
    read_json,
    replaced_folder,
    seal,
    seal_faults,
    sha256_file,
    sha256_files,
    tidy,
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


def test_tidying_removes_what_a_killed_process_was_writing_and_nothing_else(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for name in ("kept.json", ".lock", ".hidden", "checkpoints/best/weights", "notes.tmp", ".x.tmp"):
        write_text(run / name, name)
    before = sorted(path.relative_to(run) for path in run.rglob("*"))
    write_text(run / ".report.json.0a1b2c3d.tmp", "half")
    write_text(run / "checkpoints" / ".final.0a1b2c3d.tmp" / "weights", "half")
    tidy(run)
    assert sorted(path.relative_to(run) for path in run.rglob("*")) == before


@pytest.mark.parametrize("replaced", [False, True])
def test_an_old_folder_comes_back_unless_the_new_one_has_taken_its_place(tmp_path: Path, replaced: bool) -> None:
    write_text(tmp_path / ".best.old" / "which", "old")
    if replaced:
        write_text(tmp_path / "best" / "which", "new")
    tidy(tmp_path)
    assert names(tmp_path) == ["best"]
    assert (tmp_path / "best" / "which").read_text() == ("new" if replaced else "old")


def sealed(folder: Path) -> Path:
    write_text(folder / "a", "alpha")
    write_text(folder / "b", "beta")
    seal(folder)
    return folder


def test_a_sealed_folder_has_no_faults_and_each_change_is_one(tmp_path: Path) -> None:
    folder = sealed(tmp_path / "sealed")
    assert seal_faults(folder, ["a", "b"]) == []
    assert seal_faults(folder, ["a", "c"]) == ["c missing"]
    (folder / "a").write_text("alphA")
    (folder / "b").unlink()
    assert seal_faults(folder, ["a", "b"]) == ["b missing", "a changed"]


@given(place=st.integers(0, 10_000), bit=st.integers(0, 7), kind=st.sampled_from(["flip", "cut", "empty"]))
def test_no_damage_to_any_file_of_a_sealed_folder_stays_unseen(place: int, bit: int, kind: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = sealed(Path(scratch, "sealed"))
        files = sorted(folder.iterdir())
        damaged = files[place % len(files)]
        content = bytearray(damaged.read_bytes())
        at = place % len(content)
        if kind == "flip":
            content[at] ^= 1 << bit
        damaged.write_bytes(b"" if kind == "empty" else content[:at] if kind == "cut" else content)
        # White space around JSON says nothing; what it says must be the same.
        same = damaged.name == SEAL and _says_the_same(damaged, folder)
        assert bool(seal_faults(folder, ["a", "b"])) != same


def _says_the_same(damaged: Path, folder: Path) -> bool:
    try:
        content = json.loads(damaged.read_bytes())
    except ValueError:
        return False
    return bool(content == {"files": {name: sha256_file(folder / name) for name in ("a", "b")}})


def test_a_seal_names_no_file_outside_of_its_folder(tmp_path: Path) -> None:
    folder = sealed(tmp_path / "sealed")
    write_text(tmp_path / "secret", "secret")
    for name in ("../secret", str(tmp_path / "secret")):
        hashes = {name: sha256_file(tmp_path / "secret"), **read_json(folder / SEAL, "")["files"]}
        write_json(folder / SEAL, {"files": hashes})
        assert seal_faults(folder, ["a"]) == [f"{SEAL} broken"]


def test_a_place_that_cannot_be_written_is_told_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    target = tmp_path / "taken" / "report.json"
    told = rf"cannot write {target}: (File exists|Not a directory)\..*same command goes on"
    with pytest.raises(StorageError, match=told):
        write_text(target, "x")
    with pytest.raises(StorageError, match=told), replaced_folder(target):
        pass


def test_a_fault_of_the_block_is_not_taken_for_one_of_writing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), replaced_folder(tmp_path / "out"):
        (tmp_path / "nowhere").read_bytes()


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
