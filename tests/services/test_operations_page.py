"""The commands of docs/operations.md, as they stand there, against real servers."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from tests.pipeline.conftest import ROOT
from tests.services.conftest import Prefect, end, free_port, until

pytestmark = pytest.mark.services

NAME = "demo-nestune"
PAGE = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
# Those of serving are run by test_model_server.py.
BLOCKS = re.findall(r"```bash\n(.*?)```", PAGE.partition("\n## Serving\n")[0], re.DOTALL)


@pytest.fixture
def serving(prefect: Prefect) -> Iterator[str]:
    """The demo's configuration served, and MLflow's server; the address of that."""
    port = free_port()
    content = yaml.safe_load((ROOT / "configs" / "demo_nestune.yaml").read_text())
    content["retention"] = {"recipe": "none"}
    content["training"] |= {"steps": 4000}
    (prefect.folder / "demo.yaml").write_text(yaml.safe_dump(content))
    flow = prefect.start(ROOT / "flows" / "retrain.py", "--serve", "--config", "demo.yaml", log="serve.log")
    store = "sqlite:///mlflow/mlflow.db"
    (prefect.folder / "mlflow").mkdir(exist_ok=True)
    mlflow = prefect.start("-m", "mlflow", "ui", "--backend-store-uri", store, "--port", port, log="mlflow.log")
    try:
        address = f"http://127.0.0.1:{port}"
        until(lambda: prefect.api.get(f"/deployments/name/retrain/{NAME}").is_success, "the flow to be served", flow)
        until(lambda: answers(f"{address}/health"), "MLflow to answer", mlflow)
        yield address
    finally:
        end(flow)
        end(mlflow)


def answers(address: str) -> bool:
    return subprocess.run(["curl", "-sf", address], capture_output=True).returncode == 0


def bash(prefect: Prefect, mlflow: str, *blocks: str) -> list[str]:
    """What blocks print, with the addresses that the page sets before them."""
    program = "\n".join(["set -euo pipefail", f"MLFLOW={mlflow}", *blocks])
    # On a busy machine Prefect's SQLite is locked now and then, and it answers 503 and when to ask again.
    (prefect.folder / ".curlrc").write_text("retry = 10\n")
    environment = prefect.environment | {"CURL_HOME": str(prefect.folder)}
    done = subprocess.run(["bash", "-c", program], cwd=prefect.folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_training_is_started_watched_and_stopped_as_the_page_says(prefect: Prefect, serving: str) -> None:
    start, status, metrics, stop = BLOCKS
    deployment = prefect.api.get(f"/deployments/name/retrain/{NAME}").json()
    assert deployment["parameters"]["config"]["training"]["steps"] == 4000
    (flow_run,) = bash(prefect, serving, start, "echo $RUN")
    until(lambda: prefect.progress(flow_run) is not None, "the progress to be shown")
    state, *progress = bash(prefect, serving, f"RUN={flow_run}", status)
    assert state == "RUNNING"
    assert any(re.fullmatch(r"- step \d+ of 4000.*", line) for line in progress)
    run = Path(prefect.folder, "runs", NAME)
    until(lambda: (run / "tracking.json").exists(), "the run to be tracked")
    until(lambda: bash(prefect, serving, metrics) != ["null"], "metrics to arrive")
    assert float(*bash(prefect, serving, metrics)) > 0
    assert bash(prefect, serving, f"RUN={flow_run}", stop) == ["ACCEPT"]
    until(lambda: prefect.state(flow_run)["type"] == "CANCELLED", "the flow run to be cancelled")
    assert prefect.status(NAME)["state"] == "stopped"
