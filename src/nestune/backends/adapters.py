"""The adapter format: a folder that PEFT loads as it is, with the content hash of its base beside it.

`adapter_model.safetensors` and `adapter_config.json` follow PEFT (github.com/huggingface/peft), A as
(rank, inputs) and B as (outputs, rank), the effect scaled by alpha / rank. `metadata.json` is ours.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from nestune.base_model import BaseModel
from nestune.config import LoraConfig
from nestune.errors import ConfigError
from nestune.runs import write_json

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
METADATA = "metadata.json"

log = logging.getLogger(__name__)


def write_adapter(
    folder: Path, weights: Mapping[str, NDArray[Any]], targets: list[str], lora: LoraConfig, base: BaseModel
) -> None:
    """Write weights (PEFT key -> float32 matrix) and PEFT's configuration into an existing folder.

    The same weights give the same bytes.
    """
    from safetensors.numpy import save_file

    save_file({key: weights[key] for key in sorted(weights)}, folder / WEIGHTS, metadata={"format": "pt"})
    write_json(
        folder / CONFIG,
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base.reference,
            "revision": base.revision,
            "r": lora.rank,
            "lora_alpha": lora.alpha,
            "lora_dropout": lora.dropout,
            "target_modules": targets,
            "bias": "none",
            "inference_mode": True,
        },
    )


def read_adapter(
    folder: Path, expected: Mapping[str, tuple[int, ...]], lora: LoraConfig, base: BaseModel
) -> dict[str, NDArray[Any]]:
    """The weights of an adapter folder by PEFT key, when they fit exactly.

    `expected` maps each PEFT key to its shape. Raises ConfigError with every mismatch: another base, rank or
    alpha; missing, surplus or misshapen matrices; files that are missing or broken.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        weights: dict[str, NDArray[Any]] = load_file(folder / WEIGHTS)
    except OSError as error:
        raise ConfigError(
            f"{folder} is no adapter: cannot read {error.filename or WEIGHTS}. It needs {CONFIG} and {WEIGHTS}."
        ) from None
    except (ValueError, SafetensorError) as error:
        raise ConfigError(f"{folder}: the adapter is broken: {error}. Train it again, or take another copy.") from None
    faults = _lora_faults(config, lora)
    faults += [f"{key} is missing" for key in sorted(set(expected) - set(weights))]
    faults += [f"{key} is not part of this model" for key in sorted(set(weights) - set(expected))]
    faults += [
        f"{key} has shape {list(weights[key].shape)}, expected {list(shape)}"
        for key, shape in expected.items()
        if key in weights and weights[key].shape != shape
    ]
    faults += _base_faults(folder, base)
    if faults:
        shown = [f"  {fault}" for fault in faults[:10]] + (["  ..."] if len(faults) > 10 else [])
        remedy = "Use the base and the lora block that it was trained with, or train a new adapter."
        raise ConfigError("\n".join([f"the adapter {folder} does not fit: {len(faults)} fault(s)", *shown, remedy]))
    return weights


def misfits(folder: Path, lora: LoraConfig, base: BaseModel) -> list[str]:
    """What of an adapter folder's rank, alpha and base is not as configured; reads no weights."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return [f"its {CONFIG} cannot be read: {error}"]
    return _lora_faults(config, lora) + _base_faults(folder, base)


def _lora_faults(config: Mapping[str, Any], lora: LoraConfig) -> list[str]:
    return [
        f"{key} is {config.get(key)!r}, the configuration says lora.{ours} {value!r}"
        for key, ours, value in (("r", "rank", lora.rank), ("lora_alpha", "alpha", lora.alpha))
        if config.get(key) != value
    ]


def _base_faults(folder: Path, base: BaseModel) -> list[str]:
    metadata = folder / METADATA
    if not metadata.is_file():
        log.warning("%s has no %s, so it cannot be told which base it was trained on", folder, METADATA)
        return []
    try:
        trained_on = json.loads(metadata.read_text(encoding="utf-8"))["base"]
        reference, sha256 = trained_on["reference"], trained_on["sha256"]
    except (ValueError, KeyError, TypeError):
        return [f"{METADATA} does not name a base with its sha256"]
    if sha256 == base.sha256:
        return []
    return [
        f"it was trained on {reference} (sha256 {sha256[:12]}), model.base is {base.reference} "
        f"(sha256 {base.sha256[:12]})"
    ]
