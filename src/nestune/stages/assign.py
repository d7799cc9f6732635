"""Stage tiers: measure importances where the strategy asks for them, divide the LoRA parameters among the tiers."""

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from nestune.backends.base import Backend
from nestune.backends.factory import make_backend
from nestune.config import RunConfig
from nestune.data.batches import Batch
from nestune.errors import RunError
from nestune.files import write_bytes
from nestune.runs import RunPaths, record_stage
from nestune.stages.inputs import TrainingInputs, full_keys, read_training_inputs, tier_map_depends_on
from nestune.stages.texts import with_texts
from nestune.tiers.importance import Importance, Measured, check_importance, read_importance, write_importance
from nestune.tiers.importance_picture import plot_importance
from nestune.tiers.parameters import split_name
from nestune.tiers.picture import plot_tier_map
from nestune.tiers.schedule import TierSchedule, describe_period
from nestune.tiers.tier_map import TierMap, assign_tiers, read_tier_map, write_tier_map
from nestune.training.progress import ProgressBar

log = logging.getLogger(__name__)

MEASURING = "measuring importance"


@dataclass(frozen=True)
class AssignResult:
    """The map that training will follow, and its files; the importances behind it, where it has some.

    `measured_before`: they are those of an earlier pass, as nothing that they depend on has changed.
    """

    tier_map: TierMap
    files: tuple[Path, ...]
    measured: Measured | None = None
    measured_before: bool = False

    def as_dict(self) -> dict[str, Any]:
        """The result as JSON, without the map itself."""
        content = self.tier_map.as_dict()
        del content["tiers"]
        content["files"] = [file.as_posix() for file in self.files]
        if self.measured is not None:
            content["importance"] = {**self.measured.cost, "measured_before": self.measured_before}
        return content

    def summary(self) -> list[str]:
        """The result for a person."""
        whole = all(split_name(name)[1] is None for name in self.tier_map.tier_of)
        what = "matrices" if whole else "parts of matrices"
        tiers = [
            f"tier {tier}: {len(self.tier_map.members(tier))} {what}, {describe_period(period)}"
            for tier, period in enumerate(self.tier_map.update_every)
        ]
        lines = [f"strategy: {self.tier_map.strategy}", *tiers]
        if self.measured is not None:
            cost = "{steps} steps, {seconds:.1f} s, {seconds_per_step:.3f} s a step".format(**self.measured.cost)
            lines.append(f"importance: {'taken from the earlier pass' if self.measured_before else 'measured'}, {cost}")
        warnings = [f"warning: {warning}" for warning in self.tier_map.warnings]
        return [*lines, *warnings, f"files: {', '.join(map(str, self.files))}"]


def assign(config: RunConfig, run: RunPaths) -> AssignResult:
    """Write `tiers.json` and a picture of it; for strategy parameter_importance, the importances and theirs as well.

    Importances are measured on the first steps of the training to come: the same batches, masks and starting weights,
    none of which change, and never more than one step's gradients in memory. `importance.json` keeps them, and they
    are measured again only when something has changed that they depend on.

    Raises ConfigError when a tier would be empty, or the importances rank nothing; RunError when they are to be
    measured and the run has no validated dataset.
    """
    by_importance = config.tiers.strategy == "parameter_importance"
    inputs = read_training_inputs(config, run) if by_importance else None
    backend = make_backend(config)
    parameters = backend.lora_parameters()
    measured, measured_before = _measure(inputs, backend, run) if inputs else (None, False)
    importance = measured.importance if measured else {}
    tier_map = assign_tiers(parameters, config.tiers, importance)
    tier_map = replace(
        tier_map,
        warnings=(*tier_map.warnings, *_warnings(config, importance)),
        made_from=tier_map_depends_on(config.tiers, measured.measured_on if measured else {}),
    )
    write_tier_map(tier_map, run.tiers)
    write_bytes(run.tiers_picture, plot_tier_map(parameters, tier_map))
    read, written = [run.config], [run.tiers, run.tiers_picture]
    if inputs:
        picture = plot_importance(parameters, importance, config.tiers.importance.measure)
        write_bytes(run.importance_picture, picture)
        read += [run.dataset, *filter(None, [inputs.parent])]
        written += [run.importance, run.importance_picture]
    else:
        # The numbers stay for when they are asked for again; a picture beside a map made without them misleads.
        run.importance_picture.unlink(missing_ok=True)
    record_stage(run, "tiers", read, written)
    return AssignResult(tier_map, tuple(written), measured, measured_before)


