"""W + (alpha / rank) B A: the weights of a base with an adapter merged into them."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from nestune.backends.adapters import WEIGHTS
from nestune.config import LoraConfig
from nestune.errors import ConfigError
from nestune.export.tensors import FLOATS, Tensor, as_float32, cast, read_tensors, store

INDEX = "model.safetensors.index.json"
OF_PEFT = "base_model.model."
# What is added to a weight, as a function, so that one is in memory at a time.
Delta: TypeAlias = Callable[[], NDArray[np.float32]]
# Name of a file -> name of a tensor in it -> the tensor.
Weights: TypeAlias = dict[str, dict[str, Tensor]]


def merge(weights: Weights, adapter: Path, lora: LoraConfig, dtype: str) -> Weights:
    """The weights with the adapter of a folder added, summed in float32 and stored as `dtype`; auto: as they were.

    Raises ConfigError when a module of the adapter has no weight of its shape among them.
    """
    deltas, shapes = _deltas(adapter, lora)
    held = {name: tensor for tensors in weights.values() for name, tensor in tensors.items()}
    unfit = sorted(name for name, shape in shapes.items() if not _takes(held.get(name), shape))
    if unfit:
        raise ConfigError(
            f"the base holds no float weight of its shape for {len(unfit)} of the adapter's {len(shapes)} modules, "
            f"first {unfit[0]}; merging knows plain linear modules only. Use the adapter unmerged: --to peft or mlx."
        )
    return {
        file: {name: _merged(tensor, deltas.get(name), dtype) for name, tensor in tensors.items()}
        for file, tensors in weights.items()
    }


def read_weights(folder: Path) -> Weights:
    """The weights of a model folder: in the files that its index names, or else in all `model*.safetensors`."""
    index = folder / INDEX
    if index.is_file():
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        files = sorted(path.name for path in folder.glob("model*.safetensors"))
    return {file: read_tensors(folder / file) for file in files}


def _deltas(adapter: Path, lora: LoraConfig) -> tuple[dict[str, Delta], dict[str, tuple[int, int]]]:
    """What is added to each weight by its name, and its shape."""
    matrices = {key.removeprefix(OF_PEFT): tensor for key, tensor in read_tensors(adapter / WEIGHTS).items()}
    deltas: dict[str, Delta] = {}
    shapes: dict[str, tuple[int, int]] = {}
    for key, a in matrices.items():
        module, is_a, _ = key.partition(".lora_A.")
        if is_a:
            b = matrices[f"{module}.lora_B.weight"]
            deltas[f"{module}.weight"] = partial(_delta, a, b, lora.alpha / lora.rank)
            shapes[f"{module}.weight"] = (b.shape[0], a.shape[1])
    return deltas, shapes


def _delta(a: Tensor, b: Tensor, scale: float) -> NDArray[np.float32]:
    return np.float32(scale) * (as_float32(b) @ as_float32(a))


def _takes(weight: Tensor | None, shape: tuple[int, int]) -> bool:
    return weight is not None and weight.shape == shape and weight.dtype in FLOATS.values()


def _merged(tensor: Tensor, delta: Delta | None, dtype: str) -> Tensor:
    stored = tensor.dtype if dtype == "auto" else FLOATS[dtype]
    if delta is None:
        return cast(tensor, stored)
    return Tensor(stored, tensor.shape, lambda: store(as_float32(tensor) + delta(), stored))
