"""Records as tokens: which of them are learned, and the prompt that an answer is generated from."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from nestune.data.records import Record
from nestune.errors import ConfigError, Fault

# A fast tokenizer of transformers, whose types are too loose to be of use.
Tokenizer: TypeAlias = Any
# Start and end of a stretch of text, in characters.
Span: TypeAlias = tuple[int, int]

GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Tokenising many texts in one call is quicker; the limits bound the memory.
CHUNK_RECORDS = 512
CHUNK_CHARACTERS = 2_000_000
# Four times the largest vocabularies; ten times as much memory is spent on reading them.
MAX_TOKENIZER_BYTES = 2**27
TEMPLATE_FAULTS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)


@dataclass(frozen=True, eq=False)
class Row:
    """A record as tokens.

    tokens (T,); supervised (T,): token i is predicted from those before it and counts in the loss, at least one
    is; prompt (P,) and answer: what generation starts from and should say, None for `text`.
    """

    tokens: NDArray[np.int32]
    supervised: NDArray[np.bool_]
    prompt: NDArray[np.int32] | None
    answer: str | None
    truncated: bool = False


def tokenizer_files(folder: Path) -> list[Path]:
    """The files in a model folder that decide which tokens a record becomes."""
    return sorted([*folder.glob("tokenizer*"), *folder.glob("*.jinja")])


def load_tokenizer(folder: Path) -> Tokenizer:
    """The fast tokenizer of a model folder; one without a padding token pads with its end token.

    Raises ConfigError when the folder holds none, or it is slow or has no end token.
    """
    from transformers import AutoTokenizer

    remedy = "Name a base model whose folder holds its tokenizer.json."
    too_large = [file.name for file in tokenizer_files(folder) if file.stat().st_size > MAX_TOKENIZER_BYTES]
    if too_large:
        raise ConfigError(
            f"model.base: {', '.join(too_large)} in {folder} is larger than {MAX_TOKENIZER_BYTES} bytes. {remedy}"
        )
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ConfigError(f"model.base: {folder} holds no tokenizer. {remedy}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the tokenizers library raises plain Exception for a broken file, or panics
        raise ConfigError(f"model.base: the tokenizer in {folder} does not load: {error!s:.500}. {remedy}") from error
    if not tokenizer.is_fast:
        raise ConfigError(f"model.base: the tokenizer in {folder} cannot say which text a token stands for. {remedy}")
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"model.base: the tokenizer in {folder} has no end token, so a model could not learn to stop. "
            "Set eos_token in its tokenizer_config.json."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    try:
        start_tokens(tokenizer)
    except (TypeError, ValueError, OverflowError) as error:
        said = f"the tokenizer in {folder} does not work: {error!s:.200}"
        raise ConfigError(f"model.base: {said}. {remedy}") from error
    return tokenizer


def pad_id_of(tokenizer: Tokenizer, vocabulary: int | None) -> int:
    """The token that pads: the tokenizer's, or its end token where the model has no row for that one.

    Some bases are published so; nothing is computed from padding, but it is looked up. Raises ConfigError when the
    end token too is beyond the base's `vocabulary`.
    """
    pad_id, end_id = int(tokenizer.pad_token_id), int(tokenizer.eos_token_id)
    if vocabulary is None or pad_id < vocabulary:
        return pad_id
    if end_id >= vocabulary:
        raise ConfigError(
            f"model.base: its tokenizer ends a text with {tokenizer.eos_token!r:.40}, token {end_id}, and the model "
            f"knows {vocabulary} tokens (vocab_size). Take a copy of the base whose tokenizer belongs to its weights."
        )
    return end_id


def encode(record: Record, tokenizer: Tokenizer, max_length: int) -> Row | Fault:
    """One record as tokens, cut to its first `max_length`; a fault when no token to learn is left.

    Raises ConfigError when the base model's chat template is missing or hides where the assistant speaks.
    """
    outcome = next(encode_all([record], tokenizer, max_length))
    return outcome if isinstance(outcome, Fault) else outcome[1]


def encode_all(
    records: Iterable[Record | Fault], tokenizer: Tokenizer, max_length: int, vocabulary: int | None = None
) -> Iterator[tuple[Record, Row] | Fault]:
    """As `encode`, for many records at the speed of a batch. Faults pass through; the order stays.

    Raises ConfigError also where the tokenizer writes a token beyond the base's `vocabulary`.
    """
    start = start_tokens(tokenizer)
    drafts = (record if isinstance(record, Fault) else _draft(record, tokenizer) for record in records)
    for chunk in _chunks(drafts):
        good = [draft for draft in chunk if isinstance(draft, _Draft)]
        rows = _rows(good, start, tokenizer, max_length, vocabulary)
        for draft in chunk:
            yield draft if isinstance(draft, Fault) else next(rows)


def marked_text(row: Row, tokenizer: Tokenizer) -> str:
    """The text of a row with what is learned between » and «, so that a reader can check the mask."""
    borders = np.flatnonzero(np.diff(row.supervised)) + 1
    parts = []
    for tokens, supervised in zip(np.split(row.tokens, borders), np.split(row.supervised, borders), strict=True):
        text = tokenizer.decode(tokens.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        parts.append(f"»{text}«" if supervised[0] else text)
    return "".join(parts)


@dataclass(frozen=True, eq=False)
class _Draft:
    """A record as text: `spans` are what is learned, `prompt` what an answer is generated from.

    `rendered`: by a chat template, which writes its special tokens itself.
    """

    record: Record
    text: str
    spans: Sequence[Span]
    prompt: str | None
    answer: str | None
    rendered: bool


def _draft(record: Record, tokenizer: Tokenizer) -> _Draft | Fault:
    content = record.content
    if record.kind == "text":
        return _Draft(record, content["text"], [(0, len(content["text"]))], None, None, rendered=False)
    if record.kind == "completion":
        prompt, text = content["prompt"], content["prompt"] + content["completion"]
        answer = content["completion"].strip()
        return _Draft(record, text, [(len(prompt), len(text))], prompt, answer, rendered=False)
    return _chat_draft(record, tokenizer)


def _chat_draft(record: Record, tokenizer: Tokenizer) -> _Draft | Fault:
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise ConfigError(
            f"the base model {tokenizer.name_or_path} has no chat template, and {record.file}:{record.line} is a chat. "
            "Use a chat model as model.base, put a chat_template.jinja into its folder, "
            'or write the records as {"prompt": ..., "completion": ...}.'
        )
    messages = record.content["messages"]
    try:
        text = _render(messages, tokenizer)
        prompt = _render(messages[:-1], tokenizer, add_generation_prompt=True)
        if GENERATION_MARK.search(tokenizer.get_chat_template()):
            spans = _spans_marked_by_the_template(messages, tokenizer)
        else:
            spans = _assistant_spans(record, text, prompt, tokenizer)
    # Templates are programs: they refuse what they cannot render, or fail on odd values in ways of their own.
    except (TemplateError, *TEMPLATE_FAULTS) as error:
        problem = f"refused by the chat template: {error!s:.500}"
        return Fault(record.file, record.line, "messages", problem, "Write the turns as the base model expects them")
    return _Draft(record, text, spans, prompt, messages[-1]["content"].strip(), rendered=True)


def _render(messages: Sequence[dict[str, Any]], tokenizer: Tokenizer, add_generation_prompt: bool = False) -> str:
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    return text


def _assistant_spans(record: Record, text: str, prompt: str, tokenizer: Tokenizer) -> list[Span]:
    """Every assistant turn with its end token, but not the line break that templates write after it.

    A turn reaches from the end of the generation prompt before it to the end of the chat cut after it. `text` is
    the whole chat, `prompt` what comes before its last turn.
    """
    messages, spans = record.content["messages"], []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if index + 1 == len(messages):
            before, through = prompt, text
        else:
            before = _render(messages[:index], tokenizer, add_generation_prompt=True)
            through = _render(messages[: index + 1], tokenizer)
        if text.startswith(through) and through.startswith(before):
            spans.append((len(before), len(through.rstrip())))
        else:
            spans.append(_spans_around_placeholders(record, text, tokenizer)[index])
    return spans


def _spans_around_placeholders(record: Record, text: str, tokenizer: Tokenizer) -> dict[int, Span]:
    """Turn -> where its words and its end token stand, for templates that write a turn differently later on.

    Qwen3's is one: it takes the thoughts out of earlier turns. The chat is rendered once more with a placeholder
    for what each assistant turn says; putting that back must give `text` again, and shows where it stands.
    """
    messages = record.content["messages"]
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    placeholders = {index: f"[what turn {index} of {len(text)} says]" for index in turns}
    marked = _render([m | {"content": placeholders.get(i, m["content"])} for i, m in enumerate(messages)], tokenizer)
    rebuilt = ""
    spans: dict[int, Span] = {}
    for index in turns:
        before, _, marked = marked.partition(placeholders[index])
        start = len(rebuilt) + len(before)
        said = messages[index]["content"]
        # Templates mostly take the space around what is said away.
        said = said if text.startswith(said, start) else said.strip()
        rebuilt += before + said
        end_token = next((token for token in tokenizer.get_added_vocab() if marked.startswith(token)), "")
        spans[index] = (start, len(rebuilt) + len(end_token))
    if rebuilt + marked != text:
        raise ConfigError(
            f"the chat template of {tokenizer.name_or_path} rewrites the turns of {record.file}:{record.line}, so what "
            "the assistant says cannot be told apart. Mark it in the template with {% generation %} and "
            '{% endgeneration %}, or write such chats as {"prompt": ..., "completion": ...}.'
        )
    return spans


def _spans_marked_by_the_template(messages: Sequence[dict[str, Any]], tokenizer: Tokenizer) -> list[Span]:
    # The mask of apply_chat_template loses a turn that starts with a token to which no text is ascribed.
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered: Any = render_jinja_template(
        conversations=[list(messages)],
        chat_template=tokenizer.get_chat_template(),
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    _, spans_of_each_chat = rendered
    return list(spans_of_each_chat[0])


def _chunks(drafts: Iterable[_Draft | Fault]) -> Iterator[list[_Draft | Fault]]:
    chunk: list[_Draft | Fault] = []
    characters = 0
    for draft in drafts:
        chunk.append(draft)
        characters += len(draft.text) if isinstance(draft, _Draft) else 0
        if len(chunk) == CHUNK_RECORDS or characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _rows(
    drafts: Sequence[_Draft], start: list[int], tokenizer: Tokenizer, max_length: int, vocabulary: int | None
) -> Iterator[tuple[Record, Row] | Fault]:
    """`start` are the tokens that the tokenizer writes before a text."""
    encoded = _tokenize([draft.text for draft in drafts], tokenizer, with_offsets=True)
    prompts = iter(_tokenize([d.prompt for d in drafts if d.prompt is not None], tokenizer)["input_ids"])
    for draft, ids, offsets in zip(drafts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        supervised = _supervised(offsets, draft.spans)
        prompt = None if draft.prompt is None else next(prompts)
        if not draft.rendered:
            end = [tokenizer.eos_token_id] if ids[-1:] != [tokenizer.eos_token_id] else []
            supervised = np.concatenate([np.zeros(len(start), bool), supervised, np.ones(len(end), bool)])
            ids = start + ids + end
            prompt = None if prompt is None else start + prompt
        _check_known([*ids, *(prompt or [])], draft.record, tokenizer, vocabulary)
        supervised[:1] = False  # nothing stands before the first token to predict it from
        if not supervised[:max_length].any():
            yield _nothing_to_learn(draft, len(ids), int(supervised.sum()), max_length)
            continue
        row = Row(
            tokens=np.asarray(ids[:max_length], dtype=np.int32),
            supervised=supervised[:max_length],
            prompt=None if prompt is None else np.asarray(prompt, dtype=np.int32),
            answer=draft.answer,
            truncated=len(ids) > max_length,
        )
        yield draft.record, row


def _check_known(ids: Sequence[int], record: Record, tokenizer: Tokenizer, vocabulary: int | None) -> None:
    highest = max(ids, default=0)
    if vocabulary is not None and highest >= vocabulary:
        raise ConfigError(
            f"model.base: its tokenizer writes {tokenizer.convert_ids_to_tokens(highest)!r:.40} in {record.file}:"
            f"{record.line} as token {highest}, and the model knows {vocabulary} tokens (vocab_size). "
            "Take a copy of the base whose tokenizer belongs to its weights."
        )


def _supervised(offsets: Sequence[Span], spans: Sequence[Span]) -> NDArray[np.bool_]:
    """(T,) tokens that share text with a span; one that straddles its border does."""
    starts, ends = np.asarray(offsets, dtype=np.int64).reshape(-1, 2).T
    supervised = np.zeros(len(starts), dtype=bool)
    for start, end in spans:
        supervised |= (starts < end) & (ends > start)
    return supervised


def _nothing_to_learn(draft: _Draft, tokens: int, supervised: int, max_length: int) -> Fault:
    field = "text" if draft.record.kind == "text" else "messages" if draft.rendered else "completion"
    if supervised:
        problem = f"nothing to learn: its {supervised} supervised tokens of {tokens} lie beyond the first {max_length}"
        remedy = "Shorten what stands before the answer, or raise data.max_seq_length"
    else:
        problem = f"nothing to learn: none of its {tokens} tokens is supervised"
        remedy = "Write an answer, or check the {% generation %} marks of the chat template"
    return Fault(draft.record.file, draft.record.line, field, problem, remedy)


def _tokenize(texts: Sequence[str], tokenizer: Tokenizer, with_offsets: bool = False) -> Any:
    if not texts:
        return {"input_ids": [], "offset_mapping": []}
    return tokenizer(
        list(texts),
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=with_offsets,
        verbose=False,
    )


def start_tokens(tokenizer: Tokenizer) -> list[int]:
    """The special tokens that the tokenizer writes before a text by default, such as a begin token."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    if 0 not in encoded["special_tokens_mask"]:
        raise ValueError("it makes no token of the letter a")
    first_of_text = encoded["special_tokens_mask"].index(0)
    start: list[int] = encoded["input_ids"][:first_of_text]
    return start
