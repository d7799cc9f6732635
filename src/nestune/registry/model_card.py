"""The model card that lies in each version: README.md as the Hugging Face hub has it.

Source: https://huggingface.co/docs/hub/model-cards, its metadata block, and an own text.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from nestune.evaluation.gate import NEW_TASK
from nestune.evaluation.scores import columns

CARD = "README.md"
METADATA_MARK = "---"


def model_card(report: Mapping[str, Any], tags: Mapping[str, str], base: Path | None, model: str) -> str:
    """The card of a version of a registered model.

    report: of its evaluation; tags: of its lineage; base: the folder of the base, whose own card names its licence,
    where it is on this disk.
    """
    reference = report["base"]["reference"]
    lines = [
        METADATA_MARK,
        yaml.safe_dump(_metadata(reference, base), sort_keys=False, allow_unicode=True).rstrip(),
        METADATA_MARK,
        "",
        f"# {model}: {report['name']}",
        "",
        f"A LoRA adapter of `{reference}`, made by nestune. The gate {_verdict(report)}: {report['reason']}.",
        "",
        "## Figures",
        "",
        *_figures(report),
        "",
        "Exact match of greedy answers where a set has answers, else the loss in nats per token, on rows that were not "
        "trained on.",
        "",
        "## What it was made of",
        "",
        "| | |",
        "|---|---|",
        f"| base | `{reference}`{_at(report)}, sha256 `{report['base']['sha256']}` |",
        f"| licence of the base | {_licence(base) or 'see the base'} |",
        *(
            f"| {key.replace('_', ' ')} | `{value}` |"
            for key, value in tags.items()
            if key not in ("base", "base_sha256")
        ),
        f"| rows trained on | {report['dataset']['rows'].get('train', 'unknown')} |",
        "",
        "## Use it",
        "",
        "The folder `artifacts/adapter` is an adapter for PEFT and for mlx-lm; it fits the base of that hash alone.",
        "",
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f'model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{reference}"), "artifacts/adapter")',
        "```",
        "",
        f'With MLflow: `mlflow.pyfunc.load_model("models:/{model}@champion").predict(["..."])`, or '
        f"`mlflow models serve -m models:/{model}@champion --env-manager local`.",
        "",
    ]
    return "\n".join(lines)


def _metadata(reference: str, base: Path | None) -> dict[str, Any]:
    licence = _licence(base)
    # The hub takes only ids of its own as a base.
    named = {"base_model": reference} if base is None or not Path(reference).exists() else {}
    return {
        **({"license": licence} if licence else {}),
        **named,
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "nestune"],
    }


def _licence(base: Path | None) -> str | None:
    """What the base's card says of its licence; None where it says nothing that can be read."""
    card = base / CARD if base is not None else None
    if card is None or not card.is_file():
        return None
    parts = card.read_text(encoding="utf-8", errors="replace").split(f"{METADATA_MARK}\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return None
    try:
        told = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return None
    licence = told.get("license") if isinstance(told, dict) else None
    return str(licence) if licence else None


def _verdict(report: Mapping[str, Any]) -> str:
    return "let it pass" if report["passed"] else "refused it"


def _at(report: Mapping[str, Any]) -> str:
    revision = report["base"]["revision"]
    return f" at `{revision}`" if revision else ""


def _figures(report: Mapping[str, Any]) -> list[str]:
    titles = columns(report["scores"])
    head = ["set", *titles]
    rows = [
        [name.replace(NEW_TASK, "new task"), *(score_text(report["scores"][model][name]) for model in titles.values())]
        for name in report["scores"]["candidate"]
    ]
    return markdown_table(head, rows)


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table in Markdown, a line for each row; what would end a cell, or a line, is escaped."""
    escaped = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *escaped)]


def score_text(score: Mapping[str, Any]) -> str:
    """Exact match, or the loss in nats per token where a set has no answers."""
    return f"{score['loss']:.3f}" if score["exact_match"] is None else f"{score['exact_match']:.1%}"
