"""The first stage: from JSONL files to a dataset that can be trusted."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nestune.base_model import resolve_base
from nestune.config import RunConfig, dump_config
from nestune.data.records import digests_in
from nestune.data.report import DatasetReport
from nestune.data.tokens import load_tokenizer, tokenizer_files
from nestune.data.validation import build_dataset
from nestune.files import write_text
from nestune.runs import RunPaths, record_stage
from nestune.stages.earlier import find_earlier_sets, known_files


@dataclass(frozen=True)
class ValidateResult:
    """Where the dataset is, and what is in it."""

    dataset: Path
    report: DatasetReport

    def as_dict(self) -> dict[str, Any]:
        """The result as a JSON object."""
        return {
            "dataset": self.dataset.as_posix(),
            "data_docs": (self.dataset / "data_docs" / "index.html").as_posix(),
            "sha256": self.report.sha256,
            "records": {name: report.records for name, report in self.report.sets.items()},
            "rejected": self.report.rejected,
        }

    def summary(self) -> list[str]:
        """The result for a person."""
        sets = [f"{name}: {report.records} records" for name, report in self.report.sets.items()]
        rejected = [f"rejected: {self.report.rejected} records, see {self.dataset / 'rejected.jsonl'}"]
        known = self.report.sets["train"].known
        left_out = [f"left out: {known} records of train that an earlier task has"] if known else []
        docs = f"report: {self.dataset / 'report.json'} and {self.dataset / 'data_docs' / 'index.html'}"
        return [*sets, *left_out, *(rejected if self.report.rejected else []), docs]


def validate(config: RunConfig, run: RunPaths) -> ValidateResult:
    """Check all data of a run and write its dataset; the resolved configuration is written beside it.

    Raises DataError with every fault of the data, ConfigError when the base model does not suit it, or rows of an
    earlier task that are to be replayed, or left out, are not found.
    """
    base = resolve_base(config.model)
    data = config.data.model_copy(update={"max_seq_length": base.row_limit(config.data.max_seq_length)})
    tokenizer = load_tokenizer(base.folder)
    earlier = find_earlier_sets(config, run)
    seed = config.training.seed
    known = digests_in(known_files(config, run)) if config.data.only_new else frozenset()
    report = build_dataset(data, config.retention, tokenizer, run.dataset, base.vocabulary, earlier, seed, known)
    write_text(run.config, dump_config(config))
    record_stage(
        run,
        "validate",
        inputs=[*map(Path, report.sources), *tokenizer_files(base.folder)],
        outputs=[run.config, run.dataset],
    )
    return ValidateResult(run.dataset, report)
