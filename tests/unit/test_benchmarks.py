"""The benchmarks run, and count what they say they count; what they find is never asserted here."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MIB = 2**20
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def load_peak_bytes() -> Callable[[Callable[[], object]], int]:
    spec = importlib.util.spec_from_file_location("benchmarks_memory", BENCHMARKS / "memory.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.peak_bytes  # type: ignore[no-any-return]


peak_bytes = load_peak_bytes()


def allocate(mebibytes: int) -> Any:
    return torch.empty(mebibytes * MIB, dtype=torch.uint8, device=DEVICE)


def test_peak_memory_adds_what_lives_at_once_and_not_what_comes_one_after_another() -> None:
    def work() -> None:
        first, second = allocate(8), allocate(4)
        del first, second
        third = allocate(10)
        del third

    assert peak_bytes(work) - peak_bytes(lambda: None) == 12 * MIB


def test_peak_memory_includes_what_was_there_before_and_counts_shared_memory_once() -> None:
    nothing = peak_bytes(lambda: None)
    held = allocate(16)
    shares_it = held[: 4 * MIB]
    assert peak_bytes(lambda: None) - nothing == 16 * MIB
    assert shares_it.data_ptr() == held.data_ptr()


def test_peak_memory_sees_what_only_autograd_keeps() -> None:
    """exp keeps its result: all three live to the end, where without a graph the first goes before the third comes."""
    numbers = torch.zeros(2 * MIB, device=DEVICE, requires_grad=True)

    def work(graph: bool) -> None:
        with torch.set_grad_enabled(graph):
            numbers.exp().exp().exp()

    assert peak_bytes(lambda: work(graph=True)) - peak_bytes(lambda: work(graph=False)) == 8 * MIB


@pytest.mark.skipif(DEVICE == "cuda", reason="CUDA's allocator counts by itself")
def test_peak_memory_refuses_work_that_gives_back_memory_from_before() -> None:
    held = [allocate(4)]
    with pytest.raises(RuntimeError, match="gave back memory from before"):
        peak_bytes(held.clear)


def smoke_report(benchmark: str, folder: Path) -> dict[str, Any]:
    file = folder / "report.json"
    subprocess.run(
        [sys.executable, BENCHMARKS / benchmark, "--smoke", "--json", file],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return smoke_report("tier_cost.py", tmp_path_factory.mktemp("tier_cost"))


def kinds_of(report: dict[str, Any]) -> dict[str, dict[tuple[int, ...], float]]:
    return {row["set_up"]: {tuple(kind["due"]): kind["frequency"] for kind in row["kinds"]} for row in report["rows"]}


def test_tier_cost_counts_each_kind_of_step_as_often_as_a_full_cycle_has_it(report: dict[str, Any]) -> None:
    kinds = kinds_of(report)
    assert all(sum(frequencies.values()) == 1 for frequencies in kinds.values())
    assert kinds["plain"] == {(0, 1, 2): 1}
    assert kinds["deep fast [1, 2, 4]"] == {(0,): 2 / 4, (0, 1): 1 / 4, (0, 1, 2): 1 / 4}
    assert kinds["deep fast [1, 8, 64]"] == {(0,): 56 / 64, (0, 1): 7 / 64, (0, 1, 2): 1 / 64}


def test_tier_cost_compares_every_set_up_with_plain_lora(report: dict[str, Any]) -> None:
    rows = {row["set_up"]: row for row in report["rows"]}
    for row in rows.values():
        step_s = sum(kind["frequency"] * kind["quartiles_s"][1] for kind in row["kinds"])
        assert row["step_s"] == pytest.approx(step_s)
        assert "plain" in [compared["set_up"] for compared in row["against"]]
        for compared in row["against"]:
            other = rows[compared["set_up"]]
            assert compared["time_ratio"] == pytest.approx(row["step_s"] / other["step_s"])
            assert compared["memory_ratio"] == row["peak_bytes"] / other["peak_bytes"]


def test_tier_cost_sets_the_bars_that_are_promised(report: dict[str, Any]) -> None:
    bars = {
        (row["set_up"], bar["set_up"]): (bar["time_bar"], bar["memory_bar"])
        for row in report["rows"]
        for bar in row["against"]
    }
    time = {names: bar for names, (bar, _) in bars.items() if bar is not None}
    assert time == {
        ("deep fast [1, 2, 4]", "plain"): 0.80,
        ("deep fast [1, 8, 64]", "plain"): 0.70,
        ("shallow fast [1, 2, 4]", "plain"): 1.00,
        ("deep fast [1, 2, 4], checkpointed", "plain, checkpointed"): 0.80,
        ("importance, a measured step", "plain"): 1.50,
    }
    without_memory_bar = {name for (name, _), (_, bar) in bars.items() if bar is None}
    assert without_memory_bar == {"deep fast [1, 2, 4], accumulate", "importance, a measured step"}


def test_tier_cost_finds_that_dropping_costs_no_memory_and_accumulating_does(report: dict[str, Any]) -> None:
    peaks = {row["set_up"]: row["peak_bytes"] for row in report["rows"]}
    assert peaks["deep fast [1, 2, 4]"] == peaks["deep fast [1, 8, 64]"] == peaks["plain"]
    assert peaks["deep fast [1, 2, 4], accumulate"] > peaks["plain"]


@pytest.mark.skipif(DEVICE == "cuda", reason="of the 66 MiB that CUDA takes there the model has 0.2")
def test_tier_cost_finds_that_checkpointing_saves_memory(report: dict[str, Any]) -> None:
    peaks = {row["set_up"]: row["peak_bytes"] for row in report["rows"]}
    assert peaks["plain, checkpointed"] < peaks["plain"]


def test_tier_cost_tells_commit_machine_and_conditions(report: dict[str, Any]) -> None:
    told = report["provenance"]
    assert told["torch"] == torch.__version__
    assert told["threads"] == 1
    assert {"commit", "processor", "cores", "load_average", "load_average_after"} <= set(told)


@pytest.fixture(scope="module")
def backends_report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    pytest.importorskip("mlx")
    return smoke_report("backends.py", tmp_path_factory.mktemp("backends"))


def test_backends_holds_plain_lora_on_mlx_to_the_time_of_mlx_lm(backends_report: dict[str, Any]) -> None:
    bars = {
        (row["set_up"], bar["set_up"]): bar["time_bar"]
        for row in backends_report["rows"]
        for bar in row["against"]
        if bar["time_bar"] is not None or bar["memory_bar"] is not None
    }
    assert bars == {("MLX", "mlx-lm"): 1.00}


def test_backends_compares_the_times_that_it_tells(backends_report: dict[str, Any]) -> None:
    rows = {row["set_up"]: row for row in backends_report["rows"]}
    for row in rows.values():
        step_s = sum(kind["frequency"] * kind["quartiles_s"][1] for kind in row["kinds"])
        assert row["step_s"] == pytest.approx(step_s)
        for compared in row["against"]:
            assert compared["time_ratio"] == pytest.approx(row["step_s"] / rows[compared["set_up"]]["step_s"])


def test_backends_trains_the_same_on_every_trainer(backends_report: dict[str, Any]) -> None:
    """The second half of each row of 16, and the padding token after it, which mlx-lm's loss counts."""
    assert backends_report["tokens"] == [2, 16]
    assert backends_report["supervised_tokens"] == 2 * (8 + 1)
    for large in (False, True):
        losses = [row["first_loss"] for row in backends_report["rows"] if ("large" in row["set_up"]) is large]
        assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-4)


