"""Fine-tune LoRA adapters on new data without losing what the model knew."""

from typing import TYPE_CHECKING

__all__ = ["TierCallback", "tier_map", "tiered_optimizer"]

if TYPE_CHECKING:
    from nestune.drop_in import TierCallback, tier_map, tiered_optimizer
else:

    def __getattr__(name: str) -> object:
        """What is for other people's loops, imported when it is asked for: it brings PyTorch with it."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from nestune import drop_in

        return getattr(drop_in, name)
