"""Locks of the operating system: held by one process at a time, and never by one that has died.

The kernel lets go of a lock when its process ends, however it ends; nothing expires, and no server is asked.
"""

import fcntl
import json
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from nestune.errors import BusyError
from nestune.files import writing

# Whoever only looks at a lock holds it for a moment.
PATIENCE_S = 0.5
ASK_EVERY_S = 0.05


@dataclass(frozen=True)
class Owner:
    """The process that holds a lock: what it runs, since when (ISO 8601); `token` is another one for each time."""

    pid: int
    host: str
    command: str
    since: str
    token: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} ({self.command}, since {self.since})"


LOCKS = "NESTUNE_LOCKS"
UNKNOWN = Owner(0, "this machine", "it has not said what", "just now", "")


@contextmanager
def held(
    path: Path, command: str, what: str, waiting: Callable[[Owner | None], None] | None = None, remedy: str = ""
) -> Iterator[Owner]:
    """Hold a lock while the block runs; `what` it protects is for the message.

    While another process has it, `waiting` is called again and again with its owner, and once the wait is over with
    None. Without `waiting`, raises BusyError, with the remedy. Raises StorageError where the lock's file cannot be
    written.
    """
    handle, waited = _acquire(path, what, waiting, remedy)
    try:
        if waiting is not None and waited:
            waiting(None)
        since = datetime.now(UTC).isoformat(timespec="seconds")
        owner = Owner(os.getpid(), socket.gethostname(), command, since, uuid.uuid4().hex)
        with writing(path):
            os.ftruncate(handle, 0)
            os.pwrite(handle, json.dumps(asdict(owner)).encode(), 0)
        yield owner
    finally:
        os.close(handle)


def lock_of(what: str) -> Path:
    """The lock's file of what no run's folder holds; the host is part of its name, as home folders may be on a network.

    It lies in NESTUNE_LOCKS, a folder that all who share such a thing can write to; by default every user has one.
    """
    folder = os.environ.get(LOCKS) or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nestune"
    return Path(folder) / f"{socket.gethostname()}-{what}.lock"


def owner_of(path: Path) -> Owner | None:
    """The process that holds a lock now; None when none does."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except BlockingIOError:
        return _read(path)
    finally:
        os.close(handle)


def _acquire(path: Path, what: str, waiting: Callable[[Owner | None], None] | None, remedy: str) -> tuple[int, bool]:
    """An open file that holds the lock, and whether an owner was waited for."""
    give_up_at, waited = time.monotonic() + PATIENCE_S, False
    while (handle := _try(path)) is None:
        owner = owner_of(path)
        if owner is not None and time.monotonic() > give_up_at:
            if waiting is None:
                raise BusyError(f"{what} is in use by {owner}. {remedy or 'Wait for it to end'}.")
            waiting(owner)
            waited = True
        time.sleep(ASK_EVERY_S)
    return handle, waited


def _try(path: Path) -> int | None:
    """An open file that holds the lock; None while another process has it, or deletes it just now."""
    # Whoever had it may delete file and folder at any moment: before it is opened, locked or looked at.
    with writing(path), suppress(FileNotFoundError):
        _make(path.parent)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(handle), path.stat()):
                return handle
        except BlockingIOError:
            pass
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
    return None


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        # Also raised for a folder that is deleted at the same time.
        if folder.exists() and not folder.is_dir():
            raise


def _read(path: Path) -> Owner:
    try:
        return Owner(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return UNKNOWN