def test_backends_finds_that_checkpointing_and_few_logits_save_memory(backends_report: dict[str, Any]) -> None:
    """By a fifth and more: MLX frees in a thread of its own, so that a peak differs by some percent between runs."""
    peaks = {row["set_up"]: row["peak_bytes"] for row in backends_report["rows"]}
    assert peaks["MLX, checkpointed"] < 0.8 * peaks["MLX"]
    assert peaks["MLX, large"] < 0.8 * peaks["mlx-lm, large"]


def test_backends_tells_which_libraries_it_measured(backends_report: dict[str, Any]) -> None:
    told = backends_report["provenance"]
    assert {"mlx", "mlx-lm", "torch", "commit", "processor", "load_average", "load_average_after"} <= set(told)


@pytest.mark.parametrize(("loss", "tokens"), [(1.0002, 10), (1.0, 11)])
def test_backends_times_nothing_where_a_trainer_begins_with_another_loss(loss: float, tokens: int) -> None:
    code = (
        "import backends\n"
        "seen = {contender.name: (1.0, 10) for contender in backends.CONTENDERS}\n"
        "backends.check_same_loss(seen)\n"
        f"backends.check_same_loss(seen | {{'MLX, checkpointed': ({loss}, {tokens})}})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=BENCHMARKS, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"MLX, checkpointed begins with a loss of {loss} over {tokens} tokens")
