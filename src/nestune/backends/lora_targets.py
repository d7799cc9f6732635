"""Which linear modules get an adapter, the same on every backend; PEFT's rule (github.com/huggingface/peft)."""

from collections.abc import Sequence

from nestune.errors import ConfigError

HEADS = ("lm_head", "embed_out")


def chosen_modules(targets: str | tuple[str, ...], linear: Sequence[str]) -> list[str]:
    """Of the paths of a model's linear modules those that get an adapter: all but the head, or those that end so.

    Raises ConfigError with every target that matches none.
    """
    if isinstance(targets, str):
        return [path for path in linear if path.rpartition(".")[2] not in HEADS]
    idle = [target for target in targets if not any(_is(path, target) for path in linear)]
    if idle:
        names = ", ".join(sorted({path.rpartition(".")[2] for path in linear}))
        raise ConfigError(
            f"lora.targets is {list(targets)!r}: no linear module is called {', '.join(idle)}. "
            f"Linear modules here: {names}."
        )
    return [path for path in linear if any(_is(path, target) for target in targets)]


def _is(path: str, target: str) -> bool:
    return path == target or path.endswith(f".{target}")
