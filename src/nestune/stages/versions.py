"""`nestune versions` and `nestune compare`: the chain of versions with what was kept along it, and two of them."""

from dataclasses import asdict, dataclass
from typing import Any

from nestune.config import RegistryConfig
from nestune.registry.gate_record import GateRecord, figures_of, read_gate_record
from nestune.registry.ledger import Promotion, told
from nestune.registry.promotion import history_of
from nestune.registry.versions import Version, list_versions
from nestune.stages.tables import aligned

SHORT_HASH = 8


@dataclass(frozen=True)
class VersionsResult:
    """All versions of a registered model, the oldest first, and its promotions."""

    model: str
    versions: tuple[Version, ...]
    promotions: tuple[Promotion, ...]

    def as_dict(self) -> dict[str, Any]:
        """The result as JSON."""
        return {
            "model": self.model,
            "versions": [asdict(version) for version in self.versions],
            "promotions": [asdict(entry) for entry in self.promotions],
        }

    def summary(self) -> list[str]:
        """The result for a person: a row a version, then a line a promotion."""
        if not self.versions:
            return [f"{self.model} has no version"]
        sets = list(dict.fromkeys(name for version in self.versions for name in version.scores))
        rows = [["version", "aliases", "run", "parent", "gate", *sets, "data", "commit"]]
        for version in self.versions:
            scores, tags = version.scores, version.tags
            rows.append(
                [
                    version.number,
                    ", ".join(version.aliases),
                    tags.get("run", ""),
                    _parent(tags.get("parent", "none")),
                    tags.get("gate", ""),
                    *(f"{scores[name]:.3f}" if name in scores else "" for name in sets),
                    tags.get("dataset_sha256", "")[:SHORT_HASH],
                    tags.get("git_commit", "")[:SHORT_HASH],
                ]
            )
        lines = [*aligned(rows), "", "exact match where a set has answers, else nats per token; promotions:"]
        return [*lines, *(f"{entry.number}: {_what(entry)} {told(entry)}" for entry in self.promotions)]


@dataclass(frozen=True)
class CompareResult:
    """Two versions of a registered model on the sets that either was scored on."""

    model: str
    first: GateRecord
    second: GateRecord

    def as_dict(self) -> dict[str, Any]:
        """The result as JSON: set -> measure -> first, second and their difference."""
        scores: dict[str, Any] = {}
        one, other = (figures_of(record.report["scores"]["candidate"]) for record in (self.first, self.second))
        for key in one | other:
            name, measure = key
            values = {"first": one.get(key), "second": other.get(key), "difference": None}
            if key in one and key in other:
                values["difference"] = other[key] - one[key]
            scores.setdefault(name, {})[measure] = values | {"rows": self._rows(name)}
        told_of = {"model": self.model, "first": self.first.version, "second": self.second.version}
        return told_of | {"scores": scores}

    def summary(self) -> list[str]:
        """The result for a person: a row a set and measure, and what makes them hard to compare."""
        rows = [["set", "measure", f"version {self.first.version}", f"version {self.second.version}", "difference"]]
        others = []
        for name, measures in self.as_dict()["scores"].items():
            for measure, values in measures.items():
                shown = [_shown(values[key]) for key in ("first", "second")]
                change = values["difference"]
                rows.append([name, measure, *shown, "" if change is None else f"{change:+.3f}"])
            before, after = self._rows(name)
            if before is not None and after is not None and before != after:
                others.append(f"{name} had {before} rows, then {after}: these are not the same")
        verdicts = [
            f"version {one.version}: gate {'passed' if one.passed else 'refused'}: {one.report['reason']}"
            for one in (self.first, self.second)
        ]
        return [*aligned(rows), *others, *verdicts]

    def _rows(self, name: str) -> list[int | None]:
        return [record.report["dataset"].get("rows", {}).get(name) for record in (self.first, self.second)]


def versions(registry: RegistryConfig) -> VersionsResult:
    """The versions of a registered model, and its promotions."""
    promotions = history_of(registry).entries
    return VersionsResult(registry.registered_model, tuple(list_versions(registry)), promotions)


def compare(registry: RegistryConfig, first: str, second: str) -> CompareResult:
    """Two versions by what their reports say.

    Raises ConfigError when there is no such version, RunError when a report is missing or was changed.
    """
    one, other = (read_gate_record(registry, version) for version in (first, second))
    return CompareResult(registry.registered_model, one, other)


def _what(entry: Promotion) -> str:
    return f"version {entry.version}" if entry.version else "no champion,"


def _parent(reference: str) -> str:
    """The version that was trained upon, or the folder of its run."""
    if reference == "none":
        return ""
    named = reference.removesuffix("/candidate")
    return named.rpartition("/")[2]


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
