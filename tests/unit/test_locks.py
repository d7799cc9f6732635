"""A lock has one owner at a time, tells who that is, and outlives nobody."""

import fcntl
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nestune.errors import BusyError, StorageError
from nestune.locks import Owner, held, owner_of

HOLD = """
import sys
from pathlib import Path
from nestune.locks import held
with held(Path(sys.argv[1]), "nestune test", "the lock"):
    print("held", flush=True)
    sys.stdin.read()
"""
# Each takes the lock again and again, and leaves as `owned` does: the lock's file and its folder go.
RACE = """
import os, sys, time
from contextlib import suppress
from pathlib import Path
from nestune.locks import held
lock, witness = Path(sys.argv[1]), Path(sys.argv[2])
for turn in range(8):
    with held(lock, "race", "the lock", waiting=lambda owner: None):
        os.close(os.open(witness, os.O_CREAT | os.O_EXCL))
        time.sleep(0.002)
        witness.unlink()
        if turn % 2:
            lock.unlink()
            with suppress(OSError):
                lock.parent.rmdir()
"""


@contextmanager
def another_owner(path: Path) -> Iterator["subprocess.Popen[str]"]:
    """Another process that holds the lock until it is killed, or the block ends."""
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def take(path: Path, **options: object) -> Owner:
    with held(path, "nestune test", "the lock", **options) as owner:  # type: ignore[arg-type]
        assert owner_of(path) == owner
    return owner


def test_a_second_process_is_refused_with_the_process_id_of_the_first(tmp_path: Path) -> None:
    path = tmp_path / "new" / "lock"
    with another_owner(path) as other:
        owner = owner_of(path)
        assert owner is not None
        assert (owner.pid, owner.command) == (other.pid, "nestune test")
        with pytest.raises(BusyError, match=rf"the lock is in use by process {other.pid} on .+ Ask it\."):
            take(path, remedy="Ask it")


def test_the_lock_of_a_killed_process_is_free_at_once(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with another_owner(path) as other:
        other.kill()
        other.wait()
        began = time.monotonic()
        assert owner_of(path) is None
        take(path)
        assert time.monotonic() - began < 30


def test_a_process_that_the_owner_started_does_not_keep_its_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with held(path, "nestune test", "the lock"):
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False)
    try:
        # Its copy of the lock closes while it starts.
        time.sleep(0.5)
        assert owner_of(path) is None
    finally:
        child.kill()
        child.communicate()


def test_each_owner_has_another_token_and_none_is_left_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert owner_of(path) is None
    tokens = {take(path).token for _ in range(3)}
    assert len(tokens) == 3
    assert owner_of(path) is None


def test_whoever_waits_is_told_of_the_owner_and_may_end_the_waiting(tmp_path: Path) -> None:
    path, told = tmp_path / "lock", []

    def waiting(owner: Owner) -> None:
        told.append(owner.pid)
        if len(told) == 3:
            raise InterruptedError

    with another_owner(path) as other:
        with pytest.raises(InterruptedError):
            take(path, waiting=waiting)
        assert told == [other.pid] * 3


def test_whoever_waits_has_the_lock_once_its_owner_ends(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with another_owner(path) as other:
        owner = take(path, waiting=lambda _: other.kill())
    assert owner.pid != other.pid


def test_asking_who_owns_a_lock_keeps_nobody_from_taking_it(tmp_path: Path) -> None:
    path, done = tmp_path / "lock", threading.Event()
    take(path)

    def ask() -> None:
        while not done.is_set():
            owner_of(path)

    askers = [threading.Thread(target=ask) for _ in range(3)]
    for asker in askers:
        asker.start()
    try:
        for _ in range(10):
            assert take(path).pid == os.getpid()
    finally:
        done.set()
        for asker in askers:
            asker.join()


def test_all_who_ask_at_once_see_the_owner(tmp_path: Path) -> None:
    path, seen = tmp_path / "lock", []
    with another_owner(path) as other:
        askers = [threading.Thread(target=lambda: seen.extend(owner_of(path) for _ in range(200))) for _ in range(4)]
        for asker in askers:
            asker.start()
        for asker in askers:
            asker.join()
        assert [owner.pid if owner else None for owner in seen] == [other.pid] * 800


def test_all_who_ask_at_once_see_that_a_lock_is_free(tmp_path: Path) -> None:
    path, seen = tmp_path / "lock", []
    take(path)
    askers = [threading.Thread(target=lambda: seen.extend(owner_of(path) for _ in range(500))) for _ in range(4)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    assert seen == [None] * 2000


def test_a_lock_whose_file_is_replaced_while_it_is_taken_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, flock, others = tmp_path / "lock", fcntl.flock, []

    def late(handle: int, how: int) -> None:
        if not others:
            path.unlink()
            others.append(another_owner(path))
            others.append(others[0].__enter__())
        flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", late)
    try:
        with pytest.raises(BusyError) as refused:
            take(path)
    finally:
        others[0].__exit__(None, None, None)
    assert f"process {others[1].pid} on" in str(refused.value)


def test_of_twenty_processes_never_two_have_the_lock_although_its_file_and_folder_go(tmp_path: Path) -> None:
    lock, witness = tmp_path / "run" / ".lock", tmp_path / "witness"
    command = [sys.executable, "-c", RACE, str(lock), str(witness)]
    racers = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(20)]
    faults = [racer.communicate(timeout=120)[1] for racer in racers]
    assert [racer.returncode for racer in racers] == [0] * 20, "".join(faults)[-2000:]


def test_a_lock_that_cannot_be_written_says_so_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"cannot write .+lock: .+ See that"):
        take(tmp_path / "file" / "lock")
