"""What a step costs on MLX, against mlx-lm's own LoRA trainer and PyTorch, in the same process, taken in turn.

    python benchmarks/backends.py [--rounds 8] [--threads 1] [--clock processor|wall] [--json FILE] [--smoke]

One Qwen2 of 65 M parameters with random weights, one adapter on it, one batch: mlx-lm's own `iterate_batches` makes
it, and mlx-lm's own `default_loss` tells what is supervised, the second half of each row and the padding token after
it. Everyone starts from the same adapter folder; unless all then find the same loss, nothing is timed. Nestune clips
gradients and corrects Adam's bias, as it does by default, and mlx-lm does not; nothing is taken off for it. Times and
ratios are made as in tier_cost.py. A step of mlx-lm and one of [1, 1, 1] learn from the same tokens, so the ratio of
their times is that of their times per supervised token, and the bar is held against it. Memory is the peak of arrays,
of each alone, over steps of every kind; MLX frees in a thread of its own, so that it varies by some percent between
runs where arrays are small. Exits with 1 when a bar is missed, but for --smoke.
"""

import argparse
import gc
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np

from memory import peak_bytes
from nestune.backends.adapters import METADATA
from nestune.backends.factory import make_backend
from nestune.backends.mlx_blas import load_fast_blas
from nestune.base_model import resolve_base
from nestune.config import RunConfig, parse_config
from nestune.data.batches import Batch
from nestune.files import write_json
from nestune.tiers.tier_map import assign_tiers
from random_model import Shape, write_random_base
from report import load_average, print_table, provenance
from tier_cost import (
    ACCUMULATE,
    CHECKPOINTED,
    CLOCKS,
    DEEP_FAST,
    FULL,
    LEARNING_RATE,
    MIB,
    SMOKE,
    Bar,
    SetUp,
    StepKind,
    due_of_a_cycle,
    row_of,
    shown,
    time_in_turn,
)

# Relative; between rounding, 1e-6, and any difference in what is computed.
SAME_LOSS = 1e-4


@dataclass(frozen=True)
class Contender(SetUp):
    """A set-up of tiers and what trains it; `large`: on the model with the large vocabulary."""

    trainer: Literal["mlx-lm", "mlx", "torch"] = "mlx"
    large: bool = False


@dataclass(frozen=True)
class Task:
    """A base model, an adapter on it, and the batch that everyone trains on, as mlx-lm and as nestune take it."""

    base: Path
    adapter: Path
    of_mlx_lm: Any
    batch: Batch


# The loss of a step, in nats per supervised token, and how many of these it had.
Step = Callable[[frozenset[int]], tuple[float, int]]

MLX_LM, PLAIN, LARGE = "mlx-lm", "MLX", "mlx-lm, large"
MLX_LM_CHECKPOINTED = "mlx-lm, checkpointed"


def against(other: str, time: float | None = None) -> tuple[Bar, ...]:
    """Compared with another, its memory only shown."""
    return (Bar(other, time, memory=None),)


CONTENDERS = (
    Contender(MLX_LM, bars=against(MLX_LM), trainer="mlx-lm"),
    Contender(PLAIN, bars=against(MLX_LM, 1.00)),
    Contender("MLX, deep fast [1, 2, 4]", DEEP_FAST, (1, 2, 4), against(PLAIN)),
    Contender("MLX, deep fast [1, 8, 64]", DEEP_FAST, (1, 8, 64), against(PLAIN)),
    Contender("MLX, deep fast [1, 2, 4], accumulate", DEEP_FAST, (1, 2, 4), against(PLAIN), tiers=ACCUMULATE),
    Contender("MLX, stacked [1, 2, 4]", "stacked", (1, 2, 4), against(PLAIN)),
    Contender("torch", bars=against(PLAIN), trainer="torch"),
    Contender(MLX_LM_CHECKPOINTED, bars=against(MLX_LM), training=CHECKPOINTED, trainer="mlx-lm"),
    Contender("MLX, checkpointed", bars=against(MLX_LM_CHECKPOINTED), training=CHECKPOINTED),
    Contender(LARGE, bars=against(MLX_LM), trainer="mlx-lm", large=True),
    Contender("MLX, large", bars=against(LARGE), large=True),
)


