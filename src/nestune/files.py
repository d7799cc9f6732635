"""Files that are written safely, read with a remedy, and known by their SHA-256.

A file or folder appears whole or not at all, whatever moment a process is killed at or power is lost: it is made under
a temporary name on the same disk, synced, and renamed. What a killed process leaves under such names, `tidy` removes.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nestune.errors import RunError, StorageError
from nestune.foreign_files import parse_json, read_bounded

SEAL = "sha256.json"
TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")
OLD = re.compile(r"\.(?P<name>.+)\.old")
# Whatever a block does that writes into a folder, these are about writing.
OF_WRITING = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})


@contextmanager
def writing(path: Path, only: Collection[int] | None = None) -> Iterator[None]:
    """Turn what the system raises into a StorageError that says which file could not be written, and what to do.

    only: the error numbers that are turned; None: all.
    """
    try:
        yield
    except OSError as error:
        if only is not None and error.errno not in only:
            raise
        raise StorageError(_why_not_written(path, error)) from error


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; raises StorageError when the system refuses."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_beside(path)
        try:
            with temporary.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)


def write_text(path: Path, content: str) -> None:
    """As `write_bytes`, in UTF-8."""
    write_bytes(path, content.encode("utf-8"))


def write_json(path: Path, content: Any) -> None:
    """As `write_bytes`: indented JSON. Raises ValueError for NaN, which JSON does not have."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the place of `path` when the block ends well, and vanishes when it fails.

    Between the two renames of a replacement neither folder stands at `path`; a process that is killed just there
    leaves the old one beside it, and `tidy` brings it back. Parents made for a block that fails vanish too.
    Raises StorageError when the system refuses to write.
    """
    temporary, old = temporary_beside(path), path.with_name(f".{path.name}.old")
    made = [parent for parent in path.parents if not parent.exists()]
    try:
        with writing(path):
            temporary.mkdir(parents=True)
        try:
            with writing(path, only=OF_WRITING):
                yield temporary
        except StorageError as error:
            # The temporary name is gone when the user reads of it.
            raise StorageError(str(error).replace(str(temporary), str(path))) from error
        with writing(path):
            sync_tree(temporary)
            if path.exists():
                os.replace(path, old)
            os.replace(temporary, path)
            sync_folder(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in made:
            if parent.exists() and not any(parent.iterdir()):
                parent.rmdir()


def tidy(folder: Path) -> None:
    """End what a killed process left unfinished below a folder, which nobody else may be writing to.

    Temporary files and folders go; an old folder whose replacement did not take place comes back.
    """
    with writing(folder):
        for path in sorted(folder.rglob(".*")):
            old = OLD.fullmatch(path.name)
            if TEMPORARY.fullmatch(path.name) or (old and path.with_name(old["name"]).exists()):
                remove(path)
            elif old and path.exists():
                os.replace(path, path.with_name(old["name"]))
                sync_folder(path.parent)


def seal(folder: Path) -> None:
    """Note the SHA-256 of every file of a folder beside them, so that a change is noticed; folders in it count not."""
    hashes = {path.name: sha256_file(path) for path in sorted(folder.iterdir()) if path.is_file()}
    write_json(folder / SEAL, {"files": hashes})


def seal_faults(folder: Path, needed: Sequence[str]) -> list[str]:
    """What of a sealed folder is not as it was sealed; `needed`: files that it must have. Empty when all is well."""
    try:
        sealed = read_json(folder / SEAL, "", keys=["files"])["files"]
    except RunError:
        return [f"{SEAL} missing or broken"]
    # A name that leads elsewhere is none of the folder's own.
    if not isinstance(sealed, dict) or any(Path(name).name != name for name in sealed):
        return [f"{SEAL} broken"]
    unsealed = [name for name in needed if name not in sealed]
    missing = [name for name in sealed if not (folder / name).is_file()]
    changed = [name for name in sealed if name not in missing and sha256_file(folder / name) != sealed[name]]
    by_kind = {"missing": [*unsealed, *missing], "changed": changed}
    return [f"{', '.join(names)} {kind}" for kind, names in by_kind.items() if names]


def read_json(path: Path, remedy: str, keys: Sequence[str] = ()) -> Any:
    """The content of a JSON file of a run, an object with `keys`.

    Raises RunError with the remedy where the file is missing, broken or far too large, or lacks a key.
    """
    try:
        content = parse_json(read_bounded(path))
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}. {remedy}") from None
    except ValueError as error:
        raise RunError(f"{path} is not JSON: {error}. {remedy}") from None
    if not isinstance(content, dict):
        raise RunError(f"{path} holds no JSON object. {remedy}")
    missing = [key for key in keys if key not in content]
    if missing:
        raise RunError(f"{path} lacks {', '.join(missing)}. {remedy}")
    return content


def sha256_file(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_if_file(path: Path) -> str | None:
    """As `sha256_file`; None where there is no file."""
    return sha256_file(path) if path.is_file() else None


def sha256_files(folder: Path, files: Iterable[Path]) -> str:
    """SHA-256 over the names (relative to `folder`) and contents of files, in hex; the order does not matter."""
    total = hashlib.sha256()
    for name, path in sorted((path.relative_to(folder).as_posix(), path) for path in files):
        total.update(f"{name}\0{sha256_file(path)}\n".encode())
    return total.hexdigest()


def temporary_beside(path: Path) -> Path:
    """A name beside `path`, on the same disk, that nothing has; `tidy` removes what is left under it."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")


def remove(path: Path) -> None:
    """Delete a file, or a folder with all that is in it; no fault when it is not there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make sure that the names in a folder are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Make sure that all files and folders below a folder are on the disk, and the folder itself."""
    for path in folder.rglob("*"):
        if path.is_dir():
            sync_folder(path)
        elif path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)


def _why_not_written(path: Path, error: OSError) -> str:
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        remedy = "Free some space there"
    elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        remedy = "Make its folder writable, or work in another one"
    else:
        remedy = "See that its disk is there and in order"
    again = "What was complete before is as it was; the same command goes on from there"
    return f"cannot write {path}: {reason}. {remedy}. {again}."
