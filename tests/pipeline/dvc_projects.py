"""Copies of this project as repositories of git and DVC of their own, with trainings of few steps."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml
from tests.pipeline.conftest import ROOT

CONFIG = Path("configs/demo_nestune.yaml")


def copy_project(folder: Path, world: Path) -> Path:
    """The project's files in a git repository, with the demo's data; returns the folder."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    shutil.copytree(world, folder / "data")
    git(folder, "init", "-q")
    git_commit(folder, "copy")
    return folder


def shorten(project: Path) -> None:
    """Have the configuration that dvc.yaml runs train for a moment, and score a few rows."""
    rows = (project / "data/new_facts/train.jsonl").read_text().splitlines(keepends=True)
    (project / "data/new_facts/train.jsonl").write_text("".join(rows[:48]))
    for held_out in (*(project / "data").rglob("valid.jsonl"), *(project / "data").rglob("test.jsonl")):
        held_out.write_text("".join(held_out.read_text().splitlines(keepends=True)[:12]))
    content = yaml.safe_load((project / CONFIG).read_text())
    content["data"]["retention"] = {"skill": "data/general/skill.jsonl"}
    content["retention"] = {"recipe": "none"}
    content["training"] |= {"steps": 3, "eval_every": None}
    (project / CONFIG).write_text(yaml.safe_dump(content, sort_keys=False))


def change(project: Path, old: str, new: str) -> None:
    """Replace a text in the configuration that dvc.yaml runs."""
    content = (project / CONFIG).read_text()
    assert old in content
    (project / CONFIG).write_text(content.replace(old, new))


def git(project: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "protocol.file.allow=always"]
    return subprocess.run(
        ["git", *identity, *arguments], cwd=project, check=True, capture_output=True, text=True
    ).stdout.strip()


def git_commit(project: Path, message: str) -> str:
    """Commit all that git does not ignore; the commit."""
    git(project, "add", "-A")
    git(project, "commit", "-qm", message)
    return git(project, "rev-parse", "HEAD")


def dvc(project: Path, *arguments: str) -> str:
    return run(project, "-m", "dvc", *arguments).stdout


def nestune(project: Path, *arguments: str, expect: int = 0) -> subprocess.CompletedProcess[str]:
    return run(project, "-m", "nestune.cli", *arguments, expect=expect)


def run(project: Path, *arguments: str, expect: int = 0, **more: str) -> subprocess.CompletedProcess[str]:
    """Run Python there, with `nestune` and `dvc` on the path, and check its exit code; more: of the environment."""
    scripts = str(Path(sys.executable).parent)
    environment = os.environ | {"PATH": scripts + os.pathsep + os.environ["PATH"], "DVC_NO_ANALYTICS": "1"} | more
    done = subprocess.run(
        [sys.executable, *arguments], cwd=project, capture_output=True, text=True, env=environment, timeout=600
    )
    assert done.returncode == expect, f"{done.stdout}\n{done.stderr}"
    return done
