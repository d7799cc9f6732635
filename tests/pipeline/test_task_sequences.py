"""Tasks in sequence from the command line: the chain of adapters, the matrix, and going on where it was ended."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.pipeline.conftest import ROOT

from nestune import cli
from nestune.config import RegistryConfig, load_config
from nestune.evaluation.scores import MODELS
from nestune.files import read_json, sha256_file, write_json
from nestune.registry.connection import connect
from nestune.registry.parent_run import PARENT_TAG
from nestune.runs import RunPaths
from nestune.stages.continual import _following
from nestune.stages.scoring import held_out_file

TASKS = ("facts", "style")
NAMES = [f"continual-{task}" for task in TASKS]
WEIGHTS = "candidate/adapter_model.safetensors"


def few_rows(path: str, count: int) -> str:
    """The first rows of one of the demo's files, as a file of its own."""
    lines = Path(path).read_text().splitlines(keepends=True)
    copy = Path(path.replace("data/", "").replace("/", "_"))
    copy.write_text("".join(lines[:count]))
    return str(copy)


@pytest.fixture
def tasks(project: Path) -> list[str]:
    """Two of the demo's three tasks, a few rows and steps of each."""
    paths = []
    for task in TASKS:
        content: dict[str, Any] = yaml.safe_load((ROOT / "configs" / f"continual_{task}.yaml").read_text())
        content["training"] |= {"steps": 3, "eval_every": 3}
        content["data"] |= {key: few_rows(content["data"][key], 24) for key in ("train", "valid")}
        content["data"]["retention"] = {"covered": few_rows("data/general/covered.jsonl", 20)}
        replay = {"files": few_rows("data/general/replay.jsonl", 40), "earlier_tasks": task != TASKS[0]}
        content["retention"] = {"recipe": "none", "replay": replay}
        (project / f"{task}.yaml").write_text(yaml.safe_dump(content))
        paths.append(f"{task}.yaml")
    return paths


def weights() -> dict[str, str]:
    return {name: sha256_file(Path("runs", name, WEIGHTS)) for name in NAMES if Path("runs", name, WEIGHTS).exists()}


