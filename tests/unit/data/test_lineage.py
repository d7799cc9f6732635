"""Earlier tasks: what an adapter's metadata tell of them, and where their rows are found again."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from nestune.config import DataConfig, RetentionConfig
from nestune.data.dataset import load_dataset
from nestune.data.lineage import EarlierTask, earlier_tasks, rows_of, task_of, unique_names
from nestune.data.report import EarlierSets
from nestune.data.validation import build_dataset
from nestune.errors import ConfigError, DataError, RunError
from nestune.files import sha256_file
from nestune.runs import RUNS, RunPaths

INTO = Path("runs/now/earlier")


def texts(*numbers):
    return [{"text": f"the sea is {number}"} for number in numbers]


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def write_here(tmp_path, monkeypatch):
    """Writes records into a file of the test's folder, which is the current one; returns its relative path."""
    monkeypatch.chdir(tmp_path)

    def write(name, records):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("".join(json.dumps(record) + "\n" for record in records))
        return name

    return write


@pytest.fixture
def make_task(write_here, tokenizer):
    """Builds the dataset of a run, and tells of it as its candidate does."""

    def make(run="week1", strength=None, git_commit=None, **data):
        paths, given, retention = (
            RunPaths.of(run),
            DataConfig(**data),
            RetentionConfig(recipe="none", strength=strength),
        )
        build_dataset(given, retention, tokenizer, paths.dataset)
        return task_of(paths, given, retention, git_commit)

    return make


@pytest.fixture
def task(make_task, write_here):
    """Divided twice: a part of what is trained on is held out, and half of that is scored."""
    train = write_here("data/week1.jsonl", texts(*range(30)))
    return make_task(train=train, valid=0.3, strength={})


def test_a_task_is_told_by_the_hashes_of_its_sets_and_sources(task):
    dataset = Path("runs/week1/dataset")
    assert task.sets == {name: sha256_file(dataset / f"{name}.jsonl") for name in ("train", "valid", "test")}
    assert task.sources == {"train": {"data/week1.jsonl": sha256_file(Path("data/week1.jsonl"))}}
    assert (task.held_out, task.halved, task.scored_set, task.dvc) == (0.3, True, "test", {})
    assert task.dataset_sha256 == json.loads((dataset / "report.json").read_text())["sha256"]


def test_what_an_adapter_tells_is_read_back(task, tmp_path):
    (tmp_path / "metadata.json").write_text(json.dumps({"step": 1, "lineage": [task.model_dump(mode="json")] * 2}))
    assert earlier_tasks(tmp_path) == [task, task]


@pytest.mark.parametrize("content", [None, "{}", '{"step": 3}'])
def test_an_adapter_that_tells_of_none_has_none(tmp_path, content):
    if content is not None:
        (tmp_path / "metadata.json").write_text(content)
    assert earlier_tasks(tmp_path) == []


@pytest.mark.parametrize(
    "changed",
    [
        {"run": "../elsewhere"},
        {"run": "ok\n"},
        {"sets": {"train": "../../x", "valid": "a" * 64}},
        {"sets": {"train": "a" * 64}},
        {"sets": {"train": "a" * 64, "valid": "b" * 64, "../x": "c" * 64}},
        {"git_commit": "--upload-pack=x"},
        {"held_out": 7.0},
        {"sources": 3},
    ],
)
def test_what_would_lead_elsewhere_or_makes_no_sense_is_refused(task, tmp_path, changed):
    told = task.model_dump(mode="json") | changed
    (tmp_path / "metadata.json").write_text(json.dumps({"lineage": [told]}))
    with pytest.raises(ConfigError, match="its lineage cannot be read"):
        earlier_tasks(tmp_path)


@pytest.mark.parametrize("content", ["[", '{"lineage": 3}', '{"lineage": [3]}'])
def test_metadata_that_cannot_be_read_are_refused(tmp_path, content):
    (tmp_path / "metadata.json").write_text(content)
    with pytest.raises(ConfigError, match=r"lineage cannot be read.*earlier_tasks=false"):
        earlier_tasks(tmp_path)


