"""The base model as Transformers loads it, and PEFT's adapter on it."""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from nestune.backends.lora_targets import chosen_modules
from nestune.base_model import code_of_its_own, end_tokens
from nestune.config import RunConfig
from nestune.errors import ConfigError


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


def load_base(folder: Path, dtype: Any) -> Any:
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


def add_lora(causal: Any, config: RunConfig) -> PeftModel:
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


def checkpoint_activations(causal: Any) -> None:
    """Keep no activations within layers; raises ConfigError when the model cannot do without them."""
    try:
        causal.activation_checkpointing_enable({"use_reentrant": False})
    except ValueError as error:
        raise ConfigError(f"training.gradient_checkpointing is true: {error} Set it to false.") from None
    # Transformers makes the embeddings' output require a gradient, which re-entrant checkpointing needs: the backward
    # pass would go on down to there at every step.
    causal.disable_input_require_grads()
