"""A run's folder: where its files are, and the manifest of their hashes."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from nestune.errors import ConfigError
from nestune.files import read_json, sha256_file, write_json

RUNS = Path("runs")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class RunPaths:
    """The places of one run's files; nothing is created before it is written."""

    root: Path

    @classmethod
    def of(cls, name: str) -> "RunPaths":
        """The folder of the run called `name`, below the current folder.

        Raises ConfigError for a name that no run can have, such as one that leads to another folder.
        """
        if not NAME.fullmatch(name):
            raise ConfigError(
                f"{name!r:.80} is no name of a run: it must be letters, digits, '.', '_' and '-', starting with a "
                "letter or digit, at most 64 characters. `nestune status` lists the runs."
            )
        return cls(RUNS / name)

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def retraining(self) -> Path:
        """What a scheduled retraining has found to be new; other runs have none."""
        return self.root / "retraining.json"

    @property
    def dataset(self) -> Path:
        return self.root / "dataset"

    @property
    def earlier(self) -> Path:
        """Sets of earlier tasks that had to be divided anew, named by their SHA-256."""
        return self.root / "earlier"

    @property
    def tiers(self) -> Path:
        return self.root / "tiers.json"

    @property
    def tiers_picture(self) -> Path:
        return self.root / "tiers.png"

    @property
    def importance(self) -> Path:
        return self.root / "importance.json"

    @property
    def importance_picture(self) -> Path:
        return self.root / "importance.png"

    @property
    def texts(self) -> Path:
        """What the teacher has written, where it has."""
        return self.metrics / "texts.json"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def candidate(self) -> Path:
        """The adapter that is evaluated and registered, made of a checkpoint at the end of training."""
        return self.root / "candidate"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics"

    @property
    def evaluation(self) -> Path:
        return self.root / "evaluation"

    @property
    def tracking(self) -> Path:
        return self.root / "tracking.json"

    @property
    def registration(self) -> Path:
        return self.root / "registration.json"

    @property
    def lock(self) -> Path:
        """Held by the process that is at work on the run."""
        return self.root / ".lock"

    @property
    def state(self) -> Path:
        """Which stage is, or was, under way, and how it ended."""
        return self.root / "state.json"

    @property
    def stop_request(self) -> Path:
        """Asks the process at work to stop."""
        return self.root / ".stop"

    @property
    def manifest(self) -> Path:
        return self.root / "manifest.json"


def record_stage(run: RunPaths, stage: str, inputs: Iterable[Path], outputs: Iterable[Path]) -> None:
    """Write into the run's manifest the SHA-256 of every file that a stage read and wrote.

    `inputs` and `outputs` are files or folders; folders are recorded file by file.
    """
    stages = read_json(run.manifest, "Delete it; the stages write it anew.") if run.manifest.exists() else {}
    stages[stage] = {"inputs": _hashes(inputs), "outputs": _hashes(outputs)}
    write_json(run.manifest, stages)


def _hashes(paths: Iterable[Path]) -> dict[str, str]:
    files = [file for path in paths for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    return {file.as_posix(): sha256_file(file) for file in files if file.is_file()}
