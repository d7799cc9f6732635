"""Training on MLX (Apple silicon, or CPU): mlx-lm holds the base, `mlx.optimizers` make the updates."""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal, cast

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from nestune.backends.adapters import read_adapter, read_adapter_of_any_size, write_adapter
from nestune.backends.base import Loss, StepResult
from nestune.backends.beginning import begin_training, summed
from nestune.backends.lora_parts import LoraParts
from nestune.backends.lora_sum import Adapter
from nestune.backends.mlx_generation import answers_together, generate
from nestune.backends.mlx_head_loss import head_divergence, head_loss
from nestune.backends.mlx_lora import (
    Part,
    add_lora,
    checkpoint_activations,
    parameters_of,
    squared_change,
)
from nestune.backends.mlx_model import load_base, split_head
from nestune.backends.mlx_optimizer import Arrays, TieredOptimizer
from nestune.backends.randomness import initial_weights, step_seed
from nestune.backends.training_state import TrainingState, check_fits
from nestune.base_model import a_base_that_computes, end_tokens, resolve_base
from nestune.config import RunConfig
from nestune.data.batches import Batch
from nestune.data.tokens import load_tokenizer
from nestune.errors import DivergedError, RunError
from nestune.tiers.parameters import LoraParameter

log = logging.getLogger(__name__)

# What is traced stays in memory, a quarter of a MiB a layer; MLX itself would keep it for every shape ever seen.
COMPILED_AT_MOST = 128
Shape = tuple[int, ...]
# A micro-batch's loss, and its parts: cross-entropy and divergence.
Losses = tuple[mx.array, mx.array, mx.array]
IMPORTANCE: dict[str, Callable[[mx.array, mx.array], mx.array]] = {
    "gradient": lambda _, gradient: mx.abs(gradient),
    "squared_gradient": lambda _, gradient: mx.square(gradient),
    "taylor": lambda weight, gradient: mx.abs(weight * gradient),
}


