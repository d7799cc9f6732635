"""The protocol between nestune and a framework. Arrays stay inside a backend; NumPy and JSON come out."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from numpy.typing import NDArray

from nestune.backends.training_state import TrainingState
from nestune.data.batches import Batch
from nestune.tiers.parameters import LoraParameter


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did.

    loss in nats per supervised token of the whole step; tokens: supervised tokens of the step;
    positions: all tokens of the step that are not padding; grad_norm: global norm, before clipping, of the
    gradients applied at this step; 0 when no tier was due; kl: mean divergence from the teacher in nats per held
    position, None when none was held.
    """

    loss: float
    tokens: int
    positions: int
    grad_norm: float
    kl: float | None = None


@dataclass(frozen=True)
class Loss:
    """Nats summed over `tokens` positions: cross-entropy of supervised tokens, or divergence at held ones."""

    nats: float
    tokens: int

    @property
    def mean(self) -> float:
        """Nats per position."""
        return self.nats / self.tokens


class Backend(Protocol):
    """A base model with one LoRA adapter, and, once `prepare_training` was called, an optimizer for each tier."""

    name: str
    device: str

    def lora_parameters(self) -> list[LoraParameter]:
        """Every trainable matrix, in a fixed order."""
        ...

    def weights(self) -> dict[str, NDArray[Any]]:
        """A copy of every trainable matrix (float32) by canonical name, shaped as `lora_parameters` says."""
        ...

    def prepare_training(self, tier_of: dict[str, int]) -> None:
        """Make one optimizer for each tier of the map (a matrix's canonical name, or some of its ranks, -> tier)."""
        ...

    def train_step(self, micro_batches: Sequence[Batch], due: frozenset[int], learning_rate: float) -> StepResult:
        """Update the tiers in `due` by the gradient of the step's loss.

        That is the mean cross-entropy of its supervised tokens, in which each token of a prompt counts as
        `training.prompt_weight` of one, plus what `retention` says: kl.weight times the mean KL(teacher || model) of
        its held positions, l2 times the squared change of all weights against the parent.
        """
        ...

    def measure_importance(
        self,
        steps: Iterable[Sequence[Batch]],
        measure: Literal["gradient", "squared_gradient", "taylor"],
    ) -> dict[str, float]:
        """The measure of every matrix (canonical name -> mean over its elements and the steps), changing no weight.

        A step's gradient is that of `train_step`, all tiers due. Its source is told in `nestune.tiers.importance`.
        """
        ...

    def loss(self, batches: Iterable[Batch]) -> Loss:
        """The cross-entropy over all batches, without dropout or gradients."""
        ...

    def divergence(self, batches: Iterable[Batch], teacher: Path | None) -> Loss:
        """KL(teacher || model) at the held positions, of a saved adapter of any rank (None: the base), no gradients."""
        ...

    def logits(self, tokens: Sequence[int]) -> NDArray[Any]:
        """The logits, float32 (len(tokens), vocabulary), after each token of one row, without dropout."""
        ...

    def generate(
        self, prompts: Sequence[Sequence[int]], max_tokens: int, temperature: float = 0.0, seed: int = 0
    ) -> list[list[int]]:
        """Continuations of prompts (token ids), each cut before its first end token.

        Greedy ones at temperature 0, else drawn from softmax(logits / temperature) by the seed.
        """
        ...

    def save_adapter(self, folder: Path) -> None:
        """Write the adapter's weights and configuration into an existing folder.

        One ordinary LoRA: where it is trained on top of a parent's, the exact sum, the parent's ranks first.
        """
        ...

    def begin(self, parent: Path | None, checkpoint: Path | None = None) -> None:
        """Start training from a parent adapter of any rank as `retention.start` says; from a checkpoint, go on.

        The parent stays as the teacher. Raises ConfigError when an adapter does not fit.
        """
        ...

    def load_adapter(self, folder: Path | None) -> None:
        """Take the weights of a saved adapter into training; None: those of an untrained one, which changes nothing.

        Raises ConfigError when it was trained on another base, or any name or shape does not match.
        """
        ...

    def show_adapter(self, folder: Path | None) -> None:
        """Compute with a saved adapter of any rank and alpha, and train none; None: with the base alone.

        Raises ConfigError when it was trained on another base or other modules.
        """
        ...

    def training_state(self) -> TrainingState:
        """A copy of how far training is since `prepare_training`, the weights left out."""
        ...

    def restore_training(self, state: TrainingState) -> None:
        """Go on from a state that any backend saved, in the middle of a window too; `prepare_training` comes first.

        Raises ConfigError when its optimizer, tiers, policy, seed or shapes are others.
        """
        ...
