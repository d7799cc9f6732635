"""Tensors as safetensors files store them, against PyTorch's bfloat16 and the safetensors library."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from nestune.export.tensors import as_float32, cast, read_tensors, store, write_tensors


@pytest.fixture
def stored(tmp_path: Path) -> tuple[dict[str, torch.Tensor], Path]:
    """One tensor of each kind, odd sizes and an empty one among them, in a file."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(7, 5, generator=generator)
    tensors = {
        "bfloat16": values.bfloat16(),
        "float16": values.half(),
        "float32": values,
        "whole numbers": torch.arange(3),
        "truths": torch.tensor([True, False, True]),
        "empty": torch.zeros(0, 4),
        "one number": torch.tensor(2.5),
    }
    save_file(tensors, tmp_path / "from.safetensors")
    return tensors, tmp_path / "from.safetensors"


def test_a_file_that_is_read_and_written_again_holds_the_same_tensors(
    stored: tuple[dict[str, torch.Tensor], Path], tmp_path: Path
) -> None:
    tensors, path = stored
    write_tensors(tmp_path / "to.safetensors", read_tensors(path))
    again = load_file(tmp_path / "to.safetensors")
    assert again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert again[name].dtype == tensor.dtype
        assert again[name].shape == tensor.shape
        assert torch.equal(again[name], tensor)


def test_float32_holds_every_float_exactly(stored: tuple[dict[str, torch.Tensor], Path]) -> None:
    tensors, path = stored
    read = read_tensors(path)
    for name in ("bfloat16", "float16", "float32"):
        assert np.array_equal(as_float32(read[name]), tensors[name].float().numpy())


@pytest.mark.parametrize(("dtype", "theirs"), [("BF16", torch.bfloat16), ("F16", torch.float16)])
def test_values_are_rounded_as_pytorch_rounds_them(dtype: str, theirs: torch.dtype) -> None:
    generator = np.random.default_rng(0)
    random = (generator.standard_normal(100_000) * 10.0 ** generator.integers(-4, 4, 100_000)).astype(np.float32)
    ties = (np.arange(1, 200, dtype=np.uint32) * 0x8000 + 0x3F800000).view(np.float32)
    values = np.concatenate([random, ties, -ties, np.array([0.0, -0.0, 1e-42], np.float32)])
    expected = torch.from_numpy(values).to(theirs).view(torch.uint16).numpy()
    assert np.array_equal(store(values, dtype).view(np.uint16), expected)


def test_a_cast_changes_floats_only(stored: tuple[dict[str, torch.Tensor], Path], tmp_path: Path) -> None:
    tensors, path = stored
    write_tensors(tmp_path / "to.safetensors", {name: cast(t, "BF16") for name, t in read_tensors(path).items()})
    again = load_file(tmp_path / "to.safetensors")
    for name, tensor in tensors.items():
        expected = tensor.bfloat16() if tensor.is_floating_point() else tensor
        assert again[name].dtype == expected.dtype
        assert torch.equal(again[name], expected)
