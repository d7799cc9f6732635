"""Tiered updates on MLX: one optimizer of `mlx.optimizers` a tier, each moved only when its tier is due."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from mlx import optimizers

from nestune.backends.training_state import TrainingState, What
from nestune.config import TierConfig, TrainingConfig
from nestune.errors import DivergedError
from nestune.tiers.parameters import split_name

Arrays = dict[str, mx.array]

# As torch.optim has them. MLX leaves the bias correction out unless it is asked for.
OPTIMIZERS: dict[str, Callable[[TrainingConfig], optimizers.Optimizer]] = {
    "adamw": lambda t: optimizers.AdamW(t.learning_rate, weight_decay=t.weight_decay, bias_correction=True),
    "adam": lambda t: optimizers.Adam(t.learning_rate, bias_correction=True),
    "sgd": lambda t: optimizers.SGD(t.learning_rate),
}
OF_MLX: dict[str, dict[What, str]] = {
    "adamw": {"first_moment": "m", "second_moment": "v"},
    "adam": {"first_moment": "m", "second_moment": "v"},
    "sgd": {},
}
EPSILON_OF_CLIPPING = 1e-6  # torch.nn.utils.clip_grad_norm_'s


@dataclass(frozen=True)
class _Part:
    """What one name of a tier map stands for: a matrix, or some of its ranks (columns of A, rows of B in MLX)."""

    name: str
    tier: int
    matrix: str
    ranks: range | None

    def of(self, matrix: mx.array) -> mx.array:
        if self.ranks is None:
            return matrix
        chosen = slice(self.ranks.start, self.ranks.stop)
        return matrix[:, chosen] if self.axis else matrix[chosen]

    @property
    def axis(self) -> int:
        """The axis that counts ranks."""
        return 1 if self.matrix.endswith("lora_a") else 0


class TieredOptimizer:
    """The rules of `nestune.backends.tiered_optimizer` for matrices by canonical name, as MLX lays them out.

    matrices: name -> (inputs, rank) of A, (rank, outputs) of B; tier_of: the same names, or ranks of them, -> tier.
    """

    def __init__(
        self, matrices: Mapping[str, mx.array], tier_of: dict[str, int], tiers: TierConfig, training: TrainingConfig
    ) -> None:
        self.steps = 0
        self.updates = [0] * len(tiers.periods)
        self._tier_of, self._tiers, self._training = dict(tier_of), tiers, training
        self._parts = [_Part(name, tier, *split_name(name)) for name, tier in tier_of.items()]
        self._parts_of: dict[str, list[_Part]] = {name: [] for name in matrices}
        for part in sorted(self._parts, key=lambda part: part.ranks.start if part.ranks else 0):
            self._parts_of[part.matrix].append(part)
        self._window_steps = [0] * len(tiers.periods)
        # Of L2, the weight decay of all but AdamW.
        self._added_decay = 0.0 if training.optimizer == "adamw" else training.weight_decay
        self._accumulates = tiers.inactive_gradients == "accumulate"
        self._windows = {
            part.name: mx.zeros_like(part.of(matrices[part.matrix])) for part in self._parts if self._has_window(part)
        }
        self._optimizers = []
        for tier in range(len(tiers.periods)):
            optimizer = OPTIMIZERS[training.optimizer](training)
            optimizer.init({part.name: part.of(matrices[part.matrix]) for part in self._of(frozenset({tier}))})
            self._optimizers.append(optimizer)
        self._compiled: dict[frozenset[int], Callable[..., tuple[Arrays, Arrays, mx.array]]] = {}

    def needs(self, due: frozenset[int]) -> frozenset[str]:
        """The matrices whose gradient a step needs at which these tiers are due."""
        return frozenset(part.matrix for part in self._parts if part.tier in due or self._has_window(part))

    def names(self, due: frozenset[int]) -> list[str]:
        """What moves, as the tier map has it, at a step at which these tiers are due."""
        return [part.name for part in self._of(due)]

    def update(self, matrices: Arrays, gradients: Arrays, due: frozenset[int], lr: float) -> tuple[Arrays, float]:
        """Count one step and move these tiers; the matrices that moved, and the norm, before clipping, of what did it.

        All that is kept for later steps is evaluated: a sum of gradients that is not would keep each of them alive.
        Raises DivergedError when the norm is not finite.
        """
        self.steps += 1
        for tier in range(len(self._window_steps)):
            self._window_steps[tier] += 1
        if due not in self._compiled:
            states = [self._optimizers[tier].state for tier in sorted(due)]
            self._compiled[due] = mx.compile(self._rule(due), inputs=states, outputs=states)
        for tier in due:
            self._optimizers[tier].learning_rate = mx.array(lr * self._tiers.lr_scales[tier])
        touched = {part.matrix for part in self._of(due)}
        window_steps = {str(tier): mx.array(float(self._window_steps[tier])) for tier in due}
        moved, self._windows, norm = self._compiled[due](
            {name: matrices[name] for name in touched}, gradients, self._windows, window_steps
        )
        mx.eval(moved, self._windows, norm, [self._optimizers[tier].state for tier in due])
        grad_norm = float(np.array(norm))
        if not math.isfinite(grad_norm):
            raise DivergedError(f"the gradient's norm is {grad_norm}")
        for tier in due:
            self.updates[tier] += 1
            self._window_steps[tier] = 0
        return moved, grad_norm

    def state(self) -> TrainingState:
        """A copy of the state, in the orientation that all backends share."""
        arrays: dict[str, np.ndarray] = {}
        for part in self._parts:
            if self._has_window(part) and self._window_steps[part.tier]:
                arrays[f"{part.name}/window"] = _canonical(self._windows[part.name])
            if self.updates[part.tier]:
                kept = self._optimizers[part.tier].state[part.name]
                for what, key in OF_MLX[self._training.optimizer].items():
                    arrays[f"{part.name}/{what}"] = _canonical(kept[key])
        return TrainingState(
            optimizer=self._training.optimizer,
            update_every=self._tiers.periods,
            inactive_gradients=self._tiers.inactive_gradients,
            seed=self._training.seed,
            tier_of=self._tier_of,
            steps=self.steps,
            updates=tuple(self.updates),
            window_steps=tuple(self._window_steps),
            arrays=arrays,
        )

    def restore(self, state: TrainingState) -> None:
        """Go on from a state that fits; what it has no array for starts from zero."""
        self.steps, self.updates, self._window_steps = state.steps, [*state.updates], [*state.window_steps]
        windows = state.of("window")
        moments = {what: state.of(what) for what in OF_MLX[self._training.optimizer]}
        for part in self._parts:
            # In place: what is compiled reads and writes these very dictionaries.
            kept = self._optimizers[part.tier].state
            kept["step"] = mx.array(state.updates[part.tier], mx.uint64)
            for what, key in OF_MLX[self._training.optimizer].items():
                kept[part.name][key] = _restored(moments[what].get(part.name), kept[part.name][key])
            if part.name in self._windows:
                self._windows[part.name] = _restored(windows.get(part.name), self._windows[part.name])

    def _of(self, tiers: frozenset[int]) -> list[_Part]:
        return [part for part in self._parts if part.tier in tiers]

    def _has_window(self, part: _Part) -> bool:
        return self._accumulates and self._tiers.periods[part.tier] is not None

    def _rule(self, due: frozenset[int]) -> Callable[..., tuple[Arrays, Arrays, mx.array]]:
        """What a step does at which these tiers are due, as a function for `mx.compile`."""

        def rule(
            matrices: Arrays, gradients: Arrays, windows: Arrays, window_steps: Arrays
        ) -> tuple[Arrays, Arrays, mx.array]:
            applied, left = {}, dict(windows)
            for part in self._parts:
                if part.tier not in due and part.name not in windows:
                    continue
                gradient = part.of(gradients[part.matrix])
                if part.name in windows:
                    gradient = windows[part.name] + gradient
                    left[part.name] = mx.zeros_like(gradient) if part.tier in due else gradient
                if part.tier in due:
                    applied[part.name] = gradient / window_steps[str(part.tier)] if self._accumulates else gradient
            norm = self._norm(matrices, applied)
            if self._training.max_grad_norm is not None:
                factor = mx.minimum(self._training.max_grad_norm / (norm + EPSILON_OF_CLIPPING), 1.0)
                applied = {name: gradient * factor for name, gradient in applied.items()}
            after: Arrays = {}
            for tier in sorted(due):
                parts = self._of(frozenset({tier}))
                values = {part.name: part.of(matrices[part.matrix]) for part in parts}
                if self._added_decay:
                    applied |= {name: applied[name] + self._added_decay * value for name, value in values.items()}
                after |= self._optimizers[tier].apply_gradients({name: applied[name] for name in values}, values)
            return self._whole(after, matrices), left, norm

        return rule

    def _norm(self, matrices: Arrays, applied: Arrays) -> mx.array:
        """The global norm of what is applied. Whatever the tiers, matrices are added up whole and in the model's order:
        a sum of squares is rounded by the order of its terms.
        """
        whole = self._whole(applied, {name: mx.zeros_like(matrix) for name, matrix in matrices.items()})
        squares = [mx.square(matrix).sum() for matrix in whole.values()]
        return mx.sqrt(sum(squares, mx.array(0.0)))

    def _whole(self, values: Arrays, others: Arrays) -> Arrays:
        """The matrices, whole, of parts with these values; a part of them that has none is as `others` has it."""
        whole: Arrays = {}
        for name, parts in self._parts_of.items():
            if any(part.name in values for part in parts):
                pieces = [values[part.name] if part.name in values else part.of(others[name]) for part in parts]
                whole[name] = pieces[0] if len(pieces) == 1 else mx.concatenate(pieces, axis=parts[0].axis)
        return whole


def _canonical(array: mx.array) -> np.ndarray:
    """Float32, (ranks, inputs) of A, (outputs, ranks) of B."""
    return np.ascontiguousarray(np.array(array, copy=True).T)


def _restored(values: np.ndarray | None, like: mx.array) -> mx.array:
    return mx.zeros_like(like) if values is None else mx.array(np.ascontiguousarray(values.T))
