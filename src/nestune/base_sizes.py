"""Whether the sizes in a base's config.json can be those of its weights, told from the headers of their files alone.

A model is built as its configuration says before any weight is read into it, so that one huge number there is enough
to use up all memory, or to build layers for ever.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nestune.foreign_files import kind_of

Shapes = Mapping[str, tuple[int, ...]]

# By the last key: what is as wide as some weight is, what there is one of in each layer, and what counts tokens.
WIDTH = re.compile(
    r"((^|_)(vocab|hidden|intermediate|ffn(_hidden)?|feed_?forward|inner|embedding|projection)_sizes?$)"
    r"|(^([dn]_)?(model|ff|embd|embed|inner|kv|state|head|dim)$)|_(dim|rank)s?$|heads?$|experts$"
)
LAYERS = re.compile(r"^(num_(\w+_)?layers?|n_layers?|\w*coder_layers|depth)$")
POSITIONS = re.compile(
    r"position_embeddings$|^n_(positions|ctx)$|max_(seq|sequence|position)(_len|_length|s)?$|^seq_length$"
)
LEARNED_POSITIONS = re.compile(r"wpe|embed_positions|position_embedding")
# Sixteen million tokens are more than any model reads, and no size at all comes near 2^40.
MOST_POSITIONS = 2**24
MOST = 2**40
# A packed weight holds up to this many in one of the numbers that its header counts.
PACKED = 32
SHOWN_FAULTS = 10


def read_shapes(files: Sequence[Path]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor in safetensors files, by name; raises ValueError when one is broken."""
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        kind = kind_of(path)
        if kind is not None:
            raise ValueError(f"{path} is {kind}, not a file")
        try:
            with safe_open(path, framework="numpy") as file:
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is no safetensors file: {error!s:.200}") from None
    return shapes


def size_faults(config: Mapping[str, Any], shapes: Shapes) -> list[str]:
    """The sizes in a configuration that are larger than its weights can be; at most ten, a line each."""
    packed = any(
        {**_block(config, "text_config"), **config}.get(key) for key in ("quantization", "quantization_config")
    )
    widest = max((size for shape in shapes.values() for size in shape), default=0) * (PACKED if packed else 1)
    learned = [max(shape, default=0) for name, shape in shapes.items() if LEARNED_POSITIONS.search(name)]
    positions = max(learned) if learned else MOST_POSITIONS
    faults = []
    for where, key, value in _numbers(config):
        if LAYERS.search(key) and value > len(shapes):
            faults.append(f"{where} is {value:.6g}, and there are only {len(shapes)} weights")
        elif WIDTH.search(key) and value > widest:
            faults.append(f"{where} is {value:.6g}, and the widest weight has {widest}")
        elif POSITIONS.search(key) and value > positions:
            faults.append(f"{where} is {value:.6g}, and at most {positions} can be")
        elif isinstance(value, int) and abs(value) > MOST:
            faults.append(f"{where} is {value}, which is no size of a model")
    return faults[:SHOWN_FAULTS]


def _block(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    block = config.get(key)
    return block if isinstance(block, Mapping) else {}


def _numbers(value: Any, where: str = "", key: str = "") -> Iterator[tuple[str, str, int | float]]:
    """Every number within: its full key, its last key, and itself. A number in a list has the list's key."""
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield from _numbers(part, f"{where}.{name:.60}" if where else f"{name:.60}", name)
    elif isinstance(value, list):
        for part in value:
            yield from _numbers(part, where, key)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield where, key, value
