"""The evaluate stage: scores base, parent, champion and candidate, decides the gate, and writes the report."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nestune.backends.adapters import METADATA, adapter_files, weights_file
from nestune.backends.base import Backend
from nestune.backends.factory import make_backend
from nestune.base_model import resolve_base
from nestune.config import RunConfig
from nestune.errors import RunError
from nestune.evaluation.gate import Verdict, decide
from nestune.evaluation.history import History, read_history
from nestune.evaluation.plots import loss_curves, retention_bars, strength_curve, tier_updates
from nestune.evaluation.report import Evaluation, build_report, flat_metrics, render_html, score_as_json
from nestune.evaluation.scores import Score, Scores, columns, rows_of
from nestune.evaluation.uncertainty import score_interval
from nestune.files import read_json, replaced_folder, sha256_file, write_bytes, write_json, write_text
from nestune.registry.versions import Champion, fitting_champion, resolve_adapter
from nestune.runs import RunPaths, record_stage
from nestune.stages.assign import importance_behind
from nestune.stages.candidate import UNCOMPRESSED, check_candidate, read_strength
from nestune.stages.scoring import HeldOut, read_held_out, score_adapter
from nestune.stopping import StopRequests
from nestune.tiers.importance_picture import plot_importance
from nestune.training.start import check_trained

SEAL = "sha256.json"
EVALUATE_AGAIN = "Run nestune evaluate again."


@dataclass(frozen=True)
class EvaluateResult:
    """What the evaluate stage found: the gate's verdict, the scores behind it, and where the page about both is."""

    verdict: Verdict
    champion_version: str | None
    scores: Scores
    page: Path
    confidence: float

    def as_dict(self) -> dict[str, Any]:
        """The result as a JSON object."""
        return {
            **self.verdict.as_dict(),
            "champion_version": self.champion_version,
            "scores": {
                model: {name: self._told(score) for name, score in sets.items()} for model, sets in self.scores.items()
            },
            "page": self.page.as_posix(),
        }

    def summary(self) -> list[str]:
        """The result for a person: a row a set, exact match or else the loss, then the gate's checks.

        In brackets the candidate's interval.
        """
        titles = columns(self.scores)
        width = max(map(len, self.scores["candidate"]))
        head = "".join(f"  {title}" for title in titles)
        rows = [f"{' ' * width}{head}  {100 * self.confidence:g} % interval"]
        for name, candidate in self.scores["candidate"].items():
            values = (f"{self.scores[model][name].value:{len(title) + 2}.3f}" for title, model in titles.items())
            unit = "" if candidate.measure == "exact_match" else " nats per token"
            interval = score_interval(candidate, self.confidence)
            rows.append(f"{name:{width}}{''.join(values)}  {interval.text(3) if interval else ''}{unit}".rstrip())
        checks = [f"{'passed' if check.passed else 'FAILED'}: {check.sentence}" for check in self.verdict.checks]
        verdict = f"gate {'passed' if self.verdict.passed else 'refused'}: {self.verdict.reason}"
        return [*rows, *checks, verdict, f"report: {self.page}"]

    def _told(self, score: Score) -> dict[str, Any]:
        told = score_as_json(score, self.confidence)
        return {key: told[key] for key in ("exact_match", "loss", "interval")}


def evaluate(config: RunConfig, run: RunPaths, backend: Backend | None = None) -> EvaluateResult:
    """Score every model on the new task's held-out part and on every retention set, and decide the gate.

    Writes evaluation/ whole or not at all: report.json, metrics.json, rows.json with what each row did, report.html,
    the pictures and plots/*.csv.
    Raises RunError when the training is not complete or was of another configuration, its candidate or the dataset is
    missing or changed; ConfigError when the champion is of another base; StoppedError, within a batch, when the run is
    asked to stop.
    """
    candidate = run.candidate
    check_trained(config, run)
    check_candidate(config, run)
    base = resolve_base(config.model)
    current = fitting_champion(config, base)
    folders = _adapter_folders(config, candidate, current)
    history = read_history(run.metrics)
    held_out = read_held_out(config, run, base)
    dataset, sets = held_out.dataset, held_out.sets
    backend = backend or make_backend(config)
    adapters = {model: sha256_file(weights_file(folder)) if folder else None for model, folder in folders.items()}
    scores = _score_once(backend, folders, adapters, held_out, StopRequests(run))
    verdict = decide(scores, config.gate)
    metadata = read_json(candidate / METADATA, "Run nestune train again.")
    evaluation = Evaluation(
        config=config,
        base=base,
        dataset_sha256=dataset.sha256,
        rows={"train": len(dataset.train)}
        | {name: len(sets[name]) if name in sets else s.answers for name, s in scores["candidate"].items()},
        history=history,
        adapters=adapters,
        candidate_step=metadata["step"],
        champion_version=current.version if current else None,
        scores=scores,
        verdict=verdict,
        strength=read_strength(candidate),
        compression=metadata["compression"],
        texts=read_json(run.texts, "Run nestune train again.") if run.texts.exists() else None,
    )
    with replaced_folder(run.evaluation) as folder:
        _write(evaluation, _importance_picture(backend, run), folder)
        seal(folder, candidate)
    record_stage(run, "evaluate", inputs=[run.dataset, candidate, run.metrics], outputs=[run.evaluation])
    page = run.evaluation / "report.html"
    return EvaluateResult(verdict, evaluation.champion_version, scores, page, config.gate.confidence)


