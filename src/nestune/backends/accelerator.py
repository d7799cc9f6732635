"""One training at a time on an accelerator, by a lock of the operating system."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from nestune.locks import Owner, held, lock_of

log = logging.getLogger(__name__)


@contextmanager
def accelerator_held(
    name: str | None,
    command: str,
    when_busy: Literal["wait", "refuse", "share"],
    check: Callable[[], None],
    waiting: Callable[[Owner | None], None] | None = None,
) -> Iterator[None]:
    """Have the accelerator of this name alone while the block runs; None, and `share`, ask for nothing.

    Another training that has it is waited for, `check` being called meanwhile, which may raise to end the waiting; or
    raises BusyError with its process id, where `when_busy` is `refuse`. `waiting` is called as by `held`; without it,
    the log tells once of what is waited for.
    """
    if name is None or when_busy == "share":
        yield
        return
    told: set[str] = set()

    def checking(owner: Owner | None) -> None:
        if owner is not None:
            check()
        if waiting is not None:
            waiting(owner)
        elif owner is not None and owner.token not in told:
            told.add(owner.token)
            log.warning("%s is in use by %s; waiting for it to end (training.when_busy)", name, owner)

    remedy = "Wait for it to end, or set training.when_busy to wait, or to share"
    with held(lock_of(name), command, name, checking if when_busy == "wait" else None, remedy):
        yield