class MlxBackend:
    """A causal language model with one LoRA adapter; satisfies `nestune.backends.base.Backend`.

    The base is frozen, the adapter float32. A step is differentiated with respect to the matrices of due tiers only, so
    that the backward pass ends at the lowest of their layers, and is compiled once for each set of them and each shape
    of batch; batches are padded to few shapes. `training.precision` bfloat16 keeps base and activations in bfloat16;
    the adapter's products stay float32.
    """

    name = "mlx"

    def __init__(self, config: RunConfig) -> None:
        self.device = str(mx.default_device().type).rpartition(".")[2]
        self._config = config
        self._base = resolve_base(config.model)
        tokenizer = load_tokenizer(self._base.folder)
        self._model, settings = load_base(self._base.folder)
        dtype = "bfloat16" if config.training.precision == "bfloat16" else config.model.dtype
        if dtype != "auto":
            self._model.set_dtype(getattr(mx, dtype))
        self._end_ids = sorted({int(tokenizer.eos_token_id), *end_tokens(settings.get("eos_token_id"))})
        with a_base_that_computes(self._base):
            self._body, self._head, self._positions_at_once = split_head(self._model)
        self._parts = LoraParts()
        self._added: Adapter | None = None
        matrices = add_lora(self._model, config.lora, self._parts)
        if config.training.gradient_checkpointing:
            checkpoint_activations(self._model.layers)
        self._model.eval()
        self._described = [matrix.described for matrix in matrices]
        self._held = {matrix.described.name: matrix for matrix in matrices}
        self._modules = [matrix.module for matrix in matrices if matrix.described.side == "a"]
        self._untrained = initial_weights(self._described, config.training.seed)
        self._matrices: Arrays = {}
        self._set_weights(self._untrained)
        self._optimizer: TieredOptimizer | None = None
        self._compiled = lru_cache(COMPILED_AT_MOST)(self._compile)

    def lora_parameters(self) -> list[LoraParameter]:
        return self._described

    def weights(self) -> dict[str, NDArray[Any]]:
        return {name: np.ascontiguousarray(np.array(matrix).T) for name, matrix in self._matrices.items()}

    def prepare_training(self, tier_of: dict[str, int]) -> None:
        self._optimizer = TieredOptimizer(self._matrices, tier_of, self._config.tiers, self._config.training)

    def train_step(self, micro_batches: Sequence[Batch], due: frozenset[int], learning_rate: float) -> StepResult:
        assert self._optimizer is not None, "prepare_training comes first"
        seed = step_seed(self._config.training.seed, self._optimizer.steps + 1)
        nats, tokens, kl, gradients = self._gradients(micro_batches, self._optimizer.needs(due), seed)
        moved, grad_norm = self._optimizer.update(self._matrices, gradients, due, learning_rate)
        # MLX's normalisation turns activations that overflow into zeros: the loss stays finite, and nothing is learned.
        # Of a B that is not so; an A has no gradient as long as its B is zero.
        if nats and not grad_norm and any("lora_b" in name for name in self._optimizer.names(due)):
            raise DivergedError("no gradient is left, so activations have overflowed")
        self._matrices |= moved
        self._put(moved)
        if any(self._optimizer.updates[tier] == 1 for tier in due):
            self._check_reached(moved)
        return StepResult(nats, tokens, sum(int(batch.lengths.sum()) for batch in micro_batches), grad_norm, kl)

    def measure_importance(
        self,
        steps: Iterable[Sequence[Batch]],
        measure: Literal["gradient", "squared_gradient", "taylor"],
    ) -> dict[str, float]:
        names = list(self._matrices)
        totals = np.zeros(len(names))
        for count, micro_batches in enumerate(steps, start=1):
            seed = step_seed(self._config.training.seed, count)
            _, _, _, gradients = self._gradients(micro_batches, frozenset(names), seed)
            of_step = [IMPORTANCE[measure](self._matrices[name], gradients[name]).mean() for name in names]
            totals += np.array(mx.stack(of_step), dtype=np.float64)
        return dict(zip(names, (totals / count).tolist(), strict=True))

    def loss(self, batches: Iterable[Batch]) -> Loss:
        nats, tokens = 0.0, 0
        self._switch(training=False)
        for batch in batches:
            tokens_in, *rest = _arrays(batch)
            nats += float(np.array(self._cross_entropy(self._states(tokens_in), *rest)))
            tokens += int(batch.supervised.sum())
        return Loss(nats, tokens)

    def logits(self, tokens: Sequence[int]) -> NDArray[Any]:
        self._switch(training=False)
        return np.array(self._model(mx.array([tokens]))[0].astype(mx.float32))

    def divergence(self, batches: Iterable[Batch], teacher: Path | None) -> Loss:
        shown = [module._parent for module in self._modules]
        of_teacher = self._parts_of(self._read_frozen(teacher)) if teacher is not None else [None] * len(shown)
        nats, positions = 0.0, 0
        self._switch(training=False)
        for batch in batches:
            assert batch.held is not None, "such batches hold the model to its teacher"
            tokens, places, weights = self._held_arrays(batch)
            with self._parts.shown(own=False, with_parent=True):
                self._set_parents(of_teacher)
                said = self._states_at(tokens, places)
            self._set_parents(shown)
            seen = self._states_at(tokens, places)
            summed = head_divergence(seen, said, weights, self._head, self._positions_at_once)
            nats += float(np.array(summed))
            positions += int(batch.held.sum())
        return Loss(nats, positions)

    def generate(
        self, prompts: Sequence[Sequence[int]], max_tokens: int, temperature: float = 0.0, seed: int = 0
    ) -> list[list[int]]:
        self._switch(training=False)
        at_once = len(prompts) if self._answers_together else 1
        return generate(self._model, prompts, max_tokens, self._end_ids, at_once, temperature, seed)

    def save_adapter(self, folder: Path) -> None:
        modules = {name: matrix.path for name, matrix in self._held.items()}
        weights, lora = summed(self.weights() if self._parts.own else None, self._added, self._config.lora)
        write_adapter(folder, weights, modules, len(self._model.layers), lora, self._base)

    def begin(self, parent: Path | None, checkpoint: Path | None = None) -> None:
        start = begin_training(parent, checkpoint, self._described, self._config, self._base)
        self._set_weights(start.own)
        self._hold(start.parent, start.added, own=True)

    def load_adapter(self, folder: Path | None) -> None:
        read = read_adapter(folder, self._described, self._config.lora, self._base) if folder else {}
        self._set_weights({**self._untrained, **read})
        self._hold(None, None, own=True)

    def show_adapter(self, folder: Path | None) -> None:
        shown = self._read_frozen(folder) if folder is not None else None
        self._hold(shown, shown, own=False)

    def training_state(self) -> TrainingState:
        assert self._optimizer is not None, "prepare_training comes first"
        return self._optimizer.state()

    def restore_training(self, state: TrainingState) -> None:
        assert self._optimizer is not None, "prepare_training comes first"
        check_fits(state, self.training_state(), {described.name: described.shape for described in self._described})
        self._optimizer.restore(state)

    def _hold(self, parent: Adapter | None, added: Adapter | None, own: bool) -> None:
        """Keep a parent's adapter, and compute with it where it is `added`; own: and with the trained matrices."""
        self._added = added
        self._set_parents(self._parts_of(parent) if parent else [None] * len(self._modules))
        self._parts.own, self._parts.with_parent = own, added is not None
        # What was compiled computes with what was there.
        self._compiled.cache_clear()

    def _read_frozen(self, folder: Path) -> Adapter:
        return read_adapter_of_any_size(folder, self._described, self._config.lora, self._base)

    def _parts_of(self, adapter: Adapter) -> list[Part | None]:
        """A frozen adapter as the modules compute with it, in their order."""
        parts: list[Part | None] = []
        for name in (name for name in self._held if name.endswith("lora_a")):
            pair = [adapter.weights.get(of_side) for of_side in (name, f"{name[:-1]}b")]
            a, b = (None if side is None else mx.array(np.ascontiguousarray(side.T)) for side in pair)
            parts.append((a, b, adapter.scale) if a is not None and b is not None else None)
        return parts

    def _set_parents(self, parents: Sequence[Part | None]) -> None:
        for module, parent in zip(self._modules, parents, strict=True):
            module.set_parent(parent)

    def _gradients(
        self, micro_batches: Sequence[Batch], needed: frozenset[str], seed: int
    ) -> tuple[float, int, float | None, Arrays]:
        """What a step did, and the gradients of its loss.

        Returns the mean cross-entropy in nats per token, the tokens, the mean divergence from the teacher in nats per
        held position (None where none is held), the gradients. Raises DivergedError when one of them is not finite.
        """
        retention = self._config.retention
        tokens = sum(int(batch.supervised.sum()) for batch in micro_batches)
        positions = sum(int(batch.held.sum()) for batch in micro_batches if batch.held is not None)
        prompts = sum(int(batch.prompts.sum()) for batch in micro_batches if batch.prompts is not None)
        counted = self._config.training.prompt_weight * prompts
        # In the model's order: MLX computes gradients in that of its results, and checkpointed layers that are computed
        # again out of their turn would all be kept.
        differentiated = {name: matrix for name, matrix in self._matrices.items() if name in needed}
        fixed = {name: matrix for name, matrix in self._matrices.items() if name not in needed}
        summed, kl, gradients = mx.zeros(()), mx.zeros(()), Arrays()
        for key, batch in zip(mx.random.split(mx.random.key(seed), len(micro_batches)), micro_batches, strict=True):
            arrays = (*_arrays(batch), *_prompt_arrays(batch), *self._said_by_teacher(batch))
            totals = tuple(mx.array(float(total)) for total in (tokens, tokens + counted, max(positions, 1)))
            self._switch(training=True)
            compiled = self._compiled(needed, tuple(array.shape for array in arrays))
            (_, of_batch, kl_of_batch), further = compiled(differentiated, fixed, key, *arrays, *totals)
            summed, kl = summed + of_batch, kl + kl_of_batch
            gradients = {name: gradients[name] + g for name, g in further.items()} if gradients else further
            # Or all micro-batches would be there at once.
            mx.eval(summed, kl, gradients)
        # What is traced leaves its placeholders in the model.
        self._put(self._matrices)
        if retention.l2 and differentiated:
            change = mx.grad(lambda moved: retention.l2 * self._squared_change({**fixed, **moved}))(differentiated)
            gradients = {name: gradient + change[name] for name, gradient in gradients.items()}
        nats, held = float(np.array(summed)), float(np.array(kl))
        if not math.isfinite(nats + held):
            raise DivergedError(f"the loss is {nats if not math.isfinite(nats) else held}")
        return nats, tokens, held if positions else None, gradients

    def _compile(self, needed: frozenset[str], _: tuple[Shape, ...]) -> Callable[..., tuple[Losses, Arrays]]:
        """The loss of a micro-batch, its two parts, and its gradients with respect to some matrices, as one function.

        One for the arrays of each shape, so that what was traced for some can be given up.
        """
        kl = self._config.retention.kl
        weight, prompt_weight = kl.weight if kl is not None else 0.0, self._config.training.prompt_weight

        def loss(differentiated: Arrays, fixed: Arrays, key: mx.array, *given: mx.array) -> Losses:
            tokens_in, *answers, held, said, held_weights, tokens, counted, positions = given
            answers, prompts = answers[:3], answers[3:]
            self._put({**differentiated, **fixed})
            for name, matrix in self._held.items():
                matrix.differentiate(name in needed)
            if self._config.lora.dropout:
                for module, own in zip(self._modules, mx.random.split(key, len(self._modules)), strict=True):
                    module.drop_by(own)
            states = self._states(tokens_in)
            # A micro-batch may hold the model to its teacher and teach it nothing.
            nats = self._cross_entropy(states, *answers) if len(answers[0]) else mx.zeros(())
            cross_entropy = whole = nats / tokens
            if prompt_weight:
                of_prompts = self._cross_entropy(states, *prompts) if len(prompts[0]) else mx.zeros(())
                whole = (nats + prompt_weight * of_prompts) / counted
            if not len(held):
                return whole, cross_entropy, mx.zeros(())
            divergence = head_divergence(states[held], said, held_weights, self._head, self._positions_at_once)
            divergence = divergence / positions
            return whole + weight * divergence, cross_entropy, divergence

        def without_gradients(*inputs: Any) -> tuple[Losses, Arrays]:
            return loss(*inputs), {}

        # The types of MLX know of no further results beside the one that is differentiated.
        with_gradients = mx.value_and_grad(cast(Callable[..., mx.array], loss))
        return mx.compile(cast(Callable[..., tuple[Losses, Arrays]], with_gradients) if needed else without_gradients)

    def _said_by_teacher(self, batch: Batch) -> tuple[mx.array, mx.array, mx.array]:
        """Places (M,) among a batch's states that are held, the teacher's states (M, H) there, and weights (M,).

        Padded as `_arrays` does. Rows of which none is held are left out of the teacher's forward pass.
        """
        if batch.held is None:
            return mx.zeros((0,), mx.int32), mx.zeros((0, 1)), mx.zeros((0,))
        rows = batch.held.any(axis=1)
        width = int(batch.lengths[rows].max())
        of_rows = Batch(batch.tokens[rows, :width], batch.supervised, batch.lengths[rows], batch.held[rows, :width])
        kl = self._config.retention.kl
        self._switch(training=False)
        with self._parts.shown(own=False, with_parent=kl is not None and kl.teacher == "parent"):
            tokens, places, weights = self._held_arrays(of_rows)
            said = self._states_at(tokens, places)
        _, among_all, _ = self._held_arrays(batch)
        return among_all, said, weights

    def _held_arrays(self, batch: Batch) -> tuple[mx.array, mx.array, mx.array]:
        """Tokens, the places of the states that predict a held token, and weights, as `_arrays`."""
        assert batch.held is not None
        tokens, places, _, weights = _arrays(Batch(batch.tokens, batch.held, batch.lengths))
        return tokens, places, weights

    def _states(self, tokens: mx.array) -> mx.array:
        """What the head makes logits of, (B x T, H)."""
        states = self._body(tokens)
        return states.reshape(-1, states.shape[-1])

    def _states_at(self, tokens: mx.array, places: mx.array) -> mx.array:
        states = self._states(tokens)[places]
        mx.eval(states)
        return states

    def _cross_entropy(self, states: mx.array, places: mx.array, targets: mx.array, weights: mx.array) -> mx.array:
        """Cross-entropy, in nats, at the supervised positions, summed; the arrays are those of `_arrays`."""
        return head_loss(states[places], targets, weights, self._head, self._positions_at_once)

    def _squared_change(self, matrices: Arrays) -> mx.array:
        modules = {name: matrix.module for name, matrix in self._held.items()}
        return squared_change(matrices, modules, self._parts, self._config.lora.alpha / self._config.lora.rank)

    def _set_weights(self, values: Mapping[str, NDArray[Any]]) -> None:
        self._matrices = {name: mx.array(np.ascontiguousarray(values[name].T)) for name in self._held}
        self._put(self._matrices)

    def _put(self, matrices: Arrays) -> None:
        """Let the model compute with these matrices."""
        for name, values in matrices.items():
            self._held[name].put(values)

    def _check_reached(self, moved: Arrays) -> None:
        """Raise RunError unless the model's own parameters are what an update has made."""
        parameters = parameters_of(self._model, frozen_too=True)
        places = {name: f"{self._held[name].path}.lora_{self._held[name].described.side}" for name in moved}
        if not all(mx.array_equal(parameters[places[name]], values).item() for name, values in moved.items()):
            raise RunError(
                "an update did not reach the model: its parameters are others. This is a fault of nestune or of the "
                "model's code in mlx-lm; train with model.backend: torch, and report it."
            )

    @cached_property
    def _answers_together(self) -> bool:
        return answers_together(self._model)

    def _switch(self, training: bool) -> None:
        """Dropout on or off; asked first, as setting it walks through every module."""
        if self._model.training != training:
            self._model.train(training)


