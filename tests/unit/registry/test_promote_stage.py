"""What a person does with versions: promoting, rolling back, listing, comparing; and what is not let pass."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from run_folders import EvaluatedRun, scale_adapter

from nestune.backends.adapters import WEIGHTS
from nestune.cli import main
from nestune.config import RunConfig
from nestune.errors import ConfigError, RunError
from nestune.files import read_json, sha256_file, write_json
from nestune.registry.connection import connect
from nestune.registry.promotion import history_of
from nestune.stages.evaluate import seal
from nestune.stages.promote import promote, rollback
from nestune.stages.register import RegisterResult, register
from nestune.stages.versions import compare, versions


@pytest.fixture
def refused(config: RunConfig, evaluated_run: EvaluatedRun) -> RegisterResult:
    """A version beside a champion, that the gate refused."""
    first = register(config, evaluated_run(passed=True))
    return register(config, evaluated_run(passed=False, champion_version=first.version))


@pytest.fixture
def overtaken(config: RunConfig, evaluated_run: EvaluatedRun) -> RegisterResult:
    """A version that passed, compared with no champion, when another one became champion first."""
    slow = evaluated_run(passed=True)
    register(config, evaluated_run(passed=True))
    return register(config, slow)


def test_what_the_gate_refused_is_promoted_only_by_force_and_with_a_reason(
    config: RunConfig, refused: RegisterResult
) -> None:
    with pytest.raises(RunError, match=r"the gate refused version 2 of nestune: forgot: old -0\.50"):
        promote(config.registry, refused.version)
    with pytest.raises(ConfigError, match="say why with --reason"):
        promote(config.registry, refused.version, force=True, reason=" ")
    result = promote(config.registry, refused.version, force=True, reason="the set was wrong")
    assert (result.champion, result.previous) == ("2", "1")
    assert (result.entry.action, result.entry.reason) == ("forced", "the set was wrong")
    tags = connect(config.registry).get_model_version("nestune", "2").tags
    assert tags["promotion"].startswith("forced by ")
    assert tags["promotion"].endswith(": the set was wrong")
    assert result.entry.report_sha256 == tags["report_sha256"]


def test_what_was_compared_with_another_champion_is_not_promoted(config: RunConfig, overtaken: RegisterResult) -> None:
    assert overtaken.gate == "outdated"
    with pytest.raises(RunError, match=r"passed the gate against another champion \(none\); now it is version 1"):
        promote(config.registry, overtaken.version)
    assert history_of(config.registry).champion == "1"


def test_what_passed_can_be_promoted_again_after_a_rollback(config: RunConfig, evaluated_run: EvaluatedRun) -> None:
    first = register(config, evaluated_run(passed=True))
    second = register(config, evaluated_run(passed=True, champion_version=first.version))
    assert rollback(config.registry, "answers were rude").champion == first.version
    result = promote(config.registry, second.version)
    assert (result.champion, result.previous) == (second.version, first.version)
    assert result.entry.reason == "learned +0.50 on new_task"
    assert not result.already


@pytest.mark.parametrize("force", [False, True])
def test_the_champion_stays_it_without_an_entry_and_that_is_said(
    config: RunConfig, evaluated_run: EvaluatedRun, force: bool
) -> None:
    version = register(config, evaluated_run(passed=True)).version
    before, tags = history_of(config.registry), connect(config.registry).get_model_version("nestune", version).tags
    result = promote(config.registry, version, force, reason="once more")
    assert result.already
    assert result.summary()[0].startswith(f"nestune version {version} was champion already, nothing was changed: ")
    assert history_of(config.registry) == before
    assert connect(config.registry).get_model_version("nestune", version).tags == tags


@pytest.mark.parametrize("what", ["metric", "metric at its step", "gate", "report", "adapter", "weights"])
def test_a_record_that_was_edited_by_hand_is_refused_and_says_which(
    config: RunConfig, overtaken: RegisterResult, what: str
) -> None:
    rollback_free(config)
    client = connect(config.registry)
    if what == "metric":
        client.log_metric(overtaken.run_id, "retention/new_task.exact_match", 0.99, step=99)
        told = r"its metric retention/new_task\.exact_match is 0\.99 at step 99, at which nothing was"
    elif what == "metric at its step":
        client.log_metric(overtaken.run_id, "retention/new_task.exact_match", 0.99, step=20)
        told = r"its metric retention/new_task\.exact_match is 0\.99, the report says 0\.75"
    elif what == "weights":
        weights = Path(client.get_model_version("nestune", overtaken.version).source, "artifacts/adapter", WEIGHTS)
        weights.write_bytes(weights.read_bytes()[:-1] + b"\x00")
        told = r"the adapter at .* has sha256 \w{12}, registered was \w{12}"
    elif what == "gate":
        client.set_model_version_tag("nestune", overtaken.version, "gate", "refused")
        told = "its tag gate is 'refused'; by the report it passed"
    elif what == "report":
        path = Path(client.get_model_version("nestune", overtaken.version).source, "report.json")
        path.write_text(path.read_text().replace("0.75", "0.95"))
        told = r"its report has sha256 \w{12}, registered was \w{12}(.|\n)*new_task\.exact_match is 0\.75"
    else:
        client.set_model_version_tag("nestune", overtaken.version, "adapter_sha256", "0" * 64)
        told = r"the adapter at .* has sha256 \w{12}, registered was 000000000000"
    with pytest.raises(RunError, match=told):
        promote(config.registry, overtaken.version)
    assert history_of(config.registry).champion is None


def rollback_free(config: RunConfig) -> None:
    """Take the champion away, so that the gate's comparison with none holds."""
    connect(config.registry).delete_registered_model_alias("nestune", "champion")
    assert history_of(config.registry).champion is None


