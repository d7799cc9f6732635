"""Stage register: the adapter becomes a version, with its lineage; champion, if the gate let it pass."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nestune.backends.adapters import METADATA
from nestune.config import RunConfig, dump_config
from nestune.data.lineage import earlier_tasks
from nestune.evaluation.scores import columns
from nestune.files import read_json, sha256_file, write_json, write_text
from nestune.foreign_files import folder_at
from nestune.registry.catching_up import resume_tracking
from nestune.registry.connection import OF_TRAINING
from nestune.registry.gate_record import GATE, REPORT, REPORT_SHA256, STEP, metrics_of
from nestune.registry.ledger import told
from nestune.registry.mlflow_run import MlflowRun
from nestune.registry.model_card import CARD, markdown_table, model_card, score_text
from nestune.registry.promotion import history_of, promote_version
from nestune.registry.versions import SCORES, aliases_of, describe_version, register_version, tag_version
from nestune.runs import RunPaths, record_stage
from nestune.stages.assign import importance_behind
from nestune.stages.evaluate import EVALUATE_AGAIN, check_seal
from nestune.stages.promote import promote
from nestune.stages.retraining import attempt_tags


@dataclass(frozen=True)
class RegisterResult:
    """The version that was made and what became of it.

    `gate` is `passed`, `refused`, or `outdated`: another version became champion since the gate compared. `waits`: it
    passed, and is promoted when a person says so.
    `page` shows the MLflow run, once `open_with` (None: a server is running) has been started.
    """

    model: str
    version: str
    aliases: tuple[str, ...]
    promoted: bool
    gate: str
    reason: str
    tracking_uri: str
    run_id: str
    page: str
    open_with: str | None
    waits: bool = False

    def as_dict(self) -> dict[str, Any]:
        """The result as JSON."""
        return asdict(self) | {"aliases": list(self.aliases)}

    def summary(self) -> list[str]:
        """The result for a person."""
        look = f", once this runs: {self.open_with}" if self.open_with else ""
        return [
            f"{self.model} version {self.version}, {' and '.join(self.aliases) or 'without an alias'}",
            f"gate {self.gate}: {self.reason}",
            *([f"it waits for approval: nestune promote {self.version} --model {self.model}"] if self.waits else []),
            f"page: {self.page}{look}",
        ]


def register(config: RunConfig, run: RunPaths) -> RegisterResult:
    """Register the evaluated candidate and promote it when the gate let it pass; writes `registration.json`.

    A candidate that the gate refused, or whose champion has changed since, is registered and marked, not promoted.
    Raises RunError when the report is not of the candidate as it is now, ServiceError when MLflow fails.
    """
    candidate = run.candidate
    report = read_json(run.evaluation / "report.json", "Run nestune evaluate first.")
    check_seal(run.evaluation, candidate)
    write_text(run.config, dump_config(config))
    lineage = _lineage(run, candidate, report)
    tracked = resume_tracking(config, run, lineage)
    _log_evaluation(tracked, run, report)
    of_training = tracked.tags()
    tags = lineage | {key: of_training[key] for key in ("run", "parent", "git_commit")}
    path = run.evaluation / REPORT
    card = model_card(report, tags, folder_at(lineage["base"]), config.registry.registered_model)
    files = {REPORT: path.read_bytes(), CARD: card.encode("utf-8")}
    tags |= {REPORT_SHA256: sha256_file(path), SCORES: json.dumps(_scores(report))}
    tags |= {STEP: str(report["candidate"]["step"])} | attempt_tags(run)
    version = register_version(config, tracked.run_id, candidate, tags, files)

    gate, reason = "passed" if report["passed"] else "refused", report["reason"]
    history = history_of(config.registry)
    undone = history.undone(version)
    waits = (
        gate == "passed"
        and history.champion != version
        and (config.registry.promote == "approve" or undone is not None)
    )
    if undone is not None:
        reason += f"; {told(undone)}"
    promoted = (
        gate == "passed"
        and not waits
        and promote_version(config.registry, version, report["champion_version"], reason, tags[REPORT_SHA256])
    )
    if gate == "passed" and not (promoted or waits):
        compared = f"version {report['champion_version']}" if report["champion_version"] else "none"
        gate, reason = "outdated", f"the champion is no longer the one compared with ({compared}). {EVALUATE_AGAIN}"
    outcome = {GATE: gate, "gate_reason": reason}
    tag_version(config.registry, version, outcome)
    tracked.set_tags(outcome | {"version": version})

    result = RegisterResult(
        model=config.registry.registered_model,
        version=version,
        aliases=aliases_of(config.registry, version),
        promoted=promoted,
        gate=gate,
        reason=reason,
        tracking_uri=tracked.uri,
        run_id=tracked.run_id,
        page=tracked.page(),
        open_with=tracked.open_with(),
        waits=waits,
    )
    _describe(config, tracked, run, result.as_dict())
    write_json(run.registration, result.as_dict())
    record_stage(run, "register", [candidate, run.evaluation], [run.registration])
    return result


def decide(config: RunConfig, run: RunPaths, approve: bool, reason: str) -> dict[str, Any]:
    """What a person says of the version of a run that waits: it is promoted, or stays as it is; the reason is kept.

    Rewrites `registration.json` and returns what it holds. Raises what `promote` raises.
    """
    registered: dict[str, Any] = read_json(run.registration, "Run nestune register first.")
    word = f"{'approved' if approve else 'not approved'}{f': {reason}' if reason else ''}"
    if approve:
        promote(config.registry, registered["version"], reason=word)
    tag_version(config.registry, registered["version"], {"approval": word})
    aliases = list(aliases_of(config.registry, registered["version"]))
    changes = {"promoted": approve, "waits": False, "aliases": aliases, "reason": f"{registered['reason']}; {word}"}
    write_json(run.registration, registered | changes)
    record_stage(run, "register", [run.candidate, run.evaluation], [run.registration])
    return registered | changes


def as_markdown(run: RunPaths, registered: Mapping[str, Any]) -> str:
    """What became of a version, the gate's reason, the scores and where to look, as Markdown."""
    waits = "waits for approval" if registered["waits"] else f"not promoted (gate: {registered['gate']})"
    verdict = "promoted to champion" if registered["promoted"] else waits
    title = f"# {registered['model']} version {registered['version']}: {verdict}"
    return "\n".join([title, registered["reason"], "", *_scores_and_pages(run, registered)])


