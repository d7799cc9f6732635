"""A champion behind `mlflow models serve`: as many clients as come, each with the answers of `nestune generate`."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from tests.pipeline.conftest import ROOT
from tests.services.conftest import configuration, end, free_port, until

pytestmark = pytest.mark.services

PAGE = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
SECTION = PAGE.partition("\n## Serving\n")[2].partition("\n## ")[0]
REQUESTS, CLIENTS = 200, 8


@dataclass(frozen=True)
class Served:
    """A server that answers with the champion, and the folder and environment in which it was started."""

    address: str
    folder: Path
    environment: dict[str, str]

    def run(self, *command: object) -> str:
        done = subprocess.run(
            [sys.executable, *map(str, command)], cwd=self.folder, env=self.environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The champion of a short training, served without a network, from where the base has moved to."""
    folder = tmp_path_factory.mktemp("serving")
    port = free_port()
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "MLFLOW_TRACKING_URI": "sqlite:///mlflow/mlflow.db",
    }
    here = Served(f"http://127.0.0.1:{port}", folder, environment)
    here.run(ROOT / "demo" / "world.py", "--out", "data")
    (folder / "demo").mkdir()
    (folder / "demo" / "base").symlink_to(ROOT / "demo" / "base")
    config = configuration("week1", training={"steps": 8, "eval_every": 4})
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    here.run("-m", "nestune.cli", "run", "--config", "run.yaml")
    (folder / "bases").mkdir()
    (folder / "bases" / "toy").symlink_to(ROOT / "demo" / "base")
    model = ["-m", "models:/demo@champion", "--env-manager", "local", "--port", str(port)]
    assert re.search("mlflow models serve " + " ".join(model[:-1]), SECTION)
    with (folder / "serve.log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "models", "serve", *model],
            cwd=folder,
            env=environment | {"NESTUNE_BASE": str(folder / "bases")},
            stdout=log,
            stderr=log,
        )
    try:
        until(lambda: answers(f"{here.address}/health"), "the server to answer", server)
        yield here
    finally:
        end(server)


def answers(address: str) -> bool:
    try:
        return httpx.get(address, timeout=60).is_success
    except httpx.TransportError:
        return False


def test_200_requests_of_8_clients_get_the_answers_of_generate(served: Served) -> None:
    asked = questions(served.folder)
    (served.folder / "asked.jsonl").write_text("".join(json.dumps(question) + "\n" for question in asked))
    command = ["generate", "--config", "run.yaml", "--adapter", "models:/demo@champion", "--file", "asked.jsonl"]
    (expected,) = json.loads(served.run("-m", "nestune.cli", *command, "--json"))["answers"].values()
    with httpx.Client(base_url=served.address, timeout=600) as client:

        def ask(place: int) -> str:
            # A prompt, and a chat by itself or in a list.
            question = asked[place]
            listed = place % 4 < 3
            sent = {"inputs": [question.get("prompt", question)]} if listed else question
            answered = client.post("/invocations", json=sent).raise_for_status().json()
            return str(answered["predictions"][0] if listed else answered["choices"][0]["message"]["content"])

        began = time.monotonic()
        with ThreadPoolExecutor(CLIENTS) as clients:
            seen = list(clients.map(ask, range(REQUESTS)))
        seconds = time.monotonic() - began
    print(f"\n{REQUESTS / seconds:.1f} requests/s of {CLIENTS} clients, load {os.getloadavg()[0]:.1f}")
    assert seen == expected
    assert len(set(seen)) > 20


def questions(folder: Path) -> list[dict[str, Any]]:
    """As lines of a file: prompts at even places, chats of three turns at odd ones."""
    lines = map(json.loads, (folder / "data" / "general" / "replay.jsonl").read_text().splitlines())
    records = [line["messages"] for line in lines if "messages" in line]
    asked: list[dict[str, Any]] = []
    for place in range(REQUESTS):
        turns = records[2 * place] + records[2 * place + 1][:1]
        asked.append({"messages": turns} if place % 2 else {"prompt": turns[0]["content"]})
    return asked


def test_prompts_and_chats_are_asked_with_curl_as_the_page_says(served: Served) -> None:
    prompts, chat = re.findall(r"```bash\n(.*?)```", SECTION, re.DOTALL)
    for block, asked in ((prompts, {"prompt": None}), (chat, {"messages": None})):
        sent = json.loads(re.findall(r"--json '(.*?)'", block, re.DOTALL)[0])
        asked = {"prompt": sent["inputs"][0]} if "inputs" in sent else {"messages": sent["messages"]}
        (served.folder / "page.jsonl").write_text(json.dumps(asked))
        command = ["generate", "--config", "run.yaml", "--adapter", "models:/demo@champion", "--file", "page.jsonl"]
        expected = served.run("-m", "nestune.cli", *command).strip()
        program = f"set -euo pipefail\nSERVER={served.address}\n{block}"
        done = subprocess.run(["bash", "-c", program], capture_output=True, text=True)
        assert (done.returncode, done.stdout.strip()) == (0, expected), done.stderr
        assert expected


def test_a_wrong_request_is_told_what_is_allowed_and_the_server_goes_on(served: Served) -> None:
    sent = {"inputs": ["x"], "params": {"max_tokens": -1}}
    answered = httpx.post(f"{served.address}/invocations", json=sent, timeout=600)
    assert answered.status_code == 400
    assert "max_tokens is -1; allowed is a whole number of 1 or more" in answered.json()["message"]
    assert "Traceback" not in answered.text
    assert answers(f"{served.address}/health")
