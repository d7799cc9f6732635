"""What a stage returns, whichever it is."""

from typing import Any, Protocol


class Result(Protocol):
    """What every stage returns."""

    def as_dict(self) -> dict[str, Any]:
        """The result as JSON."""
        ...

    def summary(self) -> list[str]:
        """The result for a person, a line each."""
        ...
