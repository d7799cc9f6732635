"""Trainable matrices, the names that they have on every backend, and the parts of them that a tier may hold."""

import re
from dataclasses import dataclass
from typing import Literal

LORA_NAME = re.compile(
    r"(?:^|\.)(?:layers?|h|blocks?)\.(?P<layer>\d+)\.(?P<module>.+?)\."
    r"(?:lora|adapter)_(?P<side>[ab])(?:\.(?!bias$)[^.]+)?(?:\.weight)?$",
    re.IGNORECASE,
)
# As a layer computes them; frameworks list them in orders of their own.
IN_A_LAYER = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj")
RANKS = re.compile(r"(?P<matrix>.+)\[(?P<start>[0-9]{1,9}):(?P<stop>[0-9]{1,9})\]")


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

    @property
    def rank_axis(self) -> int:
        """The axis that counts ranks: 0 (rows) of A, 1 (columns) of B."""
        return 0 if self.side == "a" else 1

    @property
    def rank(self) -> int:
        """How many ranks the matrix has."""
        return self.shape[self.rank_axis]


def parse_parameter(name: str, shape: tuple[int, ...]) -> LoraParameter | None:
    """The LoRA matrix that a framework's parameter name stands for; None when it is not one of a layer's.

    Upper and lower case are alike, `adapter_a` means `lora_a`, and PEFT's name of the adapter may stand behind it.
    """
    found = LORA_NAME.search(name)
    if found is None:
        return None
    return LoraParameter(int(found["layer"]), found["module"], "a" if found["side"] in "aA" else "b", shape)


def model_order(parameter: LoraParameter) -> tuple[int, bool, int, str, str]:
    """A key that sorts parameters the same on every backend: by layer, attention first, modules as they compute."""
    kind = parameter.module.rpartition(".")[2]
    place = IN_A_LAYER.index(kind) if kind in IN_A_LAYER else len(IN_A_LAYER)
    return parameter.layer, "attn" not in parameter.module, place, parameter.module, parameter.side


def name_of_ranks(matrix: str, ranks: range) -> str:
    """The name of some ranks of a matrix, e.g. `layers.3.self_attn.q_proj.lora_a[0:3]` for ranks 0, 1 and 2."""
    return f"{matrix}[{ranks.start}:{ranks.stop}]"


def split_name(name: str) -> tuple[str, range | None]:
    """The matrix that a name of a tier map stands for, and which of its ranks; None: all of it."""
    found = RANKS.fullmatch(name)
    if found is None:
        return name, None
    return found["matrix"], range(int(found["start"]), int(found["stop"]))
