"""Tracking while the server is down, hangs, refuses or loses answers: every number once, one run, its right end."""

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from broken_server import CREATE_RUN, LOG_BATCH, MlflowServer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nestune.backends.base import Loss, StepResult
from nestune.config import RegistryConfig, RunConfig, load_config
from nestune.files import read_json
from nestune.registry import tracking
from nestune.registry.catching_up import mark_killed, resume_tracking, send_what_is_missing
from nestune.registry.connection import connect
from nestune.registry.mirror import metrics_of_step, metrics_of_validation
from nestune.registry.mlflow_run import flatten
from nestune.registry.tracking import TrackedRun, tracked_run
from nestune.runs import RunPaths
from nestune.training.recorder import Recorder
from nestune.training.replacement import in_place_of_earlier

History = dict[str, list[tuple[int, float]]]
VALIDATED_EVERY = 3
OVER_AT_ONCE = {"SEND_EVERY_S": 0.0, "RETRY_EVERY_S": 0.0, "TIME_SHARE": 0}


@pytest.fixture(scope="module")
def one_server(empty_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    import mlflow

    home = tmp_path_factory.mktemp("server")
    shutil.copyfile(empty_store, home / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("_MLFLOW_SERVER_FILE_STORE", f"sqlite:///{home}/mlflow.db")
        patch.setenv("_MLFLOW_SERVER_ARTIFACT_ROOT", "mlflow-artifacts:/")
        patch.setenv("_MLFLOW_SERVER_ARTIFACT_DESTINATION", str(home / "artifacts"))
        patch.setenv("_MLFLOW_SERVER_SERVE_ARTIFACTS", "true")
        server = MlflowServer()
        yield server
        server.stop()
        # Its application has named its own in the environment.
        mlflow.set_tracking_uri(None)


@pytest.fixture
def server(one_server: MlflowServer) -> Iterator[MlflowServer]:
    one_server.cure()
    one_server.start()
    one_server.stored.clear()
    yield one_server
    one_server.stop()


@pytest.fixture
def tracked_config(config: RunConfig, server: MlflowServer, tmp_path: Path) -> RunConfig:
    """Tracked at the server, in an experiment of its own."""
    for name in ("train", "old"):
        (tmp_path / f"{name}.jsonl").touch()
    registry = RegistryConfig(tracking_uri=server.uri, experiment=tmp_path.name)
    return config.model_copy(update={"registry": registry})


@pytest.fixture
def run(tmp_path: Path) -> RunPaths:
    return RunPaths(tmp_path / "runs" / "week.1")


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step is sent, and every failure tried again, at once."""
    for name, value in OVER_AT_ONCE.items():
        monkeypatch.setattr(tracking, name, value)


class Mirrored:
    """Passes what a training records on to its MLflow run, as the stage does."""

    def __init__(self, tracked: TrackedRun) -> None:
        self._tracked = tracked

    def on_step(self, line: dict[str, Any]) -> None:
        self._tracked.log_metrics(line["step"], metrics_of_step(line))

    def on_validation(self, line: dict[str, Any]) -> None:
        self._tracked.log_metrics(line["step"], metrics_of_validation(line))


def train(tracked: TrackedRun, run: RunPaths, steps: range, before: Callable[[int], None] = lambda step: None) -> None:
    """Record steps, each with another loss; `before` is called with each step first."""
    run.metrics.mkdir(parents=True, exist_ok=True)
    with Recorder(run.metrics, [0, 0], [Mirrored(tracked)], steps.start - 1, steps.start - 1) as recorder:
        for step in steps:
            before(step)
            recorder.step(step, StepResult(1 / step, 3, 4, 0.5), frozenset({0}), 1e-3)
            if step % VALIDATED_EVERY == 0:
                recorder.validation(step, Loss(2 / step, 1), best=True)


def lines_of(run: RunPaths, name: str) -> list[str]:
    path = run.metrics / name
    return path.read_text().splitlines() if path.exists() else []


def recorded(run: RunPaths) -> History:
    """What the metrics files say that MLflow should have, read by other code than MLflow's mirror uses."""
    history: History = {}
    for text in lines_of(run, "train_metrics.jsonl"):
        line = json.loads(text)
        for key in ("loss", "learning_rate", "grad_norm", "tokens_per_s"):
            history.setdefault(f"train/{key}", []).append((line["step"], line[key]))
        for tier, count in enumerate(line["update_counts"]):
            history.setdefault(f"tiers/updates_{tier}", []).append((line["step"], count))
    for text in lines_of(run, "eval_metrics.jsonl"):
        line = json.loads(text)
        history.setdefault("train/valid_loss", []).append((line["step"], line["valid_loss"]))
    return history


def in_mlflow(config: RunConfig, run: RunPaths) -> History:
    client, run_id = connect(config.registry), read_json(run.tracking, "")["run_id"]
    names = client.get_run(run_id).data.metrics
    histories = {name: client.get_metric_history(run_id, name) for name in names}
    return {name: sorted((m.step, m.value) for m in history) for name, history in histories.items()}


def only_run(config: RunConfig, run: RunPaths) -> Any:
    """The one run of the experiment, which is the one that the run's folder names."""
    client = connect(config.registry)
    experiment = client.get_experiment_by_name(config.registry.experiment)
    [found] = client.search_runs([experiment.experiment_id])
    assert found.info.run_id == read_json(run.tracking, "")["run_id"]
    return found


def check_mirrored(config: RunConfig, run: RunPaths, server: MlflowServer, status: str = "FINISHED") -> None:
    """MLflow has one run, with all that the files have, and no request stored a number a second time."""
    assert in_mlflow(config, run) == recorded(run)
    assert only_run(config, run).info.status == status
    assert set(server.stored.values()) == {1}


@pytest.mark.parametrize("ails", ["loses", "refuses", "stopped"])
@pytest.mark.usefixtures("at_once")
def test_an_outage_in_the_middle_costs_no_metric_and_doubles_none(
    tracked_config: RunConfig, run: RunPaths, server: MlflowServer, ails: str, caplog: pytest.LogCaptureFixture
) -> None:
    def outage(step: int) -> None:
        if step in (4, 9):
            server.stop() if ails == "stopped" else server.fall_ill(ails, LOG_BATCH)
        if step in (7, 12):
            server.cure()
            server.start()

    with tracked_run(tracked_config, run, {}) as tracked:
        train(tracked, run, range(1, 16), outage)
    check_mirrored(tracked_config, run, server)
    told = [record.message for record in caplog.records]
    assert sum("Training goes on" in text for text in told) == 2  # once an outage
    assert sum("answers again" in text for text in told) == 2


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    outages=st.lists(st.sampled_from(["", "", "stopped", "loses", "refuses"]), min_size=12, max_size=12),
    end=st.sampled_from(["", "stopped", "loses"]),
    interrupted_at=st.integers(2, 12),
)
@pytest.mark.usefixtures("at_once")
def test_whenever_the_server_fails_and_the_training_is_interrupted_each_number_arrives_once(
    tracked_config: RunConfig,
    run: RunPaths,
    server: MlflowServer,
    outages: list[str],
    end: str,
    interrupted_at: int,
) -> None:
    def set_state(state: str) -> None:
        server.cure()
        server.stop() if state == "stopped" else server.start()
        if state in ("loses", "refuses"):
            server.fall_ill(state)

    shutil.rmtree(run.root, ignore_errors=True)
    server.stored.clear()
    experiment = f"{time.monotonic_ns()}"
    registry = tracked_config.registry.model_copy(update={"experiment": experiment})
    config = tracked_config.model_copy(update={"registry": registry})
    set_state(outages[0])
    killed = TrackedRun(config, run, {})
    train(killed, run, range(1, interrupted_at), lambda step: set_state(outages[step - 1]))
    with tracked_run(config, run, {}, goes_on=True) as tracked:  # what was killed could say nothing at its end
        train(tracked, run, range(interrupted_at, 13), lambda step: set_state(outages[step - 1]))
        set_state(end)
    set_state("")
    send_what_is_missing(config, run)
    check_mirrored(config, run, server)


@pytest.mark.usefixtures("at_once")
def test_a_server_that_is_down_at_the_start_has_the_run_with_all_that_belongs_to_it_once_it_is_back(
    tracked_config: RunConfig, run: RunPaths, server: MlflowServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.stop()
    with tracked_run(tracked_config, run, {"base_sha256": "abc"}) as tracked:
        assert read_json(run.tracking, "")["run_id"] is None
        train(tracked, run, range(1, 11), lambda step: server.start() if step == 6 else None)
        assert only_run(tracked_config, run).info.status == "RUNNING"
    check_mirrored(tracked_config, run, server)
    logged = only_run(tracked_config, run)
    assert logged.data.params == flatten(tracked_config)
    assert (logged.data.tags["base_sha256"], logged.data.tags["run"]) == ("abc", "week.1")
    file = connect(tracked_config.registry).download_artifacts(logged.info.run_id, "config.yaml", str(tmp_path))
    assert load_config(Path(file)) == tracked_config
    assert caplog.text.count("Training goes on") == 1


def test_a_server_that_is_down_from_start_to_end_is_told_all_by_the_next_stage(
    tracked_config: RunConfig, run: RunPaths, server: MlflowServer, caplog: pytest.LogCaptureFixture
) -> None:
    server.stop()
    with tracked_run(tracked_config, run, {"base_sha256": "abc"}) as tracked:
        train(tracked, run, range(1, 8))
    noted = read_json(run.tracking, "")
    assert (noted["run_id"], noted["ended"], noted["complete"]) == (None, "FINISHED", False)
    assert "will be sent by register or train" in caplog.text
    send_what_is_missing(tracked_config, run)  # still down: a warning, no error
    assert "sent with the next contact" in caplog.text
    server.start()
    assert resume_tracking(tracked_config, run, {}).tags()["base_sha256"] == "abc"
    check_mirrored(tracked_config, run, server)
    asked = server.requests
    send_what_is_missing(tracked_config, run)  # nothing is missing, so nobody is asked
    assert server.requests == asked


@pytest.mark.parametrize("ended_by", [ValueError, KeyboardInterrupt])
def test_how_a_training_ended_while_the_server_was_down_is_told_later(
    tracked_config: RunConfig, run: RunPaths, server: MlflowServer, ended_by: type[BaseException]
) -> None:
    with pytest.raises(ended_by), tracked_run(tracked_config, run, {}) as tracked:  # noqa: PT012
        train(tracked, run, range(1, 8))
        server.stop()
        raise ended_by
    server.start()
    assert only_run(tracked_config, run).info.status == "RUNNING"
    send_what_is_missing(tracked_config, run)
    check_mirrored(tracked_config, run, server, "FAILED" if ended_by is ValueError else "KILLED")


def test_a_run_whose_making_was_not_answered_is_found_and_not_made_again(
    tracked_config: RunConfig, run: RunPaths, server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")  # the user's patience must not repeat it either
    server.fall_ill("loses", CREATE_RUN)
    with tracked_run(tracked_config, run, {}) as tracked:
        assert tracked.mlflow_run is None
        server.cure()
        train(tracked, run, range(1, 4))
    check_mirrored(tracked_config, run, server)


@pytest.mark.usefixtures("at_once")
def test_what_a_killed_process_could_not_send_is_sent_by_the_one_that_goes_on(
    tracked_config: RunConfig, run: RunPaths, server: MlflowServer
) -> None:
    killed = TrackedRun(tracked_config, run, {})
    train(killed, run, range(1, 10), lambda step: server.stop() if step == 5 else None)
    server.start()
    with tracked_run(tracked_config, run, {}, goes_on=True) as tracked:
        train(tracked, run, range(7, 12))  # its checkpoint was that of step 6
    check_mirrored(tracked_config, run, server)


def test_a_line_that_was_written_but_not_yet_passed_on_when_the_end_came_arrives_too(
    tracked_config: RunConfig, run: RunPaths, server: MlflowServer
) -> None:
    class Ended:
        def on_step(self, line: dict[str, Any]) -> None:
            if line["step"] == 5:
                raise SystemExit

        def on_validation(self, line: dict[str, Any]) -> None: ...

    run.metrics.mkdir(parents=True)
    with (  # noqa: PT012
        pytest.raises(SystemExit),
        tracked_run(tracked_config, run, {}) as tracked,
        Recorder(run.metrics, [0, 0], [Ended(), Mirrored(tracked)]) as recorder,
    ):
        for step in range(1, 6):
            recorder.step(step, StepResult(1 / step, 3, 4, 0.5), frozenset({0}), 1e-3)
    assert len(lines_of(run, "train_metrics.jsonl")) == 5
    check_mirrored(tracked_config, run, server, "KILLED")


def test_a_server_that_hangs_gets_no_more_than_its_share_of_the_time(
    tracked_config: RunConfig, run: RunPaths, server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    for name, value in OVER_AT_ONCE.items():
        monkeypatch.setattr(tracking, name, value)
    with tracked_run(tracked_config, run, {}) as tracked:
        train(tracked, run, range(1, 3))
        monkeypatch.setattr(tracking, "TIME_SHARE", 4)
        server.fall_ill("hangs", LOG_BATCH)
        asked = server.requests
        train(tracked, run, range(3, 4))
        for step in range(4, 14):
            train(tracked, run, range(step, step + 1))
        # Ten steps went by without another attempt: the pause is four times as long as the first one took, a second.
        assert server.requests == asked + 1
        server.cure()
    assert in_mlflow(tracked_config, run) == recorded(run)


def test_a_run_of_a_dead_process_is_marked_killed_and_mlflow_asked_only_once(
    tracked_config: RunConfig, run: RunPaths, server: MlflowServer
) -> None:
    assert mark_killed(run) is False  # nothing is noted
    TrackedRun(tracked_config, run, {})
    assert only_run(tracked_config, run).info.status == "RUNNING"
    assert mark_killed(run) is True
    assert only_run(tracked_config, run).info.status == "KILLED"
    server.stop()
    assert mark_killed(run) is False  # it would not answer
    server.start()
    with tracked_run(tracked_config, run, {}, goes_on=True) as tracked:
        assert only_run(tracked_config, run).info.status == "RUNNING"
        train(tracked, run, range(1, 4))
    assert mark_killed(run) is False
    check_mirrored(tracked_config, run, server)


def test_an_end_that_was_told_and_not_noted_stays_as_it_was_told(
    tracked_config: RunConfig, run: RunPaths, server: MlflowServer
) -> None:
    tracked = TrackedRun(tracked_config, run, {})
    assert tracked.mlflow_run is not None
    tracked.mlflow_run.end("FINISHED")  # and here the process was killed
    assert mark_killed(run) is False
    assert only_run(tracked_config, run).info.status == "FINISHED"


def test_a_dead_process_that_never_learned_its_runs_id_is_marked_killed_too(
    tracked_config: RunConfig, run: RunPaths, server: MlflowServer
) -> None:
    server.fall_ill("loses", CREATE_RUN)
    TrackedRun(tracked_config, run, {})
    server.cure()
    assert read_json(run.tracking, "")["run_id"] is None
    assert mark_killed(run) is True
    [found] = connect(tracked_config.registry).search_runs(
        [connect(tracked_config.registry).get_experiment_by_name(tracked_config.registry.experiment).experiment_id]
    )
    assert found.info.status == "KILLED"


def test_a_failed_training_whose_note_gave_way_to_an_older_one_is_not_shown_as_running(
    tracked_config: RunConfig, run: RunPaths, server: MlflowServer
) -> None:
    with tracked_run(tracked_config, run, {}):
        pass
    noted = run.tracking.read_bytes()
    with pytest.raises(ValueError), in_place_of_earlier(run), tracked_run(tracked_config, run, {}) as tracked:  # noqa: PT011, PT012
        server.stop()
        raise ValueError
    assert run.tracking.read_bytes() == noted
    server.start()
    assert tracked.mlflow_run is not None
    assert tracked.mlflow_run.is_running()
    assert mark_killed(run) is True
    status = connect(tracked_config.registry).get_run(tracked.mlflow_run.run_id).info.status
    assert status == "FAILED"
    asked = server.requests
    assert mark_killed(run) is False
    assert server.requests == asked


def test_a_database_that_is_not_there_at_the_start_has_all_when_it_is_back(
    config: RunConfig, run: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in OVER_AT_ONCE.items():
        monkeypatch.setattr(tracking, name, value)
    database = Path(str(config.registry.tracking_uri).removeprefix("sqlite:///"))
    kept = database.rename(database.with_name("kept.db"))
    database.mkdir()
    with tracked_run(config, run, {}) as tracked:
        train(tracked, run, range(1, 5))
        assert tracked.mlflow_run is None
        database.rmdir()
        kept.rename(database)
        train(tracked, run, range(5, 8))
        assert tracked.mlflow_run is not None
    assert in_mlflow(config, run) == recorded(run)


@pytest.mark.usefixtures("at_once")
def test_a_store_that_takes_nothing_for_a_while_has_all_later(
    config: RunConfig, run: RunPaths, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    with tracked_run(config, run, {}) as tracked:
        assert tracked.mlflow_run is not None
        tracked.mlflow_run.client.delete_run(tracked.mlflow_run.run_id)  # MLflow takes no metrics for a deleted run
        train(tracked, run, range(1, 4))
        assert "must be in the 'active' state" in caplog.text
        tracked.mlflow_run.client.restore_run(tracked.mlflow_run.run_id)
        train(tracked, run, range(4, 6))
    assert in_mlflow(config, run) == recorded(run)
