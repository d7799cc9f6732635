"""The training loop: nested updates, tier k moving at the steps that are multiples of its period."""

from collections.abc import Iterator, Sequence

from nestune.backends.base import Backend
from nestune.config import TrainingConfig
from nestune.data.batches import Batch
from nestune.errors import StoppedError
from nestune.stopping import StopRequests
from nestune.tiers.schedule import TierSchedule
from nestune.training.best_loss import BestLoss
from nestune.training.checkpoints import Checkpoints
from nestune.training.learning_rate import learning_rate
from nestune.training.recorder import Recorder


def run_training(
    backend: Backend,
    schedule: TierSchedule,
    steps: Iterator[list[Batch]],
    valid: Sequence[Batch],
    training: TrainingConfig,
    recorder: Recorder,
    best: BestLoss,
    checkpoints: Checkpoints,
    stop: StopRequests,
) -> None:
    """Train to the last step, or until validation no longer improves, from the recorder's last step on.

    `steps` begins with the step after that one. What follows a step, validation and checkpoint, comes first here: a
    training that was ended in between goes on with it. The last step is always validated. A window that is not full at
    the end is not applied. Raises StoppedError, after a checkpoint of where it is, when the run is asked to stop:
    between two steps, or two batches of a validation.
    """
    try:
        while True:
            step = recorder.last_step
            if best.validated_step < step and (_is_multiple(step, training.eval_every) or step == training.steps):
                loss = backend.loss(stop.watched(valid))
                improved = best.update(step, loss.mean)
                recorder.validation(step, loss, improved)
                if improved:
                    checkpoints.save_best(best)
            if step and _is_multiple(step, training.checkpoint_every):
                checkpoints.save_periodic(step, best)
            if step == training.steps or best.should_stop:
                break
            stop.check()
            due, rate = schedule.due(step + 1), learning_rate(step + 1, training)
            recorder.step(step + 1, backend.train_step(next(steps), due, rate), due, rate)
    except StoppedError as stopped:
        folder = checkpoints.save_stopped(recorder.last_step, best)
        raise StoppedError(
            f"{stopped} after step {recorder.last_step}, kept in {folder}; the same command goes on from there"
        ) from None
    checkpoints.save_final(best)


def _is_multiple(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
