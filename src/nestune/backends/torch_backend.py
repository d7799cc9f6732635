"""Training on PyTorch (CUDA, or CPU): Transformers holds the base, PEFT the adapter, torch.optim the updates."""

import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from nestune.backends.adapters import read_adapter, write_adapter
from nestune.backends.base import Loss, StepResult
from nestune.backends.frozen_lora import shorten_frozen_forward
from nestune.backends.head_loss import head_loss
from nestune.backends.lora_modules import trainable_lora
from nestune.backends.lora_targets import chosen_modules
from nestune.backends.randomness import initial_weights, step_seed
from nestune.backends.tiered_optimizer import TieredOptimizer
from nestune.backends.torch_state import read_state, restore_state
from nestune.backends.training_state import TrainingState, check_fits
from nestune.base_model import a_base_that_computes, code_of_its_own, end_tokens, resolve_base
from nestune.config import RunConfig
from nestune.data.batches import Batch
from nestune.data.tokens import load_tokenizer, pad_id_of
from nestune.errors import ConfigError, DivergedError
from nestune.tiers.parameters import LoraParameter

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
            # Must be in the environment before the first cuBLAS call for sums to come out the same each time.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=True)
        self._config = config
        self._base = resolve_base(config.model)
        tokenizer = load_tokenizer(self._base.folder)
        dtype = "auto" if config.model.dtype == "auto" else getattr(torch, config.model.dtype)
        self._causal = _load_base(self._base.folder, dtype).to(self.device)
        self._pad_id = pad_id_of(tokenizer, self._base.vocabulary)
        self._causal.generation_config = greedy_generation(
            self._causal.generation_config, self._pad_id, int(tokenizer.eos_token_id)
        )
        self._end_ids = frozenset(self._causal.generation_config.eos_token_id)
        self._model = _add_lora(self._causal, config)
        shorten_frozen_forward(self._model)
        if config.training.gradient_checkpointing:
            _checkpoint_activations(self._causal)
        self._model.eval()
        matrices = trainable_lora(self._model)
        self._described = [matrix.described for matrix in matrices]
        self._parameters = {matrix.described.name: matrix.values for matrix in matrices}
        self._modules = {matrix.described.name: _module_path(matrix.key) for matrix in matrices}
        self._untrained = initial_weights(self._described, config.training.seed)
        self._set_weights(self._untrained)
        self._head_is_linear, self._positions_at_once = self._probe_head()
        self._optimizer: TieredOptimizer | None = None

    def lora_parameters(self) -> list[LoraParameter]:
        return self._described

    def weights(self) -> dict[str, NDArray[Any]]:
        return {name: parameter.detach().cpu().numpy().copy() for name, parameter in self._parameters.items()}

    def prepare_training(self, tier_of: dict[str, int]) -> None:
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
        nats, tokens = self._backward(micro_batches)
        self._optimizer.set_learning_rate(learning_rate)
        grad_norm = self._optimizer.update(due)
        self._optimizer.zero_grad()
        return StepResult(nats, tokens, sum(int(batch.lengths.sum()) for batch in micro_batches), grad_norm)

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
                nats += self._mean_loss(batch, tokens=1).item()
                tokens += int(batch.supervised.sum())
        return Loss(nats, tokens)

    def logits(self, tokens: Sequence[int]) -> NDArray[Any]:
        self._switch(training=False)
        with torch.no_grad(), self._autocast():
            logits = self._causal(torch.tensor([tokens], device=self.device), use_cache=False).logits[0]
        array: NDArray[Any] = logits.float().cpu().numpy()
        return array

    def generate(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
        width = max(len(prompt) for prompt in prompts)
        tokens = torch.full((len(prompts), width), self._pad_id, dtype=torch.long)
        attention = torch.zeros_like(tokens)
        for row, prompt in enumerate(prompts):
            tokens[row, width - len(prompt) :] = torch.as_tensor(np.asarray(prompt, dtype=np.int64))
            attention[row, width - len(prompt) :] = 1
        self._switch(training=False)
        with torch.no_grad(), self._autocast():
            written = self._model.generate(
                input_ids=tokens.to(self.device),
                attention_mask=attention.to(self.device),
                max_new_tokens=max_tokens,
            )
        return [self._until_end(row) for row in written[:, width:].tolist()]

    def save_adapter(self, folder: Path) -> None:
        layers = self._causal.config.get_text_config().num_hidden_layers
        write_adapter(folder, self.weights(), self._modules, layers, self._config.lora, self._base)

    def load_adapter(self, folder: Path | None) -> None:
        read = read_adapter(folder, self._described, self._config.lora, self._base) if folder else {}
        self._set_weights({**self._untrained, **read})

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

    def _backward(self, micro_batches: Sequence[Batch]) -> tuple[float, int]:
        """Add up the gradients of a step's mean loss; returns that loss, in nats per token, and the tokens.

        Raises DivergedError when the loss is not finite.
        """
        tokens = sum(int(batch.supervised.sum()) for batch in micro_batches)
        self._switch(training=True)
        nats = 0.0
        for batch in micro_batches:
            loss = self._mean_loss(batch, tokens)
            nats += loss.item()
            if loss.requires_grad:
                loss.backward()
        if not math.isfinite(nats):
            raise DivergedError(f"the loss is {nats}")
        return nats, tokens

    def _mean_loss(self, batch: Batch, tokens: int) -> Tensor:
        """Cross-entropy, in nats, at a batch's supervised positions, summed and divided by `tokens`."""
        ids = torch.from_numpy(batch.tokens.astype(np.int64)).to(self.device)
        lengths = torch.from_numpy(batch.lengths.astype(np.int64)).to(self.device)
        attention = torch.arange(ids.shape[1], device=self.device) < lengths[:, None]
        supervised = torch.from_numpy(batch.supervised).to(self.device)[:, 1:]
        targets = ids[:, 1:][supervised]
        inputs = {"input_ids": ids, "attention_mask": attention.long(), "use_cache": False}
        with self._autocast():
            if self._head_is_linear:
                hidden = self._causal.base_model(**inputs).last_hidden_state[:, :-1][supervised]
                head = self._causal.get_output_embeddings()
                return head_loss(hidden, targets, head, tokens, self._positions_at_once)
            logits = self._causal(**inputs).logits[:, :-1][supervised]
            return F.cross_entropy(logits.float(), targets, reduction="sum") / tokens

    def _autocast(self) -> torch.autocast:
        precision = self._config.training.precision
        return torch.autocast(self.device, dtype=torch.bfloat16, enabled=precision == "bfloat16")

    def _probe_head(self) -> tuple[bool, int]:
        """Whether logits are the head's output as it is, and how many positions it may see at once.

        Some models scale or cap their logits afterwards: theirs are made by the whole model, all positions at once.
        """
        probe = torch.arange(4, device=self.device)[None]
        with torch.no_grad(), a_base_that_computes(self._base):
            logits = self._causal(probe).logits
            alone = self._causal.get_output_embeddings()(self._causal.base_model(probe).last_hidden_state)
        return torch.allclose(alone, logits), max(1, LOGITS_AT_ONCE // logits.shape[-1])

    def _until_end(self, tokens: list[int]) -> list[int]:
        ends = [position for position, token in enumerate(tokens) if token in self._end_ids]
        return tokens[: ends[0]] if ends else tokens


def _module_path(key: str) -> str:
    """Where the module of a PEFT parameter is in the base model, e.g. `model.layers.3.self_attn.q_proj`."""
    return key.removeprefix("base_model.model.").rpartition(".lora_")[0]


def greedy_generation(recommended: GenerationConfig, pad_id: int, end_id: int) -> GenerationConfig:
    """Greedy generation that ends at every end token of the base, in place of what the base recommends.

    That may sample, or punish repetition, so that a score would depend on more than the weights.
    """
    ends = end_tokens(recommended.eos_token_id)
    return GenerationConfig(
        do_sample=False,
        pad_token_id=pad_id,
        eos_token_id=sorted({end_id, *ends}),
    )


def _load_base(folder: Path, dtype: Any) -> Any:
    """The base model; typed loosely, as the methods of Transformers' models mostly bear no types."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    quantization = config.get("quantization")
    if quantization is not None:
        raise ConfigError(
            f"model.base: the model in {folder} is quantized for MLX ({quantization.get('bits')} bits), which PyTorch "
            "does not read. Set model.backend: mlx, or take the base that it was made of."
        )
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, trust_remote_code=False, use_safetensors=True, local_files_only=True
        )
    except Exception as error:  # each model's code fails in its own ways at a configuration that makes no sense
        if "trust_remote_code" in str(error):
            raise code_of_its_own(folder, config, "Transformers") from error
        first_line = str(error).strip().partition("\n")[0].rstrip(".?") or type(error).__name__
        raise ConfigError(
            f"model.base: the model in {folder} does not load: {first_line:.500}. Take another copy."
        ) from error


def _add_lora(causal: Any, config: RunConfig) -> PeftModel:
    """Freeze the base and give its linear modules an adapter; raises ConfigError when a target matches nothing."""
    linear = {name: module for name, module in causal.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    chosen_modules(config.lora, {name: _highest_rank(module) for name, module in linear.items()})
    targets = config.lora.targets if isinstance(config.lora.targets, str) else list(config.lora.targets)
    peft_config = PeftLoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora.rank,
        lora_alpha=config.lora.alpha,
        lora_dropout=config.lora.dropout,
        target_modules=targets,
    )
    with warnings.catch_warnings():
        # PEFT asks Transformers in ways that Transformers has begun to rename; users can do nothing about it.
        warnings.simplefilter("ignore", FutureWarning)
        model = get_peft_model(causal, peft_config)
    assert isinstance(model, PeftModel)
    return model


def _highest_rank(linear: Any) -> int:
    """That of a weight (outputs x inputs), whatever a quantized one is stored as."""
    sizes = linear.weight.shape if isinstance(linear, Conv1D) else (linear.in_features, linear.out_features)
    return int(min(sizes))


def _checkpoint_activations(causal: Any) -> None:
    """Keep no activations within layers; raises ConfigError when the model cannot do without them."""
    try:
        causal.activation_checkpointing_enable({"use_reentrant": False})
    except ValueError as error:
        raise ConfigError(f"training.gradient_checkpointing is true: {error} Set it to false.") from None
    # Transformers makes the embeddings' output require a gradient, which re-entrant checkpointing needs: the backward
    # pass would go on down to there at every step.
    causal.disable_input_require_grads()
