"""The adapter format: a folder that PEFT and mlx-lm both load as it is, with the content hash of its base beside it.

    adapter_model.safetensors   PEFT's (github.com/huggingface/peft): A (rank, inputs), B (outputs, rank)
    adapters.safetensors        mlx-lm's (github.com/ml-explore/mlx-lm): their transposes, the same bits
    adapter_config.json         the keys of both; PEFT warns of mlx-lm's, which `nestune export --to peft` leaves out
    metadata.json               ours: the base's sha256, and where the adapter comes from

The effect is scaled by alpha / rank, mlx-lm's `scale`. A folder of either library alone is read as well.
"""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pydantic
from numpy.typing import NDArray

from nestune.backends.adapter_config import CONFIG, make_adapter_config, read_adapter_config
from nestune.backends.lora_sum import Adapter
from nestune.base_model import BaseModel
from nestune.base_sizes import read_shapes
from nestune.config import LoraConfig
from nestune.errors import ConfigError
from nestune.files import write_bytes, write_json
from nestune.foreign_files import parse_json, read_bounded
from nestune.tiers.parameters import LoraParameter, parse_parameter

WEIGHTS = "adapter_model.safetensors"
MLX_WEIGHTS = "adapters.safetensors"
METADATA = "metadata.json"
SHOWN_FAULTS = 10
HEADER_BYTES = 2**20
FLOATS = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}

# Each matrix, described with the shape that it has, and its values (float32) in PEFT's orientation.
Matrices: TypeAlias = dict[LoraParameter, NDArray[Any]]

log = logging.getLogger(__name__)


def write_adapter(
    folder: Path,
    weights: Mapping[str, NDArray[Any]],
    modules: Mapping[str, str],
    layers: int,
    lora: LoraConfig,
    base: BaseModel,
) -> None:
    """Write the weights for both libraries, and their configuration, into an existing folder.

    weights: canonical name -> float32, A (rank, inputs) or B (outputs, rank); modules: canonical name -> dotted path
    of its module in the model, e.g. `model.layers.3.self_attn.q_proj`; layers: how many the model has.
    The same weights give the same bytes.
    """
    from safetensors.numpy import save

    described = [parse_parameter(name, values.shape) for name, values in weights.items()]
    peft, mlx, paths = {}, {}, []
    for matrix in filter(None, described):
        values, module = weights[matrix.name], modules[matrix.name]
        peft[f"base_model.model.{module}.lora_{matrix.side.upper()}.weight"] = np.ascontiguousarray(values)
        mlx[f"{module}.lora_{matrix.side}"] = np.ascontiguousarray(values.T)
        paths.append(matrix.module)
    write_bytes(folder / WEIGHTS, save(peft, metadata={"format": "pt"}))
    write_bytes(folder / MLX_WEIGHTS, save(mlx, metadata={"format": "mlx"}))
    write_json(folder / CONFIG, make_adapter_config(paths, layers, lora, base))


def module_path(key: str) -> str:
    """Where the module of a PEFT parameter is in the base model, e.g. `model.layers.3.self_attn.q_proj`."""
    return key.removeprefix("base_model.model.").rpartition(".lora_")[0]


def write_adapter_like(folder: Path, like: Path, adapter: Adapter, lora: LoraConfig, base: BaseModel) -> None:
    """Write an adapter of any rank into an existing folder, for the modules that another one adapts.

    like: the folder of that one, as `write_adapter` left it.
    """
    modules = {}
    for key, shape in read_shapes([like / WEIGHTS]).items():
        matrix = parse_parameter(key, shape)
        if matrix is not None:
            modules[matrix.name] = module_path(key)
    layers = int(parse_json(read_bounded(like / CONFIG), any_number=True)["num_layers"])
    size = lora.model_copy(update={"rank": adapter.rank, "alpha": adapter.alpha})
    write_adapter(folder, adapter.weights, modules, layers, size, base)


def read_adapter(
    folder: Path, expected: Sequence[LoraParameter], lora: LoraConfig, base: BaseModel
) -> dict[str, NDArray[Any]]:
    """The weights (float32) of an adapter folder by canonical name, when they fit exactly.

    All that are expected are there, unless mlx-lm trained the model's last layers only: those of the layers before
    are then left out, with a warning.

    Raises ConfigError with every mismatch: another base, rank or alpha; more than plain LoRA; missing, surplus or
    misshapen matrices, or values that are no finite numbers; two files that differ; missing or broken files.
    """
    return dict(_read(folder, expected, lora, base, any_size=False).weights)


def read_adapter_of_any_size(
    folder: Path, expected: Sequence[LoraParameter], lora: LoraConfig, base: BaseModel
) -> Adapter:
    """As `read_adapter`, whatever the adapter's rank and alpha: the modules alone are those of `expected`.

    Raises ConfigError as `read_adapter` does, and when the rank exceeds the largest dimension of the model's modules,
    beyond which no rank adds anything.
    """
    return _read(folder, expected, lora, base, any_size=True)


