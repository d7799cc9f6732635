"""Stage train: from the validated dataset and the tier map to checkpoints, and to the candidate made of one."""

import logging
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from typing import Any

from nestune.backends.accelerator import accelerator_held
from nestune.backends.adapters import WEIGHTS
from nestune.backends.base import Backend
from nestune.backends.factory import Choice, accelerator, choose_backend, make_backend
from nestune.backends.training_state import read_training_state
from nestune.base_model import resolve_base
from nestune.config import RunConfig, dump_config
from nestune.data.batches import evaluation_batches
from nestune.errors import RunError, ServiceError, StoppedError
from nestune.files import sha256_file, write_text
from nestune.locks import Owner
from nestune.registry.catching_up import mark_killed, send_what_is_missing
from nestune.registry.mirror import metrics_of_step, metrics_of_validation
from nestune.registry.tracking import TrackedRun, tracked_run
from nestune.registry.tracking_note import keep_untold, read_note
from nestune.registry.versions import fitting_champion, resolve_adapter
from nestune.runs import RunPaths, record_stage
from nestune.stages.candidate import candidate_faults, make_candidate, read_strength
from nestune.stages.inputs import TrainingInputs, read_training_inputs, tier_map_depends_on
from nestune.stages.texts import with_texts, write_texts_report
from nestune.stopping import StopRequests, signals_stop
from nestune.tiers.schedule import TierSchedule
from nestune.tiers.tier_map import read_fitting_tier_map
from nestune.training.best_loss import BestLoss
from nestune.training.checkpoints import Checkpoint, Checkpoints, discard_stopped, newest_checkpoint
from nestune.training.loop import run_training
from nestune.training.out_of_memory import told_out_of_memory
from nestune.training.progress import ProgressBar
from nestune.training.recorder import Listener, Recorder
from nestune.training.replacement import forget_replaced, in_place_of_earlier
from nestune.training.start import has_ended, starting_point

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """What training did, on which backend; losses in nats per supervised token; adapter_sha256: of the candidate.

    strength: the factor on what was learned, None where none was chosen.
    went_on_after: the step of the checkpoint that it went on from; `steps` where it had ended there already.
    """

    steps: int
    best_validation_loss: float
    update_counts: list[int]
    adapter_sha256: str
    checkpoints: str
    candidate: str
    strength: float | None
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
            f"checkpoints: {self.checkpoints}, candidate: {self.candidate}",
        ]
        if self.strength is not None:
            lines.append(f"strength: {self.strength:g} of what was learned is kept")
        if self.went_on_after == self.steps:
            return [f"training had ended at step {self.steps} already: nothing was trained", *lines]
        return lines if self.went_on_after is None else [f"went on after step {self.went_on_after}", *lines]


def check_before_training(
    config: RunConfig, run: RunPaths, force: bool = False, resume: bool = False
) -> Checkpoint | None:
    """Find out now what would else stop the run after hours of training; the checkpoint that it goes on from.

    Raises what `starting_point` raises; ConfigError when the backend is not there, when the parent adapter does not
    exist, or when the champion is of another base or rank. A tracking server that does not answer is only warned of
    where training can do without it.
    """
    checkpoint = starting_point(config, run, force, resume)
    choose_backend(config)
    if config.model.adapter is not None:
        resolve_adapter(config.model.adapter, config.registry)
    try:
        fitting_champion(config, resolve_base(config.model))
    except ServiceError as error:
        log.warning("%s Training needs no champion; the evaluation will ask again.", error)
    return checkpoint


