"""A run that has finished: the same configuration returns its result, everything else is refused before it writes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.pipeline.conftest import Configured

from nestune import cli
from nestune.files import sha256_file

RUN = Path("runs/demo-nestune")


def hashes() -> dict[str, str]:
    """The files of the run but for its lock, which tells who was at it last."""
    files = [path for path in RUN.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path.relative_to(RUN).as_posix(): sha256_file(path) for path in files}


def champion() -> str | None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{Path('mlflow/mlflow.db').absolute()}")
    return {alias: str(version) for alias, version in client.get_registered_model("demo").aliases.items()}.get(
        "champion"
    )


def test_a_finished_run_returns_its_result_and_refuses_what_is_not_the_same(
    configured: Configured, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small: dict[str, Any] = {}
    for name, source in {"train": "new_facts/train", "valid": "new_facts/valid", "kept": "general/covered"}.items():
        lines = Path("data", f"{source}.jsonl").read_text().splitlines(keepends=True)
        (project / f"{name}.jsonl").write_text("".join(lines[:40]))
        small[name] = f"{name}.jsonl"
    data = {"train": "train.jsonl", "valid": "valid.jsonl", "retention": {"kept": "kept.jsonl"}}
    # A gate that anything passes: which version is champion is the point.
    path = configured(data=data, gate={"min_gain": 0.0, "max_drop": 1.0})
    run = ["run", "--config", str(path)]
    assert cli.main([*run, "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert cli.main([*run, "--name", "other", "--set", "training.seed=1"]) == 0
    assert champion() == "2"
    before = hashes()
    capsys.readouterr()

    assert cli.main([*run, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"register": first["register"]}
    assert cli.main(run) == 0
    assert "demo-nestune had finished: nothing was done" in capsys.readouterr().out
    assert (hashes(), champion()) == (before, "2")

    def refused(*options: str, code: int) -> str:
        assert cli.main([*run, *options]) == code
        assert (hashes(), champion()) == (before, "2")
        return capsys.readouterr().err

    assert "(data.retention). Take another --name" in refused("--set", "data.retention={}", code=2)
    assert "(gate.max_drop). Take another --name" in refused("--set", "gate.max_drop=0.5", code=2)
    assert "(training.seed differ)" in refused("--set", "training.seed=1", code=2)
    for name, since in (("train", "final was trained"), ("valid", "final was trained"), ("kept", "was evaluated")):
        file = project / f"{name}.jsonl"
        kept = file.read_text()
        file.write_text("".join(kept.splitlines(keepends=True)[1:]))
        told = refused(code=1)
        assert f"{name}.jsonl changed since" in told
        assert since in told
        assert "nothing was written" in told
        file.write_text(kept)

    # What was lost of it is made again.
    shutil.rmtree(RUN / "evaluation")
    assert cli.main(run) == 0
    assert json.loads((RUN / "registration.json").read_text())["version"] == "1"