def _read(
    folder: Path, expected: Sequence[LoraParameter], lora: LoraConfig, base: BaseModel, any_size: bool
) -> Adapter:
    largest = max(max(matrix.shape[1 - matrix.rank_axis] for matrix in expected), lora.rank)
    try:
        files = _weights_files(folder)
        config = read_adapter_config(folder)
        rank, alpha = config.sizes[0] if config.sizes and any_size else (lora.rank, lora.alpha)
        expected = [_with_rank(matrix, min(rank, largest)) for matrix in expected]
        limit = _most_bytes(expected)
        read = [_read_matrices(file, limit) for file in files]
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder}: the adapter is broken: {error}. Train it again, or take another copy.") from None
    layers = 1 + max(matrix.layer for matrix in expected)
    first = max(0, layers - (config.last_layers or layers))
    matrices, *twin = (found for found, _ in read)
    faults = config.misfits(None if any_size else lora) + _base_faults(folder, base)
    if rank > largest:
        faults.append(f"its rank is {rank}, and no module of this model has more than {largest} inputs or outputs")
    of_files = [fault for _, of_a_file in read for fault in of_a_file]
    faults += _differences(matrices, *twin) if twin and not of_files else []
    faults += of_files
    faults += _mismatches(matrices, [matrix for matrix in expected if matrix.layer >= first], lora)
    if faults:
        more = len(faults) - SHOWN_FAULTS
        shown = [f"  {fault}" for fault in faults[:SHOWN_FAULTS]] + ([f"  ... and {more} more"] if more > 0 else [])
        remedy = "Use the base and the lora block that it was trained with, or train a new adapter."
        raise ConfigError("\n".join([f"the adapter {folder} does not fit: {len(faults)} fault(s)", *shown, remedy]))
    if first:
        which = "layer 0 starts" if first == 1 else f"layers 0 to {first - 1} start"
        log.warning("%s adapts the last %d of %d layers; %s untrained", folder, layers - first, layers, which)
    return Adapter({matrix.name: values for matrix, values in matrices.items()}, alpha / rank)


def misfits(folder: Path, base: BaseModel) -> list[str]:
    """What of an adapter folder's kind and base is not as configured, whatever its rank; reads no weights."""
    try:
        faults = read_adapter_config(folder).misfits()
    except (OSError, ValueError) as error:
        return [f"it cannot be read: {error}"]
    return faults + _base_faults(folder, base)


def weights_file(folder: Path) -> Path:
    """The file whose hash an adapter is known by: PEFT's, or mlx-lm's where it is the only one.

    Raises ConfigError when the folder holds no adapter.
    """
    return _weights_files(folder)[0]


def adapter_files(folder: Path) -> list[Path]:
    """The files that make up a checkpoint's adapter; mlx-lm's may be missing, as older checkpoints have none."""
    of_mlx = [folder / MLX_WEIGHTS] if (folder / MLX_WEIGHTS).is_file() else []
    return [folder / WEIGHTS, *of_mlx, folder / CONFIG, folder / METADATA]


def _weights_files(folder: Path) -> list[Path]:
    files = [folder / name for name in (WEIGHTS, MLX_WEIGHTS) if (folder / name).is_file()]
    if not files or not (folder / CONFIG).is_file():
        raise ConfigError(
            f"{folder} is no adapter: it needs {CONFIG}, and {WEIGHTS} or {MLX_WEIGHTS}. Name another folder."
        )
    return files


def _with_rank(matrix: LoraParameter, rank: int) -> LoraParameter:
    rows, columns = matrix.shape
    return replace(matrix, shape=(rank, columns) if matrix.side == "a" else (rows, rank))


def _most_bytes(expected: Sequence[LoraParameter]) -> int:
    """The size of the largest file that may hold these matrices: in float64, with names of any usual length."""
    return HEADER_BYTES + sum(8 * math.prod(matrix.shape) + 1024 for matrix in expected)


def _read_matrices(path: Path, max_bytes: int) -> tuple[Matrices, list[str]]:
    """The LoRA matrices of a file, and what of it is none; raises ValueError when the file is broken.

    Of one larger than `max_bytes` only the shapes are read.
    """
    if path.stat().st_size > max_bytes:
        fault = f"it has {path.stat().st_size} bytes, and an adapter of this model at most {max_bytes}: it was not read"
        found, faults = _matrices(path, ((name, shape, None) for name, shape in read_shapes([path]).items()))
        return found, [f"{path.name}: {fault}", *faults]
    from safetensors import SafetensorError, deserialize

    try:
        tensors = deserialize(read_bounded(path, max_bytes))  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        raise ValueError(f"{path.name}: {error!s:.500}") from None
    return _matrices(path, ((key, tuple(tensor["shape"]), tensor) for key, tensor in tensors))


