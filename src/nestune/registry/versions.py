"""Versions of the registered model: adapters that are registered, promoted by alias, and fetched again."""

import re
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from nestune.backends.adapters import METADATA, WEIGHTS, adapter_files, misfits
from nestune.base_model import BaseModel
from nestune.config import RegistryConfig, RunConfig
from nestune.config.faults import explain
from nestune.errors import ConfigError, RunError
from nestune.files import read_json, sha256_file
from nestune.foreign_files import folder_at, parse_json
from nestune.registry.connection import connect, environment_defaults, speaking_to, unrepeated
from nestune.registry.connection import tracking_uri as address
from nestune.registry.serving import MAX_TOKENS

CANDIDATE = "candidate"
CHAMPION = "champion"
SERVED_MODEL = Path(__file__).with_name("served_model.py")
# What a version needs to answer, beside nestune: the packages of the backend that trained it.
REQUIREMENTS = {
    "torch": ("mlflow", "transformers", "torch", "peft"),
    "mlx": ("mlflow", "transformers", "mlx[cpu]", "mlx-lm"),
}
REFERENCE = re.compile(r"models:/(?P<name>[^/@']+)(?P<which>@[^/@]+|/[0-9]+)")
FORMS = "Name a folder, models:/<name>@<alias> or models:/<name>/<version>."
TAG_CHARACTERS = 4000
MOST_MODELS = 1000
# The tag of a version with its scores.
SCORES = "scores"
# No progress bars for kilobytes, and no copy of the current folder's uv.lock in a version.
MODEL_SETTINGS = {"MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false", "MLFLOW_UV_AUTO_DETECT": "false"}


@dataclass(frozen=True)
class Champion:
    """The version in use: its number, and its adapter's folder on this disk."""

    version: str
    folder: Path


def register_version(
    config: RunConfig, run_id: str, checkpoint: Path, tags: Mapping[str, str], files: Mapping[str, bytes] | None = None
) -> str:
    """Make the adapter of a checkpoint a version and point `candidate` at the newest one; returns its number.

    The same adapter of the same MLflow run stays one version, so that a repeated attempt adds none. files: what is to
    lie in it besides, by name, in the place of what a repeated attempt finds there.
    """
    client, uri, name = connect(config.registry), address(config.registry), config.registry.registered_model
    tags = {**tags, "adapter_sha256": sha256_file(checkpoint / WEIGHTS)}
    with speaking_to(uri):
        _ensure_registered_model(client, name)
        same = [v for v in _versions(client, name) if _identity(v) == (run_id, tags["adapter_sha256"])]
        version = same[0] if same else _create_version(client, config, run_id, checkpoint, tags)
        _put_files(client, version, files or {})
        for key, value in tags.items() if same else ():
            client.set_model_version_tag(name, version.version, key, value[:TAG_CHARACTERS])
        newest = max(int(v.version) for v in _versions(client, name))
        client.set_registered_model_alias(name, CANDIDATE, str(newest))
    return str(version.version)


@dataclass(frozen=True)
class Version:
    """A version: its number, the aliases that point at it, and its tags; created in milliseconds since 1970."""

    number: str
    aliases: tuple[str, ...]
    created: int
    tags: dict[str, str]

    @property
    def scores(self) -> dict[str, float]:
        """Set -> what its candidate scored on it, as it was registered."""
        told = parse_json(self.tags.get(SCORES, "{}").encode())
        return {str(name): float(value) for name, value in told.items()} if isinstance(told, dict) else {}


def list_versions(registry: RegistryConfig) -> list[Version]:
    """Every version of the registered model, the oldest first."""
    client, name = connect(registry), registry.registered_model
    with speaking_to(address(registry)):
        aliases = aliases_by_name(client, name)
        return [
            Version(
                number=str(found.version),
                aliases=tuple(sorted(alias for alias, at in aliases.items() if at == str(found.version))),
                created=int(found.creation_timestamp),
                tags=dict(found.tags),
            )
            for found in sorted(_versions(client, name), key=lambda version: int(version.version))
        ]


def adapter_folder(registry: RegistryConfig, version: str) -> Path:
    """The adapter's folder of a version, on this disk; raises RunError when its weights are not as registered."""
    return _fetch(connect(registry), address(registry), registry.registered_model, version)


def named_registry(model: str | None, tracking_uri: str | None) -> RegistryConfig:
    """The registry of a model by its name, or of the only one that MLflow has.

    Raises ConfigError, with the names that there are, when there is no such model, or several and none is named.
    """
    registry = _registry({"tracking_uri": tracking_uri} | ({"registered_model": model} if model is not None else {}))
    client, uri = connect(registry), address(registry)
    with speaking_to(uri):
        known = sorted(found.name for found in client.search_registered_models(max_results=MOST_MODELS))
        if model is not None and (model in known or aliases_by_name(client, model) or version_numbers(client, model)):
            return registry
    if model is None and len(known) == 1:
        return _registry({"tracking_uri": tracking_uri, "registered_model": known[0]})
    asked = f"there is no model {model} in" if model is not None else "--model is not given, for"
    raise ConfigError(f"{asked} MLflow at {uri}; it has {', '.join(known) or 'none'}.")


