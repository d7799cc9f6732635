"""Which of llama.cpp's ways to split text a tokenizer has, and what is said when none is known."""

import json
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from nestune.export.gguf_tokenizer import LLAMA3_SPLIT, QWEN2_SPLIT, pre_tokenizer_name, tokenizer_fault

BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)


def split(regex: str) -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(regex), "isolated"), BYTES])


def tokenizer(pre_tokenizer: Any, model: Any = None) -> PreTrainedTokenizerFast:
    letters = Tokenizer(model or models.BPE())
    letters.pre_tokenizer = pre_tokenizer
    letters.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=letters)


def name_of(pre_tokenizer: Any, ignore_merges: bool = False) -> str | None:
    letters = tokenizer(pre_tokenizer, models.BPE(ignore_merges=ignore_merges))
    return pre_tokenizer_name(json.loads(letters.backend_tokenizer.to_str()))


def test_the_known_ones_have_their_names() -> None:
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2])
    assert QWEN2_SPLIT == PRETOKENIZE_REGEX
    assert name_of(GPT2) == "gpt-2"
    assert name_of(digits) == "smollm"
    assert name_of(split(QWEN2_SPLIT)) == "qwen2"
    assert name_of(split(LLAMA3_SPLIT), ignore_merges=True) == "llama-bpe"


@pytest.mark.parametrize(
    ("pre_tokenizer", "ignore_merges"),
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=True), False),
        (split(r"\w+"), False),
        (split(LLAMA3_SPLIT), False),
        (split(QWEN2_SPLIT), True),
        (BYTES, False),
        (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=False), GPT2]), False),
        (None, False),
    ],
    ids=["prefix space", "other regex", "merges kept", "merges ignored", "no split", "digits in groups", "nothing"],
)
def test_any_other_has_none(pre_tokenizer: Any, ignore_merges: bool) -> None:
    assert name_of(pre_tokenizer, ignore_merges) is None


def test_only_byte_level_bpe_is_written() -> None:
    assert tokenizer_fault(tokenizer(GPT2)) is None
    assert "WordLevel" in str(tokenizer_fault(tokenizer(GPT2, models.WordLevel({"a": 0}, unk_token="a"))))
    sentencepiece = tokenizer(GPT2)
    sentencepiece.backend_tokenizer.decoder = decoders.Metaspace()
    assert "BPE with decoder Metaspace" in str(tokenizer_fault(sentencepiece))