def _describe(config: RunConfig, tracked: MlflowRun, run: RunPaths, registered: Mapping[str, Any]) -> None:
    """Have MLflow's pages of the version and of its run tell what the gate said; who is champion may change."""
    said = f"Gate {registered['gate']}: {registered['reason']}"
    told = "\n".join([said, "", *_scores_and_pages(run, registered)])
    describe_version(config.registry, registered["version"], told)
    tracked.describe(told)


def _scores_and_pages(run: RunPaths, registered: Mapping[str, Any]) -> list[str]:
    scores = json.loads((run.evaluation / "report.json").read_text(encoding="utf-8"))["scores"]
    titles = columns(scores)
    rows = [[name, *(score_text(scores[model][name]) for model in titles.values())] for name in scores["candidate"]]
    page = registered["page"].removesuffix(OF_TRAINING)
    version = f"{page.partition('/#/')[0]}/#/models/{registered['model']}/versions/{registered['version']}"
    return [
        *markdown_table(["set", *titles], rows),
        "",
        "Exact match where a set has answers, else loss in nats per token.",
        "",
        f"- [Report]({page}/artifacts/evaluation/report.html{OF_TRAINING}), with pictures and answers that are wrong; "
        f"also in `{run.evaluation / 'report.html'}`",
        f"- [Curves]({page}/model-metrics{OF_TRAINING}) of the training",
        f"- [Version {registered['version']}]({version}{OF_TRAINING}) of {registered['model']}",
        *(["", f"MLflow's pages, once `{registered['open_with']}` runs."] if registered["open_with"] else []),
    ]


def _scores(report: Mapping[str, Any]) -> dict[str, float]:
    """What the candidate scored: exact match, or the loss where a set has no answers."""
    return {
        name: score["loss"] if score["exact_match"] is None else score["exact_match"]
        for name, score in report["scores"]["candidate"].items()
    }


def _lineage(run: RunPaths, candidate: Path, report: Mapping[str, Any]) -> dict[str, str]:
    """What the adapter was made of, by content hash."""
    metadata = read_json(candidate / METADATA, "Run nestune train again.", keys=["base"])
    tier_map = read_json(run.tiers, "Run nestune tiers again.", keys=["sha256"])
    tasks = earlier_tasks(candidate)
    tracked_by_dvc = " ".join(f"{path}={hashed}" for path, hashed in tasks[-1].dvc.items()) if tasks else ""
    return {
        "base": str(metadata["base"]["reference"]),
        "base_sha256": str(metadata["base"]["sha256"]),
        "dataset_sha256": str(report["dataset"]["sha256"]),
        "tier_map_sha256": str(tier_map["sha256"]),
        **({"dvc": tracked_by_dvc} if tracked_by_dvc else {}),
    }


def _log_evaluation(tracked: MlflowRun, run: RunPaths, report: Mapping[str, Any]) -> None:
    tracked.log_scores(report["candidate"]["step"], metrics_of(report))
    files = [run.tiers, run.tiers_picture, run.manifest, run.config]
    if importance_behind(run) is not None:
        files += [run.importance, run.importance_picture]
    tracked.log_files(*(path for path in files if path.exists()))
    tracked.log_files(run.evaluation, folder="evaluation")
    tracked.log_files(run.dataset / "report.json", folder="dataset")
