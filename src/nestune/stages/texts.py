"""What training holds the model on, and what strength is measured on: texts that the teacher has written."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from nestune.backends.adapters import weights_file
from nestune.backends.base import Backend
from nestune.data.openings import held_row, openings_of, prompts_of, refuse_scored_prompts
from nestune.data.tokens import Row, tokenizer_files
from nestune.files import sha256_file, sha256_files, write_json
from nestune.runs import RunPaths
from nestune.stages.inputs import TrainingInputs
from nestune.stopping import StopRequests
from nestune.training.mentions import mentioned
from nestune.training.self_written import SelfWritten, self_written

EXAMPLES = 10


def with_texts(inputs: TrainingInputs, backend: Backend, stop: StopRequests | None = None) -> TrainingInputs:
    """The inputs with the texts that the teacher writes; as they are where none are asked for.

    Leaves the backend computing with the teacher: training is begun afterwards. Raises ConfigError when the teacher
    has nothing to write from, or is asked what is scored; StoppedError between two batches.
    """
    kl = inputs.config.retention.kl
    if kl is None or not kl.writes:
        return inputs
    dataset, seed = inputs.dataset, inputs.config.training.seed
    teacher = inputs.parent if kl.teacher == "parent" else None
    prompts = prompts_of(kl.prompts, inputs.config.data, dataset.tokenizer, dataset.max_length, seed)
    refuse_scored_prompts(prompts, [row for rows in _scored(inputs).values() for row in rows])
    made_from = {
        "base": inputs.base.sha256,
        "teacher": sha256_file(weights_file(teacher)) if teacher is not None else None,
        "tokenizer": sha256_files(inputs.base.folder, tokenizer_files(inputs.base.folder)),
        "dtype": inputs.config.model.dtype,
        "precision": inputs.config.training.precision,
    }
    backend.show_adapter(teacher)
    written = self_written(
        backend,
        kl,
        openings_of(dataset.tokenizer),
        prompts,
        made_from,
        int(dataset.tokenizer.eos_token_id),
        inputs.config.evaluation.batch_size,
        seed,
        stop,
    )
    held, measuring = (
        tuple(held_row(text[: dataset.max_length]) for text in texts) for texts in (written.held, written.measuring)
    )
    return replace(inputs, texts=held, measuring=measuring, written=written)


def write_texts_report(inputs: TrainingInputs, run: RunPaths) -> None:
    """Write texts.json: how many texts there are, some of them, and how much of each scored set they mention."""
    if inputs.written is None:
        run.texts.unlink(missing_ok=True)
        return
    write_json(run.texts, _report(inputs, inputs.written))


def _report(inputs: TrainingInputs, written: SelfWritten) -> dict[str, Any]:
    decode = inputs.dataset.tokenizer.decode
    texts = [decode(text, skip_special_tokens=True) for text in written.held]
    return {
        "sha256": written.sha256,
        "held": len(written.held),
        "measuring": len(written.measuring),
        "tokens": sum(map(len, written.held)),
        "mentioned": {name: mentioned(rows, texts, decode) for name, rows in _scored(inputs).items()},
        "examples": [decode(text) for text in written.held[:EXAMPLES]],
    }


def _scored(inputs: TrainingInputs) -> dict[str, Sequence[Row]]:
    return {"new_task": inputs.dataset.scored, **inputs.dataset.retention}
