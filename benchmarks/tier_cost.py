"""What tiers cost: time per step and peak memory of tier set-ups against plain LoRA, in the same run, taken in turn.

    python benchmarks/tier_cost.py [--model 65M|1.2B] [--rounds 12] [--threads 1] [--clock processor|wall] [--json FILE]
                                   [--smoke]

Trains a Qwen2 with random weights through the real backend: of 65 M parameters, or, for a GPU, which such a small one
leaves idle, with six layers as wide as those of a model of 7 billion, in bfloat16. What a step costs depends on the
tiers that are due at it, and a median over raw steps of [1, 2, 4] would be that of its cheap ones. So each kind of
step, by its due tiers, is timed apart; a step's time is the sum over kinds of (how often the kind comes in one full
cycle, the least common multiple of the periods) x (the median of its times). Every round takes each kind of every
set-up, up to four times by how often it comes, all in an order of the round's own. A time ratio, which is held against
its bar, is that of two such step times. Beside it stand the quartiles over the rounds of the ratio within a round,
which keeps its meaning while the machine's speed drifts. The clock of one CPU thread is the processor's, which stands
while other work of the machine has the core; with more threads, or CUDA, it is the wall's. Memory is the exact peak of
tensor memory over one full cycle, after every tier has moved once, so that the optimizer's whole state counts. Exits
with 1 when a bar is missed, but for --smoke.
"""

import argparse
import gc
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from itertools import chain
from math import lcm
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from memory import peak_bytes
from nestune.backends.factory import make_backend
from nestune.config import parse_config
from nestune.data.batches import Batch
from nestune.files import write_json
from nestune.tiers.schedule import TierSchedule
from nestune.tiers.tier_map import assign_tiers
from random_model import Shape, random_batch, write_random_base
from report import load_average, print_table, provenance

LEARNING_RATE = 1e-5
PLAIN, PLAIN_CHECKPOINTED = "plain", "plain, checkpointed"
DEEP_FAST = "layer_depth_reversed"
MIB = 2**20
CLOCKS: dict[str, Callable[[], float]] = {"processor": time.process_time, "wall": time.perf_counter}


@dataclass(frozen=True)
class Bar:
    """At most this many times the time and the peak memory of the set-up called `against`; None: only shown."""

    against: str
    time: float | None = None
    memory: float | None = 1.0


@dataclass(frozen=True)
class SetUp:
    """One way to train: blocks of its configuration and what is asked of it; `importance`: the pass before training."""

    name: str
    strategy: str = DEEP_FAST
    update_every: tuple[int, ...] = (1, 1, 1)
    bars: tuple[Bar, ...] = (Bar(PLAIN),)
    tiers: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    importance: bool = False


CHECKPOINTED = {"gradient_checkpointing": True}
COMPOSED = (Bar(PLAIN), Bar(PLAIN_CHECKPOINTED, 0.80))
ACCUMULATE = {"inactive_gradients": "accumulate"}
SET_UPS = (
    SetUp(PLAIN),
    SetUp("deep fast [1, 2, 4]", DEEP_FAST, (1, 2, 4), (Bar(PLAIN, 0.80),)),
    SetUp("deep fast [1, 8, 64]", DEEP_FAST, (1, 8, 64), (Bar(PLAIN, 0.70),)),
    SetUp("shallow fast [1, 2, 4]", "layer_depth", (1, 2, 4), (Bar(PLAIN, 1.00),)),
    # Each part of a divided matrix counts its own steps, in 4 bytes: 1344 bytes more than plain here.
    SetUp("stacked [1, 2, 4]", "stacked", (1, 2, 4), (Bar(PLAIN, memory=1.0001),)),
    SetUp(PLAIN_CHECKPOINTED, training=CHECKPOINTED),
    SetUp("deep fast [1, 2, 4], checkpointed", DEEP_FAST, (1, 2, 4), COMPOSED, training=CHECKPOINTED),
    SetUp("deep fast [1, 2, 4], accumulate", DEEP_FAST, (1, 2, 4), (Bar(PLAIN, memory=None),), tiers=ACCUMULATE),
    SetUp("importance, a measured step", bars=(Bar(PLAIN, 1.50, memory=None),), importance=True),
)
FULL = Shape(hidden=640, layers=12, intermediate=1728, heads=10, vocabulary=8192, rows=4, width=64)
# Some 45 GiB, as every set-up has its own.
WIDE = Shape(hidden=4096, layers=6, intermediate=11008, heads=32, vocabulary=8192, rows=8, width=1024, dtype="bfloat16")
MODELS = {"65M": FULL, "1.2B": WIDE}
SMOKE = Shape(hidden=32, layers=3, intermediate=64, heads=2, vocabulary=512, rows=2, width=16)


