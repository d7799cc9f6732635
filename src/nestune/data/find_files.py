"""The files that a configuration's paths stand for: JSON lines in ordinary files, and no others."""

import os
from collections.abc import Sequence
from pathlib import Path

from nestune.errors import DataError, Fault
from nestune.foreign_files import kind_of

ENDING = ".jsonl"
# What holds other files, and what one file is packed as.
ARCHIVES = (".zip", ".tar", ".tgz", ".tbz2", ".txz", ".tzst", ".7z", ".rar")
PACKED = (".gz", ".bz2", ".xz", ".zst", ".lz4")
# How the content of packed files begins, whatever they are called.
BEGINNINGS = {
    "gzip": b"\x1f\x8b",
    "zstd": b"\x28\xb5\x2f\xfd",
    "bzip2": b"BZh",
    "xz": b"\xfd7zXZ\0",
    "zip": b"PK\x03\x04",
    "7z": b"7z\xbc\xaf\x27\x1c",
}
TAR_AT, TAR = 257, b"ustar"
UNPACK = "Unpack it, and name what is in it"
# DVC puts links to its cache where data is; the cache belongs to the project.
CACHE = Path(".dvc", "cache")


def find_files(paths: Sequence[str]) -> list[Path]:
    """The files among `paths` and every *.jsonl below the folders among them, sorted folder by folder.

    Raises DataError with everything at once that cannot be read as it stands: a path that does not exist, a folder
    that holds none, archives, what is no ordinary file, and in a folder links that lead out of it (but to DVC's cache).
    """
    files: list[Path] = []
    faults: list[Fault] = []
    for path in (Path(path).expanduser() for path in paths):
        if not path.exists():
            raise DataError(f"{path} does not exist. Name a file of JSON lines, or a folder with *.jsonl in it.")
        found, refused = _in_folder(path) if path.is_dir() else ([path], [])
        refused += [Fault(str(file), 0, "", *why) for file in found if (why := _why_not(file)) is not None]
        if not found and not refused:
            raise DataError(f"{path} holds no *.jsonl. Name a file of JSON lines, or a folder with *.jsonl in it.")
        files += found
        faults += refused
    if faults:
        raise DataError(f"{len(faults)} of the data's files cannot be read as they stand; nothing was written", faults)
    return files


def _in_folder(folder: Path) -> tuple[list[Path], list[Fault]]:
    """The *.jsonl below a folder, and what there is refused."""
    faults: list[Fault] = []

    def unreadable(error: OSError) -> None:
        faults.append(Fault(str(error.filename), 0, "", f"not readable: {error.strerror}", "Check its permissions"))

    root = Path(os.path.realpath(folder))
    allowed = (root, Path(os.path.realpath(CACHE)))
    found = []
    for place, folders, names in os.walk(folder, onerror=unreadable):
        for path in sorted(Path(place, name) for name in (*folders, *names)):
            wanted = path.name.endswith(ENDING) and not path.is_dir()
            if path.is_symlink() and (wanted or path.is_dir()):
                target = Path(os.path.realpath(path))
                if not any(target.is_relative_to(within) for within in (allowed if wanted else allowed[:1])):
                    remedy = "Name what it leads to in the configuration, or put it here in its place"
                    faults.append(Fault(str(path), 0, "", f"leads out of its folder: a link to {target}", remedy))
                    continue
                if not target.exists():
                    faults.append(
                        Fault(str(path), 0, "", f"leads nowhere: a link to {target}", "Restore it, or remove it")
                    )
                    continue
            if wanted:
                found.append(path)
            elif _holds_records_by_name(path.name) and not path.is_dir():
                faults.append(
                    Fault(str(path), 0, "", f"archive: {path.suffix}", "Unpack it here, or move it elsewhere")
                )
    return sorted(found), faults


def _holds_records_by_name(name: str) -> bool:
    """Whether an archive of this name may hold records, which nobody would miss if it were passed over."""
    name = name.lower()
    inner, packed = os.path.splitext(name)
    return name.endswith(ARCHIVES) or (packed in PACKED and inner.endswith((ENDING, ".json", ".tar")))


def _why_not(path: Path) -> tuple[str, str] | None:
    """Why a file cannot be read as JSON lines, and what to do; None when it can, as far as its beginning tells."""
    kind = kind_of(path)
    if kind is not None:
        return f"no ordinary file: {kind}", "Write its records into a file, and name that"
    try:
        with path.open("rb") as file:
            beginning = file.read(TAR_AT + len(TAR))
    except OSError as error:
        return f"not readable: {error.strerror}", "Check its permissions"
    packed = next((name for name, magic in BEGINNINGS.items() if beginning.startswith(magic)), None)
    packed = "tar" if beginning[TAR_AT:] == TAR else packed
    return None if packed is None else (f"archive: its content is {packed}", UNPACK)