def main() -> int:
    """Measure, print, write; returns the exit code."""
    parser = argparse.ArgumentParser(description="Time per step and peak memory on MLX, against mlx-lm and PyTorch.")
    parser.add_argument("--rounds", type=int, default=8, help="rounds of all, 2 or more")
    parser.add_argument("--threads", type=int, default=1, help="threads that matrix products are computed with")
    parser.add_argument("--clock", choices=CLOCKS, default="processor", help="with one CPU thread; else the wall's")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--smoke", action="store_true", help="a tiny model and 2 rounds: does it run? Exits with 0.")
    options = parser.parse_args()
    if options.rounds < 2 or options.threads < 1:
        parser.error(f"--rounds {options.rounds} --threads {options.threads}: at least 2 rounds and 1 thread")
    on_gpu = start(options.threads)
    clock = "wall" if options.threads > 1 or on_gpu else options.clock
    shape, rounds = (SMOKE, 2) if options.smoke else (FULL, options.rounds)
    conditions = provenance() | {package: version(package) for package in ("mlx", "mlx-lm")}
    with TemporaryDirectory() as folder:
        task = make_task(shape, Path(folder) / "usual")
        large = make_task(replace(shape, vocabulary=4 * shape.vocabulary), Path(folder) / "large")
        kinds, peaks, seen = {}, {}, {}
        for contender in CONTENDERS:
            of_its_size = large if contender.large else task
            kinds[contender.name], peaks[contender.name], seen[contender.name] = prepare(contender, of_its_size)
        check_same_loss(seen)
        # The libraries' million objects: walked again and again they would cost more than what is measured.
        gc.collect()
        gc.freeze()
        time_in_turn(list(chain.from_iterable(kinds.values())), rounds, CLOCKS[clock])
    rows = [row_of(contender, kinds, peaks) | {"first_loss": seen[contender.name][0]} for contender in CONTENDERS]
    passed = all(comparison["passed"] for row in rows for comparison in row["against"])
    measured = {
        "benchmark": "backends",
        "smoke": options.smoke,
        "provenance": conditions | {"load_average_after": load_average()},
        "vocabularies": [shape.vocabulary, 4 * shape.vocabulary],
        "tokens": [shape.rows, shape.width],
        "supervised_tokens": seen[MLX_LM][1],
        "rounds": rounds,
        "clock": clock,
        "rows": rows,
        "passed": passed,
    }
    if options.json is not None:
        write_json(options.json, measured)
    show(measured)
    return 0 if passed or options.smoke else 1


