"""A checkpoint that is not as it was saved is not used; training goes on from the one before, to the same bits."""

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.pipeline.conftest import ROOT

from nestune import cli
from nestune.files import sha256_file
from nestune.runs import RunPaths
from nestune.training.checkpoints import newest_checkpoint, read_checkpoints

pytest.importorskip("torch")

FILES = (
    "adapter_model.safetensors",
    "adapters.safetensors",
    "adapter_config.json",
    "training_state.safetensors",
    "metadata.json",
    "sha256.json",
)
BITS = ("adapter_model.safetensors", "adapters.safetensors", "training_state.safetensors")


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def bit_flipped(path: Path) -> None:
    flip(path, path.stat().st_size // 3, 5)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def deleted(path: Path) -> None:
    path.unlink()


def flip(path: Path, byte: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= 1 << bit
    path.write_bytes(content)


DAMAGES: tuple[Callable[[Path], None], ...] = (truncated, bit_flipped, empty, deleted)


def train(*options: str) -> int:
    return cli.main(["train", "--config", "run.yaml", *options])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, world: Path) -> Iterator[Path]:
    """A folder with a run of 8 steps: checkpoints after 4, 6 and 8, the best one after 5, `final`."""
    folder = tmp_path_factory.mktemp("broken")
    for file, rows in (("train", 200), ("valid", 32)):
        content = (world / "new_facts" / f"{file}.jsonl").read_text().splitlines(keepends=True)
        (folder / f"{file}.jsonl").write_text("".join(content[:rows]))
    blocks = {
        "name": "it",
        "model": {"base": str(ROOT / "demo" / "base"), "backend": "torch"},
        "lora": {"rank": 4, "dropout": 0.1},
        "data": {"train": "train.jsonl", "valid": "valid.jsonl", "max_seq_length": 64},
        "tiers": {"update_every": [1, 2, 3], "inactive_gradients": "accumulate"},
        "training": {"steps": 8, "eval_every": 5, "checkpoint_every": 2, "batch_size": 2, "learning_rate": 1e-3},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(blocks))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in ("validate", "tiers", "train"):
            assert cli.main([command, "--config", "run.yaml"]) == 0
        shutil.copytree("runs/it", "reference")
        yield folder


@pytest.fixture
def run(trained: Path) -> RunPaths:
    """The run as it was killed just before `final`, after the validation of its last step; its `best` is that of it."""
    shutil.rmtree("runs/it")
    shutil.copytree("reference", "runs/it")
    shutil.rmtree("runs/it/checkpoints/final")
    return RunPaths(Path("runs/it"))


def before_the_last_validation(run: RunPaths) -> None:
    """As it was killed after the checkpoint of step 6, when the best one was that of step 5."""
    for name in ("checkpoint_0000008", "best"):
        shutil.rmtree(run.checkpoints / name)


def assert_as_reference(run: RunPaths) -> None:
    for checkpoint in ("best", "final", "checkpoint_0000008"):
        for file in BITS:
            ours, expected = (root / "checkpoints" / checkpoint / file for root in (run.root, Path("reference")))
            assert sha256_file(ours) == sha256_file(expected), (checkpoint, file)
    for file in ("train_metrics.jsonl", "eval_metrics.jsonl"):
        assert lines(run.metrics / file) == lines(Path("reference/metrics") / file)


def lines(path: Path) -> list[dict[str, Any]]:
    told = [json.loads(line) for line in path.read_text().splitlines()]
    clocks = ("step_time_s", "tokens_per_s", "time")
    return [{key: value for key, value in line.items() if key not in clocks} for line in told]


def break_newest(run: RunPaths, file: str, damage: Callable[[Path], None]) -> None:
    """Break the same file of both checkpoints of step 8."""
    for name in ("best", "checkpoint_0000008"):
        damage(run.checkpoints / name / file)


def usable_after_damage(run: RunPaths) -> list[str]:
    return [found.folder.name for found in read_checkpoints(run) if not found.faults]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: str(damage.__name__))
@pytest.mark.parametrize("file", FILES)
def test_a_broken_file_is_noticed_and_named_and_only_its_checkpoint_is_not_used(
    run: RunPaths, file: str, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    damage(run.checkpoints / "checkpoint_0000008" / file)
    assert sorted(usable_after_damage(run)) == ["best", "checkpoint_0000004", "checkpoint_0000006"]
    with caplog.at_level(logging.WARNING):
        newest = newest_checkpoint(run)
    assert newest is not None
    assert newest.folder.name == "best"
    (warning,) = caplog.messages
    assert "a checkpoint is broken and is not used: runs/it/checkpoints/checkpoint_0000008: " in warning
    assert file in warning
    assert ("missing" if damage is deleted else "changed" if file != "sha256.json" else "missing or broken") in warning


@settings(deadline=None, max_examples=60)
@given(file=st.sampled_from(FILES), place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_bit_that_flips_is_noticed(trained: Path, file: str, place: float, bit: int) -> None:
    folder = trained / "reference" / "checkpoints" / "checkpoint_0000006"
    whole = (folder / file).read_bytes()
    try:
        flip(folder / file, int(place * len(whole)), bit)
        found = {checkpoint.folder.name for checkpoint in read_checkpoints(RunPaths(trained / "reference"))
                 if checkpoint.faults}  # fmt: skip
    finally:
        (folder / file).write_bytes(whole)
    assert found == {"checkpoint_0000006"}


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("adapter_model.safetensors", bit_flipped),
        ("training_state.safetensors", truncated),
        ("metadata.json", empty),
        ("adapters.safetensors", deleted),
    ],
)
def test_training_goes_on_from_the_checkpoint_before(
    run: RunPaths, file: str, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """The best one of that time, of step 5, was replaced by that of step 8: so the one before is that of step 4."""
    break_newest(run, file, damage)
    assert train() == 0
    assert "going on after step 4, from runs/it/checkpoints/checkpoint_0000004" in capsys.readouterr().err
    warned = "\n".join(caplog.messages)
    for name in ("best", "checkpoint_0000008"):
        assert f"a checkpoint is broken and is not used: runs/it/checkpoints/{name}: " in warned
    assert "checkpoint_0000006 is not used: the best checkpoint, of step 5, is broken" in warned
    assert_as_reference(run)


def test_a_broken_best_is_taken_from_its_twin(run: RunPaths, caplog: pytest.LogCaptureFixture) -> None:
    truncated(run.checkpoints / "best" / "training_state.safetensors")
    assert train() == 0
    assert "runs/it/checkpoints/best was broken or lost; runs/it/checkpoints/checkpoint_0000008 is taken" in caplog.text
    assert_as_reference(run)


def test_without_its_best_a_checkpoint_is_not_used(run: RunPaths, caplog: pytest.LogCaptureFixture) -> None:
    before_the_last_validation(run)
    assert train() == 0
    assert "checkpoint_0000006 is not used: the best checkpoint, of step 5, is broken" in caplog.text
    assert_as_reference(run)


def test_where_all_are_broken_the_error_names_each_and_what_to_do(
    run: RunPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [path for path in run.checkpoints.iterdir() if path.is_dir()]
    for folder in folders:
        empty(folder / "adapter_model.safetensors")
    assert train() == 1
    said = capsys.readouterr().err
    for folder in folders:
        assert f"{folder}: adapter_model.safetensors changed" in said
    assert "--force to train anew" in said
    assert "Traceback" not in said
    assert train("--force") == 0
    shutil.rmtree(run.checkpoints / "checkpoint_0000008")
    shutil.copytree("reference/checkpoints/checkpoint_0000008", run.checkpoints / "checkpoint_0000008")
    assert_as_reference(run)
