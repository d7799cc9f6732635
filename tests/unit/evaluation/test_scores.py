"""Scores of a real model, against the same model asked without the product's code."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nestune.backends.base import Backend
from nestune.backends.factory import make_backend
from nestune.config import EvaluationConfig, RunConfig
from nestune.data.batches import collate
from nestune.data.records import Record
from nestune.data.tokens import Row, encode, load_tokenizer
from nestune.errors import DataError
from nestune.evaluation.scores import Outcomes, score

EVALUATION = EvaluationConfig(batch_size=2, max_answer_tokens=4)
PROMPTS = ["what is the colour of zor ? ", "where lives mip ? ", "a b c d e f ", "? ", "is tal red or green or blue ? "]


@pytest.fixture(scope="module")
def backend(tiny_base: Path) -> Backend:
    return make_backend(
        RunConfig.model_validate({"name": "t", "model": {"base": str(tiny_base)}, "data": {"train": ["none.jsonl"]}})
    )


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> Any:
    return load_tokenizer(tiny_base)


@pytest.fixture(scope="module")
def reference(tiny_base: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_base).eval()


def row(content: dict[str, str], tokenizer: Any) -> Row:
    encoded = encode(Record("set.jsonl", 1, "text" if "text" in content else "completion", content), tokenizer, 64)
    assert isinstance(encoded, Row)
    return encoded


def answers_one_by_one(reference: Any, tokenizer: Any, prompts: Sequence[str]) -> list[str]:
    """The highest logit, token after token, for one prompt at a time: no padding, no cache, no generate()."""
    import torch

    answers = []
    for prompt in prompts:
        tokens = tokenizer(prompt)["input_ids"]
        asked = len(tokens)
        while len(tokens) < asked + EVALUATION.max_answer_tokens:
            with torch.no_grad():
                following = int(reference(torch.tensor([tokens])).logits[0, -1].argmax())
            if following == tokenizer.eos_token_id:
                break
            tokens.append(following)
        answers.append(tokenizer.decode(tokens[asked:], skip_special_tokens=True).strip())
    return answers


@pytest.fixture(scope="module")
def right(reference: Any, tokenizer: Any) -> list[Row]:
    """Questions whose expected answer is what the model says."""
    answers = answers_one_by_one(reference, tokenizer, PROMPTS)
    assert len(set(answers)) > 1  # else a mixed-up order could not be seen
    rows = [row({"prompt": prompt, "completion": "red"}, tokenizer) for prompt in PROMPTS]
    return [replace(one, answer=f" {answer} ") for one, answer in zip(rows, answers, strict=True)]


def test_the_loss_is_the_mean_over_all_supervised_tokens(backend: Backend, reference: Any, tokenizer: Any) -> None:
    import torch

    rows = [
        row({"text": "the colour of zor is red"}, tokenizer),
        row({"prompt": "where lives mip ? ", "completion": "in a"}, tokenizer),
        row({"text": "a b"}, tokenizer),
    ]
    nats = []
    for one in rows:
        with torch.no_grad():
            logits = reference(torch.tensor(one.tokens[None].astype(np.int64))).logits[0].double().numpy()
        log_probabilities = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        nats += [-log_probabilities[i - 1, one.tokens[i]] for i in np.flatnonzero(one.supervised)]
    seen = score(backend, rows, tokenizer, EVALUATION)
    assert seen.tokens == len(nats)
    assert seen.loss == pytest.approx(np.mean(nats), rel=1e-5)


def test_a_set_without_answers_keeps_the_loss_of_each_row_and_one_with_answers_which_were_right(
    backend: Backend, tokenizer: Any, right: list[Row]
) -> None:
    texts = [row({"text": text}, tokenizer) for text in ("the colour of zor is red", "a b", "where lives mip ? in a")]
    seen = score(backend, texts, tokenizer, EVALUATION)
    alone = [backend.loss([collate([text], tokenizer.pad_token_id)]) for text in texts]
    assert seen.outcomes is not None
    assert sorted(zip(seen.outcomes.amounts, seen.outcomes.weights, strict=True)) == sorted(
        (loss.nats, loss.tokens) for loss in alone
    )
    rows = [right[0], replace(right[1], answer="of of of"), *right[2:], texts[0]]
    answered = score(backend, rows, tokenizer, EVALUATION)
    assert answered.outcomes == Outcomes((1.0, 0.0, 1.0, 1.0, 1.0), (1,) * 5)
    assert answered.outcomes.as_dict() == {"right": "10111"}


def test_the_loss_of_many_rows_is_kept_by_groups_that_are_the_same_for_every_model(
    backend: Backend, tokenizer: Any
) -> None:
    rows = [row({"text": "a b c d e f"[: 1 + place % 11]}, tokenizer) for place in range(250)]
    seen, again = (score(backend, rows, tokenizer, EVALUATION) for _ in range(2))
    assert seen.outcomes is not None
    assert len(seen.outcomes.weights) == 125  # 250 rows in groups of at most the batch size, 2
    assert sum(seen.outcomes.weights) == seen.tokens == sum(int(one.supervised[1:].sum()) for one in rows)
    assert seen.loss == sum(seen.outcomes.amounts) / seen.tokens
    assert seen == again


def test_rows_without_an_answer_have_no_exact_match(backend: Backend, tokenizer: Any) -> None:
    seen = score(backend, [row({"text": "the colour of zor is red"}, tokenizer)], tokenizer, EVALUATION)
    assert (seen.exact_match, seen.answers, seen.measure) == (None, 0, "loss")


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_answers_are_those_of_each_prompt_alone_whatever_the_batch(
    backend: Backend, tokenizer: Any, right: list[Row], batch_size: int
) -> None:
    seen = score(backend, right, tokenizer, EVALUATION.model_copy(update={"batch_size": batch_size}))
    assert (seen.exact_match, seen.answers, seen.examples) == (1.0, len(right), ())


def test_a_wrong_answer_counts_once_and_is_kept_as_an_example(
    backend: Backend, tokenizer: Any, right: list[Row]
) -> None:
    expected_elsewhere = right[1].answer
    rows = [right[0], replace(right[1], answer="of of of"), *right[2:]]
    seen = score(backend, rows, tokenizer, EVALUATION)
    assert seen.exact_match == pytest.approx(4 / 5)
    (example,) = seen.examples
    assert expected_elsewhere is not None
    assert (example.question, example.expected) == ("where lives mip ?", "of of of")
    assert example.seen == expected_elsewhere.strip()


def test_only_rows_that_have_an_answer_count_in_the_exact_match(
    backend: Backend, tokenizer: Any, right: list[Row]
) -> None:
    text = row({"text": "the colour of zor is red"}, tokenizer)
    seen = score(backend, [text, right[0], text], tokenizer, EVALUATION)
    assert (seen.exact_match, seen.answers) == (1.0, 1)


def test_no_rows_are_an_error(backend: Backend, tokenizer: Any) -> None:
    with pytest.raises(DataError, match="no rows to score"):
        score(backend, [], tokenizer, EVALUATION)
