"""Training on PyTorch (CUDA, or CPU): Transformers holds the base, PEFT the adapter, torch.optim the updates."""

import math
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging

from nestune.backends.adapters import read_adapter, write_adapter
from nestune.backends.base import Loss, StepResult
from nestune.base_model import resolve_base
from nestune.config import RunConfig, TrainingConfig
from nestune.data.batches import Batch
from nestune.data.tokens import Tokenizer, load_tokenizer
from nestune.errors import ConfigError, RunError
from nestune.tiers.parameters import LoraParameter, parse_parameter

DIVERGED_REMEDY = "Lower training.learning_rate, or add training.warmup_steps."

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
}


class TorchBackend:
    """A causal language model with one LoRA adapter; satisfies `nestune.backends.base.Backend`.

    The base is frozen, the adapter float32. A parameter requires a gradient only at steps that need it, so
    autograd builds no graph below the lowest layer that is due, and ends the backward pass there.
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
        self._pad_id = int(tokenizer.pad_token_id)
        self._causal.generation_config = greedy_generation(self._causal.generation_config, tokenizer)
        self._end_ids = frozenset(self._causal.generation_config.eos_token_id)
        torch.manual_seed(config.training.seed)
        self._model = _add_lora(self._causal, config)
        self._model.eval()
        trainable = _trainable(self._model)
        self._described = [described for described, _, _ in trainable.values()]
        self._parameters = {name: parameter for name, (_, _, parameter) in trainable.items()}
        self._peft_keys = {name: key.replace(".default.", ".") for name, (_, key, _) in trainable.items()}
        self._untrained = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self._head_is_linear = self._head_alone_gives_logits()
        self._tier_of: dict[str, int] = {}
        self._tiers: list[_Tier] = []

    def lora_parameters(self) -> list[LoraParameter]:
        return self._described

    def weights(self) -> dict[str, NDArray[Any]]:
        return {name: parameter.detach().cpu().numpy().copy() for name, parameter in self._parameters.items()}

    def prepare_training(self, tier_of: dict[str, int]) -> None:
        self._tier_of = tier_of
        self._tiers = []
        for tier, lr_scale in enumerate(self._config.tiers.lr_scales):
            members = [parameter for name, parameter in self._parameters.items() if tier_of[name] == tier]
            self._tiers.append(_Tier(members, lr_scale, self._config.training))
        torch.manual_seed(self._config.training.seed)

    def train_step(self, micro_batches: Sequence[Batch], due: frozenset[int], learning_rate: float) -> StepResult:
        accumulate = self._config.tiers.inactive_gradients == "accumulate"
        for index, tier in enumerate(self._tiers):
            tier.begin_step(takes_gradients=accumulate or index in due)
        tokens = sum(int(batch.supervised.sum()) for batch in micro_batches)
        self._model.train()
        nats = 0.0
        for batch in micro_batches:
            loss = self._nats(batch) / tokens
            nats += loss.item()
            if loss.requires_grad:
                loss.backward()
        self._model.eval()
        if not math.isfinite(nats):
            raise RunError(f"training diverged: the loss is {nats}. {DIVERGED_REMEDY}")
        grad_norm = self._update(due, learning_rate) if due else 0.0
        return StepResult(nats, tokens, sum(int(batch.lengths.sum()) for batch in micro_batches), grad_norm)

    def loss(self, batches: Iterable[Batch]) -> Loss:
        nats, tokens = 0.0, 0
        with torch.no_grad():
            for batch in batches:
                nats += self._nats(batch).item()
                tokens += int(batch.supervised.sum())
        return Loss(nats, tokens)

    def generate(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
        width = max(len(prompt) for prompt in prompts)
        tokens = torch.full((len(prompts), width), self._pad_id, dtype=torch.long)
        attention = torch.zeros_like(tokens)
        for row, prompt in enumerate(prompts):
            tokens[row, width - len(prompt) :] = torch.as_tensor(np.asarray(prompt, dtype=np.int64))
            attention[row, width - len(prompt) :] = 1
        with torch.no_grad(), self._autocast():
            written = self._model.generate(
                input_ids=tokens.to(self.device),
                attention_mask=attention.to(self.device),
                max_new_tokens=max_tokens,
            )
        return [self._until_end(row) for row in written[:, width:].tolist()]

    def save_adapter(self, folder: Path) -> None:
        weights = {self._peft_keys[name]: array for name, array in self.weights().items()}
        targets = sorted({described.module.rpartition(".")[2] for described in self.lora_parameters()})
        write_adapter(folder, weights, targets, self._config.lora, self._base)

    def load_adapter(self, folder: Path | None) -> None:
        values = self._untrained
        if folder is not None:
            shapes = {self._peft_keys[name]: tuple(parameter.shape) for name, parameter in self._parameters.items()}
            read = read_adapter(folder, shapes, self._config.lora, self._base)
            values = {name: torch.from_numpy(read[key]) for name, key in self._peft_keys.items()}
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(values[name])

    def _nats(self, batch: Batch) -> Tensor:
        """Summed cross-entropy, in nats, at the supervised positions of a batch; the head sees no others."""
        tokens = torch.from_numpy(batch.tokens.astype(np.int64)).to(self.device)
        lengths = torch.from_numpy(batch.lengths.astype(np.int64)).to(self.device)
        attention = torch.arange(tokens.shape[1], device=self.device) < lengths[:, None]
        supervised = torch.from_numpy(batch.supervised).to(self.device)[:, 1:]
        inputs = {"input_ids": tokens, "attention_mask": attention.long(), "use_cache": False}
        with self._autocast():
            if self._head_is_linear:
                hidden = self._causal.base_model(**inputs).last_hidden_state
                logits = self._causal.get_output_embeddings()(hidden[:, :-1][supervised])
            else:
                logits = self._causal(**inputs).logits[:, :-1][supervised]
        return F.cross_entropy(logits.float(), tokens[:, 1:][supervised], reduction="sum")

    def _update(self, due: frozenset[int], learning_rate: float) -> float:
        """Average the due tiers' windows, clip over all of them, and step; returns the norm before clipping."""
        tiers = [self._tiers[index] for index in sorted(due)]
        for tier in tiers:
            tier.average_window()
        # In the model's order, whatever the tiers: a sum of squares is rounded by the order of its terms.
        moving = [parameter for name, parameter in self._parameters.items() if self._tier_of[name] in due]
        norm = nn.utils.get_total_norm([p.grad for p in moving if p.grad is not None])
        if not math.isfinite(norm):
            raise RunError(f"training diverged: the gradient's norm is {norm}. {DIVERGED_REMEDY}")
        if self._config.training.max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(moving, self._config.training.max_grad_norm, norm)
        for tier in tiers:
            tier.step(learning_rate)
        return float(norm)

    def _autocast(self) -> torch.autocast:
        precision = self._config.training.precision
        return torch.autocast(self.device, dtype=torch.bfloat16, enabled=precision == "bfloat16")

    def _head_alone_gives_logits(self) -> bool:
        """Whether logits are the head's output as it is; some models scale or cap them afterwards."""
        probe = torch.arange(4, device=self.device)[None]
        with torch.no_grad():
            alone = self._causal.get_output_embeddings()(self._causal.base_model(probe).last_hidden_state)
            return torch.allclose(alone, self._causal(probe).logits)

    def _until_end(self, tokens: list[int]) -> list[int]:
        ends = [position for position, token in enumerate(tokens) if token in self._end_ids]
        return tokens[: ends[0]] if ends else tokens


