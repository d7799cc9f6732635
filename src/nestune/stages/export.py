"""`nestune export`: an adapter in the form that another program takes, checked by what that program computes."""

import gc
import tempfile
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nestune.backends.adapter_config import read_adapter_config
from nestune.backends.adapters import METADATA, weights_file
from nestune.backends.factory import make_backend
from nestune.base_model import resolve_base
from nestune.config import RunConfig
from nestune.errors import ConfigError, RunError
from nestune.export.check import Check, Reference, check_logits, make_reference
from nestune.export.formats import FORMATS, faults_of, remedy_of, rounded_to
from nestune.export.job import Job
from nestune.files import read_json, replaced_folder, sha256_file, write_json
from nestune.registry.versions import pin_adapter, resolve_adapter
from nestune.runs import RunPaths, record_stage

# The key of its metadata.json by which an export is known.
EXPORTED = "export"


@dataclass(frozen=True)
class ExportResult:
    """Where the export is, what it was made from, what its check found, and how it is loaded."""

    to: str
    folder: str
    adapter: str
    check: Check
    usage: str
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """The result as JSON."""
        return asdict(self) | {"notes": list(self.notes)}

    def summary(self) -> list[str]:
        """The result for a person."""
        check = self.check
        return [
            f"{self.adapter} as {self.to}: {self.folder}",
            f"logit check passed: deviation {check.deviation:.2g} nats, allowed {check.allowed:.2g}; "
            f"the adapter's own effect {check.effect:.2g} ({check.tokens} tokens)",
            f"load it: {self.usage}",
            *(f"note: {note}" for note in self.notes),
        ]


def export(
    config: RunConfig,
    run: RunPaths,
    to: str,
    *,
    checkpoint: str | None = None,
    adapter: str | None = None,
    out: Path | None = None,
    force: bool = False,
    dequantize: bool = False,
) -> ExportResult:
    """Write the adapter in one of the `FORMATS`, and check what the program it is for computes with it.

    checkpoint: best or final, in place of the candidate made of one; adapter: another adapter instead, a folder or
    models:/<name>@<alias>. The export appears at `out`, by default in the run's folder, whole or not at all.
    Raises ConfigError with all that keeps the adapter from that form, when it does not fit, or when `out` exists and
    is no export that may be overwritten; RunError when training is missing, or the export computes something else.
    """
    if adapter is not None and out is None:
        raise ConfigError(
            "--adapter names an adapter that need not be of this run, so say where it goes: --out FOLDER."
        )
    folder = out or run.root / "export" / to
    _check_replaceable(folder, force)
    base = resolve_base(config.model)
    faults = faults_of(to, base, dequantize)
    if faults:
        raise ConfigError("\n  ".join([f"nothing is exported to {to}:", *faults]))
    if adapter is None:
        source = _trained(config, run, checkpoint)
        name = source.as_posix()
    else:
        name = pin_adapter(adapter, config.registry)
        source = resolve_adapter(name, config.registry)
    if find_spec("torch") is not None:
        import_module("torch")  # before MLX, which would change its rounding: see nestune.backends.mlx_blas
    with tempfile.TemporaryDirectory() as scratch:
        reference = _refer(config, source, Path(scratch), base.positions)
        size = read_adapter_config(Path(scratch)).sizes[0]
        lora = config.lora.model_copy(update={"rank": size.rank, "alpha": size.alpha})
        job = Job(Path(scratch), base, lora, config.model.dtype, dequantize)
        with replaced_folder(folder) as unchecked:
            notes = FORMATS[to].write(job, unchecked)
            logits = FORMATS[to].load(job, unchecked)
            check = check_logits(logits, reference, rounded_to(to, job), remedy_of(to, job))
            sha256 = sha256_file(weights_file(source))
            write_json(unchecked / METADATA, _metadata(to, job, {"source": name, "sha256": sha256}, check))
    if adapter is None:
        record_stage(run, f"export {to}", [source], [folder])
    usage = FORMATS[to].usage.format(base=base.reference, folder=folder.as_posix())
    return ExportResult(to, folder.as_posix(), name, check, usage, tuple(notes))


def _check_replaceable(folder: Path, force: bool) -> None:
    if not folder.exists():
        return
    if not force:
        raise ConfigError(f"{folder} exists. Pass --force to replace it, or another --out.")
    metadata = folder / METADATA
    if not metadata.is_file() or EXPORTED not in read_json(metadata, "Pass another --out."):
        raise ConfigError(f"{folder} is no export of nestune, so it is not overwritten. Pass another --out.")


def _trained(config: RunConfig, run: RunPaths, checkpoint: str | None) -> Path:
    folder = run.checkpoints / checkpoint if checkpoint else run.candidate
    if not (folder / METADATA).is_file():
        raise RunError(f"there is no {folder}. Run nestune train --name {config.name}, or name an --adapter.")
    return folder


def _refer(config: RunConfig, source: Path, target: Path, positions: int | None) -> Reference:
    """What nestune computes with an adapter, in float32; copies the adapter, in nestune's own form, into a folder."""
    blocks = {
        "model": config.model.model_copy(update={"dtype": "float32"}),
        "training": config.training.model_copy(update={"precision": "float32"}),
    }
    backend = make_backend(config.model_copy(update=blocks))
    reference = make_reference(backend, source, positions)
    backend.save_adapter(target)
    del backend
    gc.collect()  # the model holds references to itself, and another one as large is loaded next
    return reference


def _metadata(to: str, job: Job, adapter: dict[str, str], check: Check) -> dict[str, Any]:
    base = job.base
    return {
        EXPORTED: to,
        "adapter": adapter,
        "base": {"reference": base.reference, "revision": base.revision, "sha256": base.sha256},
        "lora": {"rank": job.lora.rank, "alpha": job.lora.alpha},
        "dtype": job.dtype,
        "dequantized": job.dequantize,
        "check": asdict(check),
        "version of nestune": version("nestune"),
    }
