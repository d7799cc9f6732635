import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizer import CHATML, build_tokenizer, chat

from nestune.data.records import Record
from nestune.data.tokens import Row, encode, encode_all, load_tokenizer, marked_text
from nestune.errors import ConfigError, Fault

# As in the tiny tokenizer's other template, but each turn starts with the line break instead of ending with it.
BREAK_BEFORE = (
    "{% for message in messages %}{% if not loop.first %}{{ '\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n<|im_start|>assistant\\n' }}{% endif %}"
)
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Writes the last turn differently from earlier ones, as templates of reasoning models do.
LAST_TURN_DIFFERS = CHATML.replace(
    "message['content']",
    "('<think>' if loop.last and message['role'] == 'assistant' else '') + message['content'].strip()",
)
REWRITES_EARLIER_TURNS = CHATML.replace(
    "message['content']", "(message['content'] if loop.last else message['content'] | upper)"
)
TOKENIZERS = {
    "break after": build_tokenizer(),
    "break before": build_tokenizer(chat_template=BREAK_BEFORE),
    "marked": build_tokenizer(chat_template=MARKED),
    "trimmed offsets": build_tokenizer(trim_offsets=True),
    "marked, trimmed offsets": build_tokenizer(chat_template=MARKED, trim_offsets=True),
}
TOKENIZER_LAST_TURN_DIFFERS = build_tokenizer(chat_template=LAST_TURN_DIFFERS)
WHITE_SPACE = st.sampled_from(["", " ", "\n\n", " \t"])
WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1).filter(str.strip)
WORDS = st.tuples(WHITE_SPACE, WORDS, WHITE_SPACE).map("".join)
TURNS = st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4).map(lambda pairs: [t for pair in pairs for t in pair])


def record(content: dict) -> Record:
    kind = "messages" if "messages" in content else "text" if "text" in content else "completion"
    return Record("a.jsonl", 3, kind, content)


def rows_of(contents: list[dict], tokenizer, max_length: int = 4096) -> list[Row]:
    return [encode(record(content), tokenizer, max_length) for content in contents]


def learned(row: Row, tokenizer) -> list[str]:
    """The text of each run of supervised tokens."""
    borders = np.flatnonzero(np.diff(row.supervised)) + 1
    runs = zip(np.split(row.tokens, borders), np.split(row.supervised, borders), strict=True)
    return [tokenizer.decode(tokens) for tokens, supervised in runs if supervised[0]]


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
@given(turns=TURNS)
def test_every_assistant_turn_with_its_end_token_is_learned_and_nothing_else(tokenizer, turns):
    (row,) = rows_of([chat(*turns)], tokenizer)
    assert learned(row, tokenizer) == [f"{answer}<|im_end|>" for answer in turns[1::2]]


def test_the_whole_chat_is_tokenized_as_the_template_writes_it(tokenizer):
    content = chat("who painted the door?", "the sea")
    (row,) = rows_of([content], tokenizer)
    assert row.tokens.tolist() == tokenizer.apply_chat_template(content["messages"], return_dict=False)
    assert row.tokens.dtype == np.int32
    assert row.supervised.dtype == bool


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
def test_the_prompt_of_a_chat_is_what_generation_starts_from(tokenizer):
    content = chat("hi", "hello", "what colour is the sea?", " blue \n")
    (row,) = rows_of([content], tokenizer)
    expected = tokenizer.apply_chat_template(content["messages"][:-1], add_generation_prompt=True, return_dict=False)
    assert row.prompt.tolist() == expected
    assert row.answer == "blue"


def test_a_template_that_writes_the_begin_token_itself_gets_no_second_one():
    tokenizer = build_tokenizer(begin_token=True, chat_template="{{ bos_token }}" + CHATML)
    (row,) = rows_of([chat("hi", "hello")], tokenizer)
    assert row.tokens.tolist().count(tokenizer.bos_token_id) == 1
    assert row.prompt.tolist().count(tokenizer.bos_token_id) == 1


