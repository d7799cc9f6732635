"""Where training begins: the trained matrices, and the parent's adapter beside them. The same for every backend."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nestune.backends.adapters import read_adapter, read_adapter_of_any_size
from nestune.backends.lora_sum import Adapter, Weights, split, weighted_sum
from nestune.backends.randomness import initial_weights
from nestune.base_model import BaseModel
from nestune.config import LoraConfig, RunConfig
from nestune.errors import ConfigError
from nestune.tiers.parameters import LoraParameter


@dataclass(frozen=True)
class Beginning:
    """own: the trained matrices; parent: the adapter that training starts from; beside: own comes on top of it."""

    own: Weights
    parent: Adapter | None
    beside: bool

    @property
    def added(self) -> Adapter | None:
        """What the trained matrices come on top of."""
        return self.parent if self.beside else None


def begin_training(
    parent: Path | None,
    checkpoint: Path | None,
    described: Sequence[LoraParameter],
    config: RunConfig,
    base: BaseModel,
) -> Beginning:
    """Where a training starts, or, from a checkpoint of its own, goes on.

    Raises ConfigError when an adapter does not fit, or when training is to continue with matrices of another rank.
    """
    lora, seed = config.lora, config.training.seed
    frozen = read_adapter_of_any_size(parent, described, lora, base) if parent is not None else None
    beside = frozen is not None and config.retention.start == "fresh"
    if frozen is None or beside:
        own: Weights = initial_weights(described, seed, upon=frozen.rank if frozen else 0)
    elif frozen.rank != lora.rank:
        raise ConfigError(
            f"retention.start is continue, and the parent {parent} has rank {frozen.rank}, lora.rank is {lora.rank}: "
            f"its matrices cannot be trained as they are. Set lora.rank to {frozen.rank}, or retention.start to fresh."
        )
    else:
        assert parent is not None
        own = read_adapter(parent, described, lora, base)
    if checkpoint is not None and beside:
        own = split(read_adapter_of_any_size(checkpoint, described, lora, base), lora.rank)[1].weights
    elif checkpoint is not None:
        own = read_adapter(checkpoint, described, lora, base)
    return Beginning(own, frozen, beside)


def summed(own: Weights | None, added: Adapter | None, lora: LoraConfig) -> tuple[Weights, LoraConfig]:
    """One ordinary LoRA of what is trained and what it comes on top of, whose ranks come first; and its size.

    The scale is that of what is trained, and the sum exact: its own matrices keep their bits. Of what is only shown
    (`own` is None) it is that itself.
    """
    if own is None:
        assert added is not None, "the base alone is no adapter"
        return added.weights, lora.model_copy(update={"rank": added.rank, "alpha": added.alpha})
    if added is None:
        return own, lora
    scale = lora.alpha / lora.rank
    whole = weighted_sum([(added, 1.0), (Adapter(own, scale), 1.0)], scale)
    return whole.weights, lora.model_copy(update={"rank": whole.rank, "alpha": whole.alpha})