@dataclass
class StepKind:
    """The steps of a set-up at which the same tiers are due, the part of all its steps that they are, their times."""

    due: frozenset[int]
    frequency: Fraction
    run: Callable[[], object]
    seconds: list[float] = field(default_factory=list)

    @property
    def turns(self) -> int:
        """How often it is timed in a round."""
        return max(1, round(4 * self.frequency))


def main() -> int:
    """Measure, print, write; returns the exit code."""
    parser = argparse.ArgumentParser(description="Time per step and peak memory of tier set-ups against plain LoRA.")
    parser.add_argument("--model", choices=MODELS, default="65M", help="what is trained; 1.2B: on a GPU")
    parser.add_argument("--rounds", type=int, default=12, help="rounds of all set-ups, 2 or more")
    parser.add_argument("--threads", type=int, default=1, help="threads that torch computes with")
    parser.add_argument("--clock", choices=CLOCKS, default="processor", help="with one CPU thread; else the wall's")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--smoke", action="store_true", help="a tiny model and 2 rounds: does it run? Exits with 0.")
    options = parser.parse_args()
    if options.rounds < 2 or options.threads < 1:
        parser.error(f"--rounds {options.rounds} --threads {options.threads}: at least 2 rounds and 1 thread")
    import torch

    torch.set_num_threads(options.threads)
    clock = "wall" if options.threads > 1 or torch.cuda.is_available() else options.clock
    shape, rounds = (SMOKE, 2) if options.smoke else (MODELS[options.model], options.rounds)
    conditions = provenance()
    with TemporaryDirectory() as folder:
        parameters = write_random_base(shape, Path(folder))
        batch = random_batch(shape)
        # The libraries' million objects: walked again and again they would cost more than what is measured.
        gc.collect()
        gc.freeze()
        peaks = {set_up.name: peak_of_a_cycle(set_up, Path(folder), batch) for set_up in SET_UPS}
        kinds = {set_up.name: step_kinds(set_up, Path(folder), batch) for set_up in SET_UPS}
        time_in_turn(list(chain.from_iterable(kinds.values())), rounds, CLOCKS[clock])
    rows = [row_of(set_up, kinds, peaks) for set_up in SET_UPS]
    passed = all(comparison["passed"] for row in rows for comparison in row["against"])
    measured = {
        "benchmark": "tier_cost",
        "smoke": options.smoke,
        "provenance": conditions | {"load_average_after": load_average()},
        "parameters": parameters,
        "dtype": shape.dtype,
        "tokens": [shape.rows, shape.width],
        "rounds": rounds,
        "clock": clock,
        "rows": rows,
        "passed": passed,
    }
    if options.json is not None:
        write_json(options.json, measured)
    show(measured)
    return 0 if passed or options.smoke else 1


def due_of_a_cycle(set_up: SetUp) -> list[frozenset[int]]:
    """The tiers due at each step of one full cycle, at the last of which all are."""
    schedule = TierSchedule(set_up.update_every)
    return [schedule.due(step) for step in range(1, lcm(*set_up.update_every) + 1)]


def stepper(set_up: SetUp, base: Path, batch: Batch) -> Callable[[frozenset[int]], object]:
    """A new backend's step as the set-up says, given the tiers that are due."""
    config = parse_config(
        {
            "name": "tier_cost",
            "model": {"base": str(base)},
            "data": {"train": str(base / "config.json")},  # never read
            "tiers": {"strategy": set_up.strategy, "update_every": set_up.update_every, **set_up.tiers},
            "training": set_up.training,
        }
    )
    backend = make_backend(config)
    if set_up.importance:
        return lambda _: backend.measure_importance([[batch]], "gradient")
    backend.prepare_training(assign_tiers(backend.lora_parameters(), config.tiers).tier_of)
    return lambda due: backend.train_step([batch], due, LEARNING_RATE)


def peak_of_a_cycle(set_up: SetUp, base: Path, batch: Batch) -> int:
    """The most bytes of tensors at once, in a cycle that every tier's optimizer state was there for."""
    step, cycle = stepper(set_up, base, batch), due_of_a_cycle(set_up)
    step(cycle[-1])

    def one_cycle() -> None:
        for due in cycle:
            step(due)

    return peak_bytes(one_cycle)


def step_kinds(set_up: SetUp, base: Path, batch: Batch) -> list[StepKind]:
    """Each set of due tiers that a cycle has, and how often."""
    step, cycle = stepper(set_up, base, batch), due_of_a_cycle(set_up)
    return [StepKind(due, Fraction(times, len(cycle)), partial(step, due)) for due, times in Counter(cycle).items()]


def time_in_turn(kinds: Sequence[StepKind], rounds: int, clock: Callable[[], float]) -> None:
    """Take every kind of step by its turns in each round, after one that is not timed."""
    import torch

    turns = [kind for kind in kinds for _ in range(kind.turns)]
    for number in range(rounds + 1):
        for kind in random.Random(number).sample(turns, len(turns)):
            began = clock()
            kind.run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number > 0:
                kind.seconds.append(clock() - began)


