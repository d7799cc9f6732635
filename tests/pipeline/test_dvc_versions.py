"""What a flow run or `nestune run` leaves is in DVC: in a fresh clone, at an old revision, in a sweep."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.pipeline.dvc_projects import CONFIG, change, copy_project, dvc, git, git_commit, nestune, run, shorten

from nestune.files import read_json
from nestune.registry.connection import connect

RUN = Path("runs/demo-nestune")
NOTHING_TO_DO = "Data and pipelines are up to date."


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, world: Path) -> Path:
    """A project with a folder as its remote, after a flow run of the configuration that dvc.yaml names."""
    project = copy_project(tmp_path_factory.mktemp("versions") / "project", world)
    shorten(project)
    dvc(project, "add", "data")
    dvc(project, "remote", "add", "-d", "store", "../store")
    git_commit(project, "short")
    run(project, "flows/retrain.py", "--config", str(CONFIG), PREFECT_HOME=str(project.parent / "prefect"))
    return project


@pytest.fixture
def project(trained: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change, committed; its remote is a copy, too."""
    shutil.copytree(trained.parent / "store", tmp_path / "store")
    copy = tmp_path / "project"
    shutil.copytree(trained, copy, symlinks=True)
    git_commit(copy, "trained")
    return copy


def candidate_scores(project: Path, folder: Path) -> dict[str, Any]:
    return dict(read_json(project / folder / "evaluation" / "report.json", "")["scores"]["candidate"])


def evaluated_anew(project: Path, folder: Path, config: Path) -> dict[str, Any]:
    nestune(project, "evaluate", "--config", str(config))
    return candidate_scores(project, folder)


def hash_of(project: Path, path: str) -> str:
    """The hash that git keeps for a path in DVC."""
    outputs = [out for stage in read_lock(project).values() for out in stage["outs"]]
    return str(next(out["md5"] for out in outputs if out["path"] == path))


def read_lock(project: Path) -> dict[str, Any]:
    return dict(yaml.safe_load((project / "dvc.lock").read_text())["stages"])


def test_after_a_flow_run_dvc_has_nothing_to_do_and_the_remote_has_it_all(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert NOTHING_TO_DO in dvc(trained, "status")
    repro = dvc(trained, "repro")
    assert "Running stage" not in repro
    assert NOTHING_TO_DO in repro
    assert "in sync" in dvc(trained, "status", "--cloud")

    monkeypatch.chdir(trained)
    registered = json.loads((RUN / "registration.json").read_text())
    config = nestune_registry(trained)
    tag = connect(config).get_model_version(registered["model"], registered["version"]).tags["dvc"]
    data = yaml.safe_load((trained / "data.dvc").read_text())["outs"][0]["md5"]
    for path, hashed in {f"{RUN}/candidate": None, f"{RUN}/dataset": None, "data": data}.items():
        assert f"{path}={hashed or hash_of(trained, path)}" in tag.split()


def nestune_registry(project: Path) -> Any:
    from nestune.config import load_config

    return load_config(project / CONFIG).registry


def test_in_a_fresh_clone_dvc_pull_brings_all_of_it_and_nothing_is_to_be_done(project: Path, tmp_path: Path) -> None:
    git(tmp_path, "clone", "-q", str(project), "clone")
    clone = tmp_path / "clone"
    assert not (clone / "runs").exists()
    dvc(clone, "pull")
    repro = dvc(clone, "repro")
    assert "Running stage" not in repro
    assert NOTHING_TO_DO in repro
    weights = RUN / "candidate" / "adapter_model.safetensors"
    assert (clone / weights).read_bytes() == (project / weights).read_bytes()
    assert evaluated_anew(clone, RUN, CONFIG) == candidate_scores(project, RUN)


def test_a_checkout_of_an_old_revision_brings_data_and_adapter_back_with_the_same_figures(project: Path) -> None:
    first, rows = git(project, "rev-parse", "HEAD"), (project / "data/new_facts/train.jsonl").read_bytes()
    scores = {RUN: candidate_scores(project, RUN)}

    # The next week has other rows, and a run of its own.
    week2, train = Path("runs/week2"), project / "data/new_facts/train.jsonl"
    train.write_bytes(b"".join(reversed(rows.splitlines(keepends=True)[8:])))
    more = ["--name", "week2", "--set", "training.learning_rate=5.0e-3"]
    told = nestune(project, "run", "--config", str(CONFIG), *more).stdout
    assert "git add adapters/week2.dvc data.dvc" in told
    scores[week2] = candidate_scores(project, week2)
    assert scores[week2] != scores[RUN]
    # dvc.yaml describes the other run, which is now of older data than what is there.
    assert "up to date" in dvc(project, "status", "adapters/week2.dvc", "data.dvc")
    second = git_commit(project, "week 2")

    # In the third, the run of the first is trained anew.
    change(project, "learning_rate: 0.002", "learning_rate: 0.004")
    nestune(project, "run", "--config", str(CONFIG), "--force")
    assert candidate_scores(project, RUN) != scores[RUN]
    assert NOTHING_TO_DO in dvc(project, "status")
    git_commit(project, "week 3")

    shutil.rmtree(project / "runs")
    git(project, "checkout", "-q", second)
    dvc(project, "checkout")
    assert train.read_bytes() != rows
    assert evaluated_anew(project, week2, week2 / "config.yaml") == scores[week2]
    git(project, "checkout", "-q", first)
    dvc(project, "checkout", "--force")
    assert train.read_bytes() == rows
    assert evaluated_anew(project, RUN, CONFIG) == scores[RUN]


def test_a_sweep_by_dvc_trains_with_each_value_and_one_is_taken(project: Path) -> None:
    for value in ("0.001", "0.004"):
        dvc(project, "exp", "run", "--name", f"lr-{value}", "-S", f"{CONFIG}:training.learning_rate={value}")
    table = json.loads(dvc(project, "exp", "show", "--json"))
    rates = {
        experiment["name"]: rev["data"]["params"][str(CONFIG)]["data"]["training"]["learning_rate"]
        for row in table
        for experiment in row["experiments"] or []
        for rev in experiment["revs"]
    }
    assert rates == {"lr-0.001": 0.001, "lr-0.004": 0.004}
    faster = hash_of(project, f"{RUN}/candidate")
    dvc(project, "exp", "apply", "lr-0.001")
    assert "learning_rate: 0.001" in (project / CONFIG).read_text()
    assert hash_of(project, f"{RUN}/candidate") != faster
    assert "Running stage 'train'" not in dvc(project, "repro")


def test_a_dataset_that_changed_since_validation_is_not_trained_on(project: Path) -> None:
    train = project / RUN / "dataset" / "train.jsonl"
    train.write_text(train.read_text().replace("?", "!", 1))
    (project / RUN / "dataset" / "retention" / "skill.jsonl").unlink()
    refused = nestune(project, "train", "--config", str(CONFIG), "--force", expect=1).stderr
    assert "train.jsonl, retention/skill.jsonl changed since validation. Run nestune validate again." in refused
