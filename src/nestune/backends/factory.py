"""Which backend trains: the one place that knows them all, and imports none before it is asked for."""

from nestune.backends.base import Backend
from nestune.config import RunConfig
from nestune.errors import ConfigError


def make_backend(config: RunConfig) -> Backend:
    """The backend that the configuration asks for, with its base model loaded and a new adapter on it.

    auto: PyTorch. Raises ConfigError when the framework is not installed.
    """
    if config.model.backend == "mlx":
        raise ConfigError("model.backend is 'mlx'; this version trains with torch only. Set it to auto or torch.")
    try:
        from nestune.backends.torch_backend import TorchBackend
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the torch backend needs {error.name}; install it with: pip install 'nestune[cuda]'"
        ) from None
    return TorchBackend(config)
