"""The way to MLflow: which store a configuration means, and what the user is told when it fails."""

import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from nestune.config import RegistryConfig
from nestune.errors import ConfigError, RunError, ServiceError

DEFAULT_TRACKING_URI = "sqlite:///mlflow/mlflow.db"
TRACKING_URI = "MLFLOW_TRACKING_URI"
HTTP = ("http://", "https://")
# MLflow's pages of trainings; without it, it shows those for traces of prompts.
OF_TRAINING = "?workflowType=machine_learning"
RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
# MLflow's own patience with a server that is down is minutes; a setting of the user's environment wins.
IMPATIENT = {RETRIES: "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
# What the reason is, at the end of all the layers through which requests passes it on.
UNREACHED = re.compile(
    r"Max retries exceeded with url.*?(?P<why>Connection refused|Read timed out|timed out|Name or "
    r"service not known|Temporary failure in name resolution|No route to host)"
)
SECRETS = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME")


def tracking_uri(registry: RegistryConfig) -> str:
    """The MLflow server or database that is meant; MLFLOW_TRACKING_URI where the configuration names none, else SQLite
    below the current folder.

    Raises ConfigError when that variable holds a password: where a run is tracked is kept, logged and shown.
    """
    if registry.tracking_uri:
        return registry.tracking_uri
    told = os.environ.get(TRACKING_URI)
    if not told:
        return DEFAULT_TRACKING_URI
    try:
        RegistryConfig(tracking_uri=told)
    except ValidationError as error:
        # Without the message's end, which pydantic fills with the value.
        raise ConfigError(f"{TRACKING_URI}: {error.errors()[0]['ctx']['error']}.") from None
    return told


def connect(registry: RegistryConfig) -> Any:
    """An MlflowClient that has had an answer. Raises ServiceError, within seconds, when none comes."""
    from mlflow import MlflowClient

    uri = tracking_uri(registry)
    with speaking_to(uri), impatience():
        path = _sqlite_path(uri)
        # MLflow remembers stores by address; a relative one would mean another database in another folder.
        store = uri if path is None else f"sqlite:///{path.absolute()}"
        _reach_database(store)
        client = MlflowClient(tracking_uri=store, registry_uri=store)
        client.search_experiments(max_results=1)
    return client


@contextmanager
def speaking_to(uri: str) -> Iterator[None]:
    """Turn what MLflow, its database, its disk or the network raise into a ServiceError that names the store.

    What the environment says to log in with is not in its text.
    """
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        with _database_errors_unlogged():
            yield
    except (MlflowException, SQLAlchemyError, OSError) as error:  # those of requests are OSErrors
        told, secret = _without_secrets(_first_line(error))
        remedy = (
            "See that the server runs and that this machine reaches it"
            if uri.startswith(HTTP)
            else "See that the database is there, whole and writable"
        )
        raise ServiceError(
            f"MLflow at {uri} fails: {told.rstrip('.')}. {remedy}, or correct registry.tracking_uri."
        ) from (None if secret else error)


def impatience() -> Any:
    """A context in which a server that is down is noticed within seconds."""
    return environment_defaults(IMPATIENT)


@contextmanager
def unrepeated() -> Iterator[None]:
    """Within it no request is repeated, whatever the environment says.

    MLflow repeats one whose answer got lost, though the server may have done it: a run or a number would be there
    twice.
    """
    before = os.environ.get(RETRIES)
    os.environ[RETRIES] = "0"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(RETRIES, None)
        else:
            os.environ[RETRIES] = before


@contextmanager
def environment_defaults(values: Mapping[str, str]) -> Iterator[None]:
    """Set those environment variables that are not set; MLflow has no other way to be told some things."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def find_experiment(client: Any, registry: RegistryConfig) -> str:
    """The id of the configured experiment, which is made when it is new.

    The artifacts of a SQLite store lie beside its database; other stores decide for themselves.
    """
    from mlflow.exceptions import MlflowException

    name = registry.experiment
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, artifact_location=artifact_location(tracking_uri(registry))))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)  # another run made it in between
    if found.lifecycle_stage == "deleted":
        raise RunError(
            f"registry.experiment {name!r} is deleted in MLflow. Restore it with "
            f"mlflow experiments restore --experiment-id {found.experiment_id}, or name another one."
        )
    return str(found.experiment_id)


@contextmanager
def _database_errors_unlogged() -> Iterator[None]:
    """MLflow logs a traceback of each error of its database besides raising it."""
    logger = logging.getLogger("mlflow.store.db.utils")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _first_line(error: Exception) -> str:
    """What an error says, but for SQLAlchemy's remarks on how it came about and the statement that failed."""
    lines = [line for line in str(error).strip().splitlines() if not line.startswith("(raised as a result")]
    told = lines[0] if lines else type(error).__name__
    unreached = UNREACHED.search(told)
    return f"it is not reached: {unreached['why']}" if unreached else told


def _without_secrets(text: str) -> tuple[str, bool]:
    """The text with stars in place of what nobody may read, and whether it was in there."""
    secrets = {os.environ.get(name, "").strip() for name in SECRETS} - {""}
    cleaned = text
    for secret in sorted(secrets, key=len, reverse=True):
        cleaned = cleaned.replace(secret, "***")
    return cleaned, cleaned != text


def _reach_database(uri: str) -> None:
    """Open a database once; MLflow would try ten times, over minutes."""
    from mlflow.store.db.db_types import DATABASE_ENGINES
    from sqlalchemy import create_engine, inspect

    if uri.partition(":")[0].partition("+")[0] not in DATABASE_ENGINES:
        return
    path = _sqlite_path(uri)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(uri)
    try:
        inspect(engine)
    finally:
        engine.dispose()


def artifact_location(uri: str) -> str | None:
    """Where the artifacts of a new experiment lie: beside a SQLite database; None: where the store decides."""
    path = _sqlite_path(uri)
    return None if path is None else str(path.absolute().parent / "artifacts")


def _sqlite_path(uri: str) -> Path | None:
    from sqlalchemy.engine import make_url

    if not uri.startswith("sqlite:"):
        return None
    database = make_url(uri).database
    return Path(database) if database else None
