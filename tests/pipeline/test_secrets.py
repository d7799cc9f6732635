"""Secrets of the environment stay there: none is in any file that a run writes, nor on the screen."""

from pathlib import Path

import pytest
from tests.pipeline.conftest import Configured, run_python

SECRETS = {
    "MLFLOW_TRACKING_USERNAME": "canary-user-4f1c",
    "MLFLOW_TRACKING_PASSWORD": "canary-password-9a7e",
    "MLFLOW_TRACKING_TOKEN": "canary-token-51d3",
    "MLFLOW_AUTH_ADMIN_PASSWORD": "canary-admin-77b0",
    "AWS_ACCESS_KEY_ID": "canary-key-id-1b2c",
    "AWS_SECRET_ACCESS_KEY": "canary-aws-secret-c02d",
    "AZURE_STORAGE_CONNECTION_STRING": "canary-azure-e81f",
    "HF_TOKEN": "hf_canaryhuggingface6d5e",
    "PREFECT_API_KEY": "canary-prefect-key-3c9a",
    "PREFECT_API_AUTH_STRING": "admin:canary-prefect-auth-8e44",
    "PGPASSWORD": "canary-postgres-2f6b",
    "A_SECRET_OF_THE_SHELL": "canary-shell-aa19",
}


def found_in(content: bytes) -> list[str]:
    return [
        name for name, secret in SECRETS.items() if secret.encode() in content or secret.encode("utf-16-le") in content
    ]


def test_no_secret_of_the_environment_is_in_a_file_or_on_the_screen(
    configured: Configured, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, secret in SECRETS.items():
        monkeypatch.setenv(name, secret)
    data = {"retention": {"skill": "data/general/skill.jsonl"}}
    config = configured(training={"steps": 2, "eval_every": 2}, data=data, retention={"replay": {"files": []}})
    done = run_python("-m", "nestune.cli", "run", "--config", config)
    assert found_in((done.stdout + done.stderr).encode()) == []
    files = [path for path in project.rglob("*") if path.is_file() and not path.is_symlink()]
    assert {"mlflow.db", "config.yaml", "manifest.json", "adapters.safetensors", "MLmodel"} <= {
        path.name for path in files
    }
    assert {str(path): found for path in files if (found := found_in(path.read_bytes()))} == {}


def test_a_secret_is_found_where_there_is_one() -> None:
    assert found_in(b"x canary-shell-aa19 y") == ["A_SECRET_OF_THE_SHELL"]


@pytest.mark.parametrize(
    "override",
    [
        "registry.tracking_uri=https://me:canary-shell-aa19@host/",
        "registry.tracking_uri=https://canary-shell-aa19@host/",
        "registry.tracking_uri=postgresql://me:canary-shell-aa19/x@host/db",
        "registry.tracking_uri=https://host/?password=canary-shell-aa19",
        "registry.tracking_uri=https://host/?a=1&access_token=canary-shell-aa19",
        "model.base=https://me:canary-shell-aa19@host/model",
        "model=https://me:canary-shell-aa19@host/model",
        "model.adapter=https://canary-shell-aa19@host/a/b/c",
        "data.train=https://me:canary-shell-aa19@host/train.jsonl",
        "data.valid=https://me:canary-shell-aa19@host/valid.jsonl",
        "data.retention={old: 'https://me:canary-shell-aa19@host/old.jsonl'}",
        "registry={tracking_uri: 'https://me:canary-shell-aa19@host', 1: 2}",
        "nonsense=[https://me:canary-shell-aa19@host",
    ],
)
def test_a_configuration_with_a_password_is_refused_and_the_error_does_not_show_it(
    configured: Configured, override: str, capfd: pytest.CaptureFixture[str]
) -> None:
    from nestune.cli import main

    assert main(["validate", "--config", str(configured()), "--set", override]) == 2
    told = capfd.readouterr()
    assert "error: " in told.err
    assert found_in((told.out + told.err).encode()) == []
