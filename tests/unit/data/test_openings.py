"""What a teacher goes on from: start tokens, a chat's opening, prompts and filled templates."""

import numpy as np
import pytest
from tiny_tokenizer import CHATML, build_tokenizer, chat

from nestune.config import DataConfig, PromptsConfig
from nestune.data.openings import held_row, openings_of, prompts_of, refuse_scored_prompts
from nestune.data.tokens import Row
from nestune.errors import ConfigError, DataError

DATA = DataConfig(train=(__file__,))


def text_of(tokenizer, tokens) -> str:
    return tokenizer.decode(list(tokens))


def test_a_chat_opens_with_what_its_template_writes_around_what_the_user_says(tokenizer) -> None:
    openings = openings_of(tokenizer)
    assert openings.start == ()
    assert text_of(tokenizer, openings.user_turn) == "<|im_start|>user\n"
    assert text_of(tokenizer, openings.answer) == "<|im_end|>\n<|im_start|>assistant\n"
    assert openings.named("both") == openings.named("chat") == [openings.user_turn]
    assert openings.named("start") == []


@pytest.mark.parametrize("template", [None, CHATML, "<s>" + CHATML], ids=["no chats", "chats", "chats that begin so"])
def test_a_text_begins_with_the_begin_token_and_a_question_is_known_behind_it(template: str | None) -> None:
    tokenizer = build_tokenizer(begin_token=True, chat_template=template)
    openings, begin = openings_of(tokenizer), tokenizer.bos_token_id
    assert openings.start == (begin,)
    said = tokenizer("the sea", add_special_tokens=False).input_ids
    assert not openings.is_question([begin, *said])
    if template is not None:
        question = tokenizer("<|im_start|>user\nthe sea", add_special_tokens=False).input_ids
        assert openings.is_question([begin, *question])
        assert openings.is_question(question) == (not template.startswith("<s>"))


def test_given_prompts_end_where_the_last_answer_begins(tokenizer, write) -> None:
    path = write(
        "prompts.jsonl", [chat("who?", "me", "who else?", "nobody"), {"prompt": "blue is ", "completion": "a colour"}]
    )
    first, second = prompts_of(PromptsConfig(files=(path,)), DATA, tokenizer, 64, seed=0)
    assert text_of(tokenizer, first).endswith("<|im_start|>user\nwho else?<|im_end|>\n<|im_start|>assistant\n")
    assert text_of(tokenizer, second) == "blue is "


def test_templates_are_filled_in_turn_by_lot_the_same_for_the_same_seed(tokenizer) -> None:
    names, colours = ("Ada", "Bert", "Cleo"), ("red", "blue")
    prompts = PromptsConfig(
        templates=("Is {name}'s door {colour}?", "Who is {name}?"),
        fillings={"name": names, "colour": colours},
        filled=40,
    )
    asked = [text_of(tokenizer, prompt) for prompt in prompts_of(prompts, DATA, tokenizer, 64, seed=1)]
    assert asked == [text_of(tokenizer, prompt) for prompt in prompts_of(prompts, DATA, tokenizer, 64, seed=1)]
    assert asked != [text_of(tokenizer, prompt) for prompt in prompts_of(prompts, DATA, tokenizer, 64, seed=2)]
    first = {f"<|im_start|>user\nIs {name}'s door {colour}?" for name in names for colour in colours}
    second = {f"<|im_start|>user\nWho is {name}?" for name in names}
    ending = "<|im_end|>\n<|im_start|>assistant\n"
    assert {text.removesuffix(ending) for text in asked[::2]} == first
    assert {text.removesuffix(ending) for text in asked[1::2]} == second


def test_a_template_without_a_chat_template_is_a_plain_prompt() -> None:
    tokenizer = build_tokenizer(chat_template=None)
    prompts = PromptsConfig(templates=("Who is {name}?",), fillings={"name": ("Ada",)}, filled=1)
    assert [text_of(tokenizer, prompt) for prompt in prompts_of(prompts, DATA, tokenizer, 64, 0)] == ["Who is Ada?"]


def test_what_asks_nothing_or_cannot_be_read_is_refused(tokenizer, write) -> None:
    texts = write("texts.jsonl", [{"text": "blue"}, {"prompt": "a ", "completion": "b"}])
    with pytest.raises(DataError, match="1 of 2 records are texts, which ask nothing"):
        prompts_of(PromptsConfig(files=(texts,)), DATA, tokenizer, 64, 0)
    broken = write("broken.jsonl", b'{"prompt": 3}\n')
    with pytest.raises(DataError, match=r"(?s)retention\.kl\.prompts.*broken\.jsonl:1"):
        prompts_of(PromptsConfig(files=(broken,)), DATA, tokenizer, 64, 0)


def test_a_prompt_that_is_scored_is_refused() -> None:
    scored = Row(np.arange(4, dtype=np.int32), np.ones(4, bool), np.arange(3, dtype=np.int32), "x")
    refuse_scored_prompts([[0, 1], [0, 1, 2, 3]], [scored])
    with pytest.raises(ConfigError, match=r"1 of 2 prompts are questions of a held-out set.*Leave them out"):
        refuse_scored_prompts([[0, 1], [0, 1, 2]], [scored])


def test_a_text_is_held_at_every_token_but_the_first() -> None:
    row = held_row([5, 6, 7])
    assert row.tokens.tolist() == [5, 6, 7]
    assert row.supervised.tolist() == [False, True, True]
    assert row.prompt is None
    assert row.answer is None
