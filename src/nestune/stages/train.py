"""Stage train: from the validated dataset and the tier map to checkpoints."""

import logging
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from nestune.backends.adapters import WEIGHTS
from nestune.backends.factory import choose_backend, make_backend
from nestune.backends.training_state import read_training_state
from nestune.base_model import resolve_base
from nestune.config import RunConfig, dump_config
from nestune.data.batches import evaluation_batches
from nestune.errors import ConfigError, RunError, ServiceError
from nestune.files import continued, kept_until_replaced, sha256_file, write_text
from nestune.registry.catching_up import send_what_is_missing
from nestune.registry.mirror import metrics_of_step, metrics_of_validation
from nestune.registry.tracking import TrackedRun, tracked_run
from nestune.registry.versions import fitting_champion, resolve_adapter
from nestune.runs import RunPaths, record_stage
from nestune.stages.inputs import TrainingInputs, read_training_inputs, tier_map_depends_on
from nestune.tiers.schedule import TierSchedule
from nestune.tiers.tier_map import read_fitting_tier_map
from nestune.training.checkpoints import (
    Checkpoint,
    Checkpoints,
    checkpoint_to_go_on_from,
    newest_checkpoint,
    refuse_other_checkpoints,
)
from nestune.training.loop import run_training
from nestune.training.progress import ProgressBar
from nestune.training.recorder import Recorder
from nestune.training.stopping import BestLoss

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """What training did, on which backend; losses in nats per supervised token.

    went_on_after: the step of the checkpoint that it went on from; `steps` where it had ended there already.
    """

    steps: int
    best_validation_loss: float
    update_counts: list[int]
    adapter_sha256: str
    checkpoints: str
    backend: str
    went_on_after: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """The result as JSON."""
        return asdict(self)

    def summary(self) -> list[str]:
        """The result for a person."""
        lines = [
            f"steps: {self.steps}, updates of each tier: {' / '.join(map(str, self.update_counts))}",
            f"best validation loss: {self.best_validation_loss:.4f} nats per token",
            f"backend: {self.backend}",
            f"checkpoints: {self.checkpoints}",
        ]
        if self.went_on_after == self.steps:
            return [f"training had ended at step {self.steps} already: nothing was trained", *lines]
        return lines if self.went_on_after is None else [f"went on after step {self.went_on_after}", *lines]


def check_before_training(
    config: RunConfig, run: RunPaths, overwrite: bool = False, resume: bool = False
) -> Checkpoint | None:
    """Find out now what would else stop the run after hours of training; the checkpoint that `resume` goes on from.

    Raises ConfigError when the run's folder holds checkpoints of another configuration and `overwrite` is false,
    when the backend is not there, when the parent adapter does not exist, or when the champion is of another base
    or rank; RunError when there is nothing to resume; ServiceError when the parent is in a registry that does not
    answer.
    """
    if resume and overwrite:
        raise ConfigError("resume goes on from the checkpoints of a run, overwrite replaces them; pass one of the two")
    checkpoint = checkpoint_to_go_on_from(config, run) if resume else None
    if not resume and not overwrite:
        refuse_other_checkpoints(config, run)
    choose_backend(config)
    if config.model.adapter is not None:
        resolve_adapter(config.model.adapter, config.registry)
    base = resolve_base(config.model)
    try:
        fitting_champion(config, base)
    except ServiceError as error:
        log.warning("%s Whether the champion can be compared with this run is seen at its evaluation only.", error)
    return checkpoint


