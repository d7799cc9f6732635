"""Stage commit: what of a run goes into DVC, where that is told, and what is refused; runs are made of a few bytes."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from nestune.config import RunConfig, load_config
from nestune.errors import BusyError, ConfigError, RunError, ServiceError
from nestune.files import read_json, sha256_file, write_bytes, write_json, write_text
from nestune.runs import RunPaths
from nestune.stages.commit import check_commit, commit, commits

POINTER = Path("adapters/week1.dvc")
HOLD = "import sys; from dvc.repo import Repo\nwith Repo().lock: print('held', flush=True); sys.stdin.read()"


def said_by(*command: str) -> str:
    environment = os.environ | {"DVC_NO_ANALYTICS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def dvc(*arguments: str) -> str:
    return said_by(sys.executable, "-m", "dvc", *arguments)


def hashes(file: Path) -> dict[str, str]:
    return {out["path"]: out["md5"] for out in yaml.safe_load(file.read_text())["outs"]}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of git and DVC with tracked data and a configuration; the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_STAGE", raising=False)
    said_by("git", "init", "-q")
    dvc("init", "-q")
    write_text(Path(".gitignore"), "/runs/\n")
    write_text(Path("data/train.jsonl"), '{"text": "one"}\n')
    dvc("add", "-q", "data")
    content = {"name": "week1", "model": {"base": "base"}, "data": {"train": "data"}, "dvc": {"wait_s": 0}}
    write_text(Path("week1.yaml"), yaml.safe_dump(content))
    return tmp_path


@pytest.fixture
def run(project: Path) -> RunPaths:
    """What a run leaves behind."""
    return leave("week1")


@pytest.fixture
def config(project: Path) -> RunConfig:
    return load_config(Path("week1.yaml"))


@pytest.fixture
def holder(project: Path) -> Iterator[Callable[[], None]]:
    """Another process that has the project's lock; it is called to let go."""
    with subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        yield lambda: process.communicate(b"")  # type: ignore[misc]


def leave(name: str, weights: bytes = b"weights") -> RunPaths:
    paths = RunPaths.of(name)
    write_bytes(paths.candidate / "adapter_model.safetensors", weights)
    sources = {"data/train.jsonl": sha256_file(Path("data/train.jsonl"))}
    write_json(paths.dataset / "report.json", {"sources": sources})
    write_text(paths.config, "name: week1\n")
    write_text(paths.state, "{}")
    write_text(paths.lock, "{}")
    write_bytes(paths.root / "export" / "model.gguf", b"large")
    return paths


def test_a_run_gets_a_file_of_its_own_that_brings_it_back(config: RunConfig, run: RunPaths) -> None:
    result = commit(config, run)
    assert list(hashes(POINTER)) == ["runs/week1/candidate", "runs/week1/config.yaml", "runs/week1/dataset"]
    assert result.tracked == {
        "data": hashes(Path("data.dvc"))["data"],
        "runs/week1/candidate": hashes(POINTER)["runs/week1/candidate"],
        "runs/week1/dataset": hashes(POINTER)["runs/week1/dataset"],
    }
    assert (set(result.files), result.remote) == ({"adapters/week1.dvc", "data.dvc"}, None)
    assert "up to date" in dvc("status")
    said_by("git", "add", "adapters/week1.dvc", "data.dvc")

    write_bytes(run.candidate / "adapter_model.safetensors", b"other")
    (run.dataset / "report.json").unlink()
    assert "modified" in dvc("status", str(POINTER))
    dvc("checkout", "-f", str(POINTER))
    assert (run.candidate / "adapter_model.safetensors").read_bytes() == b"weights"
    assert (run.dataset / "report.json").exists()
    assert (run.root / "export" / "model.gguf").exists()


def test_a_run_that_left_something_else_is_brought_up_to_date(config: RunConfig, run: RunPaths) -> None:
    commit(config, run)
    before = hashes(POINTER)
    leave("week1", b"trained anew")
    write_text(run.tiers, "{}")
    run.config.unlink()
    commit(config, run)
    now = hashes(POINTER)
    assert set(now) - set(before) == {"runs/week1/tiers.json"}
    assert set(before) - set(now) == {"runs/week1/config.yaml"}
    assert now["runs/week1/candidate"] != before["runs/week1/candidate"]
    assert "up to date" in dvc("status")


def test_data_that_changed_since_dvc_saw_it_is_put_into_dvc_with_the_run(config: RunConfig, project: Path) -> None:
    before = hashes(Path("data.dvc"))["data"]
    write_text(Path("data/train.jsonl"), '{"text": "one"}\n{"text": "two"}\n')
    result = commit(config, leave("week1"))
    assert result.tracked["data"] == hashes(Path("data.dvc"))["data"] != before
    assert "up to date" in dvc("status")


def test_data_that_changed_since_the_run_was_made_of_it_is_left_alone(
    config: RunConfig, run: RunPaths, caplog: pytest.LogCaptureFixture
) -> None:
    before = Path("data.dvc").read_text()
    write_text(Path("data/train.jsonl"), '{"text": "three"}\n')
    assert "data" not in commit(config, run).tracked
    assert Path("data.dvc").read_text() == before
    assert "data/train.jsonl changed since runs/week1 was made of it: data.dvc stays as it is" in caplog.text


