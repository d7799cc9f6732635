"""The gate on adapters that really were trained: one that learned nothing, one that forgot, and what noise hides."""

from collections.abc import Mapping
from pathlib import Path

import pytest
from tests.pipeline.conftest import ROOT

from nestune.backends.factory import make_backend
from nestune.config import GateConfig, RunConfig
from nestune.data.batches import training_steps
from nestune.data.records import read_records
from nestune.data.tokens import Row, Tokenizer, encode_all, load_tokenizer
from nestune.evaluation.gate import Verdict, decide
from nestune.evaluation.scores import Score, score

SETS = {"new_task": "new_facts/valid", "covered": "general/covered"}
# Steps of plain LoRA on new facts after which the adapter is kept: at the first hardly anything has been learned.
KEPT_AFTER = (3, 10, 30)
LEARNED, FORGOT = 10, 30


def read_rows(path: Path, tokenizer: Tokenizer) -> list[Row]:
    outcomes = encode_all(read_records(path, path.stat().st_size), tokenizer, max_length=64)
    return [outcome[1] for outcome in outcomes if isinstance(outcome, tuple)]


@pytest.fixture(scope="module")
def scored(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[int, Mapping[str, Score]]:
    """Steps -> scores by set, of one training; 0: the base, and -1: an adapter trained at next to no learning rate."""
    config = RunConfig.model_validate(
        {
            "name": "facts",
            "model": {"base": str(ROOT / "demo" / "base")},
            "data": {"train": ["unread.jsonl"]},
            "training": {"steps": FORGOT, "batch_size": 16},
            "evaluation": {"max_answer_tokens": 8},
        }
    )
    tokenizer = load_tokenizer(ROOT / "demo" / "base")
    sets = {name: read_rows(world / f"{path}.jsonl", tokenizer) for name, path in SETS.items()}
    train = read_rows(world / "new_facts" / "train.jsonl", tokenizer)
    backend = make_backend(config)

    def all_scores() -> dict[str, Score]:
        return {name: score(backend, rows, tokenizer, config.evaluation) for name, rows in sets.items()}

    found = {0: all_scores()}
    for learning_rate, kept_after in ((1e-9, {1: -1}), (3e-3, {step: step for step in KEPT_AFTER})):
        backend.load_adapter(None)
        backend.prepare_training({parameter.name: 0 for parameter in backend.lora_parameters()})
        steps = training_steps(train, config.training, tokenizer.pad_token_id)
        for step in range(1, max(kept_after) + 1):
            backend.train_step(next(steps), frozenset({0}), learning_rate)
            if step in kept_after:
                found[kept_after[step]] = all_scores()
    return found


def judged(scored: Mapping[int, Mapping[str, Score]], step: int, gate: GateConfig) -> Verdict:
    return decide({"parent": scored[0], "candidate": scored[step]}, gate)


def test_an_adapter_that_learned_nothing_is_refused(scored: Mapping[int, Mapping[str, Score]]) -> None:
    verdict = judged(scored, -1, GateConfig())
    assert not verdict.passed
    assert verdict.reason == "did not learn: new_task +0.00 [+0.00, +0.00] (asked 0.05 above the parent)"


def test_an_adapter_that_forgot_is_refused(scored: Mapping[int, Mapping[str, Score]]) -> None:
    verdict = judged(scored, FORGOT, GateConfig())
    before, after = (scored[step]["covered"].value for step in (0, FORGOT))
    assert after < before - 0.15
    assert verdict.reason.startswith(f"forgot: covered {after - before:+.2f} [")
    assert verdict.reason.endswith("] (allowed 0.05 below the parent)")
    assert [check.set for check in verdict.checks if not check.passed] == ["covered"]


def test_an_adapter_that_learned_and_kept_passes(scored: Mapping[int, Mapping[str, Score]]) -> None:
    verdict = judged(scored, LEARNED, GateConfig())
    gained = scored[LEARNED]["new_task"].value - scored[0]["new_task"].value
    assert verdict.passed, verdict.reason
    assert verdict.reason.startswith(f"learned {gained:+.2f} [")


def test_a_drop_of_a_row_or_three_is_within_noise_though_nothing_may_be_lost(
    scored: Mapping[int, Mapping[str, Score]],
) -> None:
    before, after = (scored[step]["covered"] for step in (0, LEARNED))
    lost = round((before.value - after.value) * before.answers)
    assert 0 < lost <= 3, "the case that is to be shown"
    verdict = judged(scored, LEARNED, GateConfig(max_drop=0.0))
    assert verdict.passed
    assert verdict.reason.endswith("on covered, below the parent, within noise")
    assert verdict.checks[1].sentence.endswith("; at most 0.00 below is allowed, and this drop is within noise")


def test_a_rise_of_a_few_rows_is_within_noise_and_nothing_learned(
    scored: Mapping[int, Mapping[str, Score]],
) -> None:
    before, after = (scored[step]["new_task"] for step in (0, KEPT_AFTER[0]))
    verdict = judged(scored, KEPT_AFTER[0], GateConfig(min_gain=0.001))
    assert 0 < after.value - before.value <= 4.1 / before.answers, "the case that is to be shown"
    assert not verdict.passed
    assert verdict.reason.startswith("did not learn: new_task +0.0")
    assert ", within noise (asked " in verdict.reason
