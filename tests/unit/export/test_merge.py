"""Merging where the base does not hold what the adapter adapts."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from nestune.config import LoraConfig
from nestune.errors import ConfigError
from nestune.export.merge import merge, read_weights

NAME = "model.layers.0.mlp.up_proj"
LORA = LoraConfig(rank=2, alpha=6.0)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A (2, 3) and B (5, 2) for one module."""
    generator = np.random.default_rng(0)
    a, b = generator.standard_normal((2, 3), np.float32), generator.standard_normal((5, 2), np.float32)
    key = f"base_model.model.{NAME}.lora_%s.weight"
    save_file({key % "A": a, key % "B": b}, tmp_path / "adapter_model.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    "weights",
    [
        {f"{NAME}.weight": np.zeros((3, 5), np.float32)},
        {f"other.{NAME}.weight": np.zeros((5, 3), np.float32)},
        {f"{NAME}.weight": np.zeros((5, 3), np.int8)},
    ],
    ids=["turned round", "under another name", "no floats"],
)
def test_an_adapter_that_would_not_be_merged_is_refused(weights: dict[str, np.ndarray], adapter: Path) -> None:
    save_file(weights, adapter / "model.safetensors")
    with pytest.raises(ConfigError, match=rf"1 of the adapter's 1 modules, first {NAME}\.weight.*--to peft"):
        merge(read_weights(adapter), adapter, LORA, "auto")


def test_without_an_index_all_model_files_count(adapter: Path) -> None:
    save_file({f"{NAME}.weight": np.zeros((5, 3), np.float32)}, adapter / "model-00001-of-00002.safetensors")
    save_file({"model.norm.weight": np.zeros(3, np.float32)}, adapter / "model-00002-of-00002.safetensors")
    merged = merge(read_weights(adapter), adapter, LORA, "auto")
    assert {file: list(tensors) for file, tensors in merged.items()} == {
        "model-00001-of-00002.safetensors": [f"{NAME}.weight"],
        "model-00002-of-00002.safetensors": ["model.norm.weight"],
    }