def _registry(given: Mapping[str, str | None]) -> RegistryConfig:
    try:
        return RegistryConfig.model_validate(given)
    except ValidationError as error:
        raise ConfigError("\n".join(explain(error, RegistryConfig))) from None


def check_version(registry: RegistryConfig, version: str) -> None:
    """Raise ConfigError, with those that there are, when the registered model has no such version."""
    client, name = connect(registry), registry.registered_model
    with speaking_to(address(registry)):
        known = version_numbers(client, name)
    if version not in known:
        raise ConfigError(f"{name} has no version {version}; it has {', '.join(known) or 'none'}.")


def tag_version(registry: RegistryConfig, version: str, tags: Mapping[str, str]) -> None:
    """Set or replace tags of a version."""
    client = connect(registry)
    with speaking_to(address(registry)):
        for key, value in tags.items():
            client.set_model_version_tag(registry.registered_model, version, key, value[:TAG_CHARACTERS])


def describe_version(registry: RegistryConfig, version: str, text: str) -> None:
    """Set or replace the description of a version, in Markdown."""
    client = connect(registry)
    with speaking_to(address(registry)):
        client.update_model_version(registry.registered_model, version, text)


def aliases_of(registry: RegistryConfig, version: str) -> tuple[str, ...]:
    """The aliases that point at a version now."""
    client = connect(registry)
    with speaking_to(address(registry)):
        aliases = aliases_by_name(client, registry.registered_model)
    return tuple(sorted(alias for alias, points_at in aliases.items() if points_at == version))


def champion(registry: RegistryConfig) -> Champion | None:
    """The version in use, or None while there is none."""
    client, uri, name = connect(registry), address(registry), registry.registered_model
    with speaking_to(uri):
        version = aliases_by_name(client, name).get(CHAMPION)
    if version is None:
        return None
    return Champion(version, _fetch(client, uri, name, version))


def fitting_champion(config: RunConfig, base: BaseModel) -> Champion | None:
    """As `champion`; raises ConfigError when it cannot be compared with what this configuration trains."""
    current = champion(config.registry)
    faults = misfits(current.folder, base) if current else []
    if current and faults:
        raise ConfigError(
            f"the champion of {config.registry.registered_model}, version {current.version}, cannot be compared with "
            f"this run: {'; '.join(faults)}. Use its base, or another registry.registered_model."
        )
    return current


def resolve_adapter(reference: str, registry: RegistryConfig) -> Path:
    """The folder of an adapter: a path, `models:/<name>@<alias>` or `models:/<name>/<version>`.

    Raises ConfigError when there is no such folder, name, alias or version.
    """
    if not reference.startswith("models:/"):
        folder = folder_at(reference)
        if folder is None:
            raise ConfigError(f"model.adapter is {reference!r:.200}: no such folder. {FORMS}")
        return folder
    _, name, version = pin_adapter(reference, registry).split("/")
    return _fetch(connect(registry), address(registry), name, version)


def pin_adapter(reference: str, registry: RegistryConfig) -> str:
    """The reference with an alias replaced by the version it points at now; raises ConfigError as above."""
    if not reference.startswith("models:/"):
        return reference
    parts = REFERENCE.fullmatch(reference)
    if parts is None:
        raise ConfigError(f"model.adapter is {reference!r:.200}. {FORMS}")
    client, uri, name = connect(registry), address(registry), parts["name"]
    with speaking_to(uri):
        known = {f"@{alias}": version for alias, version in aliases_by_name(client, name).items()}
        known |= {f"/{v.version}": str(v.version) for v in _versions(client, name)}
    if parts["which"] not in known:
        there = f"has of {name} only {', '.join(sorted(known))}" if known else f"has no model {name}"
        raise ConfigError(f"model.adapter is {reference!r}; MLflow at {uri} {there}. {FORMS}")
    return f"models:/{name}/{known[parts['which']]}"