def test_tool_and_system_turns_are_not_learned(tokenizer):
    roles = ["system", "user", "assistant", "tool", "assistant"]
    messages = [{"role": role, "content": f"{role} {index}"} for index, role in enumerate(roles)]
    (row,) = rows_of([{"messages": messages}], tokenizer)
    assert learned(row, tokenizer) == ["assistant 2<|im_end|>", "assistant 4<|im_end|>"]


@given(prompt=WORDS, completion=WORDS)
def test_a_completion_is_learned_with_an_end_token_and_its_prompt_is_not(prompt, completion):
    tokenizer = TOKENIZERS["break after"]
    (row,) = rows_of([{"prompt": prompt, "completion": completion}], tokenizer)
    assert tokenizer.decode(row.tokens) == prompt + completion + "<|endoftext|>"
    assert row.prompt.tolist() == tokenizer(prompt)["input_ids"]
    assert row.answer == completion.strip()
    # In a byte-level vocabulary a token has a character for each byte, so bytes tell where the prompt ends.
    ends = np.cumsum([len(token) for token in tokenizer.convert_ids_to_tokens(row.tokens[:-1])])
    expected = ends > len(prompt.encode())
    expected[0] = False
    assert row.supervised.tolist() == [*expected, True]


def test_a_token_that_straddles_prompt_and_completion_is_learned(tokenizer):
    assert len(tokenizer("sea")["input_ids"]) == 1
    (row,) = rows_of([{"prompt": "the se", "completion": "a is blue"}], tokenizer)
    assert learned(row, tokenizer) == [" sea is blue<|endoftext|>"]


def test_all_of_a_text_but_its_first_token_is_learned_with_an_end_token(tokenizer):
    (row,) = rows_of([{"text": "the sea is blue"}], tokenizer)
    assert tokenizer.decode(row.tokens) == "the sea is blue<|endoftext|>"
    assert row.supervised.tolist() == [False] + [True] * (len(row.tokens) - 1)
    assert row.prompt is None
    assert row.answer is None


def test_an_end_token_that_is_there_is_not_written_twice(tokenizer):
    rows = rows_of([{"text": "the sea<|endoftext|>"}, {"prompt": "the", "completion": " sea<|endoftext|>"}], tokenizer)
    assert [row.tokens.tolist().count(tokenizer.eos_token_id) for row in rows] == [1, 1]
    assert all(row.supervised[-1] for row in rows)


def test_texts_and_completions_begin_as_the_tokenizer_does_by_default():
    tokenizer = build_tokenizer(begin_token=True)
    text, completion = rows_of([{"text": "the sea"}, {"prompt": "the", "completion": " sea"}], tokenizer)
    assert tokenizer.decode(text.tokens) == tokenizer.decode(completion.tokens) == "<s>the sea<|endoftext|>"
    assert text.supervised.tolist() == [False] + [True] * (len(text.tokens) - 1)
    assert learned(completion, tokenizer) == [" sea<|endoftext|>"]
    assert completion.prompt.tolist() == tokenizer("the")["input_ids"]


@pytest.mark.parametrize(
    "content", [chat("what colour?", "blue"), {"text": "the sea"}, {"prompt": "the", "completion": " sea"}]
)
def test_nothing_predicts_the_first_token_and_every_row_has_one_to_learn(tokenizer, content):
    whole = encode(record(content), tokenizer, 4096)
    for max_length in range(1, len(whole.tokens) + 1):
        row = encode(record(content), tokenizer, max_length)
        if isinstance(row, Fault):
            assert not whole.supervised[:max_length].any()
            continue
        assert not row.supervised[0]
        assert row.supervised.any()
        assert row.tokens.tolist() == whole.tokens[:max_length].tolist()
        assert row.supervised.tolist() == whole.supervised[:max_length].tolist()
        assert row.truncated == (max_length < len(whole.tokens))
        assert row.answer == whole.answer


