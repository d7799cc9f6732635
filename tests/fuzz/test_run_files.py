"""Tier maps, importances and training states from anywhere, also such as have the right hash of their content."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from safetensors.numpy import save

from nestune.backends.training_state import FILE, HEADER, TrainingState, check_fits, read_training_state
from nestune.config import TierConfig
from nestune.files import read_json
from nestune.tiers.importance import Measured, read_importance, write_importance
from nestune.tiers.parameters import LoraParameter
from nestune.tiers.tier_map import TierMap, assign_tiers, find_fault, read_fitting_tier_map, write_tier_map
from tests.fuzz.hostile import altered, as_json, damaged, fuzz, outcome

PARAMETERS = [
    LoraParameter(layer, "self_attn.q_proj", side, (4, 8)[:: 1 if side == "a" else -1])
    for layer in range(4)
    for side in "ab"
]
TIERS = TierConfig(strategy="stacked", update_every=(1, 2))
MADE = assign_tiers(PARAMETERS, TIERS)
A = "layers.0.self_attn.q_proj.lora_a"
MAP = json.loads(json.dumps(MADE.as_dict()))
SHAPES = {p.name: p.shape for p in PARAMETERS}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run") / "tiers.json"


def read(path: Path) -> TierMap | str:
    """The map or its error; an accepted one names every rank of every parameter once."""
    read = outcome(lambda: read_fitting_tier_map(path, PARAMETERS, TIERS))
    if isinstance(read, TierMap):
        assert find_fault(read.tier_of, PARAMETERS) is None
        assert all(0 <= tier < 2 for tier in read.tier_of.values())
    return read


def with_right_hash(content: Any) -> Any:
    """The content, its hash made anew as a forger would."""
    try:
        content["sha256"] = TierMap("", tuple(content["update_every"]), content["tiers"]).sha256
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, RecursionError):
        return content
    return content


HAND_MADE: dict[str, dict[str, Any]] = {
    "endless ranks": {"tiers": MAP["tiers"] | {f"{A}[0:999999999]": 0}},
    "ranks of 5000 digits": {"tiers": MAP["tiers"] | {f"{A}[0:{'9' * 5000}]": 0}},
    "ranks from far away": {"tiers": MAP["tiers"] | {f"{A}[900000000:999999999]": 0}},
    "many endless ranks": {"tiers": MAP["tiers"] | {f"{A}[{start}:999999999]": 0 for start in range(5000)}},
    "no ranks": {"tiers": MAP["tiers"] | {f"{A}[3:3]": 0}},
    "ranks backwards": {"tiers": MAP["tiers"] | {f"{A}[4:2]": 0}},
    "ranks of a nested name": {"tiers": MAP["tiers"] | {f"{A}[0:2][0:2]": 0}},
    "a tier that is infinite": {"tiers": MAP["tiers"] | {A: float("inf")}},
    "a tier that is no number": {"tiers": MAP["tiers"] | {A: float("nan")}},
    "a tier of 400 digits": {"tiers": MAP["tiers"] | {A: 10**400}},
    "a tier below 0": {"tiers": MAP["tiers"] | {next(iter(MAP["tiers"])): -1}},
    "a tier that is true": {"tiers": dict.fromkeys(MAP["tiers"], True)},
    "a tier in digits": {"tiers": {name: str(tier) for name, tier in MAP["tiers"].items()}},
    "periods of 0": {"update_every": [0, 0]},
    "periods that are true": {"update_every": [True, 2]},
    "periods in text": {"update_every": "12"},
    "endless periods": {"update_every": [1] * 100_000},
    "a name of a megabyte": {"tiers": MAP["tiers"] | {"layers.0." + "x" * 2**20: 0}},
    "a name that is a path": {"tiers": MAP["tiers"] | {"../../etc/passwd": 0}},
    "a strategy that is an object": {"strategy": {"a": []}},
    "made from a list": {"made_from": [1]},
}


@pytest.mark.parametrize("changes", HAND_MADE.values(), ids=HAND_MADE)
def test_a_map_made_by_hand_with_the_right_hash_is_refused(path: Path, changes: Mapping[str, Any]) -> None:
    path.write_bytes(as_json(with_right_hash({**MAP, **changes})))
    assert isinstance(read(path), str)


def test_the_map_that_is_altered_is_a_sound_one(path: Path) -> None:
    write_tier_map(MADE, path)
    assert read(path) == MADE


@fuzz
@given(content=damaged(as_json(MAP)))
def test_a_damaged_map_is_read_or_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    read(path)


@fuzz
@given(content=altered(MAP))
def test_an_altered_map_with_the_right_hash_is_read_or_refused(path: Path, content: Any) -> None:
    path.write_bytes(as_json(with_right_hash(content)))
    read(path)


MEASURED = Measured({p.name: 0.5 for p in PARAMETERS}, {"measure": "gradient", "steps": 4, "data": "x"}, 2.5)


@fuzz
@given(content=altered({"measured_on": dict(MEASURED.measured_on), "importance": {A: 0.5}, "seconds": 1.5}))
def test_altered_importances_with_the_right_hash_are_read_or_refused(path: Path, content: Any) -> None:
    if isinstance(content, dict):
        write_with_right_hash(path, content)
    else:
        path.write_bytes(as_json(content))
    measured = outcome(lambda: read_importance(path))
    if isinstance(measured, Measured):
        assert all(np.isfinite(value) for value in measured.importance.values())
        assert measured.cost["seconds_per_step"] >= 0


def write_with_right_hash(path: Path, content: dict[str, Any]) -> None:
    from nestune.tiers import importance

    text = as_json(content)
    try:
        written = json.loads(text)
    except RecursionError:
        path.write_bytes(text)
        return
    path.write_bytes(as_json({**written, "sha256": importance._sha256(written)}))


@fuzz
@given(
    content=damaged(
        b'{"measured_on": {"measure": "gradient", "steps": 4}, "importance": {}, "seconds": 1, "sha256": ""}'
    )
)
def test_damaged_importances_are_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    assert isinstance(outcome(lambda: read_importance(path)), str)


def test_a_file_of_a_run_that_is_far_too_large_is_refused_unread(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**34)
    assert "bytes, and at most" in str(outcome(lambda: read_json(path, "Run nestune tiers again.")))
    path.write_bytes(b"")


def test_importances_are_kept_as_they_are_read(path: Path) -> None:
    write_importance(MEASURED, path)
    assert outcome(lambda: read_importance(path)) == MEASURED


STATE = {
    "optimizer": "adamw",
    "update_every": [1, 2],
    "inactive_gradients": "drop",
    "seed": 0,
    "tier_of": MADE.tier_of,
    "steps": 3,
    "updates": [3, 1],
    "window_steps": [0, 1],
}
OURS = TrainingState("adamw", (1, 2), "drop", 0, MADE.tier_of, 0, (0, 0), (0, 0), {})
ARRAYS = {
    f"{name}/{what}": np.zeros((2, 8) if "lora_a" in name else (8, 2), np.float32)
    for name in MADE.tier_of
    for what in ("first_moment", "second_moment")
}
WRITTEN = save(ARRAYS, metadata={HEADER: json.dumps(STATE)})


def read_state(folder: Path) -> TrainingState | str:
    def read() -> TrainingState:
        state = read_training_state(folder)
        check_fits(state, OURS, SHAPES)
        return state

    return outcome(read)


def test_the_state_that_is_damaged_is_a_sound_one(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(WRITTEN)
    assert isinstance(read_state(tmp_path), TrainingState)


@fuzz
@given(content=damaged(WRITTEN))
def test_a_damaged_state_is_read_or_refused(path: Path, content: bytes) -> None:
    (path.parent / FILE).write_bytes(content)
    read_state(path.parent)


@fuzz
@given(header=altered(STATE))
def test_a_state_with_another_header_is_read_or_refused(path: Path, header: Any) -> None:
    text = json.dumps(header)
    (path.parent / FILE).write_bytes(save(ARRAYS, metadata={HEADER: text}))
    read_state(path.parent)


def of_header(header: bytes, length: int | None = None, data: bytes = b"") -> bytes:
    """A safetensors file with such a header."""
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def tensor(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> bytes:
    return as_json({f"{A}/window": {"dtype": dtype, "shape": shape, "data_offsets": offsets}})


SAFETENSORS = {
    "nothing": b"",
    "half a length": b"\x01\0\0",
    "a length without end": of_header(b"{}", 2**63),
    "a length beyond the file": of_header(b"{}", 2**20),
    "a header that is a list": of_header(b"[]"),
    "a header nested deeply": of_header(b"[" * 100_000),
    "no metadata": of_header(tensor(), data=b"\0" * 8),
    "a huge shape": of_header(tensor(shape=[2**40, 2**20]), data=b"\0" * 8),
    "a shape that overflows": of_header(tensor(shape=[2**63, 2**63]), data=b"\0" * 8),
    "a shape below 0": of_header(tensor(shape=[-1]), data=b"\0" * 8),
    "no elements": of_header(tensor(shape=[0], offsets=[0, 0])),
    "offsets beyond the end": of_header(tensor(offsets=[0, 2**40])),
    "offsets backwards": of_header(tensor(offsets=[8, 0]), data=b"\0" * 8),
    "an unknown type": of_header(tensor(dtype="F128"), data=b"\0" * 8),
    "many dimensions": of_header(tensor(shape=[1] * 200, offsets=[0, 4]), data=b"\0" * 4),
    "a pickle": b"\x80\x04\x95\x10\0\0\0\0\0\0\0\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
}


@pytest.mark.parametrize("content", SAFETENSORS.values(), ids=SAFETENSORS)
def test_a_state_that_is_no_such_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE).write_bytes(content)
    assert isinstance(read_state(tmp_path), str)
