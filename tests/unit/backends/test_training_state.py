"""Training's state on disk: what was written is read, to the bit; what is broken or does not fit is refused."""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from safetensors.numpy import load_file, save

from nestune.backends.training_state import (
    FILE,
    TrainingState,
    check_fits,
    read_training_state,
    write_training_state,
)
from nestune.errors import ConfigError, RunError

NAME = "layers.0.self_attn.q_proj.lora"
SHAPES = {f"{NAME}_a": (4, 6), f"{NAME}_b": (8, 4)}
OURS = TrainingState(
    optimizer="adamw",
    update_every=(1, 2, None),
    inactive_gradients="accumulate",
    seed=3,
    tier_of={f"{NAME}_a": 0, f"{NAME}_b[0:1]": 1, f"{NAME}_b[1:4]": 2},
    steps=7,
    updates=(7, 3, 0),
    window_steps=(0, 1, 7),
    arrays={
        f"{NAME}_a/first_moment": np.ones((4, 6), np.float32),
        f"{NAME}_a/second_moment": np.ones((4, 6), np.float32),
        f"{NAME}_b[0:1]/first_moment": np.ones((8, 1), np.float32),
        f"{NAME}_b[0:1]/second_moment": np.ones((8, 1), np.float32),
        f"{NAME}_b[0:1]/window": np.ones((8, 1), np.float32),
    },
)


def equal(one: TrainingState, other: TrainingState) -> bool:
    told = [{f.name: getattr(state, f.name) for f in fields(state) if f.name != "arrays"} for state in (one, other)]
    held = [{key: (a.dtype, a.shape, a.tobytes()) for key, a in state.arrays.items()} for state in (one, other)]
    return told[0] == told[1] and held[0] == held[1]


names = st.builds(
    "layers.{}.{}.lora_{}{}".format,
    st.integers(0, 200),
    st.sampled_from(["self_attn.q_proj", "mlp.down_proj", "attention.query_key_value"]),
    st.sampled_from("ab"),
    st.sampled_from(["", "[0:3]", "[3:16]"]),
)
values = arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=5), elements=st.floats(width=32))
counts = st.lists(st.integers(0, 2**31), min_size=1, max_size=4).map(tuple)
states = st.builds(
    TrainingState,
    optimizer=st.sampled_from(["adamw", "adam", "sgd"]),
    update_every=st.lists(st.integers(1, 999), min_size=1, max_size=4).map(lambda periods: (*periods, None)),
    inactive_gradients=st.sampled_from(["drop", "accumulate"]),
    seed=st.integers(0, 2**63 - 1),
    tier_of=st.dictionaries(names, st.integers(0, 7), max_size=5),
    steps=st.integers(0, 2**40),
    updates=counts,
    window_steps=counts,
    arrays=st.dictionaries(
        st.builds("{}/{}".format, names, st.sampled_from(["first_moment", "second_moment", "window"])),
        values,
        max_size=5,
    ),
)


@given(state=states)
def test_what_was_written_is_read_to_the_bit(state: TrainingState, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("state")
    write_training_state(folder, state)
    assert equal(read_training_state(folder), state)


def test_the_same_state_gives_the_same_bytes_in_whatever_order_it_was_put_together(tmp_path: Path) -> None:
    backwards = replace(
        OURS,
        tier_of=dict(reversed(OURS.tier_of.items())),
        arrays=dict(reversed([(key, array.copy()) for key, array in OURS.arrays.items()])),
    )
    written = []
    for number, state in enumerate((OURS, OURS, backwards)):
        (tmp_path / str(number)).mkdir()
        write_training_state(tmp_path / str(number), state)
        written.append((tmp_path / str(number) / FILE).read_bytes())
    assert written[0] == written[1] == written[2]


def test_arrays_of_one_kind_by_the_names_of_the_tier_map() -> None:
    assert list(OURS.of("window")) == [f"{NAME}_b[0:1]"]
    assert list(OURS.of("first_moment")) == [f"{NAME}_a", f"{NAME}_b[0:1]"]
    assert list(OURS.of("second_moment")) == [f"{NAME}_a", f"{NAME}_b[0:1]"]


def test_a_folder_without_a_state_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=rf"there is no .*{FILE}.*the checkpoint before it"):
        read_training_state(tmp_path)


