"""Reading back what training wrote."""

import json
from pathlib import Path

import pytest

from nestune.errors import RunError
from nestune.evaluation.history import read_history

STEPS = [
    {"step": step, "loss": 3.0 / step, "due": [0, 1] if step % 2 == 0 else [0], "update_counts": [step, step // 2]}
    for step in (1, 2, 3, 4)
]
VALIDATIONS = [{"step": step, "valid_loss": 2.0 / step, "best": True} for step in (2, 4)]


def write(folder: Path, name: str, lines: list[dict[str, object]]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    write(tmp_path / "metrics", "train_metrics.jsonl", STEPS)
    write(tmp_path / "metrics", "eval_metrics.jsonl", VALIDATIONS)
    return tmp_path / "metrics"


def test_every_step_and_validation_is_read(metrics: Path) -> None:
    history = read_history(metrics)
    assert history.steps == (1, 2, 3, 4)
    assert history.loss == (3.0, 1.5, 1.0, 0.75)
    assert history.due == ({0}, {0, 1}, {0}, {0, 1})
    assert history.update_counts == ((1, 0), (2, 1), (3, 1), (4, 2))
    assert (history.valid_steps, history.valid_loss) == ((2, 4), (1.0, 0.5))


@pytest.mark.parametrize("name", ["train_metrics.jsonl", "eval_metrics.jsonl"])
@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "No such file"), ("", "is empty"), ('{"step": 1', ":1 is not JSON"), ('{"step": 1}\n', "has no")],
)
def test_a_metrics_file_that_cannot_be_read_is_an_error_with_its_remedy(
    metrics: Path, name: str, content: str | None, says: str
) -> None:
    (metrics / name).unlink()
    if content is not None:
        (metrics / name).write_text(content)
    with pytest.raises(RunError, match=f"{says}.*Run nestune train again"):
        read_history(metrics)