def _arrays(batch: Batch) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """A batch as the model takes it, padded to one of few shapes: a step is compiled for each of them.

    tokens (B, T) without each row's last; places (N,) in the B x T hidden states, of what predicts a supervised token;
    targets (N,) those tokens; weights (N,) 1, and 0 where N was padded. Rows are padded on the right, where nothing
    before them looks: no mask is needed.
    """
    rows, width = batch.tokens.shape
    inputs = np.zeros((rows, _padded(width - 1, 8, 8)), np.int32)
    inputs[:, : width - 1] = batch.tokens[:, :-1]
    row, column = np.nonzero(batch.supervised[:, 1:])
    padding = (0, _padded(len(row), 32, 4) - len(row))
    places = np.pad(row * inputs.shape[1] + column, padding)
    targets = np.pad(batch.tokens[row, column + 1], padding)
    weights = np.pad(np.ones(len(row), np.float32), padding)
    return mx.array(inputs), mx.array(places.astype(np.int32)), mx.array(targets), mx.array(weights)


def _prompt_arrays(batch: Batch) -> tuple[mx.array, mx.array, mx.array]:
    """As `_arrays`, places, targets and weights of the tokens before what is learned; none where they do not count."""
    if batch.prompts is None:
        return mx.zeros((0,), mx.int32), mx.zeros((0,), mx.int32), mx.zeros((0,))
    _, *of_prompts = _arrays(Batch(batch.tokens, batch.prompts, batch.lengths))
    places, targets, weights = of_prompts
    return places, targets, weights


def _padded(size: int, least: int, in_a_doubling: int) -> int:
    """The next multiple of `least`, or, of larger sizes, the next of so many to each doubling: with 8 and 8 these are
    8, 16, 24, ..., 128, 144, ..., 256, 288, ..., and at most an eighth is padding.
    """
    step = max(least, (1 << size.bit_length() >> 1) // in_a_doubling)
    return -(-size // step) * step
