"""Trainable matrices and the names that they have on every backend."""

import re
from dataclasses import dataclass
from typing import Literal

LORA_NAME = re.compile(
    r"(?:^|\.)(?:layers|h|blocks)\.(?P<layer>\d+)\.(?P<module>.+?)\."
    r"(?:lora|adapter)_(?P<side>[ab])(?:\.default)?(?:\.weight)?$",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class LoraParameter:
    """One trainable matrix.

    `layer` counts from 0 at the embeddings; `module` is e.g. `self_attn.q_proj`; `side` tells A (rank x inputs)
    from B (outputs x rank); `shape` is (rows, columns) in that orientation.
    """

    layer: int
    module: str
    side: Literal["a", "b"]
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """The canonical name, e.g. `layers.3.self_attn.q_proj.lora_a`."""
        return f"layers.{self.layer}.{self.module}.lora_{self.side}"


def parse_parameter(name: str, shape: tuple[int, ...]) -> LoraParameter | None:
    """The LoRA matrix that a framework's parameter name stands for; None when it is not one of a layer's.

    Upper and lower case are alike, and `adapter_a` means `lora_a`.
    """
    found = LORA_NAME.search(name)
    if found is None:
        return None
    return LoraParameter(int(found["layer"]), found["module"], "a" if found["side"] in "aA" else "b", shape)
