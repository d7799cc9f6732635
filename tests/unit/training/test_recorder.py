"""The metrics files: a line a step, none twice, also when training goes on from an earlier step."""

import json
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nestune.backends.base import Loss, StepResult
from nestune.training.recorder import EVAL_METRICS, TRAIN_METRICS, Recorder

PERIODS = (1, 2, 4)


class Heard:
    """A listener that remembers."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self.validations: list[dict[str, Any]] = []
        self.on_step, self.on_validation = self.steps.append, self.validations.append


def record(folder: Path, steps: Sequence[int], validated: Sequence[int], heard: Heard | None = None) -> list[int]:
    """Record these steps as the loop does; returns how often each tier has moved in the end."""
    before = steps[0] - 1
    counts = [before // period for period in PERIODS]
    with Recorder(folder, counts, [heard] if heard else [], before, before) as recorder:
        for step in steps:
            due = frozenset(tier for tier, period in enumerate(PERIODS) if step % period == 0)
            recorder.step(step, StepResult(1 / step, 7, 9, 0.5), due, 1e-3)
            if step in validated:
                recorder.validation(step, Loss(2 / step, 1), best=True)
        assert recorder.last_step == steps[-1]
        return recorder.update_counts


def steps_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


@given(
    last=st.integers(1, 12),
    went_on_after=st.integers(0, 12),
    more=st.integers(1, 4),
    validated=st.sets(st.integers(1, 16)),
    lost=st.integers(0, 500),
)
def test_after_going_on_no_step_is_told_twice_and_whole_earlier_lines_are_unchanged(
    last: int, went_on_after: int, more: int, validated: set[int], lost: int
) -> None:
    start = min(went_on_after, last)
    steps = range(start + 1, start + more + 1)
    with tempfile.TemporaryDirectory() as scratch:
        train, evaluation = Path(scratch, TRAIN_METRICS), Path(scratch, EVAL_METRICS)
        record(Path(scratch), range(1, last + 1), sorted(validated))
        kept = {}
        for path in (train, evaluation):
            # A machine that went down may have lost the end of a file, in the middle of a line.
            text = path.read_text()
            path.write_text(text[: max(0, len(text) - lost)])
            whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            kept[path] = [line for line in whole if json.loads(line)["step"] <= start]
        assert record(Path(scratch), steps, sorted(validated)) == [steps[-1] // period for period in PERIODS]
        for path, told in ((train, set(steps)), (evaluation, validated & set(steps))):
            lines = path.read_text().splitlines(keepends=True)
            assert lines[: len(kept[path])] == kept[path]
            assert [json.loads(line)["step"] for line in lines[len(kept[path]) :]] == sorted(told)


def test_a_new_training_keeps_no_line_of_an_earlier_one(tmp_path: Path) -> None:
    record(tmp_path, range(1, 9), [4, 8])
    record(tmp_path, [1], [])
    assert steps_in(tmp_path / TRAIN_METRICS) == [1]
    assert (tmp_path / EVAL_METRICS).read_text() == ""


def test_lines_after_one_that_is_no_json_are_cut_off_and_that_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record(tmp_path, range(1, 9), [4, 8])
    path = tmp_path / TRAIN_METRICS
    path.write_text(path.read_text().replace('{"step": 5,', '{"step" 5,'))
    with caplog.at_level(logging.WARNING):
        record(tmp_path, [7], [])
    assert steps_in(path) == [1, 2, 3, 4, 7]
    assert "tells of 4 steps only; training goes on after 6" in caplog.text


def test_a_listener_hears_of_each_line_as_it_is_written(tmp_path: Path) -> None:
    heard = Heard()
    record(tmp_path, range(1, 9), [4, 8], heard)
    files = ((TRAIN_METRICS, heard.steps), (EVAL_METRICS, heard.validations))
    for name, lines in files:
        assert [json.loads(line) for line in (tmp_path / name).read_text().splitlines()] == lines
    assert [line["step"] for line in heard.validations] == [4, 8]


def test_a_validation_that_is_done_again_is_told_once(tmp_path: Path) -> None:
    """A training that was stopped within the validation after a step has that step, and not yet its validation."""
    record(tmp_path, range(1, 9), [4, 8])
    with Recorder(tmp_path, [8, 4, 2], last_step=8, validated_step=4) as recorder:
        assert steps_in(tmp_path / EVAL_METRICS) == [4]
        recorder.validation(8, Loss(1.0, 4), best=False)
    assert steps_in(tmp_path / TRAIN_METRICS) == list(range(1, 9))
    assert steps_in(tmp_path / EVAL_METRICS) == [4, 8]
