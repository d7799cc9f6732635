"""Training on PyTorch (CUDA, or CPU): Transformers holds the base, PEFT the adapter, torch.optim the updates."""

import logging
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nestune.backends.adapters import module_path, read_adapter, read_adapter_of_any_size, write_adapter
from nestune.backends.base import Loss, StepResult
from nestune.backends.beginning import begin_training, summed
from nestune.backends.head_loss import head_divergence, head_loss
from nestune.backends.lora_modules import trainable_lora
from nestune.backends.lora_sum import Adapter
from nestune.backends.randomness import initial_weights, step_seed
from nestune.backends.tiered_optimizer import TieredOptimizer
from nestune.backends.torch_lora import Part, control_lora, squared_change
from nestune.backends.torch_model import add_lora, checkpoint_activations, greedy_generation, load_base
from nestune.backends.torch_repeatable import passes_back_strictly, repeat_on_cuda, strictly
from nestune.backends.torch_state import read_state, restore_state
from nestune.backends.training_state import TrainingState, check_fits
from nestune.base_model import a_base_that_computes, resolve_base
from nestune.config import RunConfig
from nestune.data.batches import Batch
from nestune.data.tokens import load_tokenizer, pad_id_of
from nestune.errors import DivergedError
from nestune.tiers.parameters import LoraParameter

log = logging.getLogger(__name__)

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
}
# Elements of a block of logits; 128 MiB in float32, 220 positions of a vocabulary of 152,000.
LOGITS_AT_ONCE = 2**25
IMPORTANCE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gradient": lambda _, gradient: gradient.abs(),
    "squared_gradient": lambda _, gradient: gradient.square(),
    "taylor": lambda weight, gradient: (weight * gradient).abs(),
}


