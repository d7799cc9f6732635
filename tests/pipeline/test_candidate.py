"""The candidate that a training ends with: the checkpoint as it is, its strength chosen, its rank cut down."""

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.numpy import load_file, save_file
from tests.pipeline.conftest import ROOT

pytest.importorskip("torch")

from nestune import cli
from nestune.backends.adapters import WEIGHTS, read_adapter_of_any_size
from nestune.backends.factory import make_backend
from nestune.backends.lora_sum import relative_error
from nestune.backends.torch_backend import TorchBackend
from nestune.base_model import resolve_base
from nestune.config import load_config
from nestune.files import read_json, seal_faults
from nestune.run_state import read_state
from nestune.runs import RunPaths
from nestune.stages.status import read_status

ADAPTER = (WEIGHTS, "adapters.safetensors", "adapter_config.json")
PARENT, CHILD, FACTORS = RunPaths(Path("runs/parent")), RunPaths(Path("runs/child")), [0.0, 0.25, 0.5, 0.75]
STRENGTH = f"retention.strength={{min_share: 0.5, factors: {FACTORS}}}"


@pytest.fixture(scope="module")
def folder(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working folder in which `parent` has learned new facts, and `child` upon it a new style."""
    folder = tmp_path_factory.mktemp("candidate")
    for name, file, rows in (
        ("facts", "new_facts/train", 64),
        ("style", "new_style/train", 64),
        ("valid", "new_style/valid", 16),
        ("test", "new_style/valid", 32),
        ("old", "general/covered", 16),
        ("replay", "general/replay", 32),
    ):
        lines = (world / f"{file}.jsonl").read_text().splitlines(keepends=True)
        chosen = lines[16:rows] if name == "test" else lines[:rows]
        (folder / f"{name}.jsonl").write_text("".join(chosen))
    content: dict[str, Any] = {
        "name": "child",
        "model": {"base": str(ROOT / "demo" / "base"), "backend": "torch"},
        "lora": {"rank": 4, "alpha": 8},
        "data": {"train": "style.jsonl", "valid": "valid.jsonl", "test": "test.jsonl", "max_seq_length": 64},
        "tiers": {"update_every": [1, 2]},
        "retention": {"recipe": "none"},
        "training": {"steps": 16, "batch_size": 16, "learning_rate": 5.0e-3, "eval_every": None},
        "evaluation": {"max_answer_tokens": 8},
    }
    content["data"]["retention"] = {"old": "old.jsonl"}
    (folder / "run.yaml").write_text(yaml.safe_dump(content))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for stage in ("validate", "tiers", "train"):
            assert nestune(stage, "data.train=facts.jsonl", "model.adapter=null", name="parent") == 0
        for stage in ("validate", "tiers", "train"):
            assert nestune(stage) == 0
        yield folder


def nestune(command: str, *overrides: str, name: str = "child") -> int:
    given = ("model.adapter=runs/parent/candidate", *overrides)
    return cli.main([command, "--config", "run.yaml", "--name", name, *(part for o in given for part in ("--set", o))])


@pytest.fixture
def child(folder: Path) -> Iterator[RunPaths]:
    """The child as its training left it, whatever a test makes of its candidate."""
    kept = shutil.copytree(CHILD.root, "kept")
    yield CHILD
    shutil.rmtree(CHILD.root)
    shutil.move(kept, CHILD.root)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def adapter_bytes(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in ADAPTER]


def metadata(folder: Path) -> dict[str, Any]:
    told: dict[str, Any] = read_json(folder / "metadata.json", "")
    return told


def test_by_default_it_is_the_checkpoint_that_is_evaluated(child: RunPaths) -> None:
    best = child.checkpoints / "best"
    assert adapter_bytes(child.candidate) == adapter_bytes(best)
    assert seal_faults(child.candidate, ADAPTER) == []
    told = metadata(child.candidate)
    assert metadata(best).items() <= told.items()
    assert (told["factor"], told["compression"]) == (1.0, None)
    assert set(contents(child.candidate)) == {*ADAPTER, "metadata.json", "sha256.json"}
    outputs = read_json(child.manifest, "")["train"]["outputs"]
    assert (child.candidate / WEIGHTS).as_posix() in outputs


def test_at_factor_1_it_has_the_bytes_that_it_has_without_the_block(child: RunPaths) -> None:
    assert nestune("train", "retention.strength={factors: [1.0]}") == 0
    assert adapter_bytes(child.candidate) == adapter_bytes(child.checkpoints / "best")
    assert read_json(child.candidate / "strength.json", "")["factor"] == 1


def test_a_training_goes_on_only_upon_the_parent_that_it_began_upon(
    child: RunPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path(shutil.copytree(PARENT.candidate, "other"))
    weights = load_file(other / WEIGHTS)
    for name, matrices in ((WEIGHTS, weights), ("adapters.safetensors", load_file(other / "adapters.safetensors"))):
        save_file({key: (value * 1.5).astype("float32") for key, value in matrices.items()}, other / name)
    moved = PARENT.candidate.rename("aside")
    other.rename(moved_back := PARENT.candidate)
    try:
        # Ended, and with its candidate: nothing is to be done for which the parent is needed.
        assert nestune("train") == 0
        capsys.readouterr()
        assert nestune("train", STRENGTH) == 1
        assert "was trained upon a parent adapter with sha256" in capsys.readouterr().err
    finally:
        shutil.rmtree(moved_back)
        moved.rename(moved_back)
    assert nestune("train", STRENGTH) == 0


@pytest.mark.parametrize("replay", ["", "replay.jsonl"])
def test_the_factor_with_the_least_divergence_that_learns_enough_is_part_of_it(
    child: RunPaths, replay: str, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [STRENGTH, *([f"retention.replay.files={replay}"] if replay else [])]
    if replay:
        for stage in ("validate", "tiers"):
            assert nestune(stage, *overrides) == 0
        assert cli.main(["train", "--force", "--config", "run.yaml", *_set(overrides)]) == 0
    else:
        assert nestune("train", *overrides) == 0
        assert "training had ended at step 16 already" in capsys.readouterr().out
    told = read_json(child.candidate / "strength.json", "")
    curve = {point["factor"]: point for point in told["curve"]}
    assert list(curve) == [*FACTORS, 1.0]
    anchors = "32 replayed rows" if replay else "16 questions of valid"
    assert told["rows"] == {"new task": "16 of valid", "divergence": anchors}
    # Nothing of the change is the parent itself; all of it is what was learned.
    assert curve[0.0]["score"] == told["parent"]
    assert (curve[0.0]["share"], curve[1.0]["share"]) == (0, 1)
    assert abs(curve[0.0]["divergence"]) < 1e-9
    divergences = [point["divergence"] for point in told["curve"]]
    assert divergences == sorted(divergences)
    enough = [factor for factor, point in curve.items() if point["share"] >= 0.5]
    assert told["factor"] == min(enough)
    assert metadata(child.candidate)["factor"] == told["factor"]
    assert seal_faults(child.candidate, (*ADAPTER, "strength.json")) == []


def _set(overrides: list[str]) -> list[str]:
    given = ["model.adapter=runs/parent/candidate", *overrides]
    return [part for override in given for part in ("--set", override)]


@pytest.mark.parametrize("factor", [0.25, 0.5])
def test_its_effect_is_the_parents_and_that_share_of_the_change(child: RunPaths, factor: float) -> None:
    assert nestune("train", f"retention.strength={{min_share: 1.0e-6, factors: [{factor}]}}") == 0
    chosen = read_json(child.candidate / "strength.json", "")["factor"]
    assert chosen in (factor, 1.0)
    config = load_config(Path("run.yaml"), ["model.adapter=runs/parent/candidate"], "child")
    backend, base = make_backend(config), resolve_base(config.model)
    parent, trained, candidate = (
        read_adapter_of_any_size(folder, backend.lora_parameters(), config.lora, base)
        for folder in (PARENT.candidate, child.checkpoints / "best", child.candidate)
    )
    for module in trained.modules:
        effects = [
            one.scale * one.weights[f"{module}_b"].astype(float) @ one.weights[f"{module}_a"]
            for one in (parent, trained, candidate)
        ]
        expected = effects[0] + chosen * (effects[1] - effects[0])
        assert abs(effects[2] - expected).max() < 1e-6 * max(1.0, abs(expected).max())
    assert candidate.rank == trained.rank == parent.rank + config.lora.rank


def test_a_rank_beyond_the_limit_is_cut_down_and_the_report_shows_what_that_costs(
    child: RunPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    assert nestune("train", "lora.max_rank=4") == 0
    told = metadata(child.candidate)["compression"]
    assert (told["rank_before"], told["rank"]) == (8, 4)
    assert 4 < told["effective_rank"] <= 8
    config = load_config(Path("run.yaml"), [], "child")
    backend, base = make_backend(config), resolve_base(config.model)
    whole, small = (
        read_adapter_of_any_size(folder, backend.lora_parameters(), config.lora, base)
        for folder in (child.candidate / "uncompressed", child.candidate)
    )
    assert (whole.rank, small.rank) == (8, 4)
    assert adapter_bytes(child.candidate / "uncompressed") == adapter_bytes(child.checkpoints / "best")
    assert relative_error(whole, small) == pytest.approx(told["relative_error"], rel=1e-9)
    assert "rank 4" in "\n".join(read_status(child).lines())

    assert nestune("evaluate", "lora.max_rank=4") == 0
    report = read_json(child.evaluation / "report.json", "")
    assert list(report["scores"]) == ["base", "parent", "uncompressed", "candidate"]
    for name, effect in report["compression"]["effect"].items():
        ours, before = (report["scores"][model][name]["loss"] for model in ("candidate", "uncompressed"))
        assert effect["loss"] == ours - before
    page = (child.evaluation / "report.html").read_text()
    assert "Rank 8 was cut down to 4" in page
    assert "Strength" not in page


def test_the_report_shows_the_curve_and_scores_other_rows(child: RunPaths) -> None:
    assert nestune("train", STRENGTH) == 0
    assert nestune("evaluate", STRENGTH) == 0
    report = read_json(child.evaluation / "report.json", "")
    assert report["strength"] == read_json(child.candidate / "strength.json", "")
    assert report["dataset"]["rows"]["new_task"] == 16
    page = (child.evaluation / "report.html").read_text()
    assert "of the learned change is kept" in page
    assert (child.evaluation / "strength.png").read_bytes().startswith(b"\x89PNG")


def test_one_that_is_missing_changed_or_made_otherwise_is_made_anew_and_not_evaluated(
    child: RunPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    made = contents(child.candidate)
    shutil.rmtree(child.candidate)
    assert nestune("evaluate") == 1
    assert nestune("train") == 0
    assert contents(child.candidate) == made
    with (child.candidate / WEIGHTS).open("ab") as file:
        file.write(b"x")
    assert nestune("evaluate") == 1
    assert nestune("train") == 0
    assert contents(child.candidate) == made
    assert nestune("evaluate", "evaluation.checkpoint=final") == 1
    told = capsys.readouterr().err
    assert "runs/child/candidate is not the candidate of this training: there is none. Run nestune train" in told
    assert f"{WEIGHTS} changed" in told
    assert "made with other settings (evaluation.checkpoint differ)" in told
    assert nestune("train", "evaluation.checkpoint=final") == 0
    assert metadata(child.candidate)["made_from"]["evaluation.checkpoint"] == "final"


@pytest.mark.parametrize("method", ["divergence", "generate"])
def test_one_that_is_stopped_while_it_is_made_is_made_by_the_same_command(
    child: RunPaths, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    assert nestune("train", STRENGTH) == 0
    made = contents(child.candidate)
    shutil.rmtree(child.candidate)
    original, calls = getattr(TorchBackend, method), iter(range(99))

    def stopped(*arguments: Any, **named: Any) -> Any:
        if next(calls) == 1:
            signal.raise_signal(signal.SIGTERM)
        return original(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(TorchBackend, method, stopped)
        with pytest.raises(SystemExit) as ended:
            nestune("train", STRENGTH)
    assert ended.value.code == 128 + signal.SIGTERM
    assert not child.candidate.exists()
    assert [path for path in child.root.rglob(".*") if path != child.lock] == []
    state = read_state(child)
    assert (state.state, state.stage) == ("stopped", "train")
    assert "while the strength was chosen; training is complete" in str(state.reason)
    assert nestune("train", STRENGTH) == 0
    assert contents(child.candidate) == made


def test_status_tells_of_it(child: RunPaths) -> None:
    told = read_status(child)
    assert "candidate: best of step 16, strength 1, rank 8" in told.lines()
    assert json.loads(json.dumps(told.as_dict()))["candidate"]["rank"] == 8
    (child.candidate / "metadata.json").write_text("[")
    assert read_status(child).candidate is None


def test_it_tells_the_tasks_behind_it_whose_rows_are_then_replayed_and_measured_on(child: RunPaths) -> None:
    parent, own = metadata(child.candidate)["lineage"]
    assert (parent["run"], own["run"]) == ("parent", "child")
    assert [parent] == metadata(PARENT.candidate)["lineage"]
    assert own["dataset_sha256"] == read_json(child.dataset / "report.json", "")["sha256"]
    # An alias, such as champion, may have moved on to this candidate when it is evaluated.
    alias = Path(shutil.copytree(PARENT.candidate, "alias"))
    earlier = ["retention.replay={earlier_tasks: true, store: 5}", "model.adapter=alias", "training.steps=2"]
    assert nestune("validate", *earlier) == 0
    replayed = (child.dataset / "replay" / "0.jsonl").read_text().splitlines()
    assert len(replayed) == 5
    assert set(replayed) < set((PARENT.dataset / "train.jsonl").read_text().splitlines())
    measured = (child.dataset / "retention" / "task_parent.jsonl").read_bytes()
    assert measured == (PARENT.dataset / "test.jsonl").read_bytes()
    assert nestune("tiers", *earlier) == 0
    assert cli.main(["train", "--force", "--config", "run.yaml", *_set(earlier)]) == 0
    shutil.rmtree(alias)
    shutil.copytree(child.candidate, alias)
    assert nestune("evaluate", *earlier) == 0
    assert "task_parent" in read_json(child.evaluation / "report.json", "")["scores"]["candidate"]


def test_a_parent_that_tells_of_no_task_is_refused(child: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    silent = Path(shutil.copytree(PARENT.candidate, "silent", dirs_exist_ok=True))
    told = metadata(silent)
    del told["lineage"]
    (silent / "metadata.json").write_text(json.dumps(told))
    command = ["validate", "--config", "run.yaml", "--set", "retention.replay.earlier_tasks=true"]
    assert cli.main([*command, "--set", "model.adapter=silent"]) == 2
    assert "the parent silent does not tell what it was trained on" in capsys.readouterr().err
