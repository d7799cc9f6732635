"""The forms in which an adapter is exported: how each is written, who reads it back, and what keeps it from either."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from nestune.base_model import BaseModel
from nestune.export.adapters import write_mlx, write_peft
from nestune.export.check import Logits
from nestune.export.gguf import FILE, gguf_faults, write_gguf
from nestune.export.job import Job
from nestune.export.loaders import load_gguf, load_merged, load_with_mlx_lm, load_with_peft
from nestune.export.merged import write_merged
from nestune.export.quantization import float_type, quantized_by


@dataclass(frozen=True)
class Format:
    """One form of an export.

    extras: the packages that write it or read it back -> the extra of nestune that installs them.
    merges: the adapter is added to the base's weights. write: into an existing folder; returns what the user should
    know of it. load: the logits that another program computes with it. usage: how a user does, `{base}` and `{folder}`
    left open.
    """

    extras: Mapping[str, str]
    merges: bool
    write: Callable[[Job, Path], list[str]]
    load: Callable[[Job, Path], Logits]
    usage: str


FORMATS = {
    "peft": Format(
        extras={"torch": "cuda", "peft": "cuda"},
        merges=False,
        write=write_peft,
        load=load_with_peft,
        usage="PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base!r}), {folder!r})",
    ),
    "mlx": Format(
        extras={"mlx": "mlx", "mlx_lm": "mlx"},
        merges=False,
        write=write_mlx,
        load=load_with_mlx_lm,
        usage="mlx_lm.load({base!r}, adapter_path={folder!r})",
    ),
    "merged": Format(
        extras={},
        merges=True,
        write=write_merged,
        load=load_merged,
        usage="AutoModelForCausalLM.from_pretrained({folder!r}), or mlx_lm.load({folder!r})",
    ),
    "gguf": Format(
        extras={"gguf": "gguf", "torch": "cuda", "accelerate": "cuda"},
        merges=True,
        write=write_gguf,
        load=load_gguf,
        usage=f"llama-cli --model {{folder}}/{FILE}",
    ),
}


def faults_of(to: str, base: BaseModel, dequantize: bool) -> list[str]:
    """Why a base's adapters cannot be exported in a form, each with what to do; empty when they can."""
    form, quantized = FORMATS[to], quantized_by(base.folder)
    missing = _missing({**form.extras, **({"mlx_lm": "mlx"} if dequantize else {})})
    if missing:
        return [missing]
    faults = _quantization_faults(to, quantized, dequantize)
    return faults + (gguf_faults(base) if to == "gguf" else [])


def rounded_to(to: str, job: Job) -> str | None:
    """The type to which an export rounds the sums of base and adapter; None when it holds the adapter alone."""
    if not FORMATS[to].merges:
        return None
    return float_type(job.base.folder) if job.dtype == "auto" else job.dtype


def remedy_of(to: str, job: Job) -> str:
    """What to do when an export computes something else than the adapter."""
    stored = rounded_to(to, job)
    if stored not in (None, "float32"):
        return f"Rounding to {stored} may have swallowed the adapter: --set model.dtype=float32 stores more of it."
    if to == "mlx" and "rope_theta" not in json.loads((job.base.folder / "config.json").read_text(encoding="utf-8")):
        return "The base's config.json has no rope_theta at top level, where mlx-lm looks for it: export --to merged."
    return "Update that program, or export in another form."


def _missing(extras: Mapping[str, str]) -> str | None:
    missing = [package for package in extras if find_spec(package) is None]
    if not missing:
        return None
    wanted = ",".join(sorted({extras[package] for package in missing}))
    return (
        f"{' and '.join(missing)}, to write the export or to check what it computes, "
        f"is not installed; install it with: pip install 'nestune[{wanted}]'"
    )


def _quantization_faults(to: str, quantized: str | None, dequantize: bool) -> list[str]:
    unquantized = "Train and merge on the base that it was quantized from"
    if dequantize and not (FORMATS[to].merges and quantized == "mlx"):
        return ["--dequantize is for merging on a base quantized by MLX, which this is not. Leave it out."]
    if quantized == "mlx" and FORMATS[to].merges and not dequantize:
        return [
            "model.base is quantized by MLX, and weights quantized again after merging would lose the adapter. "
            f"{unquantized}, or pass --dequantize, which writes a larger model of floats."
        ]
    if quantized == "mlx" and to == "peft":
        return [
            "model.base is quantized by MLX, which PEFT does not read. Export --to mlx, or --to merged --dequantize."
        ]
    if quantized == "other" and FORMATS[to].merges:
        return [
            "model.base is quantized, and merging into quantized weights would lose the adapter. "
            f"{unquantized}, or export the adapter alone, --to peft."
        ]
    return []
