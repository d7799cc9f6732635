"""What a training loses when it is killed: nothing, to the bit.

    python benchmarks/kill.py [--kills 100] [--backend torch|mlx] [--seed 0] [--json FILE] [--smoke]

The process group of a training is killed by SIGKILL, the same command is started again, and so on until it ends:

- just before every operation on files of the save path, one after another: of the first `best`, of one in place of it,
  of a periodic checkpoint that makes an older one go, of `final`, and of what follows it. Half of these also leave
  files as a machine that goes down may leave them, cut at a random place after the last sync.
- at random moments, uniform over the time that is left to its end from its start, or from its first step. One start in
  five is `nestune train` as a user starts it; all others are forked from a process that has imported the libraries.

A training that has ended must be as one that was never killed: adapters and optimizer state of every checkpoint by
SHA-256, metrics line by line but for what the clock says, the manifest, the state, and nothing left over. Where it is
not, or a start fails, all kills since its beginning are counted as losses. At least `--kills`: those at operations are
as many as there are operations, those at random moments half of --kills, or what is missing to it. Exits with 1 when
anything was lost.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from killing import METRICS, PATIENCE_S, Started, Workplace, differences, metrics_lines, workplace
from nestune.files import write_json
from nestune.run_state import read_state
from nestune.runs import RunPaths
from nestune.training.checkpoints import read_checkpoints
from report import load_average, print_table, provenance

PLACES = ("first best", "best in place of best", "periodic, rotating", "final", "end")
MOMENTS = ("starting", "loading", "training", "saving", "ending")
KINDS = ("write", "fsync", "rename", "delete", "folder", "after")
# Where the save of `final` begins: what comes after it is tried from there.
BEFORE_FINAL = "before-final"
STEPS, SMOKE_STEPS = 60, 12
SMOKE_EVERY = 15
# Of how many starts that are killed at random one is the command, whose imports take seconds; the others are forked.
REAL = 5


@dataclass(frozen=True)
class Kill:
    """Where a training was killed: a place and the kind of operation there, or a moment; torn: files were cut too."""

    place: str
    kind: str = ""
    torn: bool = False


@dataclass
class Chain:
    """A training that was started again and again: its kills, and in what it ended otherwise than it should."""

    kills: list[Kill] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def main() -> int:
    """Kill, compare, print, write; returns the exit code."""
    parser = argparse.ArgumentParser(description="Kill a training again and again; it must end as if it never was.")
    parser.add_argument("--kills", type=int, default=100, help="kills at least")
    parser.add_argument("--backend", choices=("torch", "mlx"), default="torch", help="framework that trains")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments and places")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--smoke", action="store_true", help="a short training, few kills: does it run?")
    options = parser.parse_args()
    if options.kills < 1:
        parser.error(f"--kills is {options.kills}; it must be 1 or more")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    json_file = options.json.absolute() if options.json else None
    measured = measure(options)
    show(measured)
    if json_file:
        write_json(json_file, measured)
    return 1 if measured["losses"] else 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything that is told, as JSON."""
    machine = provenance() | {options.backend: version(options.backend)}
    generator = random.Random(options.seed)
    with (
        TemporaryDirectory(prefix="nestune-kill-") as folder,
        workplace(Path(folder), options.backend, SMOKE_STEPS if options.smoke else STEPS) as place,
    ):
        wanted = operations_of(place)
        if options.smoke:
            wanted = {name: numbers[::SMOKE_EVERY] for name, numbers in wanted.items()}
        began = time.perf_counter()
        chains = kill_at_operations(place, wanted, generator)
        between = time.perf_counter()
        injected = sum(len(chain.kills) for chain in chains)
        at_random = 2 if options.smoke else max(options.kills // 2, options.kills - injected)
        chains += kill_at_random(place, at_random, generator)
        times = {"operations_s": between - began, "random_s": time.perf_counter() - between}
    return {
        "provenance": machine | {"load_average_after": load_average()},
        "backend": options.backend,
        "smoke": options.smoke,
        "kills": sum(len(chain.kills) for chain in chains),
        "losses": sum(max(1, len(chain.kills)) for chain in chains if chain.faults),
        "trainings": len(chains),
        "faults": [fault for chain in chains for fault in chain.faults],
        "rows": rows_of(chains),
        **times,
    }


def operations_of(place: Workplace) -> dict[str, list[int]]:
    """The operations of each place, by number, as an unbroken run came by them."""
    return {
        name: sorted({operation.number for operation in place.operations if operation.place == name}) for name in PLACES
    }


def kill_at_operations(place: Workplace, wanted: dict[str, list[int]], generator: random.Random) -> list[Chain]:
    """Kill trainings at each of these operations once; a start dies at the first that it reaches."""
    pending = {name: list(numbers) for name, numbers in wanted.items()}
    chains = []
    while any(pending.values()):
        left = sum(map(len, pending.values()))
        only_the_end = not any(pending[name] for name in PLACES[:-2])
        stem = place.folder / "runs" / BEFORE_FINAL
        run = place.fresh(BEFORE_FINAL) if only_the_end and stem.exists() else place.fresh()
        chain = Chain()
        while True:
            torn = generator.randrange(2**32) if generator.random() < 0.5 else None
            ending = place.start(run, {name: numbers[0] for name, numbers in pending.items() if numbers}, torn)
            if not ending.killed:
                break
            note = ending.note
            pending[note["place"]].pop(0)
            chain.kills.append(Kill(note["place"], note["kind"], torn is not None))
            if note["place"] == "final" and not stem.exists():
                shutil.copytree(run, stem)
        end(chain, place, run, ending.status, ending.said)
        chains.append(chain)
        if chain.faults:
            break
        if left == sum(map(len, pending.values())):
            chain.faults.append(f"never came by {pending}")
            break
    return chains


def kill_at_random(
    place: Workplace, kills: int, generator: random.Random, real_every: int | None = REAL
) -> list[Chain]:
    """Kill trainings at random moments of what is left of them; one start in `real_every` is as a user starts it.

    Every second one from its first step on: how long a start takes, a busy machine changes from minute to minute.
    """
    lines = metrics_lines(place.reference / "metrics" / METRICS[0], without=())
    training_s = sum(line["step_time_s"] for line in lines)
    start_s = {real: time_to_start(place, real) for real in (False, real_every is not None)}
    chains: list[Chain] = []
    killed = 0
    while killed < kills:
        chain, run = Chain(), place.fresh()
        chains.append(chain)
        status = None
        while status is None:
            real = real_every is not None and killed % real_every == 0
            left_s = training_s * (1 - newest_step(run) / place.steps)
            from_first_step, enough = killed % 2 == 1, killed >= kills
            began = time.time()
            started = place.begin(run, real)
            if from_first_step and not enough:
                status = wait_for_step(started, run, began)
            if status is None:
                within_s = left_s if from_first_step else start_s[real] + left_s
                status = started.wait(PATIENCE_S if enough else generator.uniform(0, within_s))
            if status is None:
                status = kill(started)
            if status == -signal.SIGKILL and not enough:
                chain.kills.append(Kill(moment(run, started.pid, began)))
                killed, status = killed + 1, None
        end(chain, place, run, status, place.said())
    return chains


def kill(started: Started) -> int | None:
    """Kill a training's process group; returns how it ended, which it may have done before."""
    with suppress(ProcessLookupError):
        os.killpg(started.pid, signal.SIGKILL)
    return started.wait(PATIENCE_S)


def end(chain: Chain, place: Workplace, run: Path, status: int, said: str) -> None:
    """Note in what a training that was not killed any more ended otherwise than it should, and delete it."""
    chain.faults += [f"exit code {status}: {said[-2000:]}"] if status else differences(place, run)
    for fault in chain.faults:
        print(f"LOST after {chain.kills[-3:]}: {fault}", file=sys.stderr)
    if not chain.faults:
        shutil.rmtree(run)


def time_to_start(place: Workplace, real: bool) -> float:
    """Seconds from the start of a training to its first step."""
    run = place.fresh()
    began = time.time()
    started = place.begin(run, real)
    wait_for_step(started, run, began)
    seconds = time.time() - began
    kill(started)
    shutil.rmtree(run)
    return seconds


def wait_for_step(started: Started, run: Path, began: float) -> int | None:
    """Wait until a training has written of a step; how it ended, if it has before."""
    status = None
    while status is None and (newest_line(run) or 0.0) <= began:
        if time.time() > began + PATIENCE_S:
            raise TimeoutError(f"{run} has not taken a step in {PATIENCE_S} s")
        status = started.wait(0.05)
    return status


def newest_line(run: Path) -> float | None:
    """When the last line of the training's metrics was written; None: there is none."""
    metrics = run / "metrics" / "train_metrics.jsonl"
    return metrics.stat().st_mtime if metrics.exists() and metrics.stat().st_size else None


def newest_step(run: Path) -> int:
    """The step from which a training will go on."""
    return max((found.step for found in read_checkpoints(RunPaths(run)) if not found.faults), default=0)


def moment(run: Path, pid: int, began: float) -> str:
    """What a killed process was at, as far as its files tell."""
    owner = read_state(RunPaths(run)).owner
    if owner is None or owner.pid != pid:
        return "starting"
    if any(path.name.endswith((".tmp", ".old")) for path in (run / "checkpoints").glob(".*")):
        return "saving"
    if (run / "checkpoints" / "final").exists():
        return "ending"
    written = newest_line(run)
    return "training" if written is not None and written > began else "loading"


def rows_of(chains: Sequence[Chain]) -> list[dict[str, Any]]:
    """Kills and losses by place and moment."""
    kills = Counter(kill for chain in chains for kill in chain.kills)
    lost = Counter(kill for chain in chains if chain.faults for kill in chain.kills)

    def total(counted: Counter[Kill], place: str, **such: Any) -> int:
        fits = [kill for kill in counted if kill.place == place]
        return sum(counted[kill] for kill in fits if all(getattr(kill, key) == value for key, value in such.items()))

    return [
        {
            "place": place,
            "random": place in MOMENTS,
            "kills": total(kills, place),
            "torn": total(kills, place, torn=True),
            "losses": total(lost, place),
            "kinds": {kind: total(kills, place, kind=kind) for kind in KINDS} if place in PLACES else {},
        }
        for place in (*PLACES, *MOMENTS)
    ]


def show(measured: dict[str, Any]) -> None:
    """Print where was killed, and what was lost."""
    machine, rows = measured["provenance"], measured["rows"]
    print_table(
        f"{measured['losses']} losses of {measured['kills']} kills, {measured['trainings']} trainings on "
        f"{measured['backend']}",
        ["killed", "kills", "files cut", *KINDS, "losses"],
        [
            [
                f"{'at random, ' if row['random'] else 'before an operation: '}{row['place']}",
                str(row["kills"]),
                "" if row["random"] else str(row["torn"]),
                *(str(row["kinds"].get(kind, "")) for kind in KINDS),
                str(row["losses"]),
            ]
            for row in rows
        ],
        notes=[
            *(f"LOST: {fault}" for fault in measured["faults"]),
            f"{measured['operations_s']:.0f} s for kills at operations, {measured['random_s']:.0f} s at random.",
            "starting: imports and checks, before the stage; loading: until its first step. end: manifest and state.",
            "folder: it is made; after: the moment after the last operation; files cut: after their last sync.",
            f"{machine['processor']}, {machine['cores']} cores, {measured['backend']} {machine[measured['backend']]}, "
            f"load average {machine['load_average'][0]} before, {machine['load_average_after'][0]} after.",
        ],
    )


if __name__ == "__main__":
    sys.exit(main())
