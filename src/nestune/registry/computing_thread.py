"""The one thread in which a served model computes, whichever threads ask it."""

import weakref
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeVar

T = TypeVar("T")
Calls = SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None]


class ComputingThread:
    """Runs calls one after the other, in the order in which they come, in a thread of its own.

    No backend takes two callers at once, and MLX computes only in the thread in which a model was loaded. The thread
    ends with the last reference to this object. When the process ends it is left as it is: MLX must not be torn down
    while Python is, as happens in the threads of a ThreadPoolExecutor.
    """

    def __init__(self) -> None:
        self._calls: Calls = SimpleQueue()
        Thread(target=_work, args=(self._calls,), name="computing", daemon=True).start()
        weakref.finalize(self, self._calls.put, None).atexit = False

    def run(self, call: Callable[[], T]) -> T:
        """What the call returns, or raises, once those before it are done."""
        outcome: Future[T] = Future()
        self._calls.put((call, outcome))
        try:
            return outcome.result()
        finally:
            del outcome  # an error that it holds holds this frame, and with it the thread


def _work(calls: Calls) -> None:
    while (next_call := calls.get()) is not None:
        call, outcome = next_call
        try:
            outcome.set_result(call())
        except BaseException as error:  # it is the caller's
            outcome.set_exception(error)
        del next_call, call, outcome  # and what they hold
