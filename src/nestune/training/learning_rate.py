"""The learning rate of a step, before each tier's own factor."""

import math

from nestune.config import TrainingConfig


def learning_rate(step: int, training: TrainingConfig) -> float:
    """The learning rate at a step, counted from 1.

    Linear warm-up, learning_rate * step / warmup_steps (system A's rule); then constant, or half a cosine
    that starts at learning_rate and would reach 0 one step after the last (Loshchilov & Hutter 2017,
    arXiv:1608.03983, eq. 5, one cycle).
    """
    if step <= training.warmup_steps:
        return training.learning_rate * step / training.warmup_steps
    if training.schedule == "constant":
        return training.learning_rate
    progress = (step - training.warmup_steps - 1) / (training.steps - training.warmup_steps)
    return training.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
