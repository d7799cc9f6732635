"""Where training begins: anew, or at a checkpoint of the same configuration."""

import math
from collections.abc import Set
from typing import Any

from pydantic import ValidationError

from nestune.config import KlConfig, RunConfig
from nestune.errors import ConfigError, RunError
from nestune.runs import RunPaths
from nestune.training.best_loss import BestLoss
from nestune.training.checkpoints import Checkpoint, newest_checkpoint, read_checkpoints
from nestune.training.replacement import bring_back_unreplaced

SHAPES_TRAINING = ("model", "lora", "data", "tiers", "retention", "training")
# Some sets are only measured, what comes after training shapes the candidate alone, how long to wait for an accelerator
# nothing.
NO_PART_OF_TRAINING = frozenset(
    {"data.retention", "data.test", "retention.recipe", "retention.strength", "lora.max_rank", "training.when_busy"}
)
# Where it begins to hold, a share of all steps, is to stay at its step.
KL = "retention.kl"
MAY_CHANGE_ON_THE_WAY = frozenset(
    {"model.backend"}
    | {f"training.{key}" for key in ("steps", "eval_every", "checkpoint_every", "keep_last", "gradient_checkpointing")}
)


def starting_point(config: RunConfig, run: RunPaths, force: bool = False, resume: bool = False) -> Checkpoint | None:
    """The checkpoint that training goes on from, or ended with; None: it begins anew, in place of what is there.

    The same configuration goes on. `resume` asks for it, and lets the backend be another, steps be more, and what
    changes no weight be otherwise. `force` trains anew where another configuration was trained, or training had ended.

    Raises ConfigError where another configuration was trained; RunError when there is nothing to resume, or checkpoints
    of which none can be used.
    """
    if resume and force:
        raise ConfigError("--resume goes on from the checkpoints of a run, --force replaces them; pass one of the two")
    bring_back_unreplaced(run)
    if force:
        usable = any(not checkpoint.faults for checkpoint in read_checkpoints(run))
        newest = newest_checkpoint(run) if usable else None
        same = newest is not None and not _differing(newest, config, NO_PART_OF_TRAINING)
        return newest if newest and same and not has_ended(newest, config) else None
    newest = newest_checkpoint(run)
    if newest is None:
        if resume:
            raise RunError(
                f"there is no checkpoint in {run.checkpoints} to go on from. Run nestune train --name {config.name} "
                "without --resume."
            )
        return None
    if resume:
        _check_may_go_on(newest, config)
    else:
        _refuse_other(newest, config, run)
    return newest


def has_ended(checkpoint: Checkpoint, config: RunConfig) -> bool:
    """Whether a checkpoint is the end of the training that is configured."""
    best = BestLoss.of(config)
    best.restore(checkpoint.metadata)
    return checkpoint.is_final and (best.should_stop or checkpoint.step == config.training.steps)


def check_trained(config: RunConfig, run: RunPaths) -> None:
    """Raise RunError unless the run's folder holds a training that went to its end with this configuration.

    The backend may be another: an adapter that one has trained, any other evaluates.
    """
    newest = newest_checkpoint(run)
    train = f"Run nestune train --name {config.name}"
    if newest is None:
        raise RunError(f"there is no checkpoint in {run.checkpoints}: training has not been run. {train}.")
    if not newest.is_final:
        raise RunError(
            f"training has been run to step {newest.step}, not to its end: {newest.folder} is the newest checkpoint. "
            f"{train}, which goes on from there."
        )
    differing = _differing(newest, config, NO_PART_OF_TRAINING | {"model.backend"})
    if differing:
        raise RunError(
            f"{run.checkpoints} was trained with another configuration ({', '.join(differing)} differ). {train} "
            "--force, or use the configuration it was trained with."
        )


def _check_may_go_on(newest: Checkpoint, config: RunConfig) -> None:
    """Raise ConfigError, with all of it, when what shapes training is configured otherwise than it was."""
    faults = [
        f"{key} was {was!r}, now {now!r}"
        for key, (was, now) in _differing(newest, config, NO_PART_OF_TRAINING | MAY_CHANGE_ON_THE_WAY).items()
        if key != KL or not _only_begins_elsewhere(was, now)
    ]
    steps_before, steps = newest.metadata["config"]["training"]["steps"], config.training.steps
    if steps < steps_before:
        faults.append(f"training.steps was {steps_before}, now {steps}: it may only grow")
    free_before, free = (
        kl.free_steps(count) if kl is not None else 0
        for kl, count in ((_kl_of(newest), steps_before), (config.retention.kl, steps))
    )
    if free != free_before:
        after = math.ceil(free_before / steps * 1e6) / 1e6
        faults.append(
            f"{KL} began to hold after step {free_before}, and would now after step {free}: its `after` is a share of "
            f"training.steps; set {KL}.after={after:g}"
        )
    if faults:
        may_change = ", ".join(sorted(MAY_CHANGE_ON_THE_WAY))
        lines = [f"training cannot go on from {newest.folder} with another configuration:", *faults]
        remedy = f"On the way only {may_change} may change. Set the others back, or train under another --name."
        raise ConfigError("\n  ".join([*lines, remedy]))


def _refuse_other(newest: Checkpoint, config: RunConfig, run: RunPaths) -> None:
    differing = _differing(newest, config, NO_PART_OF_TRAINING)
    if differing:
        changed = differing.keys() - ({KL} if _only_begins_elsewhere(*differing.get(KL, ({}, {}))) else set())
        on_the_way = "--resume to go on from it so, " if changed <= MAY_CHANGE_ON_THE_WAY else ""
        raise ConfigError(
            f"{run.checkpoints} holds an adapter trained with another configuration ({', '.join(differing)} differ). "
            f"Pass {on_the_way}--force to replace it, or another --name to keep it."
        )


def _kl_of(checkpoint: Checkpoint) -> KlConfig | None:
    told = checkpoint.metadata["config"].get("retention", {}).get("kl")
    try:
        return KlConfig.model_validate(told) if told is not None else None
    except ValidationError:  # of another version; that it differs is told
        return None


def _only_begins_elsewhere(was: Any, now: Any) -> bool:
    """Whether two blocks `kl` differ in where they begin to hold alone."""
    blocks = [block if isinstance(block, dict) else {} for block in (was, now)]
    return {**blocks[0], "after": None} == {**blocks[1], "after": None}


def _differing(checkpoint: Checkpoint, config: RunConfig, may_differ: Set[str]) -> dict[str, tuple[Any, Any]]:
    """What shapes training and is configured otherwise than it was: key -> its value then and now."""
    trained, wanted = checkpoint.metadata["config"], config.model_dump(mode="json")
    values = {
        f"{block}.{key}": (trained.get(block, {}).get(key), wanted[block].get(key))
        for block in SHAPES_TRAINING
        for key in {**trained.get(block, {}), **wanted[block]}
    }
    return {key: (was, now) for key, (was, now) in values.items() if was != now and key not in may_differ}
