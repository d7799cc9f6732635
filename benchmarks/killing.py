"""A training to be killed, started again and again, and compared with one that was not."""

import json
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import yaml

from killable import Operation, Order
from nestune.files import sha256_file
from nestune.run_state import read_state
from nestune.runs import RunPaths
from nestune.stages.candidate import STRENGTH

ROOT = Path(__file__).resolve().parents[1]
PREPARED, REFERENCE = "prepared", "reference"
WEIGHTS_AND_STATE = ("adapter_model.safetensors", "adapters.safetensors", "training_state.safetensors")
METRICS = ("train_metrics.jsonl", "eval_metrics.jsonl")
CLOCKS = ("step_time_s", "tokens_per_s", "time")
# Nothing of a run takes minutes.
PATIENCE_S = 300


@dataclass(frozen=True)
class Ending:
    """How a start of a training ended: its exit code, or minus the signal; where it died; what it had said."""

    status: int
    note: dict[str, Any]
    said: str

    @property
    def killed(self) -> bool:
        return self.status == -signal.SIGKILL


class Started(Protocol):
    """A training that was started: the process group to kill, and how to wait."""

    pid: int

    def wait(self, timeout_s: float) -> int | None:
        """Its exit code, or minus the signal that ended it; None when it has not ended by then."""
        ...


