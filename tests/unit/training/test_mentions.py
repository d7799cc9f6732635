"""How much of a set of questions some texts mention."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nestune.data.tokens import Row
from nestune.training.mentions import mentioned

WORDS = ["what", "is", "the", "colour", "of", "ada", "bert", "cleo", "red", "blue", "green"]


def question(text: str, answer: str | None) -> Row:
    prompt = np.array([WORDS.index(word) for word in text.split()], dtype=np.int32)
    return Row(prompt, np.ones(len(prompt), bool), None if answer is None else prompt, answer)


def decode(tokens: np.ndarray, skip_special_tokens: bool) -> str:
    assert skip_special_tokens
    return " ".join(WORDS[token] for token in tokens)


ASKED = [question(f"what is the colour of {name}", colour) for name, colour in (("ada", "red"), ("bert", "blue"))]


def test_a_row_is_mentioned_where_one_text_has_its_rarest_word_and_its_answer() -> None:
    assert mentioned(ASKED, ["Ada's colour is red."], decode) == 0.5
    assert mentioned(ASKED, ["ada is RED", "blue? ask bert!"], decode) == 1


def test_neither_the_answer_nor_the_name_alone_is_enough_nor_both_in_two_texts() -> None:
    assert mentioned(ASKED, ["the colour red", "who is ada", "ada is blue", "bert is red"], decode) == 0


def test_a_word_within_another_does_not_count() -> None:
    assert mentioned(ASKED, ["adamant reds", "ada reddish"], decode) == 0


def test_rows_without_answers_are_not_asked() -> None:
    assert mentioned([question("what is red", None)], ["what is red"], decode) is None
    assert mentioned([*ASKED, question("what is red", None)], ["ada red"], decode) == 0.5


@given(st.lists(st.text("ab cd", max_size=12), max_size=6), st.lists(st.text("ab cd", max_size=12), max_size=6))
def test_more_texts_never_mention_less(some: list[str], more: list[str]) -> None:
    rows = [question("what is the colour of cleo", "a"), question("what is ada", "b c")]
    few, many = mentioned(rows, some, decode), mentioned(rows, some + more, decode)
    assert few is not None
    assert many is not None
    assert 0 <= few <= many <= 1
