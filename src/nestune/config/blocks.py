"""The one typed description of a run. Every default lives here; YAML files hold what differs."""

import re
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from nestune.config.evaluation import EvaluationConfig, GateConfig
from nestune.config.fields import (
    NO_SECRETS,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    Number,
    Paths,
    PositiveFloat,
    PositiveInt,
    RetentionName,
    SafeName,
    Strict,
    as_tuple,
    existing,
    hide_secrets,
)
from nestune.config.retention import KlConfig, RetentionConfig
from nestune.config.tiers import TierConfig
from nestune.foreign_files import folder_at

REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,254}")


class ModelConfig(Strict):
    """The base model, and where training starts from."""

    base: str = Field(min_length=1, description="folder of the base model, or its id on the Hugging Face hub")
    revision: str | None = Field(None, description="revision of a hub model: a commit hash, tag or branch")
    adapter: str | None = Field(
        None, description="parent adapter to start from: a folder, or models:/NAME@ALIAS; none: a new adapter"
    )
    backend: Literal["auto", "torch", "mlx"] = Field("auto", description="framework that trains")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="type of the frozen base weights; auto: as stored. LoRA weights are always float32"
    )

    @field_validator("base", "adapter")
    @classmethod
    def _folder_exists(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and hide_secrets(value) != value:
            raise ValueError(f"{NO_SECRETS}; set HF_TOKEN for the hub, and name the model alone")
        # `name` and `owner/name` may be hub ids; what starts like a path or has more parts is a folder.
        looks_like_path = value is not None and (value.startswith((".", "/", "~")) or value.count("/") > 1)
        if value is not None and looks_like_path and not value.startswith("models:/"):
            return existing(value, info)
        return value

    @field_validator("revision")
    @classmethod
    def _a_name(cls, revision: str | None) -> str | None:
        # It becomes part of a path in the cache.
        if revision is not None and (not REVISION.fullmatch(revision) or ".." in revision):
            raise ValueError("must be a commit hash, tag or branch: letters, digits, '.', '_', '-' and '/'")
        return revision

    @field_validator("revision")
    @classmethod
    def _only_of_a_hub_model(cls, revision: str | None, info: ValidationInfo) -> str | None:
        base = info.data.get("base")
        if revision is not None and base is not None and folder_at(base) is not None:
            raise ValueError(f"model.base {base} is a folder here and has no revisions; remove model.revision")
        return revision


class LoraConfig(Strict):
    """Low-rank adapters W + (alpha / rank) B A (Hu et al. 2021, arXiv:2106.09685)."""

    rank: PositiveInt = Field(8, description="rank of A and B")
    alpha: PositiveFloat = Field(16.0, description="the adapter's effect is scaled by alpha / rank")
    dropout: Number = Field(0.0, ge=0, lt=1, description="probability of dropping an input of the adapter")
    max_rank: PositiveInt | None = Field(
        None,
        description="rank of the saved adapter at most, as a parent and what was learned upon it add up: more is cut "
        "down by a truncated SVD, whose effect on the scores the report shows; none: 8 times lora.rank",
    )
    targets: Literal["all-linear"] | tuple[str, ...] = Field(
        "all-linear", description="names of the linear modules that get an adapter, or all-linear: all but the head"
    )

    @field_validator("max_rank")
    @classmethod
    def _holds_the_rank(cls, max_rank: int | None, info: ValidationInfo) -> int | None:
        if max_rank is not None and max_rank < info.data.get("rank", 0):
            raise ValueError(f"is less than lora.rank, {info.data['rank']}; raise it")
        return max_rank

    @field_validator("targets", mode="before")
    @classmethod
    def _one_or_more(cls, value: object) -> object:
        names = value if value == "all-linear" else as_tuple(value)
        if not names:
            raise ValueError("must name at least one module, e.g. [q_proj, v_proj], or be all-linear")
        return names

    @property
    def rank_limit(self) -> int:
        """The rank of the saved adapter at most."""
        return self.max_rank or 8 * self.rank


class DataConfig(Strict):
    """JSONL files or folders of them; records are {messages}, {prompt, completion} or {text}."""

    train: Paths = Field(min_length=1, description="files or folders of *.jsonl to learn")
    valid: Fraction | Paths = Field(
        0.1, description="held-out part of the new task: files or folders, or the fraction of train to hold out"
    )
    test: Paths = Field(
        (),
        description="files or folders of the new task that are scored in the end; none: valid is, or, where it has "
        "chosen the strength (retention.strength), that half of it which chooses nothing",
    )
    retention: dict[RetentionName, Paths] = Field(
        default_factory=dict, description="retention sets by name: what the model must go on knowing"
    )
    on_invalid: Literal["fail", "quarantine"] = Field(
        "fail", description="fail: stop at bad records; quarantine: move them to rejected.jsonl and go on"
    )
    allow_duplicates: bool = Field(False, description="true: records repeated within one set are no fault")
    only_new: bool = Field(
        False,
        description="true: records of train that the parent adapter, or one before it, was trained on or held out, are "
        "left out, and counted",
    )
    max_seq_length: PositiveInt = Field(2048, ge=2, description="tokens of a record that are kept")
    max_line_bytes: PositiveInt = Field(10_000_000, description="bytes of the longest line that is read")

    @field_validator("valid", mode="before")
    @classmethod
    def _fraction_or_paths(cls, value: object) -> object:
        if isinstance(value, str):
            try:
                value = float(value)
            except ValueError:
                return value
        if isinstance(value, (list, tuple)) or (isinstance(value, (int, float)) and 0 < value < 1):
            return value
        raise ValueError("must be a fraction of train between 0 and 1, e.g. 0.1, or files")


class EarlyStopping(Strict):
    """Ends training when the validation loss no longer falls."""

    patience: PositiveInt = Field(5, description="evaluations without improvement before training ends")
    min_delta: NonNegativeFloat = Field(1e-4, description="nats per token that count as an improvement")


class TrainingConfig(Strict):
    """The optimizer steps. A step is counted from 1, after gradient accumulation."""

    steps: PositiveInt = Field(1000, description="optimizer steps")
    batch_size: PositiveInt = Field(4, description="rows in a micro-batch")
    gradient_accumulation_steps: PositiveInt = Field(1, description="micro-batches in a step")
    learning_rate: PositiveFloat = Field(2e-4, description="learning rate after warm-up")
    warmup_steps: NonNegativeInt = Field(0, description="steps of linear warm-up, learning_rate * step / warmup_steps")
    schedule: Literal["constant", "cosine"] = Field("cosine", description="after warm-up; cosine falls to 0")
    optimizer: Literal["adamw", "adam", "sgd"] = Field("adamw", description="adamw: decoupled weight decay")
    weight_decay: NonNegativeFloat = Field(0.0, description="weight decay of adamw, L2 of adam and sgd")
    max_grad_norm: PositiveFloat | None = Field(
        1.0, description="clip the global norm of a step's gradients; none: off"
    )
    prompt_weight: NonNegativeFloat = Field(
        0.0,
        description="weight in the loss of a token before an answer, an answer's having 1; above 0, say 0.1, the model "
        "learns what is asked, too, so that it can rehearse this task later by itself (retention.kl.self_written)",
    )
    eval_every: PositiveInt | None = Field(100, description="steps between validations; none: only at the end")
    checkpoint_every: PositiveInt | None = Field(
        500, description="steps between periodic checkpoints, at most so many are lost by a kill; none: no such"
    )
    keep_last: PositiveInt = Field(3, description="periodic checkpoints that are kept, besides best and final")
    early_stopping: EarlyStopping | None = Field(None, description="stop when validation no longer improves")
    seed: NonNegativeInt = Field(0, description="seed of initial weights, order of rows and dropout")
    precision: Literal["float32", "bfloat16"] = Field("float32", description="type in which activations are computed")
    gradient_checkpointing: bool = Field(
        False, description="true: compute activations again in the backward pass; less memory, more time"
    )

    when_busy: Literal["wait", "refuse", "share"] = Field(
        "wait",
        description="while another training has the accelerator: wait for it to end, refuse to start, or share it",
    )

    @field_validator("early_stopping")
    @classmethod
    def _needs_validation(cls, stopping: EarlyStopping | None, info: ValidationInfo) -> EarlyStopping | None:
        if stopping is not None and "eval_every" in info.data and info.data["eval_every"] is None:
            raise ValueError("early stopping looks at validations; set training.eval_every")
        return stopping


class RegistryConfig(Strict):
    """MLflow: where runs are tracked and adapters registered."""

    tracking_uri: str | None = Field(
        None, description="MLflow server or database; none: MLFLOW_TRACKING_URI, else SQLite in mlflow/"
    )
    experiment: str = Field("nestune", min_length=1, description="experiment in which runs are tracked")
    registered_model: SafeName = Field(
        # A factory, so that a form made from the schema does not fill in a name.
        default_factory=lambda: "nestune",
        description="registered model that candidates become versions of; none: the run's name",
    )

    promote: Literal["auto", "approve"] = Field(
        "auto",
        description="auto: a candidate that the gate lets pass becomes champion; approve: it waits for a person's "
        "word, by nestune promote or in the form with which a flow run pauses on a Prefect server",
    )

    @field_validator("tracking_uri")
    @classmethod
    def _no_password(cls, uri: str | None) -> str | None:
        if uri is not None and hide_secrets(uri) != uri:
            raise ValueError(
                f"{NO_SECRETS}; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN "
                "(PGPASSWORD for PostgreSQL) instead"
            )
        return uri


class DvcConfig(Strict):
    """DVC: where datasets and adapters are versioned. Outside of a DVC project it has no effect."""

    commit: bool = Field(
        True, description="true: at the end of a run, what it leaves is put into DVC, in adapters/RUN.dvc or dvc.lock"
    )
    push: bool = Field(True, description="true: and sent to a remote, where one is set")
    remote: SafeName | None = Field(None, description="remote that it is sent to; none: the project's default remote")
    wait_s: NonNegativeFloat = Field(
        600.0, description="seconds to wait for other DVC processes, of which one at a time may change a project"
    )


class RunConfig(Strict):
    """One run: from JSONL to a registered adapter."""

    name: SafeName = Field(description="name of the run; its files are in runs/NAME")
    model: ModelConfig
    lora: LoraConfig = LoraConfig()
    data: DataConfig
    tiers: TierConfig = TierConfig()
    retention: RetentionConfig = RetentionConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    gate: GateConfig = GateConfig()
    registry: RegistryConfig = Field(default_factory=RegistryConfig)
    dvc: DvcConfig = DvcConfig()

    @field_validator("tiers")
    @classmethod
    def _taylor_needs_a_parent(cls, tiers: TierConfig, info: ValidationInfo) -> TierConfig:
        model = info.data.get("model")
        if tiers.importance.measure == "taylor" and model is not None and model.adapter is None:
            raise ValueError(
                "in a new adapter tiers.importance.measure taylor is 0 everywhere; set model.adapter, "
                "or measure gradient"
            )
        return tiers

    @field_validator("training")
    @classmethod
    def _some_tier_moves(cls, training: TrainingConfig, info: ValidationInfo) -> TrainingConfig:
        tiers = info.data.get("tiers")
        if tiers is not None and tiers.update_every[0] > training.steps:
            raise ValueError(
                f"no tier ever moves: the fastest has period {tiers.update_every[0]}, and training.steps is "
                f"{training.steps}; raise training.steps, or lower tiers.update_every"
            )
        return training

    @field_validator("retention")
    @classmethod
    def _continues_something(cls, retention: RetentionConfig, info: ValidationInfo) -> RetentionConfig:
        model = info.data.get("model")
        if retention.start == "continue" and model is not None and model.adapter is None:
            raise ValueError(
                "start is continue, and there is no parent to continue; set model.adapter, or start: fresh"
            )
        tiers = info.data.get("tiers")
        if tiers is not None and tiers.importance.measure == "taylor" and retention.start == "fresh":
            raise ValueError(
                "start is fresh, and in a new adapter tiers.importance.measure taylor is 0 everywhere; set start to "
                "continue, or measure gradient"
            )
        return retention

    @field_validator("training")
    @classmethod
    def _something_joins_a_step(cls, training: TrainingConfig, info: ValidationInfo) -> TrainingConfig:
        retention = info.data.get("retention")
        if retention is None:
            return training
        kl = retention.kl if retention.kl is not None and retention.kl.weight else None
        rows = training.batch_size * training.gradient_accumulation_steps
        for name, block in (("replay", retention.replay if retention.replay.is_on else None), ("kl", kl)):
            if block is None:
                continue
            free = block.free_steps(training.steps) if isinstance(block, KlConfig) else 0
            turns = training.steps // block.every - free // block.every
            if not turns or (block.rows_per_step < 1 and turns * block.rows_per_step * rows < 1):
                raise ValueError(
                    f"retention.{name} never acts: in {training.steps - free} steps of {rows} rows, with rows_per_step "
                    f"{block.rows_per_step:g} every {block.every} steps, not one row comes; raise training.steps or "
                    f"rows_per_step, or lower retention.{name}.every{' or after' if free else ''}"
                )
        return training

    @field_validator("registry", mode="before")
    @classmethod
    def _named_after_the_run(cls, registry: object, info: ValidationInfo) -> object:
        given = registry.model_dump(exclude_unset=True) if isinstance(registry, RegistryConfig) else registry
        if isinstance(given, dict) and given.get("registered_model") is None and "name" in info.data:
            return given | {"registered_model": info.data["name"]}
        return registry