def train(
    config: RunConfig,
    run: RunPaths,
    force: bool = False,
    resume: bool = False,
    waiting: Callable[[Owner | None], None] | None = None,
) -> TrainResult:
    """Train the adapter and write checkpoints, metrics and the candidate, or go on with that.

    Where training has ended, only the candidate is made, if it is missing or was made with other settings.

    Goes on from the newest checkpoint of the same configuration, after which weights are those of a training that was
    never interrupted: to the bit on one backend. Checkpoints that are replaced stay until the new ones are complete.
    waiting: is called, again and again, with the training that has the accelerator while that is waited for, and with
    None when the wait is over.

    Raises what `check_before_training` raises; RunError when an earlier stage is missing or its files have changed, or
    when training diverges or finds no memory; StoppedError, with a checkpoint of where it was, when the run is asked to
    stop.
    """
    checkpoint = check_before_training(config, run, force, resume)
    inputs = read_training_inputs(config, run)
    if checkpoint is not None and checkpoint.metadata["data_sha256"] != inputs.data_sha256:
        if not force:
            raise _other_data(checkpoint, inputs)
        checkpoint = None
    ended = checkpoint is not None and has_ended(checkpoint, config)
    if (
        checkpoint is not None
        and _has_other_parent(checkpoint, inputs)
        and (not ended or candidate_faults(config, run))
    ):
        if not force:
            raise _other_parent(checkpoint, inputs)
        checkpoint, ended = None, False
    best = BestLoss.of(config)
    if checkpoint is not None:
        best.restore(checkpoint.metadata)
    trains_on = ""
    if checkpoint is not None and ended:
        # What was killed after its last checkpoint still lacks what comes after that.
        send_what_is_missing(config, run)
        discard_stopped(run.checkpoints)
        trains_on = checkpoint.metadata["backend"]
    if not ended or candidate_faults(config, run):
        stop = StopRequests(run)
        choice = choose_backend(config)
        alone = accelerator_held(
            accelerator(choice), f"nestune train --name {config.name}", config.training.when_busy, stop.check, waiting
        )
        with signals_stop(stop), alone, told_out_of_memory():
            backend = make_backend(config)
            if not ended:
                trains_on = _train(config, run, inputs, backend, choice, checkpoint, best, stop)
            make_candidate(config, run, inputs, backend, stop)
    _record(run)
    forget_replaced(run)
    return _result(config, run, best, trains_on, checkpoint.step if checkpoint else None)


def _train(
    config: RunConfig,
    run: RunPaths,
    inputs: TrainingInputs,
    backend: Backend,
    choice: Choice,
    checkpoint: Checkpoint | None,
    best: BestLoss,
    stop: StopRequests,
) -> str:
    """Train from a checkpoint on, or anew; returns what it was trained on."""
    made_from = tier_map_depends_on(config.tiers, inputs.importance_depends_on())
    tier_map = read_fitting_tier_map(run.tiers, backend.lora_parameters(), config.tiers, made_from)
    inputs = with_texts(inputs, backend, stop)
    backend.begin(inputs.parent, checkpoint.folder if checkpoint else None)
    backend.prepare_training(tier_map.tier_of)
    if checkpoint is not None:
        backend.restore_training(read_training_state(checkpoint.folder))
    state = backend.training_state()
    valid = list(evaluation_batches(inputs.dataset.valid, config.evaluation.batch_size, inputs.pad_id))
    schedule = TierSchedule(config.tiers.periods)
    trains_on = f"{backend.name} on {backend.device} ({choice.reason})"
    tags = {
        "base_sha256": inputs.base.sha256,
        "dataset_sha256": inputs.dataset.sha256,
        "tier_map_sha256": tier_map.sha256,
    }
    write_text(run.config, dump_config(config))
    if checkpoint is None:
        _end_earlier_tracking(run)
    with (
        nullcontext() if checkpoint else in_place_of_earlier(run),
        tracked_run(config, run, tags, goes_on=checkpoint is not None) as tracked,
        ProgressBar(config.training.steps, taken=state.steps) as bar,
    ):
        for line in [*_what_keeps(inputs), f"backend: {trains_on}"]:
            bar.say(line)
        write_texts_report(inputs, run)
        listeners: list[Listener] = [bar, _Tracker(tracked)]
        with Recorder(run.metrics, state.updates, listeners, state.steps, best.validated_step) as recorder:
            if checkpoint is not None:
                bar.say(f"going on after step {checkpoint.step}, from {checkpoint.folder}")
            checkpoints = Checkpoints(
                run.checkpoints,
                backend,
                inputs.base,
                config,
                inputs.data_sha256,
                before_save=recorder.sync,
                parent_sha256=inputs.parent_sha256,
            )
            steps = inputs.steps(after=state.steps)
            try:
                run_training(backend, schedule, steps, valid, config.training, recorder, best, checkpoints, stop)
            except StoppedError as stopped:
                # What a signal is passed on to does not tell it.
                if stop.signal is not None:
                    bar.say(str(stopped))
                raise
    forget_replaced(run)
    return trains_on


