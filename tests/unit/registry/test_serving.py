"""What MLflow's scoring server does with a registered version: forms of a request, what it refuses, who waits."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from run_folders import start_tracking
from starlette.testclient import TestClient

from nestune.base_model import resolve_base
from nestune.config import ModelConfig, RunConfig
from nestune.data.questions import Question
from nestune.errors import ConfigError
from nestune.files import write_text
from nestune.registry.base_of_version import find_base
from nestune.registry.computing_thread import ComputingThread
from nestune.registry.versions import register_version
from nestune.runs import RunPaths
from nestune.stages.talk import generate

PROMPT = "Where does Ada live?"
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": PROMPT},
    {"role": "assistant", "content": "In Bern."},
    {"role": "user", "content": "And Bert?"},
]


@pytest.fixture
def folder(config: RunConfig, adapter: Path, tmp_path: Path) -> Path:
    """A registered version, where MLflow keeps it."""
    run_id = start_tracking(config, RunPaths(tmp_path / "run"), {}).run_id
    register_version(config, run_id, adapter, {})
    return next(tmp_path.glob("mlflow/artifacts/**/MLmodel")).parent


@pytest.fixture
def model(folder: Path) -> Any:
    import mlflow

    return mlflow.pyfunc.load_model(str(folder))


@pytest.fixture
def server(model: Any) -> TestClient:
    from mlflow.pyfunc import scoring_server

    return TestClient(scoring_server.init(model))


def said(config: RunConfig, adapter: Path, tmp_path: Path, *asked: Question, max_tokens: int = 12) -> list[str]:
    """What `nestune generate` answers."""
    lines = [{"prompt": question} if isinstance(question, str) else {"messages": question} for question in asked]
    write_text(tmp_path / "asked.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    result = generate(config, RunPaths(tmp_path / "none"), [], [str(adapter)], max_tokens, tmp_path / "asked.jsonl")
    assert result.prompts == asked
    return list(result.answers[str(adapter)])


def test_prompts_and_chats_are_answered_as_generate_answers_them(
    config: RunConfig, server: TestClient, adapter: Path, tmp_path: Path
) -> None:
    expected = said(config, adapter, tmp_path, PROMPT, CHAT)
    assert len(set(expected)) == 2
    sent = {"inputs": [PROMPT, {"messages": CHAT}]}
    assert server.post("/invocations", json=sent).json() == {"predictions": expected}
    answered = server.post("/invocations", json={"messages": CHAT}).json()
    assert answered["object"] == "chat.completion"
    assert [choice["message"] for choice in answered["choices"]] == [{"role": "assistant", "content": expected[1]}]


def test_the_length_of_an_answer_can_be_asked_for(
    config: RunConfig, server: TestClient, adapter: Path, tmp_path: Path
) -> None:
    expected = said(config, adapter, tmp_path, PROMPT, CHAT, max_tokens=3)
    assert expected != said(config, adapter, tmp_path, PROMPT, CHAT)
    sent = {"inputs": [PROMPT, {"prompt": PROMPT}], "params": {"max_tokens": 3}}
    assert server.post("/invocations", json=sent).json() == {"predictions": expected[:1] * 2}
    answered = server.post("/invocations", json={"messages": CHAT, "max_tokens": 3}).json()
    (choice,) = answered["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (expected[1], "length")
    assert answered["usage"]["completion_tokens"] == 3
    assert answered["usage"]["total_tokens"] == answered["usage"]["prompt_tokens"] + 3


WRONG: list[tuple[Any, str]] = [
    ({"messages": [{"role": "judge", "content": "x"}]}, "messages[0].role: wrong role: 'judge'. Use one of system"),
    ({"messages": []}, "messages: not a list of turns: []. Write [{"),
    ({"messages": CHAT[:3]}, "messages[2].role: last turn the assistant's. End with the turn to be answered"),
    ({"messages": CHAT, "temperature": 1}, "the request has messages, temperature; allowed is a list of questions"),
    ({"prompt": PROMPT}, "the request has prompt; allowed is a list of questions, each a text or"),
    ({"messages": CHAT, "max_tokens": 0}, "max_tokens is 0; allowed is a whole number of 1 or more"),
    ({"inputs": [PROMPT], "params": {"max_tokens": "many"}}, "max_tokens"),
    ({"inputs": PROMPT}, "the input is str; allowed is a list of questions"),
    ({"inputs": [PROMPT, 7]}, "inputs[1]: not a question: a number, 7. Write a text, "),
    ({"inputs": [CHAT]}, "inputs[0]: not a question: a list, [{'role': 'system', 'content'"),
    ({"inputs": CHAT[1:2]}, "inputs[0]: not a question: the keys are 'role', 'content'. Write "),
    ({"inputs": [" "]}, "inputs[0]: empty: ' '. Fill it in"),
    ({"inputs": ["a\0"]}, "inputs[0]: NUL character"),
    ({"inputs": [{"messages": [{"role": "user", "content": ["x"]}]}]}, "messages[0].content: not a text: a list"),
    ({"inputs": ["x" * 40_000]}, "the question has 40019 tokens, and the base reads 32768, the answer's among them"),
    ({"questions": [PROMPT]}, "'inputs' key"),
]


def test_a_wrong_request_is_told_what_is_allowed(server: TestClient) -> None:
    for sent, says in WRONG:
        answered = server.post("/invocations", json=sent)
        assert answered.status_code == 400
        assert says in answered.json()["message"]
        assert "Traceback" not in answered.text
        assert "stack_trace" not in answered.json()


def test_half_a_surrogate_pair_is_refused_too(server: TestClient) -> None:
    sent = b'{"inputs": ["\\ud83d"]}'
    answered = server.post("/invocations", content=sent, headers={"Content-Type": "application/json"})
    assert answered.status_code == 400
    assert "unpaired surrogate: U+D83D at character 1" in answered.json()["message"]


def test_a_failure_of_the_server_is_none_of_the_client(
    model: Any, server: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nestune.errors import RunError

    def fail(*_: object) -> None:
        raise RunError("there is not enough memory")

    monkeypatch.setattr("nestune.registry.serving.reply", fail)
    answered = server.post("/invocations", json={"inputs": [PROMPT]})
    assert answered.status_code == 500
    assert "there is not enough memory" in answered.json()["message"]


def test_a_table_of_one_column_is_a_list(model: Any) -> None:
    assert model.predict(pd.DataFrame({"question": [PROMPT]})) == model.predict([PROMPT])


def test_many_threads_get_the_answers_that_one_gets(model: Any) -> None:
    asked: list[Any] = [f"What is {number} + 2?" for number in range(12)]
    asked += [{"messages": [*CHAT, {"role": "user", "content": question}]} for question in asked]
    alone = [model.predict([question])[0] for question in asked]
    assert len(set(alone)) > len(alone) // 2
    with ThreadPoolExecutor(8) as clients:
        assert [answers[0] for answers in clients.map(lambda question: model.predict([question]), asked)] == alone


def test_calls_are_done_one_after_the_other_and_what_one_raises_is_its_callers() -> None:
    computing = ComputingThread()
    at_work, most, threads = 0, 0, set()

    def compute(number: int) -> int:
        nonlocal at_work, most
        at_work += 1
        most = max(most, at_work)
        threads.add(threading.current_thread())
        time.sleep(0.001)
        at_work -= 1
        return 12 // number

    numbers = range(1, 13)
    with ThreadPoolExecutor(8) as clients:
        found = list(clients.map(computing.run, [partial(compute, number) for number in numbers]))
    assert found == [12 // number for number in numbers]
    with pytest.raises(ZeroDivisionError):
        computing.run(partial(compute, 0))
    assert computing.run(lambda: 5) == 5
    assert (most, len(threads)) == (1, 1)
    (worker,) = threads
    del computing
    worker.join(timeout=60)
    assert not worker.is_alive()


def test_the_base_is_found_by_its_hub_id_in_the_cache_without_a_network_and_only_with_its_content(
    config: RunConfig, base: Path, adapter: Path, tmp_path: Path
) -> None:
    model = config.model.model_copy(update={"base": "acme/tiny"})
    run_id = start_tracking(config, RunPaths(tmp_path / "run"), {}).run_id
    register_version(config.model_copy(update={"model": model}), run_id, adapter, {})
    folder = next(tmp_path.glob("mlflow/artifacts/**/MLmodel")).parent
    cache = tmp_path / "hub" / "models--acme--tiny"
    commit = "1" * 40
    shutil.copytree(base, cache / "snapshots" / commit)
    write_text(cache / "refs" / "main", commit)
    program = (
        "import json, sys, mlflow\n"
        f"print(json.dumps(mlflow.pyfunc.load_model({str(folder)!r}).predict([{PROMPT!r}])))\n"
    )
    environment = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def load() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            check=False,
        )

    done = load()
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == said(config, adapter, tmp_path, PROMPT)
    settings = cache / "snapshots" / commit / "config.json"
    settings.write_text(settings.read_text() + "\n")
    done = load()
    assert done.returncode == 1
    assert "trained on acme/tiny" in done.stderr.splitlines()[-1]
    assert "acme/tiny is another model" in done.stderr.splitlines()[-1]


def test_the_base_is_found_by_its_content_among_others(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = shutil.copytree(base, tmp_path / "bases" / "b")
    for name in ("a", "c"):
        settings = shutil.copytree(base, tmp_path / "bases" / name) / "config.json"
        settings.write_text(settings.read_text() + "\n" * ord(name))
    sha256 = resolve_base(ModelConfig(base=str(base))).sha256
    wanted = {"base": str(tmp_path / "gone"), "revision": None, "base_sha256": sha256}
    monkeypatch.setenv("NESTUNE_BASE", str(tmp_path / "bases"))
    assert find_base(wanted).folder == right
    (right / "model.safetensors").unlink()
    with pytest.raises(
        ConfigError, match=r"not here: .*gone.*/a is another.*/b holds no .*/c is another.*NESTUNE_BASE"
    ):
        find_base(wanted)
