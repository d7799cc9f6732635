"""Runs of `nestune` that kill themselves where they are told to: at an operation on files, or at a call.

    python benchmarks/killable.py torch|mlx

Takes orders from the standard input, one a line: an `Order` as JSON. Answers each with two lines, {"pid": ...} when the
run begins and {"status": ...}, its exit code or minus the signal that ended it, when it has ended. A run is a process
with a process group of its own, forked from this one, which has imported the libraries and done nothing else: imports
are most of what a start takes.

Before an operation on a file of the run's folder (to open it for writing, sync, rename or delete it, or make a folder),
or before a call, the run kills its process group by SIGKILL. `torn`: and first leaves files as a machine
that goes down may leave them: what was written since the last sync of a file is lost from a random place on.
"""

import importlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import datetime, tzinfo
from pathlib import Path
from typing import Any

# What a run imports late; absent ones are not missed.
LIBRARIES = (
    "alembic.command",
    "mlflow.entities",
    "mlflow.store.model_registry.sqlalchemy_store",
    "mlflow.store.model_registry.sqlalchemy_workspace_store",
    "mlflow.store.tracking.sqlalchemy_store",
    "mlflow.store.tracking.sqlalchemy_workspace_store",
    "mlflow.tracking",
    "rich._emoji_codes",
    "rich.progress",
    "safetensors.numpy",
    "sqlalchemy.dialects.sqlite",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.qwen2.tokenization_qwen2",
    "nestune.cli",
    "nestune.stages.train",
)
BACKENDS = {"torch": "nestune.backends.torch_backend", "mlx": "nestune.backends.mlx_backend"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


@dataclass(frozen=True)
class Order:
    """A run to start: arguments of `nestune`, its folder, the file that its output goes to.

    operations: place -> the operation there, counted from 1, before which it dies; the first that is reached counts.
    call, number: before the how manieth call of a function, `module:Class.method`, it dies. note: the file in which it
    notes where it died; or, when it ends by itself, all operations that it came by. clock_s: by how many seconds its
    clock is wrong.
    """

    arguments: tuple[str, ...]
    run: str
    output: str
    note: str
    operations: dict[str, int] = field(default_factory=dict)
    call: str | None = None
    number: int = 0
    torn: int | None = None
    clock_s: float = 0.0


@dataclass(frozen=True)
class Operation:
    """An operation on a file of the run's folder: where in the run, the how manieth there, what, and on which file."""

    place: str
    number: int
    kind: str
    path: str


class Watch:
    """Sees the operations on files of a run's folder, each just before it happens, and kills the run at one."""

    def __init__(self, order: Order) -> None:
        self.seen: list[Operation] = []
        self._order = order
        self._root = Path(order.run).absolute()
        self._place, self._number = "start", 0
        self._dying = False
        # Inode -> the bytes of it that are on the disk.
        self._synced = {stat.st_ino: stat.st_size for stat in map(os.stat, self._files())}

    def install(self) -> None:
        """See what the process does from now on."""
        from nestune.training.checkpoints import Checkpoints

        sys.addaudithook(self._hear)
        sync = os.fsync

        def fsync(handle: int) -> None:
            self._happens("fsync", os.readlink(f"/proc/self/fd/{handle}"))
            sync(handle)
            stat = os.fstat(handle)
            self._synced[stat.st_ino] = stat.st_size

        os.fsync = fsync  # type: ignore[assignment]
        for method in ("save_best", "save_periodic", "save_final"):
            setattr(Checkpoints, method, self._seen_whole(method, getattr(Checkpoints, method)))

    def die(self, **where: Any) -> None:
        """Note where, and kill the process group."""
        self._dying = True
        Path(self._order.note).write_text(json.dumps(where))
        if self._order.torn is not None:
            generator = random.Random(self._order.torn)
            for path in self._files():
                stat = path.stat()
                whole = self._synced.get(stat.st_ino, 0)
                if stat.st_size > whole:
                    os.truncate(path, generator.randint(whole, stat.st_size))
        os.killpg(0, signal.SIGKILL)

    def _seen_whole(self, method: str, save: Callable[..., Any]) -> Callable[..., Any]:
        """A method that saves a checkpoint as a place of its own; the moment after it is the last operation there."""

        def saves(*arguments: Any) -> Any:
            self._place, self._number = self._kind_of_save(method), 0
            result = save(*arguments)
            self._happens("after", str(self._root))
            self._place, self._number = "end" if method == "save_final" else "steps", 0
            return result

        return saves

    def _kind_of_save(self, method: str) -> str:
        checkpoints = self._root / "checkpoints"
        if method == "save_best":
            return "best in place of best" if (checkpoints / "best").exists() else "first best"
        if method == "save_final":
            return "final"
        return "periodic, rotating" if len([*checkpoints.glob("checkpoint_*")]) > 1 else "periodic"

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        """An audit hook of Python, which is called before each operation."""
        if event == "open" and isinstance(arguments[0], (str, os.PathLike)) and arguments[2] & WRITES:
            self._happens("write", os.fspath(arguments[0]))
        elif event == "os.rename":
            self._happens("rename", arguments[0])
            self._forget(arguments[1])
        elif event in ("os.remove", "os.rmdir"):
            path = _in_folder(arguments[1], os.fspath(arguments[0]))
            # One that is missing is deleted to be sure; nothing happens.
            if os.path.lexists(path):
                self._happens("delete", path)
                self._forget(path)
        elif event == "os.mkdir" and not os.path.lexists(arguments[0]):
            self._happens("folder", arguments[0])

    def _happens(self, kind: str, path: Any) -> None:
        whole = Path(os.path.abspath(os.fspath(path)))
        if self._dying or not whole.is_relative_to(self._root):
            return
        self._number += 1
        operation = Operation(self._place, self._number, kind, whole.relative_to(self._root).as_posix())
        self.seen.append(operation)
        if self._order.operations.get(self._place) == self._number:
            self.die(**asdict(operation))

    def _forget(self, path: Any) -> None:
        """A file goes, and its inode may become another one's."""
        if os.path.lexists(path):
            self._synced.pop(os.lstat(path).st_ino, None)

    def _files(self) -> list[Path]:
        return [path for path in self._root.rglob("*") if path.is_file()]


def _in_folder(handle: int, path: str) -> str:
    """The path of a file that is named relative to an open folder; -1: to the current one."""
    return path if handle == -1 else f"{os.readlink(f'/proc/self/fd/{handle}')}/{path}"


def main() -> int:
    """Take orders until there are no more."""
    from nestune.environment import set_defaults

    set_defaults()
    for library in LIBRARIES:
        try:
            importlib.import_module(library)
        except ModuleNotFoundError as error:
            print(f"not imported beforehand: {error}", file=sys.stderr)
    if sys.argv[1] == "mlx":
        # As a run does, which computes with it from its first product on: another library rounds otherwise.
        from nestune.backends.mlx_blas import load_fast_blas

        load_fast_blas()
    importlib.import_module(BACKENDS[sys.argv[1]])
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, 0)
            return run(Order(**json.loads(line)))
        # Here too, so that there is the group when its number is told.
        os.setpgid(pid, pid)
        print(json.dumps({"pid": pid}), flush=True)
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"status": os.waitstatus_to_exitcode(status)}), flush=True)
    return 0


