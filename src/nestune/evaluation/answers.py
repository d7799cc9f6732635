"""What a model says to a person: to a prompt, or to the turns of a chat, in the chat template of the base."""

from collections.abc import Mapping, Sequence

from nestune.backends.base import Backend
from nestune.data.tokens import Tokenizer
from nestune.errors import ConfigError

Turns = Sequence[Mapping[str, str]]


def asked(prompt: str | Turns, tokenizer: Tokenizer) -> list[int]:
    """The token ids that an answer goes on from.

    A prompt is a user's only turn where the tokenizer has a chat template, else the beginning of a text. Raises
    ConfigError for turns without a chat template, or where the template refuses them.
    """
    if not tokenizer.chat_template:
        if not isinstance(prompt, str):
            raise ConfigError("the base has no chat template, so it takes no messages; give it a text to go on from")
        return list(tokenizer(prompt, add_special_tokens=True).input_ids)
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template raises what it likes
        raise ConfigError(f"the chat template of the base refuses these messages: {error!s:.200}") from None
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def answer(backend: Backend, tokenizer: Tokenizer, prompt: str | Turns, max_tokens: int) -> str:
    """The greedy answer of the model that the backend computes with now, to its end or `max_tokens` tokens.

    Prompts are answered one by one, so that an answer does not depend on what else is asked.
    """
    written = backend.generate([asked(prompt, tokenizer)], max_tokens)[0]
    return str(tokenizer.decode(written, skip_special_tokens=True)).strip()
