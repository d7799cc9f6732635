"""What benchmarks/retention.py compares, as data: each method is what its configuration has beside the common one."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Blocks = Mapping[str, Mapping[str, Any]]

# Common to all: plain LoRA on every linear module, one step of 16 rows, cosine after 10 steps of warm-up. The strength
# is chosen by one rule for all methods, and every method is reported with it and without it.
COMMON: Blocks = {
    "tiers": {"update_every": [1]},
    "training": {"batch_size": 16, "warmup_steps": 10, "eval_every": None, "checkpoint_every": None},
    "evaluation": {"batch_size": 256, "max_answer_tokens": 16, "checkpoint": "final"},
    "retention": {"strength": {}},
}
NO_OLD_DATA, WITH_REPLAY = "recipe no_old_data", "recipe with_replay"


@dataclass(frozen=True)
class Method:
    """One way to train on one task: blocks of its configuration.

    replayed: the general rows that are replayed, by the name of their file, where any are.
    """

    name: str
    group: str
    learning_rate: float
    steps: int
    blocks: Blocks = field(default_factory=dict)
    replayed: str | None = None

    def config(self, seed: int) -> dict[str, Any]:
        """The blocks of its configuration, model and data left out."""
        training = {"learning_rate": self.learning_rate, "steps": self.steps, "seed": seed}
        return merged(merged(COMMON, self.blocks), {"training": training})


@dataclass(frozen=True)
class SequenceMethod:
    """One way to train on a task after the other.

    general: the file of general rows that every task replays; earlier: whether those of earlier tasks are replayed;
    store: how many rows are kept of each; joint: all at once, in place of one after the other.
    """

    name: str
    learning_rate: float
    steps: int
    blocks: Blocks = field(default_factory=dict)
    general: str | None = None
    earlier: bool = False
    store: int | None = None
    joint: bool = False

    def config(self, seed: int) -> dict[str, Any]:
        """The blocks of the configuration of each of its trainings, model and data left out."""
        return Method(self.name, "sequence", self.learning_rate, self.steps, self.blocks).config(seed)


def merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over`, and what `under` says of the rest, block by block."""
    both = dict(under) | dict(over)
    for key in under.keys() & over.keys():
        if isinstance(under[key], Mapping) and isinstance(over[key], Mapping):
            both[key] = merged(under[key], over[key])
    return both
