"""What keeps CUDA to the same bits: attention's exact backward pass, and where a model has none."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.contract.conftest import configuration, random_batch
from tests.unit.backends.small_bases import write_base
from transformers import AutoModelForCausalLM

from nestune.backends.torch_backend import TorchBackend
from nestune.backends.torch_repeatable import passes_back_strictly, strictly
from nestune.tiers.tier_map import assign_tiers

on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="only CUDA adds up in any order")


class PutsBack(torch.autograd.Function):
    """The identity, with a gradient that comes by `put_`, which has no exact form on any device."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        places = torch.arange(gradient.numel(), device=gradient.device)
        return torch.zeros_like(gradient).put_(places, gradient.flatten())


def with_inexact_layer(causal: Any) -> Any:
    causal.model.norm.register_forward_hook(lambda _module, _inputs, output: PutsBack.apply(output))
    return causal


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Its heads are wide enough for every kind of attention that PyTorch has on CUDA."""
    sizes = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 8}
    return write_base(tmp_path / "base", "qwen2", max_position_embeddings=2048, **sizes)


def test_an_operation_without_an_exact_form_is_refused_strictly_and_only_then() -> None:
    before = torch.get_deterministic_debug_mode()
    x = torch.ones(3, requires_grad=True)
    with strictly(), pytest.raises(RuntimeError, match="deterministic"):
        PutsBack.apply(x).sum().backward()
    assert torch.get_deterministic_debug_mode() == before
    PutsBack.apply(x).sum().backward()
    assert x.grad is not None


def test_a_model_is_found_to_pass_back_strictly_or_not_and_keeps_no_gradient(base: Path) -> None:
    causal = AutoModelForCausalLM.from_pretrained(base)
    assert passes_back_strictly(causal)
    assert not passes_back_strictly(with_inexact_layer(causal))
    assert all(parameter.grad is None for parameter in causal.parameters())


def trained(base: Path, **blocks: Any) -> dict[str, bytes]:
    """The weights after steps on rows that are long enough for CUDA to divide attention's sums."""
    config = configuration("torch", base=base, **blocks)
    backend = TorchBackend(config)
    backend.prepare_training(assign_tiers(backend.lora_parameters(), config.tiers).tier_of)
    for step in range(4):
        backend.train_step([random_batch(step, rows=1, width=2048)], frozenset({0, 1, 2}), 1e-3)
    return {name: values.tobytes() for name, values in backend.weights().items()}


@on_cuda
@pytest.mark.parametrize("gradient_checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_long_rows_give_the_same_bits_each_time(base: Path, precision: str, gradient_checkpointing: bool) -> None:
    training = {"precision": precision, "gradient_checkpointing": gradient_checkpointing}
    first = trained(base, training=training)
    assert all(trained(base, training=training) == first for _ in range(3))


@on_cuda
def test_a_base_that_cannot_repeat_itself_trains_with_a_warning(
    base: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from nestune.backends import torch_backend

    load = torch_backend.load_base
    monkeypatch.setattr(torch_backend, "load_base", lambda *arguments: with_inexact_layer(load(*arguments)))
    with caplog.at_level(logging.WARNING, logger="nestune"):
        trained(base)
    assert "does not give the same bits each time" in caplog.text
