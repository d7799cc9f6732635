"""An owner's week on Prefect's and MLflow's pages, in Chromium: start, watch, cancel, go on, approve, look, compare.

`NESTUNE_SCREENSHOTS=docs/pages pytest -m services tests/services/test_pages.py` renews the pictures of docs/pages.md.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from playwright.sync_api import expect
from tests.pipeline.conftest import ROOT
from tests.services.conftest import Prefect, configuration, end, free_port, until
from tests.services.pages import Browser, chromium
from tests.services.test_operations_page import answers

from nestune.config import RegistryConfig, RunConfig
from nestune.files import read_json
from nestune.registry.connection import OF_TRAINING
from nestune.registry.promotion import history_of

pytestmark = pytest.mark.services

STEPS = 600


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    shots = os.environ.get("NESTUNE_SCREENSHOTS")
    with chromium(Path(shots).absolute() if shots else None) as opened:
        yield opened


@pytest.fixture(scope="module")
def form(prefect: Prefect) -> Iterator[str]:
    """The address of the form of a deployment that is served; its configuration is that of `weekly.yaml`."""
    content = configuration("weekly", training={"steps": STEPS, "eval_every": 100})
    content["registry"] |= {"registered_model": "facts", "promote": "approve"}
    (prefect.folder / "weekly.yaml").write_text(yaml.safe_dump(content))
    flow = prefect.start(ROOT / "flows" / "retrain.py", "--serve", "--config", "weekly.yaml", log="runner.log")
    try:
        path = "/deployments/name/retrain/weekly"
        until(lambda: prefect.api.get(path).is_success, "the flow to be served", flow)
        yield f"{pages_of(prefect)}/deployments/deployment/{prefect.api.get(path).json()['id']}/run"
    finally:
        end(flow)


@pytest.fixture(scope="module")
def mlflow(prefect: Prefect) -> Iterator[str]:
    port = free_port()
    (prefect.folder / "mlflow").mkdir(exist_ok=True)
    store = "sqlite:///mlflow/mlflow.db"
    server = prefect.start("-m", "mlflow", "ui", "--backend-store-uri", store, "--port", port, log="mlflow.log")
    try:
        until(lambda: answers(f"http://127.0.0.1:{port}/health"), "MLflow to answer", server)
        yield f"http://127.0.0.1:{port}"
    finally:
        end(server)


def pages_of(prefect: Prefect) -> str:
    return prefect.environment["PREFECT_API_URL"].removesuffix("/api")


def newest(prefect: Prefect) -> dict[str, Any]:
    found = prefect.api.post("/flow_runs/filter", json={"sort": "EXPECTED_START_TIME_DESC", "limit": 1})
    return dict(found.raise_for_status().json()[0])


def submitted(prefect: Prefect, browser: Browser) -> str:
    """Press the button of the form; the id of the flow run that is created."""
    while True:  # Prefect's server on SQLite says 503 while its database is busy; a person presses again
        with browser.page.expect_response(lambda answer: "create_flow_run" in answer.url) as created:
            browser.button("Submit").click()
        if created.value.status != 503:
            break
    assert created.value.ok, created.value.text()
    return str(created.value.json()["id"])


def values_of(browser: Browser, *keys: str) -> list[str]:
    """The three values of a list in the form."""
    values = browser.field(*keys).locator("input")
    expect(values).to_have_count(3)
    return [value.input_value() for value in values.all()]


def helps(schema: dict[str, Any]) -> Iterator[str]:
    """What the schema says of every option, as a page shows it."""
    for block in (schema, *schema["$defs"].values()):
        for field in block["properties"].values():
            yield from [field["description"]] if "description" in field else []


def test_the_form_shows_every_option_with_its_help_and_refuses_what_is_out_of_bounds(
    prefect: Prefect, form: str, browser: Browser
) -> None:
    browser.open(form)
    expect(browser.button("Submit")).to_be_visible()
    shown = browser.page.locator("form, main").first
    # Blocks that may be left out show their options once they are turned on.
    for keys in (
        ("retention", "kl"),
        ("retention", "strength"),
        ("training", "early_stopping"),
        ("evaluation", "lm_eval"),
    ):
        browser.field("config", *keys).get_by_role("button", name=keys[-1], exact=True).click()
    expect(browser.field("config", "evaluation", "lm_eval", "chat_template")).to_be_visible()
    schema, words = RunConfig.model_json_schema(), " ".join(shown.inner_text().split())
    missing = [text for text in helps(schema) if " ".join(text.split()) not in words]
    assert missing == []
    labels = browser.page.locator(".schema-form-property__label").all_inner_texts()
    options = {key for block in (schema, *schema["$defs"].values()) for key in block["properties"]}
    assert {name.removesuffix(" (Optional)").lower().replace(" ", "_") for name in labels} >= options | {"force"}

    assert browser.field("config", "name").locator("textarea").input_value() == "weekly"
    steps = browser.field("config", "training", "steps").locator("input")
    assert steps.input_value() == str(STEPS)
    assert values_of(browser, "config", "tiers", "update_every") == ["1", "2", "4"]
    strategy = browser.field("config", "tiers", "strategy")
    expect(strategy.locator(".p-select-button__value")).to_have_text("layer_depth_reversed")
    assert browser.choices(strategy) == schema["$defs"]["TierConfig"]["properties"]["strategy"]["enum"]

    browser.open(form)
    steps.fill("0")
    browser.button("Submit").click()
    browser.sees("Validation failed for field 'config.training.steps'")
    assert prefect.api.post("/flow_runs/filter", json={}).json() == []


def test_what_only_the_whole_shows_to_be_wrong_stands_in_the_log_of_the_run(
    prefect: Prefect, form: str, browser: Browser
) -> None:
    browser.open(form)
    browser.field("config", "tiers", "update_every").locator("input").first.fill("3")
    flow_run = submitted(prefect, browser)
    until(lambda: prefect.state(flow_run)["type"] == "FAILED", "the flow run to fail")
    browser.open(f"{pages_of(prefect)}/runs/flow-run/{flow_run}")
    browser.sees("tiers.update_every: periods must ascend, tier 0 being the fastest; write [2, 3, 4]")
    assert "Traceback" not in browser.page.locator("body").inner_text()
    assert not prefect.paths("weekly").root.exists()


def test_a_training_is_started_watched_cancelled_gone_on_with_and_approved_on_the_pages(
    prefect: Prefect, form: str, browser: Browser, mlflow: str
) -> None:
    started = start_with_other_periods(prefect, form, browser)
    cancel_while_it_trains(prefect, browser, started)
    going_on = run_again(prefect, browser, started)
    approve(prefect, browser, going_on)
    look_at_mlflow(prefect, browser, mlflow)
    assert prefect.status("weekly")["state"] == "finished"


def start_with_other_periods(prefect: Prefect, form: str, browser: Browser) -> str:
    browser.open(form)
    periods = browser.field("config", "tiers", "update_every").locator("input")
    periods.nth(1).fill("3")
    periods.nth(2).fill("6")
    browser.field("config", "tiers").evaluate("element => element.scrollIntoView()")
    browser.shot("form")
    flow_run = submitted(prefect, browser)
    browser.open(f"{pages_of(prefect)}/runs/flow-run/{flow_run}")
    return flow_run


def cancel_while_it_trains(prefect: Prefect, browser: Browser, flow_run: str) -> None:
    run = prefect.paths("weekly")
    until(lambda: prefect.progress(flow_run) is not None, "the progress to be shown")
    pid = prefect.noted("weekly")["owner"]["pid"]
    browser.open(f"{pages_of(prefect)}/artifacts/artifact/{(prefect.progress(flow_run) or {})['id']}")
    told = browser.page.get_by_text(re.compile(rf"^step \d+ of {STEPS}, .* left$"))
    expect(told).to_be_visible()
    before = step_of(told.inner_text())

    def moved() -> bool:
        browser.page.reload()
        expect(told).to_be_visible()
        return step_of(told.inner_text()) > before

    until(moved, "the progress to move on the page")
    browser.sees(re.compile(r"^updates of each tier: \d+ / \d+ / \d+$"))
    browser.shot("progress")

    browser.open(f"{pages_of(prefect)}/runs/flow-run/{flow_run}")
    browser.sees("tier 1: 28 matrices, every 3 steps")
    browser.button("Cancel").click()
    browser.button("Confirm").click()
    until(lambda: prefect.state(flow_run)["type"] == "CANCELLED", "the flow run to be cancelled")
    until(lambda: not Path(f"/proc/{pid}").exists(), "its process to end")
    browser.sees("Cancelled")
    assert (prefect.status("weekly")["state"], prefect.status("weekly")["stage"]) == ("stopped", "train")
    assert [*run.checkpoints.glob("checkpoint_*")]


def step_of(text: str) -> int:
    return int(text.split()[1])


def run_again(prefect: Prefect, browser: Browser, cancelled: str) -> str:
    """The values of the cancelled run, by its menu."""
    stopped_at = prefect.status("weekly")["step"]
    browser.page.locator(".p-icon-button-menu button").first.click()
    browser.page.get_by_text("Copy to new run", exact=True).filter(visible=True).click()
    assert values_of(browser, "config", "tiers", "update_every") == ["1", "3", "6"]
    flow_run = submitted(prefect, browser)
    assert flow_run != cancelled
    until(lambda: prefect.state(flow_run)["type"] in ("PAUSED", "FAILED", "CRASHED"), "the flow run to pause")
    assert prefect.state(flow_run)["type"] == "PAUSED", (prefect.folder / "runner.log").read_text()
    browser.open(f"{pages_of(prefect)}/runs/flow-run/{flow_run}")
    browser.sees(f"went on after step {stopped_at}")
    browser.sees(f"steps: {STEPS}, updates of each tier: {STEPS} / {STEPS // 3} / {STEPS // 6}")
    return flow_run


def approve(prefect: Prefect, browser: Browser, flow_run: str) -> None:
    registry = RegistryConfig(tracking_uri=f"sqlite:///{prefect.folder}/mlflow/mlflow.db", registered_model="facts")
    assert history_of(registry).champion is None
    browser.button("Resume").click()
    browser.sees("facts version 1: waits for approval")
    # Its address is that of `make ui`, port 5000.
    expect(browser.page.get_by_role("link", name="Report")).to_have_attribute(
        "href", re.compile(r"^http.*/artifacts/evaluation/report.html\?workflowType=machine_learning$")
    )
    browser.field("approve").get_by_role("switch").click()
    browser.field("reason").locator("textarea").fill("read the report")
    browser.shot("approval")
    browser.button("Submit").click()
    until(lambda: prefect.state(flow_run)["type"] in ("COMPLETED", "FAILED", "CRASHED"), "the flow run to end")
    assert prefect.state(flow_run)["type"] == "COMPLETED", (prefect.folder / "runner.log").read_text()
    browser.open(f"{pages_of(prefect)}/runs/flow-run/{flow_run}")
    browser.sees("Completed")
    browser.sees(re.compile("facts version 1, gate passed"))
    browser.shot("completed")
    (entry,) = history_of(registry).entries
    assert (entry.version, entry.reason) == ("1", "approved: read the report")


def look_at_mlflow(prefect: Prefect, browser: Browser, mlflow: str) -> None:
    run_id = read_json(prefect.paths("weekly").tracking, "")["run_id"]
    other = second_run(prefect)
    browser.open(f"{mlflow}/#/experiments/1/runs/{run_id}{OF_TRAINING}")
    browser.sees("Registered models")
    browser.sees(re.compile("^facts$"))
    close_assistant(browser)
    browser.shot("mlflow_run")
    browser.open(f"{mlflow}/#/experiments/1/runs/{run_id}/model-metrics{OF_TRAINING}")
    browser.page.get_by_placeholder("Search metric charts").fill("train/")
    expect(browser.page.locator(".js-plotly-plot").first).to_be_visible()
    browser.sees("learning_rate")
    browser.shot("mlflow_charts")
    browser.open(f"{mlflow}/#/experiments/1/runs/{run_id}/artifacts/evaluation/report.html{OF_TRAINING}")
    report = browser.page.frame_locator("iframe").first
    expect(report.get_by_text("Passed the gate")).to_be_visible()
    browser.open(f'{mlflow}/#/compare-runs?runs=["{run_id}","{other}"]&experiments=["1"]&{OF_TRAINING[1:]}')
    browser.sees("Comparing 2 Runs from 1 Experiment")
    browser.sees("weekly_2")
    browser.sees("train/loss")
    browser.shot("mlflow_compare")
    browser.open(f"{mlflow}/#/models/facts/versions/1{OF_TRAINING}")
    browser.sees("champion")
    browser.sees("adapter_sha256")
    browser.shot("mlflow_version")


def close_assistant(browser: Browser) -> None:
    """The panel beside MLflow's pages is closed once; MLflow remembers."""
    browser.button("Close").click()


def second_run(prefect: Prefect) -> str:
    """The MLflow run of a short training with other periods, started by command."""
    content = configuration("weekly_2", training={"steps": 8, "eval_every": 4}, tiers={"update_every": [1, 1, 1]})
    (prefect.folder / "second.yaml").write_text(yaml.safe_dump(content))
    for command in ("validate", "tiers", "train"):
        done = prefect.run("-m", "nestune.cli", command, "--config", "second.yaml")
        assert done.returncode == 0, done.stderr
    return str(read_json(prefect.paths("weekly_2").tracking, "")["run_id"])
