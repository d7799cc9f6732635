"""A remote of DVC in S3: a real server of its protocol, on a folder of this machine."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from tests.services.conftest import S3_KEY, S3_SECRET, s3_server

from nestune.config import RunConfig, load_config
from nestune.errors import ServiceError
from nestune.files import sha256_file, write_bytes, write_json, write_text
from nestune.runs import RunPaths
from nestune.stages.commit import commit

pytestmark = pytest.mark.services


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket, and the server's address; the keys to it are in the environment."""
    (tmp_path / "served" / "bucket").mkdir(parents=True)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", S3_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", S3_SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with s3_server(tmp_path / "served") as address:
        yield address


def said_by(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"DVC_NO_ANALYTICS": "1"})
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def dvc(*arguments: str) -> str:
    return said_by(sys.executable, "-m", "dvc", *arguments)


def test_a_run_is_sent_to_s3_and_comes_back_and_wrong_keys_cost_nothing(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tmp_path / "project"
    project.mkdir()
    monkeypatch.chdir(project)
    said_by("git", "init", "-q")
    dvc("init", "-q")
    write_text(Path("data/train.jsonl"), '{"text": "one"}\n')
    dvc("add", "-q", "data")
    dvc("remote", "add", "-d", "store", "s3://bucket/nestune")
    dvc("remote", "modify", "store", "endpointurl", bucket)
    content = {"name": "week1", "model": {"base": "base"}, "data": {"train": "data"}}
    write_text(Path("week1.yaml"), yaml.safe_dump(content))
    config: RunConfig = load_config(Path("week1.yaml"))
    run = RunPaths.of("week1")
    write_bytes(run.candidate / "adapter_model.safetensors", b"weights")
    sources = {"data/train.jsonl": sha256_file(Path("data/train.jsonl"))}
    write_json(run.dataset / "report.json", {"sources": sources})

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another-secret")
    with pytest.raises(ServiceError, match=r"the remote store does not take it: .*send it later with: dvc push"):
        commit(config, run)
    assert "up to date" in dvc("status")

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", S3_SECRET)
    assert commit(config, run).remote == "store"
    assert "in sync" in dvc("status", "--cloud")
    assert list((tmp_path / "served" / "bucket" / "nestune").rglob("*.dir"))
    for gone in (Path("runs"), Path("data"), Path(".dvc/cache")):
        shutil.rmtree(gone)
    dvc("pull")
    assert (run.candidate / "adapter_model.safetensors").read_bytes() == b"weights"
    assert Path("data/train.jsonl").read_text() == '{"text": "one"}\n'
