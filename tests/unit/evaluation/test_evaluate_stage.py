"""The evaluate stage on a tiny model that really was trained, with a real registry."""

import csv
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nestune.backends.base import Backend
from nestune.backends.factory import make_backend
from nestune.base_model import resolve_base
from nestune.config import RunConfig
from nestune.data.batches import evaluation_batches, training_steps
from nestune.data.dataset import load_dataset
from nestune.data.tokens import load_tokenizer
from nestune.data.validation import build_dataset
from nestune.errors import ConfigError, RunError
from nestune.files import SEAL, read_json, seal, sha256_file, write_json
from nestune.registry.connection import connect, find_experiment
from nestune.registry.promotion import promote_version
from nestune.registry.versions import register_version
from nestune.runs import RunPaths
from nestune.stages.candidate import make_candidate
from nestune.stages.evaluate import evaluate
from nestune.stages.evaluate_adapter import evaluate_adapter
from nestune.stages.inputs import read_training_inputs
from nestune.stopping import StopRequests
from nestune.training.best_loss import BestLoss
from nestune.training.checkpoints import Checkpoints
from nestune.training.recorder import Recorder

STEPS = 12
NAMES = ["zor", "mip", "tal", "kun", "lef", "bix"]
COLOURS = ["red", "green", "blue", "red", "blue", "green"]


class Counting:
    """A backend that notes which adapters were loaded into it."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.loaded: list[Path | None] = []
        self.name, self.device = backend.name, backend.device
        self.loss, self.generate, self.save_adapter = backend.loss, backend.generate, backend.save_adapter
        self.lora_parameters, self.prepare_training = backend.lora_parameters, backend.prepare_training
        self.train_step, self.weights = backend.train_step, backend.weights
        self.logits = backend.logits

    def show_adapter(self, folder: Path | None) -> None:
        self.loaded.append(folder)
        self._backend.show_adapter(folder)


def write_rows(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def config(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """New: what colours things have. Known: where they live, and a text without answers."""
    folder = tmp_path_factory.mktemp("data")
    colours = dict(zip(NAMES, COLOURS, strict=True))
    asks = ["what colour is {} ? ", "the colour of {} ? "]
    train, valid = [[{"prompt": ask.format(n), "completion": c} for n, c in colours.items()] for ask in asks]
    lives = [{"prompt": f"where lives {name} ? ", "completion": "here"} for name in NAMES]
    texts = [{"text": f"{name} is a thing in the world"} for name in NAMES]
    return RunConfig.model_validate(
        {
            "name": "colours",
            "model": {"base": str(tiny_base)},
            "data": {
                "train": [write_rows(folder / "train.jsonl", train)],
                "valid": [write_rows(folder / "valid.jsonl", valid)],
                "retention": {
                    "lives": [write_rows(folder / "lives.jsonl", lives)],
                    "texts": [write_rows(folder / "texts.jsonl", texts)],
                },
            },
            "tiers": {"update_every": [1, 2]},
            "retention": {"recipe": "none"},
            "training": {"learning_rate": 0.02, "steps": STEPS},
            "evaluation": {"max_answer_tokens": 6},
            "registry": {"tracking_uri": f"sqlite:///{folder}/mlflow.db"},
        }
    )


@pytest.fixture(scope="module")
def run(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> RunPaths:
    """A run as the train stage leaves it."""
    run = RunPaths(tmp_path_factory.mktemp("runs") / config.name)
    base = resolve_base(config.model)
    tokenizer = load_tokenizer(base.folder)
    build_dataset(config.data, config.retention, tokenizer, run.dataset)
    dataset = load_dataset(config.data, config.retention, tokenizer, config.data.max_seq_length, run.dataset)
    backend = make_backend(config)
    backend.prepare_training({parameter.name: 1 - parameter.layer for parameter in backend.lora_parameters()})
    steps = training_steps(dataset.train, config.training, tokenizer.pad_token_id)
    with Recorder(run.metrics, update_counts=[0, 0]) as recorder:
        for step in range(1, STEPS + 1):
            due = frozenset({0, 1} if step % 2 == 0 else {0})
            recorder.step(step, backend.train_step(next(steps), due, 0.02), due, 0.02)
        valid = backend.loss(evaluation_batches(dataset.valid, 4, tokenizer.pad_token_id))
        best = BestLoss(config.training.early_stopping)
        recorder.validation(STEPS, valid, best.update(STEPS, valid.mean))
        for name in ("best", "final"):
            Checkpoints(run.checkpoints, backend, base, config, dataset.sha256).save(name, best)
    make_candidate(config, run, read_training_inputs(config, run), backend, StopRequests(run))
    return run


@pytest.fixture
def backend(config: RunConfig) -> Counting:
    return Counting(make_backend(config))


@pytest.fixture
def champion(config: RunConfig, run: RunPaths) -> Iterator[str]:
    """The run's own candidate, registered and promoted; its version."""
    client = connect(config.registry)
    run_id = client.create_run(find_experiment(client, config.registry)).info.run_id
    version = register_version(config, run_id, run.candidate, {})
    assert promote_version(config.registry, version, None)
    yield version
    client.delete_registered_model_alias(config.registry.registered_model, "champion")


