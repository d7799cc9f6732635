"""Which linear modules get an adapter, the same on every backend; PEFT's rule (github.com/huggingface/peft)."""

from collections.abc import Mapping

from nestune.config import LoraConfig
from nestune.errors import ConfigError

HEADS = ("lm_head", "embed_out")


def chosen_modules(lora: LoraConfig, linear: Mapping[str, int]) -> list[str]:
    """The paths of the modules that get an adapter: all linear ones but the head, or those that end as a target does.

    linear: path of each linear module of the model -> the highest rank that its weight can have. Raises ConfigError
    with every target that matches none, or when lora.rank is higher than that of every chosen module.
    """
    targets = None if isinstance(lora.targets, str) else lora.targets
    of_layers = [path for path in linear if path.rpartition(".")[2] not in HEADS]
    idle = [target for target in targets or () if not any(_is(path, target) for path in linear)]
    if idle:
        names = ", ".join(sorted({path.rpartition(".")[2] for path in of_layers}))
        raise ConfigError(
            f"lora.targets is {list(targets or ())!r}: no linear module is called {', '.join(idle)}. "
            f"Linear modules here: {names}."
        )
    chosen = of_layers if targets is None else [path for path in linear if any(_is(path, name) for name in targets)]
    highest = max((linear[path] for path in chosen), default=lora.rank)
    if lora.rank > highest:
        raise ConfigError(
            f"lora.rank is {lora.rank}, and no weight that gets an adapter has a higher rank than {highest}. "
            f"Set it to {highest} or less; 4 to 64 is usual."
        )
    return chosen


def _is(path: str, target: str) -> bool:
    return path == target or path.endswith(f".{target}")
