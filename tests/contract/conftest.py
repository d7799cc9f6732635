"""Every backend passes the same tests, on the demo's base model and random tokens."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nestune.backends.base import Backend
from nestune.backends.factory import make_backend
from nestune.config import RunConfig, parse_config
from nestune.data.batches import Batch

BASE = Path(__file__).parents[2] / "demo" / "base"
VOCABULARY = 300

MakeBackend = Callable[..., Backend]


def configuration(backend: str, **blocks: dict[str, Any]) -> RunConfig:
    """A configuration on the demo's base; its data is never read."""
    content: dict[str, Any] = {
        "name": "contract",
        "model": {"base": str(BASE), "backend": backend},
        "data": {"train": str(BASE / "config.json")},
    }
    return parse_config(content | blocks)


@pytest.fixture(params=["torch"])
def backend_name(request: pytest.FixtureRequest) -> str:
    pytest.importorskip(request.param)
    return str(request.param)


@pytest.fixture
def make(backend_name: str) -> MakeBackend:
    """Makes a backend of a configuration's blocks, its tiers assigned and its optimizers ready."""
    from nestune.tiers.tier_map import assign_tiers

    def prepared(**blocks: Any) -> Backend:
        config = configuration(backend_name, **blocks)
        backend = make_backend(config)
        backend.prepare_training(assign_tiers(backend.lora_parameters(), config.tiers).tier_of)
        return backend

    return prepared


def random_batch(seed: int, rows: int = 4, width: int = 12) -> Batch:
    """Rows of random length and tokens, of which the last third of each is supervised."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(width // 2, width + 1, size=rows).astype(np.int32)
    positions = np.arange(width)
    tokens = generator.integers(3, VOCABULARY, size=(rows, width)).astype(np.int32)
    tokens[positions >= lengths[:, None]] = 0
    supervised = (positions >= lengths[:, None] * 2 // 3) & (positions < lengths[:, None])
    supervised[:, 0] = False
    return Batch(tokens, supervised, lengths)