def start(threads: int) -> bool:
    """Import both frameworks, which then compute with as many threads; whether one of them has a GPU."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    # First: what MLX computes with would change PyTorch's rounding (nestune.backends.mlx_blas).
    import torch

    torch.set_num_threads(threads)
    load_fast_blas()
    import mlx.core as mx

    return bool(torch.cuda.is_available() or mx.default_device() == mx.gpu)


def make_task(shape: Shape, folder: Path) -> Task:
    """A base with random weights, an adapter that changes what it says, and a batch."""
    from mlx_lm.tuner.trainer import iterate_batches

    base, adapter = folder / "base", folder / "adapter"
    write_random_base(shape, base)
    settings = json.loads((base / "config.json").read_text(encoding="utf-8"))
    # Where mlx-lm looks for it.
    write_json(base / "config.json", settings | {"rope_theta": settings["rope_parameters"]["rope_theta"]})
    adapter.mkdir()
    generator = np.random.default_rng(0)
    rows = [
        (generator.integers(3, shape.vocabulary, size=shape.width).tolist(), shape.width // 2)
        for _ in range(shape.rows)
    ]
    tokens, spans = next(iterate_batches(rows, batch_size=shape.rows, max_seq_length=2048))
    # default_loss counts from the offset to the length, of which the last is the token after the row.
    positions, first_and_last = np.arange(tokens.shape[1]), np.array(spans)
    supervised = (positions >= first_and_last[:, :1]) & (positions <= first_and_last[:, 1:])
    batch = Batch(np.array(tokens), supervised, np.full(shape.rows, shape.width + 1, dtype=np.int32))
    config = configuration(Contender("adapter"), base)
    backend = make_backend(config)
    backend.prepare_training(assign_tiers(backend.lora_parameters(), config.tiers).tier_of)
    for _ in range(3):
        backend.train_step([batch], frozenset({0, 1, 2}), learning_rate=1e-3)
    backend.save_adapter(adapter)
    trained_on = resolve_base(config.model)
    write_json(adapter / METADATA, {"base": {"reference": trained_on.reference, "sha256": trained_on.sha256}})
    return Task(base, adapter, (tokens, spans), batch)


def configuration(contender: Contender, base: Path) -> RunConfig:
    """The configuration of a contender that nestune trains."""
    return parse_config(
        {
            "name": "backends",
            "model": {"base": str(base), "backend": contender.trainer},
            "data": {"train": str(base / "config.json")},  # never read
            "tiers": {"strategy": contender.strategy, "update_every": contender.update_every, **contender.tiers},
            "training": contender.training,
        }
    )


def step_of_nestune(contender: Contender, task: Task) -> Step:
    """A new backend's step, from the task's adapter."""
    config = configuration(contender, task.base)
    backend = make_backend(config)
    backend.load_adapter(task.adapter)
    backend.prepare_training(assign_tiers(backend.lora_parameters(), config.tiers).tier_of)

    def step(due: frozenset[int]) -> tuple[float, int]:
        result = backend.train_step([task.batch], due, LEARNING_RATE)
        return result.loss, result.tokens

    return step


def step_of_mlx_lm(contender: Contender, task: Task) -> Step:
    """An iteration of `mlx_lm.tuner.trainer.train`, from the task's adapter, all of which moves.

    Source: mlx-lm 0.32.2, with the defaults of its command line, but AdamW. `train` keeps its loop to itself, so its
    lines stand here, without those for accumulated gradients, for several machines, and for its reports.
    """
    import mlx.core as mx
    from mlx import optimizers
    from mlx.nn.utils import value_and_grad
    from mlx_lm.tuner import trainer
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    model: Any = load_model(task.base)[0]
    model.freeze()
    # Makes the layers by linear_to_lora_layers, as the adapter's settings say.
    load_adapters(model, str(task.adapter))
    optimizer = optimizers.AdamW(LEARNING_RATE, weight_decay=0.0)
    loss_value_and_grad = value_and_grad(model, trainer.default_loss)
    state = [model.state, optimizer.state, mx.random.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def step(batch: Any) -> Any:
        (lvalue, toks), grad = loss_value_and_grad(model, *batch)
        optimizer.update(model, grad)
        return lvalue, toks

    model.train()
    layer = type(model.layers[0])
    usual = layer.__call__
    if contender.training.get("gradient_checkpointing"):
        trainer.grad_checkpoint(model.layers[0])
    own = layer.__call__

    def iteration(_: frozenset[int]) -> tuple[float, int]:
        # grad_checkpoint changes the class, and so the models of everyone else.
        layer.__call__ = own
        lvalue, toks = step(task.of_mlx_lm)
        mx.eval(state, lvalue, toks)
        trainer._clear_cache(trainer.TrainingArgs.clear_cache_threshold)
        layer.__call__ = usual
        return lvalue.item(), toks.item()

    layer.__call__ = usual
    return iteration


def prepare(contender: Contender, task: Task) -> tuple[list[StepKind], int, tuple[float, int]]:
    """Each kind of its steps, the most bytes of arrays at once, and the loss and tokens of its first step.

    Memory is what it has beyond what was there before it: the other contenders' models.
    """
    import mlx.core as mx

    gc.collect()
    before = mx.get_active_memory()
    step = step_of_mlx_lm(contender, task) if contender.trainer == "mlx-lm" else step_of_nestune(contender, task)
    cycle = due_of_a_cycle(contender)
    seen = step(cycle[-1])
    kinds = [StepKind(due, Fraction(times, len(cycle)), partial(step, due)) for due, times in Counter(cycle).items()]

    def one_of_each() -> None:
        for kind in kinds:
            kind.run()

    # What it traces and compiles is done with then.
    one_of_each()
    if contender.trainer == "torch":
        return kinds, peak_bytes(one_of_each), seen
    mx.clear_cache()
    mx.reset_peak_memory()
    one_of_each()
    return kinds, mx.get_peak_memory() - before, seen


def check_same_loss(seen: Mapping[str, tuple[float, int]]) -> None:
    """Leave with an error unless all that train the same model began with mlx-lm's loss and tokens."""
    for contender in CONTENDERS:
        loss, tokens = seen[contender.name]
        expected, of_as_many = seen[LARGE if contender.large else MLX_LM]
        if tokens != of_as_many or abs(loss / expected - 1) > SAME_LOSS:
            sys.exit(
                f"{contender.name} begins with a loss of {loss} over {tokens} tokens, and mlx-lm with {expected} over "
                f"{of_as_many}: they do not train the same, so their times say nothing."
            )