def seal(evaluation: Path, checkpoint: Path) -> None:
    """Note the hashes of a report and of what it is about, so that `register` takes no other."""
    write_json(evaluation / SEAL, {what: sha256_file(path) for what, path in _sealed(evaluation, checkpoint).items()})


def check_seal(evaluation: Path, checkpoint: Path) -> None:
    """Raise RunError when the report, or the checkpoint that it is about, is not as `evaluate` left it."""
    noted = read_json(evaluation / SEAL, EVALUATE_AGAIN)
    for what, path in _sealed(evaluation, checkpoint).items():
        if not path.is_file():
            raise RunError(f"there is no {path}. Run nestune train again.")
        if noted.get(what) != sha256_file(path):
            raise RunError(f"{path} has changed since the evaluation. {EVALUATE_AGAIN}")


def _sealed(evaluation: Path, checkpoint: Path) -> dict[str, Path]:
    return {"report": evaluation / "report.json"} | {path.name: path for path in adapter_files(checkpoint)}


def _adapter_folders(config: RunConfig, candidate: Path, current: Champion | None) -> dict[str, Path | None]:
    """Model -> its adapter's folder; None for the base without an adapter."""
    parent = config.model.adapter
    folders = {"base": None, "parent": resolve_adapter(parent, config.registry) if parent else None}
    if current is not None:
        folders["champion"] = current.folder
    if (candidate / UNCOMPRESSED).is_dir():
        folders["uncompressed"] = candidate / UNCOMPRESSED
    return folders | {"candidate": candidate}


def _score_once(
    backend: Backend,
    folders: Mapping[str, Path | None],
    adapters: Mapping[str, str | None],
    held_out: HeldOut,
    stop: StopRequests,
) -> dict[str, dict[str, Score]]:
    """The scores of each model; models with the same adapter are scored once."""
    scored: dict[str | None, dict[str, Score]] = {}
    for model, folder in folders.items():
        if adapters[model] not in scored:
            scored[adapters[model]] = score_adapter(backend, folder, held_out, stop)
    return {model: scored[adapters[model]] for model in folders}


def _importance_picture(backend: Backend, run: RunPaths) -> dict[str, bytes]:
    """The picture of the importances by name; none where the tier map was made without any."""
    measured = importance_behind(run)
    if measured is None:
        return {}
    measure = measured.measured_on["measure"]
    return {"importance": plot_importance(backend.lora_parameters(), measured.importance, measure)}


def _write(evaluation: Evaluation, more_images: Mapping[str, bytes], folder: Path) -> None:
    report = build_report(evaluation)
    images = {
        "loss": loss_curves(evaluation.history),
        "tiers": tier_updates(evaluation.history, evaluation.config.tiers.periods),
        "retention": retention_bars(evaluation.scores, evaluation.config.gate),
        **({"strength": strength_curve(evaluation.strength)} if evaluation.strength else {}),
        **more_images,
    }
    write_json(folder / "report.json", report)
    write_json(folder / "metrics.json", flat_metrics(report))
    write_text(folder / "rows.json", json.dumps(rows_of(evaluation.scores), allow_nan=False) + "\n")
    write_text(folder / "report.html", render_html(report, images))
    for name, png in images.items():
        write_bytes(folder / f"{name}.png", png)
    for name, (header, rows) in _plot_tables(evaluation.history, evaluation.scores).items():
        write_text(folder / "plots" / f"{name}.csv", _csv(header, rows))


def _plot_tables(history: History, scores: Scores) -> dict[str, tuple[Sequence[str], Sequence[Sequence[Any]]]]:
    """Header and rows of the tables that `dvc plots` draws, which takes an empty cell for a zero: there is none.

    `score` is the exact match, or the loss where a set has no answers.
    """
    retention = [
        (f"{name}{' loss' if s.exact_match is None else ''}: {model}", name, model, s.measure, s.value)
        for model, by_set in scores.items()
        for name, s in by_set.items()
    ]
    return {
        "train_loss": (("step", "train_loss"), list(zip(history.steps, history.loss, strict=True))),
        "valid_loss": (("step", "valid_loss"), list(zip(history.valid_steps, history.valid_loss, strict=True))),
        "retention": (("label", "set", "model", "measure", "score"), sorted(retention, key=lambda row: row[1])),
    }


def _csv(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue()