def test_a_sequence_is_a_chain_of_adapters_whose_scores_make_the_matrix(
    tasks: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["continual", *tasks, "--name", "both"]
    # Ended after the first task, as by a machine that goes down.
    assert cli.main(["continual", tasks[0], "--name", "both", "--json"]) == 0
    first = weights()
    assert list(first) == NAMES[:1]
    capsys.readouterr()
    assert cli.main([*command, "--joint", f"runs/{NAMES[0]}/candidate"]) == 0
    told = capsys.readouterr().out
    assert f"{NAMES[0]}:\n  was trained and evaluated already: nothing was done" in told
    made = weights()
    assert made | first == made

    report = json.loads(Path("runs/both/continual.json").read_text())
    assert [task["adapter_sha256"] for task in report["lineage"]] == list(made.values())
    evaluations = {name: json.loads(Path("runs", name, "evaluation/report.json").read_text()) for name in NAMES}
    assert evaluations[NAMES[1]]["adapters"]["parent"] == made[NAMES[0]]
    assert list(evaluations[NAMES[1]]["scores"]["candidate"]) == ["new_task", "covered", f"task_{NAMES[0]}"]
    # Each evaluation has scored a part of the same matrix.
    matrix = [[cell["value"] for cell in row] for row in report["tasks"]["scores"]]
    for place, name in enumerate(NAMES):
        scored = evaluations[name]["scores"]
        rows = {"base": 0, "parent": place, "candidate": place + 1}
        assert rows.keys() <= set(MODELS)
        for model, row in rows.items():
            assert matrix[row][place] == scored[model]["new_task"]["exact_match"]
            for column in range(place):
                assert matrix[row][column] == scored[model][f"task_{NAMES[column]}"]["exact_match"]
            assert report["general"]["scores"][row][0]["value"] == scored[model]["covered"]["exact_match"]
    metrics = {name: metric["value"] for name, metric in report["metrics"].items()}
    assert metrics["average_accuracy"] == pytest.approx(sum(matrix[2]) / 2)
    assert metrics["backward_transfer"] == pytest.approx(matrix[2][0] - matrix[1][0])
    joint = [cell["value"] for cell in report["tasks"]["joint"]]
    assert joint == matrix[1]
    assert metrics["intransigence"] == pytest.approx(sum(joint[j] - matrix[j + 1][j] for j in range(2)) / 2)
    assert Path("runs/both/continual.html").read_text().count("<tr>") >= 3
    assert Path("runs/both/continual.png").read_bytes().startswith(b"\x89PNG")

    _mlflow_shows_the_sequence(load_config(Path(tasks[0])).registry, metrics)

    # Once more: nothing is trained, and the same is said.
    before = {path: sha256_file(path) for path in Path("runs/both").glob("continual.*")}
    with_joint = [*command, "--joint", f"runs/{NAMES[0]}/candidate"]
    assert cli.main([*with_joint, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["lineage"] == report["lineage"]
    assert {path: sha256_file(path) for path in before} == before

    # A task whose parent was trained anew since is not taken for one of this sequence.
    evaluation = Path("runs", NAMES[1], "evaluation/report.json")
    write_json(evaluation, evaluations[NAMES[1]] | {"adapters": {"parent": "0" * 64}})
    assert cli.main(command) == 1
    told = capsys.readouterr().err
    assert f"{NAMES[1]} was trained from an adapter with sha256 {'0' * 12}, and runs/{NAMES[0]}" in told
    assert "--force" in told
    assert cli.main([*command, "--force", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["lineage"] == report["lineage"]
    assert json.loads(evaluation.read_text())["adapters"]["parent"] == made[NAMES[0]]


def _mlflow_shows_the_sequence(registry: RegistryConfig, metrics: dict[str, float]) -> None:
    """One MLflow run above those of the tasks, with the figures; below, each with the rows that it is made of."""
    client = connect(registry)
    children = [client.get_run(read_json(RunPaths.of(name).tracking, "")["run_id"]) for name in NAMES]
    (parent,) = map(client.get_run, {child.data.tags[PARENT_TAG] for child in children})
    assert (parent.info.run_name, parent.info.status) == ("both (sequence)", "FINISHED")
    assert parent.data.metrics == {f"sequence/{name}": pytest.approx(value) for name, value in metrics.items()}
    assert {file.path for file in client.list_artifacts(parent.info.run_id)} == {
        f"continual.{ending}" for ending in ("json", "png", "html")
    }
    shown = {one.dataset.name: one for one in children[1].inputs.dataset_inputs}
    contexts = {name: {tag.key: tag.value for tag in one.tags}["mlflow.data.context"] for name, one in shown.items()}
    assert contexts == {
        "train": "training",
        "valid": "validation",
        "replay/0": "replay",
        "replay/1": "replay",
        "retention/covered": "retention",
        f"retention/task_{NAMES[0]}": "retention",
    }
    for one in shown.values():
        file = Path(json.loads(one.dataset.source)["uri"])
        assert sha256_file(file).startswith(one.dataset.digest)
        assert json.loads(one.dataset.profile)["records"] == len(file.read_text().splitlines())


def test_an_adapter_to_compare_with_that_is_not_there_is_told_before_anything_is_trained(
    tasks: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["continual", *tasks, "--joint", "nowhere"]) == 2
    assert "'nowhere': no such folder" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_any_model_is_scored_on_a_task_from_the_command_line(
    tasks: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    score = ["evaluate", "--config", tasks[0], "--adapter", "base"]
    assert cli.main(score) == 1
    assert "Run nestune validate." in capsys.readouterr().err
    assert cli.main(["validate", "--config", tasks[0]]) == 0
    before = {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*")}
    capsys.readouterr()
    assert cli.main([*score, "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    assert {name: score["answers"] for name, score in scores.items()} == {"new_task": 24, "covered": 20}
    assert scores["covered"]["interval"][1] == scores["covered"]["exact_match"] == 1.0  # what the base has learned
    assert {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*")} == before
    assert cli.main(["evaluate", "--config", tasks[0], "--out", "scores.json"]) == 2
    assert "--out and --lm-eval go with --adapter" in capsys.readouterr().err


def test_configurations_that_make_no_sequence_are_refused_with_every_reason(
    tasks: list[str], project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = yaml.safe_load(Path(tasks[1]).read_text())
    other["model"]["adapter"] = "somewhere"
    other["data"]["retention"] = {"covered": tasks[0], "task_old": tasks[0]}
    Path(tasks[1]).write_text(yaml.safe_dump(other))
    assert cli.main(["continual", tasks[0], tasks[1], tasks[1], "--name", NAMES[0]]) == 2
    told = capsys.readouterr().err
    for fault in (
        f"{NAMES[1]} is the name of 2 tasks",
        f"{NAMES[0]} is the name of a task and of the sequence",
        f"{NAMES[1]} sets model.adapter, which the task before it decides",
        f"the retention set covered of {NAMES[1]} has other files than before",
        f"the retention set task_old of {NAMES[1]} is named like a task",
    ):
        assert fault in told
    assert not Path("runs").exists()


@pytest.mark.parametrize("found_by_lineage", [False, True])
def test_what_an_earlier_task_holds_out_is_measured_once(tasks: list[str], found_by_lineage: bool) -> None:
    first, second = (load_config(Path(path)) for path in tasks)
    replay = second.retention.replay.model_copy(update={"earlier_tasks": found_by_lineage})
    second = second.model_copy(update={"retention": second.retention.model_copy(update={"replay": replay})})
    run = RunPaths.of(first.name)
    run.candidate.mkdir(parents=True)
    run.dataset.mkdir()
    held_out_file(run).write_text("")
    following = _following(second, [first])
    assert following.model.adapter == f"runs/{first.name}/candidate"
    named = [] if found_by_lineage else [f"task_{first.name}"]
    assert list(following.data.retention) == ["covered", *named]
    assert _following(first, []) == first