def run(order: Order) -> int:
    """Be the run; returns its exit code."""
    from nestune import cli

    output = os.open(order.output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for handle in (1, 2):
        os.dup2(output, handle)
    watch = Watch(order)
    watch.install()
    if order.call is not None:
        die_at_call(order.call, order.number, watch)
    if order.clock_s:
        turn_clock(order.clock_s)
    code = cli.main(list(order.arguments))
    seen = [asdict(operation) for operation in watch.seen]
    Path(order.note).write_text(json.dumps({"seen": seen}))
    return code


def die_at_call(call: str, number: int, watch: Watch) -> None:
    """Die before the how manieth call of a function, `module:Class.method` or `module:function`."""
    module, _, name = call.partition(":")
    owner_name, _, attribute = name.rpartition(".")
    owner = importlib.import_module(module)
    for part in filter(None, owner_name.split(".")):
        owner = getattr(owner, part)
    original = getattr(owner, attribute)
    calls = 0

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            watch.die(call=call, number=number)
        return original(*arguments, **options)

    setattr(owner, attribute, counted)


def turn_clock(seconds: float) -> None:
    """Let the clock be wrong, as one is that was set in between: what nestune and its libraries read of it."""
    right = time.time

    class Turned(datetime):
        """The time that the wrong clock shows."""

        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
            return datetime.fromtimestamp(right() + seconds, tz)

    time.time = lambda: right() + seconds
    for name, module in list(sys.modules.items()):
        if name.startswith("nestune.") and getattr(module, "datetime", None) is datetime:
            module.datetime = Turned  # type: ignore[attr-defined]


if __name__ == "__main__":
    sys.exit(main())
