"""Nothing is pickled: neither imported nor called anywhere, and no file of a base is read that could be."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for folder in ("src", "flows", "benchmarks", "demo") for path in (ROOT / folder).rglob("*.py"))
MODULES = {
    "pickle",
    "_pickle",
    "cPickle",
    "cloudpickle",
    "dill",
    "joblib",
    "marshal",
    "shelve",
    "jsonpickle",
    "copyreg",
}
# Of these modules, by the name they are called by, what writes or reads pickles.
CALLS = {
    ("torch", "load"),
    ("torch", "save"),
    ("np", "save"),
    ("np", "savez"),
    ("np", "savez_compressed"),
    ("np", "load"),
    ("numpy", "save"),
    ("numpy", "load"),
    ("pd", "read_pickle"),
    ("pandas", "read_pickle"),
}
METHODS = {"to_pickle", "read_pickle", "dump_pickle"}
KEYWORDS = {"allow_pickle", "pickle_module", "pickle_protocol"}


def pickles(source: str) -> Iterator[str]:
    """What of a source reads or writes pickles, with its line."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found = [name.name for name in node.names if name.name.partition(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom):
            of_torch = node.module in ("torch", "numpy") and {name.name for name in node.names} & {
                "load",
                "save",
                "savez",
            }
            found = [str(node.module)] if (node.module or "").partition(".")[0] in MODULES or of_torch else []
        elif isinstance(node, ast.Call):
            callee = node.func
            owner = callee.value.id if isinstance(callee, ast.Attribute) and isinstance(callee.value, ast.Name) else ""
            name = (
                callee.attr if isinstance(callee, ast.Attribute) else callee.id if isinstance(callee, ast.Name) else ""
            )
            text = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else None
            dynamic = name in ("import_module", "__import__") and str(text).partition(".")[0] in MODULES
            keyword = [word.arg for word in node.keywords if word.arg in KEYWORDS]
            found = [f"{owner}.{name}"] if (owner, name) in CALLS or name in METHODS or dynamic or keyword else []
        else:
            continue
        yield from (f"line {node.lineno}: {what}" for what in found)


def test_no_source_reads_or_writes_a_pickle() -> None:
    assert len(SOURCES) > 90
    found = {str(path.relative_to(ROOT)): list(pickles(path.read_text(encoding="utf-8"))) for path in SOURCES}
    assert {path: what for path, what in found.items() if what} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import os, dill",
        "from joblib import dump",
        "import cloudpickle.compat",
        "def f():\n    import marshal",
        "torch.load(path)",
        "from torch import load",
        "torch.save(x, path)",
        "np.load(path, mmap_mode='r')",
        "np.save(path, x)",
        "read(path, allow_pickle=True)",
        "importlib.import_module('pickle')",
        "__import__('shelve')",
        "frame.to_pickle(path)",
    ],
)
def test_the_scan_finds_each_way(source: str) -> None:
    assert len(list(pickles(source))) == 1


@pytest.mark.parametrize("source", ["load(path)", "json.load(file)", "yaml.load(text)", "save(x)", "mx.load(path)"])
def test_the_scan_finds_nothing_else(source: str) -> None:
    assert list(pickles(source)) == []


def test_every_loader_is_told_to_run_no_code_and_to_read_safetensors_only() -> None:
    """Each call that loads a model, its configuration or tokenizer passes what keeps it from running what it finds."""
    calls = []
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
            if owner.startswith("Auto") and node.func.attr == "from_pretrained" and path.is_relative_to(ROOT / "src"):
                told = {word.arg: getattr(word.value, "value", None) for word in node.keywords}
                from_all = any(
                    word.arg is None and getattr(word.value, "id", "") == "AS_IT_IS" for word in node.keywords
                )
                calls.append((path.name, from_all or told.get("trust_remote_code") is False))
    assert len(calls) >= 6
    assert [name for name, safe in calls if not safe] == []
