"""One cell of benchmarks/retention.py: one training of one method, or a sequence of them, through nestune's own stages.

What is timed is the CPU time of the process (one thread), and of training alone: the teacher's texts, the pass for
importances, the steps with everything in them; choosing the strength apart; scoring not at all.
"""

import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from nestune.backends.base import Backend
from nestune.backends.factory import make_backend
from nestune.base_model import resolve_base
from nestune.config import RunConfig, parse_config
from nestune.data.batches import evaluation_batches
from nestune.data.dataset import Dataset
from nestune.data.tokens import load_tokenizer, pad_id_of
from nestune.evaluation.scores import score
from nestune.files import sha256_file, sha256_files, write_json
from nestune.runs import RunPaths
from nestune.stages.candidate import make_candidate, read_strength
from nestune.stages.inputs import TrainingInputs
from nestune.stages.texts import with_texts
from nestune.stopping import StopRequests
from nestune.tiers.schedule import TierSchedule
from nestune.tiers.tier_map import TierMap, assign_tiers
from nestune.training.best_loss import BestLoss
from nestune.training.checkpoints import FINAL, Checkpoints
from nestune.training.loop import run_training
from nestune.training.recorder import Recorder

TARGET = 0.95
LOOK_EVERY = 25
# So many steps do not lead from there to the target.
FAR = 0.4
NEW = "new"


@dataclass(frozen=True)
class Job:
    """What a training is given: files by set (train, valid, new, replay/0, general sets), and the configuration."""

    config: Mapping[str, Any]
    sets: Mapping[str, Path]
    scored: Mapping[str, Path]
    parent: Path | None = None
    store: int | None = None
    look: bool = True


@dataclass
class Pace:
    """How training comes along; a `Listener` that counts CPU seconds and looks at the rows that choose.

    After every LOOK_EVERY steps, or twice as many while the target is far, until it is reached; what that takes is not
    counted.
    """

    backend: Backend
    dataset: Dataset
    config: RunConfig
    look: bool
    seconds: float = 0.0
    steps: int = 0
    reached: tuple[int, float] | None = None
    seen: list[tuple[int, float]] = field(default_factory=list)
    _mark: float = 0.0

    def begin(self) -> None:
        """Start the clock."""
        self._mark = time.process_time()

    def on_step(self, line: dict[str, Any]) -> None:
        """Count the step, and look."""
        self.seconds += time.process_time() - self._mark
        self.steps = line["step"]
        at, right = self.seen[-1] if self.seen else (0, TARGET)
        far = right < FAR and self.steps - at == LOOK_EVERY
        if self.look and self.reached is None and self.steps % LOOK_EVERY == 0 and not far:
            right = score_rows(self.backend, self.dataset, self.config)
            self.seen.append((self.steps, right))
            if right >= TARGET:
                self.reached = (self.steps, self.seconds)
        self.begin()

    def on_validation(self, line: dict[str, Any]) -> None:
        """A validation is no training."""


def score_rows(backend: Backend, dataset: Dataset, config: RunConfig) -> float:
    """Exact match on the rows that choose, as the model is now in training."""
    return score(backend, dataset.valid, dataset.tokenizer, config.evaluation).value


def train(job: Job, folder: Path) -> dict[str, Any]:
    """Train into `folder`, whose run then has a candidate; returns what was measured, scores as digits a row.

    full: at the strength that training ended with, where a job is looked at; chosen: at that which the rows that
    choose have chosen.
    """
    config, run = parse_config(job.config), RunPaths(folder)
    dataset = make_dataset(job, config, run.dataset)
    base = resolve_base(config.model)
    inputs = TrainingInputs(config, base, dataset, pad_id_of(dataset.tokenizer, base.vocabulary), job.parent)
    backend, stop = make_backend(config), StopRequests(run)
    # Read before the clock starts.
    rows = [len(dataset.train), len(dataset.valid), *map(len, dataset.replay)]
    began = time.process_time()
    inputs = with_texts(inputs, backend, stop)
    texts_s = time.process_time() - began
    backend.begin(inputs.parent)
    tier_map, importance_s = make_tier_map(inputs, backend)
    backend.prepare_training(tier_map.tier_of)
    valid = list(evaluation_batches(dataset.valid, config.evaluation.batch_size, inputs.pad_id))
    pace = Pace(backend, dataset, config, job.look)
    with Recorder(run.metrics, [0] * len(config.tiers.periods), [pace]) as recorder:
        checkpoints = Checkpoints(run.checkpoints, backend, base, config, "")
        schedule = TierSchedule(config.tiers.periods)
        best = BestLoss.of(config)
        pace.begin()
        run_training(backend, schedule, inputs.steps(), valid, config.training, recorder, best, checkpoints, stop)
    began = time.process_time()
    make_candidate(config, run, inputs, backend, stop)
    strength_s = time.process_time() - began
    told = read_strength(run.candidate)
    before = texts_s + importance_s
    measured: dict[str, Any] = {
        "rows": rows,
        "steps": pace.steps,
        "cpu": {"texts": texts_s, "importance": importance_s, "steps": pace.seconds, "strength": strength_s},
        "train_cpu_s": before + pace.seconds,
        "step_cpu_s": pace.seconds / pace.steps,
        "reached": {"step": pace.reached[0], "cpu_s": before + pace.reached[1]} if pace.reached else None,
        "seen": pace.seen,
        "factor": told["factor"] if told else 1.0,
        "curve": told["curve"] if told else [],
        "full": scores_of(backend, run.checkpoints / FINAL, job.scored, dataset, config),
    }
    scaled = measured["factor"] != 1.0
    measured["chosen"] = scores_of(backend, run.candidate, job.scored, dataset, config) if scaled else measured["full"]
    if inputs.written is not None:
        measured["texts"] = [dataset.tokenizer.decode(text, skip_special_tokens=True) for text in inputs.written.held]
    return measured


