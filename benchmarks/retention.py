"""What keeps knowledge while a model learns: every method on one task, and on a sequence of three.

    python benchmarks/retention.py [--only one_task|sequence] [--methods NAME ...] [--seeds N] [--jobs N]
                                   [--work FOLDER] [--limit S] [--config FILE]
                                   [--json FILE] [--page FILE] [--figure FILE] [--smoke] [--of FILE ...]

Worlds by seed: a tiny base model that knows 160 made-up people by heart, and new things to learn. One task (40 new
people), 5 seeds: plain LoRA at five learning rates, every tier strategy, replay, KL to the parent, combinations, the
recipes; each with and without strength. Three tasks in 3 orders, 3 seeds: the recipe with all earlier data, and with a
quarter of the world replayed; what they are compared with, and the recipe with 64 rows stored, take one order a seed,
joint training has none. Exits with 1 where a bar is missed, but for --smoke.

Each cell's result is kept in --work, and a second start goes on; about 90 minutes on two cores, bases (some minutes
each, kept in the cache) included. With --config one task of a run is learned, from the base, data and retention sets
that its configuration names.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from nestune.files import write_json, write_text
from report import load_average, provenance
from retention_cells import Cell, results, run_all
from retention_methods import ALL, NO_OLD_DATA, ONE_TASK, SEQUENCE, WITH_REPLAY, Method, SequenceMethod
from retention_runs import untouched
from retention_show import Table, bars_table, figure, markdown, one_task_table, sequence_table, show
from retention_summary import Bar, one_task_bars, one_task_rows, sequence_bars, sequence_rows
from retention_world import BASE_STEPS, SMOKE_STEPS, TASKS, World, cache_folder, world_of, world_of_config

SEEDS, SEQUENCE_SEEDS = 5, 3
ORDERS = tuple(TASKS[start:] + TASKS[:start] for start in range(len(TASKS)))
SMOKE_ONE_TASK = ("plain 1e-3", "importance [1, 2, 4]", "replay 10 %", NO_OLD_DATA, WITH_REPLAY)
SMOKE_TRAINING_STEPS, SMOKE_ROWS = 4, 40


def main() -> int:
    """Run what is missing, print, write; returns the exit code."""
    options = parse_options()
    # Before torch is imported: of two threads on so small a model the second only waits.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    measured = joined([json.loads(path.read_text()) for path in options.of]) if options.of else run(options)
    tables, notes = tables_of(measured), [note for part in measured["parts"] for note in notes_of(part)]
    show(tables, notes)
    if options.json:
        write_json(options.json, measured)
    if options.page:
        write_text(options.page, PAGE + markdown(tables, notes) + TRIED)
    if options.figure and measured["one_task"]:
        figure(measured["one_task"], options.figure)
    return 0 if options.smoke or all(bar["met"] for bar in measured["bars"]) else 1


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Run what is missing; returns everything that is told, as JSON."""
    options.work.mkdir(parents=True, exist_ok=True)
    conditions, began = provenance(), time.perf_counter()
    cells = cells_of(options)
    run_all(cells, options.work, options.jobs, None if options.limit is None else time.time() + options.limit)
    measured, part = measure(cells, options)
    part["provenance"] = conditions | {"load_average_after": load_average()}
    part["seconds"] = time.perf_counter() - began
    return measured | {"parts": [part]}


