"""Configurations as YAML: read with overrides, checked with all faults at once, and written."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from nestune.config.blocks import RunConfig
from nestune.config.faults import explain
from nestune.errors import ConfigError


def load_config(path: Path, overrides: Sequence[str] = (), name: str | None = None) -> RunConfig:
    """Read a YAML file, apply `block.key=value` overrides (values are YAML), and check everything.

    Raises ConfigError with every fault at once: unknown keys, wrong values, paths that do not exist.
    """
    try:
        raw = _read_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}. Name one with --config.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as YAML in UTF-8: {error}. Mend it there.") from None
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
        raise ConfigError("\n  ".join([f"{source}: {len(faults)} fault(s)", *faults])) from None


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML; loading it gives an equal configuration."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _read_yaml(text: str) -> Any:
    return yaml.load(text, _KeysOnce)


class _KeysOnce(yaml.SafeLoader):
    """YAML in which a key given twice in one mapping is an error; YAML's own rule is that the last wins."""

    def compose_mapping_node(self, anchor: dict[Any, yaml.Node]) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value} is given twice", problem_mark=key.start_mark)
            seen.add(str(key.value))
        return node


def _apply_override(raw: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    keys = path.split(".")
    if not separator or not all(keys):
        raise ConfigError(f"--set {override!r} is not block.key=value, e.g. --set training.steps=20")
    try:
        value = _read_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {path}: the value {text!r} cannot be read as YAML: {error}") from None
    block = raw
    for key in keys[:-1]:
        if block.get(key) is None:
            block[key] = {}
        block = block[key]
        if not isinstance(block, dict):
            raise ConfigError(f"--set {path}: {key} holds a value, not a block")
    block[keys[-1]] = value
