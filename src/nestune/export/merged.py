"""The base in Hugging Face format with the adapter merged into its weights."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nestune.export.job import Job
from nestune.export.merge import INDEX, Weights, merge, read_weights
from nestune.export.quantization import MLX_KEYS, dequantize, float_type
from nestune.export.tensors import write_tensors
from nestune.files import write_json

WEIGHT_SUFFIXES = frozenset({".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"})
# Written anew, or about the base only.
NOT_COPIED = frozenset({"config.json", "README.md", "metadata.json"})


def write_merged(job: Job, folder: Path) -> list[str]:
    """Write the merged model into an existing folder, file by file as the base has them; nothing is to be noted."""
    with merged_weights(job, folder) as weights:
        for file, tensors in weights.items():
            write_tensors(folder / file, tensors)
        if len(weights) > 1:
            write_json(folder / INDEX, _index(weights))
    for path in job.base.folder.iterdir():
        if path.is_file() and _is_copied(path):
            shutil.copyfile(path, folder / path.name)
    more_templates = job.base.folder / "additional_chat_templates"
    if more_templates.is_dir():
        shutil.copytree(more_templates, folder / more_templates.name)
    write_json(folder / "config.json", _config(job))
    return []


@contextmanager
def merged_weights(job: Job, scratch: Path) -> Iterator[Weights]:
    """The weights with the adapter merged in; those of a quantized base are kept below `scratch` while they are read.

    Raises ConfigError when the adapter's modules are none that can be merged.
    """
    if not job.dequantize:
        yield merge(read_weights(job.base.folder), job.adapter, job.lora, job.dtype)
        return
    dtype = float_type(job.base.folder) if job.dtype == "auto" else job.dtype
    with tempfile.TemporaryDirectory(dir=scratch) as dequantized:
        dequantize(job.base.folder, Path(dequantized))
        yield merge(read_weights(Path(dequantized)), job.adapter, job.lora, dtype)


def _index(weights: Weights) -> dict[str, Any]:
    return {
        "metadata": {"total_size": sum(tensor.nbytes for tensors in weights.values() for tensor in tensors.values())},
        "weight_map": {name: file for file, tensors in weights.items() for name in tensors},
    }


def _is_copied(path: Path) -> bool:
    of_weights = path.suffix in WEIGHT_SUFFIXES or path.name.endswith(".index.json")
    return not of_weights and path.name not in NOT_COPIED and not path.name.startswith(".")


def _config(job: Job) -> dict[str, Any]:
    """The base's config.json as it is true of the merged model, and as mlx-lm reads it too."""
    config: dict[str, Any] = json.loads((job.base.folder / "config.json").read_text(encoding="utf-8"))
    if job.dequantize:
        config = {key: value for key, value in config.items() if key not in MLX_KEYS}
    if job.dtype != "auto":
        config = {key: value for key, value in config.items() if key != "torch_dtype"} | {"dtype": job.dtype}
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        # Transformers 5 writes it only there; some models of mlx-lm read it only at top level, or take a default.
        config.setdefault("rope_theta", rope["rope_theta"])
    return config
