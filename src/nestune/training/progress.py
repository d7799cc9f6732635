"""The progress of training for a person: a bar on a terminal, some plain lines elsewhere."""

import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_LINES = 10


class ProgressBar:
    """Shows step, loss, due tiers, tokens/s and time left on standard error; a `Listener`."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._valid_loss = ""
        self._began = time.monotonic()
        self._console = Console(stderr=True)
        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
        self._bar = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self._bar.add_task("training", total=steps)

    def __enter__(self) -> "ProgressBar":
        self._began = time.monotonic()
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def on_step(self, line: dict[str, Any]) -> None:
        """Move the bar; without a terminal, print a line after every tenth of the steps."""
        due = ",".join(map(str, line["due"])) or "-"
        text = f"loss {line['loss']:.3f}{self._valid_loss} · tiers {due:<5} · {line['tokens_per_s']:,.0f} tokens/s"
        self._bar.update(self._task, completed=line["step"], description=text)
        every = max(1, self._steps // PLAIN_LINES)
        if not self._console.is_terminal and line["step"] % every == 0:
            left_s = (self._steps - line["step"]) * (time.monotonic() - self._began) / line["step"]
            shown = f"step {line['step']}/{self._steps} · {text} · {left_s:.0f} s left"
            self._console.print(shown, highlight=False, soft_wrap=True)

    def on_validation(self, line: dict[str, Any]) -> None:
        """Show the validation loss from now on."""
        self._valid_loss = f" · valid {line['valid_loss']:.3f}"