@pytest.mark.parametrize("name", ["train", "valid", "test"])
def test_rows_are_those_of_the_run_while_it_has_them(task, name):
    assert rows_of(task, name, RUNS, INTO) == Path(f"runs/week1/dataset/{name}.jsonl")
    assert not INTO.exists()


@pytest.mark.parametrize("lost", ["removed", "changed"])
@pytest.mark.parametrize("name", ["train", "valid", "test"])
def test_without_the_run_they_are_divided_anew_from_the_files_to_the_byte(task, lost, name):
    of_run = Path(f"runs/week1/dataset/{name}.jsonl")
    before = of_run.read_bytes()
    if lost == "removed":
        shutil.rmtree("runs/week1")
    else:
        of_run.write_bytes(before + b"\n")
    found = rows_of(task, name, RUNS, INTO)
    assert found.parent == INTO
    assert found.read_bytes() == before
    # Where it has been divided once, nothing else is asked for.
    Path("data/week1.jsonl").unlink()
    assert rows_of(task, name, RUNS, INTO) == found


def test_sets_that_were_files_are_found_as_they_were(make_task, write_here):
    task = make_task(
        train=write_here("a.jsonl", texts(1, 2)),
        valid=write_here("b.jsonl", texts(3, 4)),
        test=(write_here("c.jsonl", texts(5, 6)), write_here("d.jsonl", texts(7))),
    )
    shutil.rmtree("runs")
    for name, records in (("train", texts(1, 2)), ("valid", texts(3, 4)), ("test", texts(5, 6, 7))):
        assert lines_of(rows_of(task, name, RUNS, INTO)) == records


def test_rows_that_are_nowhere_are_told_with_all_places_and_a_remedy(task):
    shutil.rmtree("runs/week1")
    Path("data/week1.jsonl").write_text('{"text": "other"}\n')
    with pytest.raises(ConfigError) as caught:
        rows_of(task, "train", RUNS, INTO)
    told = str(caught.value)
    assert f"the train rows of the earlier task week1 (sha256 {task.sets['train'][:12]}) are not found" in told
    assert "runs/week1/dataset/train.jsonl: is not there" in told
    assert f"data/week1.jsonl (sha256 {task.sources['train']['data/week1.jsonl'][:12]}): has other content" in told
    assert "in DVC: the task was trained outside of git" in told
    assert "retention.replay.earlier_tasks=false" in told


def test_files_that_make_other_rows_now_are_no_replacement(task):
    shutil.rmtree("runs/week1")
    otherwise = task.model_copy(update={"held_out": 0.5})
    with pytest.raises(ConfigError, match="divided anew they make other rows"):
        rows_of(otherwise, "train", RUNS, INTO)
    assert not any(INTO.iterdir())


def test_tasks_of_the_same_run_and_names_that_are_taken_get_a_number(task):
    other = task.model_copy(update={"run": "week2"})
    assert unique_names([task, task, other], taken=["task_week2"]) == ["task_week1", "task_week1_2", "task_week2_2"]


def test_earlier_tasks_are_replayed_and_measured_on(task, write_here, tokenizer):
    sets = EarlierSets(
        "task_week1",
        task.sets["train"],
        task.sets["test"],
        *(rows_of(task, name, RUNS, INTO) for name in ("train", "test")),
    )
    train, old = write_here("new.jsonl", texts(*range(50, 60))), write_here("old.jsonl", texts(90))
    data = DataConfig(train=train)
    retention = RetentionConfig(recipe="none", replay={"files": old, "earlier_tasks": True})
    folder = Path("runs/now/dataset")
    report = build_dataset(data, retention, tokenizer, folder, earlier=[sets])
    assert report.replayed == {"replay/0": "old.jsonl", "replay/1": "task_week1"}
    for name, of_task in (("replay/1", "train"), ("retention/task_week1", "test")):
        assert (folder / f"{name}.jsonl").read_bytes() == Path(f"runs/week1/dataset/{of_task}.jsonl").read_bytes()
    known = EarlierSets(sets.task, sets.train_sha256, sets.held_out_sha256)
    dataset = load_dataset(data, retention, tokenizer, 99, folder, earlier=[known])
    assert list(dataset.retention) == ["task_week1"]
    assert [len(rows) for rows in dataset.replay] == [1, 21]
    for otherwise in ([], [EarlierSets(sets.task, "0" * 64, sets.held_out_sha256)]):
        with pytest.raises(RunError, match=r"other settings \(earlier_tasks differ\)"):
            load_dataset(data, retention, tokenizer, 99, folder, earlier=otherwise)


