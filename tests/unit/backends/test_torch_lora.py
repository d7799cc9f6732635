"""The short way of LoRA modules that need no gradient: the same output, taken only where nothing is lost."""

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.contract.conftest import configuration, random_batch
from torch import Tensor, nn

from nestune.backends.torch_backend import TorchBackend
from nestune.backends.torch_lora import control_lora
from nestune.tiers.tier_map import assign_tiers


def module(bias: bool = True, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A LoRA module of rank 3 and scale 7 / 3, with random A and B."""
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(12, 20, bias=bias, dtype=dtype))
    model = get_peft_model(inner, LoraConfig(r=3, lora_alpha=7, target_modules=["0"], lora_dropout=dropout))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    control_lora(model)
    return model.eval()


def takes_the_short_way(model: nn.Module, x: Tensor) -> bool:
    """PEFT calls A as a module, the short way takes its weights."""
    seen: list[str] = []
    handles = [
        part.register_forward_hook(lambda *_, name=name: seen.append(name))
        for name, part in model.named_modules()
        if name.endswith("lora_A.default")
    ]
    model(x)
    for handle in handles:
        handle.remove()
    return not seen


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(12,), (4, 12), (2, 5, 12)])
def test_the_short_way_gives_w_x_plus_scaled_b_a_x(shape: tuple[int, ...], bias: bool) -> None:
    model, x = module(bias), torch.randn(*shape)
    weights = {name: value.double() for name, value in model.state_dict().items()}
    key = "base_model.model.0."
    expected = x.double() @ weights[key + "base_layer.weight"].T
    if bias:
        expected = expected + weights[key + "base_layer.bias"]
    expected += 7 / 3 * x.double() @ weights[key + "lora_A.default.weight"].T @ weights[key + "lora_B.default.weight"].T
    with torch.no_grad():
        assert takes_the_short_way(model, x)
        torch.testing.assert_close(model(x).double(), expected, rtol=1e-5, atol=1e-5)


def no_gradients(model: nn.Module) -> nn.Module:
    return model.requires_grad_(False)


def trained(side: str) -> nn.Module:
    model = no_gradients(module())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(f"lora_{side}" in name)
    return model


LONG_WAYS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "only A is trained": lambda: (trained("A"), torch.randn(4, 12)),
    "only B is trained": lambda: (trained("B"), torch.randn(4, 12)),
    "a gradient passes through": lambda: (no_gradients(module()), torch.randn(4, 12, requires_grad=True)),
    "dropout is on": lambda: (no_gradients(module(dropout=0.5)).train(), torch.randn(4, 12)),
    "the base is of another type": lambda: (
        no_gradients(module(dtype=torch.bfloat16)),
        torch.randn(4, 12, dtype=torch.bfloat16),
    ),
}


@pytest.mark.parametrize("case", LONG_WAYS)
def test_pefts_own_way_is_taken_where(case: str) -> None:
    model, x = LONG_WAYS[case]()
    assert not takes_the_short_way(model, x)


def test_frozen_and_without_dropout_the_short_way_is_taken_in_training_too() -> None:
    assert takes_the_short_way(no_gradients(module(dropout=0.5)), torch.randn(4, 12))
    assert takes_the_short_way(no_gradients(module()).train(), torch.randn(4, 12))


def test_in_training_it_is_taken_exactly_below_the_lowest_due_layer() -> None:
    config = configuration("torch")
    backend = TorchBackend(config)
    backend.prepare_training(assign_tiers(backend.lora_parameters(), config.tiers).tier_of)
    long_way: set[int] = set()
    for index, layer in enumerate(backend._causal.model.layers):
        for name, part in layer.named_modules():
            if name.endswith("lora_A.default"):
                part.register_forward_hook(lambda *_, index=index: long_way.add(index))
    backend.train_step([random_batch(1)], frozenset({0}), 1e-3)
    assert long_way == {4, 5}
