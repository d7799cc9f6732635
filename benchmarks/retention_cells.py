"""The cells of benchmarks/retention.py: what is still to be run, in processes of one thread each, every result kept.

A cell's result is a JSON file below the work folder, named by the hash of what it depends on: the world, the method,
the code of the product and of the runs, and the processor, as CPU times of two machines say nothing about each other.
"""

import hashlib
import json
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import nestune
from nestune.files import sha256_files, write_json
from report import cpu_name
from retention_methods import Method, SequenceMethod
from retention_world import World

RUNS = ("retention_cell.py", "retention_runs.py", "retention_world.py")
# Parts of the product that take no part in a cell.
NOT_RUN = ("cli.py", "cli_parser.py", "registry", "export", "drop_in.py", "cms.py")


@dataclass(frozen=True)
class Cell:
    """One thing to run: a method on one task, a sequence of tasks or all of them at once, or the base to score."""

    kind: str
    world: World
    method: Method | SequenceMethod | None = None
    order: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What a person calls it."""
        what = self.method.name if self.method else "the base"
        return f"{self.kind}, {what}, seed {self.world.seed}{f', {self.order[0]} first' if self.order else ''}"

    @property
    def key(self) -> str:
        """The hash of what its result depends on."""
        method = {key: value for key, value in asdict(self.method).items() if key != "group"} if self.method else None
        depends_on = [self.kind, self.world.sha256, self.world.seed, method, self.order, code_sha256(), cpu_name()]
        return hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:24]

    def file(self, work: Path) -> Path:
        """Where its result is, or will be."""
        return work / "cells" / f"{self.key}.json"


def run_all(cells: Sequence[Cell], work: Path, jobs: int, until: float | None = None) -> None:
    """Run what has no result yet, each in one of `jobs` processes; until: a time after which no other is begun.

    Raises what a cell raises, when the others under way have ended.
    """
    missing = [cell for cell in cells if not cell.file(work).exists()]
    if not missing:
        return
    began = time.monotonic()
    # Of before torch is imported, in the processes too.
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=end_with, initargs=(os.getpid(),)) as pool:
        under_way = [pool.submit(run_cell, cell, work, until) for cell in missing]
        for number, done in enumerate(as_completed(under_way), start=1):
            name = done.result()
            seconds = time.monotonic() - began
            print(f"{number} of {len(missing)} cells, {seconds:.0f} s: {name}", file=sys.stderr, flush=True)


def end_with(parent: int) -> None:
    """End this process soon after its parent, which may be killed without a chance to end it."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_cell(cell: Cell, work: Path, until: float | None = None) -> str:
    """Run a cell and keep its result; returns its name."""
    if until is not None and time.time() > until:
        return f"{cell.name}: left for another time"
    import torch

    import retention_runs as runs

    torch.set_num_threads(1)
    began = time.process_time()
    if isinstance(cell.method, SequenceMethod):
        result = (runs.joint if cell.method.joint else runs.sequence)(cell.world, cell.method, cell.order)
    elif cell.method is not None:
        result = runs.one_task(cell.world, cell.method)
    else:
        result = runs.base_scores(cell.world, cell.order)
    told = {"cell": cell.name, "cell_cpu_s": time.process_time() - began}
    write_json(cell.file(work), told | result)
    return cell.name


def results(cells: Sequence[Cell], work: Path) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """The cells that have a result, and these."""
    for cell in cells:
        if cell.file(work).exists():
            yield cell, json.loads(cell.file(work).read_text(encoding="utf-8"))


@cache
def code_sha256() -> str:
    """The hash of the code that a cell runs: the product's, and the benchmark's own."""
    package, here = Path(nestune.__file__).parent, Path(__file__).parent
    files = [path for path in sorted(package.rglob("*.py")) if path.relative_to(package).parts[0] not in NOT_RUN]
    own = sha256_files(here, [here / name for name in RUNS])
    return hashlib.sha256(f"{sha256_files(package, files)} {own}".encode()).hexdigest()
