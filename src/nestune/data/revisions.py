"""Files as DVC has them at a commit of git, and the hashes by which it tracks them now."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

LOCK = "dvc.lock"


def read_at_revision(path: Path, commit: str, sha256: str) -> bytes | str:
    """The content of a tracked file at a commit, from DVC's cache or its remote; or why it is not to be had.

    Taken only with the SHA-256 that it is to have.
    """
    from dvc.repo import Repo
    from dvc.repo.brancher import switch

    try:
        root = Repo.find_root()
        place = path.absolute().relative_to(root).as_posix()
        # Not dvc.api.open, which works on a clone, from where a remote with a relative path is not found.
        with Repo(root) as repo, switch(repo, commit), repo.dvcfs.open(f"/{place}", mode="rb") as file:
            content: bytes = file.read()
    except Exception as error:  # DVC passes on errors of git, of remotes and of its own, which share no ancestor
        return (str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__)[:300]
    return content if hashlib.sha256(content).hexdigest() == sha256 else "has other content"


def tracked_hashes(files: Sequence[Path]) -> dict[str, str]:
    """Tracked path -> its hash in DVC, of every path below the current folder that holds one of the files.

    A path is tracked by a `.dvc` file beside it, or as an output in `dvc.lock`; what cannot be read tracks nothing.
    """
    locked = dict(_outputs(Path(LOCK)))
    found: dict[str, str] = {}
    for path in dict.fromkeys(place for file in files for place in (file, *file.parents)):
        beside = dict(_outputs(path.with_name(f"{path.name}.dvc"))) if path.name else {}
        sha = beside.get(path.name) or locked.get(path.as_posix())
        if sha is not None:
            found[path.as_posix()] = sha
    return dict(sorted(found.items()))


def _outputs(path: Path) -> Iterator[tuple[str, str]]:
    """The outputs that a `.dvc` file or a `dvc.lock` names: path and hash."""
    if not path.is_file():
        return
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        blocks = [content, *content.get("stages", {}).values()]
        for block in blocks:
            for out in block.get("outs", []):
                if isinstance(out.get("md5"), str):
                    yield str(out["path"]), out["md5"]
    except (OSError, ValueError, yaml.YAMLError, AttributeError, KeyError, TypeError):
        return
