"""A folder with the demo's data, in which runs are made as a user would make them."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
Configured = Callable[..., Path]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's data, generated once."""
    data = tmp_path_factory.mktemp("world") / "data"
    subprocess.run([sys.executable, ROOT / "demo" / "world.py", "--out", data], check=True, capture_output=True)
    return data


@pytest.fixture
def project(tmp_path: Path, world: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with `data` and `demo/base` in it; the tests' current folder."""
    (tmp_path / "demo").mkdir()
    (tmp_path / "data").symlink_to(world)
    (tmp_path / "demo" / "base").symlink_to(ROOT / "demo" / "base")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NESTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def configured(project: Path) -> Configured:
    """Writes the demo's configuration, shortened, with tiers and replay, the given blocks on top; returns its path."""

    def write(**blocks: dict[str, Any]) -> Path:
        content = yaml.safe_load((ROOT / "configs" / "demo_nestune.yaml").read_text())
        content["training"] |= {"steps": 8, "eval_every": 4, "learning_rate": 3e-3}
        content["tiers"] = {"update_every": [1, 2, 4]}
        replay = {"files": "data/general/replay.jsonl", "rows_per_step": 16}
        content["retention"] = {"recipe": "none", "replay": replay}
        for block, values in blocks.items():
            content[block] = content.get(block, {}) | values
        path = project / "run.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


def run_python(*arguments: object, expect: int = 0) -> subprocess.CompletedProcess[str]:
    """Run Python on the arguments in the current folder, and check its exit code."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "PREFECT_HOME": str(Path.cwd() / "prefect")}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == expect, f"{done.stdout}\n{done.stderr}"
    return done
