"""LoRA matrices without a model, for the tests of this folder."""

from collections.abc import Iterable, Sequence

import numpy as np

from nestune.tiers.parameters import LoraParameter, split_name

MODULES = ("self_attn.q_proj", "mlp.up_proj")
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def parameters(
    layers: int | Iterable[int], modules: Sequence[str] = MODULES, rank: int = 8, width: int = 5
) -> list[LoraParameter]:
    """A (rank x width) and B (width x rank) of each module of each layer, in a model's order."""
    numbers = range(layers) if isinstance(layers, int) else layers
    shapes = {"a": (rank, width), "b": (width, rank)}
    return [LoraParameter(n, m, side, shapes[side]) for n in numbers for m in modules for side in ("a", "b")]


def layers_of(tier_of: dict[str, int], tier: int) -> set[int]:
    """The layers of which anything is on a tier."""
    return {int(name.split(".")[1]) for name, of in tier_of.items() if of == tier}


def on_tier(tier_of: dict[str, int], tier: int) -> set[str]:
    """The names on a tier."""
    return {name for name, of in tier_of.items() if of == tier}


def times_named(tier_of: dict[str, int], described: Sequence[LoraParameter]) -> set[int]:
    """How often the elements of all matrices are named; {1} when each is on exactly one tier."""
    counts = {p.name: np.zeros(p.shape, int) for p in described}
    for name in tier_of:
        matrix, ranks = split_name(name)
        if ranks is None:
            counts[matrix] += 1
        elif matrix.endswith("lora_a"):
            counts[matrix][ranks.start : ranks.stop] += 1
        else:
            counts[matrix][:, ranks.start : ranks.stop] += 1
    return {int(count) for of in counts.values() for count in of.flat}
