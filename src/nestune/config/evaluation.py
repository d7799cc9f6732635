"""The blocks `evaluation` and `gate`: how models are scored, and when a candidate may become champion."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from nestune.config.fields import (
    ExistingPath,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    Number,
    PositiveInt,
    Strict,
    as_tuple,
)


class LmEvalConfig(Strict):
    """Tasks of EleutherAI's lm-evaluation-harness, whose scores join the retention sets as lm_eval/<task>."""

    tasks: Annotated[tuple[str, ...], BeforeValidator(as_tuple)] = Field(
        min_length=1, description="names of tasks or groups, by their first metric of which more is better"
    )
    path: ExistingPath | None = Field(
        None,
        description="folder with task files of one's own; they may name code, which is run: take only trusted ones",
    )
    limit: PositiveInt | None = Field(None, description="documents of each task that are scored; none: all")
    fewshot: NonNegativeInt | None = Field(None, description="examples before each question; none: as the task says")
    chat_template: bool = Field(False, description="true: ask in the base's chat template")


class EvaluationConfig(Strict):
    """How the held-out sets are scored."""

    batch_size: PositiveInt = Field(64, description="rows scored or answered at once")
    max_answer_tokens: PositiveInt = Field(32, description="tokens after which a greedy answer is cut")
    checkpoint: Literal["best", "final"] = Field("best", description="checkpoint that becomes the candidate")
    lm_eval: LmEvalConfig | None = Field(
        None, description="tasks of lm-evaluation-harness (pip install 'nestune[lm-eval]') as further retention sets"
    )


class GateConfig(Strict):
    """When a candidate may become champion: it learned, and nothing was forgotten, both beyond what noise explains.

    A set is scored by exact match where its records have answers, else by loss.
    """

    min_gain: NonNegativeFloat = Field(
        0.05,
        description="exact match (0 to 1) the candidate must gain over its parent on the new task, and beyond noise; "
        "0: no gain is asked",
    )
    min_loss_gain: NonNegativeFloat = Field(
        0.01,
        description="nats per token the loss must fall below the parent's, for a new task without answers; 0: any fall",
    )
    min_relative_gain: Fraction | None = Field(
        None,
        description="share of what the parent gets wrong on the new task (1 - exact match, or its loss) that must go, "
        "in place of min_gain and min_loss_gain",
    )
    max_drop: NonNegativeFloat = Field(
        0.05,
        description="exact match (0 to 1) it may lose to the champion on any set, the new task included; "
        "a larger drop fails where noise does not explain it",
    )
    max_loss_rise: NonNegativeFloat = Field(
        0.1, description="nats per token it may lose to the champion on a set without answers"
    )
    max_relative_drop: Annotated[Number, Field(ge=0, lt=1)] | None = Field(
        None,
        description="share of the champion's exact match (or of its loss) that it may lose on any set, "
        "in place of max_drop and max_loss_rise",
    )
    confidence: Annotated[Number, Field(ge=0.5, lt=1)] = Field(
        0.95, description="confidence of the intervals, by bootstrap over rows, that tell a change from noise"
    )
    require_retention: bool = Field(
        True, description="false: a candidate may be promoted although no retention set shows what it kept"
    )
