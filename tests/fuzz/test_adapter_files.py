"""Adapter folders from anywhere: read when they fit, else refused; they choose no files and cost no memory."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from safetensors.numpy import save

from nestune.backends.adapters import CONFIG, METADATA, MLX_WEIGHTS, WEIGHTS, misfits, read_adapter, write_adapter
from nestune.base_model import BaseModel
from nestune.config import LoraConfig
from nestune.tiers.parameters import LoraParameter
from tests.fuzz.hostile import ROOT, altered, as_json, bounded, damaged, fuzz, outcome
from tests.fuzz.test_run_files import SAFETENSORS, of_header

LORA = LoraConfig(rank=4, alpha=8)
BASE = BaseModel("demo/base", None, Path("demo/base"), "a" * 64, 256)
EXPECTED = [
    LoraParameter(layer, "self_attn.q_proj", side, (4, 8) if side == "a" else (8, 4))
    for layer in range(2)
    for side in "ab"
]
VALUES = {p.name: np.ones(p.shape, np.float32) for p in EXPECTED}
FILES = (WEIGHTS, MLX_WEIGHTS, CONFIG, METADATA)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of an adapter that fits, by name."""
    folder = tmp_path_factory.mktemp("sound")
    write_adapter(folder, VALUES, {p.name: f"model.layers.{p.layer}.{p.module}" for p in EXPECTED}, 2, LORA, BASE)
    (folder / METADATA).write_bytes(as_json({"base": {"reference": "demo/base", "sha256": "a" * 64}}))
    return {name: (folder / name).read_bytes() for name in FILES}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapter")


def read(folder: Path, files: dict[str, bytes]) -> dict[str, Any] | str:
    """The adapter or its error; an accepted one is whole, of the right shapes, and finite."""
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
        if name in files:
            (folder / name).write_bytes(files[name])
    with bounded():
        assert all(len(fault) < 1000 for fault in misfits(folder, BASE))
    read = outcome(lambda: read_adapter(folder, EXPECTED, LORA, BASE))
    if isinstance(read, dict):
        assert {name: values.shape for name, values in read.items()} == {
            p.name: p.shape for p in EXPECTED[-len(read) :]
        }
        assert all(np.isfinite(values).all() for values in read.values())
    return read


def test_the_adapter_that_is_damaged_is_a_sound_one(folder: Path, sound: dict[str, bytes]) -> None:
    assert isinstance(read(folder, sound), dict)


@pytest.mark.parametrize("name", FILES)
def test_damaged_files_of_an_adapter_are_read_or_refused(folder: Path, sound: dict[str, bytes], name: str) -> None:
    @settings(fuzz, max_examples=60)
    @given(content=damaged(sound[name]))
    def check(content: bytes) -> None:
        read(folder, {**sound, name: content})

    check()


@pytest.mark.parametrize("name", [CONFIG, METADATA])
def test_altered_settings_of_an_adapter_are_read_or_refused(folder: Path, sound: dict[str, bytes], name: str) -> None:
    @settings(fuzz, max_examples=60)
    @given(content=altered(json.loads(sound[name])))
    def check(content: Any) -> None:
        read(folder, {**sound, name: as_json(content)})

    check()


@pytest.mark.parametrize("content", SAFETENSORS.values(), ids=SAFETENSORS)
def test_weights_that_are_no_such_file_are_refused(folder: Path, sound: dict[str, bytes], content: bytes) -> None:
    assert isinstance(read(folder, {name: sound[name] for name in (CONFIG, METADATA)} | {WEIGHTS: content}), str)


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (np.full((4, 8), np.nan, np.float32), "not finite"),
        (np.full((4, 8), np.inf, np.float16), "not finite"),
        (np.ones((4, 8), np.int64), "holds I64"),
        (np.ones((4, 8), bool), "holds BOOL"),
        (np.ones((0, 8), np.float32), "shape [0, 8]"),
        (np.ones((), np.float32), "shape []"),
        (np.ones((1,) * 30, np.float32), "has shape [1, 1"),
    ],
)
def test_a_matrix_of_other_values_is_refused(folder: Path, sound: dict[str, bytes], values: Any, told: str) -> None:
    assert told in str(
        read(folder, {name: sound[name] for name in (CONFIG, METADATA)} | {WEIGHTS: save({KEY: values})})
    )


