"""Training on MLX (Apple silicon, or CPU): mlx-lm holds the base, `mlx.optimizers` make the updates."""

import json
import logging
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx_lm.utils import load_model
from numpy.typing import NDArray

from nestune.backends.adapters import read_adapter, write_adapter
from nestune.backends.base import Loss, StepResult
from nestune.backends.mlx_generation import answers_together, generate_greedily
from nestune.backends.mlx_head_loss import Head, head_loss
from nestune.backends.mlx_lora import add_lora, checkpoint_activations, mlx_arguments, parameters_of
from nestune.backends.mlx_optimizer import Arrays, TieredOptimizer
from nestune.backends.randomness import initial_weights, step_seed
from nestune.backends.training_state import TrainingState, check_fits
from nestune.base_model import a_base_that_computes, code_of_its_own, end_tokens, resolve_base
from nestune.config import RunConfig
from nestune.data.batches import Batch
from nestune.data.tokens import load_tokenizer
from nestune.errors import ConfigError, DivergedError, RunError
from nestune.tiers.parameters import LoraParameter

log = logging.getLogger(__name__)

# Elements of a block of logits; 128 MiB in float32, 220 positions of a vocabulary of 152,000.
LOGITS_AT_ONCE = 2**25
# What is traced stays in memory, a quarter of a MiB a layer; MLX itself would keep it for every shape ever seen.
COMPILED_AT_MOST = 128
Shape = tuple[int, ...]
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
        self._model, settings = _load_base(self._base.folder)
        dtype = "bfloat16" if config.training.precision == "bfloat16" else config.model.dtype
        if dtype != "auto":
            self._model.set_dtype(getattr(mx, dtype))
        self._end_ids = sorted({int(tokenizer.eos_token_id), *end_tokens(settings.get("eos_token_id"))})
        with a_base_that_computes(self._base):
            self._body, self._head, self._positions_at_once = _split_head(self._model)
        matrices = add_lora(self._model, config.lora)
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
        nats, tokens, gradients = self._gradients(micro_batches, self._optimizer.needs(due), seed)
        moved, grad_norm = self._optimizer.update(self._matrices, gradients, due, learning_rate)
        # MLX's normalisation turns activations that overflow into zeros: the loss stays finite, and nothing is learned.
        # Of a B that is not so; an A has no gradient as long as its B is zero.
        if nats and not grad_norm and any("lora_b" in name for name in self._optimizer.names(due)):
            raise DivergedError("no gradient is left, so activations have overflowed")
        self._matrices |= moved
        self._put(moved)
        if any(self._optimizer.updates[tier] == 1 for tier in due):
            self._check_reached(moved)
        return StepResult(nats, tokens, sum(int(batch.lengths.sum()) for batch in micro_batches), grad_norm)

    def measure_importance(
        self,
        steps: Iterable[Sequence[Batch]],
        measure: Literal["gradient", "squared_gradient", "taylor"],
    ) -> dict[str, float]:
        names = list(self._matrices)
        totals = np.zeros(len(names))
        for count, micro_batches in enumerate(steps, start=1):
            seed = step_seed(self._config.training.seed, count)
            _, _, gradients = self._gradients(micro_batches, frozenset(names), seed)
            of_step = [IMPORTANCE[measure](self._matrices[name], gradients[name]).mean() for name in names]
            totals += np.array(mx.stack(of_step), dtype=np.float64)
        return dict(zip(names, (totals / count).tolist(), strict=True))

    def loss(self, batches: Iterable[Batch]) -> Loss:
        nats, tokens = 0.0, 0
        self._switch(training=False)
        for batch in batches:
            nats += float(np.array(self._summed_loss(*_arrays(batch))))
            tokens += int(batch.supervised.sum())
        return Loss(nats, tokens)

    def logits(self, tokens: Sequence[int]) -> NDArray[Any]:
        self._switch(training=False)
        return np.array(self._model(mx.array([tokens]))[0].astype(mx.float32))

    def generate(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
        self._switch(training=False)
        at_once = len(prompts) if self._answers_together else 1
        return generate_greedily(self._model, prompts, max_tokens, self._end_ids, at_once)

    def save_adapter(self, folder: Path) -> None:
        modules = {name: matrix.path for name, matrix in self._held.items()}
        write_adapter(folder, self.weights(), modules, len(self._model.layers), self._config.lora, self._base)

    def load_adapter(self, folder: Path | None) -> None:
        read = read_adapter(folder, self._described, self._config.lora, self._base) if folder else {}
        self._set_weights({**self._untrained, **read})

    def training_state(self) -> TrainingState:
        assert self._optimizer is not None, "prepare_training comes first"
        return self._optimizer.state()

    def restore_training(self, state: TrainingState) -> None:
        assert self._optimizer is not None, "prepare_training comes first"
        check_fits(state, self.training_state(), {described.name: described.shape for described in self._described})
        self._optimizer.restore(state)

    def _gradients(
        self, micro_batches: Sequence[Batch], needed: frozenset[str], seed: int
    ) -> tuple[float, int, Arrays]:
        """A step's mean loss in nats per token, its tokens, and the gradients of that loss.

        Raises DivergedError when the loss is not finite.
        """
        tokens = sum(int(batch.supervised.sum()) for batch in micro_batches)
        self._switch(training=True)
        # In the model's order: MLX computes gradients in that of its results, and checkpointed layers that are computed
        # again out of their turn would all be kept.
        differentiated = {name: matrix for name, matrix in self._matrices.items() if name in needed}
        fixed = {name: matrix for name, matrix in self._matrices.items() if name not in needed}
        summed, gradients = mx.zeros(()), Arrays()
        for key, batch in zip(mx.random.split(mx.random.key(seed), len(micro_batches)), micro_batches, strict=True):
            arrays, total = _arrays(batch), mx.array(float(tokens))
            compiled = self._compiled(needed, tuple(array.shape for array in arrays))
            of_batch, further = compiled(differentiated, fixed, key, *arrays, total)
            summed = summed + of_batch
            gradients = {name: gradients[name] + g for name, g in further.items()} if gradients else further
            # Or all micro-batches would be there at once.
            mx.eval(summed, gradients)
        # What is traced leaves its placeholders in the model.
        self._put(self._matrices)
        nats = float(np.array(summed))
        if not math.isfinite(nats):
            raise DivergedError(f"the loss is {nats}")
        return nats, tokens, gradients

    def _compile(self, needed: frozenset[str], _: tuple[Shape, ...]) -> Callable[..., tuple[mx.array, Arrays]]:
        """The loss of a micro-batch and its gradients with respect to some matrices, as one compiled function.

        One for the arrays of each shape, so that what was traced for some can be given up.
        """

        def loss(differentiated: Arrays, fixed: Arrays, key: mx.array, *batch_and_total: mx.array) -> mx.array:
            *batch, total = batch_and_total
            self._put({**differentiated, **fixed})
            for name, matrix in self._held.items():
                matrix.differentiate(name in needed)
            if self._config.lora.dropout:
                for module, own in zip(self._modules, mx.random.split(key, len(self._modules)), strict=True):
                    module.drop_by(own)
            return self._summed_loss(*batch) / total

        if not needed:
            return mx.compile(lambda *inputs: (loss(*inputs), {}))
        return mx.compile(mx.value_and_grad(loss))

    def _summed_loss(self, tokens: mx.array, places: mx.array, targets: mx.array, weights: mx.array) -> mx.array:
        """Cross-entropy, in nats, at the supervised positions, summed; the arrays are those of `_arrays`."""
        hidden = self._body(tokens)
        hidden = hidden.reshape(-1, hidden.shape[-1])[places]
        return head_loss(hidden, targets, weights, self._head, self._positions_at_once)

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


def _load_base(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The base model and its settings; raises ConfigError when mlx-lm cannot load it."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    try:
        told = mlx_arguments(config)
    except (AttributeError, TypeError, ValueError, KeyError) as error:
        raise ConfigError(f"model.base: {folder}/config.json makes no sense: {error}. Take another copy.") from error
    if "rope_theta" in told:
        log.warning(
            "%s/config.json has rope_theta in rope_parameters only, where mlx-lm does not look. nestune tells it; "
            "mlx_lm.load of that folder computes something else, with and without an adapter. To use it so, write "
            "rope_theta at the top level too before training: an adapter is bound to its base's files.",
            folder,
        )
    try:
        model, settings = load_model(folder, model_config=told, trust_remote_code=False)
    except Exception as error:  # each model's code fails in its own ways at a configuration that makes no sense
        if "auto_map" in config and config.get("model_type") and "not supported" in str(error):
            raise code_of_its_own(folder, config, "mlx-lm") from error
        method = (config.get("quantization_config") or {}).get("quant_method")
        quantized = f", quantized by {method}" if method else ""
        first_line = str(error).strip().partition("\n")[0].rstrip(".?") or type(error).__name__
        raise ConfigError(
            f"model.base: mlx-lm does not load the model in {folder}{quantized}: {first_line:.500}. Take another copy, "
            "a model that mlx-lm knows, or model.backend: torch."
        ) from error
    return model, settings


def _split_head(model: Any) -> tuple[Callable[[mx.array], mx.array], Head, int]:
    """What makes the hidden states, the head, and how many positions that may see at once.

    Where the logits are not the head's output as it is (scaled or capped, or a model built in another way), the whole
    model makes them, all positions at once.
    """
    probe = mx.arange(4)[None]
    logits = model(probe)
    whole = (model, lambda logits: logits, sys.maxsize)
    text = getattr(model, "language_model", model)
    layers = getattr(text, "model", None)
    if layers is None:
        return whole
    # Some have no default for it.
    body = partial(layers, cache=None)
    head = text.lm_head if "lm_head" in text else getattr(getattr(layers, "embed_tokens", None), "as_linear", None)
    if head is None or not mx.allclose(head(body(probe)), logits).item():
        return whole
    return body, head, max(1, LOGITS_AT_ONCE // logits.shape[-1])


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


def _padded(size: int, least: int, in_a_doubling: int) -> int:
    """The next multiple of `least`, or, of larger sizes, the next of so many to each doubling: with 8 and 8 these are
    8, 16, 24, ..., 128, 144, ..., 256, 288, ..., and at most an eighth is padding.
    """
    step = max(least, (1 << size.bit_length() >> 1) // in_a_doubling)
    return -(-size // step) * step
