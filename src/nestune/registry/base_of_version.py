"""The base that a registered adapter was trained on, found again where the version is served."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nestune.base_model import BaseModel, resolve_base
from nestune.config import ModelConfig
from nestune.errors import ConfigError
from nestune.foreign_files import folder_at

PLACE = "NESTUNE_BASE"
REMEDY = (
    f"Set {PLACE} to the folder of the base it was trained on, or to one that holds it, or start where that path leads "
    "to it."
)


def find_base(settings: Mapping[str, Any]) -> BaseModel:
    """The base with the content hash that a version names.

    It is looked for under the reference that the adapter was trained with, a folder or a hub id; where the environment
    variable NESTUNE_BASE is set, only in that folder and those in it. Raises ConfigError when it is not there.
    """
    place, others = os.environ.get(PLACE), []
    revision = None if place else settings["revision"]
    for reference in _bases_at(place) if place else [settings["base"]]:
        try:
            base = resolve_base(ModelConfig(base=reference, revision=revision))
        except ConfigError as error:
            others.append(str(error))
            continue
        if base.sha256 == settings["base_sha256"]:
            return base
        others.append(f"{reference} is another model (sha256 {base.sha256[:12]}).")
    raise ConfigError(
        f"the base of this adapter is not here: it was trained on {settings['base']} (sha256 "
        f"{settings['base_sha256'][:12]}). {' '.join(others)} {REMEDY}"
    )


def _bases_at(place: str) -> list[str]:
    """A folder with a base, those in a folder of bases, or what else is named."""
    folder = folder_at(place)
    if folder is None or (folder / "config.json").exists():
        return [place]
    return sorted(str(config.parent) for config in Path(folder).glob("*/config.json")) or [place]
