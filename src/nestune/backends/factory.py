"""Which backend trains: the one place that knows them all, and imports none before it is asked for."""

from importlib.util import find_spec

from nestune.backends.base import Backend
from nestune.config import RunConfig
from nestune.errors import ConfigError


def make_backend(config: RunConfig) -> Backend:
    """The backend that the configuration asks for, with its base model loaded and a new adapter on it.

    auto: PyTorch. Raises ConfigError when the framework is not installed.
    """
    check_backend(config)
    from nestune.backends.torch_backend import TorchBackend

    return TorchBackend(config)


def check_backend(config: RunConfig) -> None:
    """Raise ConfigError when the configured backend is not there or its packages are not installed."""
    if config.model.backend == "mlx":
        raise ConfigError("model.backend is 'mlx'; this version trains with torch only. Set it to auto or torch.")
    missing = [package for package in ("torch", "peft") if find_spec(package) is None]
    if missing:
        raise ConfigError(
            f"the torch backend needs {' and '.join(missing)}; install it with: pip install 'nestune[cuda]'"
        )