@dataclass
class Workplace:
    """A folder with data, a configuration, and runs of it that differ in nothing but their names."""

    folder: Path
    backend: str
    steps: int
    operations: list[Operation] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.output, self._note = self.folder / "output.txt", self.folder / "note.json"
        self._numbers = count(1)
        self._forking: subprocess.Popen[str] | None = None

    @property
    def reference(self) -> Path:
        """The run that was never killed."""
        return self.folder / "runs" / REFERENCE

    def fresh(self, of: str = PREPARED) -> Path:
        """A new run, at the point where another one is."""
        run = self.folder / "runs" / f"chain-{next(self._numbers)}"
        shutil.copytree(self.folder / "runs" / of, run)
        return run

    def command(self, run: Path, stage: str = "train") -> list[str]:
        """The arguments of `nestune` that take a run through a stage, or go on with it."""
        return [stage, "--config", "run.yaml", "--name", run.name]

    def begin(self, run: Path, real: bool) -> "Started":
        """Start a training; real: as a user does, else forked."""
        if not real:
            return Forked(self, self._ask(self._order(run)))
        with self.output.open("wb") as output:
            command = [sys.executable, "-m", "nestune.cli", *self.command(run)]
            process = subprocess.Popen(command, cwd=self.folder, stdout=output, stderr=output, start_new_session=True)
        return Real(process)

    def said(self) -> str:
        """What the last start said."""
        return self.output.read_text(encoding="utf-8", errors="replace") if self.output.exists() else ""

    def start(
        self,
        run: Path,
        operations: Mapping[str, int] | None = None,
        torn: int | None = None,
        stage: str = "train",
        **call: Any,
    ) -> Ending:
        """Start a stage that dies at one of these operations, or at a call, and wait for its end; see `killable`."""
        self._ask(self._order(run, stage, operations=dict(operations or {}), torn=torn, **call))
        status = self.answer(PATIENCE_S)
        assert status is not None, f"{run} has not ended: {self.said()}"
        return Ending(status, json.loads(self._note.read_text()) if self._note.exists() else {}, self.said())

    def answer(self, timeout_s: float) -> int | None:
        """How the run that was forked ended; None while it has not."""
        assert self._forking is not None
        assert self._forking.stdout is not None
        if not select.select([self._forking.stdout], [], [], timeout_s)[0]:
            return None
        return int(self._line()["status"])

    def _order(self, run: Path, stage: str = "train", **death: Any) -> Order:
        for path in (self._note, self.output):
            path.unlink(missing_ok=True)
        return Order(tuple(self.command(run, stage)), f"runs/{run.name}", str(self.output), str(self._note), **death)

    def _ask(self, order: Order) -> int:
        """Have a run forked; returns its process id, which is that of its group."""
        assert self._forking is not None
        assert self._forking.stdin is not None
        self._forking.stdin.write(json.dumps(asdict(order)) + "\n")
        self._forking.stdin.flush()
        return int(self._line()["pid"])

    def _line(self) -> dict[str, Any]:
        assert self._forking is not None
        assert self._forking.stdout is not None
        line = self._forking.stdout.readline()
        assert line, f"benchmarks/killable.py has ended: {self._forking.wait()}"
        content: dict[str, Any] = json.loads(line)
        return content

    @contextmanager
    def forking(self) -> Iterator[None]:
        """Have a process at hand from which runs are forked."""
        command = [sys.executable, str(ROOT / "benchmarks" / "killable.py"), self.backend]
        with subprocess.Popen(
            command, cwd=self.folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            self._forking = process
            yield
            assert process.stdin is not None
            process.stdin.close()


class Real:
    """Started by the command, as a user starts it."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.pid, self._process = process.pid, process

    def wait(self, timeout_s: float) -> int | None:
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None


class Forked:
    """Forked from a process that has the libraries."""

    def __init__(self, place: Workplace, pid: int) -> None:
        self.pid, self._place = pid, place

    def wait(self, timeout_s: float) -> int | None:
        return self._place.answer(timeout_s)


@contextmanager
def workplace(folder: Path, backend: str, steps: int, **blocks: Mapping[str, Any]) -> Iterator[Workplace]:
    """Make data, a configuration and the run that is never killed, all of it with all that must be remembered.

    Windows of accumulated gradients, gradient accumulation, dropout, replayed rows, moments, early stopping that is not
    reached, warm-up and cosine. `blocks` go on top of the configuration.
    """
    subprocess.run(
        [sys.executable, ROOT / "demo" / "world.py", "--out", folder / "data"], check=True, capture_output=True
    )
    for rows, file in ((200, "general/replay.jsonl"), (200, "new_facts/train.jsonl"), (48, "new_facts/valid.jsonl")):
        path = folder / "data" / file
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:rows]))
    (folder / "run.yaml").write_text(yaml.safe_dump(configuration(backend, steps, blocks)))
    place = Workplace(folder, backend, steps)
    prepared = folder / "runs" / PREPARED
    with place.forking():
        for stage in ("validate", "tiers"):
            ended = place.start(prepared, stage=stage)
            assert ended.status == 0, ended.said
        shutil.copytree(prepared, place.reference)
        ended = place.start(place.reference)
        assert ended.status == 0, ended.said
        place.operations = [Operation(**seen) for seen in ended.note["seen"]]
        yield place


def configuration(backend: str, steps: int, blocks: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The configuration of the trainings, with blocks on top."""
    content: dict[str, Any] = {
        "name": "killed",
        "model": {"base": str(ROOT / "demo" / "base"), "backend": backend},
        "lora": {"rank": 4, "alpha": 8, "dropout": 0.1},
        "data": {"train": "data/new_facts/train.jsonl", "valid": "data/new_facts/valid.jsonl", "max_seq_length": 64},
        "tiers": {"update_every": [1, 2, 3], "inactive_gradients": "accumulate"},
        "retention": {"recipe": "none", "replay": {"files": "data/general/replay.jsonl", "rows_per_step": 2}},
        "training": {
            "steps": steps,
            "batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 2.0e-3,
            "warmup_steps": 5,
            "weight_decay": 0.01,
            "eval_every": 3,
            "checkpoint_every": 4,
            "keep_last": 2,
            "early_stopping": {"patience": steps},
        },
        "evaluation": {"batch_size": 16},
    }
    return content | {block: content[block] | dict(values) for block, values in blocks.items()}


def differences(place: Workplace, run: Path) -> list[str]:
    """In what a run that has ended is not as the one that was never killed; empty when it is."""
    ours, expected = _weights_and_states(run), _weights_and_states(place.reference)
    found = [f"{name} is missing" for name in expected.keys() - ours.keys()]
    found += [f"{name} is left over" for name in ours.keys() - expected.keys()]
    found += [f"{name} differs" for name in expected.keys() & ours.keys() if ours[name] != expected[name]]
    for file in METRICS:
        if metrics_lines(run / "metrics" / file) != metrics_lines(place.reference / "metrics" / file):
            found.append(f"metrics/{file} differs")
    found += [f"{path.relative_to(run)} is left over" for path in run.rglob(".*") if path.name != ".lock"]
    state = read_state(RunPaths(run))
    if (state.state, state.stage) != ("finished", "train"):
        found.append(f"its state is {state.state} ({state.stage})")
    return found + _manifest_faults(run)


def metrics_lines(path: Path, without: Sequence[str] = CLOCKS) -> list[dict[str, Any]]:
    """The lines of a metrics file, without what the clock says."""
    told = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in without} for line in told]


def _weights_and_states(run: Path) -> dict[str, str]:
    files = [path for file in WEIGHTS_AND_STATE for path in (run / "checkpoints").glob(f"[!.]*/{file}")]
    files += [path for path in (run / "candidate").rglob("*") if path.name in (*WEIGHTS_AND_STATE, STRENGTH)]
    return {f"{path.parent.name}/{path.name}": sha256_file(path) for path in files}


def _manifest_faults(run: Path) -> list[str]:
    """Where the manifest does not tell of what training has left."""
    told = json.loads((run / "manifest.json").read_text()).get("train", {"outputs": {}})["outputs"]
    folders = [run / name for name in ("checkpoints", "metrics", "candidate")]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    left = {f"runs/{run.name}/{path.relative_to(run).as_posix()}": sha256_file(path) for path in files}
    return [] if told == left else ["manifest.json tells otherwise than the files"]
