"""`nestune status`: how runs stand, from files that may be written to just now."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nestune import cli
from nestune.backends.base import Loss, StepResult
from nestune.errors import ConfigError
from nestune.files import write_text
from nestune.run_state import owned, recorded
from nestune.runs import RunPaths
from nestune.stages.status import TAIL_BYTES, read_status, status
from nestune.training.recorder import Recorder


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunPaths:
    monkeypatch.chdir(tmp_path)
    return RunPaths.of("r")


def train(run: RunPaths, steps: int, of: int = 10, loss: float = 1.0) -> None:
    """The files of a training with two tiers, that are due at every and every second step."""
    write_text(run.config, f"training:\n  steps: {of}\n")
    run.metrics.mkdir(parents=True, exist_ok=True)
    with Recorder(run.metrics, [0, 0]) as recorder:
        for step in range(1, steps + 1):
            recorder.step(step, StepResult(loss / step, 7, 9, 0.5), frozenset({0} if step % 2 else {0, 1}), 1e-3)
            if step % 2 == 0:
                recorder.validation(step, Loss(2.0 * step, 1), best=step == 2)


def shown(*arguments: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", "nestune.cli", "status", *arguments, "--json"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_run_that_trains_tells_step_losses_updates_and_time_left(run: RunPaths) -> None:
    with owned(run, "nestune train"), recorded(run, "train"):
        train(run, steps=5)
        told = read_status(run)
        times = [json.loads(line) for line in (run.metrics / "train_metrics.jsonl").read_text().splitlines()]
        seen = shown("r")
    assert (told.state.state, told.step, told.steps) == ("running", 5, 10)
    assert told.loss == pytest.approx(1 / 5)
    assert (told.valid_loss, told.best_valid_loss) == (8.0, 4.0)
    assert told.update_counts == (5, 2)
    assert told.left_s == pytest.approx(5 * sum(line["step_time_s"] for line in times) / 5)
    assert told.tokens_per_s == pytest.approx(sorted(line["tokens_per_s"] for line in times)[2])
    # Another process sees the same.
    assert (seen["state"], seen["stage"], seen["step"], seen["update_counts"]) == ("running", "train", 5, [5, 2])
    assert seen["owner"]["pid"] > 0


def test_only_a_run_that_trains_has_time_left(run: RunPaths) -> None:
    with owned(run, "nestune train"), recorded(run, "train"):
        train(run, steps=10)
    assert read_status(run).left_s is None
    with owned(run, "nestune evaluate"), recorded(run, "evaluate"):
        assert read_status(run).left_s is None
        assert read_status(run).state.state == "running"


def test_wherever_the_last_line_is_cut_off_the_whole_ones_count(run: RunPaths) -> None:
    train(run, steps=4)
    for file, of in (("train_metrics.jsonl", "step"), ("eval_metrics.jsonl", "valid_loss")):
        path = run.metrics / file
        whole = path.read_bytes()
        for end in range(len(whole)):
            path.write_bytes(whole[:end])
            lines = whole[:end].count(b"\n")
            told = getattr(read_status(run), of)
            assert told == (None if lines == 0 else lines if of == "step" else 4.0 * lines), end
        path.write_bytes(whole)


def test_of_a_long_training_the_last_lines_are_enough(run: RunPaths) -> None:
    train(run, steps=600, of=1000)
    assert (run.metrics / "train_metrics.jsonl").stat().st_size > TAIL_BYTES
    told = read_status(run)
    assert (told.step, told.update_counts, told.best_valid_loss) == (600, (600, 300), 4.0)


def test_all_runs_are_told_of_in_a_table(run: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status"]) == 0
    assert "there are no runs in" in capsys.readouterr().out
    with owned(run, "nestune train"), recorded(run, "train"):
        train(run, steps=2)
    write_text(Path("runs/other/config.yaml"), "not: a run's")
    Path("runs/no-run").mkdir()
    write_text(Path("runs/pulled/evaluation/report.json"), "{}")
    with owned(RunPaths.of("series"), "the lock of a series of retrainings"):
        write_text(RunPaths.of("series").earlier / "valid.jsonl", "")
        assert cli.main(["status"]) == 0
    rows = [row.split() for row in capsys.readouterr().out.splitlines()]
    assert rows == [
        ["run", "state", "stage", "step", "loss"],
        ["other", "new"],
        ["pulled", "finished", "evaluate"],
        ["r", "finished", "train", "2/10", "0.500"],
    ]
    assert set(shown()) == {"other", "pulled", "r"}


def test_a_run_whose_state_cannot_be_read_is_not_taken_for_finished(run: RunPaths) -> None:
    write_text(run.evaluation / "report.json", "{}")
    assert read_status(run).state.state == "finished"
    write_text(run.state, "{")
    assert read_status(run).state.state == "new"


def test_an_unknown_run_is_an_error(run: RunPaths) -> None:
    with pytest.raises(ConfigError, match=r"there is no run r in .+`nestune status` lists"):
        status(run)


def test_it_needs_no_framework(run: RunPaths) -> None:
    train(run, steps=2)
    program = (
        "import sys; from nestune import cli\n"
        "assert cli.main(['status']) == 0\n"
        "assert cli.main(['status', 'r']) == 0\n"
        "heavy = {'torch', 'mlx', 'transformers', 'mlflow', 'prefect', 'pandas', 'great_expectations', 'matplotlib'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
