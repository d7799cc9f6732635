"""The runs of benchmarks/retention.py: a method on one task, a method on a sequence of tasks, all tasks at once."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from retention_cell import NEW, Job, nothing_kept, score_base, train
from retention_methods import Method, SequenceMethod, merged
from retention_world import World, asked_in, made_up_questions, records_of


def one_task(world: World, method: Method) -> dict[str, Any]:
    """Train a method on the task of a world."""
    with nothing_kept() as folder:
        replayed = [world.file(method.replayed)] if method.replayed else []
        measured = train(job_of(world, method.config(world.seed), world.task, replayed, {NEW: world.task}), folder)
    return measured | {"mentioned": mentioned(world, measured.pop("texts", []))}


def base_scores(world: World, tasks: Sequence[str]) -> dict[str, Any]:
    """What the base of a world knows of its general sets, and of tasks."""
    with nothing_kept() as folder:
        config = Method("base", "", 1.0, 1).config(world.seed)
        job = job_of(world, config, world.task, [], {task: task for task in tasks})
        return {"scores": score_base(job, folder)}


def sequence(world: World, method: SequenceMethod, order: Sequence[str]) -> dict[str, Any]:
    """Train a method on the tasks one after the other, each from the candidate of the one before."""
    texts: list[str] = []
    steps = []
    scored = {task: task for task in order}
    with nothing_kept() as folder:
        parent: Path | None = None
        for number, task in enumerate(order):
            replayed = [world.file(method.general)] if method.general else []
            replayed += [world.file(f"{earlier}/train") for earlier in order[:number]] if method.earlier else []
            # Another seed each time: other texts, other rows drawn, other starting weights.
            config = method.config(world.seed + 100 * number)
            if method.questions:
                prompts = made_up_questions(world, method.questions)
                config = merged(config, {"retention": {"kl": {"prompts": prompts}}})
            job = job_of(world, config, task, replayed, scored, parent, method.store)
            measured = train(job, folder / str(number))
            parent = folder / str(number) / "candidate"
            texts += measured.pop("texts", [])
            steps.append(measured | {"task": task})
    return {"order": list(order), "steps": steps, "mentioned": mentioned(world, texts)}


def joint(world: World, method: SequenceMethod, order: Sequence[str]) -> dict[str, Any]:
    """Train on all tasks and the general rows at once, as many rows of each in a step."""
    scored = {task: task for task in order}
    with nothing_kept() as folder:
        others = [world.file(f"{task}/train") for task in order[1:]]
        others += [world.file(method.general)] if method.general else []
        measured = train(job_of(world, method.config(world.seed), order[0], others, scored), folder)
    return {"order": list(order), "steps": [measured], "mentioned": None}


def job_of(
    world: World,
    config: dict[str, Any],
    task: str,
    replayed: Sequence[Path],
    scored_tasks: Mapping[str, str],
    parent: Path | None = None,
    store: int | None = None,
) -> Job:
    """The training of a task of a world: its rows, those replayed, and what is scored, the general sets with it."""
    train_file, choose, test = (world.file(f"{task}/{name}") for name in ("train", "choose", "valid"))
    scored = {name: world.file(f"{of}/valid") for name, of in scored_tasks.items()}
    scored |= {name: world.file(f"general/{name}") for name in world.general}
    blocks: dict[str, Any] = {
        "name": "retention",
        "model": {"base": world.base, "backend": "torch"},
        "data": {"train": str(train_file), "valid": str(choose), "test": str(test)},
    }
    blocks = merged(blocks, world.given or {})
    if parent is not None:
        blocks["model"]["adapter"] = str(parent)
    if replayed:
        files = [str(path) for path in replayed]
        blocks["retention"] = {"replay": {"files": files, "earlier_tasks": False}}
    sets = {"train": train_file, "valid": choose}
    sets |= {f"replay/{number}": path for number, path in enumerate(replayed)}
    # The tasks of a sequence are not looked at on the way: only what they end with is told.
    return Job(merged(config, blocks), sets, scored, parent, store, look=NEW in scored_tasks)


def mentioned(world: World, texts: Sequence[str]) -> dict[str, str] | None:
    """A digit for each row of the general sets: whether a text mentions it; None where that cannot be told."""
    if world.given is not None or not texts:
        return None
    asked = asked_in(world)
    return {name: asked.mentioned(name, texts) for name in world.general}


def untouched(world: World, replayed: str, tasks: Sequence[str]) -> dict[str, str]:
    """A digit for each row of the general sets: whether no replayed row has its person, and no task asks for it."""
    asked = asked_in(world)
    rows = [str(record) for record in records_of(world.file(replayed))]
    asked_for = [str(record) for task in tasks for record in records_of(world.file(f"{task}/train"))]
    return {name: asked.untouched(name, rows, asked_for) for name in world.general}