@pytest.mark.parametrize("kept", [0, 7, 100, -1])
def test_a_truncated_file_is_refused_with_what_to_do(kept: int, tmp_path: Path) -> None:
    write_training_state(tmp_path, OURS)
    whole = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(whole[:kept])
    with pytest.raises(RunError, match=rf"{FILE} is broken: .*the checkpoint before it"):
        read_training_state(tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        None,
        {},
        {"nestune": "no json"},
        {"nestune": "[]"},
        {"nestune": "{}"},
        {"nestune": json.dumps({"update_every": 3, "updates": [], "window_steps": []})},
        {"nestune": json.dumps({"update_every": [], "updates": [], "window_steps": [], "unheard_of": 1})},
    ],
)
def test_tensors_of_something_else_are_refused_with_what_to_do(header: dict[str, str] | None, tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(save({"weight": np.ones((2, 2), np.float32)}, metadata=header))
    with pytest.raises(RunError, match=rf"{FILE} is broken: .*the checkpoint before it"):
        read_training_state(tmp_path)


def test_any_tool_can_read_the_arrays(tmp_path: Path) -> None:
    write_training_state(tmp_path, OURS)
    assert load_file(tmp_path / FILE).keys() == OURS.arrays.keys()


def test_a_state_of_the_same_training_fits() -> None:
    check_fits(OURS, replace(OURS, steps=0, updates=(0, 0, 0), window_steps=(0, 0, 0), arrays={}), SHAPES)
    check_fits(replace(OURS, tier_of=dict(reversed(OURS.tier_of.items()))), OURS, SHAPES)


@pytest.mark.parametrize(
    ("key", "told"),
    [
        (f"{NAME}_a/second_moment", "its counts tell of a second_moment of tier 0, which it does not hold"),
        (f"{NAME}_b[0:1]/window", "its counts tell of a window of tier 1, which it does not hold"),
    ],
)
def test_what_the_counts_tell_of_must_be_there(key: str, told: str) -> None:
    arrays = {name: array for name, array in OURS.arrays.items() if name != key}
    with pytest.raises(ConfigError, match=told):
        check_fits(replace(OURS, arrays=arrays), OURS, SHAPES)


def test_all_that_does_not_fit_is_told_at_once() -> None:
    arrays = {
        f"{NAME}_a/first_moment": np.ones((6, 4), np.float32),
        f"{NAME}_b[1:4]/window": np.ones((8, 4), np.float32),
        "layers.9.mlp.up_proj.lora_a/window": np.ones((4, 4), np.float32),
    }
    other = replace(
        OURS, optimizer="sgd", update_every=(1, 2, 4), inactive_gradients="drop", seed=4, arrays=OURS.arrays | arrays
    )
    with pytest.raises(ConfigError) as refused:
        check_fits(other, OURS, SHAPES)
    for told in (
        "optimizer is sgd, here adamw",
        "update_every is (1, 2, 4), here (1, 2, None)",
        "inactive_gradients is drop, here accumulate",
        "seed is 4, here 3",
        f"{NAME}_a/first_moment has shape [6, 4], expected [4, 6]",
        f"{NAME}_b[1:4]/window has shape [8, 4], expected [8, 3]",
        "layers.9.mlp.up_proj.lora_a/window has shape [4, 4], expected []",
        "Go on with the configuration it was saved with",
    ):
        assert told in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1 + 7 + 1


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({f"{NAME}_a": 2}, f"it has {NAME}_a on tier 2, here {NAME}_a is on tier 0"),
        ({f"{NAME}_b[1:4]": None}, f"it has nothing more, here {NAME}_b[1:4] is on tier 2"),
        ({f"{NAME}_c": 1}, f"it has {NAME}_c on tier 1, here is nothing more"),
    ],
)
def test_the_first_matrix_on_another_tier_is_told(change: dict[str, int | None], told: str) -> None:
    tier_of: dict[str, Any] = {name: tier for name, tier in (OURS.tier_of | change).items() if tier is not None}
    with pytest.raises(ConfigError) as refused:
        check_fits(replace(OURS, tier_of=tier_of), OURS, SHAPES)
    assert told in str(refused.value)