def test_a_record_whose_answer_is_cut_off_whole_is_a_fault(tokenizer):
    fault = encode(record(chat("what colour is the sea at noon?", "blue")), tokenizer, 4)
    assert (fault.file, fault.line, fault.field) == ("a.jsonl", 3, "messages")
    assert fault.problem.startswith("nothing to learn: ")
    assert fault.problem.endswith("lie beyond the first 4")
    assert "data.max_seq_length" in fault.remedy


def test_a_chat_without_a_chat_template_names_base_file_line_and_remedy():
    with pytest.raises(ConfigError, match=r"models/tiny has no chat template, and a\.jsonl:3 is a chat\. .*jinja"):
        encode(record(chat("hi", "hello")), build_tokenizer(chat_template=None), 100)


@given(turns=TURNS)
def test_a_template_that_adds_to_the_last_turn_only_has_every_turn_learned_as_it_is_written(turns):
    tokenizer = TOKENIZER_LAST_TURN_DIFFERS
    (row,) = rows_of([chat(*turns)], tokenizer)
    answers = turns[1::2]
    assert learned(row, tokenizer) == [
        *(f"{answer.strip()}<|im_end|>" for answer in answers[:-1]),
        f"<think>{answers[-1].strip()}<|im_end|>",
    ]


def test_a_template_that_rewrites_what_earlier_turns_say_is_refused_for_chats_of_several_turns():
    tokenizer = build_tokenizer(chat_template=REWRITES_EARLIER_TURNS)
    assert isinstance(encode(record(chat("hi", "hello")), tokenizer, 100), Row)
    with pytest.raises(ConfigError, match=r"a\.jsonl:3, .*\{% generation %\}"):
        encode(record(chat("hi", "hello", "bye", "see you")), tokenizer, 100)


def test_a_chat_that_the_template_refuses_is_a_fault():
    tokenizer = build_tokenizer(chat_template="{{ raise_exception('no tools here') }}")
    fault = encode(record(chat("hi", "hello")), tokenizer, 100)
    assert fault.problem == "refused by the chat template: no tools here"


def test_a_template_that_marks_nothing_leaves_nothing_to_learn():
    nothing_marked = MARKED.replace("message['role'] == 'assistant'", "false")
    fault = encode(record(chat("hi", "hello")), build_tokenizer(chat_template=nothing_marked), 100)
    assert "is supervised" in fault.problem
    assert "{% generation %}" in fault.remedy


def test_many_records_come_out_as_they_do_one_by_one_with_faults_in_their_place(tokenizer, monkeypatch):
    monkeypatch.setattr("nestune.data.tokens.CHUNK_RECORDS", 4)
    records = [
        Record("a.jsonl", line, "text", {"text": f"the sea {line}"})
        if line % 3
        else Fault("a.jsonl", line, "", "broken", "mend it")
        for line in range(11)
    ]
    outcomes = list(encode_all(records, tokenizer, 100))
    assert len(outcomes) == 11
    for source, outcome in zip(records, outcomes, strict=True):
        if isinstance(source, Fault):
            assert outcome is source
        else:
            assert outcome[0] is source
            assert outcome[1].tokens.tolist() == encode(source, tokenizer, 100).tokens.tolist()


def test_the_marked_text_shows_what_is_learned(tokenizer):
    (row,) = rows_of([chat("what colour?", "blue")], tokenizer)
    assert marked_text(row, tokenizer) == (
        "<|im_start|>user\nwhat colour?<|im_end|>\n<|im_start|>assistant\n»blue<|im_end|>«\n"
    )


def test_a_saved_tokenizer_loads_and_pads_with_its_end_token_where_it_has_no_other(tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.pad_token_id == loaded.eos_token_id == tokenizer.eos_token_id
    assert encode(record(chat("hi", "hello")), loaded, 100).answer == "hello"


def test_a_folder_without_a_tokenizer_or_with_a_broken_one_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(ConfigError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match="does not load"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="has no end token"):
        load_tokenizer(tmp_path)
