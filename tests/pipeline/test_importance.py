"""Strategy parameter_importance from the data to the registry, on the demo's base and tasks."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tests.pipeline.conftest import ROOT

from nestune.backends.factory import make_backend
from nestune.backends.torch_backend import TorchBackend
from nestune.config import RunConfig, parse_config
from nestune.errors import ConfigError, RunError
from nestune.files import read_json
from nestune.runs import RunPaths
from nestune.stages.assign import assign, importance_behind
from nestune.stages.evaluate import evaluate
from nestune.stages.inputs import read_training_inputs
from nestune.stages.register import register
from nestune.stages.train import train
from nestune.stages.validate import validate
from nestune.tiers.importance import read_importance, write_importance

Configure = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def configure(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Configure:
    """Makes a configuration that measures two steps of a task of the demo; `block__key` sets what differs."""
    registry = tmp_path_factory.mktemp("registry")
    data = tmp_path_factory.mktemp("data")
    for file in ("new_facts/train", "new_facts/valid", "reversal/train", "reversal/valid", "general/replay"):
        short = data / f"{file}.jsonl"
        short.parent.mkdir(exist_ok=True)
        short.write_text("".join((world / f"{file}.jsonl").read_text().splitlines(keepends=True)[:100]))

    def configure(task: str = "new_facts", **settings: Any) -> RunConfig:
        content: dict[str, Any] = {
            "name": "importance",
            "model": {"base": str(ROOT / "demo" / "base")},
            "data": {
                "train": str(data / task / "train.jsonl"),
                "valid": str(data / task / "valid.jsonl"),
                "max_seq_length": 64,
            },
            "tiers": {"strategy": "parameter_importance", "update_every": [1, 2, 4], "importance": {"steps": 2}},
            "retention": {"recipe": "none", "replay": {"files": str(data / "general" / "replay.jsonl")}},
            "training": {"steps": 4, "batch_size": 16},
            "evaluation": {"max_answer_tokens": 8},
            "registry": {"tracking_uri": f"sqlite:///{registry}/mlflow.db"},
        }
        for path, value in settings.items():
            *blocks, key = path.split("__")
            block = content
            for name in blocks:
                block = block.setdefault(name, {})
            block[key] = value
        return parse_config(content)

    return configure


@pytest.fixture(scope="module")
def measured_once(configure: Configure, tmp_path_factory: pytest.TempPathFactory) -> RunPaths:
    run = RunPaths(tmp_path_factory.mktemp("run") / "importance")
    config = configure()
    validate(config, run)
    result = assign(config, run)
    assert not result.measured_before
    return run


@pytest.fixture
def run(measured_once: RunPaths, tmp_path: Path) -> RunPaths:
    """A copy of a run whose importances have been measured."""
    shutil.copytree(measured_once.root, tmp_path / "importance")
    return RunPaths(tmp_path / "importance")


@pytest.fixture(scope="module")
def parent(configure: Configure, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter none of whose matrices is zero."""
    folder = tmp_path_factory.mktemp("parent")
    make_backend(configure()).save_adapter(folder)
    weights = load_file(folder / "adapter_model.safetensors")
    random = np.random.default_rng(0)
    drawn = {key: random.normal(0, 0.01, value.shape).astype(np.float32) for key, value in weights.items()}
    save_file(drawn, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapters.safetensors").unlink()  # the same weights in mlx-lm's form, as they were
    return folder


def test_tasks_of_different_kinds_have_different_maps(
    configure: Configure, measured_once: RunPaths, tmp_path: Path
) -> None:
    config, run = configure("reversal"), RunPaths(tmp_path / "reversal")
    validate(config, run)
    reversal = assign(config, run).tier_map.tier_of
    new_facts = read_json(measured_once.tiers, "")["tiers"]
    moved = sum(new_facts[name] != tier for name, tier in reversal.items())
    print(f"{moved} of {len(reversal)} matrices are on another tier")
    assert reversal.keys() == new_facts.keys()
    assert moved > 0


def test_identical_input_gives_identical_bytes(configure: Configure, measured_once: RunPaths, tmp_path: Path) -> None:
    again = RunPaths(tmp_path / "again")
    shutil.copytree(measured_once.dataset, again.dataset)
    assert not assign(configure(), again).measured_before
    for path in ("tiers", "tiers_picture", "importance_picture"):
        assert getattr(again, path).read_bytes() == getattr(measured_once, path).read_bytes(), path
    values = [read_json(run.importance, "")["importance"] for run in (again, measured_once)]
    assert values[0] == values[1]


def test_the_pass_changes_no_bit_of_the_model(configure: Configure, run: RunPaths, parent: Path) -> None:
    config = configure(model__adapter=str(parent))
    inputs = read_training_inputs(config, run)
    backend = make_backend(config)
    assert isinstance(backend, TorchBackend)
    backend.load_adapter(inputs.parent)

    def bits() -> dict[str, bytes]:
        return {name: value.numpy().tobytes() for name, value in backend._model.state_dict().items()}

    before = bits()
    steps = inputs.steps()
    backend.measure_importance([next(steps), next(steps)], "gradient")
    assert any("lora" not in name for name in before)  # the base's weights are among them
    assert bits() == before


def test_the_result_tells_what_was_measured_and_what_it_cost(configure: Configure, measured_once: RunPaths) -> None:
    kept = read_json(measured_once.importance, "")
    result = assign(configure(), measured_once)
    told = result.as_dict()["importance"]
    assert told == {**{key: kept[key] for key in ("steps", "seconds", "seconds_per_step")}, "measured_before": True}
    assert kept["steps"] == kept["measured_on"]["steps"] == 2
    assert kept["seconds_per_step"] == pytest.approx(kept["seconds"] / 2)
    assert kept["seconds"] > 0
    assert any("taken from the earlier pass, 2 steps" in line for line in result.summary())
    assert kept["measured_on"]["data (dataset)"] == read_json(measured_once.dataset / "report.json", "")["sha256"]


UNRELATED = [
    {"training__learning_rate": 1e-3, "training__optimizer": "sgd", "training__warmup_steps": 2},
    {"training__steps": 50, "training__eval_every": 10},
    {"tiers__update_every": [1, 8]},
    {"tiers__importance__aggregate": "layer"},
    {"tiers__importance__reversed": True},
    {"evaluation__batch_size": 3, "gate__max_drop": 0.5},
]


@pytest.mark.parametrize("settings", UNRELATED, ids=lambda settings: ",".join(settings))
def test_what_importances_do_not_depend_on_measures_nothing_again(
    configure: Configure, run: RunPaths, settings: dict[str, Any]
) -> None:
    before = run.importance.read_bytes()
    assert assign(configure(**settings), run).measured_before
    assert run.importance.read_bytes() == before


@pytest.mark.parametrize(
    ("settings", "differs"),
    [
        ({"tiers__importance__steps": 1}, "steps"),
        ({"tiers__importance__measure": "squared_gradient"}, "measure"),
        ({"training__batch_size": 8}, "training.batch_size"),
        ({"training__gradient_accumulation_steps": 2}, "training.gradient_accumulation_steps"),
        ({"training__seed": 1}, "training.seed"),
        ({"training__precision": "bfloat16"}, "training.precision"),
        ({"retention__replay__rows_per_step": 3}, "retention.replay"),
        ({"data__max_seq_length": 60}, "data.max_seq_length"),
        ({"model__dtype": "bfloat16"}, "model.dtype"),
        ({"lora__rank": 4}, "lora"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_importances_depend_on_measures_them_again(
    configure: Configure, run: RunPaths, settings: dict[str, Any], differs: str
) -> None:
    before = read_json(run.importance, "")["measured_on"]
    assert not assign(configure(**settings), run).measured_before
    after = read_json(run.importance, "")["measured_on"]
    assert {key for key in before | after if before.get(key) != after.get(key)} == {differs}


def test_another_dataset_base_tokenizer_or_parent_is_measured_again(
    configure: Configure, run: RunPaths, parent: Path, tmp_path: Path
) -> None:
    def differing(config: RunConfig) -> set[str]:
        before = read_json(run.importance, "")["measured_on"]
        assert not assign(config, run).measured_before
        after = read_json(run.importance, "")["measured_on"]
        return {key for key in before | after if before.get(key) != after.get(key)}

    assert differing(configure(model__adapter=str(parent))) == {"model.adapter"}

    base = tmp_path / "base"
    shutil.copytree(ROOT / "demo" / "base", base)
    (base / "chat.jinja").write_text("")
    copied = {"model__base": str(base), "model__adapter": str(parent)}
    assert differing(configure(**copied)) == {"model.base (tokenizer)"}
    content = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(content, indent=1))
    assert differing(configure(**copied)) == {"model.base"}

    other = configure("reversal", **copied)
    validate(other, run)
    assert differing(other) == {"data (dataset)"}


@pytest.mark.parametrize("name", [None, "layers.99.mlp.up_proj.lora_a"])
def test_a_pass_that_names_other_matrices_is_measured_again(
    configure: Configure, run: RunPaths, name: str | None
) -> None:
    measured = read_importance(run.importance)
    others = dict(list(measured.importance.items())[name is None :]) | ({name: 1.0} if name else {})
    write_importance(replace(measured, importance=others), run.importance)
    assert not assign(configure(), run).measured_before
    assert read_importance(run.importance).importance == measured.importance


def test_the_summary_ends_with_the_files_that_were_made(configure: Configure, run: RunPaths) -> None:
    by_depth = assign(configure(tiers={"strategy": "layer_depth", "update_every": [1, 2, 4]}, training__steps=2), run)
    assert by_depth.tier_map.warnings
    assert by_depth.summary()[-1] == f"files: {run.tiers}, {run.tiers_picture}"
    measured = assign(configure(), run)
    files = [run.tiers, run.tiers_picture, run.importance, run.importance_picture]
    assert measured.summary()[-1] == f"files: {', '.join(map(str, files))}"
    assert measured.as_dict()["files"] == [str(file) for file in files]
    assert all(file.exists() for file in files)


def test_a_pass_of_more_steps_than_the_training_has_is_warned_of(configure: Configure, run: RunPaths) -> None:
    result = assign(configure(tiers__importance__steps=6, training__steps=5), run)
    assert result.as_dict()["importance"]["steps"] == 6
    (warning,) = result.tier_map.warnings
    assert "tiers.importance.steps is 6, training.steps 5" in warning
    assert assign(configure(tiers__importance__steps=6, training__steps=6), run).tier_map.warnings == ()


def test_without_a_validated_dataset_the_remedy_is_validate(configure: Configure, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"cannot read .*report\.json.*Run nestune validate\."):
        assign(configure(), RunPaths(tmp_path / "nowhere"))


def test_taylor_is_refused_for_a_new_adapter_before_anything_is_measured(configure: Configure) -> None:
    with pytest.raises(ConfigError, match=r"tiers\.importance\.measure taylor is 0 everywhere.*set model\.adapter"):
        configure(tiers__importance__measure="taylor")


def test_measures_that_are_all_zero_are_refused_and_the_last_pass_is_kept(
    configure: Configure, run: RunPaths, tmp_path: Path
) -> None:
    (tmp_path / "untrained").mkdir()
    make_backend(configure()).save_adapter(tmp_path / "untrained")
    before = run.importance.read_bytes()
    with pytest.raises(ConfigError, match="taylor of every matrix is 0"):
        assign(
            configure(
                tiers__importance__measure="taylor",
                model__adapter=str(tmp_path / "untrained"),
                retention__start="continue",
            ),
            run,
        )
    assert run.importance.read_bytes() == before


def test_ranking_each_matrix_alone_warns_where_every_a_measures_0(
    configure: Configure, run: RunPaths, parent: Path
) -> None:
    (warning,) = assign(configure(tiers__importance__aggregate="parameter"), run).tier_map.warnings
    assert "every A measures 0" in warning
    from_parent = configure(
        tiers__importance__aggregate="parameter", model__adapter=str(parent), retention__start="continue"
    )
    assert assign(from_parent, run).tier_map.warnings == ()


@pytest.mark.parametrize(
    ("tiers", "warned"),
    [
        ({"strategy": "layer_depth", "update_every": [1, 4, 5]}, ["tier 2 never moves: its period 5"]),
        ({"strategy": "layer_depth", "update_every": [1, 4]}, []),
        # It never moves by design.
        ({"strategy": "frozen_slow", "update_every": [1, 2, 5]}, []),
        # Steps 1 and 3; 1 only; 1, 2 and 4, as the slowest never moves.
        ({"strategy": "layer_depth", "update_every": [2, 4]}, ["at 2 of 4 steps no tier is due"]),
        ({"strategy": "layer_depth", "update_every": [2, 3]}, ["at 1 of 4 steps no tier is due"]),
        ({"strategy": "frozen_slow", "update_every": [3, 4]}, ["at 3 of 4 steps no tier is due"]),
        ({"strategy": "layer_depth", "update_every": [2, 4], "inactive_gradients": "accumulate"}, []),
    ],
)
def test_periods_that_leave_tiers_or_steps_without_use_are_warned_of(
    configure: Configure, tmp_path: Path, tiers: dict[str, Any], warned: list[str]
) -> None:
    warnings = assign(configure(tiers=tiers, training__steps=4), RunPaths(tmp_path / "run")).tier_map.warnings
    assert [text in warning for text, warning in zip(warned, warnings, strict=True)] == [True] * len(warned)


def test_importances_of_an_earlier_strategy_are_kept_but_belong_to_no_other_map(
    configure: Configure, run: RunPaths
) -> None:
    measured = importance_behind(run)
    assert measured is not None
    assign(configure(tiers={"strategy": "layer_depth"}), run)
    assert importance_behind(run) is None
    assert not run.importance_picture.exists()
    assert assign(configure(), run).measured_before
    assert importance_behind(run) == measured
    assert run.importance_picture.exists()


def test_a_pass_that_cannot_be_read_illustrates_nothing_and_that_is_told(
    run: RunPaths, caplog: pytest.LogCaptureFixture
) -> None:
    run.importance.write_text(run.importance.read_text().replace('"seconds": ', '"seconds": -'))
    assert importance_behind(run) is None
    assert "importances are left out" in caplog.text
    assert "importance.json was changed by hand" in caplog.text


@pytest.fixture(scope="module")
def finished(configure: Configure, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, RunPaths]:
    """One step of plain gradient descent at rate 1, all tiers due, through every stage."""
    run = RunPaths(tmp_path_factory.mktemp("finished") / "importance")
    descent = {"optimizer": "sgd", "learning_rate": 1.0, "max_grad_norm": None, "steps": 1, "batch_size": 16}
    config = configure(training=descent, tiers__update_every=[1, 1, 1], tiers__importance__steps=1)
    for stage in (validate, assign, train, evaluate, register):
        stage(config, run)
    return config, run


def test_what_is_measured_is_the_gradient_that_training_applies(finished: tuple[RunConfig, RunPaths]) -> None:
    config, run = finished
    before = make_backend(config).weights()
    backend = make_backend(config)
    backend.load_adapter(run.checkpoints / "final")
    moved = {name: float(np.abs(w - before[name]).mean()) for name, w in backend.weights().items()}
    importance = read_json(run.importance, "")["importance"]
    assert sum(value > 0 for value in importance.values()) == len(importance) / 2
    assert moved == pytest.approx(importance, rel=1e-4, abs=0)


def test_the_report_and_the_tracked_run_show_the_importances(finished: tuple[RunConfig, RunPaths]) -> None:
    from nestune.registry.connection import connect

    config, run = finished
    assert (run.evaluation / "importance.png").read_bytes() == run.importance_picture.read_bytes()
    assert "Measured importance of each module" in (run.evaluation / "report.html").read_text()
    files = connect(config.registry).list_artifacts(read_json(run.registration, "")["run_id"])
    assert {"importance.json", "importance.png", "tiers.json", "tiers.png"} <= {file.path for file in files}


@pytest.mark.parametrize(
    ("settings", "differs"),
    [
        ({"training__seed": 1}, "training.seed"),
        ({"tiers__importance__reversed": True}, "tiers.importance.reversed"),
        ({"tiers__importance__steps": 2}, "tiers.importance.steps"),
    ],
)
def test_a_map_that_other_importances_made_is_not_trained_on(
    configure: Configure, finished: tuple[RunConfig, RunPaths], settings: dict[str, Any], differs: str
) -> None:
    descent = {"optimizer": "sgd", "learning_rate": 1.0, "max_grad_norm": None, "steps": 1, "batch_size": 16}
    of_the_map = {"training": descent, "tiers__update_every": [1, 1, 1], "tiers__importance__steps": 1}
    with pytest.raises(RunError, match=rf"made from something else \({differs} differs\)\. Run nestune tiers again"):
        train(configure(**of_the_map | settings), finished[1], force=True)


def test_a_map_made_on_another_dataset_is_not_trained_on(configure: Configure, run: RunPaths) -> None:
    other = configure("reversal")
    validate(other, run)
    with pytest.raises(RunError, match=r"something else \(data \(dataset\) differs\)\. Run nestune tiers again"):
        train(other, run)
    assert not run.checkpoints.exists()


def test_a_map_of_other_patterns_is_not_trained_on(configure: Configure, run: RunPaths) -> None:
    def manual(first: str, second: str) -> RunConfig:
        # Of the patterns that match a name the first counts, so their order matters.
        patterns = {first: int("0" in first), second: int("0" in second)}
        return configure(tiers={"strategy": "manual", "update_every": [1, 2], "assignments": patterns})

    assign(manual("layers.0.*", "layers.*"), run)
    with pytest.raises(RunError, match=r"something else \(tiers\.assignments differs\)"):
        train(manual("layers.*", "layers.0.*"), run)