def _matrices(
    path: Path, tensors: Iterable[tuple[str, tuple[int, ...], Mapping[str, Any] | None]]
) -> tuple[Matrices, list[str]]:
    """What named tensors are, and what of them is no matrix; of one that is None, only the shape is known."""
    found: Matrices = {}
    faults: list[str] = []
    keys: dict[str, str] = {}
    for key, shape, tensor in sorted(tensors, key=lambda item: item[0]):
        values = None if tensor is None else _as_float32(tensor)
        if values is None:
            if tensor is not None:
                faults.append(f"{key} holds {tensor['dtype']}, not floating-point numbers")
            # Takes no memory, whatever the shape.
            values = np.broadcast_to(np.float32(0), shape)
        elif not np.isfinite(values).all():
            faults.append(f"{key} holds values that are not finite")
        values = values.T if path.name == MLX_WEIGHTS else values
        matrix = parse_parameter(key, values.shape)
        if matrix is None:
            faults.append(f"{key} is no LoRA matrix of a layer")
        elif matrix.name in keys:
            faults.append(f"{keys[matrix.name]} and {key} are the same matrix")
        else:
            keys[matrix.name] = key
            found[matrix] = values
    return found, [f"{path.name}: {fault:.300}" for fault in faults]


def _as_float32(tensor: Mapping[str, Any]) -> NDArray[Any] | None:
    """A tensor of a safetensors file; None when it does not hold floating-point numbers."""
    if tensor["dtype"] == "BF16":
        # The upper half of a float32, and a type that NumPy does not have.
        bits = np.frombuffer(tensor["data"], "<u2").astype(np.uint32) << 16
        return bits.view(np.float32).reshape(tensor["shape"])
    if tensor["dtype"] not in FLOATS:
        return None
    return np.frombuffer(tensor["data"], FLOATS[tensor["dtype"]]).astype(np.float32).reshape(tensor["shape"])


def _differences(peft: Matrices, mlx: Matrices) -> list[str]:
    differing = {
        matrix.name
        for matrix in peft.keys() | mlx.keys()
        if matrix not in peft or matrix not in mlx or peft[matrix].tobytes() != mlx[matrix].tobytes()
    }
    if not differing:
        return []
    return [
        f"{WEIGHTS} and {MLX_WEIGHTS} differ in {len(differing)} matrices, such as {min(differing)}: delete "
        f"{MLX_WEIGHTS} to use what PEFT loads, {WEIGHTS} to use what mlx-lm loads"
    ]


def _mismatches(found: Matrices, expected: Sequence[LoraParameter], lora: LoraConfig) -> list[str]:
    """What of the matrices that are there is not as expected; modules of which none is are told by name, once."""
    there = {matrix.name: matrix for matrix in found}
    wanted = {matrix.name: matrix for matrix in expected}
    theirs, ours = {matrix.module for matrix in found}, {matrix.module for matrix in expected}
    both = theirs & ours
    faults = [] if theirs == ours else [_other_targets(theirs, ours, lora)]
    faults += [f"{name} is missing" for name in wanted if name not in there and wanted[name].module in both]
    faults += [
        f"{name} is not part of this model's adapter"
        for name in there
        if name not in wanted and there[name].module in both
    ]
    faults += [
        f"{name} has shape {list(there[name].shape)}, expected {list(matrix.shape)}"
        for name, matrix in wanted.items()
        if name in there and there[name].shape != matrix.shape
    ]
    return faults


def _other_targets(theirs: set[str], ours: set[str], lora: LoraConfig) -> str:
    if not theirs:
        return "it holds no LoRA matrix of a layer"
    surplus, lacking = ", ".join(sorted(theirs - ours)), ", ".join(sorted(ours - theirs))
    if surplus and lora.targets == "all-linear":
        return f"it adapts {surplus}, and this model has no such linear module in its layers"
    what = [f"it adapts {surplus} too"] if surplus else []
    what += [f"it does not adapt {lacking}"] if lacking else []
    asked = lora.targets if isinstance(lora.targets, str) else f"[{', '.join(lora.targets)}]"
    targets = ", ".join(sorted({module.rpartition(".")[2] for module in theirs}))
    return f"lora.targets is {asked}, but {', and '.join(what)}: set lora.targets to [{targets}]"


class _BaseOfAnAdapter(pydantic.BaseModel):
    reference: str
    sha256: str


class _Metadata(pydantic.BaseModel):
    base: _BaseOfAnAdapter


def _base_faults(folder: Path, base: BaseModel) -> list[str]:
    metadata = folder / METADATA
    if not metadata.is_file():
        log.warning("%s has no %s, so it cannot be told which base it was trained on", folder, METADATA)
        return []
    try:
        trained_on = _Metadata.model_validate(parse_json(read_bounded(metadata))).base
    except (OSError, ValueError):  # pydantic's ValidationError is one
        return [f"{METADATA} does not name a base with its sha256"]
    if trained_on.sha256 == base.sha256:
        return []
    return [
        f"it was trained on {trained_on.reference:.200} (sha256 {trained_on.sha256[:12]}), model.base is "
        f"{base.reference} (sha256 {base.sha256[:12]})"
    ]
