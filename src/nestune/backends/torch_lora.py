"""What the LoRA modules of a PEFT model compute: W x, with a frozen parent's adapter, the trained one's, or both.

    W x + s_p B_p A_p x + s B A x

The parent is the teacher that training may hold the model to, and, under `retention.start: fresh`, what the trained
adapter comes on top of; so no second copy of the base is needed. What autograd does not follow is computed in place:
PEFT writes three matrices of the output's size on the way to W x + s B A x; here B adds its product to W x as it is
made. Of the forward pass of such a layer that is some 5 %.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F

from nestune.backends.lora_parts import LoraParts

ADAPTER = "default"
# A, B and the scale of a frozen adapter in one module.
Part = tuple[Tensor, Tensor, float]


@dataclass
class TorchLoraParts(LoraParts):
    """The same, and the parent's part in each module, by its path."""

    parent: dict[str, Part] = field(default_factory=dict)


def control_lora(model: nn.Module) -> TorchLoraParts:
    """Let the LoRA modules of a PEFT model with one adapter compute with the parts that are told."""
    parts = TorchLoraParts()
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            path = name.removeprefix("base_model.model.")
            module.forward = partial(_forward, module, path, parts, module.forward)
    return parts


def squared_change(own: Mapping[str, Tensor], paths: Mapping[str, str], parts: TorchLoraParts, scale: float) -> Tensor:
    """The squared Frobenius norm of what training has changed of all weights against the parent; a scalar.

    own: canonical name -> A (rank, inputs) or B (outputs, rank); paths: canonical name -> path of its module. The
    change is s B A, less s_p B_p A_p where the trained matrices take the parent's place. It is never formed:
    |B A|^2 = sum of (B^T B) * (A A^T), element by element.
    """
    total = torch.zeros((), device=next(iter(own.values())).device)
    for name, a in own.items():
        if not name.endswith("lora_a"):
            continue
        b, parent = scale * own[name[:-1] + "b"], parts.parent.get(paths[name])
        if parent is not None and not parts.with_parent:
            a, b = torch.cat([a, parent[0]]), torch.cat([b, -parent[2] * parent[1]], dim=1)
        total = total + ((b.T @ b) * (a @ a.T)).sum()
    return total


def _forward(
    module: Any, path: str, parts: TorchLoraParts, as_peft: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """(..., inputs) -> (..., outputs)."""
    base = module.get_base_layer()
    parent = parts.parent.get(path) if parts.with_parent else None
    if not parts.own:
        output: Tensor = base(x)
        return output if parent is None else _add(output, x, parent)
    drops = module.training and not isinstance(module.lora_dropout[ADAPTER], nn.Identity)
    plain = type(module) is Linear and not (drops or module.merged or module.disable_adapters or args or kwargs)
    own = module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight, module.scaling[ADAPTER]
    if plain and parent is not None:
        return _add(base(x), x, _side_by_side(parent, own))
    followed = _is_followed(x, own[0], own[1])
    if plain and not followed and _is_of_one_type(x, own[0], base.weight):
        return _add(base(x), x, own)
    output = as_peft(x, *args, **kwargs)
    return output if parent is None else _add(output, x, parent)


def _is_followed(*tensors: Tensor) -> bool:
    """Whether autograd follows what is computed with these."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _is_of_one_type(x: Tensor, *others: Tensor) -> bool:
    return all(other.dtype == x.dtype for other in others) and not torch.is_autocast_enabled(x.device.type)


def _side_by_side(parent: Part, own: Part) -> Part:
    """Both as one adapter, whose product costs little more than that of one of them."""
    (a, b, scale), (own_a, own_b, own_scale) = parent, own
    b = b if scale == own_scale else b * (scale / own_scale)
    return torch.cat([a, own_a]), torch.cat([b, own_b], dim=1), own_scale


def _add(output: Tensor, x: Tensor, part: Part) -> Tensor:
    """The output, and s B A x; in place where autograd does not follow."""
    a, b, scale = part
    if not _is_of_one_type(x, a, output):
        return output + (scale * F.linear(F.linear(x.to(a.dtype), a), b)).to(output.dtype)
    inner, rows = F.linear(x, a).reshape(-1, len(a)), output.reshape(-1, len(b))
    if _is_followed(output, inner, b):
        return torch.addmm(rows, inner, b.T, alpha=scale).view(output.shape)
    return rows.addmm_(inner, b.T, alpha=scale).view(output.shape)
