"""How far tiered training is: optimizer moments, open windows and counts, in a form that every backend reads.

One file, `training_state.safetensors`: the arrays, and the rest as JSON in its header.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, ValidationError

from nestune.config.faults import explain
from nestune.errors import ConfigError, RunError
from nestune.files import write_bytes
from nestune.foreign_files import kind_of, parse_json
from nestune.tiers.parameters import split_name

FILE = "training_state.safetensors"
HEADER = "nestune"
_Count = Annotated[int, Field(ge=0)]
What = Literal["first_moment", "second_moment", "window"]


@dataclass(frozen=True, eq=False)
class TrainingState:
    """The optimizers of all tiers after `steps` steps.

    optimizer, update_every, inactive_gradients, seed: as configured. tier_of: a name of the tier map -> tier.
    updates: how often each tier has moved; window_steps: steps since it last did. arrays: `<name>/<what>`, float32,
    shaped as the matrix, or the ranks of it, that the name stands for (A (ranks, inputs), B (outputs, ranks)).
    what: `first_moment` and `second_moment`, Adam's decayed means of g and g^2, there once the tier has moved;
    `window`, the sum of gradients since the tier's last update, there only under `accumulate` while it is open.
    """

    optimizer: str
    update_every: tuple[int | None, ...]
    inactive_gradients: str
    seed: int
    tier_of: dict[str, int]
    steps: int
    updates: tuple[int, ...]
    window_steps: tuple[int, ...]
    arrays: dict[str, NDArray[Any]]

    def of(self, what: What) -> dict[str, NDArray[Any]]:
        """The arrays of one kind, by name of the tier map."""
        return {key.rpartition("/")[0]: array for key, array in self.arrays.items() if key.endswith(f"/{what}")}


def write_training_state(folder: Path, state: TrainingState) -> None:
    """Write the state into a folder; the same state gives the same bytes."""
    from safetensors.numpy import save

    header = {field.name: getattr(state, field.name) for field in fields(state) if field.name != "arrays"}
    arrays = {key: state.arrays[key] for key in sorted(state.arrays)}
    write_bytes(folder / FILE, save(arrays, metadata={HEADER: json.dumps(header, sort_keys=True)}))


def read_training_state(folder: Path) -> TrainingState:
    """The state in a folder; raises RunError when it is missing or broken."""
    from safetensors import SafetensorError, safe_open

    remedy = "Delete that folder to go on from the checkpoint before it, or train anew."
    try:
        kind = kind_of(folder / FILE)
        if kind is not None:
            raise ValueError(f"it is {kind}, not a file")
        with safe_open(folder / FILE, framework="numpy") as file:
            header = _Header.model_validate(parse_json(((file.metadata() or {})[HEADER]).encode()))
            names = list(file.keys())
            stored = {key: file.get_slice(key).get_dtype() for key in names}
            other = next((f"{key} holds {dtype}" for key, dtype in stored.items() if dtype != "F32"), None)
            if other is not None:
                raise ValueError(f"{other:.200}, not float32")
            arrays = {key: file.get_tensor(key) for key in names}
    except OSError:
        raise RunError(f"there is no {folder / FILE}, so training cannot go on from there. {remedy}") from None
    except ValidationError as error:
        raise RunError(f"{folder / FILE} is broken: {explain(error, _Header)[0]} {remedy}") from None
    except (SafetensorError, KeyError, ValueError) as error:
        raise RunError(f"{folder / FILE} is broken: {error!s:.500}. {remedy}") from None
    return TrainingState(
        **header.model_dump(exclude={"update_every", "updates", "window_steps"}),
        update_every=tuple(header.update_every),
        updates=tuple(header.updates),
        window_steps=tuple(header.window_steps),
        arrays=arrays,
    )


class _Header(pydantic.BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    optimizer: str
    update_every: list[_Count | None]
    inactive_gradients: str
    seed: _Count
    tier_of: dict[str, _Count]
    steps: _Count
    updates: list[_Count]
    window_steps: list[_Count]


def check_fits(state: TrainingState, ours: TrainingState, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ConfigError, with all that differs, unless training as `ours` is set up can go on from `state`.

    shapes: canonical name of each matrix -> its shape.
    """
    faults = [
        f"its {key} is {getattr(state, key)!s:.80}, here {getattr(ours, key)}"
        for key in ("optimizer", "update_every", "inactive_gradients", "seed")
        if getattr(state, key) != getattr(ours, key)
    ]
    pairs = zip_longest(sorted(state.tier_of.items()), sorted(ours.tier_of.items()))
    other = next((pair for pair in pairs if pair[0] != pair[1]), None)
    if other is not None:
        its, here = other
        saved = f"{its[0]:.200} on tier {its[1]}" if its else "nothing more"
        faults.append(f"it has {saved}, here {f'{here[0]} is on tier {here[1]}' if here else 'is nothing more'}")
    else:
        expected = {name: _shape(name, shapes) for name in ours.tier_of}
        faults += [
            f"its {key:.200} has shape {list(array.shape)}, expected {list(expected.get(key.rpartition('/')[0], ()))}"
            for key, array in state.arrays.items()
            if expected.get(key.rpartition("/")[0]) != array.shape
        ]
        counts = (len(state.updates), len(state.window_steps))
        if counts == (len(ours.updates), len(ours.window_steps)):
            faults += _missing(state)
        else:
            faults.append(
                f"it counts updates of {counts[0]} tiers and windows of {counts[1]}, not of {len(ours.updates)}"
            )
    if faults:
        lines = ["the training state does not fit:", *faults, "Go on with the configuration it was saved with."]
        raise ConfigError("\n  ".join(lines))


def _missing(state: TrainingState) -> list[str]:
    """The tiers whose counts tell of arrays that the state does not hold."""
    moments: tuple[What, ...] = () if state.optimizer == "sgd" else ("first_moment", "second_moment")
    faults = []
    for tier, period in enumerate(state.update_every):
        told = list(moments) if state.updates[tier] else []
        if state.inactive_gradients == "accumulate" and state.window_steps[tier] and period is not None:
            told.append("window")
        names = {name for name, of in state.tier_of.items() if of == tier}
        faults += [
            f"its counts tell of a {what} of tier {tier}, which it does not hold"
            for what in told
            if not names & state.of(what).keys()
        ]
    return faults


def _shape(name: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of what a name of the tier map stands for."""
    matrix, ranks = split_name(name)
    rows, columns = shapes[matrix]
    if ranks is None:
        return rows, columns
    return (len(ranks), columns) if matrix.endswith("lora_a") else (rows, len(ranks))