def show(measured: Mapping[str, Any]) -> None:
    """Print what was compared, and how it was measured."""
    machine, rows, tokens = measured["provenance"], measured["rows"], measured["supervised_tokens"]
    print_table(
        f"{measured['tokens'][0]} x {measured['tokens'][1]} tokens, {tokens} of them supervised",
        [
            "set-up",
            "s a step",
            "ms a token",
            "MiB",
            "against",
            "time",
            "paired: median",
            "quartiles",
            "bar",
            "memory",
            "",
        ],
        [
            [
                row["set_up"],
                f"{row['step_s']:.3f}",
                f"{row['step_s'] / tokens * 1000:.2f}",
                f"{row['peak_bytes'] / MIB:.1f}",
                compared["set_up"],
                f"{compared['time_ratio']:.3f}",
                f"{compared['paired_ratio_quartiles'][1]:.3f}",
                "{0:.3f}-{2:.3f}".format(*compared["paired_ratio_quartiles"]),
                shown(compared["time_bar"]),
                f"{compared['memory_ratio']:.3f}",
                verdict(measured["smoke"], compared),
            ]
            for row in rows
            for compared in row["against"]
        ],
        notes=[
            f"{measured['rounds']} rounds of all. time: the ratio of the times of a step, held against the bar;",
            "paired: the ratio within a round, over rounds. ms a token: of each supervised one.",
            "MLX and torch: nestune's backends, [1, 1, 1] where nothing else is said. mlx-lm has no tiers.",
            f"Vocabulary: {measured['vocabularies'][0]:,}; large: {measured['vocabularies'][1]:,}.",
            f"Seconds of the {measured['clock']} clock. MiB: peak of arrays, the model's weights included.",
            f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} used, "
            + ", ".join(f"{package} {machine[package]}" for package in ("mlx", "mlx-lm", "torch"))
            + f", load average {machine['load_average'][0]} before, {machine['load_average_after'][0]} after.",
            *(["A smoke run: its model is tiny, so its ratios say nothing."] if measured["smoke"] else []),
        ],
    )


def verdict(smoke: bool, compared: Mapping[str, Any]) -> str:
    """Whether a bar was kept to, where there is one that counts."""
    if smoke or compared["time_bar"] is None:
        return ""
    return "ok" if compared["passed"] else "MISSED"


if __name__ == "__main__":
    sys.exit(main())
