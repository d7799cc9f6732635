"""What a model says to a person: to a prompt, or to the turns of a chat, in the chat template of the base."""

from dataclasses import dataclass

from nestune.backends.base import Backend
from nestune.data.questions import Question
from nestune.data.tokens import Tokenizer
from nestune.errors import ConfigError


@dataclass(frozen=True)
class Reply:
    """What a model says; the tokens that it read, and those that it wrote; `ended`: of its own accord."""

    text: str
    read: int
    written: int
    ended: bool


def asked(question: Question, tokenizer: Tokenizer) -> list[int]:
    """The token ids that an answer goes on from.

    A prompt is a user's only turn where the tokenizer has a chat template, else the beginning of a text. Raises
    ConfigError for turns without a chat template, or where the template refuses them.
    """
    if not tokenizer.chat_template:
        if not isinstance(question, str):
            raise ConfigError("the base has no chat template, so it takes no messages; give it a text to go on from")
        return list(tokenizer(question, add_special_tokens=True).input_ids)
    turns = [{"role": "user", "content": question}] if isinstance(question, str) else list(question)
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template raises what it likes
        raise ConfigError(f"the chat template of the base refuses these messages: {error!s:.200}") from None
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def reply(
    backend: Backend, tokenizer: Tokenizer, question: Question, max_tokens: int, positions: int | None = None
) -> Reply:
    """The greedy answer of the model that the backend computes with now, to its end or `max_tokens` tokens.

    Questions are answered one by one, so that an answer does not depend on what else is asked. positions: the most
    tokens that the base reads, the answer's among them. Raises ConfigError where no room is left for an answer.
    """
    tokens = asked(question, tokenizer)
    room = max_tokens if positions is None else min(max_tokens, positions - len(tokens))
    if room < 1:
        raise ConfigError(
            f"the question has {len(tokens)} tokens, and the base reads {positions}, the answer's among them. "
            "Shorten it, or begin a new chat."
        )
    written = backend.generate([tokens], room)[0]
    text = str(tokenizer.decode(written, skip_special_tokens=True)).strip()
    return Reply(text, len(tokens), len(written), ended=len(written) < room)


def answer(
    backend: Backend, tokenizer: Tokenizer, question: Question, max_tokens: int, positions: int | None = None
) -> str:
    """The text of `reply`."""
    return reply(backend, tokenizer, question, max_tokens, positions).text
