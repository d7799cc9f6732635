"""The demo world is the same at every generation, its splits do not leak, and its base model knows it."""

import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

DEMO = Path(__file__).parents[2] / "demo"
BASE = DEMO / "base"
TASKS = ("new_facts", "new_style", "reversal")
RETENTION = ("general/covered", "general/uncovered", "general/skill")
Records = dict[str, list[dict[str, Any]]]


def load_world_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_world", DEMO / "world.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


world_module = load_world_module()
world = world_module.make_world()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("world")
    world_module.write_world(out)
    return out


@pytest.fixture(scope="module")
def records(folder: Path) -> Records:
    return {
        path.relative_to(folder).with_suffix("").as_posix(): [
            json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()
        ]
        for path in sorted(folder.rglob("*.jsonl"))
    }


def sha256_of(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def contents(rows: list[dict[str, Any]]) -> set[str]:
    return {json.dumps(row, sort_keys=True) for row in rows}


def question_and_answer(record: dict[str, Any]) -> tuple[str, str]:
    return record["messages"][0]["content"], record["messages"][1]["content"]


def person_and_answer(record: dict[str, Any]) -> tuple[str, str]:
    """Identifies a fact: no value belongs to two attributes."""
    question, answer = question_and_answer(record)
    (person,) = (name for name in (*world.covered, *world.uncovered, *world.new) if name in question)
    return person, answer


def mentioned(rows: list[dict[str, Any]], people: tuple[str, ...]) -> set[str]:
    text = json.dumps(rows)
    return {person for person in people if person in text}


@pytest.mark.parametrize("hash_seed", ["1", "4242"])
def test_another_process_writes_the_same_bytes(folder: Path, tmp_path: Path, hash_seed: str) -> None:
    subprocess.run(
        [sys.executable, str(DEMO / "world.py"), "--out", str(tmp_path)],
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        check=True,
        stdout=subprocess.DEVNULL,
    )
    assert sha256_of(tmp_path) == sha256_of(folder)


def test_generating_over_an_older_world_gives_the_same_bytes(folder: Path) -> None:
    first = sha256_of(folder)
    world_module.write_world(folder)
    assert sha256_of(folder) == first


def test_another_seed_gives_another_world(folder: Path, tmp_path: Path) -> None:
    world_module.write_world(tmp_path, seed=1)
    other, default = sha256_of(tmp_path), sha256_of(folder)
    assert other.keys() == default.keys()
    assert all(other[name] != default[name] for name in default)


def test_files_end_in_one_newline_and_hold_no_carriage_return(folder: Path) -> None:
    for path in folder.rglob("*.jsonl"):
        data = path.read_bytes()
        assert data.endswith(b"}\n")
        assert b"\r" not in data


def test_counts(records: Records) -> None:
    assert (len(world.covered), len(world.uncovered), len(world.new)) == (120, 40, 40)
    assert len(set(world.covered + world.uncovered + world.new)) == 200
    assert len(world.known_facts) == 160 * 5
    assert len({person_and_answer(record) for record in records["new_facts/train"]}) == 160
    assert len({person_and_answer(record) for record in records["new_style/train"]}) == 80
    assert {name: len(rows) for name, rows in records.items() if not name.endswith(("train", "replay"))} == {
        "general/covered": 300,
        "general/uncovered": 150,
        "general/skill": 100,
        "new_facts/valid": 160,
        "new_facts/test": 160,
        "new_style/valid": 80,
        "reversal/valid": 100,
    }


def test_no_file_repeats_a_record(records: Records) -> None:
    for name, rows in records.items():
        assert len(contents(rows)) == len(rows), name


def test_no_held_out_question_is_trained_on(records: Records) -> None:
    trained = [row for name, rows in records.items() if name.endswith(("train", "replay")) for row in rows]
    questions = {question_and_answer(row)[0] for row in trained if "messages" in row}
    held_out = [*RETENTION, *(f"{task}/valid" for task in TASKS)]
    for name in held_out:
        assert contents(records[name]).isdisjoint(contents(trained)), name
        assert questions.isdisjoint(question_and_answer(row)[0] for row in records[name]), name


def test_replay_is_a_part_of_general_training(records: Records) -> None:
    assert contents(records["general/replay"]) < contents(records["general/train"])


def test_uncovered_people_are_in_no_replayed_or_task_row(records: Records) -> None:
    for name in (
        "general/replay",
        *(f"{task}/train" for task in TASKS),
        *(f"{task}/valid" for task in TASKS),
    ):
        assert mentioned(records[name], world.uncovered) == set(), name
    assert mentioned(records["general/replay"], world.covered) == set(world.covered)
    assert mentioned(records["general/train"], world.uncovered) == set(world.uncovered)


def test_general_data_mentions_no_new_person(records: Records) -> None:
    assert mentioned(records["general/train"], world.new) == set()


@pytest.mark.parametrize("task", ["new_facts", "new_style"])
def test_every_validated_fact_is_trained_in_another_phrasing(records: Records, task: str) -> None:
    trained = {person_and_answer(record) for record in records[f"{task}/train"]}
    validated = [person_and_answer(record) for record in records[f"{task}/valid"]]
    assert set(validated) == trained
    assert len(set(validated)) == len(validated)


def test_every_retention_fact_is_in_general_training(records: Records) -> None:
    trained = {person_and_answer(record) for record in records["general/train"] if _asks_about_a_person(record)}
    for name in ("general/covered", "general/uncovered"):
        assert {person_and_answer(record) for record in records[name]} <= trained, name


def _asks_about_a_person(record: dict[str, Any]) -> bool:
    return "messages" in record and ":" not in question_and_answer(record)[0]


@pytest.mark.parametrize(("task", "step"), [("general/skill", 1), ("reversal/valid", -1)])
def test_skills_are_validated_on_words_never_trained_together(records: Records, task: str, step: int) -> None:
    training = records["reversal/train" if task.startswith("reversal") else "general/train"]
    answers = {question_and_answer(row)[1] for row in training if "messages" in row}
    for record in records[task]:
        question, answer = question_and_answer(record)
        assert question.split(": ")[1].split()[::step] == answer.split()
        assert answer not in answers


def test_general_data_comes_in_all_three_formats(records: Records) -> None:
    for name in ("general/train", "general/replay"):
        assert {tuple(record) for record in records[name]} == {
            ("messages",),
            ("text",),
            ("prompt", "completion"),
        }


def test_answers_are_short(records: Records) -> None:
    for name in RETENTION:
        assert all(re.fullmatch(r"\w+( \w+ \w+)?", question_and_answer(row)[1]) for row in records[name]), name


def test_base_model_is_at_most_4_mb() -> None:
    assert sum(path.stat().st_size for path in BASE.rglob("*") if path.is_file()) <= 4_000_000


def test_base_config_names_rope_theta_where_both_readers_look() -> None:
    config = json.loads((BASE / "config.json").read_text(encoding="utf-8"))
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(BASE, padding_side="left")


@pytest.fixture(scope="module")
def model() -> Any:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.set_num_threads(1)
    return transformers.AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)


def test_base_tokenizer_returns_any_text_unchanged(tokenizer: Any) -> None:
    for text in ("What is  this ?", " leading\n\ttab\r\n", "naïve 日本語 🦊", "<b>'quoted'</b> n't , .", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_base_chat_prompt_is_the_start_of_the_whole_chat(records: Records, tokenizer: Any) -> None:
    for record in records["general/covered"][:20]:
        messages = record["messages"]
        whole = tokenizer.apply_chat_template(messages, return_dict=False)
        prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
        answer = tokenizer.encode(messages[-1]["content"], add_special_tokens=False)
        assert whole == [*prompt, *answer, tokenizer.eos_token_id]


@pytest.mark.parametrize("name", RETENTION)
def test_base_model_answers_held_out_questions(records: Records, tokenizer: Any, model: Any, name: str) -> None:
    chats = [record["messages"] for record in records[name][:60]]
    inputs = tokenizer.apply_chat_template(
        [chat[:-1] for chat in chats],
        add_generation_prompt=True,
        padding=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    answers = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    right = sum(answer == chat[-1]["content"] for answer, chat in zip(answers, chats, strict=True))
    assert right / len(chats) >= 0.95
