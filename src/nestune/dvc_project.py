"""The DVC project that the current folder is in: what tracks a file, how that is brought up to date, and sent away.

One process at a time may change a project, and DVC gives up on another one after three seconds; here it is waited for.
Paths are relative to the current folder, as they are everywhere.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from nestune.errors import BusyError, ConfigError, RunError, ServiceError

ASK_EVERY_S = 0.5
T = TypeVar("T")

log = logging.getLogger(__name__)


def project_root() -> Path | None:
    """The root of the DVC project that the current folder is in; None where it is in none."""
    here = Path.cwd()
    return next((folder for folder in (here, *here.parents) if (folder / ".dvc").is_dir()), None)


def is_run_by_dvc() -> bool:
    """Whether this process is a stage that DVC runs, and will itself put into its cache what the stage leaves."""
    return "DVC_STAGE" in os.environ


@dataclass(frozen=True)
class Tracker:
    """A `.dvc` file, or a stage of a `dvc.yaml`.

    address: what DVC calls it; outputs: path -> hash, None where it has none yet; parameters: the files that it takes
    some from; is_data: it is a `.dvc` file for what was made here, by no command.
    """

    address: str
    outputs: dict[Path, str | None]
    parameters: frozenset[Path]
    is_data: bool

    def touches(self, path: Path) -> bool:
        """Whether it tracks the path, something in it, or something that it is in."""
        place = absolute(path)
        outputs = [absolute(output) for output in self.outputs]
        return any(place.is_relative_to(output) or output.is_relative_to(place) for output in outputs)


def absolute(path: Path) -> Path:
    """Where a path leads, by its names alone: links stay what they are."""
    return Path(os.path.abspath(path))


@contextmanager
def dvc_project(wait_s: float) -> Iterator["DvcProject"]:
    """The project of the current folder; other DVC processes are waited for so long.

    Raises RunError when it cannot be opened.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        repo = Repo(str(project_root()))
    except DvcException as error:
        raise RunError(f"the DVC project at {project_root()} cannot be opened: {_text(error)}") from error
    # It would tell each file that it writes on stdout, where results stand as JSON.
    told, level = logging.getLogger("dvc"), logging.getLogger("dvc").level
    told.setLevel(logging.WARNING)
    try:
        with repo:
            yield DvcProject(repo, wait_s)
    finally:
        told.setLevel(level)


class DvcProject:
    """What a project tracks. Every method raises RunError with what DVC says, BusyError when it waited in vain."""

    def __init__(self, repo: Any, wait_s: float) -> None:
        self._repo = repo
        self._wait_s = wait_s

    def trackers(self) -> list[Tracker]:
        """All that tracks anything in the project."""

        def read() -> list[Tracker]:
            self._repo._reset()
            return [_tracker(stage) for stage in self._repo.index.stages]

        return self._wait("what DVC tracks cannot be read", read)

    def is_ignored(self, path: Path) -> bool:
        """Whether git ignores a path, and DVC with it."""
        ignored = getattr(self._repo.scm, "is_ignored", None)
        return bool(ignored and ignored(str(absolute(path))))

    def is_clean(self, address: str) -> bool:
        """Whether what is tracked is as the tracker says."""
        return not self._wait(f"{address} cannot be compared", lambda: self._repo.status(targets=[address]))

    def commit(self, address: str) -> None:
        """Put what is tracked into DVC's cache as it is now, and note its hashes in the tracker."""
        self._wait(f"{address} cannot be put into DVC", lambda: self._repo.commit(address, force=True))

    def remote(self, name: str | None) -> str | None:
        """The remote of that name, or else the default one; None where there is none by default.

        Raises ConfigError where there is none of that name.
        """
        known = sorted(self._repo.config["remote"])
        if name is not None and name not in known:
            raise ConfigError(
                f"dvc.remote is {name!r}; DVC knows {', '.join(known) or 'none'}. Add it: dvc remote add {name} URL."
            )
        default = self._repo.config["core"].get("remote")
        return name or (str(default) if default else None)

    def push(self, addresses: Sequence[str], remote: str) -> int:
        """Send what is tracked to a remote; returns how many files it lacked. Raises ServiceError when it fails."""
        try:
            return int(self._wait("", lambda: self._repo.push(targets=list(addresses), remote=remote)))
        except BusyError:
            raise
        except Exception as error:  # each kind of remote has errors of its own, which share no ancestor
            raise ServiceError(
                f"the remote {remote} does not take it: {_text(error)}. It lies in DVC's cache; send it later with: "
                "dvc push"
            ) from error

    def _wait(self, fault: str, action: Callable[[], T]) -> T:
        """Do it as soon as no other process is in its way."""
        from dvc.exceptions import DvcException
        from dvc.lock import LockError

        give_up_at = time.monotonic() + self._wait_s
        told = ""
        while True:
            try:
                return action()
            except LockError as error:
                holder = self._holder(error)
                if time.monotonic() > give_up_at:
                    raise BusyError(
                        f"DVC is in use by {holder}; waited {self._wait_s:g} s (dvc.wait_s). Let it end, then run the "
                        "same command again."
                    ) from error
                if holder != told:
                    log.warning("DVC is in use by %s; waiting for it, %g s at most", holder, self._wait_s)
                    told = holder
                time.sleep(ASK_EVERY_S)
            except DvcException as error:
                if not fault:
                    raise
                raise RunError(f"{fault}: {_text(error)}") from error

    def _holder(self, error: Exception) -> str:
        """Who has the lock: of parts of the project DVC says it, of all of it its file has the process id."""
        import psutil
        from dvc.lock import FAILED_TO_LOCK_MESSAGE

        if str(error) != FAILED_TO_LOCK_MESSAGE:
            return " ".join(str(error).partition("blocked by:")[2].partition("\n\n")[0].split()) or _text(error)
        try:
            pid = int(Path(self._repo.lock.files[0]).read_text(encoding="utf-8"))
            return f"process {pid} ({' '.join(psutil.Process(pid).cmdline()):.200})"
        except (OSError, ValueError, AttributeError, psutil.Error):
            return "another process"


def _tracker(stage: Any) -> Tracker:
    from dvc.dependency import ParamsDependency

    return Tracker(
        address=stage.addressing,
        outputs={_relative(out.fs_path): out.hash_info.value for out in stage.outs},
        parameters=frozenset(_relative(dep.fs_path) for dep in stage.deps if isinstance(dep, ParamsDependency)),
        is_data=stage.is_data_source and not stage.deps,
    )


def _relative(path: str) -> Path:
    return Path(os.path.relpath(path))


def _text(error: BaseException) -> str:
    """What an error says, and what it came of, in one line."""
    texts = [" ".join(str(one).split()) for one in (error, error.__cause__) if one is not None]
    return (": ".join(text.rstrip(".") for text in dict.fromkeys(texts) if text) or type(error).__name__)[:600]
