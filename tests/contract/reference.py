"""References that share no code with the backends: tiered AdamW in NumPy, and gradients of an ordinary PEFT model."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nestune.data.batches import Batch
from nestune.tiers.parameters import parse_parameter

Weights = dict[str, NDArray[Any]]


def part_of(weights: Weights, name: str) -> NDArray[Any]:
    """What a name of a tier map stands for, as a view: a matrix, or ranks of it (rows of A, columns of B)."""
    matrix, _, ranks = name.rstrip("]").partition("[")
    if not ranks:
        return weights[matrix]
    start, _, stop = ranks.partition(":")
    chosen = slice(int(start), int(stop))
    return weights[matrix][chosen] if matrix.endswith("lora_a") else weights[matrix][:, chosen]


class NumpyTieredAdamW:
    """Tiered updates as formulas, in float64: one AdamW a tier, windows, clipping.

    AdamW: Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2. A tier's moments and bias correction advance
    only when it updates. `accumulate` applies the mean gradient over the steps since the tier's last update.
    """

    def __init__(
        self,
        weights: Weights,
        tier_of: dict[str, int],
        update_every: Sequence[int],
        *,
        accumulate: bool,
        weight_decay: float,
        max_norm: float,
    ) -> None:
        self.weights = {name: value.astype(np.float64) for name, value in weights.items()}
        self.initial = {name: value.copy() for name, value in self.weights.items()}
        self.tier_of, self.update_every = tier_of, update_every
        self.accumulate, self.weight_decay, self.max_norm = accumulate, weight_decay, max_norm
        self.window = {name: np.zeros_like(part_of(self.weights, name)) for name in tier_of}
        self.m = {name: np.zeros_like(value) for name, value in self.window.items()}
        self.v = {name: np.zeros_like(value) for name, value in self.window.items()}
        self.updates = [0] * len(update_every)

    def step(self, step: int, gradient: Weights, rate: float) -> None:
        due = [tier for tier, period in enumerate(self.update_every) if step % period == 0]
        applied: Weights = {}
        for name, tier in self.tier_of.items():
            self.window[name] += part_of(gradient, name)
            if tier in due:
                mean = self.window[name] / self.update_every[tier]
                applied[name] = mean if self.accumulate else part_of(gradient, name).astype(np.float64)
                self.window[name][:] = 0
        norm = np.sqrt(sum(float((g**2).sum()) for g in applied.values()))
        clip = min(1.0, self.max_norm / (norm + 1e-6))
        for tier in due:
            self.updates[tier] += 1
        for name, g in applied.items():
            t = self.updates[self.tier_of[name]]
            self.m[name] = 0.9 * self.m[name] + 0.1 * clip * g
            self.v[name] = 0.999 * self.v[name] + 0.001 * (clip * g) ** 2
            direction = (self.m[name] / (1 - 0.9**t)) / (np.sqrt(self.v[name] / (1 - 0.999**t)) + 1e-8)
            weights = part_of(self.weights, name)
            weights[:] = weights * (1 - rate * self.weight_decay) - rate * direction


class PlainGradients:
    """Loss and gradients of an ordinary PEFT model: all logits, all parameters, one backward pass, float64."""

    def __init__(self, weights: Weights) -> None:
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        from tests.contract.conftest import BASE

        base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float64)
        config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        self.model: Any = get_peft_model(base, config, autocast_adapter_dtype=False).double()
        named = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        found = {parse_parameter(name, tuple(p.shape)): p for name, p in named.items()}
        self.parameters = {described.name: p for described, p in found.items() if described is not None}
        assert set(self.parameters) == set(weights)

    def of(self, weights: Weights, micro_batches: Sequence[Batch]) -> tuple[float, Weights]:
        """Mean loss in nats per supervised token over all micro-batches, and its gradient by canonical name."""
        import torch

        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(torch.from_numpy(weights[name]))
        self.model.zero_grad()
        nats, count = torch.zeros((), dtype=torch.float64), 0
        for batch in micro_batches:
            for tokens, supervised, length in zip(batch.tokens, batch.supervised, batch.lengths, strict=True):
                row = torch.from_numpy(tokens[:length].astype(np.int64))[None]
                log_probabilities = self.model(row).logits[0].log_softmax(-1)
                for position in np.flatnonzero(supervised):
                    nats = nats - log_probabilities[position - 1, row[0, position]]
                    count += 1
        (nats / count).backward()  # type: ignore[no-untyped-call]
        return nats.item() / count, {name: p.grad.numpy().copy() for name, p in self.parameters.items()}
