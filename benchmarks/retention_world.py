"""The worlds that benchmarks/retention.py trains in: a base model that knows one by heart, and the rows of its tasks.

A world is made from its seed by demo/world.py; its base, by demo/pretrain.py, is made once and kept below
~/.cache/nestune/benchmarks/retention (or NESTUNE_CACHE) by the hash of what made it. Beside the demo's files it has

    <task>/choose.jsonl      rows that choose the strength: facts in phrasings, words in triples, that neither
                             train.jsonl nor valid.jsonl of the task has; the table reports valid.jsonl
    general/quarter.jsonl    the general rows that mention nobody but 40 of the 160 people
"""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

from nestune.base_model import resolve_base
from nestune.config import ModelConfig, load_config
from nestune.data.tokens import tokenizer_files
from nestune.files import sha256_files
from nestune.runs import RunPaths
from nestune.stages.validate import validate

DEMO = Path(__file__).parents[1] / "demo"
TASKS = ("new_facts", "new_style", "reversal")
GENERAL = ("covered", "uncovered", "skill")
BASE_STEPS, SMOKE_STEPS = 2400, 60
QUARTER = 40
REVERSAL_CHOOSE = 150
NOBODY = 300


@dataclass(frozen=True)
class World:
    """Folders of a world: its base model, and its data; sha256: of both.

    task: what a training on one task learns; general: the sets of what is to be kept. given: blocks of a configuration
    for every training in a world that was not made here, whose rows are nobody's facts.
    """

    seed: int
    base: str
    data: str
    sha256: str
    task: str = TASKS[0]
    general: tuple[str, ...] = GENERAL
    given: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, seed: int, base: Path, data: Path, **more: Any) -> "World":
        """The world of two folders, with the hash of what they hold."""
        files = sorted(data.rglob("*.jsonl"))
        model = resolve_base(ModelConfig(base=base.as_posix()))
        content = f"{model.sha256} {sha256_files(data, files)} {sha256_files(base, tokenizer_files(base))}"
        return cls(seed, base.as_posix(), data.as_posix(), hashlib.sha256(content.encode()).hexdigest(), **more)

    def file(self, name: str) -> Path:
        """A file of the data, such as `new_facts/train`."""
        return Path(self.data, f"{name}.jsonl")


@cache
def demo_module(name: str) -> ModuleType:
    """demo/<name>.py, which is no package."""
    spec = importlib.util.spec_from_file_location(f"demo_{name}", DEMO / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def world_of(seed: int, work: Path, steps: int = BASE_STEPS, rows: int | None = None) -> World:
    """The world of a seed, its data written below `work`; its base from the cache, or made now in minutes of a core.

    rows: so many of each file at most, for what is only to run.
    """
    data = work / f"data-{seed}"
    if not data.exists():
        with TemporaryDirectory(dir=work) as making:
            write_data(seed, Path(making, "data"))
            for path in Path(making, "data").rglob("*.jsonl") if rows else ():
                lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
                # The base learns from all of its rows.
                if path.parts[-2:] != ("general", "train.jsonl"):
                    path.write_text("".join(lines[:rows]), encoding="utf-8")
            put(Path(making, "data"), data)
    base = cache_folder() / origin(seed, steps, data)
    if not base.exists():
        base.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=base.parent) as making:
            make_base(seed, steps, data, Path(making, "base"))
            put(Path(making, "base"), base)
    return World.of(seed, base, data)


def put(made: Path, place: Path) -> None:
    """Put a folder in its place, where another process may have put the same one meanwhile."""
    try:
        made.rename(place)
    except OSError:
        if not place.exists():
            raise


def world_of_config(path: Path, seed: int, work: Path) -> World:
    """The base and the data of a run's configuration as a world, in which a seed is that of training alone.

    Its `valid` chooses, its `test` (or half of `valid`) is reported, its retention sets are the general ones, and the
    files of retention.replay are what can be replayed. Raises what `validate` raises.
    """
    overrides = ["retention.recipe=none", "retention.strength={}"]
    config = load_config(path, overrides)
    data, run = work / "data-given", RunPaths(work / "run-given")
    if not data.exists():
        validate(config, run)
        with TemporaryDirectory(dir=work) as making:
            for found in sorted(run.dataset.rglob("*.jsonl")):
                name = found.relative_to(run.dataset).with_suffix("").as_posix()
                place = Path(making, "data", f"{_place(name)}.jsonl")
                place.parent.mkdir(parents=True, exist_ok=True)
                with place.open("ab") as file:
                    file.write(found.read_bytes())
            put(Path(making, "data"), data)
    told: Any = {"model": True, "lora": True, "evaluation": {"batch_size", "max_answer_tokens"}}
    blocks = config.model_dump(mode="json", include=told, exclude_unset=True)
    given = blocks | {"training": config.training.model_dump(mode="json", include={"batch_size", "precision"})}
    base = resolve_base(config.model).folder
    return World.of(seed, base, data, task="given", general=tuple(config.data.retention), given=given)


def _place(name: str) -> str:
    """Where a set of a dataset is in a world."""
    kind, _, rest = name.partition("/")
    if kind == "retention":
        return f"general/{rest}"
    return {"replay": "general/replay", "valid": "given/choose", "test": "given/valid"}.get(kind, f"given/{kind}")


