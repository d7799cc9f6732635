"""Which backend trains: the one place that knows them all, and imports none before it is asked for."""

import json
import platform
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

from nestune.backends.base import Backend
from nestune.base_model import resolve_base
from nestune.config import RunConfig
from nestune.errors import ConfigError

PACKAGES = {"torch": ("torch", "peft"), "mlx": ("mlx", "mlx_lm")}
EXTRAS = {"torch": "cuda", "mlx": "mlx"}


@dataclass(frozen=True)
class Choice:
    """The framework that trains, and why it is this one."""

    name: Literal["torch", "mlx"]
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def choose_backend(config: RunConfig) -> Choice:
    """The backend that the configuration asks for; auto: MLX on Apple silicon, else PyTorch (CUDA, else the CPU).

    Where only one of the two is installed, or can read the base, auto takes that. Raises ConfigError when the packages
    are not installed, or there is no such base.
    """
    asked = config.model.backend
    if asked != "auto":
        missing = _missing(asked)
        if missing:
            raise ConfigError(
                f"the {asked} backend needs {' and '.join(missing)}; install it with: "
                f"pip install 'nestune[{EXTRAS[asked]}]'"
            )
        return Choice(asked, "as configured")
    apple_silicon = platform.system() == "Darwin" and platform.machine() == "arm64"
    if apple_silicon and not _missing("mlx"):
        return Choice("mlx", "auto: Apple silicon")
    if not _missing("mlx") and _quantized_by_mlx(config):
        return Choice("mlx", "auto: the base is quantized by MLX")
    if not _missing("torch"):
        return Choice("torch", "auto: MLX is not installed" if apple_silicon else "auto: no Apple silicon")
    if not _missing("mlx"):
        return Choice("mlx", "auto: PyTorch is not installed")
    raise ConfigError(
        "no backend is installed; install one with: pip install 'nestune[cuda]' (PyTorch), or 'nestune[mlx]' (MLX)"
    )


def make_backend(config: RunConfig) -> Backend:
    """The chosen backend, with its base model loaded and a new adapter on it; raises as `choose_backend`."""
    if choose_backend(config).name == "mlx":
        from nestune.backends.mlx_blas import load_fast_blas

        load_fast_blas()
        from nestune.backends.mlx_backend import MlxBackend

        return MlxBackend(config)
    from nestune.backends.torch_backend import TorchBackend

    return TorchBackend(config)


def accelerator(choice: Choice) -> str | None:
    """A name of the accelerator that a backend trains on, another one for each card; None: it trains on the CPU."""
    if choice.name == "mlx":
        from nestune.backends.mlx_blas import load_fast_blas

        load_fast_blas()
        import mlx.core as mx

        return "metal" if mx.default_device() == mx.gpu else None
    import torch

    return f"cuda-{torch.cuda.get_device_properties(0).uuid}" if torch.cuda.is_available() else None


def _quantized_by_mlx(config: RunConfig) -> bool:
    settings = (resolve_base(config.model).folder / "config.json").read_text(encoding="utf-8")
    return "quantization" in json.loads(settings)


def _missing(backend: str) -> list[str]:
    return [package for package in PACKAGES[backend] if find_spec(package) is None]