class TorchBackend:
    """A causal language model with one LoRA adapter; satisfies `nestune.backends.base.Backend`.

    The base is frozen, the adapter float32. A parameter requires a gradient only at steps that need it, so autograd
    builds no graph below the lowest layer that is due, keeps no activation there, and ends the backward pass there.
    """

    name = "torch"

    def __init__(self, config: RunConfig) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.device == "cuda":
            repeat_on_cuda()
        self._config = config
        self._base = resolve_base(config.model)
        tokenizer = load_tokenizer(self._base.folder)
        dtype = "auto" if config.model.dtype == "auto" else getattr(torch, config.model.dtype)
        self._causal = load_base(self._base.folder, dtype).to(self.device)
        self._pad_id = pad_id_of(tokenizer, self._base.vocabulary)
        self._causal.generation_config = greedy_generation(
            self._causal.generation_config, self._pad_id, int(tokenizer.eos_token_id)
        )
        self._end_ids = frozenset(self._causal.generation_config.eos_token_id)
        self._model = add_lora(self._causal, config)
        self._parts = control_lora(self._model)
        self._added: Adapter | None = None
        if config.training.gradient_checkpointing:
            checkpoint_activations(self._causal)
        self._model.eval()
        self._strict = self.device == "cuda" and passes_back_strictly(self._causal)
        matrices = trainable_lora(self._model)
        self._described = [matrix.described for matrix in matrices]
        self._parameters = {matrix.described.name: matrix.values for matrix in matrices}
        self._modules = {matrix.described.name: module_path(matrix.key) for matrix in matrices}
        self._untrained = initial_weights(self._described, config.training.seed)
        self._set_weights(self._untrained)
        self._states, self._head, self._positions_at_once = self._split_head()
        self._scale = config.lora.alpha / config.lora.rank
        self._optimizer: TieredOptimizer | None = None

    def lora_parameters(self) -> list[LoraParameter]:
        return self._described

    def weights(self) -> dict[str, NDArray[Any]]:
        return {name: parameter.detach().cpu().numpy().copy() for name, parameter in self._parameters.items()}

    def prepare_training(self, tier_of: dict[str, int]) -> None:
        if self.device == "cuda" and not self._strict:
            log.warning(
                "the backward pass of %s does not give the same bits each time on CUDA: an interrupted training goes "
                "on, but may end with other last bits than an unbroken one",
                self._base.reference,
            )
        tiers, training = self._config.tiers, self._config.training
        self._optimizer = TieredOptimizer(
            self._parameters,
            tier_of,
            tiers.periods,
            lr=training.learning_rate,
            lr_scales=tiers.lr_scales,
            inactive_gradients=tiers.inactive_gradients,
            max_grad_norm=training.max_grad_norm,
            optimizer=OPTIMIZERS[training.optimizer],
            weight_decay=training.weight_decay,
        )

    def train_step(self, micro_batches: Sequence[Batch], due: frozenset[int], learning_rate: float) -> StepResult:
        assert self._optimizer is not None, "prepare_training comes first"
        self._optimizer.require_gradients(due)
        torch.manual_seed(step_seed(self._config.training.seed, self._optimizer.steps + 1))
        nats, tokens, kl = self._backward(micro_batches)
        self._optimizer.set_learning_rate(learning_rate)
        grad_norm = self._optimizer.update(due)
        self._optimizer.zero_grad()
        return StepResult(nats, tokens, sum(int(batch.lengths.sum()) for batch in micro_batches), grad_norm, kl)

    def measure_importance(
        self,
        steps: Iterable[Sequence[Batch]],
        measure: Literal["gradient", "squared_gradient", "taylor"],
    ) -> dict[str, float]:
        of_a_step = IMPORTANCE[measure]
        totals = {name: torch.zeros((), dtype=torch.float64, device=self.device) for name in self._parameters}
        count = 0
        for parameter in self._parameters.values():
            parameter.requires_grad_(True)
        for count, micro_batches in enumerate(steps, start=1):
            torch.manual_seed(step_seed(self._config.training.seed, count))
            self._backward(micro_batches)
            for name, parameter in self._parameters.items():
                # None where the step left the layer out, as models that drop layers at random do: no gradient, 0.
                if parameter.grad is not None:
                    totals[name] += of_a_step(parameter.detach(), parameter.grad).mean()
                    parameter.grad = None
        return {name: total.item() / count for name, total in totals.items()}

    def loss(self, batches: Iterable[Batch]) -> Loss:
        nats, tokens = 0.0, 0
        self._switch(training=False)
        with torch.no_grad():
            for batch in batches:
                states = self._states_of(batch.tokens, batch.lengths)
                nats += self._cross_entropy(batch.tokens, batch.supervised, states, divided_by=1).item()
                tokens += int(batch.supervised.sum())
        return Loss(nats, tokens)

    def divergence(self, batches: Iterable[Batch], teacher: Path | None) -> Loss:
        shown, self._parts.parent = self._parts.parent, {}
        of_teacher = self._parts_of(self._read_frozen(teacher)) if teacher is not None else {}
        nats, positions = 0.0, 0
        self._switch(training=False)
        with torch.no_grad():
            for batch in batches:
                assert batch.held is not None, "such batches hold the model to its teacher"
                self._parts.parent = of_teacher
                with self._parts.shown(own=False, with_parent=True):
                    said = self._states_of(batch.tokens, batch.lengths)[:, :-1][self._mask(batch.held)]
                self._parts.parent = shown
                states = self._states_of(batch.tokens, batch.lengths)
                nats += self._divergence(batch.held, states, said, positions=1).item()
                positions += int(batch.held.sum())
        return Loss(nats, positions)

    def logits(self, tokens: Sequence[int]) -> NDArray[Any]:
        self._switch(training=False)
        with torch.no_grad(), self._autocast():
            logits = self._causal(torch.tensor([tokens], device=self.device), use_cache=False).logits[0]
        array: NDArray[Any] = logits.float().cpu().numpy()
        return array

    def generate(
        self, prompts: Sequence[Sequence[int]], max_tokens: int, temperature: float = 0.0, seed: int = 0
    ) -> list[list[int]]:
        width = max(len(prompt) for prompt in prompts)
        tokens = torch.full((len(prompts), width), self._pad_id, dtype=torch.long)
        attention = torch.zeros_like(tokens)
        for row, prompt in enumerate(prompts):
            tokens[row, width - len(prompt) :] = torch.as_tensor(np.asarray(prompt, dtype=np.int64))
            attention[row, width - len(prompt) :] = 1
        self._switch(training=False)
        torch.manual_seed(seed)
        drawn = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {}
        with torch.no_grad(), self._autocast():
            written = self._model.generate(
                input_ids=tokens.to(self.device),
                attention_mask=attention.to(self.device),
                max_new_tokens=max_tokens,
                **drawn,
            )
        return [self._until_end(row) for row in written[:, width:].tolist()]

    def save_adapter(self, folder: Path) -> None:
        layers = self._causal.config.get_text_config().num_hidden_layers
        weights, lora = summed(self.weights() if self._parts.own else None, self._added, self._config.lora)
        write_adapter(folder, weights, self._modules, layers, lora, self._base)

    def begin(self, parent: Path | None, checkpoint: Path | None = None) -> None:
        start = begin_training(parent, checkpoint, self._described, self._config, self._base)
        self._set_weights(start.own)
        self._added = start.added
        self._parts.parent = self._parts_of(start.parent) if start.parent else {}
        self._parts.own, self._parts.with_parent = True, start.beside

    def load_adapter(self, folder: Path | None) -> None:
        read = read_adapter(folder, self._described, self._config.lora, self._base) if folder else {}
        self._set_weights({**self._untrained, **read})
        self._added, self._parts.parent = None, {}
        self._parts.own, self._parts.with_parent = True, False

    def show_adapter(self, folder: Path | None) -> None:
        self._added = self._read_frozen(folder) if folder is not None else None
        self._parts.parent = self._parts_of(self._added) if self._added else {}
        self._parts.own, self._parts.with_parent = False, True

    def training_state(self) -> TrainingState:
        assert self._optimizer is not None, "prepare_training comes first"
        return read_state(self._optimizer, self._config.training.optimizer, self._config.training.seed)

    def restore_training(self, state: TrainingState) -> None:
        assert self._optimizer is not None, "prepare_training comes first"
        check_fits(state, self.training_state(), {described.name: described.shape for described in self._described})
        restore_state(self._optimizer, state)

    def _set_weights(self, values: Mapping[str, NDArray[Any]]) -> None:
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(torch.from_numpy(values[name]))

    def _switch(self, training: bool) -> None:
        """Dropout on or off; asked first, as setting it walks through every module."""
        if self._model.training != training:
            self._model.train(training)

    def _read_frozen(self, folder: Path) -> Adapter:
        return read_adapter_of_any_size(folder, self._described, self._config.lora, self._base)

    def _parts_of(self, adapter: Adapter) -> dict[str, Part]:
        """A frozen adapter as the modules compute with it: module path -> A, B and scale."""
        found: dict[str, dict[str, Tensor]] = {}
        for name, values in adapter.weights.items():
            found.setdefault(self._modules[name], {})[name[-1]] = torch.from_numpy(values).to(self.device)
        return {path: (sides["a"], sides["b"], adapter.scale) for path, sides in found.items()}

    def _as_teacher(self) -> AbstractContextManager[None]:
        """Compute as the teacher does: with the parent's adapter, or with the base alone."""
        kl = self._config.retention.kl
        return self._parts.shown(own=False, with_parent=kl is not None and kl.teacher == "parent")

    def _backward(self, micro_batches: Sequence[Batch]) -> tuple[float, int, float | None]:
        """Add up the gradients of a step's loss.

        Returns the mean cross-entropy in nats per token, the tokens, and the mean divergence from the teacher in nats
        per held position, None where none is held. Raises DivergedError when one of them is not finite.
        """
        retention = self._config.retention
        tokens = sum(int(batch.supervised.sum()) for batch in micro_batches)
        positions = sum(int(batch.held.sum()) for batch in micro_batches if batch.held is not None)
        weight, prompt_weight = retention.kl.weight if retention.kl else 0.0, self._config.training.prompt_weight
        prompts = sum(int(batch.prompts.sum()) for batch in micro_batches if batch.prompts is not None)
        # Where prompts count, too, the answers have this share of the loss.
        of_answers = tokens / (tokens + prompt_weight * prompts)
        nats, kl = 0.0, 0.0
        for batch in micro_batches:
            said = self._said_by_teacher(batch) if batch.held is not None else None
            self._switch(training=True)
            states = self._states_of(batch.tokens, batch.lengths)
            loss = self._cross_entropy(batch.tokens, batch.supervised, states, tokens)
            nats += loss.item()
            if batch.prompts is not None:
                loss = loss + prompt_weight * self._cross_entropy(batch.tokens, batch.prompts, states, tokens)
            if prompts:
                loss = of_answers * loss
            if batch.held is not None and said is not None:
                divergence = self._divergence(batch.held, states, said, positions)
                kl += divergence.item()
                loss = loss + weight * divergence
            if loss.requires_grad:
                with strictly() if self._strict else nullcontext():
                    loss.backward()
        if retention.l2:
            change = retention.l2 * squared_change(self._parameters, self._modules, self._parts, self._scale)
            if change.requires_grad:
                change.backward()
        if not math.isfinite(nats + kl):
            raise DivergedError(f"the loss is {nats if not math.isfinite(nats) else kl}")
        return nats, tokens, kl if positions else None

    def _said_by_teacher(self, batch: Batch) -> Tensor:
        """The teacher's states (M, H) at a batch's held positions; rows of which none is held are left out."""
        assert batch.held is not None
        rows = batch.held.any(axis=1)
        width = int(batch.lengths[rows].max())
        self._switch(training=False)
        with torch.no_grad(), self._as_teacher():
            states = self._states_of(batch.tokens[rows, :width], batch.lengths[rows])
        return states[:, :-1][self._mask(batch.held[rows, :width])]

    def _cross_entropy(
        self, tokens: NDArray[np.int32], learned: NDArray[np.bool_], states: Tensor, divided_by: int
    ) -> Tensor:
        """Cross-entropy, in nats, at learned positions (B, T), summed and divided."""
        targets = torch.from_numpy(tokens[:, 1:][learned[:, 1:]].astype(np.int64)).to(self.device)
        with self._autocast():
            seen = states[:, :-1][self._mask(learned)]
            return head_loss(seen, targets, self._head, divided_by, self._positions_at_once)

    def _divergence(self, held: NDArray[np.bool_], states: Tensor, said: Tensor, positions: int) -> Tensor:
        """KL(teacher || model), in nats, at held positions, summed and divided by `positions`."""
        with self._autocast():
            seen = states[:, :-1][self._mask(held)]
            return head_divergence(seen, said, self._head, positions, self._positions_at_once)

    def _states_of(self, tokens: NDArray[np.int32], lengths: NDArray[np.int32]) -> Tensor:
        """What the head makes logits of, (B, T, H), of rows padded on the right."""
        ids = torch.from_numpy(tokens.astype(np.int64)).to(self.device)
        ends = torch.from_numpy(lengths.astype(np.int64)).to(self.device)
        attention = torch.arange(ids.shape[1], device=self.device) < ends[:, None]
        with self._autocast():
            return self._states(input_ids=ids, attention_mask=attention.long(), use_cache=False)

    def _mask(self, positions: NDArray[np.bool_]) -> Tensor:
        """Positions (B, T) as those (B, T - 1) of the states that predict them."""
        return torch.from_numpy(positions[:, 1:]).to(self.device)

    def _autocast(self) -> torch.autocast:
        precision = self._config.training.precision
        return torch.autocast(self.device, dtype=torch.bfloat16, enabled=precision == "bfloat16")

    def _split_head(self) -> tuple[Callable[..., Tensor], Callable[[Tensor], Tensor], int]:
        """What makes the states, the head that makes logits of them, and how many positions it may see at once.

        Some models scale or cap their logits afterwards: theirs are made by the whole model, all positions at once.
        """
        causal = self._causal
        probe = torch.arange(4, device=self.device)[None]
        with torch.no_grad(), a_base_that_computes(self._base):
            logits = causal(probe).logits
            alone = causal.get_output_embeddings()(causal.base_model(probe).last_hidden_state)
        if not torch.allclose(alone, logits):
            return lambda **inputs: causal(**inputs).logits, lambda logits: logits, sys.maxsize
        at_once = max(1, LOGITS_AT_ONCE // logits.shape[-1])
        return lambda **inputs: causal.base_model(**inputs).last_hidden_state, causal.get_output_embeddings(), at_once

    def _until_end(self, tokens: list[int]) -> list[int]:
        ends = [position for position, token in enumerate(tokens) if token in self._end_ids]
        return tokens[: ends[0]] if ends else tokens
