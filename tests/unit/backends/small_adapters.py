"""A small model named as LoRA adapters are, and tiered optimizers of it."""

from typing import Any

import torch
from torch import Tensor, nn

from nestune.backends.tiered_optimizer import TieredOptimizer

WIDTH, RANK, PERIODS = 5, 6, (1, 2, 4)
MAPS = ["whole", "stacked"]
POLICIES = ["drop", "accumulate"]


class Adapters(nn.Module):
    """Three layers x + tanh(B A x), named as LoRA matrices are; both sides start away from zero."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for layer in range(3):
            for side, shape in (("a", (RANK, WIDTH)), ("b", (WIDTH, RANK))):
                values = nn.Parameter(torch.randn(*shape, generator=generator) / 2)
                self.register_parameter(f"{layer}_{side}", values)

    @property
    def matrices(self) -> dict[str, nn.Parameter]:
        return {f"layers.{n[0]}.module.lora_{n[2]}": p for n, p in self.named_parameters()}

    def loss(self, step: int, layers: int = 3) -> Tensor:
        """The loss of a step's own data; deterministic."""
        p = dict(self.named_parameters())
        x, y = torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(step)).to(p["0_a"].dtype)
        for layer in range(layers):
            x = x + torch.tanh(x @ p[f"{layer}_a"].T @ p[f"{layer}_b"].T)
        return (x - y).square().mean()


def tiers_of(model: Adapters, how: str) -> dict[str, int]:
    """whole: the deepest layer is the fastest; stacked: each matrix's first ranks are."""
    if how == "whole":
        return {name: 2 - int(name.split(".")[1]) for name in model.matrices}
    third = RANK // 3
    return {f"{name}[{k * third}:{(k + 1) * third}]": k for name in model.matrices for k in range(3)}


def tiered(model: Adapters, how: str = "whole", periods: Any = PERIODS, **options: Any) -> TieredOptimizer:
    return TieredOptimizer(model.matrices, tiers_of(model, how), periods, **({"lr": 0.05} | options))


def train(model: Adapters, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """The loop of PyTorch's tutorials."""
    for step in steps:
        optimizer.zero_grad()
        model.loss(step).backward()
        optimizer.step()


def weights(model: Adapters) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.matrices.items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def ranks_of_tier(name: str, matrix: Tensor, tier: int, how: str) -> Tensor:
    """The part of a matrix that a tier holds; of a whole map all or nothing."""
    if how == "whole":
        return matrix if 2 - int(name.split(".")[1]) == tier else matrix[:0]
    third = RANK // 3
    return matrix.narrow(0 if name.endswith("a") else 1, tier * third, third)