def row_of(set_up: SetUp, kinds: Mapping[str, Sequence[StepKind]], peaks: Mapping[str, int]) -> dict[str, Any]:
    """What was measured of a set-up, and how it compares."""
    own = kinds[set_up.name]
    return {
        "set_up": set_up.name,
        "step_s": median_step(own),
        "peak_bytes": peaks[set_up.name],
        "kinds": [
            {
                "due": sorted(kind.due),
                "frequency": float(kind.frequency),
                "quartiles_s": statistics.quantiles(kind.seconds, method="inclusive"),
                "range_s": [min(kind.seconds), max(kind.seconds)],
            }
            for kind in own
        ],
        "against": [
            comparison(bar, own, kinds[bar.against], peaks[set_up.name] / peaks[bar.against]) for bar in set_up.bars
        ],
    }


def comparison(bar: Bar, own: Sequence[StepKind], other: Sequence[StepKind], memory: float) -> dict[str, Any]:
    """Ratios of time and memory to another set-up, and whether they keep to the bar."""
    paired = [mine / its for mine, its in zip(step_of_each_round(own), step_of_each_round(other), strict=True)]
    ratio = median_step(own) / median_step(other)
    return {
        "set_up": bar.against,
        "time_ratio": ratio,
        "paired_ratio_quartiles": statistics.quantiles(paired, method="inclusive"),
        "time_bar": bar.time,
        "memory_ratio": memory,
        "memory_bar": bar.memory,
        "passed": (bar.time is None or ratio <= bar.time) and (bar.memory is None or memory <= bar.memory),
    }


def median_step(kinds: Sequence[StepKind]) -> float:
    """Seconds a step: each kind's median, weighted by how often it comes."""
    return sum(float(kind.frequency) * statistics.median(kind.seconds) for kind in kinds)


def step_of_each_round(kinds: Sequence[StepKind]) -> list[float]:
    """Seconds a step as each round alone tells it, by the means of its turns."""
    return [
        sum(float(kind.frequency) * statistics.fmean(kind.seconds[n * kind.turns :][: kind.turns]) for kind in kinds)
        for n in range(len(kinds[0].seconds) // kinds[0].turns)
    ]


def show(measured: Mapping[str, Any]) -> None:
    """Print what was compared, what each kind of step took, and how it was measured."""
    machine, rows = measured["provenance"], measured["rows"]
    size = f"{measured['parameters']:,} parameters in {measured['dtype']}"
    print_table(
        f"{size}, {measured['tokens'][0]} x {measured['tokens'][1]} tokens",
        ["set-up", "s a step", "MiB", "against", "time", "paired: median", "quartiles", "bar", "memory", "bar", ""],
        [
            [
                row["set_up"],
                f"{row['step_s']:.3f}",
                f"{row['peak_bytes'] / MIB:.1f}",
                compared["set_up"],
                f"{compared['time_ratio']:.3f}",
                f"{compared['paired_ratio_quartiles'][1]:.3f}",
                "{0:.3f}-{2:.3f}".format(*compared["paired_ratio_quartiles"]),
                shown(compared["time_bar"]),
                f"{compared['memory_ratio']:.3f}",
                shown(compared["memory_bar"]),
                "" if measured["smoke"] else "ok" if compared["passed"] else "MISSED",
            ]
            for row in rows
            for compared in row["against"]
        ],
    )
    print_table(
        "Each kind of step",
        ["set-up", "due tiers", "frequency", "s, median", "quartiles", "range"],
        [
            [
                row["set_up"],
                ", ".join(map(str, kind["due"])),
                f"{kind['frequency']:.4f}",
                f"{kind['quartiles_s'][1]:.3f}",
                "{0:.3f}-{2:.3f}".format(*kind["quartiles_s"]),
                "{:.3f}-{:.3f}".format(*kind["range_s"]),
            ]
            for row in rows
            for kind in row["kinds"]
        ],
        notes=[
            f"{measured['rounds']} rounds of all. A step's time is the sum over its kinds of frequency x median;",
            "time: the ratio of such times, held against the bar; paired: the ratio within a round, over rounds.",
            "plain: LoRA with [1, 1, 1].",
            f"Seconds of the {measured['clock']} clock. MiB: exact peak of tensor memory over a full cycle.",
            f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} used, torch {machine['torch']}, "
            f"load average {machine['load_average'][0]} before, {machine['load_average_after'][0]} after.",
            *(["A smoke run: its model is tiny, so its ratios say nothing."] if measured["smoke"] else []),
        ],
    )


def shown(bar: float | None) -> str:
    """A bar as the table has it."""
    return "" if bar is None else f"<= {bar:.2f}" if round(bar, 2) == bar else f"<= {bar:g}"


if __name__ == "__main__":
    sys.exit(main())