def test_of_several_versions_of_one_mlflow_run_each_is_held_against_its_own_figures(
    config: RunConfig, evaluated_run: EvaluatedRun
) -> None:
    run = evaluated_run(passed=True)
    first = register(config, run)
    rollback_free(config)
    # The same run, its candidate made of another checkpoint: an earlier step, another adapter, another score.
    scale_adapter(run.candidate, 1.5)
    report = read_json(run.evaluation / "report.json", "")
    report["candidate"]["step"], report["scores"]["candidate"]["new_task"]["exact_match"] = 10, 0.5
    report["adapters"] = {"candidate": sha256_file(run.candidate / WEIGHTS)}
    write_json(run.evaluation / "report.json", report)
    seal(run.evaluation, run.candidate)
    second = register(config, run)
    assert (first.run_id, second.version) == (second.run_id, "2")
    rollback_free(config)
    assert compare(config.registry, "1", "2").as_dict()["scores"]["new_task"]["exact_match"] == {
        "first": 0.75,
        "second": 0.5,
        "difference": -0.25,
        "rows": [4, 4],
    }
    assert [version.scores["new_task"] for version in versions(config.registry).versions] == [0.75, 0.5]
    assert promote(config.registry, "1").champion == "1"


def test_what_was_rolled_back_is_not_promoted_again_by_registering_it_again(
    config: RunConfig, evaluated_run: EvaluatedRun
) -> None:
    first = register(config, evaluated_run(passed=True))
    run = evaluated_run(passed=True, champion_version=first.version)
    second = register(config, run)
    rollback(config.registry, "answers were rude")
    again = register(config, run)
    assert (again.version, again.promoted, again.waits) == (second.version, False, True)
    assert "rolled back by " in again.reason
    assert promote(config.registry, second.version, reason="they are not").champion == second.version


def test_a_reason_has_a_length_that_mlflow_keeps_whole(config: RunConfig, refused: RegisterResult) -> None:
    with pytest.raises(ConfigError, match="the reason has 2001 characters; 2000 are kept at most"):
        promote(config.registry, refused.version, force=True, reason="ä" * 2001)
    reason = "ж" * 2000
    assert promote(config.registry, refused.version, force=True, reason=reason).entry.reason == reason
    with pytest.raises(ConfigError, match="2000 are kept at most"):
        rollback(config.registry, "ä" * 2001)


