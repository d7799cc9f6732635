"""The progress of many steps for a person: a bar on a terminal, some plain lines elsewhere."""

import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_LINES = 10


class ProgressBar:
    """Shows step and time left on standard error; of training, as a `Listener`, also loss, due tiers and tokens/s.

    taken: steps that were taken before.
    """

    def __init__(self, steps: int, text: str = "training", taken: int = 0) -> None:
        self._steps = steps
        self._taken = taken
        self._valid_loss = ""
        self._began = time.monotonic()
        self._console = Console(stderr=True)
        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
        self._bar = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self._bar.add_task(text, total=steps, completed=taken)

    def __enter__(self) -> "ProgressBar":
        self._began = time.monotonic()
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """Print a line that stays, on a terminal or not."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def on_step(self, line: dict[str, Any]) -> None:
        """Show a step of training."""
        due = ",".join(map(str, line["due"])) or "-"
        text = f"loss {line['loss']:.3f}{self._valid_loss} · tiers {due:<5} · {line['tokens_per_s']:,.0f} tokens/s"
        self.show(line["step"], text)

    def on_validation(self, line: dict[str, Any]) -> None:
        """Show the validation loss from now on."""
        self._valid_loss = f" · valid {line['valid_loss']:.3f}"

    def show(self, step: int, text: str) -> None:
        """Move the bar; without a terminal, print a line after every tenth of the steps."""
        self._bar.update(self._task, completed=step, description=text)
        every = max(1, self._steps // PLAIN_LINES)
        if not self._console.is_terminal and step % every == 0:
            left_s = (self._steps - step) * (time.monotonic() - self._began) / (step - self._taken)
            self.say(f"step {step}/{self._steps} · {text} · {left_s:.0f} s left")