def pipeline() -> None:
    """A dvc.yaml whose stage makes the run of week1.yaml, and what it leaves."""
    stage = {
        "cmd": "false",
        "deps": ["data"],
        "params": [{"week1.yaml": ["model", "data"]}],
        "outs": ["runs/week1/dataset", "runs/week1/candidate"],
    }
    write_text(Path("dvc.yaml"), yaml.safe_dump({"stages": {"train": stage}}))


def test_a_run_that_a_dvc_yaml_describes_is_put_into_its_lock(config: RunConfig, run: RunPaths) -> None:
    pipeline()
    result = commit(config, run)
    assert result.files == ("dvc.lock", "data.dvc")
    assert not POINTER.exists()
    # Its command would fail.
    assert "up to date" in dvc("repro")
    locked = yaml.safe_load(Path("dvc.lock").read_text())["stages"]["train"]["outs"]
    assert {out["path"]: out["md5"] for out in locked}.items() <= result.tracked.items()


def test_a_run_of_another_configuration_than_dvc_yaml_describes_is_refused_before_training(project: Path) -> None:
    pipeline()
    other = load_config(Path("week1.yaml"), ["training.steps=7"])
    with pytest.raises(ConfigError, match=r"what dvc.yaml makes of week1.yaml, .* \(training.steps\). Take another"):
        check_commit(other, RunPaths.of("week1"))
    check_commit(load_config(Path("week1.yaml"), ["dvc.push=false"]), RunPaths.of("week1"))
    check_commit(load_config(Path("week1.yaml"), ["training.steps=7"], "week2"), RunPaths.of("week2"))


def test_where_git_ignores_what_it_is_to_keep_training_is_refused(config: RunConfig, run: RunPaths) -> None:
    write_text(Path(".gitignore"), "/runs/\n/adapters/\n")
    with pytest.raises(ConfigError, match=r"git ignores adapters/week1\.dvc"):
        check_commit(config, run)


def test_what_a_remote_lacks_is_sent_and_a_remote_that_fails_costs_nothing(config: RunConfig, run: RunPaths) -> None:
    dvc("remote", "add", "-d", "broken", "http://127.0.0.1:9/store")
    with pytest.raises(ServiceError, match=r"the remote broken does not take it: .*send it later with: dvc push"):
        commit(config, run)
    assert "up to date" in dvc("status")
    assert commit(load_config(Path("week1.yaml"), ["dvc.push=false"]), run).remote is None
    dvc("remote", "add", "folder", "../store")
    assert commit(load_config(Path("week1.yaml"), ["dvc.remote=folder"]), run).remote == "folder"
    assert "in sync" in dvc("status", "--cloud", "--remote", "folder")
    with pytest.raises(ConfigError, match=r"dvc.remote is 'bucket'; DVC knows broken, folder\."):
        check_commit(load_config(Path("week1.yaml"), ["dvc.remote=bucket"]), run)


def test_another_dvc_process_is_waited_for(config: RunConfig, run: RunPaths, holder: Callable[[], None]) -> None:
    with pytest.raises(BusyError, match=r"DVC is in use by process \d+ \(.*Repo.*waited 0 s \(dvc.wait_s\)"):
        commit(config, run)
    assert not POINTER.exists()
    program = "from nestune.cli import main; raise SystemExit(main(['commit', '--config', 'week1.yaml', *{0}]))"
    patient = program.format("['--set', 'dvc.wait_s=300']")
    with subprocess.Popen([sys.executable, "-c", patient], stderr=subprocess.PIPE, text=True) as waiting:
        assert waiting.stderr is not None
        assert "WARNING: DVC is in use by process" in waiting.stderr.readline()
        assert waiting.poll() is None
        holder()
        told = waiting.communicate(timeout=300)[1]
    assert waiting.returncode == 0, told
    assert POINTER.exists()


def test_dvc_s_own_stages_and_folders_without_dvc_are_left_alone(
    config: RunConfig, run: RunPaths, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    assert commits(config)
    assert not commits(load_config(Path("week1.yaml"), ["dvc.commit=false"]))
    monkeypatch.setenv("DVC_STAGE", "train")
    assert not commits(config)
    with pytest.raises(ConfigError, match="DVC runs this as one of its stages"):
        commit(config, run)
    monkeypatch.delenv("DVC_STAGE")
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert not commits(config)
    with pytest.raises(ConfigError, match=r"is in no DVC project\. Make one: dvc init"):
        commit(config, run)


def test_a_run_that_was_not_trained_and_a_broken_project_are_told(config: RunConfig, run: RunPaths) -> None:
    with pytest.raises(
        RunError, match=r"there is no runs/week2/candidate/adapter_model.safetensors\. Run nestune train"
    ):
        commit(config, RunPaths.of("week2"))
    write_text(Path("dvc.yaml"), "stages: [")
    with pytest.raises(RunError, match=r"what DVC tracks cannot be read: .*dvc\.yaml"):
        commit(config, run)
    assert read_json(run.dataset / "report.json", "")
