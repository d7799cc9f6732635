"""A disk that fills up, or may not be written, on a small mount of its own: one line says so, and nothing is lost."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nestune.errors import StorageError
from nestune.files import replaced_folder, write_bytes

pytest.importorskip("torch")

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
killing = importlib.import_module("killing")

MIB, PAGE = 2**20, 4096
STEP = "nestune.backends.torch_backend:TorchBackend.train_step"

pytestmark = pytest.mark.services


def mounted(folder: Path) -> Iterator[Path]:
    """An empty disk of 16 MiB at a folder."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        folder.rmdir()
        pytest.skip("a disk of 16 MiB cannot be mounted here: it needs root and Linux")
    yield folder
    subprocess.run(["umount", folder], check=True)
    folder.rmdir()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    yield from mounted(tmp_path / "disk")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Of 60 steps, 25 and 50 have a checkpoint, 30 and 60 a validation: until step 25 only metrics are written."""
    training = {"eval_every": 30, "checkpoint_every": 25}
    with killing.workplace(tmp_path_factory.mktemp("disk"), "torch", 60, training=training) as made:
        yield made


@pytest.fixture
def run(place: Any) -> Iterator[Path]:
    """A run that is ready to be trained; its folder is a small disk."""
    for folder in mounted(place.folder / "runs" / "small"):
        shutil.copytree(place.folder / "runs" / killing.PREPARED, folder, dirs_exist_ok=True)
        yield folder


def fill(disk: Path, leaving: int) -> Path:
    """A file that takes what is free but for so many bytes."""
    stat = os.statvfs(disk)
    path = disk / "ballast"
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, stat.f_bavail * stat.f_frsize - leaving)
    return path


def error_line(ended: Any, reason: str) -> str:
    """The one line that says what failed, the last that is said."""
    assert ended.status == 1, ended.said
    assert "Traceback" not in ended.said
    (line,) = [line for line in ended.said.splitlines() if line.startswith("error: ")]
    assert reason in line
    assert line == ended.said.splitlines()[-1]
    return str(line)


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_a_disk_that_is_full_while_saving_ends_training_and_it_goes_on_when_there_is_space(
    place: Any, run: Path
) -> None:
    """One checkpoint and a half fit: that of step 25, and not the best one of step 30."""
    final = place.reference / "checkpoints" / "final"
    ballast = fill(run, leaving=int(1.5 * sum(path.stat().st_size for path in final.iterdir())) + 16 * PAGE)
    line = error_line(place.start(run), "No space left on device")
    assert "cannot write runs/small/checkpoints/best/" in line
    assert checkpoints(run) == ["checkpoint_0000025"]
    assert json.loads((run / "state.json").read_text())["state"] == "failed"
    ballast.unlink()
    ended = place.start(run)
    assert ended.status == 0, ended.said
    assert "going on after step 25, from runs/small/checkpoints/checkpoint_0000025\n" in ended.said
    assert killing.differences(place, run) == []


def test_a_disk_that_is_full_while_metrics_are_written_ends_training_and_it_begins_anew_when_there_is_space(
    place: Any, run: Path
) -> None:
    """What is written before the first step fits, and a page of the metrics."""
    assert place.start(run, call=STEP, number=1).killed
    ballast = fill(run, leaving=2 * PAGE)
    line = error_line(place.start(run), "No space left on device")
    assert "cannot write runs/small/metrics/train_metrics.jsonl" in line
    ballast.unlink()
    ended = place.start(run)
    assert ended.status == 0, ended.said
    assert killing.differences(place, run) == []


def test_a_disk_that_may_not_be_written_is_told_and_nothing_changes(place: Any, run: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", run], check=True)
    line = error_line(place.start(run), "Read-only file system")
    assert "cannot write runs/small" in line
    subprocess.run(["mount", "-o", "remount,rw", run], check=True)
    assert not (run / "checkpoints").exists()
    ended = place.start(run)
    assert ended.status == 0, ended.said
    assert killing.differences(place, run) == []


def test_a_file_that_does_not_fit_leaves_nothing_and_the_one_before_stays(disk: Path) -> None:
    write_bytes(disk / "folder" / "file", b"before")
    with pytest.raises(StorageError, match=r"cannot write .*/folder/file: No space left on device"):
        write_bytes(disk / "folder" / "file", bytes(20 * MIB))
    assert [path.name for path in (disk / "folder").iterdir()] == ["file"]
    assert (disk / "folder" / "file").read_bytes() == b"before"


def test_a_folder_that_does_not_fit_leaves_nothing_and_the_one_before_stays(disk: Path) -> None:
    def replace(content: bytes) -> None:
        with replaced_folder(disk / "folder") as folder:
            write_bytes(folder / "file", content)

    replace(b"before")
    with pytest.raises(StorageError, match=rf"cannot write {disk}/folder/file: No space left on device"):
        replace(bytes(20 * MIB))
    assert [path.name for path in disk.iterdir()] == ["folder"]
    assert [path.name for path in (disk / "folder").iterdir()] == ["file"]
    assert (disk / "folder" / "file").read_bytes() == b"before"
