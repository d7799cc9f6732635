"""The base model of a run: where its files are, and the content hash by which adapters name it."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from nestune.config import ModelConfig
from nestune.errors import ConfigError
from nestune.files import sha256_files


@dataclass(frozen=True)
class BaseModel:
    """A base model on this disk.

    `reference` is what the configuration says (a folder or a hub id), `sha256` the hash over its
    configuration and weight files: the identity that an adapter is bound to. `positions` is the most tokens
    that it reads, None where its configuration does not say.
    """

    reference: str
    revision: str | None
    folder: Path
    sha256: str
    positions: int | None

    def row_limit(self, max_seq_length: int) -> int:
        """The tokens of a record that are kept: as configured, but no more than the base reads."""
        return min(max_seq_length, self.positions or max_seq_length)


def resolve_base(model: ModelConfig) -> BaseModel:
    """Find the base model's folder, downloading a hub model once, and hash it.

    Raises ConfigError when it does not exist, or holds no config.json or no *.safetensors.
    """
    folder = Path(model.base).expanduser()
    if not folder.is_dir():
        folder = _download(model.base, model.revision)
    weights = sorted(folder.glob("*.safetensors"))
    config = folder / "config.json"
    missing = [what for what, there in (("config.json", config.is_file()), ("*.safetensors", weights)) if not there]
    if missing:
        raise ConfigError(
            f"model.base: {folder} holds no {' and no '.join(missing)}. "
            "Name a folder in Hugging Face format, or a hub id such as Qwen/Qwen2.5-0.5B-Instruct."
        )
    stamps = tuple((str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in [config, *weights])
    return BaseModel(model.base, model.revision, folder, _hash_once(folder, stamps), _positions(config))


def _positions(config: Path) -> int | None:
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
        # Models of text and pictures keep it one block deeper.
        positions = {**content.get("text_config", {}), **content}.get("max_position_embeddings")
    except (ValueError, AttributeError, TypeError):
        raise ConfigError(f"model.base: {config} is no model configuration. Take another copy of the base.") from None
    return positions if isinstance(positions, int) else None


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
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"model.base is {base!r}: no such folder; the hub answers: {first_line}. {remedy}") from None