def joined(measured: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What parts say that were measured apart, as one; of a method, or a bar, in several the last one counts."""
    keys = ("one_task", "sequence", "bars", "parts")
    whole: dict[str, Any] = {key: [] for key in keys}
    for part in measured:
        whole["parts"] = [*whole["parts"], *part["parts"]]
        for key, named in (("one_task", "method"), ("sequence", "method"), ("bars", "what")):
            again = {row[named]: row for row in part[key]}
            kept = [again.pop(row[named], row) for row in whole[key]]
            whole[key] = [*kept, *again.values()]
    return whole | {"seeds": max(part["seeds"] for part in measured)}


PAGE = """# What keeps knowledge, measured

Written by `benchmarks/retention.py --page`; what is compared and how stands in that file. The same figures seed by
seed are in `benchmarks/results/retention.json`. Of a method that two of the commands below have measured, the figures
are those of the later one.

![learning against forgetting](retention.png)

"""
TRIED = """
## What was found, and what was tried besides

On one to five seeds each, while the recipes were found; what is told is their direction, not a figure:

- What plain training forgets is for the most part not gone: learned first, and then held for half of each step to what
  the model had written before, it finds the facts again, those that no text mentions too. Skills come back less surely.
- Held from the first step on, it learns later, and what contradicts a known skill perhaps never: to reverse words,
  after copying them, was not learned on two of three worlds; on the one that was looked into neither at rates from 3e-3
  to 5e-3, nor with a weight of 3, rank 32, no clipping, or a constant rate. Learned first, it was on all of them.
- On one of the three worlds copying and reversing exclude each other nearly, in joint training too. There it helps
  to replay from the first step on, and to hold afterwards; to learn first without replay loses copying for good.
- Restored is what the texts vary: 2000 of them keep more than 1000 where nothing is replayed. Held from the first step
  on, 1000 to 6000 tie.
- Drawn evenly from a large file and two small tasks, replay has too few rows of what is known, and copying is lost.
- Ties: texts from the start token and from a chat's opening, or from the latter alone; rank 4 or 16; MLP modules alone;
  the divergence the other way round; texts drawn at temperature 1.3; a weight of 20; where nothing is replayed, three
  quarters of each step held.
- Worse: attention modules alone, rank 32, texts drawn at temperature 1.6, deep-fast tiers with KL every fourth step.
- Facts that no text mentions are kept less well than those that one does, as they are those that the base is least sure
  of. Questions in the forms that it knows about names that nobody has, answered by it, keep them better.
- Where a quarter is replayed, on two worlds that are not in the table, one order each: 500 texts and 1500 questions in
  place of 1000 of each keep as much in all (585 and 588 of 619 uncovered rows). Fewer texts leave more rows
  unmentioned, 163 in place of 42, and so no longer only those that the base is least sure of; 0.93 of them are kept in
  both. Three quarters of each restoring step in place of half: 595 of 619, and as much of the tasks. A strength that
  gives up a tenth of what was learned in place of a twentieth, its factors closer, at half of each step: 595, too, 155
  of 161 unmentioned, and 0.96 of the tasks in place of 0.98.
- With 16 new rows a step the third task cost 0.67 of joint training's CPU time, with 12 it learns as much. To give up a
  twentieth of each task by its strength costs a sequence 0.02 of its average accuracy, and keeps hardly more. These
  were tried on four sequences of worlds 1, 2 and 4, of which the table has the first two. General knowledge is close
  to its bar because of world 1, where copying ends at 0.15, 0.70 or 0.96 by the order of the tasks (joint training:
  0.09).
- Going on with the parent's own matrices (`start: continue`) would save a fifth of a step, and does not go with a
  strength below 1, whose sum with the parent has twice the rank.
"""


def parse_options() -> argparse.Namespace:
    """The command line, its faults told."""
    parser = argparse.ArgumentParser(description="What keeps knowledge while a model learns: every method compared.")
    parser.add_argument("--only", choices=("one_task", "sequence"), help="one of the two parts")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="only methods whose name has one of these in it")
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"worlds; sequences take {SEQUENCE_SEEDS} at most")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes of one thread each")
    parser.add_argument("--work", type=Path, help="folder of the results so far; default: in the cache")
    parser.add_argument("--limit", type=float, metavar="S", help="begin no cell after so many seconds")
    parser.add_argument("--config", type=Path, metavar="FILE", help="learn the task of this run's configuration")
    parser.add_argument(
        "--of", type=Path, nargs="+", metavar="FILE", help="run nothing, show what --json of earlier runs wrote"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the tables here, as Markdown")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw learning against forgetting here")
    parser.add_argument("--smoke", action="store_true", help="a base that knows little, few steps: does it run?")
    options = parser.parse_args()
    if options.seeds < 1 or options.jobs < 1:
        parser.error(f"--seeds {options.seeds} --jobs {options.jobs}: both must be 1 or more")
    if options.config and options.only == "sequence":
        parser.error("--config has one task; leave out --only sequence")
    options.work = options.work or cache_folder() / ("smoke" if options.smoke else "work")
    if not chosen([*ONE_TASK, *SEQUENCE], options):
        parser.error(f"--methods {' '.join(options.methods)}: no method is called so")
    return options


def cells_of(options: argparse.Namespace) -> list[Cell]:
    """What is to be run: the costly sequences first, so that no process is left with one at the end."""
    seeds = range(1 if options.smoke else options.seeds)
    worlds = make_worlds(seeds, options)
    one_task, sequence = methods_of(options)
    orders = ORDERS[:1] if options.smoke else ORDERS
    cells = []
    if sequence:
        for world in worlds[:SEQUENCE_SEEDS]:
            # Joint training has no order.
            cells += [Cell("base", world, order=TASKS)]
            cells += [Cell("joint", world, method, TASKS) for method in sequence if method.joint]
        for turn in range(len(orders)):
            for number, world in enumerate(worlds[:SEQUENCE_SEEDS]):
                # Each seed begins with another order, which is all that a control takes.
                order = orders[(number + turn) % len(orders)]
                alike = [method for method in sequence if not method.joint and (turn == 0 or not method.control)]
                cells += [Cell("sequence", world, method, order) for method in alike]
    cells += [Cell("one task", world, method) for method in one_task for world in worlds]
    return cells


def make_worlds(seeds: Sequence[int], options: argparse.Namespace) -> list[World]:
    """The world of each seed; bases that are not there yet are trained side by side."""
    steps = SMOKE_STEPS if options.smoke else BASE_STEPS
    if options.config:
        first = world_of_config(options.config, 0, options.work)
        return [replace(first, seed=seed) for seed in seeds]
    with ThreadPoolExecutor(options.jobs) as pool:
        rows = SMOKE_ROWS if options.smoke else None
        return list(pool.map(lambda seed: world_of(seed, options.work, steps, rows), seeds))


def methods_of(options: argparse.Namespace) -> tuple[list[Method], list[SequenceMethod]]:
    """The methods that are asked for, of few steps for a smoke run."""
    one_task = [] if options.only == "sequence" else chosen(ONE_TASK, options)
    sequence = [] if options.only == "one_task" or options.config else chosen(SEQUENCE, options)
    if options.smoke:
        one_task = [short(method) for method in one_task if method.name in SMOKE_ONE_TASK]
        sequence = [short(method) for method in sequence]
    if options.config and not Path(options.work, "data-given", f"{ALL}.jsonl").exists():
        left_out = [method.name for method in one_task if method.replayed]
        if left_out:
            print(
                f"left out, as retention.replay.files names nothing to replay: {', '.join(left_out)}", file=sys.stderr
            )
        one_task = [method for method in one_task if not method.replayed]
    return one_task, sequence


def chosen(methods: Sequence[Any], options: argparse.Namespace) -> list[Any]:
    """Those whose name has one of the asked words in it; all where none are asked for."""
    return [method for method in methods if not options.methods or any(word in method.name for word in options.methods)]


def short(method: Any) -> Any:
    """The same with next to no steps, texts and factors."""
    from retention_methods import merged

    least: dict[str, Any] = {"strength": {"factors": [0.5, 1.0]}} if WITHOUT_STRENGTH not in str(method.blocks) else {}
    if "kl" in str(method.blocks) or "recipe" in str(method.blocks):
        least["kl"] = {"self_written": {"texts": 20, "max_tokens": 16}}
    blocks = merged(method.blocks, {"retention": least})
    if "importance" in method.name:
        blocks["tiers"] = blocks["tiers"] | {"importance": {"steps": 2}}
    if isinstance(method, SequenceMethod):
        method = replace(method, questions=min(method.questions, SMOKE_ROWS))
    return replace(method, steps=SMOKE_TRAINING_STEPS, blocks=blocks)


WITHOUT_STRENGTH = "'strength': None"


def measure(cells: Sequence[Cell], options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """The figures, and what was run for them, as JSON."""

    @cache
    def mask(seed: int, replayed: str) -> Mapping[str, str]:
        world = next(cell.world for cell in cells if cell.world.seed == seed)
        return untouched(world, replayed, TASKS)

    def of_cell(cell: Cell) -> Mapping[str, str]:
        assert isinstance(cell.method, SequenceMethod)
        return mask(cell.world.seed, cell.method.general or ALL)

    found = list(results(cells, options.work))
    one_task, sequence = one_task_rows(found), sequence_rows(found, of_cell)
    bars: list[Bar] = []
    if not options.config:
        bars += one_task_bars(one_task) if options.only != "sequence" else []
        bars += sequence_bars(sequence) if options.only != "one_task" else []
    seeds = 1 if options.smoke else options.seeds
    figures = {"seeds": seeds, "one_task": one_task, "sequence": sequence, "bars": [bar.as_dict() for bar in bars]}
    return figures, {
        "smoke": options.smoke,
        "config": str(options.config) if options.config else None,
        "cells": len(cells),
        "cells_missing": len(cells) - len(found),
        "cell_cpu_s": sum(result["cell_cpu_s"] for _, result in found),
    }


def tables_of(measured: Mapping[str, Any]) -> list[Table]:
    """The tables of what was measured."""
    tables = []
    if measured["one_task"]:
        tables.append(one_task_table(measured["one_task"], measured["seeds"]))
    if measured["sequence"]:
        tables.append(sequence_table(measured["sequence"]))
    bars = [Bar(bar["what"], bar["bar"], bar["value"], bar["at_least"]) for bar in measured["bars"]]
    return [*tables, bars_table(bars)] if bars else tables


def notes_of(part: Mapping[str, Any]) -> list[str]:
    """Where and with what a part was measured."""
    machine = part["provenance"]
    changed = ", with changes" if machine["changed_since_commit"] else ""
    notes = [
        f"`{machine['command']}`, commit {machine['commit']}{changed}; {machine['processor']}, {machine['cores']} "
        f"cores, one thread a process, torch {machine['torch']}, load average {machine['load_average'][0]} before, "
        f"{machine['load_average_after'][0]} after; {part['cell_cpu_s']:.0f} CPU s in {part['cells']} cells.",
    ]
    if part["cells_missing"]:
        notes.append(f"NOT COMPLETE: {part['cells_missing']} of {part['cells']} cells are missing.")
    return [*notes, *(["A smoke run: its figures say nothing."] if part["smoke"] else [])]


if __name__ == "__main__":
    sys.exit(main())
