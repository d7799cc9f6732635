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
    # To fill all memory beforehand would only show who reads what was never written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


@contextmanager
def strictly() -> Iterator[None]:
    """What has no such form raises RuntimeError; attention takes its own only then, and otherwise merely warns.

    Without it the backward pass over some hundred keys and more adds up in an order that changes from run to run.
    """
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("error")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)


def passes_back_strictly(causal: Any) -> bool:
    """Whether all of a model's backward pass has such a form, as far as four tokens tell; no gradient is kept."""
    embed = causal.get_input_embeddings()
    embedded = embed(torch.arange(4, device=embed.weight.device)[None]).detach().requires_grad_()
    logits = causal(inputs_embeds=embedded, use_cache=False).logits
    try:
        with strictly():
            torch.autograd.grad(logits.sum(), embedded)
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        return False
    return True
