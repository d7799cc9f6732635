"""Promotions: of several at once one wins, the history keeps them all, and rollbacks go back along it."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nestune.config import RegistryConfig
from nestune.errors import ConfigError, RunError
from nestune.registry.connection import connect
from nestune.registry.ledger import Ledger, Promotion, champions
from nestune.registry.promotion import force_version, history_of, promote_version, roll_back

ENTRY = Promotion(1, "1", None, "promoted", "ada@lab", "2026-01-05T03:00:00+00:00", "learned")
AT_ONCE = 20
# Forked when MLflow is imported, which takes seconds, so that all ask at the same moment.
RACE = """
import multiprocessing, sys
import mlflow
from nestune.config import RegistryConfig
from nestune.registry.promotion import force_version, promote_version

how, uri, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
context = multiprocessing.get_context("fork")
barrier, told = context.Barrier(count), context.Queue()

def promote(version):
    registry = RegistryConfig(tracking_uri=uri)
    barrier.wait()
    try:
        if how == "forced":
            told.put((version, bool(force_version(registry, version, f"version {version} is wanted"))))
        else:
            told.put((version, promote_version(registry, version, None)))
    except BaseException as error:
        told.put((f"version {version}: {error!r}", True))

processes = [context.Process(target=promote, args=(str(number),)) for number in range(1, count + 1)]
[process.start() for process in processes]
won = [told.get() for _ in processes]
[process.join() for process in processes]
print(*[version for version, promoted in won if promoted])
"""


@pytest.fixture
def versions(registry: RegistryConfig, tmp_path: Path) -> RegistryConfig:
    """A registry with as many versions of a model as may be promoted at once; what is in them does not matter here."""
    client = connect(registry)
    client.create_registered_model(registry.registered_model)
    for _ in range(AT_ONCE):
        client.create_model_version(registry.registered_model, str(tmp_path))
    return registry


def aliases(registry: RegistryConfig) -> dict[str, str]:
    found: dict[str, Any] = connect(registry).get_registered_model(registry.registered_model).aliases
    return {alias: str(version) for alias, version in found.items()}


def race(how: str, registry: RegistryConfig) -> list[str]:
    """Versions that were promoted by as many processes at once."""
    command = [sys.executable, "-c", RACE, how, str(registry.tracking_uri), str(AT_ONCE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_of_many_promotions_at_once_one_wins_and_is_champion(versions: RegistryConfig) -> None:
    won = race("promoted", versions)
    history = history_of(versions)
    assert len(won) == 1
    assert aliases(versions) == {"champion": won[0]}
    assert [(entry.version, entry.before, entry.action) for entry in history.entries] == [(won[0], None, "promoted")]


def test_many_forced_promotions_at_once_are_all_in_the_history_and_the_last_is_champion(
    versions: RegistryConfig,
) -> None:
    won = race("forced", versions)
    entries = history_of(versions).entries
    order = [entry.version for entry in entries]
    assert sorted(map(str, order), key=int) == sorted(won, key=int) == [str(n) for n in range(1, AT_ONCE + 1)]
    assert [entry.number for entry in entries] == list(range(1, AT_ONCE + 1))
    assert [entry.before for entry in entries] == [None, *order[:-1]]
    assert [entry.reason for entry in entries] == [f"version {version} is wanted" for version in order]
    assert aliases(versions) == {"champion": order[-1], "previous": order[-2]}


def test_rolling_back_twice_goes_back_two_champions_and_a_promotion_goes_on_from_there(
    versions: RegistryConfig,
) -> None:
    for version, before in (("1", None), ("2", "1"), ("3", "2")):
        assert promote_version(versions, version, before)
    assert aliases(versions) == {"champion": "3", "previous": "2"}
    assert roll_back(versions, "answers were rude").version == "2"
    assert aliases(versions) == {"champion": "2", "previous": "1"}
    assert roll_back(versions, "these, too").version == "1"
    assert aliases(versions) == {"champion": "1"}
    with pytest.raises(RunError, match="no earlier champion to go back to: version 1 is the first"):
        roll_back(versions, "")
    assert promote_version(versions, "4", "1")
    assert aliases(versions) == {"champion": "4", "previous": "1"}
    told = [(entry.version, entry.before, entry.action, entry.reason) for entry in history_of(versions).entries]
    assert told == [
        ("1", None, "promoted", ""),
        ("2", "1", "promoted", ""),
        ("3", "2", "promoted", ""),
        ("2", "3", "rolled back", "answers were rude"),
        ("1", "2", "rolled back", "these, too"),
        ("4", "1", "promoted", ""),
    ]


def test_a_rollback_to_an_earlier_champion_skips_those_between_and_to_no_other_version(
    versions: RegistryConfig,
) -> None:
    for version, before in (("1", None), ("2", "1"), ("3", "2")):
        promote_version(versions, version, before)
    with pytest.raises(ConfigError, match=r"version 7 of nestune is none of the champions before 3: 1, 2\."):
        roll_back(versions, "", to="7")
    assert roll_back(versions, "", to="1").version == "1"
    assert aliases(versions) == {"champion": "1"}


def test_deleted_versions_are_passed_over_by_rollbacks_and_stand_in_the_way_of_nothing(
    versions: RegistryConfig,
) -> None:
    for version, before in (("1", None), ("2", "1"), ("3", "2"), ("4", "3")):
        promote_version(versions, version, before)
    client = connect(versions)
    client.delete_model_version("nestune", "2")
    assert roll_back(versions, "").version == "3"
    assert aliases(versions) == {"champion": "3", "previous": "1"}
    # The champion itself is deleted: nothing is in use until somebody says so, and there is a way back.
    client.delete_model_version("nestune", "3")
    assert history_of(versions).champion is None
    assert roll_back(versions, "").version == "1"
    assert aliases(versions) == {"champion": "1"}
    assert promote_version(versions, "5", "1")


def test_what_a_killed_process_wrote_down_and_did_not_apply_the_next_one_applies(versions: RegistryConfig) -> None:
    promote_version(versions, "1", None)
    # Killed right after its entry.
    assert Ledger(connect(versions), "nestune").add(replace(ENTRY, number=2, version="2", before="1"))
    assert aliases(versions) == {"champion": "1"}
    assert not promote_version(versions, "3", "1")
    assert aliases(versions) == {"champion": "2", "previous": "1"}
    assert promote_version(versions, "3", "2")


def test_an_alias_that_was_moved_by_hand_is_in_the_history_and_stays(
    versions: RegistryConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nestune.registry.promotion.BY_HAND_AFTER_S", 0.0)
    promote_version(versions, "1", None)
    connect(versions).set_registered_model_alias("nestune", "champion", "5")
    assert not promote_version(versions, "2", "1")
    history = history_of(versions)
    assert (history.entries[-1].action, history.entries[-1].before, history.champion) == ("moved by hand", "1", "5")
    assert aliases(versions) == {"champion": "5", "previous": "1"}
    connect(versions).delete_registered_model_alias("nestune", "champion")
    assert history_of(versions).champion is None
    assert aliases(versions) == {"previous": "5"}
    assert promote_version(versions, "2", None)


def test_a_champion_from_before_there_was_a_history_is_its_first_entry(versions: RegistryConfig) -> None:
    connect(versions).set_registered_model_alias("nestune", "champion", "3")
    assert promote_version(versions, "4", "3")
    assert [(entry.version, entry.action) for entry in history_of(versions).entries] == [
        ("3", "moved by hand"),
        ("4", "promoted"),
    ]


def test_a_champion_that_is_promoted_again_stays_without_another_entry(versions: RegistryConfig) -> None:
    assert promote_version(versions, "1", None)
    assert promote_version(versions, "1", None)
    assert force_version(versions, "1", "to be sure").action == "promoted"
    assert len(history_of(versions).entries) == 1


def test_an_entry_is_written_once_and_cannot_be_changed(versions: RegistryConfig) -> None:
    ledger = Ledger(connect(versions), "nestune")
    assert ledger.add(ENTRY)
    assert not ledger.add(replace(ENTRY, version="2"))
    assert not Ledger(connect(versions), "nestune").add(replace(ENTRY, by="eve@lab"))
    assert ledger.entries() == ([ENTRY], False)
    (run,) = connect(versions).search_runs([ledger_experiment(versions)])
    assert json.loads(run.data.params["promotion.1"])["by"] == "ada@lab"


def test_a_history_that_was_deleted_is_told_with_the_way_to_restore_it(versions: RegistryConfig) -> None:
    promote_version(versions, "1", None)
    connect(versions).delete_experiment(ledger_experiment(versions))
    with pytest.raises(RunError, match=r"is deleted in MLflow\. Restore it with mlflow experiments restore"):
        history_of(versions)


def test_where_the_system_knows_no_name_of_the_user_its_number_stands(
    versions: RegistryConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown() -> str:
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.setattr("getpass.getuser", unknown)
    promote_version(versions, "1", None)
    assert history_of(versions).entries[0].by.startswith(f"{os.getuid()}@")


def ledger_experiment(registry: RegistryConfig) -> str:
    return str(connect(registry).get_experiment_by_name("nestune: promotions").experiment_id)


@given(st.lists(st.sampled_from(["promote", "back"]), max_size=12))
def test_a_rollback_undoes_the_latest_promotion_that_none_has_undone(steps: list[str]) -> None:
    entries: list[Promotion] = []
    stack: list[str] = []
    for number, step in enumerate(steps, start=1):
        if step == "promote":
            stack.append(str(number))
            entries.append(replace(ENTRY, number=number, version=str(number), action="promoted"))
        elif len(stack) > 1:
            stack.pop()
            entries.append(replace(ENTRY, number=number, version=stack[-1], action="rolled back"))
        assert champions(entries) == stack
