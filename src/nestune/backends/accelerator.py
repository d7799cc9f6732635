"""One training at a time on an accelerator, by a lock of the operating system."""

import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from nestune.locks import Owner, held

# A folder that all who share the accelerator can write to; by default every user has one.
LOCKS = "NESTUNE_LOCKS"

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
    with held(_lock_of(name), command, name, checking if when_busy == "wait" else None, remedy):
        yield


def _lock_of(name: str) -> Path:
    """The lock's file; the host is part of its name, as home folders may be on a network."""
    folder = os.environ.get(LOCKS) or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nestune"
    return Path(folder) / f"{socket.gethostname()}-{name}.lock"
