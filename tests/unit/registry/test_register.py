"""Stage register: only what was evaluated is registered, and only what passed is promoted."""

import json
from pathlib import Path

import pytest
from run_folders import EvaluatedRun, scale_adapter, start_tracking

from nestune.config import RunConfig
from nestune.errors import RunError
from nestune.files import read_json, sha256_file, write_json
from nestune.registry.connection import connect
from nestune.registry.promotion import promote_version
from nestune.registry.versions import champion
from nestune.runs import RunPaths
from nestune.stages.evaluate import seal
from nestune.stages.promote import promote
from nestune.stages.register import register
from nestune.tiers.tier_map import TierMap, write_tier_map


def edit_report(run: RunPaths, **changes: object) -> None:
    path = run.evaluation / "report.json"
    write_json(path, read_json(path, "") | changes)


def champion_version(config: RunConfig) -> str | None:
    found = champion(config.registry)
    return found.version if found else None


def test_a_candidate_that_passed_becomes_champion(config: RunConfig, evaluated_run: EvaluatedRun) -> None:
    run = evaluated_run(passed=True)
    start_tracking(config, run, {})
    result = register(config, run)
    assert (result.promoted, result.gate, result.aliases) == (True, "passed", ("candidate", "champion"))
    assert champion_version(config) == result.version
    assert json.loads(run.registration.read_text()) == result.as_dict()
    assert "register" in read_json(run.manifest, "")
    # MLflow's pages of the version and of its run say what the gate said, with the scores of every set.
    client = connect(config.registry)
    described = client.get_model_version("nestune", result.version).description
    assert described == client.get_run(result.run_id).data.tags["mlflow.note.content"]
    assert described.startswith(f"Gate passed: {result.reason}\n")
    for name in read_json(run.evaluation / "report.json", "")["scores"]["candidate"]:
        assert f"| {name} |" in described


def test_a_candidate_that_forgot_is_registered_and_marked_but_the_champion_stays(
    config: RunConfig, evaluated_run: EvaluatedRun
) -> None:
    first = register(config, evaluated_run(passed=True))
    second = register(config, evaluated_run(passed=False, champion_version=first.version))
    assert (second.promoted, second.gate, second.aliases) == (False, "refused", ("candidate",))
    assert champion_version(config) == first.version
    version = connect(config.registry).get_model_version_by_alias("nestune", "candidate")
    assert str(version.version) == second.version
    assert version.tags["gate"] == "refused"
    assert version.tags["gate_reason"] == "forgot: old -0.50"


def test_a_candidate_that_passed_waits_where_a_person_is_to_approve_it(
    config: RunConfig, evaluated_run: EvaluatedRun
) -> None:
    approving = config.model_copy(update={"registry": config.registry.model_copy(update={"promote": "approve"})})
    result = register(approving, evaluated_run(passed=True))
    assert (result.promoted, result.gate, result.waits, result.aliases) == (False, "passed", True, ("candidate",))
    assert "it waits for approval: nestune promote 1 --model nestune" in result.summary()
    assert champion_version(config) is None
    assert promote(config.registry, result.version, reason="read and approved").entry.reason == "read and approved"
    assert champion_version(config) == result.version
    forgot = register(approving, evaluated_run(passed=False, champion_version=result.version))
    assert (forgot.gate, forgot.waits) == ("refused", False)


def test_a_candidate_whose_champion_changed_meanwhile_is_not_promoted_but_told_to_evaluate_again(
    config: RunConfig, evaluated_run: EvaluatedRun
) -> None:
    slow = evaluated_run(passed=True, champion_version=None)
    fast = register(config, evaluated_run(passed=True, champion_version=None))
    result = register(config, slow)
    assert (result.promoted, result.gate) == (False, "outdated")
    assert result.reason.endswith("Run nestune evaluate again.")
    assert champion_version(config) == fast.version

    edit_report(slow, champion_version=fast.version)
    seal(slow.evaluation, slow.candidate)
    again = register(config, slow)
    assert (again.version, again.promoted, again.gate) == (result.version, True, "passed")
    assert champion_version(config) == again.version


