"""The state of a tiered torch optimizer as every backend reads it, and back."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from nestune.backends.tiered_optimizer import TieredOptimizer
from nestune.backends.training_state import TrainingState, What

OF_TORCH: dict[What, str] = {"first_moment": "exp_avg", "second_moment": "exp_avg_sq", "window": "window"}


def read_state(optimizer: TieredOptimizer, kind: str, seed: int) -> TrainingState:
    """A copy of the optimizer's state; kind: what `training.optimizer` calls it."""
    groups = optimizer.param_groups
    arrays = {
        f"{name}/{what}": np.ascontiguousarray(optimizer.state[leaf][key].detach().cpu().numpy()).copy()
        for _, name, leaf in _leaves(optimizer)
        for what, key in OF_TORCH.items()
        if leaf in optimizer.state and key in optimizer.state[leaf]
    }
    return TrainingState(
        optimizer=kind,
        update_every=tuple(group["update_every"] for group in groups),
        inactive_gradients=groups[0]["inactive_gradients"],
        seed=seed,
        tier_of={name: tier for tier, name, _ in _leaves(optimizer)},
        steps=optimizer.steps,
        updates=tuple(optimizer.update_counts),
        window_steps=tuple(int(group["summed"]) for group in groups),
        arrays=arrays,
    )


def restore_state(optimizer: TieredOptimizer, state: TrainingState) -> None:
    """Go on from a state that fits: its tiers, shapes and kind are those of the optimizer."""
    optimizer.reset()
    for tier, group in enumerate(optimizer.param_groups):
        group.update(steps=state.steps, updates=state.updates[tier], summed=state.window_steps[tier])
    arrays: dict[What, dict[str, np.ndarray]] = {what: state.of(what) for what in OF_TORCH}
    for tier, name, leaf in _leaves(optimizer):
        found = {key: _like(leaf, arrays[what][name]) for what, key in OF_TORCH.items() if name in arrays[what]}
        if "exp_avg" in found:
            found["step"] = torch.tensor(float(state.updates[tier]))
        if found:
            optimizer.state[leaf] = found


def _leaves(optimizer: TieredOptimizer) -> Iterator[tuple[int, str, nn.Parameter]]:
    """Tier, name in the tier map, and what torch moves."""
    for group in optimizer.param_groups:
        for name, leaf in zip(group["param_names"], group["params"], strict=True):
            yield group["tier"], name, leaf


def _like(leaf: nn.Parameter, values: np.ndarray) -> Tensor:
    """The values as torch.optim lays out the state of this parameter, whose bits its sums depend on."""
    return torch.zeros_like(leaf.detach()).copy_(torch.from_numpy(values))
