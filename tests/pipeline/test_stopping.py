"""A run that is asked to stop, wherever it is: what it keeps, how it ends, and that the same command goes on."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.pipeline.conftest import ROOT

from nestune import cli
from nestune.backends.torch_backend import TorchBackend
from nestune.data.batches import Batch
from nestune.errors import StoppedError
from nestune.files import read_json, seal_faults, sha256_file
from nestune.run_state import read_state
from nestune.runs import RunPaths
from nestune.stopping import StopRequests, signals_stop
from nestune.training.checkpoints import NEEDED

STEPS, EVAL_EVERY = 8, 2
CODES = {"SIGTERM": 128 + signal.SIGTERM, "SIGINT": 128 + signal.SIGINT, "nestune stop": StoppedError.exit_code}
# As a user's own, but for a step that takes long; it says when it has begun.
SLOW_STEP = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from nestune import cli
from nestune.backends.torch_backend import TorchBackend
steps, train_step = [], TorchBackend.train_step
def slow(self, *arguments):
    steps.append(1)
    if len(steps) == 5:
        print("sleeping", flush=True)
        time.sleep(600)
    return train_step(self, *arguments)
TorchBackend.train_step = slow
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def folder(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working folder with the demo, shortened, of which `whole` has been trained and evaluated without a stop."""
    folder = tmp_path_factory.mktemp("stopping")
    (folder / "demo").mkdir()
    (folder / "data").symlink_to(world)
    (folder / "demo" / "base").symlink_to(ROOT / "demo" / "base")
    content = yaml.safe_load((ROOT / "configs" / "demo_nestune.yaml").read_text())
    content["model"]["backend"] = "torch"
    content["data"]["retention"] = {}
    content["gate"]["require_retention"] = False
    content["training"] |= {"steps": STEPS, "eval_every": EVAL_EVERY}
    content["tiers"] = {"update_every": [1, 2, 4], "inactive_gradients": "accumulate"}
    content["retention"] = {"recipe": "none", "replay": {"files": "data/general/replay.jsonl", "rows_per_step": 16}}
    content["lora"]["dropout"] = 0.1
    (folder / "run.yaml").write_text(yaml.safe_dump(content))
    # As on a terminal; what runs in the background may have been told to ignore it.
    of_pytest = signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in ("validate", "tiers"):
            assert nestune(command, "prepared") == 0
        prepare("whole")
        for command in ("train", "evaluate"):
            assert nestune(command, "whole") == 0
        yield folder
    signal.signal(signal.SIGINT, of_pytest)


def prepare(name: str) -> RunPaths:
    """A run of which the dataset and the tier map are there."""
    shutil.copytree("runs/prepared", f"runs/{name}")
    return RunPaths.of(name)


def nestune(command: str, name: str, *options: str) -> int:
    return cli.main([command, "--config", "run.yaml", "--name", name, *options])


def code_of(command: str, name: str) -> int:
    """The exit code of the process, if this were one of its own."""
    try:
        return nestune(command, name)
    except SystemExit as ended:
        return int(ended.code or 0)


def ask(way: str, name: str) -> None:
    """Ask this process to stop: by a signal, or as `nestune stop` does from another process."""
    if way == "nestune stop":
        command = [sys.executable, "-m", "nestune.cli", "stop", name, "--wait", "0"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert "has been asked to stop" in done.stderr
        assert done.returncode == 1
    else:
        signal.raise_signal(signal.Signals[way])


def at_call(number: int, method: Callable[..., Any], do: Callable[[], None]) -> Callable[..., Any]:
    """The method of a backend, that does something at its call of this number before anything else."""
    calls = 0

    def counted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            do()
        return method(*arguments)

    return counted


def at_batch(number: int, of_call: int, loss: Callable[..., Any], do: Callable[[], None]) -> Callable[..., Any]:
    """The loss of a backend, that does something before a batch of one of its calls."""
    calls = 0

    def counted(backend: Any, batches: Iterable[Batch]) -> Any:
        nonlocal calls
        calls += 1
        return loss(backend, watched(batches) if calls == of_call else batches)

    def watched(batches: Iterable[Batch]) -> Iterator[Batch]:
        for count, batch in enumerate(batches, start=1):
            if count == number:
                do()
            yield batch

    return counted


def lines(run: RunPaths, file: str) -> list[dict[str, Any]]:
    """The lines of a metrics file but for what the clock says."""
    told = [json.loads(line) for line in (run.metrics / file).read_text().splitlines()]
    clocks = ("step_time_s", "tokens_per_s", "time")
    return [{key: value for key, value in line.items() if key not in clocks} for line in told]


def assert_equals_whole(run: RunPaths) -> None:
    whole = RunPaths.of("whole")
    ours, expected = (
        {file.relative_to(of.checkpoints): sha256_file(file) for file in of.checkpoints.glob("*/*.safetensors")}
        for of in (run, whole)
    )
    assert ours == expected
    assert len(expected) == 6  # adapter in two formats, and training state, of best and of final
    for file in ("train_metrics.jsonl", "eval_metrics.jsonl"):
        assert lines(run, file) == lines(whole, file)


def mlflow_run(run: RunPaths) -> Any:
    from mlflow import MlflowClient

    uri = f"sqlite:///{Path('mlflow/mlflow.db').absolute()}"
    return MlflowClient(uri).get_run(read_json(run.tracking, "")["run_id"])


@pytest.mark.parametrize("way", list(CODES))
@pytest.mark.parametrize("place", ["step", "validation"])
def test_a_stopped_training_keeps_where_it_is_and_ends_as_one_that_never_stopped(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], place: str, way: str
) -> None:
    name = f"{place}-{way.replace(' ', '-')}"
    run = prepare(name)
    with monkeypatch.context() as patch:
        if place == "step":
            patch.setattr(TorchBackend, "train_step", at_call(5, TorchBackend.train_step, lambda: ask(way, name)))
        else:
            patch.setattr(TorchBackend, "loss", at_batch(2, 2, TorchBackend.loss, lambda: ask(way, name)))
        assert code_of("train", name) == CODES[way]

    # The step that is under way is done; a validation is done again, as a whole.
    after, validated = (5, [2, 4]) if place == "step" else (4, [2])
    assert [line["step"] for line in lines(run, "train_metrics.jsonl")] == list(range(1, after + 1))
    assert [line["step"] for line in lines(run, "eval_metrics.jsonl")] == validated
    checkpoint = run.checkpoints / f"checkpoint_{after:07d}"
    assert seal_faults(checkpoint, NEEDED) == []
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["best", checkpoint.name]
    state = read_state(run)
    assert (state.state, state.stage, state.owner) == ("stopped", "train", None)
    assert state.reason is not None
    assert state.reason.startswith(f"stopped on request ({way}) after step {after}, kept in {checkpoint}")
    assert mlflow_run(run).info.status == "KILLED"
    assert state.reason in capsys.readouterr().err

    assert nestune("train", name) == 0
    assert f"going on after step {after}, from {checkpoint}" in capsys.readouterr().err
    assert read_state(run).state == "finished"
    assert_equals_whole(run)
    assert mlflow_run(run).info.status == "FINISHED"


