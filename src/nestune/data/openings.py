"""What a teacher goes on from when it writes by itself: a start token, the opening of a user's turn, or a prompt."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from nestune.config import DataConfig, PromptsConfig
from nestune.data.find_files import find_files
from nestune.data.records import Record, read_records
from nestune.data.tokens import Row, Tokenizer, encode_all, start_tokens
from nestune.errors import ConfigError, DataError, Fault

# Stands for what a user says while a chat template is asked what it writes around it.
SAID = "what the user says here"


@dataclass(frozen=True)
class Openings:
    """Token ids that a text begins with.

    start: of any text; user_turn: of a chat, up to what the user says; answer: what stands between that and what the
    assistant says. Empty where the tokenizer has no such thing.
    """

    start: tuple[int, ...]
    user_turn: tuple[int, ...] = ()
    answer: tuple[int, ...] = ()

    def named(self, which: str) -> list[tuple[int, ...]]:
        """Those that `retention.kl.self_written.opening` names, as far as there are any."""
        wanted = {"start": [self.start], "chat": [self.user_turn], "both": [self.start, self.user_turn]}[which]
        return [opening for opening in wanted if opening]

    def is_question(self, tokens: Sequence[int]) -> bool:
        """Whether a text is a user's turn, which the assistant has yet to answer."""
        # A template may write the start token itself.
        return bool(self.user_turn) and any(
            tuple(tokens[at : at + len(self.user_turn)]) == self.user_turn
            for at in (0, len(self.start) if tuple(tokens[: len(self.start)]) == self.start else 0)
        )


def openings_of(tokenizer: Tokenizer) -> Openings:
    """How texts begin for a tokenizer: with its own start tokens, or its begin token; chats as its template says."""
    start = start_tokens(tokenizer)
    if not start and tokenizer.bos_token_id is not None:
        start = [int(tokenizer.bos_token_id)]
    if not tokenizer.chat_template:
        return Openings(tuple(start))
    chat = [{"role": "user", "content": SAID}]
    text: str = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    before, found, after = text.partition(SAID)
    if not found:
        return Openings(tuple(start))
    user_turn, answer = (tokenizer(part, add_special_tokens=False).input_ids for part in (before, after))
    return Openings(tuple(start), tuple(user_turn), tuple(answer))


def prompts_of(
    prompts: PromptsConfig, data: DataConfig, tokenizer: Tokenizer, max_length: int, seed: int
) -> list[list[int]]:
    """The token ids of every given prompt, and of every template filled by lot, the same for the same seed.

    Raises DataError when a record cannot be read, or has nothing to answer.
    """
    files = find_files(prompts.files) if prompts.files else []
    outcomes: list[Record | Fault] = [one for file in files for one in read_records(file, data.max_line_bytes)]
    outcomes += [_as_record(question, number, tokenizer) for number, question in enumerate(_filled(prompts, seed), 1)]
    read = list(encode_all(outcomes, tokenizer, max_length))
    faults = [outcome for outcome in read if isinstance(outcome, Fault)]
    if faults:
        raise DataError("retention.kl.prompts: these cannot be used. Mend them, or leave them out", faults)
    rows = [row for _, row in (outcome for outcome in read if not isinstance(outcome, Fault))]
    without = sum(row.prompt is None for row in rows)
    if without:
        raise DataError(
            f"retention.kl.prompts: {without} of {len(rows)} records are texts, which ask nothing. Leave them out, or "
            'write {"prompt": ..., "completion": ...}.'
        )
    return [row.prompt.tolist() for row in rows if row.prompt is not None]


def held_row(tokens: Sequence[int]) -> Row:
    """A text that is not learned: the model is held to its teacher at every token but the first."""
    supervised = np.ones(len(tokens), dtype=bool)
    supervised[:1] = False
    return Row(np.asarray(tokens, dtype=np.int32), supervised, None, None)


def refuse_scored_prompts(prompts: Sequence[Sequence[int]], scored: Sequence[Row]) -> None:
    """Raise ConfigError when a prompt is asked in a set that is scored: its score would say nothing."""
    asked = {row.prompt.tobytes() for row in scored if row.prompt is not None}
    met = sum(np.asarray(prompt, dtype=np.int32).tobytes() in asked for prompt in prompts)
    if met:
        raise ConfigError(
            f"retention.kl.prompts: {met} of {len(prompts)} prompts are questions of a held-out set, whose score would "
            "say nothing then. Leave them out."
        )


def _filled(prompts: PromptsConfig, seed: int) -> Iterator[str]:
    """The questions made of the templates in turn."""
    generator = np.random.default_rng([seed, 0xF111])
    for number in range(prompts.filled if prompts.templates else 0):
        drawn = {blank: values[generator.integers(len(values))] for blank, values in prompts.fillings.items()}
        yield prompts.templates[number % len(prompts.templates)].format(**drawn)


def _as_record(question: str, number: int, tokenizer: Tokenizer) -> Record:
    """A question as a record; its answer only marks where that stands."""
    place = "retention.kl.prompts.templates"
    if not tokenizer.chat_template:
        return Record(place, number, "completion", {"prompt": question, "completion": "?"})
    chat = [{"role": "user", "content": question}, {"role": "assistant", "content": "?"}]
    return Record(place, number, "messages", {"messages": chat})
