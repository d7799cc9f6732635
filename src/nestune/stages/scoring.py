"""What is scored of a run, and how: one place for evaluating it, any other adapter, and a sequence of runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nestune.backends.base import Backend
from nestune.base_model import BaseModel
from nestune.config import RunConfig
from nestune.data.dataset import Dataset
from nestune.data.tokens import Row, Tokenizer, load_tokenizer
from nestune.evaluation.gate import NEW_TASK
from nestune.evaluation.scores import Score, score
from nestune.runs import RunPaths
from nestune.stages.inputs import read_dataset
from nestune.stopping import StopRequests


@dataclass(frozen=True)
class HeldOut:
    """The rows of a run that it does not train on, by set: those of the new task, and each retention set."""

    dataset: Dataset
    tokenizer: Tokenizer
    sets: Mapping[str, Sequence[Row]]


def held_out_file(run: RunPaths) -> Path:
    """The file with the rows of a run's new task that it is scored on."""
    test = run.dataset / "test.jsonl"
    return test if test.exists() else run.dataset / "valid.jsonl"


def read_held_out(config: RunConfig, run: RunPaths, base: BaseModel) -> HeldOut:
    """The rows to score. Raises RunError when the dataset is missing, has changed, or was made with other settings."""
    tokenizer = load_tokenizer(base.folder)
    dataset = read_dataset(config, run, tokenizer, base)
    return HeldOut(dataset, tokenizer, {NEW_TASK: dataset.scored, **dataset.retention})


def score_adapter(
    backend: Backend,
    adapter: Path | None,
    sets: Mapping[str, Sequence[Row]],
    tokenizer: Tokenizer,
    config: RunConfig,
    stop: StopRequests | None = None,
) -> dict[str, Score]:
    """The score of an adapter on each set; adapter None: the base alone. Raises StoppedError between two batches."""
    backend.show_adapter(adapter)
    return {name: score(backend, rows, tokenizer, config.evaluation, stop) for name, rows in sets.items()}
