"""`nestune status`: how runs stand, read from their folders alone, while they run and afterwards."""

import json
import os
import statistics
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from nestune.backends.adapter_config import read_adapter_config
from nestune.backends.adapters import METADATA
from nestune.errors import ConfigError, RunError
from nestune.files import read_json
from nestune.run_state import RunState, read_state
from nestune.runs import RUNS, RunPaths
from nestune.stages.tables import aligned
from nestune.training.recorder import EVAL_METRICS, TRAIN_METRICS

# Enough for the lines of many steps; a metrics file may have a million.
TAIL_BYTES = 64 * 1024
# Steps whose time tells how long the rest will take.
RECENT = 50


@dataclass(frozen=True)
class RunStatus:
    """One run: how it stands, and how far its training is.

    Losses in nats per supervised token; tokens_per_s and left_s from the last steps, left_s only while it trains;
    candidate: what it was made of and how, once it is there.
    """

    run: str
    state: RunState
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    valid_loss: float | None = None
    best_valid_loss: float | None = None
    update_counts: tuple[int, ...] = ()
    tokens_per_s: float | None = None
    left_s: float | None = None
    candidate: dict[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """The status as JSON."""
        content = asdict(self)
        return {"run": content.pop("run"), **content.pop("state"), **content}

    def lines(self) -> list[str]:
        """The status for a person, in full."""
        state = self.state
        stage = f" ({state.stage})" if state.stage else ""
        found = [f"{self.run}: {state.state}{stage}{f', since {state.since}' if state.since else ''}"]
        if state.owner is not None and state.state in ("running", "starting"):
            found.append(f"by {state.owner}")
        if state.reason:
            found.append(state.reason)
        return found + self.progress()

    def progress(self) -> list[str]:
        """How far the training is, for a person."""
        found = []
        if self.step is not None:
            found.append(f"step {self.step}{f' of {self.steps}' if self.steps else ''}{self._left()}")
        losses = {"train": self.loss, "valid": self.valid_loss, "best valid": self.best_valid_loss}
        told = [f"{what} {loss:.4f}" for what, loss in losses.items() if loss is not None]
        if told:
            found.append(f"loss: {', '.join(told)} nats per token")
        if self.update_counts:
            found.append(f"updates of each tier: {' / '.join(map(str, self.update_counts))}")
        if self.tokens_per_s is not None:
            found.append(f"{self.tokens_per_s:,.0f} tokens/s")
        if self.candidate is not None:
            found.append(
                "candidate: {checkpoint} of step {step}, strength {factor:g}, rank {rank}".format(**self.candidate)
            )
        return found

    def row(self) -> list[str]:
        """The status as a row of a table."""
        step = "" if self.step is None else f"{self.step}{f'/{self.steps}' if self.steps else ''}"
        loss = "" if self.loss is None else f"{self.loss:.3f}"
        stage = self.state.stage or ""
        return [self.run, self.state.state, stage, step, loss, self._left().removeprefix(", ")]

    def _left(self) -> str:
        if self.left_s is None:
            return ""
        hours, seconds = divmod(round(self.left_s), 3600)
        return f", {f'{hours} h ' if hours else ''}{seconds // 60} min {seconds % 60} s left"


@dataclass(frozen=True)
class StatusResult:
    """How one run stands, or all of them."""

    runs: tuple[RunStatus, ...]
    one: bool

    def as_dict(self) -> dict[str, Any]:
        """The result as JSON: one run's own, or those of all by name."""
        return self.runs[0].as_dict() if self.one else {status.run: status.as_dict() for status in self.runs}

    def summary(self) -> list[str]:
        """The result for a person."""
        if self.one:
            return self.runs[0].lines()
        if not self.runs:
            return [f"there are no runs in {RUNS.absolute()}"]
        return aligned([["run", "state", "stage", "step", "loss", ""], *(status.row() for status in self.runs)])


def status(run: RunPaths | None) -> StatusResult:
    """How a run stands, or, without one, every run below the current folder.

    Raises ConfigError when there is no such run.
    """
    if run is not None:
        if not run.root.is_dir():
            raise ConfigError(f"there is no run {run.root.name} in {RUNS.absolute()}. `nestune status` lists the runs.")
        return StatusResult((read_status(run),), one=True)
    folders = sorted(path for path in RUNS.iterdir() if path.is_dir()) if RUNS.is_dir() else []
    runs = [RunPaths(folder) for folder in folders]
    return StatusResult(tuple(read_status(run) for run in runs if _is_run(run)), one=False)


def read_status(run: RunPaths) -> RunStatus:
    """How a run stands, from its folder."""
    state = read_state(run)
    if state.state == "new":
        state = _came_from_elsewhere(run) or state
    steps = _lines(run.metrics / TRAIN_METRICS, TAIL_BYTES)
    if not steps:
        return RunStatus(run.root.name, state, steps=_steps(run))
    validations = _lines(run.metrics / EVAL_METRICS)
    valid = [line["valid_loss"] for line in validations]
    best = [line["valid_loss"] for line in validations if line["best"]]
    last, total = steps[-1], _steps(run)
    recent = [line["step_time_s"] for line in steps[-RECENT:]]
    trains = state.state == "running" and state.stage == "train" and total is not None
    return RunStatus(
        run=run.root.name,
        state=state,
        step=last["step"],
        steps=total,
        loss=last["loss"],
        valid_loss=valid[-1] if valid else None,
        best_valid_loss=best[-1] if best else None,
        update_counts=tuple(last["update_counts"]),
        tokens_per_s=statistics.median(line["tokens_per_s"] for line in steps[-RECENT:]),
        candidate=_candidate(run),
        left_s=statistics.fmean(recent) * (total - last["step"]) if trains and total is not None else None,
    )


def _is_run(run: RunPaths) -> bool:
    # Not the lock: that of a series of retrainings is in a folder of the series' name, which is no run.
    return run.state.exists() or run.config.exists() or _came_from_elsewhere(run) is not None


def _came_from_elsewhere(run: RunPaths) -> RunState | None:
    """How a run stands that another machine has made, from what `dvc pull` has brought; None where nothing tells."""
    if run.state.exists():
        return None
    left = {"register": run.registration, "evaluate": run.evaluation / "report.json", "train": run.candidate}
    stage = next((stage for stage, path in left.items() if path.exists()), None)
    return RunState("finished", stage) if stage is not None else None


def _steps(run: RunPaths) -> int | None:
    """The steps that the run's configuration asks for; None where it cannot be read."""
    try:
        content = yaml.safe_load(run.config.read_text(encoding="utf-8"))
        return int(content["training"]["steps"])
    except (OSError, yaml.YAMLError, ValueError, KeyError, TypeError):
        return None


def _candidate(run: RunPaths) -> dict[str, Any] | None:
    """What the candidate's metadata tell of it; None where there is none, or they cannot be read."""
    try:
        told = read_json(run.candidate / METADATA, "", keys=["made_from", "step", "factor", "compression"])
        rank = read_adapter_config(run.candidate).sizes[0].rank
        return {
            "checkpoint": str(told["made_from"]["evaluation.checkpoint"]),
            "step": int(told["step"]),
            "factor": float(told["factor"]),
            "rank": rank,
            "compressed": told["compression"] is not None,
        }
    except (OSError, RunError, ValueError, KeyError, TypeError, IndexError):
        return None


def _lines(path: Path, tail_bytes: int = sys.maxsize) -> list[Mapping[str, Any]]:
    """The whole lines, in its last bytes, of a metrics file, which may be written to just now."""
    try:
        with path.open("rb") as file:
            begins = max(0, file.seek(0, os.SEEK_END) - tail_bytes)
            file.seek(begins)
            lines = file.read().split(b"\n")
        # The first may be cut off where the tail begins; the last is empty, or not yet whole.
        return [json.loads(line) for line in lines[1 if begins else 0 : -1]]
    except (OSError, ValueError):
        return []
