"""What other programs compute with an export: each loads it by its own means, as its users do, in float32."""

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nestune.errors import RunError
from nestune.export.check import Logits
from nestune.export.gguf import FILE
from nestune.export.job import Job

# No code that comes with a model is run, and nothing is fetched.
AS_IT_IS: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}


def load_with_peft(job: Job, folder: Path) -> Logits:
    """The logits of the base with the adapter in a folder, by PEFT; raises RunError when PEFT does not load it."""
    with _speaking_to("PEFT"):
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(job.base.folder, dtype="float32", use_safetensors=True, **AS_IT_IS)
        return _torch_logits(PeftModel.from_pretrained(base, folder))


def load_with_mlx_lm(job: Job, folder: Path) -> Logits:
    """The logits of the base with the adapter in a folder, by mlx-lm; raises RunError when it does not load it."""
    with _speaking_to("mlx-lm"):
        return mlx_logits(job.base.folder, adapter=folder)


def load_merged(job: Job, folder: Path) -> Logits:
    """The logits of a model folder, by Transformers; by mlx-lm where PyTorch is missing, or MLX quantized the base.

    Raises RunError when the model does not load.
    """
    if job.dequantize or find_spec("torch") is None:
        with _speaking_to("mlx-lm"):
            return mlx_logits(folder)
    with _speaking_to("Transformers"):
        from transformers import AutoModelForCausalLM

        return _torch_logits(AutoModelForCausalLM.from_pretrained(folder, dtype="float32", **AS_IT_IS))


def load_gguf(job: Job, folder: Path) -> Logits:
    """The logits of a GGUF file, by Transformers; raises RunError when it does not load it."""
    with _speaking_to("Transformers"):
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype="float32", **AS_IT_IS)
        return _torch_logits(model)


def mlx_logits(model_folder: Path, adapter: Path | None = None) -> Logits:
    """The logits of a model folder, and of an adapter's folder on it, by mlx-lm."""
    from nestune.backends.mlx_blas import load_fast_blas

    load_fast_blas()
    import mlx.core as mx
    from mlx_lm import load

    of = str(adapter) if adapter else None
    model, *_ = load(str(model_folder), adapter_path=of, trust_remote_code=False)
    model.set_dtype(mx.float32)
    model.eval()
    return lambda tokens: np.array(model(mx.array([tokens]))[0].astype(mx.float32))


@contextmanager
def _speaking_to(program: str) -> Iterator[None]:
    """Let the user know what a program says when it does not load an export."""
    from transformers.utils.logging import disable_progress_bar

    if not sys.stderr.isatty():
        disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # PEFT asks Transformers in ways that Transformers has begun to rename; users can do nothing about it.
            warnings.simplefilter("ignore", FutureWarning)
            yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        first_line = str(error).strip().partition("\n")[0] or type(error).__name__
        raise RunError(
            f"{program} does not load the export, so nothing was written: {first_line}. "
            f"Update {program}, or export in another form."
        ) from error


def _torch_logits(model: Any) -> Logits:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device).eval()

    def logits(tokens: Sequence[int]) -> NDArray[Any]:
        with torch.no_grad():
            found = model(input_ids=torch.tensor([tokens], device=device), use_cache=False).logits[0]
        array: NDArray[Any] = found.float().cpu().numpy()
        return array

    return logits
