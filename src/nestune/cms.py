"""Continuum memory: a stack of levels, each of which moves once a chunk of steps, by the mean of its gradients there.

A level is a tier that holds one whole module, and its chunk is the tier's period: the optimizer is the one that trains
LoRA tiers, with `inactive_gradients` accumulate and a learning rate scaled by 1 / chunk.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from nestune.backends.tiered_optimizer import TieredOptimizer
from nestune.errors import ConfigError, RunError
from nestune.files import read_json, replaced_folder, write_json

WEIGHTS, STATE, GROUPS = "weights.safetensors", "optimizer.safetensors", "optimizer.json"


class LevelStack(nn.Module):
    """Levels by name, run in their order: (B, T, width) -> (B, T, width), the last width being that of the last level.

    Of a recurrent level (nn.LSTM, nn.GRU, nn.RNN) the output sequence goes on; its state starts at zero each time.
    Raises ConfigError when a recurrent level is not `batch_first`: it would take rows for time, without a complaint.
    """

    def __init__(self, levels: Mapping[str, nn.Module]) -> None:
        super().__init__()
        time_first = [n for n, level in levels.items() if isinstance(level, nn.RNNBase) and not level.batch_first]
        if time_first:
            raise ConfigError(f"level {', '.join(time_first)}: inputs are (B, T, width); make it with batch_first=True")
        self.levels = nn.ModuleDict(dict(levels))

    def forward(self, x: Tensor) -> Tensor:
        for level in self.levels.values():
            x = level(x)[0] if isinstance(level, nn.RNNBase) else level(x)
        return x


def reference_stack(input_size: int = 256, hidden_size: int = 512) -> LevelStack:
    """System B's model: an LSTM (fast) and two feed-forward levels (medium, slow), all `input_size` wide."""

    def feed_forward() -> nn.Module:
        return nn.Sequential(nn.Linear(input_size, hidden_size), nn.GELU(), nn.Linear(hidden_size, input_size))

    lstm = nn.LSTM(input_size, input_size, batch_first=True)
    return LevelStack({"fast": lstm, "medium": feed_forward(), "slow": feed_forward()})


def level_optimizer(
    stack: LevelStack,
    chunks: Mapping[str, int],
    *,
    lr: float,
    optimizer: Callable[..., Optimizer] = torch.optim.AdamW,
    **options: Any,
) -> TieredOptimizer:
    """An optimizer that moves each level at the steps (1, 2, ...) that are multiples of its chunk.

    chunks: level -> steps, e.g. `{"fast": 1, "medium": 8, "slow": 16}`, in any order and of any sizes: a level is no
    slower for coming later. A level's gradients are added up over its chunk and forgotten only when it has moved; it
    moves by their mean, at the learning rate lr / chunk. `options` go to `optimizer`, `max_grad_norm` to the tiers.
    The loop is PyTorch's own: `loss.backward()`, `step()`, `zero_grad()`, which leaves open windows as they are.
    Raises ConfigError with every fault of `chunks` at once: unknown levels, missing ones, wrong sizes.
    """
    levels = list(stack.levels)
    faults = [f"there is no level {name!r}" for name in chunks if name not in levels]
    faults += [f"level {name!r} has no chunk" for name in levels if name not in chunks]
    faults += [f"the chunk of {name!r} is {chunk!r}" for name, chunk in chunks.items() if not _is_count(chunk)]
    if faults:
        raise ConfigError(
            f"chunks: {'; '.join(faults)}. Give each level ({', '.join(levels)}) a whole number of steps, at least 1."
        )
    parameters = {name: p for name, p in stack.levels.named_parameters() if p.requires_grad}
    tiered = TieredOptimizer(
        parameters,
        {name: levels.index(name.partition(".")[0]) for name in parameters},
        [chunks[name] for name in levels],
        lr=lr,
        lr_scales=[1 / chunks[name] for name in levels],
        inactive_gradients="accumulate",
        optimizer=optimizer,
        **options,
    )
    for name, group in zip(levels, tiered.param_groups, strict=True):
        group["level"] = name
    return tiered


def statistics(optimizer: TieredOptimizer) -> dict[str, dict[str, int]]:
    """Of each level: how often it moved, its chunk, how many numbers it holds, and the steps since it moved."""
    return {
        group["level"]: {
            "updates": group["updates"],
            "chunk": group["update_every"],
            "parameters": sum(p.numel() for p in group["params"]),
            "steps_in_window": group["summed"],
        }
        for group in optimizer.param_groups
    }


def save_checkpoint(folder: Path, stack: LevelStack, optimizer: TieredOptimizer) -> None:
    """Write weights, moments, open windows and counts into a folder that appears whole or not at all.

    What the caller's loop holds (position in the data, random state) is the caller's to keep.
    """
    saved = optimizer.state_dict()
    state = {f"{index}.{key}": value for index, of in saved["state"].items() for key, value in of.items()}
    with replaced_folder(folder) as new:
        for file, tensors in ((WEIGHTS, stack.state_dict()), (STATE, state)):
            save_file({name: value.contiguous() for name, value in tensors.items()}, new / file)
        write_json(new / GROUPS, {"groups": saved["param_groups"]})


def load_checkpoint(folder: Path, stack: LevelStack, optimizer: TieredOptimizer) -> None:
    """Go on from a saved checkpoint, in the middle of a chunk too, with the learning rates that it was saved with.

    Raises RunError when files are missing or broken, and ConfigError with every fault at once when it was saved with
    other levels, chunks, shapes, or options of another optimizer. Nothing is changed then.
    """
    groups = read_json(folder / GROUPS, "Take another checkpoint.", keys=["groups"])["groups"]
    try:
        weights, tensors = load_file(folder / WEIGHTS), load_file(folder / STATE)
    except (OSError, SafetensorError) as error:
        raise RunError(f"cannot read the checkpoint {folder}: {error}. Take another checkpoint.") from None
    faults = _level_faults(groups, optimizer) + _weight_faults(weights, stack)
    if faults:
        remedy = "Make stack and optimizer as they were saved, or take another checkpoint."
        lines = [f"the checkpoint {folder} does not fit: {len(faults)} fault(s)", *faults, remedy]
        raise ConfigError("\n  ".join(lines))
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = value
    stack.load_state_dict(weights)
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _is_count(chunk: object) -> bool:
    return isinstance(chunk, int) and not isinstance(chunk, bool) and chunk >= 1


def _level_faults(groups: list[dict[str, Any]], optimizer: TieredOptimizer) -> list[str]:
    saved, ours = (
        ", ".join(
            f"{g.get('level')} (chunk {g.get('update_every')}, {len(g.get('params', ()))} parameters)" for g in of
        )
        for of in (groups, optimizer.param_groups)
    )
    faults = [] if saved == ours else [f"its levels are {saved}; here {ours}"]
    unknown = sorted({option for group in groups for option in optimizer.defaults if option not in group})
    return faults + ([f"it was saved by another optimizer, without {', '.join(unknown)}"] if unknown else [])


def _weight_faults(weights: Mapping[str, Tensor], stack: LevelStack) -> list[str]:
    saved, ours = ({name: list(value.shape) for name, value in of.items()} for of in (weights, stack.state_dict()))
    return [
        f"{name} has shape {saved.get(name, 'none')}, here {ours.get(name, 'none')}"
        for name in ours | saved
        if saved.get(name) != ours.get(name)
    ]