def test_importances_that_cannot_be_read_do_not_stop_a_trained_run(
    config: RunConfig, evaluated_run: EvaluatedRun, caplog: pytest.LogCaptureFixture
) -> None:
    run = evaluated_run(passed=True)
    write_tier_map(TierMap("manual", (1,), {"layers.0.self_attn.q_proj.lora_a": 0}), run.tiers)
    run.importance.write_text("{")
    run.importance_picture.write_bytes(b"")
    result = register(config, run)
    assert result.promoted
    assert "importances are left out" in caplog.text
    assert "importance.json is not JSON" in caplog.text
    logged = {file.path for file in connect(config.registry).list_artifacts(result.run_id)}
    assert "tiers.json" in logged
    assert not {"importance.json", "importance.png"} & logged


def test_registering_the_champion_again_leaves_it_champion(config: RunConfig, evaluated_run: EvaluatedRun) -> None:
    run = evaluated_run(passed=True)
    start_tracking(config, run, {})
    first = register(config, run)
    assert register(config, run).as_dict() == first.as_dict()
    assert champion_version(config) == first.version


def test_a_version_says_what_it_was_made_of(config: RunConfig, evaluated_run: EvaluatedRun) -> None:
    parent = register(config, evaluated_run(passed=True))
    model = config.model.model_copy(update={"adapter": "models:/nestune@champion"})
    config = config.model_copy(update={"model": model})
    run = evaluated_run(passed=True, champion_version=parent.version)
    start_tracking(config, run, {})
    promote_version(config.registry, parent.version, parent.version)
    result = register(config, run)
    tags = connect(config.registry).get_model_version("nestune", result.version).tags
    metadata = read_json(run.candidate / "metadata.json", "")
    assert tags["dataset_sha256"] == "data-hash"
    assert tags["tier_map_sha256"] == "tiers-hash"
    assert tags["base_sha256"] == metadata["base"]["sha256"]
    assert tags["adapter_sha256"] == sha256_file(run.candidate / "adapter_model.safetensors")
    assert tags["parent"] == f"models:/nestune/{parent.version}"
    assert tags["run"] == "week.1"
    assert tags["git_commit"]


def test_the_tracked_run_has_the_scores_and_the_files_that_explain_them(
    config: RunConfig, evaluated_run: EvaluatedRun
) -> None:
    run = evaluated_run(passed=True)
    tracked = start_tracking(config, run, {})
    register(config, run)
    metrics = tracked.client.get_run(tracked.run_id).data.metrics
    assert metrics == {
        "retention/new_task.loss": 0.5,
        "retention/new_task.exact_match": 0.75,
        "retention/old.loss": 0.5,
    }
    files = {file.path for file in tracked.client.list_artifacts(tracked.run_id)}
    assert {"config.yaml", "tiers.json", "manifest.json", "evaluation", "dataset"} <= files


def test_an_adapter_that_was_trained_again_after_the_evaluation_is_not_registered(
    config: RunConfig, evaluated_run: EvaluatedRun
) -> None:
    run = evaluated_run(passed=True)
    scale_adapter(run.candidate, 1.5)
    with pytest.raises(RunError, match=r"adapter_model.safetensors has changed .*Run nestune evaluate again"):
        register(config, run)
    assert champion_version(config) is None


def test_what_mlx_lm_would_load_is_as_it_was_evaluated_or_not_registered(
    config: RunConfig, evaluated_run: EvaluatedRun
) -> None:
    run = evaluated_run(passed=True)
    with (run.candidate / "adapters.safetensors").open("ab") as file:
        file.write(b" ")
    with pytest.raises(RunError, match=r"adapters.safetensors has changed .*Run nestune evaluate again"):
        register(config, run)
    assert champion_version(config) is None


def test_a_report_edited_by_hand_does_not_pass(config: RunConfig, evaluated_run: EvaluatedRun) -> None:
    run = evaluated_run(passed=False)
    edit_report(run, passed=True)
    with pytest.raises(RunError, match=r"report.json has changed .*Run nestune evaluate again"):
        register(config, run)
    assert not run.registration.exists()


def test_without_an_evaluation_nothing_is_registered(config: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="Run nestune evaluate first"):
        register(config, RunPaths(tmp_path / "nothing"))


def test_a_run_trained_elsewhere_gets_a_tracked_run_of_its_own(config: RunConfig, evaluated_run: EvaluatedRun) -> None:
    run = evaluated_run(passed=True)
    result = register(config, run)
    assert connect(config.registry).get_run(result.run_id).info.status == "FINISHED"
