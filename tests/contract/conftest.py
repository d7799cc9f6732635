"""Every backend passes the same tests, on the demo's base model, or a smaller one, and random tokens."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nestune.backends.base import Backend
from nestune.backends.factory import make_backend
from nestune.config import RunConfig, TierConfig, parse_config
from nestune.data.batches import Batch
from nestune.tiers.tier_map import TierMap, assign_tiers

BASE = Path(__file__).parents[2] / "demo" / "base"
VOCABULARY = 300

MakeBackend = Callable[..., Backend]


def configuration(backend: str, *, base: Path = BASE, **blocks: dict[str, Any]) -> RunConfig:
    """A configuration on the demo's base, or another, with three tiers; its data is never read."""
    content: dict[str, Any] = {
        "name": "contract",
        "model": {"base": str(base), "backend": backend},
        "data": {"train": str(BASE / "config.json")},
    }
    if blocks.get("retention", {}).get("start") == "continue":
        # Named, as it must be, and never looked for: the tests begin from folders of their own.
        content["model"]["adapter"] = "models:/parent@champion"
    tiers = {"update_every": [1, 2, 4]} | blocks.pop("tiers", {})
    return parse_config(content | {"tiers": tiers} | blocks)


@pytest.fixture(params=["torch", "mlx"])
def backend_name(request: pytest.FixtureRequest) -> str:
    # First, also for MLX: what MLX computes with would change PyTorch's rounding (nestune.backends.mlx_blas).
    pytest.importorskip("torch")
    pytest.importorskip(request.param)
    return str(request.param)


@pytest.fixture
def make(backend_name: str) -> MakeBackend:
    """Makes a backend of a configuration's blocks, its tiers assigned and its optimizers ready."""

    def prepared(**blocks: Any) -> Backend:
        config = configuration(backend_name, **blocks)
        backend = make_backend(config)
        backend.prepare_training(tier_map_for(backend, config.tiers).tier_of)
        return backend

    return prepared


@pytest.fixture(scope="session")
def small_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of four narrow layers with random weights, and the demo's tokenizer."""
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("small") / "base"
    shutil.copytree(BASE, folder, ignore=shutil.ignore_patterns("model.safetensors"))
    settings = json.loads((BASE / "config.json").read_text())
    settings |= {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 4,
        "layer_types": ["full_attention"] * 4,
    }
    (folder / "config.json").write_text(json.dumps(settings))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    # What it was made with, also where Transformers writes no top-level rope_theta, which mlx-lm reads.
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def tier_map_for(backend: Backend, tiers: TierConfig) -> TierMap:
    """The map that a configuration asks for; importances are measured on three steps of random tokens."""
    importance = None
    if tiers.strategy == "parameter_importance":
        steps = ([random_batch(seed)] for seed in range(3))
        importance = backend.measure_importance(steps, tiers.importance.measure)
    return assign_tiers(backend.lora_parameters(), tiers, importance)


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