@pytest.mark.parametrize("measured", ["valid", "test", "retention"])
def test_what_an_earlier_task_trained_on_is_not_measured_on(task, write_here, tokenizer, measured):
    train, held_out = (rows_of(task, name, RUNS, INTO) for name in ("train", "test"))
    sets = EarlierSets("task_week1", task.sets["train"], task.sets["test"], train, held_out)
    leak = write_here("leak.jsonl", [*texts(70), *lines_of(train)[:1]])
    data = {"train": write_here("new.jsonl", texts(50)), "valid": write_here("valid.jsonl", texts(60))}
    data |= {"retention": {"old": leak}} if measured == "retention" else {measured: leak}
    retention = RetentionConfig(recipe="none", replay={"earlier_tasks": True})
    with pytest.raises(DataError, match=rf"leak\.jsonl:2: also replayed: the same record as {train}:1\."):
        build_dataset(DataConfig(**data), retention, tokenizer, Path("runs/now/dataset"), earlier=[sets])


def git(*arguments):
    command = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_rows_that_only_dvc_has_are_taken_from_the_commit_of_the_training(write_here, make_task):
    from dvc.repo import Repo

    git("init", "-q")
    Repo.init().close()
    # Relative to the folder of the file, as `dvc remote add` writes it.
    Path(".dvc/config").write_text(
        "[core]\n    analytics = false\n    remote = store\n['remote \"store\"']\n    url = ../store\n"
    )
    train = write_here("data/week1.jsonl", texts(*range(20)))
    with Repo() as repo:
        repo.add("data")
    git("add", ".dvc", ".dvcignore", "data.dvc", ".gitignore")
    git("commit", "-qm", "week 1")
    commit = git("rev-parse", "HEAD")
    task = make_task(train=train, valid=0.2, git_commit=commit)
    assert task.dvc == {"data": yaml.safe_load(Path("data.dvc").read_text())["outs"][0]["md5"]}
    before = {name: Path(f"runs/week1/dataset/{name}.jsonl").read_bytes() for name in ("train", "valid")}
    # A week later the data are others, and the run is gone.
    write_here("data/week1.jsonl", texts(*range(100, 120)))
    with Repo() as repo:
        repo.add("data")
    git("commit", "-qam", "week 2")
    shutil.rmtree("runs")
    assert rows_of(task, "train", RUNS, INTO).read_bytes() == before["train"]
    # And, as on another machine, from the remote.
    shutil.rmtree("runs")
    with Repo() as repo:
        repo.push(all_commits=True)
    shutil.rmtree(".dvc/cache")
    assert rows_of(task, "valid", RUNS, INTO).read_bytes() == before["valid"]
    shutil.rmtree("runs")
    # Found there, but another file than the task had.
    other = task.model_copy(update={"sources": {"train": {"data/week1.jsonl": "0" * 64}}})
    with pytest.raises(ConfigError, match=f"in DVC at commit {commit[:12]}: has other content"):
        rows_of(other, "train", RUNS, INTO)
    lost = task.model_copy(update={"git_commit": "0" * 40})
    with pytest.raises(ConfigError, match="in DVC at commit 000000000000: "):
        rows_of(lost, "train", RUNS, INTO)


def test_a_task_without_a_field_is_refused():
    with pytest.raises(ValueError, match="git_commit"):
        EarlierTask.model_validate({"run": "a"})