def importance_behind(run: RunPaths) -> Measured | None:
    """What the run's tier map was made by; None when it was made without, or `importance.json` is of another map.

    They only illustrate a run that is trained: where a file cannot be used, that is logged, and there are none.
    """
    if not (run.tiers.exists() and run.importance.exists()):
        return None
    try:
        made_from, measured = read_tier_map(run.tiers).made_from, read_importance(run.importance)
    except RunError as error:
        log.warning("importances are left out: %s", error)
        return None
    return measured if full_keys(measured.measured_on).items() <= made_from.items() else None


def _measure(inputs: TrainingInputs, backend: Backend, run: RunPaths) -> tuple[Measured, bool]:
    """The importances, and whether they are those of an earlier pass."""
    depends_on = inputs.importance_depends_on()
    earlier = read_importance(run.importance) if run.importance.exists() else None
    names = {p.name for p in backend.lora_parameters()}
    if earlier is not None and earlier.measured_on == depends_on and earlier.importance.keys() == names:
        return earlier, True
    inputs = with_texts(inputs, backend)
    backend.begin(inputs.parent)
    settings = inputs.config.tiers.importance
    steps = islice(inputs.steps(), settings.steps)
    with ProgressBar(settings.steps, MEASURING) as bar:
        began = time.perf_counter()
        importance = backend.measure_importance(_watched(steps, bar), settings.measure)
        seconds = round(time.perf_counter() - began, 3)
    check_importance(importance, settings.measure)
    measured = Measured(importance, depends_on, seconds)
    write_importance(measured, run.importance)
    return measured, False


def _watched(steps: Iterable[Sequence[Batch]], bar: ProgressBar) -> Iterator[Sequence[Batch]]:
    """The steps as they are; the next one is asked for when the one before has been measured."""
    for step, micro_batches in enumerate(steps, start=1):
        yield micro_batches
        bar.show(step, MEASURING)


def _warnings(config: RunConfig, importance: Importance) -> list[str]:
    """What of the configuration makes some parameters move less, or training see less, than it seems to say."""
    steps, measured_steps = config.training.steps, config.tiers.importance.steps
    warnings = [
        f"tier {tier} never moves: its period {period} is longer than the {steps} steps"
        for tier, period in enumerate(config.tiers.periods)
        if period is not None and period > steps
    ]
    idle = steps - TierSchedule(config.tiers.periods).steps_with_an_update(steps)
    if idle and config.tiers.inactive_gradients == "drop":
        warnings.append(
            f"at {idle} of {steps} steps no tier is due: their gradients are not used "
            "(tiers.inactive_gradients accumulate uses them)"
        )
    if importance and measured_steps > steps:
        warnings.append(
            f"importances are measured longer than is trained: tiers.importance.steps is {measured_steps}, "
            f"training.steps {steps}"
        )
    of_a = [value for name, value in importance.items() if name.endswith("lora_a")]
    if config.tiers.importance.aggregate == "parameter" and of_a and not any(of_a):
        place = "first" if config.tiers.importance.reversed else "last"
        warnings.append(
            f"every A measures 0, as B is 0 in a new adapter, so each A comes {place}: tiers.importance.aggregate "
            "module ranks A and B together"
        )
    return warnings