def cache_folder() -> Path:
    """Where worlds are kept."""
    named = os.environ.get("NESTUNE_CACHE")
    return (Path(named) if named else Path.home() / ".cache" / "nestune") / "benchmarks" / "retention"


def origin(seed: int, steps: int, data: Path) -> str:
    """The hash of what decides a base: the code that trains it, its rows, its seed, its steps."""
    read = [(DEMO / "pretrain.py").read_bytes(), (data / "general" / "train.jsonl").read_bytes()]
    return hashlib.sha256(b"\0".join([*read, f"{seed} {steps}".encode()])).hexdigest()[:16]


def make_base(seed: int, steps: int, data: Path, out: Path) -> None:
    """The base model of the data, trained from scratch; the demo's own is that of seed 0."""
    card = (DEMO / "base" / "README.md").read_text(encoding="utf-8")
    if f"--seed {seed} --steps {steps}\n" in card:
        shutil.copytree(DEMO / "base", out)
        return
    command = [sys.executable, str(DEMO / "pretrain.py"), "--seed", str(seed), "--steps", str(steps)]
    command += ["--data", str(data), "--out", str(out)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def write_data(seed: int, out: Path) -> None:
    """The demo's data of a seed, and the further splits."""
    demo = demo_module("world")
    demo.write_world(out, seed)
    world = demo.make_world(seed)
    general = records_of(out / "general" / "train.jsonl")
    others = (*world.covered[QUARTER:], *world.uncovered)
    splits: dict[str, list[dict[str, Any]]] = {
        "new_facts/choose": [
            demo._chat(_unused(demo, world, fact, demo.NEW_FACT_PHRASINGS)[0].format(n=fact.person), fact.value)
            for fact in world.new_facts
        ],
        "new_style/choose": [
            demo._friendly_chat(fact, question)
            for fact in demo._style_facts(world)
            for question in _unused(demo, world, fact, demo.STYLE_PHRASINGS)[:2]
        ],
        "reversal/choose": demo._skill(_unused_triples(demo, seed), demo.REVERSAL_PROMPTS, reverse=True),
        "general/quarter": [record for record in general if not any(person in json.dumps(record) for person in others)],
    }
    for name, records in splits.items():
        (out / f"{name}.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")


def made_up_questions(world: World, count: int) -> dict[str, Any]:
    """The block `prompts` for so many questions in the forms that the base knows, about names that nobody has."""
    demo = demo_module("world")
    made = demo.make_world(world.seed)
    names = demo.shuffled(["".join(syllables) for syllables in product(*demo.SYLLABLES)], world.seed, "nobody")
    nobody = [name for name in names if name not in {*made.covered, *made.uncovered, *made.new}]
    forms = [form.replace("{n}", "{name}") for attribute in demo.ATTRIBUTES for form in attribute.questions]
    return {"templates": forms, "fillings": {"name": nobody[:NOBODY]}, "filled": count}


def records_of(path: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _unused(demo: Any, world: Any, fact: Any, used: int) -> Sequence[str]:
    """The phrasings of the training that this fact was not asked in."""
    taken = demo._some_questions(world, fact, used)
    return [question for question in fact.attribute.questions if question not in taken]


def _unused_triples(demo: Any, seed: int) -> Sequence[tuple[str, ...]]:
    """Words beyond those that the demo's reversal trains on and holds out."""
    values = [value for attribute in demo.ATTRIBUTES for value in attribute.values]
    pool = [value for value in values if len(value) <= demo.LONGEST_SKILL_WORD]
    count = demo.REVERSAL_TRAIN + demo.REVERSAL_HELD_OUT
    triples: Sequence[tuple[str, ...]] = demo._word_triples(pool, count + REVERSAL_CHOOSE, seed, "reversal")
    return triples[count:]


@dataclass(frozen=True)
class Asked:
    """What each row of the general sets asks: of whom (None: a skill), and the value that answers it."""

    people: Mapping[str, tuple[str | None, ...]]
    values: Mapping[str, tuple[str, ...]]

    def mentioned(self, name: str, texts: Sequence[str]) -> str:
        """A digit for each row of a set: 1 where one text has both the person's name and the value, or it is a skill.

        Names are no part of each other, and no value belongs to two attributes: the two identify a fact.
        """
        told = []
        for person, value in zip(self.people[name], self.values[name], strict=True):
            told.append(person is None or any(person in text and value in text for text in texts))
        return "".join(str(int(one)) for one in told)

    def untouched(self, name: str, replayed: Sequence[str], asked_by_tasks: Sequence[str]) -> str:
        """A digit for each row of a set: 1 where no replayed row has the person, and no task asks for the fact."""
        told = []
        for person, value in zip(self.people[name], self.values[name], strict=True):
            free = person is not None and not any(person in text for text in replayed)
            told.append(free and not any(str(person) in text and value in text for text in asked_by_tasks))
        return "".join(str(int(one)) for one in told)


def asked_in(world: World) -> Asked:
    """What the general sets of a world that was made here ask."""
    made = demo_module("world").make_world(world.seed)
    everybody = (*made.covered, *made.uncovered)
    people, values = {}, {}
    for name in GENERAL:
        turns = [record["messages"] for record in records_of(world.file(f"general/{name}"))]
        people[name] = tuple(next((p for p in everybody if p in question["content"]), None) for question, _ in turns)
        values[name] = tuple(answer["content"] for _, answer in turns)
    return Asked(people, values)
