"""One torch optimizer over tiers: each tier moves at the multiples of its period, by its own moments.

Used by the torch backend, by `nestune.cms`, and in other people's loops as `nestune.tiered_optimizer`.
"""

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nestune.errors import ConfigError, DivergedError, RunError
from nestune.tiers.parameters import split_name
from nestune.tiers.schedule import TierSchedule


@dataclass
class _Part:
    """What one name of a tier map stands for: a matrix, or some of its ranks.

    `leaf` is what the optimizer moves: the matrix itself, or a parameter that shares the memory of its ranks.
    """

    tier: int
    matrix: nn.Parameter
    leaf: nn.Parameter
    axis: int
    ranks: range | None

    def view(self, matrix: Tensor) -> Tensor:
        return matrix if self.ranks is None else matrix.narrow(self.axis, self.ranks.start, len(self.ranks))


class TieredOptimizer(Optimizer):
    """A `torch.optim.Optimizer` with a parameter group for each tier, each stepped only when its tier is due.

    theta_k(t) = theta_k(t-1) - lr * s_k * direction(g_k(t)) at steps t = 1, 2, ... that are multiples of u_k, else
    unchanged; the moments and the bias correction of a tier advance only when it moves. Under `drop` g_k(t) is the
    gradient of step t alone; under `accumulate` the mean over the steps since the tier's last update, whose sum is
    kept in `state[parameter]["window"]`. `step()` counts the steps; a window that is not full is not applied.

    parameters: name -> trainable matrix, in the model's order; tier_of: the same names, or ranks of LoRA matrices
    (`...lora_a[0:3]`), -> tier; update_every: period of each tier, None: never; lr: learning rate, times
    lr_scales[tier]; optimizer: any class of torch.optim, which gets `options`. max_grad_norm clips the global norm of
    what a step applies, over all due tiers; a norm that is not finite raises RunError. Learning-rate schedulers see
    one group a tier: those that set absolute rates (OneCycleLR, CyclicLR) take a list, one rate for each tier.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        tier_of: Mapping[str, int],
        update_every: Sequence[int | None],
        *,
        lr: float,
        lr_scales: Sequence[float] | None = None,
        inactive_gradients: Literal["drop", "accumulate"] = "drop",
        max_grad_norm: float | None = None,
        optimizer: Callable[..., Optimizer] = torch.optim.AdamW,
        **options: Any,
    ) -> None:
        self.schedule = TierSchedule(tuple(update_every))
        self.grad_norm = 0.0
        self._accumulate = inactive_gradients == "accumulate"
        self._max_grad_norm = max_grad_norm
        self.matrices = list(parameters.values())
        self._parts = [_part(name, tier, parameters) for name, tier in tier_of.items()]
        self._divided = {
            id(matrix): [part for part in self._parts if part.matrix is matrix and part.ranks is not None]
            for matrix in {part.matrix for part in self._parts if part.ranks is not None}
        }
        self._all = frozenset(range(len(update_every)))
        self._wanted = self._all
        scales = lr_scales if lr_scales is not None else [1.0] * len(update_every)
        groups = [
            {
                "params": [part.leaf for part in self._parts if part.tier == tier],
                "param_names": [name for name, of in tier_of.items() if of == tier],
                "param_shapes": [list(part.leaf.shape) for part in self._parts if part.tier == tier],
                "lr": lr * scales[tier],
                "tier": tier,
                "update_every": period,
                "inactive_gradients": inactive_gradients,
                "lr_scale": scales[tier],
                "updates": 0,
                "steps": 0,
                "summed": 0,
            }
            for tier, period in enumerate(update_every)
        ]
        self._inner = optimizer(groups, lr=lr, **options)
        super().__init__(self._inner.param_groups, self._inner.defaults)
        if self._divided and any(group.get("fused") for group in self.param_groups):
            # PyTorch's fused kernels take a parameter's memory for contiguous; some ranks of a B are columns of it.
            raise ConfigError(
                "fused: such an optimizer cannot move some ranks of a matrix (strategy stacked); leave it out."
            )
        share = weakref.WeakMethod(self._share)
        for matrix in self.matrices:
            if id(matrix) in self._divided:
                matrix.register_post_accumulate_grad_hook(lambda shared: (hook := share()) and hook(shared))

    @property
    def steps(self) -> int:
        """Steps taken so far."""
        return int(self.param_groups[0]["steps"])

    @property
    def update_counts(self) -> list[int]:
        """How often each tier has moved."""
        return [int(group["updates"]) for group in self.param_groups]

    def set_learning_rate(self, lr: float) -> None:
        """The learning rate of the coming steps; each tier takes it times its scale."""
        for group in self.param_groups:
            group["lr"] = lr * group["lr_scale"]

    def require_gradients(self, due: frozenset[int] | None = None) -> None:
        """Let autograd compute only the gradients that the next step needs; call it before the forward pass.

        `due`: the tiers that will move, by default those of the next step. Below the lowest matrix that needs a
        gradient no graph is built and no activation kept. Under `accumulate` all are needed but those of a tier that
        never moves. At a step at which no tier is due, the last matrix requires a gradient, so that a loop may run its
        (short) backward pass as ever; `step` forgets it. With an empty `due` nothing does, nor does the loss.
        """
        self._wanted = self.schedule.due(self.steps + 1) if due is None else due
        needed = {id(part.matrix) for part in self._parts if self._takes_gradients(part.tier)}
        if due is None and not needed:
            needed = {id(self.matrices[-1])}
        for matrix in self.matrices:
            matrix.requires_grad_(id(matrix) in needed)
            self._share(matrix)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Count one step and move the tiers that are due at it; returns what the closure returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.update(self.schedule.due(self.steps + 1))
        return loss

    @torch.no_grad()
    def update(self, due: frozenset[int]) -> float:
        """Count one step and move these tiers; returns the global norm, before clipping, of what is applied.

        Raises RunError when `require_gradients` was last called for other tiers, so that one of these has no gradient;
        and when the norm is not finite: open windows are lost then, so that one goes on from a saved state.
        """
        switched_on = {part.tier for part in self._parts if part.matrix.requires_grad}
        without = sorted(due - switched_on)
        if without:
            raise RunError(
                f"tier {', '.join(map(str, without))} is due at step {self.steps + 1}, but its gradients were switched "
                "off for an earlier step. Call require_gradients() before the forward pass of every step, or never."
            )
        for group in self.param_groups:
            group["steps"] += 1
            group["summed"] += 1
        for matrix in self.matrices:
            self._share(matrix)
        for part in self._parts:
            if part.tier in due:
                self._close_window(part)
            else:
                self._put_by(part)
        self.grad_norm = self._clip()
        moving = [group for group in self.param_groups if group["tier"] in due]
        self._inner.param_groups, self._inner.state = moving, self.state
        self._inner.step()
        for group in moving:
            group["updates"] += 1
            group["summed"] = 0
        # What was wanted was for this step: another optimizer of these matrices may follow.
        self._wanted = self._all
        return self.grad_norm

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of the last backward pass; open windows stay."""
        super().zero_grad(set_to_none)
        if set_to_none:
            for matrix in self.matrices:
                matrix.grad = None

    def reset(self) -> None:
        """Start again at step 0, without moments or windows; the parameters stay as they are."""
        self.state.clear()
        for group in self.param_groups:
            group.update(updates=0, steps=0, summed=0)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state, in the middle of a window too.

        Raises ConfigError, with all that differs, when its periods, policy, assignment or shapes of parameters are
        others, or it was saved by an optimizer without an option that this one has.
        """
        faults = _differences(state_dict["param_groups"], self.param_groups)
        if faults:
            lines = ["the optimizer's state does not fit:", *faults, "Go on with the tiers that it was saved with."]
            raise ConfigError("\n  ".join(lines))
        # The model may have been moved or cast since the parts last shared its memory.
        for matrix in self.matrices:
            self._share(matrix)
        super().load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        """Refused: a copy's parts would no longer share the memory of its matrices."""
        raise TypeError(
            "a tiered optimizer cannot be copied or pickled; save its state_dict() and load it into another"
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused but for the groups that this optimizer makes itself: a parameter without a tier has no period."""
        if "tier" not in param_group:
            raise ConfigError("a tiered optimizer takes no further parameters: name them in its tier map instead")
        super().add_param_group(param_group)

    def _takes_gradients(self, tier: int) -> bool:
        return tier in self._wanted or self._has_window(tier)

    def _has_window(self, tier: int) -> bool:
        return self._accumulate and self.schedule.update_every[tier] is not None

    def _share(self, matrix: Tensor) -> None:
        """Let the parts of a divided matrix share its memory and its gradient.

        A hook of the backward pass too, so that an AMP scaler sees the parts' gradients, and that what clips the
        matrix's sees none of the ranks that will not move.
        """
        for part in self._divided.get(id(matrix), ()):
            part.leaf.data = part.view(matrix.detach())
            part.leaf.grad = None if matrix.grad is None else part.view(matrix.grad)
            if part.leaf.grad is not None and not self._takes_gradients(part.tier):
                part.leaf.grad.zero_()

    def _close_window(self, part: _Part) -> None:
        """Turn a due part's gradient into what is applied: under `accumulate` the mean over its window."""
        window = self.state[part.leaf].pop("window", None) if part.leaf in self.state else None
        if window is not None:
            if part.leaf.grad is None:
                part.matrix.grad = torch.zeros_like(part.matrix)
                self._share(part.matrix)
            assert part.leaf.grad is not None
            part.leaf.grad.add_(window)
        summed = self.param_groups[part.tier]["summed"]
        if self._accumulate and summed > 1 and part.leaf.grad is not None:
            part.leaf.grad.div_(summed)

    def _put_by(self, part: _Part) -> None:
        """Take the gradient away from a part that is not due: into its window under `accumulate`, else nowhere."""
        grad = part.leaf.grad
        if grad is None:
            return
        if self._has_window(part.tier):
            state = self.state[part.leaf]
            # A copy: the gradient may be a view of what others write to, such as the whole matrix's.
            state["window"] = state["window"].add_(grad) if "window" in state else grad.clone()
        if part.ranks is None:
            part.leaf.grad = None
        else:
            grad.zero_()

    def _clip(self) -> float:
        """Clip what is applied to the maximal norm; returns the norm before."""
        # In the model's order, whatever the tiers: a sum of squares is rounded by the order of its terms.
        moving = [matrix for matrix in self.matrices if matrix.grad is not None]
        norm = nn.utils.get_total_norm([matrix.grad for matrix in moving if matrix.grad is not None])
        if not math.isfinite(norm):
            raise DivergedError(f"the gradient's norm is {norm}")
        if self._max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(moving, self._max_grad_norm, norm)
        return float(norm)


def _part(name: str, tier: int, parameters: Mapping[str, nn.Parameter]) -> _Part:
    matrix_name, ranks = split_name(name)
    matrix = parameters[matrix_name]
    if ranks is None:
        return _Part(tier, matrix, matrix, 0, None)
    axis = 0 if matrix_name.endswith("lora_a") else 1
    leaf = nn.Parameter(matrix.detach().narrow(axis, ranks.start, len(ranks)))
    return _Part(tier, matrix, leaf, axis, ranks)


def _differences(saved: Sequence[dict[str, Any]], ours: Sequence[dict[str, Any]]) -> list[str]:
    """What keeps a state from being that of an optimizer with our groups: their moments would meet other parameters."""
    faults = []
    for key in ("update_every", "inactive_gradients"):
        theirs, here = [group.get(key) for group in saved], [group[key] for group in ours]
        if theirs != here:
            faults.append(f"its {key} is {theirs}, this optimizer's {here}")
    missing = sorted({option for group in ours for option in group} - {option for group in saved for option in group})
    if missing:
        faults.append(f"it was saved by another optimizer, without {', '.join(missing)}")
    held, holds = (
        [
            f"{name} {shape} on tier {tier}"
            for tier, group in enumerate(groups)
            for name, shape in zip(group.get("param_names", ()), group.get("param_shapes", ()), strict=False)
        ]
        for groups in (saved, ours)
    )
    other = next((pair for pair in zip_longest(held, holds, fillvalue="nothing") if pair[0] != pair[1]), None)
    if other is not None:
        faults.append(f"it has {other[0]}, this optimizer {other[1]} in its place")
    return faults
