"""Bases whose weights are quantized: merging an adapter into such weights would round it away."""

import json
from pathlib import Path
from typing import Literal

from nestune.export.tensors import FLOATS, read_tensors

MLX_KEYS = ("quantization", "quantization_config")


def quantized_by(folder: Path) -> Literal["mlx", "other"] | None:
    """Who quantized the base in a folder; None: its weights are floats."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("quantization"):
        return "mlx"
    return "other" if {**config.get("text_config", {}), **config}.get("quantization_config") else None


def dequantize(folder: Path, target: Path) -> None:
    """Write the weights of a base that MLX quantized into an existing folder, as the float32 that they stand for."""
    from nestune.backends.mlx_blas import load_fast_blas

    load_fast_blas()
    import mlx.core as mx
    from mlx_lm.utils import dequantize_model, load_model, save_model

    model, _ = load_model(folder, lazy=True, trust_remote_code=False)
    # Scales in float32 give weights in float32: nothing is rounded before the adapter is added.
    model.set_dtype(mx.float32)
    save_model(target, dequantize_model(model), donate_model=True)


def float_type(folder: Path) -> str:
    """The type of the floats among the weights of a base, such as the scales of quantized ones: bfloat16, say."""
    stored = [tensor.dtype for file in sorted(folder.glob("*.safetensors")) for tensor in read_tensors(file).values()]
    return max(FLOATS, key=lambda name: stored.count(FLOATS[name]))
