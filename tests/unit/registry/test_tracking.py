"""MLflow runs: configuration, live metrics, lineage, and a server that is down."""

import logging
import subprocess
from pathlib import Path

import pytest
from run_folders import start_tracking

from nestune.config import RegistryConfig, RunConfig, load_config
from nestune.errors import ConfigError, RunError, ServiceError
from nestune.files import read_json, write_json
from nestune.registry import connection, tracking
from nestune.registry.catching_up import resume_tracking
from nestune.registry.connection import connect
from nestune.registry.mlflow_run import KEY_TAG, MlflowRun, flatten
from nestune.registry.tracking import TrackedRun, tracked_run
from nestune.registry.tracking_note import git_commit
from nestune.runs import RunPaths


@pytest.fixture
def run(tmp_path: Path) -> RunPaths:
    return RunPaths(tmp_path / "runs" / "week.1")


def opened(tracked: TrackedRun) -> MlflowRun:
    assert tracked.mlflow_run is not None
    return tracked.mlflow_run


def test_a_run_holds_the_resolved_configuration_as_parameters_and_as_a_file_that_loads_again(
    config: RunConfig, run: RunPaths, tmp_path: Path
) -> None:
    (tmp_path / "train.jsonl").touch()
    (tmp_path / "old.jsonl").touch()
    tracked = start_tracking(config, run, {"dataset_sha256": "abc"})
    logged = tracked.client.get_run(tracked.run_id)
    assert logged.data.params == flatten(config)
    assert logged.data.params["training.learning_rate"] == "0.0002"
    assert logged.data.params["tiers.update_every"] == "[1, 1, 1]"
    assert logged.data.tags["dataset_sha256"] == "abc"
    assert logged.data.tags["parent"] == "none"
    assert logged.info.run_name == "week.1"
    file = tracked.client.download_artifacts(tracked.run_id, "config.yaml", str(tmp_path))
    assert load_config(Path(file)) == config


def test_parameters_have_names_that_mlflow_takes_whatever_patterns_the_configuration_holds(
    config: RunConfig, run: RunPaths
) -> None:
    tiers = {"strategy": "manual", "assignments": {"layers.[0-3].*": 2, "*": 0}}
    config = RunConfig.model_validate(config.model_dump() | {"tiers": tiers})
    tracked = start_tracking(config, run, {})
    params = tracked.client.get_run(tracked.run_id).data.params
    assert params["tiers.assignments"] == '{"layers.[0-3].*": 2, "*": 0}'