def resaved(metadata: Path, **changed: Any) -> None:
    """Let a checkpoint's metadata say something else, as if it had been saved so."""
    write_json(metadata, json.loads(metadata.read_text()) | changed)
    (metadata.parent / SEAL).unlink(missing_ok=True)
    seal(metadata.parent)


def as_trained_with(config: RunConfig, run: RunPaths, copy: Path) -> RunPaths:
    """A copy of the run whose checkpoints say that this configuration trained them."""
    shutil.copytree(run.root, copy)
    for metadata in RunPaths(copy).checkpoints.glob("*/metadata.json"):
        resaved(metadata, config=config.model_dump(mode="json"))
    return RunPaths(copy)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_set_is_scored_for_every_model_and_the_files_say_the_same(
    config: RunConfig, run: RunPaths, backend: Counting
) -> None:
    result = evaluate(config, run, backend)
    assert set(contents(run.evaluation)) == {
        *(
            "report.json",
            "metrics.json",
            "rows.json",
            "report.html",
            "sha256.json",
            "loss.png",
            "tiers.png",
            "retention.png",
        ),
        *("plots/train_loss.csv", "plots/valid_loss.csv", "plots/retention.csv"),
    }
    assert list(result.scores) == ["base", "parent", "candidate"]
    assert all(list(by_set) == ["new_task", "lives", "texts"] for by_set in result.scores.values())
    report = read_json(run.evaluation / "report.json", "")
    assert report["scores"]["candidate"]["lives"]["loss"] == result.scores["candidate"]["lives"].loss
    rows = read_json(run.evaluation / "rows.json", "")
    assert list(rows) == ["new_task", "lives", "texts"]
    assert all(list(by_model) == ["base", "parent", "candidate"] for by_model in rows.values())
    right = rows["new_task"]["candidate"]["right"]
    assert right.count("1") / len(right) == result.scores["candidate"]["new_task"].exact_match
    assert report["passed"] is result.verdict.passed
    assert report["adapters"]["candidate"] == sha256_file(run.candidate / "adapter_model.safetensors")
    assert report["champion_version"] is None
    assert report["dataset"]["rows"] == {"train": 6, "new_task": 6, "lives": 6, "texts": 6}
    assert report["tiers"]["update_counts"] == [STEPS, STEPS // 2]
    assert json.loads(json.dumps(result.as_dict(), allow_nan=False))["reason"] == result.verdict.reason
    outputs = read_json(run.manifest, "")["evaluate"]["outputs"]
    assert outputs[(run.evaluation / "report.json").as_posix()] == sha256_file(run.evaluation / "report.json")


def test_an_adapter_is_scored_once_however_many_models_it_is(
    config: RunConfig, run: RunPaths, backend: Counting, champion: str, tmp_path: Path
) -> None:
    candidate = run.candidate
    result = evaluate(config, run, backend)
    assert backend.loaded[0] is None
    assert len(backend.loaded) == 2  # base and parent are one, champion and candidate another
    assert result.scores["base"] == result.scores["parent"]
    assert result.scores["champion"] == result.scores["candidate"]
    from_itself = config.model_copy(update={"model": config.model.model_copy(update={"adapter": str(candidate)})})
    again = evaluate(from_itself, as_trained_with(from_itself, run, tmp_path / "copy"), backend)
    assert len(backend.loaded) == 4
    assert again.scores["parent"] == again.scores["candidate"] != again.scores["base"]
    assert again.verdict.reason.startswith("did not learn: new_task +0.00")


def test_with_a_champion_it_is_compared_with_and_its_version_recorded(
    config: RunConfig, run: RunPaths, backend: Counting, champion: str
) -> None:
    result = evaluate(config, run, backend)
    assert (result.verdict.compared_with, result.champion_version) == ("champion", champion)
    assert read_json(run.evaluation / "report.json", "")["champion_version"] == champion


def test_a_champion_on_another_base_is_an_error_that_names_the_remedy(
    config: RunConfig, run: RunPaths, champion: str, tiny_base: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for file in tiny_base.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    (other / "config.json").write_text((tiny_base / "config.json").read_text() + "\n")
    on_other = config.model_copy(update={"model": config.model.model_copy(update={"base": str(other)})})
    with pytest.raises(ConfigError, match=f"version {champion}, cannot be compared.*trained on.*registered_model"):
        evaluate(on_other, as_trained_with(on_other, run, tmp_path / "copy"))


def test_any_adapter_is_scored_as_in_an_evaluation_and_the_run_stays_as_it_is(
    config: RunConfig, run: RunPaths, backend: Counting, champion: str, tmp_path: Path
) -> None:
    evaluated = evaluate(config, run, backend)
    before = contents(run.root)
    name = config.registry.registered_model
    addresses = {
        "base": "base",
        str(run.checkpoints / "best"): "candidate",
        f"models:/{name}@champion": "champion",
        f"models:/{name}/{champion}": "champion",
    }
    for address, model in addresses.items():
        out = tmp_path / "scores.json"
        result = evaluate_adapter(config, run, address, out, backend)
        assert result.scores == evaluated.scores[model]
        written = read_json(out, "")
        assert written.pop("rows") == {
            set_name: by_model[model] for set_name, by_model in read_json(run.evaluation / "rows.json", "").items()
        }
        assert written == json.loads(json.dumps(result.as_dict(), allow_nan=False))
        assert written["adapter_sha256"] == read_json(run.evaluation / "report.json", "")["adapters"][model]
        lines = result.summary()
        assert re.fullmatch(r"new_task +\d\.\d{3} \[\d\.\d{3}, \d\.\d{3}\] exact match of 6 answers", lines[1])
        assert re.fullmatch(r"texts +\d+\.\d{3} \[\d+\.\d{3}, \d+\.\d{3}\] nats per token", lines[3])
    assert contents(run.root) == before
    with pytest.raises(ConfigError, match="no such folder"):
        evaluate_adapter(config, run, str(tmp_path / "nothing"), backend=backend)


def test_a_task_of_lm_evaluation_harness_is_a_retention_set_like_any_other(
    config: RunConfig, run: RunPaths, backend: Counting, tmp_path: Path
) -> None:
    documents = tmp_path / "colours.jsonl"
    rows = [{"said": name, "right": COLOURS.index(colour)} for name, colour in zip(NAMES, COLOURS, strict=True)]
    documents.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "colours",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(documents)}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "the colour of {{said}} ?",
        "doc_to_choice": COLOURS[:3],
        "doc_to_target": "{{right}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1},
    }
    (tmp_path / "colours.yaml").write_text(json.dumps(task))
    asks = {"lm_eval": {"tasks": ["colours"], "path": str(tmp_path)}}
    content = config.model_dump(mode="json")
    with_task = RunConfig.model_validate(content | {"evaluation": content["evaluation"] | asks})
    result = evaluate(with_task, run, backend)
    report = read_json(run.evaluation / "report.json", "")
    for model, by_set in result.scores.items():
        assert list(by_set) == ["new_task", "lives", "texts", "lm_eval/colours"]
        right = read_json(run.evaluation / "rows.json", "")["lm_eval/colours"][model]["right"]
        assert by_set["lm_eval/colours"].value == right.count("1") / len(NAMES)
    assert report["scores"]["candidate"]["lm_eval/colours"]["metric"] == "acc"
    assert report["dataset"]["rows"]["lm_eval/colours"] == len(NAMES)
    (check,) = [check for check in report["checks"] if check["set"] == "lm_eval/colours"]
    assert check["rule"] == "kept"
    assert check["sentence"].startswith("lm_eval/colours: acc ")
    assert "acc" in read_json(run.evaluation / "metrics.json", "")["retention"]["lm_eval/colours"]
    assert "6 rows, by acc" in (run.evaluation / "report.html").read_text()
    alone = evaluate_adapter(with_task, run, "base", backend=backend)
    assert alone.scores["lm_eval/colours"] == result.scores["base"]["lm_eval/colours"]


