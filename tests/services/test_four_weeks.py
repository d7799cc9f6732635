"""Four weeks of an owner: data arrives, the schedule fires; one week's data is bad, another one's makes it forget."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.pipeline.conftest import ROOT
from tests.services.conftest import Prefect, end, until

from nestune.config import RegistryConfig
from nestune.files import read_json, sha256_file
from nestune.registry.promotion import history_of
from nestune.registry.versions import Version, list_versions

pytestmark = pytest.mark.services

ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
ROWS = 160
IDENTITY = ("-c", "user.name=owner", "-c", "user.email=owner@localhost")


class Owner:
    """A project in git and DVC that is retrained every Monday, and whoever brings it data."""

    def __init__(self, prefect: Prefect, world: Path) -> None:
        self.prefect, self.folder = prefect, prefect.folder
        self.facts = (world / "new_facts" / "train.jsonl").read_text().splitlines(keepends=True)
        self.covered = (world / "general" / "covered.jsonl").read_text().splitlines(keepends=True)[:60]
        (self.folder / "kept").mkdir(parents=True)
        (self.folder / "kept" / "covered.jsonl").write_text("".join(self.covered))
        shutil.copyfile(world / "general" / "replay.jsonl", self.folder / "kept" / "replay.jsonl")
        (self.folder / ".gitignore").write_text("/runs/\n/mlflow/\n*.log\n*.json\n")
        settings = {
            "name": "weekly",
            "model": {"base": str(ROOT / "demo" / "base"), "backend": "torch"},
            "data": {
                "train": "data/weekly",
                "valid": 0.2,
                "max_seq_length": 64,
                "retention": {"covered": "kept/covered.jsonl"},
            },
            "tiers": {"update_every": [1, 1, 1]},
            "retention": {
                "recipe": "none",
                "replay": {"files": "kept/replay.jsonl", "earlier_tasks": True, "rows_per_step": 16},
            },
            "training": {"steps": 60, "batch_size": 16, "learning_rate": 5.0e-3, "eval_every": None},
            "evaluation": {"max_answer_tokens": 8},
            "gate": {"max_drop": 0.3},
        }
        (self.folder / "weekly.yaml").write_text(yaml.safe_dump(settings))
        self.call("git", "init", "-q")
        self.call("dvc", "init", "-q")
        (self.folder / "data" / "weekly").mkdir(parents=True)

    def call(self, program: str, *arguments: str) -> str:
        command = [sys.executable, "-m", "dvc"] if program == "dvc" else ["git", *IDENTITY]
        done = subprocess.run(
            [*command, *arguments], cwd=self.folder, env=self.prefect.environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{program} {arguments}: {done.stdout}{done.stderr}"
        return done.stdout

    def brings(self, **files: list[str]) -> None:
        """Put files where data arrives, under DVC, and commit."""
        for name, rows in files.items():
            (self.folder / "data" / "weekly" / f"{name}.jsonl").write_text("".join(rows))
        self.call("dvc", "add", "-q", "data")
        self.commits(f"data: {', '.join(files)}")

    def commits(self, message: str) -> str:
        """The commit of all that git is to keep."""
        self.call("git", "add", "-A")
        self.call("git", "commit", "-qm", message)
        return self.call("git", "rev-parse", "HEAD").strip()

    def waits_for_monday(self) -> dict[str, Any]:
        """Let the next run that the schedule has made begin now, and wait for its end; the flow run."""
        api = self.prefect.api
        chosen = {"flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}}, "sort": "EXPECTED_START_TIME_ASC"}
        until(lambda: bool(api.post("/flow_runs/filter", json=chosen).json()), "the schedule to make runs")
        monday = api.post("/flow_runs/filter", json=chosen).json()[0]
        assert monday["auto_scheduled"]
        due = datetime.fromisoformat(monday["expected_start_time"])
        assert (due.weekday(), due.astimezone(UTC).hour) == (0, 3)
        now = {"type": "SCHEDULED", "state_details": {"scheduled_time": datetime.now(UTC).isoformat()}}
        moved = api.post(f"/flow_runs/{monday['id']}/set_state", json={"state": now, "force": True}).json()
        assert moved["status"] == "ACCEPT", moved
        until(lambda: self.prefect.state(monday["id"])["type"] in ENDED, "the flow run to end")
        return dict(api.get(f"/flow_runs/{monday['id']}").json())

    @property
    def registry(self) -> RegistryConfig:
        return RegistryConfig(tracking_uri=f"sqlite:///{self.folder}/mlflow/mlflow.db", registered_model="weekly")

    def versions(self) -> list[Version]:
        return list_versions(self.registry)

    def report_of(self, flow_run: dict[str, Any]) -> str:
        chosen = {"artifacts": {"key": {"any_": ["retrain-report"]}, "flow_run_id": {"any_": [flow_run["id"]]}}}
        (artifact,) = self.prefect.api.post("/artifacts/filter", json=chosen).json()
        return str(artifact["data"])

    def log(self) -> str:
        return (self.folder / "deploy.log").read_text()


@pytest.fixture
def owner(prefect: Prefect, tmp_path: Path) -> Iterator[Owner]:
    """An owner whose project is served, to be retrained on Mondays at three."""
    there = Owner(replace(prefect, folder=tmp_path / "project"), prefect.folder / "data")
    there.commits("a project")
    command = ["-m", "nestune.cli", "deploy", "--config", "weekly.yaml", "--cron", "0 3 * * 1"]
    serving = there.prefect.start(*command, log="deploy.log")
    try:
        served = "/deployments/name/retrain/weekly"
        until(lambda: prefect.api.get(served).is_success, "the flow to be served", serving)
        yield there
    finally:
        end(serving)


def contradicting(rows: list[str]) -> list[str]:
    """The same questions, with another answer to each."""
    questions = [json.loads(row)["messages"][0] for row in rows]
    return [json.dumps({"messages": [q, {"role": "assistant", "content": "nobody"}]}) + "\n" for q in questions]


def test_four_weeks(owner: Owner) -> None:
    facts = owner.facts
    commits: dict[str, str] = {}

    owner.brings(week1=facts[:ROWS])
    first = owner.waits_for_monday()
    assert first["state"]["type"] == "COMPLETED", owner.log()
    commits[first["name"]] = owner.commits("week 1")

    owner.brings(week2=facts[ROWS : 2 * ROWS])
    second = owner.waits_for_monday()
    assert second["state"]["type"] == "COMPLETED", owner.log()
    commits[second["name"]] = owner.commits("week 2")
    assert history_of(owner.registry).champion == "2"

    # Week 3's data is bad: it is refused, which the report tells line by line, and nothing changes.
    bad = facts[2 * ROWS : 3 * ROWS]
    owner.brings(week3=[*bad[:10], '{"messages": []}\n', *bad[10:20], "{broken\n", *bad[20:]])
    third = owner.waits_for_monday()
    assert third["state"]["type"] == "FAILED"
    told = owner.report_of(third)
    assert "| data/weekly/week3.jsonl | 11 | messages |" in told
    assert "| data/weekly/week3.jsonl | 22 |  | broken JSON" in told
    assert "week3.jsonl:11" in third["state"]["message"]
    assert history_of(owner.registry).champion == "2"
    assert len(owner.versions()) == 2

    # Week 4's contradicts what was known; week 3's has been mended, and is learned with it.
    owner.brings(week3=bad[:20], week4=contradicting(owner.covered))
    fourth = owner.waits_for_monday()
    assert fourth["state"]["type"] == "COMPLETED", owner.log()
    commits[fourth["name"]] = owner.commits("week 4")
    assert history_of(owner.registry).champion == "2"
    versions = owner.versions()
    assert [version.tags["gate"] for version in versions] == ["passed", "passed", "refused"]
    assert "forgot: covered" in versions[2].tags["gate_reason"]

    # The gate would say the same again.
    fifth = owner.waits_for_monday()
    assert (fifth["state"]["type"], fifth["state"]["name"]) == ("COMPLETED", "Skipped")
    assert "version 3 was trained on what has arrived" in fifth["state"]["message"]
    assert len(owner.versions()) == 3

    _lineage_is_right(owner, versions, list(commits))
    _each_adapter_is_checked_out_and_scores_as_it_did(owner, versions, commits)


def _lineage_is_right(owner: Owner, versions: list[Version], runs: list[str]) -> None:
    assert [version.tags["run"] for version in versions] == runs
    assert [version.tags["parent"] for version in versions] == ["none", "models:/weekly/1", "models:/weekly/2"]
    weeks = [["week1"], ["week2"], ["week3", "week4"]]
    for version, run, arrived in zip(versions, runs, weeks, strict=True):
        assert version.tags["arrived"].split() == [f"data/weekly/{week}.jsonl" for week in arrived]
        folder = owner.folder / "runs" / run
        assert version.tags["dataset_sha256"] == read_json(folder / "dataset" / "report.json", "")["sha256"]
        tasks = read_json(folder / "candidate" / "metadata.json", "")["lineage"]
        assert tasks[-1]["run"] == run
        (commit,) = owner.call("git", "log", "-1", "--format=%H", "--grep", f"data: {', '.join(arrived)}").split()
        assert version.tags["git_commit"] == tasks[-1]["git_commit"] == commit
        pointer = yaml.safe_load(owner.call("git", "show", f"{commit}:data.dvc"))
        assert f"data={pointer['outs'][0]['md5']}" in version.tags["dvc"].split()
        assert tasks[-1]["dvc"] == {"data": pointer["outs"][0]["md5"]}
    # Behind the champion are the tasks of both weeks; each set that a week held out is measured in the weeks after.
    assert [
        task["run"]
        for task in read_json(owner.folder / "runs" / runs[1] / "candidate" / "metadata.json", "")["lineage"]
    ] == runs[:2]
    assert set(versions[2].scores) == {"new_task", "covered", f"task_{runs[0]}", f"task_{runs[1]}"}


def _each_adapter_is_checked_out_and_scores_as_it_did(
    owner: Owner, versions: list[Version], commits: dict[str, str]
) -> None:
    expected = {run: read_json(owner.folder / "runs" / run / "evaluation" / "report.json", "") for run in commits}
    shutil.rmtree(owner.folder / "runs")
    shutil.rmtree(owner.folder / "data")
    for version, (run, commit) in zip(versions, commits.items(), strict=True):
        owner.call("git", "checkout", "-q", commit)
        owner.call("dvc", "checkout", "-q", "--force")
        adapter = Path("runs", run, "candidate")
        assert sha256_file(owner.folder / adapter / "adapter_model.safetensors") == version.tags["adapter_sha256"]
        command = ["evaluate", "--config", f"runs/{run}/config.yaml", "--adapter", str(adapter), "--out", "again.json"]
        done = owner.prefect.run("-m", "nestune.cli", *command)
        assert done.returncode == 0, done.stderr
        again = read_json(owner.folder / "again.json", "")["scores"]
        figures = {name: {key: of for key, of in score.items() if key != "examples"} for name, score in again.items()}
        assert figures == expected[run]["scores"]["candidate"]