def greedy_generation(recommended: GenerationConfig, tokenizer: Tokenizer) -> GenerationConfig:
    """Greedy generation that ends at every end token of the base, in place of what the base recommends.

    That may sample, or punish repetition, so that a score would depend on more than the weights.
    """
    ends = recommended.eos_token_id
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    return GenerationConfig(
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=sorted({int(tokenizer.eos_token_id), *ends}),
    )


class _Tier:
    """The parameters of one tier, their optimizer, and how many steps' gradients are summed in them."""

    def __init__(self, parameters: list[nn.Parameter], lr_scale: float, training: TrainingConfig) -> None:
        self._parameters = parameters
        self._lr_scale = lr_scale
        self._summed_steps = 0
        self._optimizer = OPTIMIZERS[training.optimizer](
            parameters, lr=training.learning_rate, weight_decay=training.weight_decay
        )

    def begin_step(self, takes_gradients: bool) -> None:
        self._summed_steps += takes_gradients
        for parameter in self._parameters:
            parameter.requires_grad_(takes_gradients)

    def average_window(self) -> None:
        """Turn the summed gradients into their mean over the window; under `drop` just one step was summed."""
        if self._summed_steps > 1:
            for parameter in self._parameters:
                if parameter.grad is not None:
                    parameter.grad /= self._summed_steps

    def step(self, learning_rate: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate * self._lr_scale
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._summed_steps = 0


def _load_base(folder: Path, dtype: Any) -> Any:
    """The base model; typed loosely, as the methods of Transformers' models mostly bear no types."""
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"model.base: the model in {folder} does not load: {first_line}. Take another copy."
        ) from error


def _add_lora(causal: Any, config: RunConfig) -> PeftModel:
    """Freeze the base and give its linear modules an adapter; raises ConfigError when the targets match nothing."""
    targets = config.lora.targets if isinstance(config.lora.targets, str) else list(config.lora.targets)
    peft_config = PeftLoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora.rank,
        lora_alpha=config.lora.alpha,
        lora_dropout=config.lora.dropout,
        target_modules=targets,
    )
    try:
        with warnings.catch_warnings():
            # PEFT asks Transformers in ways that Transformers has begun to rename; users can do nothing about it.
            warnings.simplefilter("ignore", FutureWarning)
            model = get_peft_model(causal, peft_config)
    except ValueError as error:
        modules = causal.named_modules()
        linear = sorted({name.rpartition(".")[2] for name, module in modules if isinstance(module, nn.Linear)})
        why = str(error).splitlines()[0]
        raise ConfigError(f"lora.targets is {targets!r}: {why} Linear modules here: {', '.join(linear)}.") from None
    assert isinstance(model, PeftModel)
    return model


def _trainable(model: nn.Module) -> dict[str, tuple[LoraParameter, str, nn.Parameter]]:
    """Canonical name -> (description, PyTorch name, parameter) of everything that requires a gradient.

    Raises ConfigError when a trainable parameter is not a LoRA matrix of a layer.
    """
    found: dict[str, tuple[LoraParameter, str, nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        described = parse_parameter(name, tuple(parameter.shape))
        if described is None:
            raise ConfigError(
                f"lora.targets: {name} is no LoRA matrix of a layer, so it has no tier. "
                "Target linear modules of the layers, e.g. [q_proj, v_proj], or all-linear."
            )
        found[described.name] = described, name, parameter
    return found