@pytest.mark.parametrize("way", list(CODES))
@pytest.mark.parametrize("place", ["loss", "generation"])
def test_a_stopped_evaluation_ends_within_a_batch_and_writes_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, place: str, way: str
) -> None:
    run = RunPaths.of("whole")
    before = {file: sha256_file(file) for file in run.evaluation.rglob("*") if file.is_file()}
    answered = 0
    generate = TorchBackend.generate

    def counting(*arguments: Any) -> Any:
        nonlocal answered
        answered += 1
        return generate(*arguments)

    with monkeypatch.context() as patch:
        if place == "loss":
            patch.setattr(TorchBackend, "generate", counting)
            patch.setattr(TorchBackend, "loss", at_batch(2, 1, TorchBackend.loss, lambda: ask(way, "whole")))
        else:
            patch.setattr(TorchBackend, "generate", at_call(2, counting, lambda: ask(way, "whole")))
        assert code_of("evaluate", "whole") == CODES[way]
    # A signal ends a batch, a request waits for its end.
    assert answered == (0 if place == "loss" else 2 if way == "nestune stop" else 1)
    state = read_state(run)
    assert (state.state, state.stage) == ("stopped", "evaluate")
    assert {file: sha256_file(file) for file in run.evaluation.rglob("*") if file.is_file()} == before
    assert [path for path in run.root.rglob(".*") if path != run.lock] == []


def test_a_signal_that_is_ignored_stays_ignored(folder: Path) -> None:
    stop = StopRequests(RunPaths.of("whole"))
    of_pytest = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals_stop(stop):
            signal.raise_signal(signal.SIGINT)
            stop.check()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, of_pytest)


def test_an_evaluation_after_a_stopped_one_finds_the_same(folder: Path) -> None:
    run = RunPaths.of("whole")
    before = json.loads((run.evaluation / "metrics.json").read_text())
    assert nestune("evaluate", "whole") == 0
    assert json.loads((run.evaluation / "metrics.json").read_text()) == before
    assert read_state(run).state == "finished"


def test_a_second_ctrl_c_ends_within_a_step_and_the_checkpoint_before_goes_on(folder: Path) -> None:
    run = prepare("twice")
    command = ["train", "--config", "run.yaml", "--name", "twice", "--set", "training.checkpoint_every=4"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    with subprocess.Popen(
        [sys.executable, "-c", SLOW_STEP, *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            assert process.stdout.readline() == b"sleeping\n"
            # Another one on the same run is refused meanwhile.
            other = subprocess.run(
                [sys.executable, "-m", "nestune.cli", *command], env=environment, capture_output=True, text=True
            )
            assert other.returncode == 1
            assert f"run twice is in use by process {process.pid} on" in other.stderr
            process.send_signal(signal.SIGINT)
            while b"Ctrl-C again ends at once" not in (line := process.stderr.readline()):
                assert line, "it has ended"
            assert process.poll() is None
            process.send_signal(signal.SIGINT)
            began = time.monotonic()
            assert process.wait(timeout=60) == 130
            assert time.monotonic() - began < 30
            assert b"Traceback" not in process.stderr.read()
        finally:
            process.kill()
    assert (read_state(run).state, read_state(run).reason) == ("stopped", "interrupted (SIGINT)")
    checkpoint = run.checkpoints / "checkpoint_0000004"
    assert seal_faults(checkpoint, NEEDED) == []
    assert cli.main(command) == 0
    for file in ("adapter_model.safetensors", "training_state.safetensors"):
        ours, expected = (sha256_file(of.checkpoints / "final" / file) for of in (run, RunPaths.of("whole")))
        assert ours == expected
    for metrics in ("train_metrics.jsonl", "eval_metrics.jsonl"):
        assert lines(run, metrics) == lines(RunPaths.of("whole"), metrics)
