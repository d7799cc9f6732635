"""What training starts from, and what its tier map was made from; the importance pass starts from the same."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nestune.backends.adapters import weights_file
from nestune.base_model import BaseModel, resolve_base
from nestune.config import ImportanceConfig, RunConfig, TierConfig
from nestune.data.batches import Batch, Earlier, training_steps
from nestune.data.dataset import Dataset, load_dataset
from nestune.data.tokens import Row, Tokenizer, load_tokenizer, pad_id_of, tokenizer_files
from nestune.files import sha256_file, sha256_files
from nestune.registry.versions import resolve_adapter
from nestune.runs import RunPaths
from nestune.stages.earlier import earlier_sets
from nestune.training.self_written import SelfWritten


@dataclass(frozen=True)
class TrainingInputs:
    """What a run is trained on.

    The base, the validated dataset, the token that pads, and the parent adapter's folder (None: there is none). Where
    the teacher has written texts: those that the model is held on, those that only measure, and how they came about.
    """

    config: RunConfig
    base: BaseModel
    dataset: Dataset
    pad_id: int
    parent: Path | None
    texts: tuple[Row, ...] = ()
    measuring: tuple[Row, ...] = ()
    written: SelfWritten | None = None

    def steps(self, after: int = 0) -> Iterator[list[Batch]]:
        """The micro-batches of one training step after another, without end, from the step after `after` on.

        A step's are the same ones at every call.
        """
        earlier = Earlier(self.dataset.replay, self.texts)
        retention = self.config.retention
        return training_steps(self.dataset.train, self.config.training, self.pad_id, retention, earlier, after)

    @property
    def data_sha256(self) -> str:
        """SHA-256 of the rows that shape training: trained on, replayed, validated with; not those only scored."""
        folder, sets = self.dataset.folder, self.dataset.sets
        shaping = [name for name in sets if name != "test" and not name.startswith("retention/")]
        return sha256_files(folder, [folder / f"{name}.jsonl" for name in shaping])

    @property
    def parent_sha256(self) -> str | None:
        """SHA-256 of the parent's weights; None: there is none."""
        return sha256_file(weights_file(self.parent)) if self.parent else None

    def importance_depends_on(self) -> dict[str, Any]:
        """All that the importances of this training depend on, by name, as JSON has it: on any backend the same.

        What the pass itself is set to has the name of its field; the rest, that of its key in the configuration.
        """
        importance, training = self.config.tiers.importance, self.config.training
        replay, kl = self.config.retention.replay, self.config.retention.kl
        of_training = {"batch_size", "gradient_accumulation_steps", "seed", "precision"}
        return {
            "measure": importance.measure,
            "steps": importance.steps,
            "data (dataset)": self.dataset.sha256,
            "model.base": self.base.sha256,
            "model.base (tokenizer)": sha256_files(self.base.folder, tokenizer_files(self.base.folder)),
            "model.adapter": self.parent_sha256,
            "lora": self.config.lora.model_dump(mode="json"),
            "model.dtype": self.config.model.dtype,
            "data.max_seq_length": self.base.row_limit(self.config.data.max_seq_length),
            "retention.replay": replay.model_dump(mode="json") if replay.is_on else None,
            "retention.kl": kl.model_dump(mode="json") if kl is not None and kl.weight else None,
            "the steps before retention.kl": kl.free_steps(training.steps) if kl is not None and kl.weight else 0,
            "retention.l2": self.config.retention.l2,
            **{f"training.{key}": value for key, value in training.model_dump(include=of_training).items()},
            "version of nestune": version("nestune"),
        }


def read_training_inputs(config: RunConfig, run: RunPaths) -> TrainingInputs:
    """Read what a run is trained on.

    Raises RunError when the dataset is missing, has changed, or was made with other settings; ConfigError when there
    is no such base or parent adapter.
    """
    base = resolve_base(config.model)
    tokenizer = load_tokenizer(base.folder)
    dataset = read_dataset(config, run, tokenizer, base)
    parent = resolve_adapter(config.model.adapter, config.registry) if config.model.adapter else None
    return TrainingInputs(config, base, dataset, pad_id_of(tokenizer, base.vocabulary), parent)


def read_dataset(
    config: RunConfig, run: RunPaths, tokenizer: Tokenizer, base: BaseModel, candidate: Path | None = None
) -> Dataset:
    """The dataset of a run; raises RunError when it is missing, has changed, or was made with other settings.

    candidate: the adapter that was trained on it, where there is one, to tell the tasks before.
    """
    row_limit = base.row_limit(config.data.max_seq_length)
    earlier, seed = earlier_sets(config, candidate), config.training.seed
    return load_dataset(
        config.data, config.retention, tokenizer, row_limit, run.dataset, base.vocabulary, earlier, seed
    )


def tier_map_depends_on(tiers: TierConfig, measured_on: Mapping[str, Any]) -> dict[str, Any]:
    """What decides a tier map beside parameters, strategy and periods, by its full key, as JSON has it.

    `measured_on`: what the importances depend on; it counts only for the strategy that asks for them.
    """
    if tiers.strategy == "parameter_importance":
        return full_keys({**tiers.importance.model_dump(include={"aggregate", "reversed"}), **measured_on})
    return {"tiers.assignments": tiers.assignments, "tiers.seed": tiers.seed}


def full_keys(of_importance: Mapping[str, Any]) -> dict[str, Any]:
    """The same by keys of the whole configuration: a field of tiers.importance has its block's name before it."""
    own = ImportanceConfig.model_fields
    return {f"tiers.importance.{key}" if key in own else key: value for key, value in of_importance.items()}
