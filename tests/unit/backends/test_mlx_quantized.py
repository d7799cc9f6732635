"""A base that mlx-lm has quantized to 4 bits: trained, saved, loaded by mlx-lm, and refused by PyTorch."""

from pathlib import Path

import fast_mlx  # noqa: F401 - before mlx
import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_flatten
from tests.contract.conftest import BASE, configuration, random_batch

from nestune.backends.base import Backend
from nestune.backends.factory import make_backend
from nestune.backends.mlx_backend import MlxBackend
from nestune.errors import ConfigError
from nestune.tiers.schedule import TierSchedule
from nestune.tiers.tier_map import assign_tiers

TOKENS = list(range(3, 40))


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from mlx_lm import convert

    folder = tmp_path_factory.mktemp("quantized") / "base"
    convert(str(BASE), str(folder), quantize=True, q_bits=4, q_group_size=32)
    return folder


def prepared(base: Path, precision: str = "float32") -> MlxBackend:
    config = configuration("mlx", base=base, training={"precision": precision})
    backend = MlxBackend(config)
    backend.prepare_training(assign_tiers(backend.lora_parameters(), config.tiers).tier_of)
    return backend


@pytest.fixture
def backend(quantized: Path) -> MlxBackend:
    return prepared(quantized)


def train(backend: Backend, steps: int = 8) -> None:
    for step in range(1, steps + 1):
        backend.train_step([random_batch(step)], TierSchedule((1, 2, 4)).due(step), 2e-3)


def test_the_adapter_has_the_shapes_of_the_matrices_that_were_quantized(backend: MlxBackend) -> None:
    assert isinstance(backend._held["layers.0.self_attn.q_proj.lora_a"].module.linear, nn.QuantizedLinear)
    assert backend._body is not backend._model, "the head is not apart"
    whole = make_backend(configuration("mlx"))
    assert backend.lora_parameters() == whole.lora_parameters()
    assert {n: w.dtype for n, w in backend.weights().items()} == dict.fromkeys(whole.weights(), np.dtype(np.float32))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_moves_the_adapter_and_no_bit_of_the_base(quantized: Path, precision: str) -> None:
    backend = prepared(quantized, precision)

    def base() -> dict[str, bytes]:
        frozen = {n: v for n, v in tree_flatten(backend._model.parameters()) if ".lora_" not in n}
        return {name: np.array(values.view(mx.uint8)).tobytes() for name, values in frozen.items()}

    before, batch = base(), random_batch(3, rows=1)
    untrained, first = backend.weights(), backend.loss([batch]).mean
    assert any(name.endswith("q_proj.linear.scales") for name in before)
    for _ in range(5):
        backend.train_step([batch], frozenset({0, 1, 2}), 5e-3)
    assert base() == before
    assert {name for name, values in backend.weights().items() if (values != untrained[name]).any()} == set(untrained)
    assert backend.loss([batch]).mean < 0.9 * first


def test_only_due_tiers_move(backend: MlxBackend) -> None:
    train(backend, 4)
    before = backend.weights()
    backend.train_step([random_batch(5)], frozenset({0}), 1e-3)
    moved = {name for name, values in backend.weights().items() if (values != before[name]).any()}
    assert moved == {p.name for p in backend.lora_parameters() if p.layer in (4, 5)}


def test_mlx_lm_loads_the_saved_adapter_on_it_with_the_same_logits(
    backend: MlxBackend, quantized: Path, tmp_path: Path
) -> None:
    from mlx_lm import load

    untrained = backend.logits(TOKENS)
    train(backend)
    backend.save_adapter(tmp_path)
    logits = backend.logits(TOKENS)
    assert np.abs(logits - untrained).max() > 0.1
    model, *_ = load(str(quantized), adapter_path=str(tmp_path))
    theirs = np.array(model(mx.array([TOKENS]))[0].astype(mx.float32))
    np.testing.assert_allclose(logits, theirs, atol=1e-4)

    other = prepared(quantized)
    assert np.abs(other.logits(TOKENS) - untrained).max() == 0
    other.load_adapter(tmp_path)
    assert (other.logits(TOKENS) == logits).all()


def test_pytorch_refuses_it_with_what_to_do(quantized: Path) -> None:
    with pytest.raises(ConfigError, match=r"quantized for MLX \(4 bits\).*model\.backend: mlx, or take the base"):
        make_backend(configuration("torch", base=quantized))
