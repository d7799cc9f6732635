"""`nestune promote` and `nestune rollback`: which version is in use, decided by a person."""

import logging
from dataclasses import asdict, dataclass
from typing import Any

from nestune.config import RegistryConfig
from nestune.errors import ConfigError, RunError
from nestune.registry.gate_record import AGAIN, GateRecord, read_gate_record
from nestune.registry.ledger import REASON_CHARACTERS, Promotion, told
from nestune.registry.promotion import History, force_version, history_of, promote_version, roll_back
from nestune.registry.versions import check_version, tag_version

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PromoteResult:
    """The champion of a registered model now, the one that a rollback goes back to, and the entry that made it so.

    already: whether it was champion before, so that no entry was written, and no reason kept.
    """

    model: str
    champion: str | None
    previous: str | None
    entry: Promotion
    already: bool = False

    @classmethod
    def of(cls, registry: RegistryConfig, history: History, already: bool = False) -> "PromoteResult":
        """What a history ends with, where there is a champion."""
        previous = history.earlier[-1] if history.earlier else None
        return cls(registry.registered_model, history.champion, previous, history.entries[-1], already)

    def as_dict(self) -> dict[str, Any]:
        """The result as JSON."""
        return asdict(self)

    def summary(self) -> list[str]:
        """The result for a person."""
        stays = "was champion already, nothing was changed" if self.already else "is champion"
        return [
            f"{self.model} version {self.champion} {stays}: {told(self.entry)}",
            f"previous: version {self.previous}" if self.previous else "there is no earlier one to go back to",
        ]


def promote(registry: RegistryConfig, version: str, force: bool = False, reason: str = "") -> PromoteResult:
    """Make a version champion that the gate let pass, as its report says, which nothing may contradict.

    force: also one that the gate refused, or whose report is missing or contradicted; a reason is asked for then, and
    kept. Raises ConfigError when there is no such version or no reason, RunError when it may not be promoted: the gate
    refused it, it was compared with another champion, or its record was changed.
    """
    if force and not reason.strip():
        raise ConfigError("--force passes over the gate: say why with --reason, which is kept with the promotion")
    _check_reason(reason)
    check_version(registry, version)
    already = history_of(registry).champion == version
    if force:
        force_version(registry, version, reason, _sha256_of(registry, version))
    else:
        record = read_gate_record(registry, version)
        if not record.passed:
            raise RunError(
                f"the gate refused version {version} of {registry.registered_model}: {record.report['reason']}. Train "
                "a better one, or pass over the gate with --force and a --reason."
            )
        _promote_passed(registry, record, reason or record.report["reason"])
    history = history_of(registry)
    if history.champion == version and not already:
        tag_version(registry, version, {"promotion": told(history.entries[-1])})
    return PromoteResult.of(registry, history, already)


def rollback(registry: RegistryConfig, reason: str = "", to: str | None = None) -> PromoteResult:
    """Make the previous champion champion again, or `to`, one before it. Raises RunError where there is none."""
    _check_reason(reason)
    entry = roll_back(registry, reason, to)
    if entry.version is not None:
        tag_version(registry, entry.version, {"promotion": told(entry)})
    return PromoteResult.of(registry, history_of(registry))


def _check_reason(reason: str) -> None:
    if len(reason) > REASON_CHARACTERS:
        raise ConfigError(f"the reason has {len(reason)} characters; {REASON_CHARACTERS} are kept at most. Shorten it.")


def _promote_passed(registry: RegistryConfig, record: GateRecord, reason: str) -> None:
    if promote_version(registry, record.version, record.compared_with, reason, record.sha256):
        return
    compared = f"version {record.compared_with}" if record.compared_with else "none"
    raise RunError(
        f"version {record.version} of {registry.registered_model} passed the gate against another champion "
        f"({compared}); now it is version {history_of(registry).champion}. {AGAIN}"
    )


def _sha256_of(registry: RegistryConfig, version: str) -> str | None:
    """The hash of the report of a version; None, with a warning, where it is missing or contradicted."""
    try:
        return read_gate_record(registry, version).sha256
    except RunError as error:
        log.warning("%s It is promoted all the same.", error)
        return None
