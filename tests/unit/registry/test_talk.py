"""`nestune generate` and `nestune chat`: the same answers as a served version, models side by side, turns kept."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from run_folders import start_tracking

from nestune.backends.factory import make_backend
from nestune.base_model import resolve_base
from nestune.cli import main
from nestune.config import RunConfig
from nestune.data.tokens import load_tokenizer
from nestune.errors import ConfigError, DataError
from nestune.evaluation.answers import answer, asked
from nestune.registry.promotion import promote_version
from nestune.registry.versions import register_version
from nestune.runs import RunPaths
from nestune.stages.talk import chat, generate

PROMPTS = ["Where does Ada live?", "2 + 2 =", "ä€😀"]


@pytest.fixture
def champion(config: RunConfig, adapter: Path, tmp_path: Path) -> str:
    run_id = start_tracking(config, RunPaths(tmp_path / "run"), {}).run_id
    promote_version(config.registry, register_version(config, run_id, adapter, {}), None)
    return "models:/nestune@champion"


def test_models_answer_side_by_side_as_the_served_version_does(
    config: RunConfig, champion: str, adapter: Path, tmp_path: Path
) -> None:
    import mlflow

    result = generate(config, RunPaths(tmp_path / "none"), PROMPTS, ["base", champion, str(adapter)])
    mlflow.set_tracking_uri(config.registry.tracking_uri)
    try:
        served = mlflow.pyfunc.load_model(champion).predict(PROMPTS)
    finally:
        mlflow.set_tracking_uri(None)
    assert list(result.answers[champion]) == list(result.answers[str(adapter)]) == served
    assert list(result.answers["base"]) != served
    assert result.summary()[0] == f"> {PROMPTS[0]}"
    assert len(result.summary()) == 3 * 4


def test_in_a_chat_each_model_goes_on_from_its_own_answers_until_it_begins_anew(
    config: RunConfig, adapter: Path, tmp_path: Path
) -> None:
    heard: list[Any] = []
    lines = ["Who is Ada?\n", "\n", "And Bert?\n", "/new\n", "Who is Ada?\n"]
    chat(config, RunPaths(tmp_path / "none"), lines, heard.append, ["base", str(adapter)])
    assert [list(said) for said in heard] == [["base", str(adapter)]] * 3
    assert heard[2] == heard[0] != heard[1]
    backend, tokenizer = make_backend(config), load_tokenizer(resolve_base(config.model).folder)
    for name, folder in (("base", None), (str(adapter), adapter)):
        backend.show_adapter(folder)
        turns = [
            {"role": "user", "content": "Who is Ada?"},
            {"role": "assistant", "content": heard[0][name]},
            {"role": "user", "content": "And Bert?"},
        ]
        assert heard[1][name] == answer(backend, tokenizer, turns, config.evaluation.max_answer_tokens)
        assert heard[1][name] != answer(backend, tokenizer, "And Bert?", config.evaluation.max_answer_tokens)


def test_a_base_without_a_chat_template_goes_on_from_a_text_and_takes_no_messages(config: RunConfig) -> None:
    tokenizer = load_tokenizer(resolve_base(config.model).folder)
    tokenizer.chat_template = None
    assert asked("2 + 2 =", tokenizer) == tokenizer("2 + 2 =").input_ids
    with pytest.raises(ConfigError, match="no chat template, so it takes no messages"):
        asked([{"role": "user", "content": "2 + 2 ="}], tokenizer)
    tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    with pytest.raises(ConfigError, match="the chat template of the base refuses these messages: no such role"):
        asked([{"role": "judge", "content": "2 + 2 ="}], tokenizer)


def test_the_commands_say_the_same(
    config: RunConfig,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    content = config.model_dump(mode="json")
    (tmp_path / "train.jsonl").touch()
    (tmp_path / "old.jsonl").touch()
    Path("run.yaml").write_text(yaml.safe_dump(content))
    said = generate(config, RunPaths(tmp_path / "none"), PROMPTS[:1], [str(adapter)], max_tokens=3)
    command = ["generate", PROMPTS[0], "--config", "run.yaml", "--adapter", str(adapter), "--max-tokens", "3"]
    assert main(command) == 0
    assert capsys.readouterr().out == "\n".join(said.summary()) + "\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{PROMPTS[0]}\n"))
    assert main(["chat", "--config", "run.yaml", "--adapter", str(adapter), "--max-tokens", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {str(adapter): said.answers[str(adapter)][0]}
    assert main(["generate", "x", "--config", "run.yaml", "--adapter", "candidate"]) == 2
    assert "run week.1 has no candidate" in capsys.readouterr().err


def test_questions_come_from_a_file_too_and_what_is_none_is_told_with_its_line(
    config: RunConfig, adapter: Path, tmp_path: Path
) -> None:
    turns = [{"role": "user", "content": PROMPTS[0]}]
    file, run = tmp_path / "asked.jsonl", RunPaths(tmp_path / "none")
    file.write_text(f"{json.dumps({'messages': turns})}\n\n{json.dumps({'prompt': PROMPTS[1]})}\n")
    result = generate(config, run, PROMPTS[:1], [str(adapter)], file=file)
    assert result.as_dict()["prompts"] == [PROMPTS[0], turns, PROMPTS[1]]
    first, chat_of_one_turn, other = result.answers[str(adapter)]
    assert first == chat_of_one_turn != other
    assert f"> user: {PROMPTS[0]}" in result.summary()
    lines = ['{"prompt": "x", "completion": "y"}', '{"messages": [{"role": "user"}]}', '"x"', '{"prompt": ']
    file.write_text("\n".join(lines))
    with pytest.raises(DataError) as caught:
        generate(config, run, [], [str(adapter)], file=file)
    told = str(caught.value).splitlines()[1:]
    assert [line.partition(f"{file}:")[2][:1] for line in told] == ["1", "2", "3", "4"]
    assert "the keys are 'prompt', 'completion'" in told[0]
    assert "messages[0].content: missing" in told[1]
    assert "not an object: a string, 'x'" in told[2]
    assert "broken JSON" in told[3]
    file.write_text("\n")
    with pytest.raises(DataError, match=r"holds no questions\. Write one a line"):
        generate(config, run, [], [str(adapter)], file=file)
    with pytest.raises(ConfigError, match=r"nothing is asked\. Give a PROMPT, or --file"):
        generate(config, run, [], [str(adapter)])
    with pytest.raises(DataError, match=r"prompts\[0\]: empty: ' '"):
        generate(config, run, [" "], [str(adapter)])
