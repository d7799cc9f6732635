"""Scores of any adapter, or of the base alone, on the sets of a run: nothing is decided, and the run stays as it is."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nestune.backends.adapters import weights_file
from nestune.backends.base import Backend
from nestune.backends.factory import make_backend
from nestune.base_model import resolve_base
from nestune.config import RunConfig
from nestune.evaluation.report import score_as_json
from nestune.evaluation.scores import Score
from nestune.evaluation.uncertainty import score_interval
from nestune.files import sha256_file, write_json
from nestune.registry.versions import resolve_adapter
from nestune.runs import RunPaths
from nestune.stages.scoring import read_held_out, score_adapter

BASE = "base"


@dataclass(frozen=True)
class AdapterScores:
    """The scores of one model by set, with intervals; `adapter_sha256` None: the base alone."""

    adapter: str
    adapter_sha256: str | None
    dataset_sha256: str
    scores: Mapping[str, Score]
    confidence: float

    def as_dict(self) -> dict[str, Any]:
        """The scores as a JSON object, without what each row did."""
        return {
            "adapter": self.adapter,
            "adapter_sha256": self.adapter_sha256,
            "dataset_sha256": self.dataset_sha256,
            "confidence": self.confidence,
            "scores": {name: score_as_json(score, self.confidence) for name, score in self.scores.items()},
        }

    def summary(self) -> list[str]:
        """The scores for a person: a row a set, exact match or else the loss."""
        width = max(map(len, self.scores))
        lines = [f"{self.adapter}: scores with {100 * self.confidence:g} % intervals"]
        for name, score in self.scores.items():
            interval = score_interval(score, self.confidence)
            between = f" {interval.text(3)}" if interval else ""
            unit = "nats per token" if score.measure == "loss" else f"{score.called} of {score.answers} answers"
            lines.append(f"{name:{width}}  {score.value:.3f}{between} {unit}")
        return lines


def evaluate_adapter(
    config: RunConfig, run: RunPaths, adapter: str, out: Path | None = None, backend: Backend | None = None
) -> AdapterScores:
    """Score an adapter on the new task and the retention sets of a run's dataset.

    adapter: a folder, `models:/<name>@<alias>`, `models:/<name>/<version>`, or `base`; out: a JSON file that the scores
    and what each row did are written to. Raises ConfigError when there is no such adapter or it is of another base,
    RunError when the run has no dataset, or one of other settings.
    """
    base = resolve_base(config.model)
    folder = None if adapter == BASE else resolve_adapter(adapter, config.registry)
    held_out = read_held_out(config, run, base)
    scores = score_adapter(backend or make_backend(config), folder, held_out)
    result = AdapterScores(
        adapter=adapter,
        adapter_sha256=sha256_file(weights_file(folder)) if folder else None,
        dataset_sha256=held_out.dataset.sha256,
        scores=scores,
        confidence=config.gate.confidence,
    )
    if out is not None:
        rows = {name: score.outcomes.as_dict() for name, score in scores.items() if score.outcomes is not None}
        write_json(out, result.as_dict() | {"rows": rows})
    return result