def test_the_same_inputs_give_the_same_bytes(config: RunConfig, run: RunPaths) -> None:
    evaluate(config, run)
    first = contents(run.evaluation)
    evaluate(config, run)
    assert contents(run.evaluation) == first


def test_the_losses_to_plot_are_those_of_every_step_and_validation(
    config: RunConfig, run: RunPaths, backend: Counting
) -> None:
    evaluate(config, run, backend)
    tables = {
        name: list(csv.DictReader((run.evaluation / "plots" / f"{name}.csv").open()))
        for name in ("train_loss", "valid_loss", "retention")
    }
    assert [int(row["step"]) for row in tables["train_loss"]] == list(range(1, STEPS + 1))
    assert [int(row["step"]) for row in tables["valid_loss"]] == [STEPS]
    assert len(tables["retention"]) == 3 * 3
    assert all(cell for rows in tables.values() for row in rows for cell in row.values())


def test_a_missing_checkpoint_says_how_to_make_it(config: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="nestune train --name colours"):
        evaluate(config, RunPaths(tmp_path / "empty"))


def test_an_evaluation_that_fails_leaves_the_last_one_as_it_was(config: RunConfig, run: RunPaths) -> None:
    evaluate(config, run)
    before = contents(run.evaluation)
    metadata = run.candidate / "metadata.json"
    kept = json.loads(metadata.read_text())["base"]
    resaved(metadata, base={"reference": "elsewhere", "sha256": "0" * 64})
    try:
        with pytest.raises(ConfigError, match="elsewhere"):
            evaluate(config, run)
    finally:
        resaved(metadata, base=kept)
    assert contents(run.evaluation) == before
    assert [path.name for path in run.root.iterdir() if path.name.endswith(".tmp")] == []
