"""What is scored of a run, and how: one place for evaluating it, any other adapter, and a sequence of runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nestune.backends.base import Backend
from nestune.base_model import BaseModel
from nestune.config import EvaluationConfig, RunConfig
from nestune.data.dataset import Dataset
from nestune.data.tokens import Row, Tokenizer, load_tokenizer
from nestune.evaluation.gate import NEW_TASK
from nestune.evaluation.harness import check_installed, score_tasks
from nestune.evaluation.scores import Score, score
from nestune.runs import RunPaths
from nestune.stages.inputs import read_dataset
from nestune.stopping import StopRequests

MOST_POSITIONS = 2048  # of a request, for a base that does not say how many it has


@dataclass(frozen=True)
class HeldOut:
    """What a run is scored on: rows that it does not train on, by set, the new task's and each retention set's.

    `evaluation` says how, and which tasks of lm-evaluation-harness there are beside; `positions`: the longest row
    of those.
    """

    dataset: Dataset
    tokenizer: Tokenizer
    sets: Mapping[str, Sequence[Row]]
    evaluation: EvaluationConfig
    positions: int


def held_out_file(run: RunPaths) -> Path:
    """The file with the rows of a run's new task that it is scored on."""
    test = run.dataset / "test.jsonl"
    return test if test.exists() else run.dataset / "valid.jsonl"


def read_held_out(config: RunConfig, run: RunPaths, base: BaseModel) -> HeldOut:
    """The rows to score.

    Raises RunError when the dataset is missing, has changed, or was made with other settings; ConfigError when tasks of
    lm-evaluation-harness are asked for and it is not installed.
    """
    tokenizer = load_tokenizer(base.folder)
    candidate = run.candidate if run.candidate.exists() else None
    dataset = read_dataset(config, run, tokenizer, base, candidate)
    if config.evaluation.lm_eval is not None:
        check_installed()
    sets = {NEW_TASK: dataset.scored, **dataset.retention}
    return HeldOut(dataset, tokenizer, sets, config.evaluation, base.positions or MOST_POSITIONS)


def score_adapter(
    backend: Backend, adapter: Path | None, held_out: HeldOut, stop: StopRequests | None = None
) -> dict[str, Score]:
    """The score of an adapter on each set; adapter None: the base alone. Raises StoppedError between two batches."""
    backend.show_adapter(adapter)
    tokenizer, evaluation = held_out.tokenizer, held_out.evaluation
    scores = {name: score(backend, rows, tokenizer, evaluation, stop) for name, rows in held_out.sets.items()}
    return scores | score_tasks(backend, tokenizer, evaluation, held_out.positions, stop)
