"""The base model of a run: where its files are, and the content hash by which adapters name it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from nestune.base_sizes import read_shapes, size_faults
from nestune.config import ModelConfig
from nestune.errors import ConfigError
from nestune.files import sha256_files
from nestune.foreign_files import folder_at, parse_json, read_bounded

# Blocks of a configuration that are looked into.
BLOCKS = ("text_config", "quantization", "quantization_config")


@dataclass(frozen=True)
class BaseModel:
    """A base model on this disk.

    `reference` is what the configuration says (a folder or a hub id), `sha256` the hash over its
    configuration and weight files: the identity that an adapter is bound to. `positions` is the most tokens
    that it reads, `vocabulary` how many different ones it knows; None where its configuration does not say.
    """

    reference: str
    revision: str | None
    folder: Path
    sha256: str
    positions: int | None
    vocabulary: int | None = None

    def row_limit(self, max_seq_length: int) -> int:
        """The tokens of a record that are kept: as configured, but no more than the base reads."""
        return min(max_seq_length, self.positions or max_seq_length)


def resolve_base(model: ModelConfig) -> BaseModel:
    """Find the base model's folder, downloading a hub model once, and hash it.

    Raises ConfigError when it does not exist, holds no config.json or no *.safetensors, or when these are broken, ask
    for code of their own, or are of sizes that do not go together.
    """
    folder = folder_at(model.base) or _download(model.base, model.revision)
    weights = sorted(folder.glob("*.safetensors"))
    config = folder / "config.json"
    missing = [what for what, there in (("config.json", config.is_file()), ("*.safetensors", weights)) if not there]
    if missing:
        raise ConfigError(
            f"model.base: {folder} holds no {' and no '.join(missing)}. "
            "Name a folder in Hugging Face format, or a hub id such as Qwen/Qwen2.5-0.5B-Instruct."
        )
    if (folder / "adapter_config.json").exists():
        # Transformers would load what that file names in place of the weights beside it.
        raise ConfigError(
            f"model.base: {folder} holds an adapter_config.json beside a model. Take it away, and name an adapter as "
            "model.adapter."
        )
    stamps = tuple((str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in [config, *weights])
    positions, vocabulary = _check_once(folder, stamps)
    sha256 = _hash_once(folder, stamps)
    return BaseModel(model.base, model.revision, folder, sha256, positions, vocabulary)


def _asked_code(config: Mapping[str, Any]) -> Iterator[str]:
    """What of a configuration names code: a file beside it (mlx-lm), or a kernel on the hub (Transformers)."""
    for key, value in config.items():
        if key == "model_file" or (key.endswith("_implementation") and "/" in str(value)):
            yield f"{key:.60} {value!r:.80}"
        elif isinstance(value, dict):
            yield from _asked_code(value)


def _check_index(folder: Path, weights: Sequence[Path]) -> None:
    """Raise ValueError when the index of the weights names files that do not lie beside it: only those are hashed."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return
    content = parse_json(read_bounded(index))
    files = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(files, dict):
        raise ValueError(f"{index} holds no weight_map")
    others = sorted({str(name) for name in files.values()} - {path.name for path in weights})
    if others:
        raise ValueError(f"{index} names files that are not beside it, such as {others[0]!r:.80}")


def code_of_its_own(folder: Path, config: Mapping[str, Any], library: str) -> ConfigError:
    """The error that a base is not loaded because it brings its own code, which a library would have to run."""
    return ConfigError(
        f"model.base: {folder} brings code of its own for its model_type {config.get('model_type')!r:.80} (auto_map), "
        f"which nestune does not run, and {library} has none for it. Take a base whose model_type {library} knows."
    )


@contextmanager
def a_base_that_computes(base: BaseModel) -> Iterator[None]:
    """Turn what a first computation raises into a ConfigError: sizes that load need not go together."""
    try:
        yield
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0].rstrip(".?") or type(error).__name__
        raise ConfigError(
            f"model.base: the model in {base.folder} loads, but computes nothing: {first_line:.500}. Take another copy."
        ) from error


def end_tokens(said: Any) -> list[int]:
    """The tokens that end a text, as a configuration says: one, several, or none. Raises ConfigError otherwise."""
    ends = said if isinstance(said, list) else [] if said is None else [said]
    wrong = [end for end in ends if not isinstance(end, int) or isinstance(end, bool)]
    if wrong:
        raise ConfigError(f"model.base: its eos_token_id is {said!r:.80}, not one token or a list. Take another copy.")
    return ends


@cache
def _check_once(folder: Path, stamps: tuple[tuple[str, int, int], ...]) -> tuple[int | None, int | None]:
    """The positions and the vocabulary of a base whose files can be trusted with memory; reads no weights."""
    config, *weights = (Path(path) for path, _, _ in stamps)
    remedy = "Take another copy of the base."
    try:
        content = parse_json(read_bounded(config))
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.base: {config} is no model configuration: {error}. {remedy}") from None
    blocks = [content] if isinstance(content, dict) else []
    blocks += [content[key] for key in BLOCKS if content.get(key) is not None] if blocks else []
    if not blocks or not all(isinstance(block, dict) for block in blocks):
        raise ConfigError(f"model.base: {config} is no model configuration. {remedy}")
    code = sorted(_asked_code(content))
    if code:
        raise ConfigError(
            f"model.base: {config} asks for code of its own ({', '.join(code)}), which nestune does not run. "
            "Take a base that Transformers or mlx-lm knows."
        )
    try:
        _check_index(folder, weights)
        faults = size_faults(content, read_shapes(weights))
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.base: {error}. {remedy}") from None
    if faults:
        raise ConfigError(f"model.base: {config} does not go with its weights: {'; '.join(faults)}. {remedy}")
    # Models of text and pictures keep it one block deeper.
    all_of_text = {**(content.get("text_config") or {}), **content}
    found = (all_of_text.get(key) for key in ("max_position_embeddings", "vocab_size"))
    positions, vocabulary = (value if isinstance(value, int) and value > 0 else None for value in found)
    return positions, vocabulary


@cache
def _hash_once(folder: Path, stamps: tuple[tuple[str, int, int], ...]) -> str:
    """Hashing gigabytes takes a while; a file that has not changed is hashed once a process."""
    return sha256_files(folder, [Path(path) for path, _, _ in stamps])


def _download(base: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    remedy = "Name an existing folder, or the id of a hub model that this machine can reach."
    try:
        return Path(snapshot_download(base, revision=revision, allow_patterns=["*.json", "*.safetensors", "*.jinja"]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"model.base is {base!r:.200}: no such folder; the hub answers: {first_line:.300}. {remedy}"
        ) from None
