"""Requests to stop: a file that `nestune stop` leaves in the run's folder, and signals."""

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

from nestune.errors import StoppedError
from nestune.locks import owner_of
from nestune.run_state import stop_token
from nestune.runs import RunPaths

Item = TypeVar("Item")
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequests:
    """Whether a run is asked to stop; to be asked wherever it can."""

    def __init__(self, run: RunPaths) -> None:
        self.signal: signal.Signals | None = None
        self._run = run

    @property
    def asked_by(self) -> str | None:
        """Who asked; None while nobody has."""
        if self.signal is not None:
            return self.signal.name
        token = stop_token(self._run)
        if token is None:
            return None
        owner = owner_of(self._run.lock)
        return "nestune stop" if owner is not None and owner.token == token else None

    def check(self) -> None:
        """Raise StoppedError when the run is asked to stop."""
        asked_by = self.asked_by
        if asked_by is not None:
            raise StoppedError(f"stopped on request ({asked_by})")

    def watched(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items as they are; raises StoppedError before the next one when the run is asked to stop."""
        for item in items:
            self.check()
            yield item


@contextmanager
def signals_stop(stop: StopRequests) -> Iterator[None]:
    """Within the block, SIGTERM and SIGINT ask to stop; a second signal that is SIGINT ends at once.

    A signal that was asked by is passed on, after the block, to whoever had it before: a shell, Prefect and the command
    line learn in their own way that the process was ended. Outside of the main thread, signals are left alone; one that
    the process ignores, as what a shell runs in the background ignores Ctrl-C, stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    found: dict[signal.Signals, Any] = {number: signal.getsignal(number) or signal.SIG_DFL for number in SIGNALS}
    before = {number: handler for number, handler in found.items() if handler is not signal.SIG_IGN}

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.signal is not None and number == signal.SIGINT:
            signal.signal(number, before[signal.SIGINT])
            signal.raise_signal(number)
        elif stop.signal is None:
            stop.signal = signal.Signals(number)
            if number == signal.SIGINT:
                # Not print, which may have been interrupted itself.
                os.write(2, b"stopping at the next step; Ctrl-C again ends at once\n")

    for number in before:
        signal.signal(number, ask)
    pass_on = True
    try:
        yield
    except BaseException as error:
        pass_on = isinstance(error, StoppedError)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if pass_on and stop.signal is not None:
            signal.raise_signal(stop.signal)
