"""The training loop: nested updates, tier k moving at the steps that are multiples of its period."""

from collections.abc import Iterator, Sequence

from nestune.backends.base import Backend
from nestune.config import TrainingConfig
from nestune.data.batches import Batch
from nestune.tiers.schedule import TierSchedule
from nestune.training.checkpoints import Checkpoints
from nestune.training.learning_rate import learning_rate
from nestune.training.recorder import Recorder
from nestune.training.stopping import BestLoss


def run_training(
    backend: Backend,
    schedule: TierSchedule,
    steps: Iterator[list[Batch]],
    valid: Sequence[Batch],
    training: TrainingConfig,
    recorder: Recorder,
    best: BestLoss,
    checkpoints: Checkpoints,
) -> None:
    """Train to the last step, or until validation no longer improves, from the recorder's last step on.

    `steps` begins with the step after that one. The last step is always validated. A window that is not full at the
    end is not applied.
    """
    for step in range(recorder.last_step + 1, training.steps + 1):
        if best.should_stop:
            break
        due = schedule.due(step)
        rate = learning_rate(step, training)
        result = backend.train_step(next(steps), due, rate)
        recorder.step(step, result, due, rate)
        if _is_multiple(step, training.eval_every) or step == training.steps:
            loss = backend.loss(valid)
            improved = best.update(loss.mean)
            recorder.validation(step, loss, improved)
            if improved:
                checkpoints.save("best", best)
        if _is_multiple(step, training.checkpoint_every):
            checkpoints.save_periodic(step, best)
    checkpoints.save("final", best)


def _is_multiple(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
