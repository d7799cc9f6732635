"""Configurations as YAML: read with overrides, checked with all faults at once, and written."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from nestune.config.blocks import RunConfig
from nestune.config.faults import explain
from nestune.config.fields import hide_secrets
from nestune.config.yaml_text import read_yaml
from nestune.errors import SHOWN_FAULTS, ConfigError
from nestune.foreign_files import read_bounded

# Thousands of paths; a configuration has one or a few.
MAX_BYTES = 2**18
# Keys of an override: of the deepest field there are three.
MAX_KEYS = 8


def load_config(path: Path, overrides: Sequence[str] = (), name: str | None = None) -> RunConfig:
    """Read a YAML file, apply `block.key=value` overrides (values are YAML), and check everything.

    Raises ConfigError with every fault at once: unknown keys, wrong values, paths that do not exist.
    """
    if path.is_dir():
        raise ConfigError(f"{path} is a folder. Name the YAML file of the run with --config.")
    try:
        raw = read_yaml(read_bounded(path, MAX_BYTES).decode("utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}. Name one with --config.") from None
    except ValueError as error:
        told = hide_secrets(str(error))
        raise ConfigError(f"{path} cannot be read as YAML in UTF-8: {told}. Mend it there.") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds {type(raw).__name__}; a configuration is a mapping of blocks such as data:")
    for override in overrides:
        _apply_override(raw, override)
    if name is not None:
        raw["name"] = name
    return parse_config(raw, source=str(path))


def parse_config(raw: Mapping[str, Any], source: str = "the configuration") -> RunConfig:
    """Check a mapping and its paths; raises ConfigError with every fault at once."""
    try:
        return RunConfig.model_validate(raw, context={"check_paths": True})
    except ValidationError as error:
        faults = explain(error, RunConfig)
        shown = faults[:SHOWN_FAULTS] + [f"... and {len(faults) - SHOWN_FAULTS} more"] * (len(faults) > SHOWN_FAULTS)
        raise ConfigError("\n  ".join([f"{source}: {len(faults)} fault(s)", *shown])) from None


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML; loading it gives an equal configuration."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _apply_override(raw: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    keys = path.split(".")
    if not separator or not all(keys) or len(keys) > MAX_KEYS:
        raise ConfigError(f"--set {hide_secrets(override)!r:.80} is not block.key=value, e.g. --set training.steps=20")
    try:
        if len(text) > MAX_BYTES:
            raise ValueError(f"it has {len(text)} characters, and at most {MAX_BYTES} are read")
        value = read_yaml(text)
    except ValueError as error:
        told = hide_secrets(f"the value {text!r:.80} cannot be read as YAML: {error}")
        raise ConfigError(f"--set {path}: {told}. Write it as in a configuration.") from None
    block = raw
    for key in keys[:-1]:
        if block.get(key) is None:
            block[key] = {}
        block = block[key]
        if not isinstance(block, dict):
            raise ConfigError(f"--set {path}: {key} holds a value, not a block")
    block[keys[-1]] = value
