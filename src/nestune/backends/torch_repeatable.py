"""The same bits from the same step on CUDA, so that a training that goes on ends as an unbroken one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def repeat_on_cuda() -> None:
    """Take operations that give the same bits each time where PyTorch has them; it warns where it has none."""
    # Must be in the environment before the first cuBLAS call for sums to come out the same each time.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # cuDNN's attention has none, and is taken all the same as long as PyTorch is only to warn; in the backward pass of
    # checkpointed layers, where it is strict, another one would find other tensors than were kept.
    torch.backends.cuda.enable_cudnn_sdp(False)


@contextmanager
def strictly() -> Iterator[None]:
    """What has no such form raises RuntimeError; attention takes its own only then, and otherwise merely warns.

    Its backward pass over a thousand keys would add up in an order that changes from run to run.
    """
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("error")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)


def passes_back_strictly(causal: Any) -> bool:
    """Whether all of the backward pass to what is trained has such a form, as far as four tokens tell.

    No gradient is kept.
    """
    trained = [parameter for parameter in causal.parameters() if parameter.requires_grad]
    logits = causal(torch.arange(4, device=causal.device)[None], use_cache=False).logits
    try:
        with strictly():
            torch.autograd.grad(logits.sum(), trained, allow_unused=True)
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        return False
    return True
