"""Tasks of lm-evaluation-harness, against the same model asked by hand."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from nestune.backends.base import Backend
from nestune.backends.factory import make_backend
from nestune.config import EvaluationConfig, GateConfig, RunConfig
from nestune.data.tokens import load_tokenizer
from nestune.errors import ConfigError
from nestune.evaluation.gate import decide
from nestune.evaluation.harness import _Answers, score_tasks
from nestune.evaluation.scores import Outcomes, Score
from nestune.evaluation.uncertainty import score_interval

CHOICES = ["red", "lef", "mip"]
QUESTIONS = ["what colour is zor ?", "the colour of mip ?", "is tal red ?", "a b c", "of what colour is lef ?", "bix ?"]


@pytest.fixture(scope="module")
def backend(tiny_base: Path) -> Backend:
    return make_backend(
        RunConfig.model_validate({"name": "t", "model": {"base": str(tiny_base)}, "data": {"train": ["none.jsonl"]}})
    )


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> Any:
    return load_tokenizer(tiny_base)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Task files of one's own: one to choose, one to answer, one that measures how likely a text is."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"question": question, "answer": place % 3, "said": "red"} for place, question in enumerate(QUESTIONS)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "metadata": {"version": 1},
    }

    def metric(name: str, more_is_better: bool) -> list[dict[str, Any]]:
        how = "mean" if more_is_better else "weighted_perplexity"
        return [{"metric": name, "aggregation": how, "higher_is_better": more_is_better}]

    choose = {"output_type": "multiple_choice", "doc_to_choice": CHOICES, "doc_to_target": "{{answer}}"}
    answer = {
        "output_type": "generate_until",
        "doc_to_target": "{{said}}",
        "generation_kwargs": {"until": ["e"], "max_gen_toks": 5},
    }
    likely = {"output_type": "loglikelihood_rolling", "doc_to_target": "{{question}}", "doc_to_text": ""}
    for name, own, metrics in (
        ("choose_colour", choose, metric("acc", True)),
        ("say_colour", answer, metric("exact_match", True)),
        ("how_likely", likely, metric("word_perplexity", False)),
    ):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **common, **own, "metric_list": metrics}))
    return folder


def wanted(tasks: Path, *names: str, **more: Any) -> EvaluationConfig:
    return EvaluationConfig.model_validate({"batch_size": 4, "lm_eval": {"tasks": names, "path": str(tasks), **more}})


def likelihood(backend: Backend, tokenizer: Any, text: str, start: int) -> float:
    """The log-probability, in nats, of the tokens of a text from `start` on; by softmax over every position."""
    tokens = tokenizer(text)["input_ids"]
    logits = backend.logits(tokens).astype(np.float64)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    return float(sum(np.log(probabilities[i - 1, tokens[i]]) for i in range(start, len(tokens))))


def test_a_choice_is_right_where_its_text_is_the_likeliest(backend: Backend, tokenizer: Any, tasks: Path) -> None:
    expected = []
    for place, question in enumerate(QUESTIONS):
        start = len(tokenizer(question)["input_ids"])
        likely = [likelihood(backend, tokenizer, f"{question} {choice}", start) for choice in CHOICES]
        expected.append(float(np.argmax(likely) == place % 3))
    assert 0 < sum(expected) < len(expected)  # else right and wrong could not be told apart
    (name, score), *more = score_tasks(backend, tokenizer, wanted(tasks, "choose_colour"), positions=64).items()
    assert (name, more) == ("lm_eval/choose_colour", [])
    assert score == Score(
        loss=None,
        tokens=0,
        exact_match=pytest.approx(np.mean(expected)),
        answers=len(QUESTIONS),
        outcomes=Outcomes(tuple(expected), (1,) * len(expected)),
        metric="acc",
    )
    few = score_tasks(backend, tokenizer, wanted(tasks, "choose_colour", limit=2), positions=64)
    assert few[name].answers == 2
    assert few[name].exact_match == np.mean(expected[:2])


def test_an_answer_is_greedy_and_ends_where_the_task_says(backend: Backend, tokenizer: Any, tasks: Path) -> None:
    expected = []
    for question in QUESTIONS:
        (tokens,) = backend.generate([tokenizer(question)["input_ids"]], 5)
        expected.append(tokenizer.decode(tokens, skip_special_tokens=True).split("e")[0])
    asked = [SimpleNamespace(args=(question, {"until": ["e"], "max_gen_toks": 5})) for question in QUESTIONS]
    assert model(backend, tokenizer).generate_until(asked) == expected
    scores = score_tasks(backend, tokenizer, wanted(tasks, "say_colour"), positions=64)
    assert scores["lm_eval/say_colour"].metric == "exact_match"
    assert scores["lm_eval/say_colour"].value == np.mean([answer == "red" for answer in expected])


def model(backend: Backend, tokenizer: Any, positions: int = 64) -> Any:
    from lm_eval.api.model import TemplateLM

    class Model(_Answers, TemplateLM):
        pass

    return Model(backend, tokenizer, 4, positions, None)


@pytest.mark.parametrize("positions", [64, 5])
def test_a_text_is_as_likely_as_its_tokens_after_the_end_token(
    backend: Backend, tokenizer: Any, positions: int
) -> None:
    """Also where it is longer than the model sees at once: then windows of 5 tokens, each after the token before it."""
    text = "the colour"
    tokens = [tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]
    expected = 0.0
    for start in range(0, len(tokens) - 1, positions):
        window = tokens[start : start + positions + 1]
        logits = backend.logits(window[:-1]).astype(np.float64)
        logs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        expected += sum(logs[place, token] for place, token in enumerate(window[1:]))
    (seen,) = model(backend, tokenizer, positions).loglikelihood_rolling([SimpleNamespace(args=(text,))])
    assert len(tokens) - 1 == 10
    assert seen == pytest.approx(expected, rel=1e-5)


def test_a_task_of_which_less_is_better_and_one_with_too_long_answers_are_refused(
    backend: Backend, tokenizer: Any, tasks: Path
) -> None:
    with pytest.raises(ConfigError, match="how_likely is judged by word_perplexity"):
        score_tasks(backend, tokenizer, wanted(tasks, "how_likely"), positions=64)
    with pytest.raises(ConfigError, match="for 5 tokens of a base that has 5 positions"):
        score_tasks(backend, tokenizer, wanted(tasks, "say_colour"), positions=5)


def test_without_tasks_nothing_is_asked(backend: Backend, tokenizer: Any) -> None:
    assert score_tasks(backend, tokenizer, EvaluationConfig(), positions=64) == {}


def test_the_gate_judges_a_task_by_its_metric_and_documents() -> None:
    def accuracy(right: int) -> Score:
        outcomes = Outcomes.of_answers([True] * right + [False] * (100 - right))
        return Score(None, 0, right / 100, 100, outcomes=outcomes, metric="acc")

    new = {"parent": Score(1.0, 10, 0.0, 50), "candidate": Score(1.0, 10, 1.0, 50)}
    scores = {
        model: {"new_task": new[model], "lm_eval/arc": accuracy(right)}
        for model, right in {"parent": 80, "candidate": 60}.items()
    }
    verdict = decide(scores, GateConfig())
    (check,) = [check for check in verdict.checks if check.set == "lm_eval/arc"]
    interval = score_interval(accuracy(60))
    assert interval is not None
    assert not verdict.passed
    assert verdict.reason.startswith("forgot: lm_eval/arc -0.20 [")
    assert check.sentence.startswith("lm_eval/arc: acc 0.60, 0.20 below the parent's 0.80 (95 % interval [")
