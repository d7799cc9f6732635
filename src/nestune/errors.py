"""The errors a user can meet. Each says what failed, the value seen, what is allowed and what to do."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

SHOWN_FAULTS = 20


class NestuneError(Exception):
    """Something failed that the user can act on; the command line shows it without a traceback."""

    exit_code = 1


class InputError(NestuneError):
    """The user's input is wrong; nothing was written."""

    exit_code = 2


class ConfigError(InputError):
    """The description of the run is wrong. Lists every fault of it at once."""


@dataclass(frozen=True)
class Fault:
    """One thing wrong with one record: where it is, what is wrong, and what to do.

    `line` counts from 1, 0 stands for the file as a whole; `field` is a path such as `messages[1].role`,
    empty for the whole line.
    """

    file: str
    line: int
    field: str
    problem: str
    remedy: str

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}" if self.line else self.file
        field = f" {self.field}:" if self.field else ""
        return f"{where}:{field} {self.problem}. {self.remedy}"

    def as_dict(self) -> dict[str, str | int]:
        """The fault as a JSON object, for reports and `rejected.jsonl`."""
        return asdict(self)


class DataError(InputError):
    """Data that cannot be trained on. Carries every fault; its text shows the first ones."""

    def __init__(self, summary: str, faults: Sequence[Fault] = ()) -> None:
        self.faults = tuple(faults)
        shown = [f"  {fault}" for fault in self.faults[:SHOWN_FAULTS]]
        hidden = len(self.faults) - len(shown)
        if hidden:
            shown.append(f"  ... and {hidden} more")
        super().__init__("\n".join([summary, *shown]))


class RunError(NestuneError):
    """A stage cannot go on: a file of an earlier stage is missing or changed, or training diverged."""


class DivergedError(RunError):
    """Training left the numbers that floats can hold; `seen` says where, e.g. `the loss is nan`."""

    def __init__(self, seen: str) -> None:
        super().__init__(
            f"training diverged: {seen}. Lower the learning rate (training.learning_rate), or add warm-up "
            "(training.warmup_steps)."
        )


class StorageError(RunError):
    """The disk does not take what is to be written: it is full, read-only, or not allowed."""


class BusyError(RunError):
    """Another process is at work on the same run, or on the same accelerator."""


class StoppedError(RunError):
    """The run was asked to stop and has done so; what it had done is kept. No failure, but not the end either."""

    exit_code = 3


class ServiceError(RunError):
    """Something outside, such as the tracking server, does not answer or refuses; a later attempt may succeed."""
