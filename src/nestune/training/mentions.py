"""How much of a set of questions some texts happen to speak of: what is protected only because it was said again."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from nestune.data.tokens import Row

WORD = re.compile(r"\w+")


def mentioned(rows: Sequence[Row], texts: Sequence[str], decode: Callable[..., str]) -> float | None:
    """The share, 0 to 1, of the rows with an answer that some text mentions; None when no row has one.

    A row counts as mentioned when one text has all words of its answer and the word of its prompt that the fewest
    prompts have (any of them, where several are as rare): the name of whom a question is about, mostly. A convention
    of this project: coarse, and only to be read beside the scores.
    """
    asked = [(_words(decode(row.prompt, skip_special_tokens=True)), _words(row.answer)) for row in rows if _asks(row)]
    if not asked:
        return None
    in_prompts: Counter[str] = Counter(word for prompt, _ in asked for word in prompt)
    by_word: dict[str, list[frozenset[str]]] = {}
    for text in texts:
        words = _words(text)
        for word in words:
            by_word.setdefault(word, []).append(words)
    met = 0
    for prompt, answer in asked:
        rarest = min((in_prompts[word] for word in prompt), default=0)
        candidates = (words for word in prompt if in_prompts[word] == rarest for words in by_word.get(word, ()))
        met += any(answer <= words for words in candidates)
    return met / len(asked)


def _asks(row: Row) -> bool:
    return row.prompt is not None and row.answer is not None


def _words(text: Any) -> frozenset[str]:
    return frozenset(WORD.findall(str(text).lower()))
