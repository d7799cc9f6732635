"""Adapters as numbers: their exact weighted sum, and the best one of a smaller rank. NumPy alone, float64 inside.

The effect of an adapter on a module's weight is scale * B @ A. A sum of such effects is one more of them, whose ranks
stand side by side: scale * [f1 B1, f2 B2] @ [A1; A2].
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Weights = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Adapter:
    """The matrices of an adapter and the scale of their effect.

    weights: canonical name -> float32, A (rank, inputs) or B (outputs, rank), of the same rank everywhere.
    """

    weights: Weights
    scale: float

    @property
    def rank(self) -> int:
        """The rank of each of its matrices."""
        return max(len(values) for name, values in self.weights.items() if name.endswith("_a"))

    @property
    def alpha(self) -> float:
        """What PEFT calls alpha: scale * rank."""
        return self.scale * self.rank

    @property
    def modules(self) -> list[str]:
        """What it adapts, as canonical names without their side."""
        return [name.removesuffix("_a") for name in self.weights if name.endswith("_a")]


def weighted_sum(parts: Sequence[tuple[Adapter, float]], scale: float) -> Adapter:
    """The adapter whose effect is the sum of the parts' effects, each times its factor; its ranks are theirs in turn.

    Factors, and scales other than `scale`, go into B: one part with factor 1 and that scale keeps its bits. A module
    that some parts lack has zeros for their ranks. Raises ValueError when there is no part.
    """
    if not parts:
        raise ValueError("a sum of no adapters has no shape")
    modules = dict.fromkeys(module for part, _ in parts for module in part.modules)
    weights: dict[str, NDArray[Any]] = {}
    for module in modules:
        pairs = [_pair(part, module, factor * part.scale / scale) for part, factor in parts]
        inputs = next(a.shape[1] for a, _ in pairs if a.shape[1])
        outputs = next(len(b) for _, b in pairs if len(b))
        weights[f"{module}_a"] = np.concatenate(
            [a if a.shape[1] else np.zeros((len(a), inputs), a.dtype) for a, _ in pairs]
        )
        weights[f"{module}_b"] = np.concatenate(
            [b if len(b) else np.zeros((outputs, b.shape[1]), b.dtype) for _, b in pairs], axis=1
        )
    return Adapter(weights, scale)


def split(adapter: Adapter, last: int) -> tuple[Adapter, Adapter]:
    """The adapters of all ranks but the last ones, and of those: their sum is the whole, to the bit."""
    first: dict[str, NDArray[Any]] = {}
    rest: dict[str, NDArray[Any]] = {}
    for name, values in adapter.weights.items():
        first[name], rest[name] = (
            (values[:-last], values[-last:]) if name.endswith("_a") else (values[:, :-last], values[:, -last:])
        )
    return Adapter(first, adapter.scale), Adapter(rest, adapter.scale)


def compress(adapter: Adapter, max_rank: int) -> Adapter:
    """The adapter of rank `max_rank` whose effect is nearest in the Frobenius norm; itself when it has no more.

    Source: Eckart & Young 1936, The approximation of one matrix by another of lower rank: the truncated SVD of each
    module's effect, here by the QR decompositions of A^T and B, so that no matrix of outputs x inputs is made. The
    singular values are divided evenly between A and B, ranks descending by them.
    """
    if adapter.rank <= max_rank:
        return adapter
    weights: dict[str, NDArray[Any]] = {}
    for module in adapter.modules:
        left, values, right = _svd(adapter, module)
        kept = min(max_rank, len(values))
        half = np.sqrt(values[:kept])
        a, b = np.zeros((max_rank, right.shape[1])), np.zeros((len(left), max_rank))
        a[:kept], b[:, :kept] = half[:, None] * right[:kept], left[:, :kept] * half
        weights[f"{module}_a"], weights[f"{module}_b"] = a.astype(np.float32), b.astype(np.float32)
    return Adapter(weights, adapter.scale)


def singular_values(adapter: Adapter) -> dict[str, NDArray[np.float64]]:
    """Of the effect of each module, descending; at most as many as the rank."""
    return {module: adapter.scale * _svd(adapter, module)[1] for module in adapter.modules}


def effective_rank(values: NDArray[np.float64]) -> float:
    """How many directions an effect of these singular values really has: the exponential of their entropy.

    Source: Roy & Vetterli 2007, The effective rank. 0 where all values are 0.
    """
    shares = values[values > 0] / values.sum() if values.any() else values[:0]
    return float(np.exp(-(shares * np.log(shares)).sum())) if len(shares) else 0.0


def relative_error(adapter: Adapter, other: Adapter) -> float:
    """The Frobenius norm of the difference of two effects over that of the first: the largest of any module."""
    difference = singular_values(weighted_sum([(adapter, 1.0), (other, -1.0)], adapter.scale))
    errors = [0.0]
    for module, values in singular_values(adapter).items():
        norm, error = np.linalg.norm(values), np.linalg.norm(difference[module])
        errors.append(float(error / norm) if norm else float(error > 0))
    return max(errors)


def _pair(part: Adapter, module: str, factor: float) -> tuple[NDArray[Any], NDArray[Any]]:
    """A and B * factor of a module; without columns and rows where the part lacks it."""
    if f"{module}_a" not in part.weights:
        return np.zeros((part.rank, 0), np.float32), np.zeros((0, part.rank), np.float32)
    a, b = part.weights[f"{module}_a"], part.weights[f"{module}_b"]
    return a, b if factor == 1 else (b.astype(np.float64) * factor).astype(np.float32)


def _svd(adapter: Adapter, module: str) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """U (outputs, n), the singular values (n,) and V^T (n, inputs) of B @ A, the scale left out."""
    a, b = (adapter.weights[f"{module}_{side}"].astype(np.float64) for side in "ab")
    q_a, r_a = np.linalg.qr(a.T)
    q_b, r_b = np.linalg.qr(b)
    left, values, right = np.linalg.svd(r_b @ r_a.T)
    count = len(values)
    return q_b @ left[:, :count], values, right[:count] @ q_a.T
