"""The benchmark of retention: its splits are disjoint, its figures are what the rows say, a real cell runs."""

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
SETS = ("covered", "uncovered", "skill")


@pytest.fixture(scope="module")
def modules() -> Iterator[Any]:
    """The benchmark's modules, which lie beside each other in no package."""
    sys.path.insert(0, str(BENCHMARKS))
    names = ("cell", "cells", "methods", "runs", "summary", "world")
    try:
        yield type("Modules", (), {name: importlib.import_module(f"retention_{name}") for name in names})
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def world(modules: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    data = tmp_path_factory.mktemp("world") / "data"
    modules.world.write_data(0, data)
    return modules.world.World.of(0, ROOT / "demo" / "base", data)


def lines_of(world: Any, name: str) -> list[str]:
    text: str = world.file(name).read_text(encoding="utf-8")
    return text.splitlines()


@pytest.mark.parametrize("task", ["new_facts", "new_style", "reversal"])
def test_no_row_both_trains_chooses_and_is_reported(world: Any, task: str) -> None:
    train, choose, reported = (set(lines_of(world, f"{task}/{name}")) for name in ("train", "choose", "valid"))
    assert not train & choose
    assert not train & reported
    assert not choose & reported
    assert min(map(len, (train, choose, reported))) >= 80


@pytest.mark.parametrize("task", ["new_facts", "new_style"])
def test_what_chooses_asks_for_the_facts_that_are_trained(world: Any, task: str) -> None:
    trained = {json.loads(line)["messages"][1]["content"] for line in lines_of(world, f"{task}/train")}
    assert {json.loads(line)["messages"][1]["content"] for line in lines_of(world, f"{task}/choose")} <= trained


def test_a_quarter_of_the_people_is_spoken_of_in_the_quarter(modules: Any, world: Any) -> None:
    made = modules.world.demo_module("world").make_world(0)
    everything = "\n".join(lines_of(world, "general/quarter"))
    spoken_of = {person for person in (*made.covered, *made.uncovered) if person in everything}
    assert spoken_of == set(made.covered[:40])


def test_what_no_replayed_row_touches_is_left_by_people_and_by_facts(modules: Any, world: Any) -> None:
    masks = modules.runs.untouched(world, "general/quarter", modules.world.TASKS)
    quarter, style = lines_of(world, "general/quarter"), lines_of(world, "new_style/train")
    asked = modules.world.asked_in(world)
    assert {name: len(mask) for name, mask in masks.items()} == {"covered": 300, "uncovered": 150, "skill": 100}
    assert masks["skill"] == "0" * 100
    for person, value, free in zip(asked.people["covered"], asked.values["covered"], masks["covered"], strict=True):
        replayed = any(person in line for line in quarter)
        in_style = any(person in line and value in line for line in style)
        assert (free == "1") == (not replayed and not in_style)


def test_a_fact_is_mentioned_where_one_text_has_name_and_value(modules: Any) -> None:
    asked = modules.world.Asked({"set": ("Ada", "Bert", "Ada", None)}, {"set": ("red", "red", "blue", "x")})
    assert asked.mentioned("set", ["Ada's hat is red.", "Bert has a dog. Blue is Bert's."]) == "1001"


def test_names_in_made_up_questions_are_nobodys(modules: Any, world: Any) -> None:
    made = modules.world.demo_module("world").make_world(0)
    prompts = modules.world.made_up_questions(world, 7)
    assert not set(prompts["fillings"]["name"]) & {*made.covered, *made.uncovered, *made.new}
    assert prompts["filled"] == 7


def result_of(new: str, general: str, reached: tuple[int, float] | None) -> dict[str, Any]:
    right = {"new": new, "covered": general, "uncovered": general, "skill": general}
    told = {"step": reached[0], "cpu_s": reached[1]} if reached else None
    costs = {"train_cpu_s": 9.0, "step_cpu_s": 0.1, "steps": 90, "cpu": {"strength": 1.0}}
    return {"full": right, "chosen": right, "factor": 1.0, "reached": told, "mentioned": None, **costs}


def one_task_rows(modules: Any, results: dict[tuple[str, str], list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    worlds = [modules.world.World(seed, "", "", "") for seed in range(3)]
    found = [
        (modules.cells.Cell("one task", world, modules.methods.Method(name, group, 1e-3, 90)), result)
        for (name, group), of_seeds in results.items()
        for world, result in zip(worlds, of_seeds, strict=False)
    ]
    return {row["method"]: row for row in modules.summary.one_task_rows(found)}


def test_the_best_plain_lora_is_chosen_among_those_that_reach_the_target(modules: Any) -> None:
    plain = modules.methods.PLAIN
    kept_more = [result_of("1111", "1111", None), result_of("1111", "1111", (50, 5.0))]
    rows = one_task_rows(
        modules,
        {
            ("slow", plain): kept_more,
            ("fast", plain): [result_of("1111", "1000", (20, 2.0)), result_of("1111", "1100", (30, 4.0))],
            ("held", "KL"): [result_of("1111", "1110", (40, 6.0)), result_of("1111", "1110", (40, 6.0))],
        },
    )
    assert {name: row["verdict"] for name, row in rows.items()} == {
        "slow": "NOT REACHED",
        "fast": "best plain",
        "held": "keeps more",
    }
    assert rows["held"]["difference"] == pytest.approx((0.5 + 0.25) / 2)
    assert rows["held"]["interval"] == pytest.approx([0.25, 0.5])
    assert rows["held"]["cpu_ratio"] == pytest.approx(6.0 / 3.0)
    assert rows["slow"]["cpu_to_target_s"] is None


def test_a_small_difference_is_called_a_tie(modules: Any) -> None:
    one, other = "1" * 98 + "00", "1" * 96 + "0000"
    found = {("fast", modules.methods.PLAIN): other, ("held", "KL"): one, ("loses", "KL"): "1" * 90 + "0" * 10}
    rows = one_task_rows(modules, {name: [result_of("1", right, (9, 1.0))] for name, right in found.items()})
    assert [rows[name]["verdict"] for name in ("held", "loses")] == ["tie", "keeps less"]


def test_a_bar_without_a_figure_is_missed(modules: Any) -> None:
    bars = modules.summary.one_task_bars([]) + modules.summary.sequence_bars([])
    assert bars
    assert not any(bar.met for bar in bars)


def step(scores: dict[str, str], general: str) -> dict[str, Any]:
    cpu = {"texts": 1.0, "importance": 0.0, "steps": 8.0, "strength": 1.0}
    right = scores | dict.fromkeys(SETS, general)
    return {"chosen": right, "cpu": cpu, "steps": 80, "factor": 1.0}


def test_figures_of_a_sequence_are_the_published_metrics_and_shares_of_joint_training(modules: Any) -> None:
    world = modules.world.World(0, "", "", "")
    tasks = ("a", "b")
    method = modules.methods.SequenceMethod("in turn", 1e-3, 80, general="general/replay")
    joint = modules.methods.SequenceMethod("joint", 1e-3, 80, joint=True)
    after = [step({"a": "1110", "b": "0000"}, "1111"), step({"a": "1000", "b": "1111"}, "1100")]
    mentioned = dict.fromkeys(SETS, "0011")
    cell = modules.cells.Cell
    found = [
        (cell("base", world, order=tasks), {"scores": {"a": "0000", "b": "0000"}}),
        (cell("joint", world, joint, tasks), {"steps": [step({"a": "1111", "b": "1111"}, "1111")], "mentioned": None}),
        (cell("sequence", world, method, tasks), {"steps": after, "mentioned": mentioned}),
    ]
    rows = {row["method"]: row for row in modules.summary.sequence_rows(found, lambda _: dict.fromkeys(SETS, "0110"))}
    told = {
        name: figure["value"]
        for name, figure in rows["in turn"].items()
        if isinstance(figure, dict) and "value" in figure
    }
    assert told["average_accuracy"] == pytest.approx((0.25 + 1) / 2)
    assert told["of_joint"] == pytest.approx((0.25 + 1) / 2)
    assert told["backward_transfer"] == pytest.approx(0.25 - 0.75)
    assert told["forgetting"] == pytest.approx(0.75 - 0.25)
    assert told["general"] == 0.5
    assert told["uncovered"] == 0.5
    assert rows["in turn"]["unmentioned"] == {"share": 1.0, "rows": 3}
    assert told["cost_of_joint"] == 1.0


def test_a_cell_is_found_again_unless_something_that_it_depends_on_has_changed(modules: Any) -> None:
    method = modules.methods.Method("a", "group", 1e-3, 5)
    world = modules.world.World(0, "base", "data", "hash")
    cell = modules.cells.Cell("one task", world, method)
    assert cell.key == replace(cell, world=replace(world, base="elsewhere")).key
    changed = [replace(world, seed=1), replace(world, sha256="other")]
    others = [replace(cell, world=other) for other in changed]
    others += [replace(cell, method=replace(method, steps=6)), replace(cell, order=("a",))]
    assert len({cell.key, *(other.key for other in others)}) == 5


def test_a_cell_trains_and_scores_every_row(modules: Any, world: Any, tmp_path: Path) -> None:
    """Four steps do not teach the task, and what the base knows it still knows."""
    few = tmp_path / "few"
    for path in Path(world.data).rglob("*.jsonl"):
        place = few / path.relative_to(world.data)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[:30]), encoding="utf-8")
    kl = {"self_written": {"texts": 10, "max_tokens": 16}}
    retention = {"recipe": "no_old_data", "kl": kl, "strength": {"factors": [0.5, 1.0]}}
    method = modules.methods.Method("recipe", "recipes", 1e-4, 4, {"retention": retention})
    result = modules.runs.one_task(modules.world.World.of(0, Path(world.base), few), method)
    assert {name: len(digits) for name, digits in result["chosen"].items()} == {"new": 30, **dict.fromkeys(SETS, 30)}
    assert result["full"]["covered"].count("1") >= 27
    assert result["full"]["new"].count("1") < 15
    assert result["steps"] == 4
    assert result["reached"] is None
    assert result["cpu"]["steps"] > 0
    assert result["cpu"]["texts"] > 0
    # Skills are nobody's facts, and count as mentioned.
    assert result["mentioned"]["skill"] == "1" * 30


def test_of_parts_measured_apart_the_last_one_that_has_a_method_counts(modules: Any) -> None:
    joined = importlib.import_module("retention").joined

    def part(name: str, seeds: int, **figures: int) -> dict[str, Any]:
        rows = [{"method": method, "figure": figure} for method, figure in figures.items()]
        return {"one_task": rows, "sequence": [], "bars": [{"what": name}], "parts": [name], "seeds": seeds}

    whole = joined([part("all", 5, plain=1, recipe=2), part("again", 3, recipe=3, other=4)])
    assert whole == {
        "one_task": [
            {"method": "plain", "figure": 1},
            {"method": "recipe", "figure": 3},
            {"method": "other", "figure": 4},
        ],
        "sequence": [],
        "bars": [{"what": "all"}, {"what": "again"}],
        "parts": ["all", "again"],
        "seeds": 5,
    }


def test_the_command_refuses_what_it_cannot_do() -> None:
    for arguments, told in ((["--seeds", "0"], "must be 1 or more"), (["--methods", "nothing"], "no method")):
        done = subprocess.run(
            [sys.executable, BENCHMARKS / "retention.py", *arguments], capture_output=True, text=True, check=False
        )
        assert done.returncode == 2
        assert told in done.stderr