def _ensure_registered_model(client: Any, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def aliases_by_name(client: Any, name: str) -> dict[str, str]:
    """Alias -> version of a registered model; empty when there is no such model."""
    from mlflow.exceptions import MlflowException

    try:
        return {alias: str(version) for alias, version in client.get_registered_model(name).aliases.items()}
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return {}


def version_numbers(client: Any, name: str) -> list[str]:
    """The numbers of all versions of a registered model, the oldest first."""
    return [str(number) for number in sorted(int(version.version) for version in _versions(client, name))]


def _put_files(client: Any, version: Any, files: Mapping[str, bytes]) -> None:
    """Upload files beside what a version holds."""
    if not files:
        return
    experiment_id = client.get_run(version.run_id).info.experiment_id
    # A version does not tell its logged model, but has its place.
    logged = client.search_logged_models([experiment_id], filter_string=f"source_run_id = '{version.run_id}'")
    model_id = next((model.model_id for model in logged if model.artifact_location == version.source), None)
    if model_id is None:
        raise RunError(
            f"the logged model of version {version.version} is no longer in MLflow. Train anew, under another --name."
        )
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            Path(folder, name).write_bytes(content)
        client.log_model_artifacts(model_id, folder)


def _versions(client: Any, name: str) -> list[Any]:
    return list(client.search_model_versions(f"name='{name}'"))


def _identity(version: Any) -> tuple[str, str | None]:
    return version.run_id, version.tags.get("adapter_sha256")


def _create_version(client: Any, config: RunConfig, run_id: str, checkpoint: Path, tags: Mapping[str, str]) -> Any:
    """Upload the adapter as a logged model of the MLflow run, and make it a version."""
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus
    from mlflow.models import Model

    metadata = read_json(checkpoint / METADATA, "Run nestune train again.")
    experiment_id = client.get_run(run_id).info.experiment_id
    with unrepeated():
        logged = client.create_logged_model(experiment_id, config.name.replace(".", "-"), source_run_id=run_id)
    location, model_id = logged.artifact_location, logged.model_id
    model = Model(artifact_path=location, run_id=run_id, model_uuid=model_id, model_id=model_id)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "model")
        _save_model(model, config, metadata, checkpoint, folder)
        client.log_model_artifacts(model_id, str(folder))
    client.finalize_logged_model(model_id, LoggedModelStatus.READY)
    client.log_outputs(run_id, [LoggedModelOutput(model_id, step=int(metadata["step"]))])
    name = config.registry.registered_model
    with unrepeated():  # a version whose answer got lost is found by the next attempt
        return client.create_model_version(name, location, run_id=run_id, tags=dict(tags), model_id=model_id)


def _save_model(model: Any, config: RunConfig, metadata: Mapping[str, Any], checkpoint: Path, folder: Path) -> None:
    """Write an MLflow model: the adapter with its metadata, the code that serves it, and where the base is."""
    from mlflow import pyfunc
    from mlflow.models.model import MLMODEL_FILE_NAME
    from mlflow.types import DataType, ParamSchema, ParamSpec

    adapter = folder.with_name("adapter")
    adapter.mkdir()
    for file in adapter_files(checkpoint):
        shutil.copyfile(file, adapter / file.name)
    settings = {
        "base": config.model.base,
        "revision": config.model.revision,
        "base_sha256": str(metadata["base"]["sha256"]),
        "dtype": config.model.dtype,
        "precision": config.training.precision,
        "lora": config.lora.model_dump(mode="json"),
    }
    # MLflow warns, whatever the filters say, that it cannot check questions of more than one type; `serving` does.
    with environment_defaults(MODEL_SETTINGS), warnings.catch_warnings(record=True):
        pyfunc.save_model(
            path=str(folder),
            mlflow_model=model,
            python_model=str(SERVED_MODEL),
            artifacts={"adapter": str(adapter)},
            model_config=settings,
            pip_requirements=[f"{package}=={_installed(package)}" for package in REQUIREMENTS[metadata["backend"]]],
        )
    # Of parameters it learns only by an example that it runs, for which the base would have to be loaded.
    default = ParamSpec(MAX_TOKENS, DataType.long, config.evaluation.max_answer_tokens)
    model.signature.params = ParamSchema([default])
    model.save(str(folder / MLMODEL_FILE_NAME))


def _installed(package: str) -> str:
    """The version that is installed, without a local label such as +cpu, which is on no package index."""
    return installed_version(package.partition("[")[0]).partition("+")[0]


def _fetch(client: Any, uri: str, name: str, version: str) -> Path:
    """The adapter's folder of a version: in place where the artifacts are local, else a temporary copy.

    Raises RunError when its weights are not those that were registered.
    """
    from mlflow.artifacts import download_artifacts

    with speaking_to(uri), environment_defaults(MODEL_SETTINGS):
        source = client.get_model_version_download_uri(name, version)
        folder = Path(download_artifacts(artifact_uri=f"{source}/artifacts/adapter", tracking_uri=client.tracking_uri))
        registered = client.get_model_version(name, version).tags.get("adapter_sha256")
    found = sha256_file(folder / WEIGHTS)
    if registered not in (None, found):
        raise RunError(
            f"models:/{name}/{version}: the adapter at {source} has sha256 {found[:12]}, registered was "
            f"{registered[:12]}. Restore its files, or move the alias to another version."
        )
    return folder
