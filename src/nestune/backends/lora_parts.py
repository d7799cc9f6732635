"""Which adapters the LoRA modules of a model compute with: the trained one, a frozen parent's, both or neither."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class LoraParts:
    """What is computed with now; all modules of a model look here."""

    own: bool = True
    with_parent: bool = False

    @contextmanager
    def shown(self, own: bool, with_parent: bool) -> Iterator[None]:
        """Compute with these for a while."""
        before = self.own, self.with_parent
        self.own, self.with_parent = own, with_parent
        try:
            yield
        finally:
            self.own, self.with_parent = before