def test_every_metric_arrives_in_order_when_the_block_ends(config: RunConfig, run: RunPaths) -> None:
    steps = range(1, 1501)  # more than MLflow takes in one call
    with tracked_run(config, run, {}) as tracked:
        for step in steps:
            tracked.log_metrics(step, {"train/loss": 1 / step, "tiers/updates_1": step // 2})
    client, run_id = opened(tracked).client, opened(tracked).run_id
    losses = client.get_metric_history(run_id, "train/loss")
    counts = client.get_metric_history(run_id, "tiers/updates_1")
    assert [(m.step, m.value) for m in losses] == [(step, 1 / step) for step in steps]
    assert [(m.step, m.value) for m in counts] == [(step, step // 2) for step in steps]


def test_metrics_are_seen_while_training_goes_on_once_the_interval_is_over(
    config: RunConfig, run: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "SEND_EVERY_S", 0.2)
    tracked = TrackedRun(config, run, {})
    client, run_id = opened(tracked).client, opened(tracked).run_id

    def seen() -> list[int]:
        return [m.step for m in client.get_metric_history(run_id, "loss")]

    tracked.log_metrics(1, {"loss": 1.0})
    assert seen() == []
    tracking.time.sleep(0.25)
    tracked.log_metrics(2, {"loss": 1.0})
    assert seen() == [1, 2]
    assert client.get_run(run_id).info.status == "RUNNING"


@pytest.mark.parametrize(
    ("error", "status"), [(None, "FINISHED"), (ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")]
)
def test_the_run_says_how_training_ended_and_has_its_last_metrics(
    config: RunConfig, run: RunPaths, error: type[BaseException] | None, status: str
) -> None:
    try:
        with tracked_run(config, run, {}) as tracked:
            tracked.log_metrics(1, {"loss": 2.0})
            if error is not None:
                raise error
    except (ValueError, KeyboardInterrupt):
        pass
    logged = connect(config.registry).get_run(opened(tracked).run_id)
    assert (logged.info.status, logged.data.metrics) == (status, {"loss": 2.0})
    noted = read_json(run.tracking, "")
    assert (noted["ended"], noted["told"], noted["complete"]) == (status, status, True)


def test_a_later_stage_goes_on_with_the_run_of_the_earlier_one(config: RunConfig, run: RunPaths) -> None:
    started = start_tracking(config, run, {})
    noted = read_json(run.tracking, "")
    resumed = resume_tracking(config, run, {})
    assert resumed.run_id == noted["run_id"] == started.run_id
    assert (noted["tracking_uri"], noted["experiment"]) == (config.registry.tracking_uri, "nestune")
    assert resumed.tags()[KEY_TAG] == noted["key"]


def test_a_note_of_an_earlier_version_names_its_run(config: RunConfig, run: RunPaths) -> None:
    started = start_tracking(config, run, {})
    noted = {key: read_json(run.tracking, "")[key] for key in ("tracking_uri", "experiment", "run_id")}
    write_json(run.tracking, noted)
    with tracked_run(config, run, {}, goes_on=True) as tracked:
        assert opened(tracked).run_id == started.run_id


def test_a_note_that_is_none_is_an_error_that_names_every_fault(config: RunConfig, run: RunPaths) -> None:
    write_json(run.tracking, {"tracking_uri": 7, "run_id": [], "tags": {}})
    with pytest.raises(RunError, match=r"tracking.json is no note .*tracking_uri: .*run_id: .*Delete it"):
        resume_tracking(config, run, {})


def test_training_again_starts_another_run(config: RunConfig, run: RunPaths) -> None:
    first = start_tracking(config, run, {}).run_id
    second = start_tracking(config, run, {}).run_id
    assert first != second
    assert resume_tracking(config, run, {}).run_id == second


def test_a_run_that_mlflow_does_not_have_is_an_error_that_says_what_to_do(config: RunConfig, run: RunPaths) -> None:
    start_tracking(config, run, {})
    text = run.tracking.read_text().replace(read_json(run.tracking, "")["run_id"], "0" * 32)
    run.tracking.write_text(text)
    with pytest.raises(RunError, match=r"0{32} at sqlite.*or delete .*tracking.json"):
        resume_tracking(config, run, {})


def test_a_training_that_goes_on_is_the_same_run_with_each_metric_once(config: RunConfig, run: RunPaths) -> None:
    with tracked_run(config, run, {"base_sha256": "abc"}) as tracked:
        for step in range(1, 7):
            tracked.log_metrics(step, {"train/loss": 1 / step} | ({"train/valid_loss": 2 / step} if step == 4 else {}))
    with tracked_run(config, run, {"base_sha256": "abc"}, goes_on=True) as resumed:
        client, run_id = opened(resumed).client, opened(resumed).run_id
        assert run_id == opened(tracked).run_id
        assert client.get_run(run_id).info.status == "RUNNING"
        for step in range(1, 9):
            resumed.log_metrics(step, {"train/loss": 1 / step} | ({"train/valid_loss": 2 / step} if step >= 4 else {}))
    logged = client.get_run(run_id)
    assert logged.info.status == "FINISHED"
    history = {name: client.get_metric_history(run_id, name) for name in logged.data.metrics}
    assert {name: [(m.step, m.value) for m in metrics] for name, metrics in history.items()} == {
        "train/loss": [(step, 1 / step) for step in range(1, 9)],
        "train/valid_loss": [(step, 2 / step) for step in range(4, 9)],
    }


def test_what_is_configured_otherwise_when_training_goes_on_is_a_tag_beside_the_parameter(
    config: RunConfig, run: RunPaths, tmp_path: Path
) -> None:
    for name in ("train", "old"):
        (tmp_path / f"{name}.jsonl").touch()
    start_tracking(config, run, {})
    longer = config.model_copy(update={"training": config.training.model_copy(update={"steps": 2000})})
    tracked = opened(TrackedRun(longer, run, {"tier_map_sha256": "def"}, goes_on=True))
    logged = tracked.client.get_run(tracked.run_id)
    assert logged.data.params == flatten(config)
    ours = {key: value for key, value in logged.data.tags.items() if not key.startswith("mlflow.")}
    assert ours == {
        "run": "week.1",
        "parent": "none",
        "git_commit": git_commit(),
        KEY_TAG: read_json(run.tracking, "")["key"],
        "tier_map_sha256": "def",
        "training.steps": "2000",
    }
    file = tracked.client.download_artifacts(tracked.run_id, "config.yaml", str(tmp_path))
    assert load_config(Path(file)) == longer


@pytest.mark.parametrize("lost", ["tracking.json", "the run"])
def test_a_training_that_goes_on_is_tracked_anew_where_its_run_is_gone(
    config: RunConfig, run: RunPaths, caplog: pytest.LogCaptureFixture, lost: str
) -> None:
    before = start_tracking(config, run, {})
    if lost == "the run":
        run.tracking.write_text(run.tracking.read_text().replace(before.run_id, "0" * 32))
    else:
        run.tracking.unlink()
    with caplog.at_level(logging.WARNING):
        tracked = opened(TrackedRun(config, run, {}, goes_on=True))
    assert "tracked anew" in caplog.text
    assert tracked.run_id != before.run_id
    assert resume_tracking(config, run, {}).run_id == tracked.run_id


def test_artifacts_lie_beside_the_sqlite_database_and_nothing_in_the_current_folder(
    config: RunConfig, run: RunPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    start_tracking(config, run, {})
    assert list((tmp_path / "mlflow" / "artifacts").rglob("config.yaml"))
    assert list(elsewhere.iterdir()) == []


def test_without_a_tracking_uri_the_store_is_in_the_folder_mlflow_of_the_current_one(
    config: RunConfig, run: RunPaths, tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "project" / "mlflow"
    home.mkdir(parents=True)
    (home / "mlflow.db").write_bytes(empty_store.read_bytes())
    monkeypatch.chdir(home.parent)
    tracked = start_tracking(config.model_copy(update={"registry": RegistryConfig()}), run, {})
    assert read_json(run.tracking, "")["tracking_uri"] == "sqlite:///mlflow/mlflow.db"
    assert list((home / "artifacts").rglob("config.yaml"))
    assert tracked.open_with() == "mlflow ui --backend-store-uri sqlite:///mlflow/mlflow.db"
    assert tracked.page().startswith("http://127.0.0.1:5000/#/experiments/")


def test_a_file_that_is_no_database_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "broken.db").write_bytes(b"not a database" * 100)
    uri = f"sqlite:///{tmp_path}/broken.db"
    with pytest.raises(ServiceError, match=r"broken\.db fails"):
        connect(RegistryConfig(tracking_uri=uri))


def test_a_deleted_experiment_is_an_error_that_tells_how_to_restore_it(config: RunConfig, run: RunPaths) -> None:
    client = connect(config.registry)
    client.delete_experiment(client.create_experiment("nestune"))
    with pytest.raises(RunError, match="mlflow experiments restore --experiment-id"):
        start_tracking(config, run, {})


def test_an_address_with_a_password_is_refused(config: RunConfig) -> None:
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_PASSWORD"):
        RegistryConfig(tracking_uri="https://me:secret@mlflow.example.com")


def test_the_git_commit_says_whether_tracked_files_differ_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_commit() == "none"
    file = tmp_path / "a.txt"
    file.write_text("1")
    who = ["-c", "user.name=n", "-c", "user.email=e@example.com"]
    for command in (["init", "-q"], ["add", "a.txt"], [*who, "commit", "-qm", "one"], ["tag", "v1"]):
        subprocess.run(["git", *command], check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert git_commit() == head
    file.write_text("2")
    assert git_commit() == f"{head}-dirty"


def test_settings_for_mlflow_leave_the_environment_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    with connection.impatience():
        assert connection.os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "0"
        assert connection.os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77"
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in connection.os.environ


def test_a_parent_that_does_not_exist_is_an_error_before_anything_is_tracked(config: RunConfig, run: RunPaths) -> None:
    model = config.model.model_copy(update={"adapter": "models:/nestune@champion"})
    with pytest.raises(ConfigError, match="has no model nestune"):
        start_tracking(config.model_copy(update={"model": model}), run, {})
    assert not run.tracking.exists()
