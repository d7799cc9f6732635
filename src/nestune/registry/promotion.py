"""Champion, its predecessors, and how one takes the place of another: promoting, rolling back, and their history."""

import getpass
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from nestune.config import RegistryConfig
from nestune.errors import ConfigError, RunError
from nestune.registry.connection import artifact_location, connect, speaking_to, tracking_uri
from nestune.registry.ledger import Action, Ledger, Promotion, champions
from nestune.registry.versions import CHAMPION, aliases_by_name, version_numbers

PREVIOUS = "previous"
# Another process moves an alias right after its entry; one that stays elsewhere for so long was moved by hand.
BY_HAND_AFTER_S = 3.0
ATTEMPTS = 5


@dataclass(frozen=True)
class History:
    """Every promotion of a registered model, the earliest first; versions: those that have not been deleted."""

    entries: tuple[Promotion, ...]
    versions: frozenset[str]

    @property
    def champion(self) -> str | None:
        """The version in use; None: there is none, or it has been deleted."""
        line = champions(self.entries)
        return line[-1] if line and line[-1] in self.versions else None

    @property
    def earlier(self) -> list[str]:
        """The champions before, to which a rollback can go back, the latest last."""
        line = champions(self.entries)[:-1]
        return [version for version in line if version and version in self.versions and version != self.champion]

    def undone(self, version: str) -> Promotion | None:
        """The rollback that took a version away, where it has not been champion again since."""
        last = next((entry for entry in self.entries[::-1] if version in (entry.version, entry.before)), None)
        return last if last is not None and last.action == "rolled back" and last.before == version else None


def promote_version(
    registry: RegistryConfig,
    version: str,
    compared_with: str | None,
    reason: str = "",
    report_sha256: str | None = None,
) -> bool:
    """Make a version champion; false, and nothing done, when another one became champion meanwhile.

    compared_with: the champion that the gate compared the version with, None when there was none. Of several processes
    that promote at once one succeeds. A version that is champion already stays so, without an entry.
    """
    keeper = _Keeper(registry)
    with keeper.speaking():
        while True:
            history = keeper.settled()
            if history.champion == version:
                return True
            if history.champion != compared_with:
                return False
            if keeper.append(history, "promoted", version, reason, report_sha256):
                return True


def force_version(registry: RegistryConfig, version: str, reason: str, report_sha256: str | None = None) -> Promotion:
    """Make a version champion whatever the champion is now; returns its entry, or that which made it champion."""
    keeper = _Keeper(registry)
    with keeper.speaking():
        while True:
            history = keeper.settled()
            if history.champion == version:
                return history.entries[-1]
            if keeper.append(history, "forced", version, reason, report_sha256):
                return keeper.settled().entries[-1]


def roll_back(registry: RegistryConfig, reason: str, to: str | None = None) -> Promotion:
    """Make the champion's predecessor champion again, or `to`, an earlier one; returns the entry.

    Raises RunError when there is no such predecessor, and when another process changed the champion meanwhile.
    """
    keeper, name = _Keeper(registry), registry.registered_model
    with keeper.speaking():
        history = keeper.settled()
        earlier = history.earlier
        if not earlier:
            first = f"version {history.champion} is the first" if history.champion else "there is no champion"
            raise RunError(f"{name} has no earlier champion to go back to: {first}. See nestune versions.")
        if to is not None and to not in earlier:
            raise ConfigError(
                f"version {to} of {name} is none of the champions before {history.champion or 'now'}: "
                f"{', '.join(earlier)}. Name one of them, or promote it: nestune promote {to}."
            )
        target = to or earlier[-1]
        if not keeper.append(history, "rolled back", target, reason):
            now = keeper.settled().champion
            raise RunError(
                f"the champion of {name} changed meanwhile; now it is version {now}. Nothing was rolled back."
            )
        return keeper.settled().entries[-1]


def history_of(registry: RegistryConfig) -> History:
    """All promotions; what was moved by hand in MLflow is noted first."""
    keeper = _Keeper(registry)
    with keeper.speaking():
        return keeper.settled()


class _Keeper:
    """Keeps the aliases of one registered model where its ledger says."""

    def __init__(self, registry: RegistryConfig) -> None:
        self._uri, self._name = tracking_uri(registry), registry.registered_model
        self._client: Any = connect(registry)
        self._ledger = Ledger(self._client, self._name, artifact_location(self._uri))

    def speaking(self) -> Any:
        """A context in which what MLflow raises is a ServiceError."""
        return speaking_to(self._uri)

    def settled(self) -> History:
        """The history, once the aliases are where it says, or it says where they were moved by hand."""
        seen, since = None, 0.0
        while True:
            # In this order: aliases that are newer than the entries can be taken for nothing else.
            entries, applied = self._ledger.entries()
            history = self._history(entries)
            if not applied:
                self._apply()
                continue
            at = self._aliases().get(CHAMPION)
            if at == history.champion:
                return history
            if seen != (len(entries), at):
                seen, since = (len(entries), at), time.monotonic()
            if not entries or time.monotonic() - since > BY_HAND_AFTER_S:
                self.append(history, "moved by hand", at, "the alias was moved in MLflow; named is who noticed")
            else:
                time.sleep(0.2)

    def append(
        self, history: History, action: Action, version: str | None, reason: str, report_sha256: str | None = None
    ) -> bool:
        """Write the entry after these, and move the aliases; False when another process wrote one first."""
        number = len(history.entries) + 1
        at = datetime.now(UTC).isoformat(timespec="seconds")
        entry = Promotion(number, version, history.champion, action, _user(), at, reason, report_sha256)
        if not self._ledger.add(entry):
            return False
        self._apply()
        return True

    def _apply(self) -> None:
        """Move the aliases where the last entry says, whoever wrote it, until no newer one has come meanwhile."""
        moved_for = 0
        while True:
            entries, _ = self._ledger.entries()
            if moved_for == len(entries):
                self._ledger.set_applied(moved_for)
                return
            moved_for, history = len(entries), self._history(entries)
            self._point(CHAMPION, history.champion)
            self._point(PREVIOUS, history.earlier[-1] if history.earlier else None)

    def _point(self, alias: str, version: str | None) -> None:
        """Move an alias, or take it away; of two that set a new one at once, MLflow refuses one, which asks again."""
        from mlflow.exceptions import MlflowException

        for attempt in range(ATTEMPTS):
            if self._aliases().get(alias) == version:
                return
            try:
                if version is not None:
                    self._client.set_registered_model_alias(self._name, alias, version)
                else:
                    self._client.delete_registered_model_alias(self._name, alias)
            except MlflowException:
                if attempt == ATTEMPTS - 1:
                    raise
                time.sleep(0.1 * (attempt + 1))

    def _history(self, entries: Sequence[Promotion]) -> History:
        return History(tuple(entries), frozenset(version_numbers(self._client, self._name)))

    def _aliases(self) -> dict[str, str]:
        return aliases_by_name(self._client, self._name)


def _user() -> str:
    """Who is at work here; a number where the system knows no name, as in a container."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):
        name = str(os.getuid())
    return f"{name}@{socket.gethostname()}"
