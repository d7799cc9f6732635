"""What the libraries find in the environment, unless the user has said otherwise: no telemetry, no chatter."""

import os

DEFAULTS = {
    "DO_NOT_TRACK": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    # Warnings stand in the log of the flow run.
    "PREFECT_LOGGING_EXTRA_LOGGERS": "nestune",
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DVC_NO_ANALYTICS": "1",
    "GX_ANALYTICS_ENABLED": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    # A busy machine needs more than Prefect's 20 seconds to start its temporary server.
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
}


def set_defaults() -> None:
    """Set what the environment does not set; entry points call it before those libraries are imported."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