def test_a_file_far_larger_than_the_adapter_can_be_is_refused_unread(folder: Path, sound: dict[str, bytes]) -> None:
    size = 2**31
    header = as_json({KEY: {"dtype": "F32", "shape": [4, size // 16], "data_offsets": [0, size]}})
    read(folder, sound)
    with (folder / WEIGHTS).open("wb") as file:
        file.write(of_header(header))
        file.truncate(8 + len(header) + size)
    told = str(outcome(lambda: read_adapter(folder, EXPECTED, LORA, BASE)))
    assert "it was not read" in told
    assert f"has shape [4, {size // 16}], expected [4, 8]" in told


def test_a_named_pipe_is_refused_and_not_waited_for(folder: Path, sound: dict[str, bytes]) -> None:
    read(folder, {name: sound[name] for name in FILES if name != CONFIG})
    os.mkfifo(folder / CONFIG)
    assert "is no adapter" in str(outcome(lambda: read_adapter(folder, EXPECTED, LORA, BASE)))


LOAD = """
import sys
from pathlib import Path
from tests.contract.conftest import configuration
from nestune.backends.factory import make_backend
backend, base, adapter = sys.argv[1:]
loaded = make_backend(configuration(backend, base=Path(base)))
opened = []
watched = ("open", "os.listdir", "os.scandir", "glob.glob", "exec", "import", "subprocess.Popen", "socket.connect")
sys.addaudithook(lambda event, arguments: opened.append((event, str(arguments[0]))) if event in watched else None)
loaded.load_adapter(Path(adapter))
watched = ()
print([path for event, path in opened if event == "open"])
print([(event, path) for event, path in opened if event in ("subprocess.Popen", "socket.connect", "import")])
"""


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_the_settings_of_an_adapter_choose_no_file(backend: str, tmp_path: Path) -> None:
    pytest.importorskip(backend)
    from nestune.backends.factory import make_backend
    from tests.contract.conftest import configuration

    base, adapter, elsewhere = tmp_path / "base", tmp_path / "adapter", tmp_path / "elsewhere"
    shutil.copytree(ROOT / "demo" / "base", base)
    shutil.copytree(base, elsewhere)
    adapter.mkdir()
    make_backend(configuration(backend, base=base)).save_adapter(adapter)
    settings = json.loads((adapter / CONFIG).read_text())
    settings |= {
        "base_model_name_or_path": str(elsewhere),
        "revision": "../../elsewhere",
        "auto_mapping": {"base_model_class": "Evil", "parent_library": "../elsewhere/evil"},
        "corda_config": {"cache_file": str(elsewhere / "model.safetensors")},
        "eva_config": {"file": str(elsewhere / "config.json")},
        "target_modules": ["../elsewhere"],
        "exclude_modules": str(elsewhere),
        "model": str(elsewhere),
        "adapter_file": "../elsewhere/model.safetensors",
    }
    settings["lora_parameters"]["keys"] = ["../elsewhere", str(elsewhere)]
    (adapter / CONFIG).write_text(json.dumps(settings))
    command = [sys.executable, "-c", LOAD, backend, str(base), str(adapter)]
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=True)
    opened, reached = map(eval, done.stdout.splitlines()[-2:])
    of_data = {Path(path).parent for path in opened if str(tmp_path) in path}
    assert of_data == {adapter}
    others = [path for path in opened if str(tmp_path) not in path and not path.endswith((".py", ".pyc"))]
    assert others == []
    assert [what for what in reached if what[0] != "import" or "elsewhere" in what[1]] == []
