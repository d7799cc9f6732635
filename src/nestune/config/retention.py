"""The block `retention`: what keeps earlier knowledge during training, and recipes that set it."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from nestune.config.fields import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    Number,
    Paths,
    PositiveFloat,
    PositiveInt,
    Strict,
)

MOST_FACTORS = 64


class ReplayConfig(Strict):
    """Rows of earlier data that join each step, so that what they say is not forgotten.

    Source of `balance`: the exponential smoothing by which multilingual models draw from corpora of different sizes,
    e.g. Conneau & Lample 2019, arXiv:1901.07291, section 3.1.
    """

    files: Paths = Field((), description="files or folders of *.jsonl with earlier data")
    earlier_tasks: bool = Field(
        False, description="true: also the rows that the parent adapter, and those before it, were trained on"
    )
    store: PositiveInt | None = Field(
        None, description="rows kept of each file and each earlier task, drawn by training.seed; none: all of them"
    )
    rows_per_step: Fraction | PositiveInt = Field(
        8,
        description="rows added to each step; a fraction below 1: that share of the step's own rows gives way to them",
    )
    balance: Number = Field(
        0.5,
        ge=0,
        le=1,
        description="how often a file or an earlier task of n rows is drawn from: as n to the power of this says; 0: "
        "each as often; 1: each row as often",
    )
    every: PositiveInt = Field(1, description="steps between two that replay")

    @field_validator("store")
    @classmethod
    def _of_something(cls, store: int | None, info: ValidationInfo) -> int | None:
        if store is not None and not info.data.get("files") and not info.data.get("earlier_tasks"):
            raise ValueError(
                "nothing is replayed of which rows could be kept; set files or earlier_tasks, or remove it"
            )
        return store

    @property
    def is_on(self) -> bool:
        """Whether anything is replayed."""
        return bool(self.files) or self.earlier_tasks


class SelfWrittenConfig(Strict):
    """Texts that the teacher writes before training: what it knows, in its own words."""

    texts: NonNegativeInt = Field(1000, description="how many it writes from nothing; 0: none")
    opening: Literal["start", "chat", "both"] = Field(
        "both",
        description="what it goes on from: its start token; the opening of a user's turn in its chat template, whose "
        "question it makes up and answers; or the one and the other in turn, as far as it has them",
    )
    max_tokens: PositiveInt = Field(64, ge=2, description="tokens of the longest text, and of an answer to a prompt")
    temperature: PositiveFloat = Field(1.0, description="1: as the model would; lower: the likelier, with less variety")


class PromptsConfig(Strict):
    """Prompts that the teacher answers before training, in place of texts from nothing or beside them."""

    files: Paths = Field((), description="files or folders of *.jsonl; of their records the last answer is replaced")
    templates: tuple[str, ...] = Field((), description="questions with blanks, e.g. What is {name}'s trade?")
    fillings: dict[str, tuple[str, ...]] = Field(
        default_factory=dict, description="blank -> what may be drawn for it, e.g. {name: [Ada, Bert]}"
    )
    filled: PositiveInt = Field(500, description="questions that are made of the templates, their blanks drawn by lot")

    @field_validator("fillings")
    @classmethod
    def _for_every_blank(cls, fillings: dict[str, tuple[str, ...]], info: ValidationInfo) -> dict[str, tuple[str, ...]]:
        from string import Formatter

        templates = info.data.get("templates", ())
        try:
            parts = [part for text in templates for part in Formatter().parse(text) if part[1] is not None]
        except ValueError as error:
            raise ValueError(
                f"a template cannot be read: {error}; write a brace that is none as {{{{ or }}}}"
            ) from None
        odd = sorted({str(name) for _, name, form, kind in parts if form or kind or not str(name).isidentifier()})
        if odd:
            raise ValueError(f"a blank must be a plain name in braces, such as {{name}}; these are not: {odd}")
        blanks = {str(name) for _, name, _, _ in parts}
        empty = sorted(name for name, values in fillings.items() if not values)
        if blanks != fillings.keys() or empty:
            raise ValueError(
                f"the templates have the blanks {sorted(blanks)}, fillings are given for {sorted(fillings)}"
                f"{f', none for {empty}' if empty else ''}; give one or more for each, and no other"
            )
        return fillings


class KlConfig(Strict):
    """Holds the model to what its teacher says: the Kullback-Leibler divergence KL(teacher || model) joins the loss.

    The loss of a step is the mean cross-entropy of its supervised tokens plus `weight` times the mean divergence of
    its held positions: every token of a text that the teacher wrote, the supervised ones of a replayed row.
    Source: Li & Hoiem 2016, Learning without Forgetting, arXiv:1606.09282, with texts in place of the task's inputs.
    """

    weight: NonNegativeFloat = Field(1.0, description="factor on the mean divergence, in nats per token; 0: off")
    teacher: Literal["parent", "base"] = Field(
        "parent", description="who is held to: the parent adapter (the base where there is none), or the base alone"
    )
    after: Number = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the steps that go by before the first that holds: a skill that contradicts an old one is "
        "perhaps never learned while the model is held, and what is forgotten meanwhile comes back; only after twice "
        "that share may a checkpoint be the best; 0: none",
    )
    every: PositiveInt = Field(4, description="steps between two that hold the model to its teacher")
    rows_per_step: Fraction | PositiveInt = Field(
        8,
        description="self-written texts, and answered prompts, that are added to each such step; a fraction below 1: "
        "that share of the step's own rows gives way to them",
    )
    replayed: bool = Field(False, description="true: replayed rows of such a step are held, too")
    self_written: SelfWrittenConfig = SelfWrittenConfig()
    prompts: PromptsConfig = PromptsConfig()

    def free_steps(self, steps: int) -> int:
        """The last of so many steps before the model is held for the first time."""
        # The addition keeps 0.29 * 100, a little below 29 in floating point, from becoming 28.
        return int(self.after * steps + 1e-9)

    def restored_step(self, steps: int) -> int:
        """The step of so many from which on a checkpoint may be the best: held for as long as it was free, or the last.

        Before, a low validation loss shows what was learned alone.
        """
        return min(2 * self.free_steps(steps), steps)

    @property
    def writes(self) -> bool:
        """Whether the teacher writes anything before training."""
        return self.weight > 0 and bool(self.self_written.texts or self.prompts.files or self.prompts.templates)


class StrengthConfig(Strict):
    """How much of the learned change is kept: after training it is scaled by a factor, which is then part of it.

    Chosen is, on rows that are not scored afterwards (`data.valid`), the factor with the least divergence from the
    parent of those that still learn enough. Source: WiSE-FT, Wortsman et al. 2022, arXiv:2109.01903, on an adapter.
    """

    min_share: Number = Field(
        0.97, gt=0, le=1, description="share of what the whole change gains on the new task that must be kept"
    )
    factors: tuple[Number, ...] = Field(
        (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
        min_length=1,
        max_length=MOST_FACTORS,
        description="factors that are tried, ascending, between 0 and 1; 1, the change as it was learned, is tried, "
        "too, and stays where no other keeps enough",
    )

    @field_validator("factors")
    @classmethod
    def _ascending(cls, factors: tuple[float, ...]) -> tuple[float, ...]:
        if list(factors) != sorted(set(factors)) or not all(0 <= factor <= 1 for factor in factors):
            raise ValueError("must ascend, each once, between 0 and 1, e.g. [0.5, 0.75, 1.0]")
        return factors


# What benchmarks/retention.py found best. Learning comes first, and then half of every step restores what it has cost,
# which keeps more than as many rows every few steps. Replayed rows slow learning down, so it has more time, and a
# little more than half of a step's own rows restore in the rest of it. Without them, what comes back is as varied as
# the texts are, so there are more.
EACH_STEP: dict[str, Any] = {"weight": 10.0, "every": 1}
RECIPES: dict[str, dict[str, Any]] = {
    "none": {},
    "no_old_data": {
        "kl": EACH_STEP | {"after": 0.3, "rows_per_step": 0.5, "self_written": {"texts": 2000, "opening": "both"}},
        "strength": {},
    },
    "with_replay": {
        "replay": {"earlier_tasks": True},
        "kl": EACH_STEP | {"after": 0.55, "rows_per_step": 0.6, "self_written": {"texts": 1000, "opening": "both"}},
        "strength": {},
    },
}


class RetentionConfig(Strict):
    """What keeps earlier knowledge during training; composes with every tier strategy."""

    recipe: Literal["none", "no_old_data", "with_replay"] = Field(
        "no_old_data",
        description="sets what of this block is not set. no_old_data: part of the steps learn alone, then KL to the "
        "parent, on texts that it wrote before training, is half of each step, and strength: keeps nearly all, for "
        "about half as many steps more; with_replay: also the rows of earlier tasks, for sequences, and learning alone "
        "has more time; none: nothing is done to keep what was known",
    )
    replay: ReplayConfig = ReplayConfig()
    kl: KlConfig | None = Field(None, description="KL to the parent; none: off")
    strength: StrengthConfig | None = Field(None, description="scales the learned change after training; none: off")
    l2: NonNegativeFloat = Field(
        0.0, description="factor on the squared Frobenius norm of the change of all weights against the parent"
    )
    start: Literal["fresh", "continue"] = Field(
        "fresh",
        description="with a parent adapter, fresh: train a new adapter beside it, and save their exact sum; continue: "
        "go on with the parent's own matrices",
    )

    @field_validator("kl")
    @classmethod
    def _leaves_room(cls, kl: KlConfig | None, info: ValidationInfo) -> KlConfig | None:
        replay = info.data.get("replay")
        if kl is None or replay is None or kl.weight == 0:
            return kl
        if kl.replayed and not replay.is_on:
            raise ValueError("replayed is true, and nothing is replayed; set replay.files or replay.earlier_tasks")
        if not (kl.writes or kl.replayed):
            raise ValueError(
                "there is nothing to hold the model on; set self_written.texts, prompts, or replayed to true; or kl to "
                "null, for none"
            )
        shares = sum(rows for rows in (replay.rows_per_step if replay.is_on else 1, kl.rows_per_step) if rows < 1)
        if shares >= 1:
            raise ValueError(
                f"nothing new is left in a step: replay.rows_per_step and kl.rows_per_step are {shares:g} of it "
                "together; keep them below 1"
            )
        return kl

    @model_validator(mode="before")
    @classmethod
    def _follow_the_recipe(cls, given: Any) -> Any:
        recipe = RECIPES.get(str(given.get("recipe", cls.model_fields["recipe"].default)), {}) if _is_map(given) else {}
        return _merged(recipe, given) if recipe else given


def change_recipe(block: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """A block that is written out in full, without what recipes have set in it where its recipe is not `before`'s.

    A form shows every option and sends all of them back. What the recipe had set in it would count as set by hand, and
    the one that was picked in its place would set nothing. What differs from `before` was set by hand, and stays.
    """
    if not before or block.get("recipe") == before.get("recipe"):
        return dict(block)
    full = [RetentionConfig(recipe=name).model_dump(mode="json") for name in ("no_old_data", "with_replay")]
    set_by_recipes = [(key, other.get(key)) for other in (before, *full) for key in RECIPES["with_replay"]]
    return {key: value for key, value in block.items() if (key, value) not in set_by_recipes}


def _is_map(value: object) -> bool:
    return isinstance(value, Mapping)


def _merged(recipe: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """What is given, and what the recipe says of the rest, block by block."""
    merged = {key: value for key, value in recipe.items() if key not in given} | dict(given)
    for key in recipe.keys() & given.keys():
        if _is_map(recipe[key]) and _is_map(given[key]):
            merged[key] = _merged(recipe[key], given[key])
    return merged
