"""Steps of `prefect deploy`, by the names that `prefect.yaml` calls them."""

from pathlib import Path
from typing import Any

from nestune.config import load_config


def read_config(path: str) -> dict[str, Any]:
    """The configuration in a YAML file, checked, as the parameter `config` of the flow; raises ConfigError."""
    return {"config": load_config(Path(path)).model_dump(mode="json")}
