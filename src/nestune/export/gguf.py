"""The merged model as one GGUF file, tokenizer and chat template included, for llama.cpp and what is built on it.

Source of the format: ggml's docs/gguf.md; of names and keys: the package `gguf` of ggml-org.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nestune.base_model import BaseModel
from nestune.data.tokens import load_tokenizer
from nestune.errors import ConfigError
from nestune.export.gguf_tokenizer import add_tokenizer, tokenizer_fault
from nestune.export.job import Job
from nestune.export.merge import Weights
from nestune.export.merged import merged_weights
from nestune.export.tensors import FLOATS, Tensor, cast

if TYPE_CHECKING:
    from gguf import GGUFWriter

FILE = "model.gguf"
# Model type in Hugging Face's config.json -> architecture in GGUF: what llama.cpp and Transformers both read.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
EMBEDDING = "token_embd.weight"
BY_LLAMA_CPP = "Export --to merged, and convert that folder by llama.cpp's convert_hf_to_gguf.py; nothing checks that."


def gguf_faults(base: BaseModel) -> list[str]:
    """Why a base cannot be written as GGUF here; empty when it can."""
    kind = json.loads((base.folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    faults = []
    if kind in ARCHITECTURES:
        config = _settings(base)
        # What Transformers would not read back from the file, so that nothing could be checked.
        only = {
            "rope_type": (config.rope_parameters["rope_type"], "default"),
            "hidden_act": (config.hidden_act, "silu"),
            "attention_bias": (getattr(config, "attention_bias", False), False),
            "mlp_bias": (getattr(config, "mlp_bias", False), False),
        }
        faults += [f"its {key} is {seen}, written is {known}" for key, (seen, known) in only.items() if seen != known]
    else:
        faults.append(f"its model_type is {kind}, written are {', '.join(ARCHITECTURES)}")
    fault = tokenizer_fault(load_tokenizer(base.folder))
    faults += [fault] if fault else []
    return [f"model.base cannot be written as GGUF: {'; '.join(faults)}. {BY_LLAMA_CPP}"] if faults else []


def write_gguf(job: Job, folder: Path) -> list[str]:
    """Write `model.gguf` into an existing folder; returns what the user should know of it.

    Matrices are stored as in the merged model, vectors in float32, as llama.cpp's kernels take them.
    Raises ConfigError when the adapter cannot be merged, or a tensor of the base has no name in GGUF.
    """
    from gguf import GGMLQuantizationType, GGUFWriter

    config = _settings(job.base)
    writer = GGUFWriter(folder / FILE, ARCHITECTURES[config.model_type])
    with merged_weights(job, folder) as weights:
        tensors = _tensors(weights, config)
        embedding = tensors[EMBEDDING]
        _describe(writer, config, job.base, embedding)
        notes = add_tokenizer(writer, load_tokenizer(job.base.folder), rows=embedding.shape[0])
        for name, tensor in tensors.items():
            kind = GGMLQuantizationType[tensor.dtype]
            writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), tensor.nbytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors.values():
            writer.write_tensor_data(np.ascontiguousarray(tensor.read()))
        writer.close()
    window = getattr(config, "sliding_window", None)
    if window:
        notes.append(f"the base attends to the last {window} tokens only; what reads the file attends to all of them.")
    return notes


def _settings(base: BaseModel) -> Any:
    """The base's configuration, with what its config.json leaves to be the default."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(base.folder, trust_remote_code=False, local_files_only=True)


def _describe(writer: "GGUFWriter", config: Any, base: BaseModel, embedding: Tensor) -> None:
    from gguf import LlamaFileType

    head = _head_size(config)
    writer.add_type("model")
    writer.add_name(Path(base.reference).name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(embedding.shape[0])
    types = {"F32": LlamaFileType.ALL_F32, "F16": LlamaFileType.MOSTLY_F16, "BF16": LlamaFileType.MOSTLY_BF16}
    writer.add_file_type(types[embedding.dtype])


def _tensors(weights: Weights, config: Any) -> dict[str, Tensor]:
    """The tensors by their names in GGUF."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    numbers = {name: number for number, name in MODEL_ARCH_NAMES.items()}
    name_of = get_tensor_name_map(numbers[ARCHITECTURES[config.model_type]], config.num_hidden_layers)
    found: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in ((name, tensor) for tensors in weights.values() for name, tensor in tensors.items()):
        if name.endswith("rotary_emb.inv_freq"):
            continue  # old models keep it; it follows from the settings
        written = name_of.get_name(name, try_suffixes=(".weight", ".bias"))
        if written is None:
            unknown.append(name)
        else:
            found[written] = _as_llama_cpp_has_it(name, tensor, config)
    if unknown:
        raise ConfigError(
            f"GGUF has no name for {len(unknown)} tensors of model.base, first {unknown[0]}. {BY_LLAMA_CPP}"
        )
    return found


def _as_llama_cpp_has_it(name: str, tensor: Tensor, config: Any) -> Tensor:
    if len(tensor.shape) == 1:
        return cast(tensor, FLOATS["float32"])
    if ARCHITECTURES[config.model_type] == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
        heads = config.num_attention_heads if name.endswith("q_proj.weight") else config.num_key_value_heads
        return Tensor(tensor.dtype, tensor.shape, lambda: _interleave(tensor.read(), heads))
    return tensor


def _interleave(matrix: NDArray[Any], heads: int) -> NDArray[Any]:
    """The rows of each head in the order 0, n/2, 1, n/2 + 1, ...: Llama's rotation turns neighbours in GGUF.

    In Hugging Face's models it turns row i with row i + n/2.
    """
    rows, columns = matrix.shape
    halves = matrix.reshape(heads, 2, rows // heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


def _head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
