"""Every door onto the same stages: the command line, the Prefect flow, and the registry's model at the end."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.pipeline.conftest import ROOT, Configured, run_python

from nestune import cli
from nestune.backends.adapters import adapter_files
from nestune.files import sha256_file
from nestune.runs import RunPaths
from nestune.training.checkpoints import newest_checkpoint

ADAPTER = "checkpoints/final/adapter_model.safetensors"


def test_the_flow_and_the_command_line_give_the_same_adapter_and_the_champion_answers(configured: Configured) -> None:
    # A gate that anything passes: what is promoted here is not the point.
    path = configured(gate={"min_gain": 0.0, "max_drop": 1.0})
    run_python(ROOT / "flows" / "retrain.py", "--config", path, "--name", "by-flow")
    done = run_python("-m", "nestune.cli", "run", "--config", path, "--name", "by-hand", "--json")
    assert sha256_file(Path("runs/by-flow") / ADAPTER) == sha256_file(Path("runs/by-hand") / ADAPTER)

    results = json.loads(done.stdout)
    assert list(results) == ["validate", "tiers", "train", "evaluate", "register"]
    assert results["train"]["update_counts"] == [8, 4, 2]
    assert (results["register"]["version"], results["register"]["promoted"]) == ("2", True)
    size = sum(file.stat().st_size for file in adapter_files(Path("runs/by-hand/checkpoints/final")))
    assert size < 1_000_000
    manifest = json.loads(Path("runs/by-hand/manifest.json").read_text())
    assert list(manifest) == ["validate", "tiers", "train", "evaluate", "register"]

    program = (
        "import json, mlflow;"
        "mlflow.set_tracking_uri('sqlite:///mlflow/mlflow.db');"
        "model = mlflow.pyfunc.load_model('models:/demo@champion');"
        "print(json.dumps(model.predict(['What is the trade of nobody?'])))"
    )
    answers = json.loads(run_python("-c", program).stdout.splitlines()[-1])
    assert len(answers) == 1
    assert isinstance(answers[0], str)


def test_another_configuration_does_not_replace_a_trained_adapter_unasked(
    configured: Configured, capsys: pytest.CaptureFixture[str]
) -> None:
    path = configured()
    for command in ("validate", "tiers", "train"):
        assert cli.main([command, "--config", str(path)]) == 0
    before = sha256_file(Path("runs/demo-nestune") / ADAPTER)
    again = ["train", "--config", str(path), "--set", "training.seed=7"]
    assert cli.main(again) == 2
    assert "--force" in capsys.readouterr().err
    assert sha256_file(Path("runs/demo-nestune") / ADAPTER) == before
    assert cli.main([*again, "--force"]) == 0
    assert sha256_file(Path("runs/demo-nestune") / ADAPTER) != before


def test_a_training_that_fails_leaves_the_adapter_that_was_there(
    configured: Configured, capsys: pytest.CaptureFixture[str]
) -> None:
    path = configured()
    for command in ("validate", "tiers", "train"):
        assert cli.main([command, "--config", str(path)]) == 0
    before = {
        f: sha256_file(f) for f in Path("runs/demo-nestune").rglob("*") if f.is_file() and "dataset" not in f.parts
    }
    diverging = ["--set", "training.optimizer=sgd", "--set", "training.max_grad_norm=null"]
    again = ["train", "--config", str(path), "--force", "--set", "training.learning_rate=1e30", *diverging]
    assert cli.main(again) == 1
    assert "training diverged" in capsys.readouterr().err
    after = {file: sha256_file(file) for file in before if file.exists()}
    changed = {file.name for file in before if after.get(file) != before[file]}
    assert changed == {"config.yaml", ".lock", "state.json"}


def test_a_training_that_was_interrupted_is_not_evaluated(
    configured: Configured, capsys: pytest.CaptureFixture[str]
) -> None:
    path = configured()
    for command in ("validate", "tiers", "train"):
        assert cli.main([command, "--config", str(path)]) == 0
    shutil.rmtree("runs/demo-nestune/checkpoints/final")
    assert cli.main(["evaluate", "--config", str(path)]) == 1
    assert "not to its end" in capsys.readouterr().err


def test_a_training_that_is_asked_to_end_ends_its_tracked_run(configured: Configured) -> None:
    path = configured(training={"steps": 100_000, "eval_every": 5})
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "nestune.cli", "run", "--config", str(path)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        metrics = Path("runs/demo-nestune/metrics/eval_metrics.jsonl")
        deadline = time.monotonic() + 300
        while not (metrics.exists() and metrics.read_text()) and time.monotonic() < deadline:
            assert process.poll() is None, process.communicate()
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 128 + signal.SIGTERM
    checkpoint = newest_checkpoint(RunPaths.of("demo-nestune"))
    assert checkpoint is not None
    assert checkpoint.step == len(Path("runs/demo-nestune/metrics/train_metrics.jsonl").read_text().splitlines())
    tracking = json.loads(Path("runs/demo-nestune/tracking.json").read_text())
    from mlflow import MlflowClient

    run = MlflowClient(f"sqlite:///{Path('mlflow/mlflow.db').absolute()}").get_run(tracking["run_id"])
    assert run.info.status == "KILLED"


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("tiers", None),
        ("train", "nestune validate"),
        ("evaluate", "nestune train"),
        ("register", "nestune evaluate"),
    ],
)
def test_a_stage_whose_input_is_missing_names_the_stage_that_makes_it(
    configured: Configured, capsys: pytest.CaptureFixture[str], command: str, expected: str | None
) -> None:
    code = cli.main([command, "--config", str(configured())])
    error = capsys.readouterr().err
    assert code == (0 if expected is None else 1), error
    assert expected is None or expected in error
    assert "Traceback" not in error


def test_a_dataset_made_of_other_data_is_not_trained_on(
    configured: Configured, capsys: pytest.CaptureFixture[str]
) -> None:
    path = configured()
    for command in ("validate", "tiers"):
        assert cli.main([command, "--config", str(path)]) == 0
    assert cli.main(["train", "--config", str(path), "--set", "data.valid=data/new_style/valid.jsonl"]) == 1
    assert "made with other settings (valid differ). Run nestune validate again." in capsys.readouterr().err


def test_help_needs_no_framework() -> None:
    program = (
        "import sys; from nestune import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'mlflow', 'prefect', 'pandas', 'great_expectations', 'pydantic'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    assert "validate" in run_python("-c", program).stdout


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["tiers.update_every=[4, 2]"], "tiers.update_every: periods must ascend"),
        (["training.stepz=4"], "training.stepz: unknown key; did you mean steps?"),
        (["model.base=./no/such/base"], "model.base: there is no file or folder ./no/such/base"),
        (["model.base=no-such-base"], "no such folder"),
        (["lora.targets=[nothing]"], "lora.targets"),
    ],
)
def test_a_wrong_configuration_ends_with_code_2_and_no_traceback(
    configured: Configured, capsys: pytest.CaptureFixture[str], overrides: list[str], expected: str
) -> None:
    flags = [flag for override in overrides for flag in ("--set", override)]
    assert cli.main(["tiers", "--config", str(configured()), *flags]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert "Traceback" not in error
    assert len(error.splitlines()) < 25


def test_bad_rows_end_validation_with_code_2_and_write_nothing(
    configured: Configured, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = ['{"text": "good"}', "{broken", '{"messages": [{"role": "robot", "content": "x"}]}', '{"text": NaN}']
    (project / "bad.jsonl").write_text("\n".join(rows))
    path = configured(data={"train": "bad.jsonl", "valid": 0.5})
    assert cli.main(["validate", "--config", str(path)]) == 2
    error = capsys.readouterr().err
    for line in ("bad.jsonl:2:", "bad.jsonl:3: messages[0].role:", "bad.jsonl:4:"):
        assert line in error
    assert not Path("runs").exists()
