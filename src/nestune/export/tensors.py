"""Tensors of safetensors files as they are stored, one at a time and without a framework.

NumPy has no bfloat16: its bits are kept as uint16. They are the upper half of a float32.
Source of the file format: https://huggingface.co/docs/safetensors, "Format".
"""

import json
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Element type by its name in the file -> what NumPy holds it in.
HELD_IN: dict[str, type[np.generic]] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.uint16,
    "F8_E4M3": np.uint8,
    "F8_E5M2": np.uint8,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
FLOATS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True, eq=False)
class Tensor:
    """dtype: the name of its element type in the file; read: its elements, held in what `HELD_IN` says."""

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], NDArray[Any]]

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * np.dtype(HELD_IN[self.dtype]).itemsize


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name; their elements stay on the disk until they are read."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {
        name: Tensor(at["dtype"], tuple(at["shape"]), partial(_elements, path, 8 + length + at["data_offsets"][0], at))
        for name, at in header.items()
    }


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors into a new file, reading one after the other."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            file.write(np.ascontiguousarray(tensor.read()).data)


def cast(tensor: Tensor, dtype: str) -> Tensor:
    """The tensor with its elements rounded to another float type; as it is when it has that type or holds no floats."""
    if tensor.dtype == dtype or tensor.dtype not in FLOATS.values():
        return tensor
    return Tensor(dtype, tensor.shape, lambda: store(as_float32(tensor), dtype))


def as_float32(tensor: Tensor) -> NDArray[np.float32]:
    """The elements of a tensor of one of the `FLOATS`, all of which float32 holds exactly."""
    elements = tensor.read()
    if tensor.dtype == "BF16":
        return (elements.astype(np.uint32) << 16).view(np.float32)
    return elements.astype(np.float32)


def store(values: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """Finite float32 values as elements of one of the `FLOATS`, each rounded to the nearest, ties to even."""
    if dtype == "BF16":
        bits = np.ascontiguousarray(values).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return values.astype(HELD_IN[dtype])


def _elements(path: Path, offset: int, at: Mapping[str, Any]) -> NDArray[Any]:
    count = math.prod(at["shape"])
    return np.fromfile(path, HELD_IN[at["dtype"]], count, offset=offset).reshape(at["shape"])
