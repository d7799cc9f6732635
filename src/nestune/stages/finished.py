"""What `nestune run` and the flow ask before their first stage, so that nothing is written where all is refused."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nestune.config import RunConfig
from nestune.data.find_files import find_files
from nestune.errors import ConfigError, RunError
from nestune.files import read_json, sha256_file
from nestune.registry.mlflow_run import flatten
from nestune.runs import RunPaths
from nestune.stages.commit import DVC, check_commit, commits
from nestune.stages.train import check_before_training
from nestune.training.checkpoints import newest_checkpoint
from nestune.training.start import has_ended

MANIFEST_REMEDY = "Delete it; the stages write it anew."


@dataclass(frozen=True)
class FinishedResult:
    """What a run has ended with that went through all its stages; `registration`: the result of the last one."""

    run: str
    registration: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """The result as JSON."""
        return self.registration

    def summary(self) -> list[str]:
        """The result for a person."""
        waits = "it waits for approval: nestune promote {version} --model {model}".format(**self.registration)
        return [
            "{model} version {version}, gate {gate}: {reason}".format(**self.registration),
            *([waits] if self.registration.get("waits") else []),
            f"{self.run} had finished: nothing was done. --force trains anew; stages can be run again one by one",
        ]


def check_before_running(
    config: RunConfig, run: RunPaths, force: bool = False, resume: bool = False
) -> FinishedResult | None:
    """As `check_before_training` and `check_commit`; the result of a run that has finished with this configuration.

    Raises what these two raise; ConfigError when it has finished with another one, and RunError when the data has
    changed since: going on would put another dataset, or another evaluation, in the place of those that belong to the
    adapter.
    """
    checkpoint = check_before_training(config, run, force, resume)
    if commits(config):
        check_commit(config, run)
    if checkpoint is None or force:
        return None
    trained = [config.data.train, () if isinstance(config.data.valid, float) else config.data.valid]
    _refuse_changed(run, [*trained, config.retention.replay.files], f"{checkpoint.folder} was trained")
    if not (has_ended(checkpoint, config) and _is_done(run, "register", run.registration)):
        return None
    differing = _differing(config, run)
    if differing:
        raise ConfigError(
            f"run {config.name} has finished with another configuration ({', '.join(differing)}). Take another --name, "
            "or --force to train anew; nestune validate, evaluate and register, run one by one, evaluate the same "
            "adapter otherwise."
        )
    _refuse_changed(run, [config.data.test, *config.data.retention.values()], f"run {config.name} was evaluated")
    return FinishedResult(config.name, read_json(run.registration, "Run nestune register again."))


def _refuse_changed(run: RunPaths, sets: Sequence[Sequence[str]], since: str) -> None:
    """Raise RunError where files are not those that the run's dataset was made of."""
    report = run.dataset / "report.json"
    if not report.exists():
        return
    sources = read_json(report, "Run nestune validate again.", keys=["sources"])["sources"]
    files = [path for paths in sets for path in find_files(paths)]
    changed = [str(path) for path in files if sources.get(str(path)) != sha256_file(path)]
    if changed:
        raise RunError(
            f"{', '.join(changed)} changed since {since}; nothing was written. Put back what was there, take another "
            "--name, or pass --force to train anew."
        )


def is_evaluated(config: RunConfig, run: RunPaths) -> bool:
    """Whether a run has been trained to its end and evaluated with this configuration and this data."""
    newest = newest_checkpoint(run)
    if newest is None or not has_ended(newest, config) or not _is_done(run, "evaluate", run.evaluation / "report.json"):
        return False
    if _differing(config, run):
        return False
    sources = read_json(run.dataset / "report.json", "Run nestune validate again.", keys=["sources"])["sources"]
    return all(Path(path).is_file() and sha256_file(Path(path)) == sha256 for path, sha256 in sources.items())


def _is_done(run: RunPaths, stage: str, result: Path) -> bool:
    """Whether a stage was done with the files that are there now, and its result is there."""
    if not (run.manifest.exists() and result.exists()):
        return False
    told = read_json(run.manifest, MANIFEST_REMEDY).get(stage, {"inputs": {}, "outputs": {}})
    files = {Path(path): sha256 for path, sha256 in [*told["inputs"].items(), *told["outputs"].items()]}
    return result in files and all(path.is_file() and sha256_file(path) == sha256 for path, sha256 in files.items())


def _differing(config: RunConfig, run: RunPaths) -> list[str]:
    """The keys in which the configuration of the run's last stage was another one, but for what DVC is to do."""
    try:
        then = flatten(RunConfig.model_validate(yaml.safe_load(run.config.read_text(encoding="utf-8"))))
    except (OSError, yaml.YAMLError, ValueError):
        return [f"{run.config} cannot be read"]
    return [key for key, value in flatten(config).items() if then.get(key) != value and key.partition(".")[0] != DVC]
