"""A machine that is out of memory, as a fault that the user can act on."""

from collections.abc import Iterator
from contextlib import contextmanager

from nestune.errors import RunError

# What the frameworks say: CUDA, PyTorch on the CPU, MLX on Metal. (MLX on the CPU dies without a word.)
SAYINGS = ("out of memory", "can't allocate memory", "unable to allocate", "attempting to allocate")


@contextmanager
def told_out_of_memory() -> Iterator[None]:
    """Turn what Python, PyTorch or MLX raise when there is no memory left into a RunError that says what to do."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        said = str(error).partition("\n")[0].rstrip(".")
        if not isinstance(error, MemoryError) and not any(saying in said.lower() for saying in SAYINGS):
            raise
        raise RunError(
            f"there is not enough memory: {said or 'Python has none left'}. Set training.gradient_checkpointing=true, "
            "which --resume takes on the way; or train under another --name with a smaller training.batch_size, more "
            "training.gradient_accumulation_steps, or a smaller data.max_seq_length."
        ) from error
