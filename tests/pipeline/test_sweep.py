"""A sweep trains every point of a grid as a run of its own, and registers the best that the gate lets pass."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.pipeline.conftest import ROOT, Configured, run_python

from nestune.config import RunConfig, load_config
from nestune.errors import ConfigError
from nestune.files import read_json, sha256_file, write_json
from nestune.flows.sweep import sweep_once
from nestune.registry.connection import connect
from nestune.registry.versions import list_versions
from nestune.runs import RunPaths
from nestune.stages.sweep import Point, outcome_of, points, ranked

PERIODS = [[1, 1, 1], [1, 2, 4]]


def test_every_point_is_a_run_below_one_mlflow_run_and_the_best_is_registered(configured: Configured) -> None:
    path = configured(
        gate={"min_gain": 0.0, "max_drop": 1.0}, data={"retention": {"skill": "data/general/skill.jsonl"}}
    )
    command = [ROOT / "flows" / "sweep.py", "--config", path, "--name", "swept", "--set", "model.backend=torch"]
    command += ["--grid", f"tiers.update_every={PERIODS}", "--grid", "training.steps=[4]"]
    said = run_python(*command)
    config = load_config(path, [], "swept")
    names = ["swept-1", "swept-2"]
    trained = {name: yaml.safe_load(RunPaths.of(name).config.read_text()) for name in names}
    assert [trained[name]["tiers"]["update_every"] for name in names] == PERIODS
    (version,) = list_versions(config.registry)
    assert f"best: {version.tags['run']}" in said.stderr + said.stdout
    assert "Flow run 'swept' - Finished in state Completed()" in said.stderr
    client = connect(config.registry)
    parents = {
        client.get_run(read_json(RunPaths.of(name).tracking, "")["run_id"]).data.tags["mlflow.parentRunId"]
        for name in names
    }
    (parent,) = map(client.get_run, parents)
    assert (parent.info.status, parent.data.tags["best"]) == ("FINISHED", version.tags["run"])

    # The same again trains nothing, and makes no further version.
    weights = [sha256_file(RunPaths.of(name).metrics / "train_metrics.jsonl") for name in names]
    run_python(*command)
    assert [sha256_file(RunPaths.of(name).metrics / "train_metrics.jsonl") for name in names] == weights
    assert len(list_versions(config.registry)) == 1


def test_a_grid_that_is_none_is_refused(configured: Configured) -> None:
    path = configured()
    for grid in ({}, {"training.steps": []}, {"training.steps": range(1, 40), "training.seed": range(40)}):
        with pytest.raises(ConfigError, match=r"the grid has \d+ points; 1 to 1000 are allowed"):
            points(path, [], None, {key: list(values) for key, values in grid.items()})
    with pytest.raises(ConfigError, match=r"learning_rate"):
        points(path, [], None, {"training.learning_rate": [1e-3, -1.0]})
    # Before there is a flow run, whose failure would be all that Prefect shows.
    with pytest.raises(ConfigError, match=r"lerning_rate"):
        sweep_once(Path(path), {"training.lerning_rate": [1e-3]}, [], None)


def score(exact_match: float | None, loss: float = 1.0) -> dict[str, float | None]:
    return {"exact_match": exact_match, "loss": loss}


def evaluated(config: RunConfig, name: str, passed: bool, new: Mapping[str, Any], kept: Mapping[str, Any]) -> Point:
    """A point with parent scores of 0.2 on the new task, and 0.8 and 2 nats on what is kept."""
    scores = {
        "parent": {"new_task": score(0.2), "kept": score(0.8), "text": score(None, 2.0)},
        "candidate": {"new_task": new, "kept": kept, "text": score(None, 2.0)},
    }
    report = {"scores": scores, "passed": passed, "reason": ""}
    write_json(RunPaths.of(name).evaluation / "report.json", report)
    return Point({}, config.model_copy(update={"name": name}))


def test_the_gate_comes_first_then_what_was_learned_less_what_was_lost(configured: Configured) -> None:
    config = load_config(Path(configured()))
    made = [
        evaluated(config, "refused", False, score(1.0), score(0.8)),
        evaluated(config, "forgetful", True, score(0.8), score(0.4)),
        evaluated(config, "steady", True, score(0.6), score(0.72)),
    ]
    outcomes = {outcome.point.config.name: outcome for outcome in ranked([outcome_of(point) for point in made])}
    assert list(outcomes) == ["steady", "forgetful", "refused"]
    assert outcomes["steady"].learned == pytest.approx((0.6 - 0.2) / 0.8)
    assert outcomes["steady"].lost == pytest.approx((0.8 - 0.72) / 0.8)
    assert outcomes["forgetful"].lost == pytest.approx(0.5)