def test_without_its_report_a_version_is_promoted_only_by_force(config: RunConfig, overtaken: RegisterResult) -> None:
    rollback_free(config)
    Path(connect(config.registry).get_model_version("nestune", overtaken.version).source, "report.json").unlink()
    with pytest.raises(RunError, match=r"version 2 of nestune has no report of its evaluation"):
        promote(config.registry, overtaken.version)
    assert promote(config.registry, overtaken.version, force=True, reason="it is lost").entry.report_sha256 is None


def test_the_versions_tell_what_was_kept_and_who_promoted_what(config: RunConfig, refused: RegisterResult) -> None:
    result = versions(config.registry)
    assert [(one.number, one.aliases) for one in result.versions] == [("1", ("champion",)), ("2", ("candidate",))]
    head, first, second, *rest = result.summary()
    assert head.split() == ["version", "aliases", "run", "parent", "gate", "new_task", "old", "data", "commit"]
    assert first.split()[:6] == ["1", "champion", "week.1", "passed", "0.750", "0.500"]
    assert second.split()[:4] == ["2", "candidate", "week.1", "refused"]
    assert rest[-1].startswith("1: version 1 promoted by ")


def test_two_versions_are_compared_by_what_their_reports_say(config: RunConfig, evaluated_run: EvaluatedRun) -> None:
    register(config, evaluated_run(passed=True))
    register(config, evaluated_run(passed=False, champion_version="1"))
    result = compare(config.registry, "1", "2")
    exact = result.as_dict()["scores"]["new_task"]["exact_match"]
    assert exact == {"first": 0.75, "second": 0.75, "difference": 0.0, "rows": [4, 4]}
    assert result.summary()[-1] == "version 2: gate refused: forgot: old -0.50"


def test_a_version_has_a_card_as_the_hub_reads_it(
    config: RunConfig, evaluated_run: EvaluatedRun, base: Path, tmp_path: Path
) -> None:
    copied = shutil.copytree(base, tmp_path / "base")
    (copied / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A base\n")
    run = evaluated_run(passed=False)
    metadata = read_json(run.candidate / "metadata.json", "")
    metadata["base"]["reference"] = str(copied)
    write_json(run.candidate / "metadata.json", metadata)
    seal(run.evaluation, run.candidate)
    version = register(config, run).version
    card = ModelCard(
        Path(connect(config.registry).get_model_version("nestune", version).source, "README.md").read_text()
    )
    told = card.data.to_dict()
    assert (told["license"], told["library_name"], told["tags"]) == ("apache-2.0", "peft", ["lora", "nestune"])
    assert "The gate refused it: forgot: old -0.50." in card.text
    assert "| new task | 75.0% |\n| old | 0.500 |" in card.text
    assert "| dataset sha256 | `data-hash` |" in card.text


def test_the_commands_do_the_same(
    config: RunConfig, refused: RegisterResult, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--tracking-uri", str(config.registry.tracking_uri), "--json"]

    def run(*arguments: str) -> Any:
        assert main([*arguments, *where]) == 0
        return json.loads(capsys.readouterr().out)

    assert [version["number"] for version in run("versions")["versions"]] == ["1", "2"]
    assert run("compare", "1", "2")["second"] == "2"
    assert main(["promote", "2", *where]) == 1
    assert "the gate refused version 2" in capsys.readouterr().err
    assert run("promote", "2", "--force", "--reason", "on trial")["champion"] == "2"
    assert run("rollback", "--reason", "it was")["champion"] == "1"
    assert main(["promote", "9", *where]) == 2
    assert "nestune has no version 9; it has 1, 2." in capsys.readouterr().err
    assert main(["versions", "--config", "run.yaml", "--model", "nestune"]) == 2
    assert "leave out --model" in capsys.readouterr().err
    assert main(["versions", "--set", "registry.tracking_uri=x"]) == 2
    assert "--set goes with --config" in capsys.readouterr().err
    assert main(["versions", "--tracking-uri", "http://me:secret@host"]) == 2
    told = capsys.readouterr().err
    assert "MLFLOW_TRACKING_PASSWORD" in told
    assert "secret" not in told
    assert main(["versions", "--model", "other", *where]) == 2
    assert "there is no model other in MLflow" in capsys.readouterr().err