def train(config: RunConfig, run: RunPaths, overwrite: bool = False, resume: bool = False) -> TrainResult:
    """Train the adapter and write checkpoints and metrics.

    Earlier checkpoints stay until the new ones are complete. `resume` goes on from the newest of them, after which
    weights are those of a training that was never interrupted: to the bit on one backend. Raises what
    `check_before_training` raises, and RunError when an earlier stage is missing or its files have changed, or when
    training diverges.
    """
    checkpoint = check_before_training(config, run, overwrite, resume)
    best = BestLoss(config.training.early_stopping)
    if checkpoint is not None:
        best.restore(checkpoint.metadata)
        if checkpoint.is_final and (best.should_stop or checkpoint.step == config.training.steps):
            send_what_is_missing(config, run)
            return _result(config, run, best, checkpoint.metadata["backend"], checkpoint.step)
    inputs = read_training_inputs(config, run)
    if checkpoint is not None:
        _check_same_data(checkpoint, inputs)
    choice, backend = choose_backend(config), make_backend(config)
    made_from = tier_map_depends_on(config.tiers, inputs.importance_depends_on())
    tier_map = read_fitting_tier_map(run.tiers, backend.lora_parameters(), config.tiers, made_from)
    backend.load_adapter(checkpoint.folder if checkpoint else inputs.parent)
    backend.prepare_training(tier_map.tier_of)
    if checkpoint is not None:
        backend.restore_training(read_training_state(checkpoint.folder))
    state = backend.training_state()
    steps = islice(inputs.steps(), state.steps, None)
    valid = list(evaluation_batches(inputs.dataset.valid, config.evaluation.batch_size, inputs.pad_id))

    write_text(run.config, dump_config(config))
    checkpoints = Checkpoints(run.checkpoints, backend, inputs.base, config, inputs.data_sha256)
    schedule = TierSchedule(config.tiers.periods)
    tags = {
        "base_sha256": inputs.base.sha256,
        "dataset_sha256": inputs.dataset.sha256,
        "tier_map_sha256": tier_map.sha256,
    }
    in_place = continued if checkpoint else kept_until_replaced
    trains_on = f"{backend.name} on {backend.device} ({choice.reason})"
    with (
        in_place(run.checkpoints, run.metrics, run.tracking),
        tracked_run(config, run, tags, goes_on=checkpoint is not None) as tracked,
        ProgressBar(config.training.steps, taken=state.steps) as bar,
    ):
        bar.say(f"backend: {trains_on}")
        with Recorder(run.metrics, state.updates, [bar, _Tracker(tracked)], state.steps) as recorder:
            if checkpoint is not None:
                bar.say(f"going on after step {checkpoint.step}, from {checkpoint.folder}")
            run_training(backend, schedule, steps, valid, config.training, recorder, best, checkpoints)
    record_stage(run, "train", [run.config, run.dataset, run.tiers], [run.checkpoints, run.metrics])
    return _result(config, run, best, trains_on, checkpoint.step if checkpoint else None)


def _check_same_data(checkpoint: Checkpoint, inputs: TrainingInputs) -> None:
    if checkpoint.metadata["data_sha256"] != inputs.data_sha256:
        raise RunError(
            f"{inputs.dataset.folder} holds other rows than {checkpoint.folder} was trained on, so training cannot go "
            "on from there. Put the files in data and retention.replay back and run nestune validate, or train under "
            "another --name."
        )


def _result(
    config: RunConfig, run: RunPaths, best: BestLoss, trained_on: str, went_on_after: int | None
) -> TrainResult:
    ended = newest_checkpoint(run)
    assert ended is not None
    return TrainResult(
        steps=ended.step,
        best_validation_loss=best.loss,
        update_counts=ended.metadata["tier_statistics"]["update_counts"],
        adapter_sha256=sha256_file(run.checkpoints / config.evaluation.checkpoint / WEIGHTS),
        checkpoints=run.checkpoints.as_posix(),
        backend=trained_on,
        went_on_after=went_on_after,
    )


class _Tracker:
    """Passes the numbers of steps and validations on to the tracking server; a `Listener`."""

    def __init__(self, tracked: TrackedRun) -> None:
        self._tracked = tracked

    def on_step(self, line: dict[str, Any]) -> None:
        self._tracked.log_metrics(line["step"], metrics_of_step(line))

    def on_validation(self, line: dict[str, Any]) -> None:
        self._tracked.log_metrics(line["step"], metrics_of_validation(line))
