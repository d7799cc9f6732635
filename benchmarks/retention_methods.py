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
    "evaluation": {"batch_size": 256, "max_answer_tokens": 8, "checkpoint": "final"},
    "retention": {"recipe": "none", "strength": {}},
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
    store: how many rows are kept of each; questions: how many questions about people who do not exist the teacher
    answers, to be held on; joint: all at once, in place of one after the other; control: one
    order for each seed will do.
    """

    name: str
    learning_rate: float
    steps: int
    blocks: Blocks = field(default_factory=dict)
    general: str | None = None
    earlier: bool = False
    store: int | None = None
    questions: int = 0
    joint: bool = False
    control: bool = False

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


KL = {"weight": 10.0, "every": 1, "rows_per_step": 0.5, "self_written": {"texts": 1000, "opening": "both"}}


def tiers(strategy: str, *update_every: int, **more: Any) -> Blocks:
    """The block of a tier strategy."""
    return {"tiers": {"strategy": strategy, "update_every": list(update_every), **more}}


def replay(rows: float) -> Blocks:
    """So many rows of general data in each step, added to it, or that share of it."""
    return {"retention": {"replay": {"rows_per_step": rows}}}


def kl(**changes: Any) -> Blocks:
    """The divergence of the recipe, with changes."""
    return {"retention": {"kl": KL | changes}}


PLAIN = "plain LoRA"
TIER_RATE, TIER_STEPS = 1e-3, 350
# A strategy sees so many steps as plain LoRA needs at this rate, or a quarter more where tiers rest at most steps.
RESTING_STEPS = 450

ONE_TASK: tuple[Method, ...] = (
    # As many steps as let it reach the target on every seed.
    Method("plain 2e-4", PLAIN, 2e-4, 1600),
    Method("plain 5e-4", PLAIN, 5e-4, 700),
    Method("plain 1e-3", PLAIN, 1e-3, 350),
    Method("plain 2e-3", PLAIN, 2e-3, 250),
    Method("plain 4e-3", PLAIN, 4e-3, 200),
    *(
        Method(name, "tiers", TIER_RATE, RESTING_STEPS, blocks)
        for name, blocks in (
            ("shallow fast [1, 2, 4]", tiers("layer_depth", 1, 2, 4)),
            ("shallow fast [1, 8, 64]", tiers("layer_depth", 1, 8, 64)),
            ("deep fast [1, 2, 4]", tiers("layer_depth_reversed", 1, 2, 4)),
            ("deep fast [1, 8, 64]", tiers("layer_depth_reversed", 1, 8, 64)),
            ("importance [1, 2, 4]", tiers("parameter_importance", 1, 2, 4)),
            (
                "importance reversed",
                tiers("parameter_importance", 1, 2, 4, importance={"reversed": True}),
            ),
            ("module type [1, 4]", tiers("module_type", 1, 4)),
            ("stacked [1, 2, 4]", tiers("stacked", 1, 2, 4)),
            ("manual: MLP fast [1, 4]", tiers("manual", 1, 4, assignments={"*.mlp.*": 0, "*.self_attn.*": 1})),
            ("random [1, 2, 4]", tiers("random", 1, 2, 4)),
            ("deep fast, slow frozen", tiers("frozen_slow", 1, 2, 4)),
            ("deep fast, rates 1/period", tiers("layer_depth_reversed", 1, 2, 4, lr_scale="inverse_period")),
        )
    ),
    Method(
        "deep fast, accumulate",
        "tiers",
        TIER_RATE,
        TIER_STEPS,
        tiers("layer_depth_reversed", 1, 2, 4, inactive_gradients="accumulate"),
    ),
    Method(
        "rates 1, 1/2, 1/4, no tiers",
        "tiers",
        TIER_RATE,
        TIER_STEPS,
        tiers("layer_depth_reversed", 1, 1, 1, lr_scale=[1, 0.5, 0.25]),
    ),
    Method("replay 1 %", "replay", TIER_RATE, TIER_STEPS, replay(0.01), "general/replay"),
    Method("replay 5 %", "replay", TIER_RATE, TIER_STEPS, replay(0.05), "general/replay"),
    Method("replay 10 %", "replay", TIER_RATE, TIER_STEPS, replay(0.10), "general/replay"),
    Method("replay + 8 rows", "replay", TIER_RATE, TIER_STEPS, replay(8), "general/replay"),
    Method("KL, half of each step", "KL", 2e-3, 450, kl()),
    Method("KL, 32 texts every 4th", "KL", 2e-3, 300, kl(weight=20.0, every=4, rows_per_step=32)),
    Method("L2 0.01", "L2", TIER_RATE, TIER_STEPS, {"retention": {"l2": 0.01}}),
    Method(
        "deep fast + replay 10 %",
        "combined",
        TIER_RATE,
        RESTING_STEPS,
        {**tiers("layer_depth_reversed", 1, 2, 4), **replay(0.10)},
        "general/replay",
    ),
    Method(
        "deep fast + KL every 4th",
        "combined",
        2e-3,
        400,
        {**tiers("layer_depth_reversed", 1, 2, 4), **kl(weight=20.0, every=4, rows_per_step=32)},
    ),
    Method(NO_OLD_DATA, "recipes", 2e-3, 500, {"retention": {"recipe": "no_old_data"}}),
    Method(WITH_REPLAY, "recipes", 2e-3, 500, {"retention": {"recipe": "with_replay"}}, "general/replay"),
)

REPLAY_ALONE: Blocks = {"retention": {"strength": None, "replay": {"rows_per_step": 8}}}
# A third task may cost so much; with fewer new rows a step, what is replayed counts for more in it.
RECIPE: Blocks = {"training": {"batch_size": 12}, "retention": {"recipe": "with_replay"}}
# What no replayed row tells must be restored from what the teacher writes, for longer, and may cost a little more of
# what is new. Its texts tell what it is surest of; answers to questions about nobody hold the rest as well.
QUESTIONS: Blocks = {
    "retention": {
        "recipe": "with_replay",
        "kl": {"after": 0.4, "rows_per_step": 0.75, "self_written": {"texts": 500}},
        "strength": {"min_share": 0.93, "factors": [0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0]},
    }
}
ALL, QUARTER = "general/replay", "general/quarter"
JOINT, ONE_BY_ONE, REPLAY = "joint training", "plain LoRA, task by task", "replay"
STORED, REPLAY_QUARTER = "recipe, 64 rows stored", "replay of a quarter"
RECIPE_QUESTIONS = "recipe + questions, quarter"

SEQUENCE: tuple[SequenceMethod, ...] = (
    # As many rows of each of three tasks and of general data in a step.
    SequenceMethod(
        JOINT,
        2e-3,
        1200,
        {"training": {"batch_size": 6}, "retention": {"strength": None, "replay": {"rows_per_step": 18}}},
        ALL,
        joint=True,
    ),
    SequenceMethod(ONE_BY_ONE, 2e-3, 250, {"retention": {"strength": None}}, control=True),
    SequenceMethod(REPLAY, 2e-3, 400, REPLAY_ALONE, ALL, earlier=True, control=True),
    SequenceMethod(WITH_REPLAY, 5e-3, 620, RECIPE, ALL, earlier=True),
    SequenceMethod(STORED, 5e-3, 620, RECIPE, ALL, earlier=True, store=64, control=True),
    SequenceMethod(REPLAY_QUARTER, 2e-3, 400, REPLAY_ALONE, QUARTER, earlier=True, control=True),
    # Three times as many questions in the forms that are known, about names that nobody has, as texts.
    SequenceMethod(RECIPE_QUESTIONS, 4e-3, 850, QUESTIONS, QUARTER, earlier=True, questions=1500),
)
