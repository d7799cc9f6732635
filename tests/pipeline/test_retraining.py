"""What a scheduled retraining finds to be new, week by week, and what it does with data that was refused."""

import json
import re
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.pipeline.conftest import ROOT

pytest.importorskip("torch")

from nestune.config import RunConfig, load_config
from nestune.errors import ConfigError, DataError
from nestune.files import read_json, sha256_file
from nestune.registry.promotion import history_of
from nestune.registry.versions import list_versions
from nestune.runs import RunPaths
from nestune.stages.assign import assign
from nestune.stages.evaluate import evaluate
from nestune.stages.finished import check_before_running
from nestune.stages.promote import promote, rollback
from nestune.stages.register import decide, register
from nestune.stages.retraining import NothingToDo, Retraining, plan_retraining
from nestune.stages.train import train
from nestune.stages.validate import validate

DAY = date(2026, 11, 30)


@pytest.fixture
def folder(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder; nothing has arrived yet, and whatever is trained passes the gate."""
    (tmp_path / "weekly").mkdir()
    covered = (world / "general" / "covered.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "covered.jsonl").write_text("".join(covered[:8]))
    blocks = {
        "name": "weekly",
        "model": {"base": str(ROOT / "demo" / "base"), "backend": "torch", "adapter": "models:/weekly@champion"},
        "data": {"train": "weekly", "valid": 0.25, "max_seq_length": 64, "retention": {"covered": "covered.jsonl"}},
        "retention": {"recipe": "none"},
        "training": {"steps": 2, "batch_size": 4, "eval_every": None},
        "evaluation": {"max_answer_tokens": 4},
        "gate": {"min_gain": 0.0, "max_drop": 1.0},
    }
    (tmp_path / "weekly.yaml").write_text(yaml.safe_dump(blocks))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def facts(world: Path) -> list[str]:
    return (world / "new_facts" / "train.jsonl").read_text().splitlines(keepends=True)


def arrive(name: str, rows: list[str]) -> Path:
    path = Path("weekly", name)
    path.write_text("".join(rows))
    return path


def configured(*overrides: str) -> RunConfig:
    return load_config(Path("weekly.yaml"), overrides)


def plan(*overrides: str, force: bool = False) -> Retraining:
    planned = plan_retraining(configured(*overrides), DAY, force)
    assert isinstance(planned, Retraining), planned
    return planned


def nothing(*overrides: str, force: bool = False) -> str:
    planned = plan_retraining(configured(*overrides), DAY, force)
    assert isinstance(planned, NothingToDo), planned
    return planned.reason


def content(line: str) -> str:
    return json.dumps(json.loads(line))


def retrain(planned: Retraining, until: str = "register") -> dict[str, Any]:
    config, run = planned.config, RunPaths.of(planned.config.name)
    validate(config, run)
    planned.note(run)
    for name, stage in (("tiers", assign), ("train", train), ("evaluate", evaluate), ("register", register)):
        result = stage(config, run)  # type: ignore[operator]
        if name == until:
            break
    return dict(result.as_dict())


def test_each_week_learns_the_files_that_came_since_upon_the_champion_and_is_measured_on_all_weeks(
    folder: Path, facts: list[str]
) -> None:
    first = arrive("week1.jsonl", facts[:16])
    planned = plan()
    assert (planned.champion, planned.config.model.adapter) == (None, None)
    assert planned.config.name == "weekly-2026-11-30"
    assert retrain(planned)["promoted"]
    assert "version 1, or one behind it, was trained on every file of data.train (1)" in nothing()
    assert "nothing has arrived" in nothing(force=True)

    second = arrive("week2.jsonl", facts[16:32])
    planned = plan()
    assert (planned.champion, planned.config.model.adapter) == ("1", "models:/weekly/1")
    assert planned.config.data.train == (str(second),)
    assert planned.config.name == "weekly-2026-11-30-2"
    retrain(planned)
    report = read_json(RunPaths.of(planned.config.name).evaluation / "report.json", "")
    assert set(report["scores"]["candidate"]) == {"new_task", "covered", "task_weekly-2026-11-30"}
    versions = list_versions(configured().registry)
    assert [version.tags["parent"] for version in versions] == ["none", "models:/weekly/1"]
    assert [version.tags["arrived"] for version in versions] == [str(first), str(second)]
    lineage = read_json(RunPaths.of(planned.config.name).candidate / "metadata.json", "")["lineage"]
    assert [list(task["sources"]["train"].values()) for task in lineage] == [
        [sha256_file(first)],
        [sha256_file(second)],
    ]

    # A file that is moved, and one of which every row is known, bring nothing.
    second.rename("weekly/renamed.jsonl")
    arrive("again.jsonl", facts[20:24])
    assert "knows every record of data.train" in nothing()


def test_of_a_file_that_has_grown_the_rows_that_came_are_learned(folder: Path, facts: list[str]) -> None:
    arrive("all.jsonl", facts[:16])
    retrain(plan())
    arrive("all.jsonl", facts[:24])
    planned = plan()
    run = RunPaths.of(planned.config.name)
    told = validate(planned.config, run)
    assert "left out: 16 records of train that an earlier task has" in told.summary()
    learned = (run.dataset / "train.jsonl").read_text() + (run.dataset / "valid.jsonl").read_text()
    assert sorted(map(content, learned.splitlines())) == sorted(map(content, facts[16:24]))


def test_what_the_gate_refused_stays_new_and_is_tried_again_only_when_something_else_is(
    folder: Path, facts: list[str]
) -> None:
    first = arrive("week1.jsonl", facts[:16])
    demanding = "gate.min_gain=1.0"
    assert retrain(plan(demanding))["gate"] == "refused"
    reason = nothing(demanding)
    assert "version 1 was trained on what has arrived, with this configuration, and is not champion" in reason
    assert "did not learn: new_task" in reason
    # Force, another configuration, or more data: the refused file is in each of them.
    assert plan(demanding, force=True).config.name == "weekly-2026-11-30-2"
    assert plan(demanding, "training.steps=3").arrived == (str(first),)
    second = arrive("week2.jsonl", facts[16:32])
    assert plan(demanding).arrived == (str(first), str(second))


def test_one_that_waits_for_approval_is_asked_for_again_and_one_that_was_rolled_back_not_trained_again(
    folder: Path, facts: list[str]
) -> None:
    arrive("week1.jsonl", facts[:16])
    first = plan("registry.promote=approve")
    assert retrain(first)["waits"]
    assert history_of(configured().registry).champion is None
    asked = plan("registry.promote=approve")
    assert asked.config == first.config
    finished = check_before_running(asked.config, RunPaths.of(asked.config.name))
    assert finished is not None
    assert finished.as_dict()["waits"]
    decide(asked.config, RunPaths.of(asked.config.name), False, "not now")
    assert "the gate let it pass: learned" in nothing("registry.promote=approve")
    assert "(not approved: not now)" in nothing("registry.promote=approve")
    promote(configured().registry, "1")
    arrive("week2.jsonl", facts[16:32])
    assert retrain(plan())["promoted"]
    rollback(configured().registry, "too rude")
    assert "version 2 was trained on what has arrived" in nothing()
    assert re.search(r"; rolled back by \S+ at \S+: too rude\. It would end so again", nothing())


def test_bad_rows_stop_it_until_they_are_mended(folder: Path, facts: list[str]) -> None:
    bad = arrive("week1.jsonl", [*facts[:8], '{"messages": []}\n', *facts[8:16]])
    planned = plan()
    with pytest.raises(DataError, match=r"weekly/week1\.jsonl:9: messages: "):
        retrain(planned)
    assert not RunPaths.of(planned.config.name).dataset.exists()
    assert plan().arrived == (str(bad),)
    arrive("week1.jsonl", facts[:16])
    assert retrain(plan())["promoted"]


def test_an_interrupted_one_is_gone_on_with_and_a_finished_one_never_overwritten(
    folder: Path, facts: list[str]
) -> None:
    arrive("week1.jsonl", facts[:16])
    interrupted = plan()
    retrain(interrupted, until="train")
    assert plan().config == interrupted.config
    # Other data is another attempt, in another folder.
    arrive("week2.jsonl", facts[16:32])
    assert plan().config.name == "weekly-2026-11-30-2"
    Path("weekly/week2.jsonl").unlink()
    trained = sha256_file(RunPaths.of(interrupted.config.name).candidate / "adapter_model.safetensors")
    retrain(plan())
    assert sha256_file(RunPaths.of(interrupted.config.name).candidate / "adapter_model.safetensors") == trained


def test_rows_of_an_earlier_task_that_are_gone_are_asked_for(folder: Path, facts: list[str]) -> None:
    week = arrive("week1.jsonl", facts[:16])
    planned = plan()
    retrain(planned)
    dataset = RunPaths.of(planned.config.name).dataset
    dataset.rename("aside")
    arrive("week2.jsonl", facts[16:32])
    # They are made anew of the file that they came from.
    again = plan()
    (held_out,) = again.config.data.retention["task_weekly-2026-11-30"]
    assert held_out.startswith("runs/weekly/earlier/")
    assert Path(held_out).read_bytes() == Path("aside/valid.jsonl").read_bytes()
    for path in Path("runs/weekly/earlier").iterdir():
        path.unlink()
    week.unlink()
    with pytest.raises(ConfigError, match="what was learned before cannot be told from what is new without them"):
        plan()
