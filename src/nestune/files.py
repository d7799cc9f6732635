"""Files that are written safely, read with a remedy, and known by their SHA-256."""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nestune.errors import RunError
from nestune.foreign_files import parse_json, read_bounded


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: temporary name on the same disk, synced, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_beside(path)
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def write_text(path: Path, content: str) -> None:
    """As `write_bytes`, in UTF-8."""
    write_bytes(path, content.encode("utf-8"))


def write_json(path: Path, content: Any) -> None:
    """As `write_bytes`: indented JSON. Raises ValueError for NaN, which JSON does not have."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the place of `path` when the block ends well, and vanishes when it fails.

    Between the two renames of a replacement neither folder stands at `path`; the old one is then beside it,
    under a hidden name. Parents made for a block that fails vanish too.
    """
    made = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_beside(path)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
        old = _temporary_beside(path)
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
        _sync_folder(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in made:
            if not any(parent.iterdir()):
                parent.rmdir()


@contextmanager
def kept_until_replaced(*paths: Path) -> Iterator[None]:
    """Set files and folders aside while the block makes new ones in their place; when it fails, they come back.

    What a failed block made stays only where there was nothing before. A killed process leaves the old ones
    beside, as `.<name>.previous`; the next such block on the same paths brings them back first.
    """
    aside = {path: _aside(path) for path in paths}
    _bring_back(aside)
    for path, previous in aside.items():
        if path.exists():
            os.replace(path, previous)
    try:
        yield
    except BaseException:
        _bring_back(aside)
        raise
    for previous in aside.values():
        _remove(previous)


@contextmanager
def continued(*paths: Path) -> Iterator[None]:
    """Go on with files and folders in their place, which stay whatever comes of it.

    When the block ends well, what a killed `kept_until_replaced` has set aside of them is no longer needed.
    """
    yield
    for path in paths:
        _remove(_aside(path))


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


def sha256_files(folder: Path, files: Iterable[Path]) -> str:
    """SHA-256 over the names (relative to `folder`) and contents of files, in hex; the order does not matter."""
    total = hashlib.sha256()
    for name, path in sorted((path.relative_to(folder).as_posix(), path) for path in files):
        total.update(f"{name}\0{sha256_file(path)}\n".encode())
    return total.hexdigest()


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.previous")


def _bring_back(aside: Mapping[Path, Path]) -> None:
    for path, previous in aside.items():
        if previous.exists():
            _remove(path)
            os.replace(previous, path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _temporary_beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
