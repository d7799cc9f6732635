"""Stage train: from the validated dataset and the tier map to checkpoints."""

from dataclasses import asdict, dataclass
from typing import Any

from nestune.backends.adapters import WEIGHTS
from nestune.backends.factory import check_backend, make_backend
from nestune.base_model import resolve_base
from nestune.config import RunConfig, dump_config
from nestune.data.batches import evaluation_batches
from nestune.registry.tracking import TrackedRun, tracked_run
from nestune.registry.versions import fitting_champion, resolve_adapter
from nestune.runs import RunPaths, kept_until_replaced, record_stage, sha256_file, write_text
from nestune.stages.inputs import read_training_inputs, tier_map_depends_on
from nestune.tiers.schedule import TierSchedule
from nestune.tiers.tier_map import read_fitting_tier_map
from nestune.training.checkpoints import Checkpoints, refuse_other_checkpoints
from nestune.training.loop import run_training
from nestune.training.progress import ProgressBar
from nestune.training.recorder import Listener, Recorder


@dataclass(frozen=True)
class TrainResult:
    """What training did; losses in nats per supervised token."""

    steps: int
    best_validation_loss: float
    update_counts: list[int]
    adapter_sha256: str
    checkpoints: str

    def as_dict(self) -> dict[str, Any]:
        """The result as JSON."""
        return asdict(self)

    def summary(self) -> list[str]:
        """The result for a person."""
        return [
            f"steps: {self.steps}, updates of each tier: {' / '.join(map(str, self.update_counts))}",
            f"best validation loss: {self.best_validation_loss:.4f} nats per token",
            f"checkpoints: {self.checkpoints}",
        ]


def check_before_training(config: RunConfig, run: RunPaths, overwrite: bool = False) -> None:
    """Find out now what would else stop the run after hours of training.

    Raises ConfigError when the run's folder holds checkpoints of another configuration and `overwrite` is false,
    when the backend is not there, when the parent adapter does not exist, or when the champion is of another base
    or rank; ServiceError when the tracking server does not answer.
    """
    if not overwrite:
        refuse_other_checkpoints(config, run)
    check_backend(config)
    if config.model.adapter is not None:
        resolve_adapter(config.model.adapter, config.registry)
    fitting_champion(config, resolve_base(config.model))


def train(config: RunConfig, run: RunPaths, overwrite: bool = False) -> TrainResult:
    """Train the adapter and write checkpoints and metrics.

    Earlier checkpoints stay until the new ones are complete. Raises what `check_before_training` raises, and
    RunError when an earlier stage is missing or its files have changed, or when training diverges.
    """
    check_before_training(config, run, overwrite)
    inputs = read_training_inputs(config, run)
    base, dataset = inputs.base, inputs.dataset
    backend = make_backend(config)
    made_from = tier_map_depends_on(config.tiers, inputs.importance_depends_on(backend.name))
    tier_map = read_fitting_tier_map(run.tiers, backend.lora_parameters(), config.tiers, made_from)
    backend.load_adapter(inputs.parent)
    backend.prepare_training(tier_map.tier_of)
    steps = inputs.steps()
    valid = list(evaluation_batches(dataset.valid, config.evaluation.batch_size, inputs.pad_id))

    write_text(run.config, dump_config(config))
    checkpoints = Checkpoints(run.checkpoints, backend, base, config)
    schedule = TierSchedule(config.tiers.periods)
    tags = {"base_sha256": base.sha256, "dataset_sha256": dataset.sha256, "tier_map_sha256": tier_map.sha256}
    with (
        kept_until_replaced(run.checkpoints, run.metrics, run.tracking),
        tracked_run(config, run, tags) as tracked,
        ProgressBar(config.training.steps) as bar,
    ):
        listeners: list[Listener] = [bar, _Tracker(tracked)]
        with Recorder(run.metrics, len(config.tiers.update_every), listeners) as recorder:
            best = run_training(backend, schedule, steps, valid, config.training, recorder, checkpoints)
    record_stage(run, "train", [run.config, run.dataset, run.tiers], [run.checkpoints, run.metrics])
    adapter = sha256_file(run.checkpoints / config.evaluation.checkpoint / WEIGHTS)
    return TrainResult(recorder.last_step, best.loss, recorder.update_counts, adapter, run.checkpoints.as_posix())


class _Tracker:
    """Passes the numbers of steps and validations on to the tracking server; a `Listener`."""

    def __init__(self, tracked: TrackedRun) -> None:
        self._tracked = tracked

    def on_step(self, line: dict[str, Any]) -> None:
        counts = {f"updates/tier_{tier}": count for tier, count in enumerate(line["update_counts"])}
        numbers = {f"train/{key}": line[key] for key in ("loss", "learning_rate", "grad_norm", "tokens_per_s")}
        self._tracked.log_metrics(line["step"], numbers | counts)

    def on_validation(self, line: dict[str, Any]) -> None:
        self._tracked.log_metrics(line["step"], {"valid/loss": line["valid_loss"]})
