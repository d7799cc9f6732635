"""LoRA modules whose tier is not due, and below which nothing is: the same output with less traffic in memory.

What autograd does not follow may be computed in place. PEFT writes three matrices of the output's size on the way to
W x + s B A x; here B adds its product to W x as it is made. Of the forward pass of such a layer that is some 5 %.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.nn import functional as F

ADAPTER = "default"


def shorten_frozen_forward(model: nn.Module) -> None:
    """Let the LoRA modules of a PEFT model with one adapter go the short way wherever nothing needs a gradient."""
    for module in model.modules():
        if type(module) is Linear:
            module.forward = partial(_forward, module, module.forward)


def _forward(module: Any, with_gradients: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """W x + s B A x: (..., inputs) -> (..., outputs)."""
    a, b, base = module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight, module.get_base_layer()
    followed = torch.is_grad_enabled() and (x.requires_grad or a.requires_grad or b.requires_grad)
    drops = module.training and not isinstance(module.lora_dropout[ADAPTER], nn.Identity)
    mixed = torch.is_autocast_enabled(x.device.type) or not x.dtype == a.dtype == base.weight.dtype
    if followed or drops or mixed or module.merged or module.disable_adapters or args or kwargs:
        return with_gradients(x, *args, **kwargs)
    output: Tensor = base(x)
    inner = F.linear(x, a)
    output.view(-1, len(b)).addmm_(inner.view(-1, len(a)), b.T, alpha=module.scaling[ADAPTER])
    return output