def score_base(job: Job, folder: Path) -> dict[str, str]:
    """What the parent of a job, or the base alone, gets right."""
    config = parse_config(job.config)
    dataset = make_dataset(job, config, folder)
    return scores_of(make_backend(config), job.parent, job.scored, dataset, config)


def scores_of(
    backend: Backend, adapter: Path | None, scored: Mapping[str, Path], dataset: Dataset, config: RunConfig
) -> dict[str, str]:
    """A digit for each row of each set: whether an adapter answers it exactly."""
    backend.show_adapter(adapter)
    told = {}
    for name in scored:
        outcomes = score(backend, dataset.retention[name], dataset.tokenizer, config.evaluation).outcomes
        assert outcomes is not None
        told[name] = str(outcomes.as_dict()["right"])
    return told


def make_tier_map(inputs: TrainingInputs, backend: Backend) -> tuple[TierMap, float]:
    """The tiers, and the CPU seconds of the pass that measures importances, where the strategy asks for it."""
    tiers = inputs.config.tiers
    if tiers.strategy != "parameter_importance":
        return assign_tiers(backend.lora_parameters(), tiers), 0.0
    began = time.process_time()
    steps = islice(inputs.steps(), tiers.importance.steps)
    importance = backend.measure_importance(steps, tiers.importance.measure)
    seconds = time.process_time() - began
    return assign_tiers(backend.lora_parameters(), tiers, importance), seconds


def make_dataset(job: Job, config: RunConfig, folder: Path) -> Dataset:
    """The files of a job as a dataset, without the validation: they are made, and the same for every cell."""
    base = resolve_base(config.model)
    names = {**job.sets, **{f"retention/{name}": path for name, path in job.scored.items()}}
    for name, path in names.items():
        place = folder / f"{name}.jsonl"
        place.parent.mkdir(parents=True, exist_ok=True)
        if name.startswith("replay/") and job.store is not None:
            place.write_text(stored(path, job.store, config.training.seed), encoding="utf-8")
        else:
            shutil.copyfile(path, place)
    # What a candidate tells of the tasks that it was trained on is taken from there.
    outputs = {f"{name}.jsonl": sha256_file(folder / f"{name}.jsonl") for name in names}
    sha256 = sha256_files(folder, [folder / file for file in outputs])
    write_json(folder / "report.json", {"outputs": outputs, "sources": {}, "files": {}, "sha256": sha256})
    row_limit = base.row_limit(config.data.max_seq_length)
    return Dataset(folder, tuple(names), sha256, load_tokenizer(base.folder), row_limit, base.vocabulary)


def stored(path: Path, count: int, seed: int) -> str:
    """The lines that a bounded store keeps of a file, drawn by a seed."""
    import numpy as np

    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = np.random.default_rng(seed).permutation(len(lines))[:count]
    return "".join(lines[place] for place in sorted(kept))


@contextmanager
def nothing_kept() -> Iterator[Path]:
    """A folder that goes; within, the teacher's texts of earlier times are not found, so that writing them is timed."""
    before = os.environ.get("NESTUNE_CACHE")
    with TemporaryDirectory(prefix="nestune-retention-") as folder:
        os.environ["NESTUNE_CACHE"] = str(Path(folder, "cache"))
        try:
            yield Path(folder)
        finally:
            if before is None:
                del os.environ["NESTUNE_CACHE"]
            else:
                os.environ["NESTUNE_CACHE"] = before


def share(right: Sequence[str]) -> float | None:
    """The share of 1 among all digits; None when there are none."""
    every = "".join(right)
    return every.count("1") / len(every) if every else None