def _what_keeps(inputs: TrainingInputs) -> list[str]:
    """What of earlier knowledge joins the steps, for a person."""

    def rows(of_a_step: float) -> str:
        return f"{of_a_step:g} more rows" if of_a_step >= 1 else f"{of_a_step:.0%} of the rows"

    def steps(every: int) -> str:
        return "every step" if every == 1 else f"one step in {every}"

    kl, replay = inputs.config.retention.kl, inputs.config.retention.replay
    told = []
    if kl is not None and kl.weight:
        what = f"{len(inputs.texts)} texts of its own" if inputs.texts else "replayed rows"
        steps_of_all = inputs.config.training.steps
        free = kl.free_steps(steps_of_all)
        after = f" after step {free}; validations count from step {kl.restored_step(steps_of_all)} on" if free else ""
        told.append(f"held to the {kl.teacher} on {what}: {rows(kl.rows_per_step)} in {steps(kl.every)}{after}")
    if inputs.dataset.replay:
        replayed = sum(map(len, inputs.dataset.replay))
        told.append(f"replay of {replayed} earlier rows: {rows(replay.rows_per_step)} in {steps(replay.every)}")
    return told


def _record(run: RunPaths) -> None:
    outputs = [run.checkpoints, run.metrics, run.candidate]
    record_stage(run, "train", [run.config, run.dataset, run.tiers], outputs)


def _end_earlier_tracking(run: RunPaths) -> None:
    """Let MLflow not show a training as running that died, and that another one takes the place of."""
    try:
        mark_killed(run)
    except RunError as error:
        log.warning("%s That an earlier training of %s has ended it will hear later.", error, run.root)
        with suppress(RunError):
            keep_untold(run, read_note(run.tracking))


def _has_other_parent(checkpoint: Checkpoint, inputs: TrainingInputs) -> bool:
    # Checkpoints of earlier versions do not tell.
    then = checkpoint.metadata.get("parent_sha256", inputs.parent_sha256)
    return bool(then != inputs.parent_sha256)


def _other_parent(checkpoint: Checkpoint, inputs: TrainingInputs) -> RunError:
    then, now = (str(sha256)[:12] for sha256 in (checkpoint.metadata["parent_sha256"], inputs.parent_sha256))
    return RunError(
        f"{checkpoint.folder} was trained upon a parent adapter with sha256 {then}; model.adapter "
        f"{inputs.config.model.adapter} is now one with {now}. Name that which it was trained upon, as a folder or "
        "models:/<name>/<version>, or pass --force to train anew."
    )


def _other_data(checkpoint: Checkpoint, inputs: TrainingInputs) -> RunError:
    return RunError(
        f"{inputs.dataset.folder} holds other rows than {checkpoint.folder} was trained on, so training cannot go "
        "on from there. Put the files in data and retention.replay back and run nestune validate, train under another "
        "--name, or pass --force to train anew."
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
        adapter_sha256=sha256_file(run.candidate / WEIGHTS),
        checkpoints=run.checkpoints.as_posix(),
        candidate=run.candidate.as_posix(),
        strength=(read_strength(run.candidate) or {}).get("factor"),
        backend=trained_on,
        went_on_after=went_on_after,
    )


class _Tracker:
    """Passes the numbers of steps and validations on to the tracking server; a `Listener`."""

    def __init__(self, tracked: TrackedRun) -> None:
        self._tracked = tracked

    def on_step(self, line: dict[str, Any]) -> None:
        self._tracked.log_metrics(line["step"], metrics_of_step(line), line["time"])

    def on_validation(self, line: dict[str, Any]) -> None:
        self._tracked.log_metrics(line["step"], metrics_of_validation(line), line["time"])
