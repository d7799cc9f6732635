"""Byte-level BPE tokenizers as GGUF has them. Source of the keys: ggml's docs/gguf.md, "Tokenizer"."""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nestune.data.tokens import Tokenizer

if TYPE_CHECKING:
    from gguf import GGUFWriter

QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPLIT = QWEN2_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
# How text is split into words before merges, and whether a whole word that is a token skips them -> llama.cpp's name.
PRE_TOKENIZERS: dict[tuple[tuple[str | None, ...], bool], str] = {
    (("ByteLevel with its regex",), False): "gpt-2",
    (("Digits", "ByteLevel with its regex"), False): "smollm",
    ((QWEN2_SPLIT, "ByteLevel"), False): "qwen2",
    ((LLAMA3_SPLIT, "ByteLevel"), True): "llama-bpe",
}
UNKNOWN_PRE_TOKENIZER = (
    "how llama.cpp splits text into words, it knows by name, and nestune knows none for this tokenizer; the file says "
    "'default'. Compare llama.cpp's tokens with the base's (llama-tokenize) before you rely on it."
)
SPECIAL_TOKENS = ("bos", "eos", "unk", "sep", "pad")


def tokenizer_fault(tokenizer: Tokenizer) -> str | None:
    """Why a tokenizer is no byte-level BPE; None when it is one."""
    content = _content(tokenizer)
    kind, decoder = content["model"]["type"], (content.get("decoder") or {}).get("type")
    if kind == "BPE" and decoder == "ByteLevel":
        return None
    return f"its tokenizer is {kind} with decoder {decoder}; byte-level BPE is written"


def add_tokenizer(writer: "GGUFWriter", tokenizer: Tokenizer, rows: int) -> list[str]:
    """Add a byte-level BPE tokenizer and its chat template to a file; returns what the user should know.

    rows: how many tokens the embedding has a row for; those that stand for no text are marked as unused.
    """
    from gguf import TokenType

    content = _content(tokenizer)
    text_of = {number: text for text, number in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    kinds = [
        (TokenType.CONTROL if added[number].special else TokenType.USER_DEFINED)
        if number in added
        else (TokenType.NORMAL if number in text_of else TokenType.UNUSED)
        for number in range(rows)
    ]
    pre_tokenizer = pre_tokenizer_name(content)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer or "default")
    writer.add_token_list([text_of.get(number, f"[PAD{number}]") for number in range(rows)])
    writer.add_token_types(kinds)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in _merges(content)])
    for name in SPECIAL_TOKENS:
        number = getattr(tokenizer, f"{name}_token_id")
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    encoded = tokenizer("a").input_ids
    writer.add_add_bos_token(encoded[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(encoded[-1] == tokenizer.eos_token_id)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        writer.add_chat_template(template)
    return [] if pre_tokenizer else [UNKNOWN_PRE_TOKENIZER]


def pre_tokenizer_name(content: Mapping[str, Any]) -> str | None:
    """llama.cpp's name for how a tokenizer.json splits text into words; None when it is not known to have one."""
    whole = content.get("pre_tokenizer") or {}
    steps = tuple(map(_step, whole.get("pretokenizers", [whole])))
    return PRE_TOKENIZERS.get((steps, bool(content["model"].get("ignore_merges"))))


def _step(part: Mapping[str, Any]) -> str | None:
    """A step of a pre-tokenizer in the words of `PRE_TOKENIZERS`; None for one that is not in it."""
    match part:
        case {"type": "ByteLevel", "add_prefix_space": False}:
            return "ByteLevel with its regex" if part.get("use_regex", True) else "ByteLevel"
        case {"type": "Digits", "individual_digits": True}:
            return "Digits"
        case {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}:
            return str(regex)
    return None


def _merges(content: Mapping[str, Any]) -> list[Any]:
    merges: list[Any] = content["model"]["merges"]
    return merges


def _content(tokenizer: Tokenizer) -> dict[str, Any]:
    """What its tokenizer.json says."""
    content: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return content
