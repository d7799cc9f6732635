"""Texts that the demo's base writes by itself: what they look like, and that they are written once."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.contract.conftest import BASE, configuration

from nestune.backends.base import Backend
from nestune.backends.torch_backend import TorchBackend
from nestune.config import KlConfig, SelfWrittenConfig
from nestune.data.openings import Openings, openings_of
from nestune.data.tokens import load_tokenizer
from nestune.errors import ConfigError
from nestune.training.self_written import SelfWritten, self_written

TOKENIZER = load_tokenizer(BASE)
OPENINGS = openings_of(TOKENIZER)
END = TOKENIZER.eos_token_id


class Counted:
    """A backend that counts the batches that it writes."""

    name = "torch"

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.calls = 0

    def generate(self, *arguments: Any) -> list[list[int]]:
        self.calls += 1
        return self._backend.generate(*arguments)


@pytest.fixture(scope="module")
def base() -> TorchBackend:
    return TorchBackend(configuration("torch"))


@pytest.fixture
def backend(base: TorchBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Counted:
    monkeypatch.setenv("NESTUNE_CACHE", str(tmp_path))
    return Counted(base)


def write(
    backend: Any,
    texts: int = 11,
    prompts: Sequence[list[int]] = (),
    openings: Openings = OPENINGS,
    seed: int = 0,
    **settings: Any,
) -> SelfWritten:
    kl = KlConfig(self_written=SelfWrittenConfig(texts=texts, max_tokens=20, **settings))
    return self_written(backend, kl, openings, prompts, {"base": "b"}, END, 16, seed)


def decoded(written: SelfWritten) -> list[str]:
    return [TOKENIZER.decode(text) for text in [*written.held, *written.measuring]]


def test_one_text_in_eleven_only_measures(backend: Counted) -> None:
    written = write(backend)
    # 11 to be held on, and a tenth more, rounded up.
    assert len(written.held) == 11
    assert len(written.measuring) == 2


def test_a_question_that_the_model_made_up_is_answered_by_it_too(backend: Counted) -> None:
    texts = decoded(write(backend, opening="chat"))
    assert all(text.startswith("<|im_start|>user\n") for text in texts)
    answered = [text for text in texts if "<|im_end|>\n<|im_start|>assistant\n" in text]
    assert len(answered) > len(texts) // 2
    for text in answered:
        question, _, answer = text.partition("<|im_end|>\n<|im_start|>assistant\n")
        assert len(question) > len("<|im_start|>user\n")
        assert answer
        assert answer.count("<|im_end|>") <= 1


def test_from_the_start_token_it_writes_all_that_it_knows_to_write(backend: Counted) -> None:
    texts = decoded(write(backend, opening="start"))
    assert all(text.startswith("<|endoftext|>") for text in texts)
    # Whatever was asked was also answered.
    asked = [text for text in texts if "<|im_start|>user\n" in text and text.count("<|im_end|>")]
    assert asked
    assert all("<|im_start|>assistant\n" in text for text in asked)


def test_prompts_are_answered_as_they_stand(backend: Counted) -> None:
    chat = [{"role": "user", "content": "Repeat: fox hen cat"}]
    prompt = TOKENIZER.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    written = write(backend, texts=0, prompts=[prompt], temperature=0.1)
    (text,) = written.held
    assert written.measuring == []
    assert TOKENIZER.decode(text[len(prompt) :]) == "fox hen cat<|im_end|>"
    assert text[: len(prompt)] == prompt


def test_what_was_written_is_read_back_and_written_again_only_for_something_else(backend: Counted) -> None:
    first = write(backend)
    calls = backend.calls
    assert write(backend) == first
    assert backend.calls == calls
    assert write(backend, seed=1) != first
    assert backend.calls > calls


@pytest.mark.parametrize("change", ["truncated", "changed", "no JSON", "other shape"])
def test_texts_that_are_not_as_they_were_kept_are_written_again(
    backend: Counted, tmp_path: Path, caplog: pytest.LogCaptureFixture, change: str
) -> None:
    first = write(backend)
    (kept,) = (tmp_path / "texts").iterdir()
    content = json.loads(kept.read_text())
    content["texts"][0][-1] += 1
    kept.write_text(
        {
            "truncated": kept.read_text()[:-20],
            "changed": json.dumps(content),
            "no JSON": "texts",
            "other shape": '{"sha256": "", "texts": [["a"]]}',
        }[change]
    )
    assert write(backend) == first
    assert "writes its texts again" in caplog.text
    assert write(backend) == first


def test_without_an_opening_that_is_there_nothing_can_be_written(backend: Counted) -> None:
    with pytest.raises(ConfigError, match=r"opening is chat.*no chat template.*retention\.kl\.prompts"):
        write(backend, opening="chat", openings=Openings(start=(0,)))
