"""Which validation was the best, and whether to go on."""

import math
from collections.abc import Mapping
from typing import Any

from nestune.config import EarlyStopping, RunConfig


class BestLoss:
    """Follows the validation loss, in nats per token.

    validated_step: the step after which the last validation was; best_step: that of the best one; 0: none yet.
    counts_from: validations after earlier steps are neither the best nor lack improvement, as what the model has
    forgotten is not restored yet.
    """

    STATE = (
        "best_validation_loss",
        "reference_loss",
        "validations_without_improvement",
        "validated_step",
        "best_step",
    )

    def __init__(self, stopping: EarlyStopping | None, counts_from: int = 0) -> None:
        self.loss = math.inf
        self.validated_step = 0
        self.best_step = 0
        self._stopping = stopping
        self._counts_from = counts_from
        self._reference = math.inf
        self._since_improvement = 0

    @classmethod
    def of(cls, config: RunConfig) -> "BestLoss":
        """That of a run, before its first validation."""
        kl, training = config.retention.kl, config.training
        holds = kl is not None and kl.weight > 0
        return cls(training.early_stopping, kl.restored_step(training.steps) if kl is not None and holds else 0)

    def update(self, step: int, loss: float) -> bool:
        """Take the loss of the validation after a step; True when it is the lowest that counts."""
        self.validated_step = step
        if step < self._counts_from:
            return False
        best = loss < self.loss
        if best:
            self.loss, self.best_step = loss, step
        min_delta = self._stopping.min_delta if self._stopping else 0.0
        if loss < self._reference - min_delta:
            self._reference, self._since_improvement = loss, 0
        else:
            self._since_improvement += 1
        return best

    @property
    def should_stop(self) -> bool:
        """Whether `patience` validations in a row have not improved by more than `min_delta`."""
        return self._stopping is not None and self._since_improvement >= self._stopping.patience

    def state(self) -> dict[str, float | int | None]:
        """All that it remembers, by the names in STATE; None stands for infinity, which JSON does not have."""
        losses = (loss if math.isfinite(loss) else None for loss in (self.loss, self._reference))
        numbers = (self._since_improvement, self.validated_step, self.best_step)
        return dict(zip(self.STATE, (*losses, *numbers), strict=True))

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`, which may hold more besides."""
        loss, reference, self._since_improvement, self.validated_step, self.best_step = (
            state[key] for key in self.STATE
        )
        self.loss, self._reference = (math.inf if value is None else value for value in (loss, reference))
