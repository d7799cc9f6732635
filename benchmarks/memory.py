"""The exact peak of tensor memory, in bytes: resident memory would tell what the allocator keeps and what others do."""

import gc
import os
from collections.abc import Callable
from itertools import accumulate


def peak_bytes(work: Callable[[], object]) -> int:
    """The most bytes that tensors hold at once while `work` runs, those from before it included.

    On CUDA as its allocator counts. On the CPU the bytes of every tensor that exists before, and on top of them the
    highest sum of the profiler's allocation events, of which torch reports one for every block of tensor memory that
    it takes or returns; what a math library takes for itself is not seen. Raises RuntimeError when these events do not
    lead to the bytes that exist afterwards, as when `work` gives back a block from before, which has no event.
    """
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        work()
        return int(torch.cuda.max_memory_allocated())
    # Kineto writes to the standard error otherwise.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    before = _held_bytes()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    assert profile.profiler is not None
    assert profile.profiler.kineto_results is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes: list[int] = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    after = _held_bytes()
    if before + sum(changes) != after:
        raise RuntimeError(
            f"{after} bytes of tensors are left, {before} were there before, and the events add {sum(changes)}: the "
            "work gave back memory from before it, or left some that no tensor in Python shows. Let it do neither."
        )
    return before + max(accumulate(changes, initial=0))


def _held_bytes() -> int:
    """The bytes of every tensor that exists, memory that several share counted once."""
    import torch

    tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor) and o.device.type == "cpu"]
    storages = [tensor.untyped_storage() for tensor in tensors]
    sizes: dict[int, int] = {storage.data_ptr(): storage.nbytes() for storage in storages}
    return sum(sizes.values())
