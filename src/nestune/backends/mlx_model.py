"""The base model as mlx-lm loads it, and its head."""

import json
import logging
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx_lm.utils import load_model

from nestune.backends.mlx_head_loss import Head
from nestune.backends.mlx_lora import mlx_arguments
from nestune.base_model import code_of_its_own
from nestune.errors import ConfigError

log = logging.getLogger(__name__)

# Elements of a block of logits; 128 MiB in float32, 220 positions of a vocabulary of 152,000.
LOGITS_AT_ONCE = 2**25


def load_base(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
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


def split_head(model: Any) -> tuple[Callable[[mx.array], mx.array], Head, int]:
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
