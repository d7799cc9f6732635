"""Training goes on from a saved state, on any backend: as if it had never been interrupted, or not at all."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from nestune.backends.base import Backend
from nestune.backends.factory import make_backend
from nestune.backends.training_state import FILE, read_training_state, write_training_state
from nestune.errors import ConfigError, RunError
from nestune.tiers.schedule import TierSchedule
from tests.contract.conftest import configuration, random_batch, tier_map_for

# The backend that saves, and the one that goes on.
PAIRS = [("torch", "torch"), ("mlx", "mlx"), ("mlx", "torch"), ("torch", "mlx")]
PERIODS = (1, 2, 4)
# In the middle of the slowest tier's window, which is steps 5 to 8.
STOP, STEPS, RATE = 6, 12, 1e-3
LORA = {"rank": 4, "targets": ["q_proj", "v_proj", "up_proj", "down_proj"]}

Prepare = Callable[..., Backend]


@pytest.fixture
def prepare(small_base: Path) -> Prepare:
    """Makes a named backend of a configuration's blocks, its tiers assigned and its optimizers ready."""

    def prepared(backend_name: str, **blocks: dict[str, Any]) -> Backend:
        config = configuration(backend_name, base=small_base, **({"lora": LORA} | blocks))
        backend = make_backend(config)
        backend.prepare_training(tier_map_for(backend, config.tiers).tier_of)
        return backend

    return prepared


def train(backend: Backend, steps: Sequence[int]) -> list[float]:
    """Take these steps, of two micro-batches each; returns their losses."""
    schedule = TierSchedule(PERIODS)
    micro_batches = {step: [random_batch(2 * step), random_batch(2 * step + 1, rows=2)] for step in steps}
    return [backend.train_step(micro_batches[step], schedule.due(step), RATE).loss for step in steps]


def save(backend: Backend, folder: Path) -> bytes:
    """Write all that training goes on from; returns the state's file."""
    folder.mkdir(parents=True, exist_ok=True)
    backend.save_adapter(folder)
    write_training_state(folder, backend.training_state())
    return (folder / FILE).read_bytes()


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
@pytest.mark.parametrize("policy", ["drop", "accumulate"])
@pytest.mark.parametrize("strategy", ["layer_depth_reversed", "stacked"])
@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: "-to-".join(pair))
def test_a_training_that_goes_on_ends_as_an_unbroken_one(
    prepare: Prepare, tmp_path: Path, pair: tuple[str, str], strategy: str, policy: str, optimizer: str
) -> None:
    for name in pair:
        pytest.importorskip(name)
    saving, loading = pair
    same = saving == loading
    if not same and strategy == "stacked":
        pytest.skip("each backend goes on with parts of matrices; that they agree on them needs no pair")
    stop, steps = (STOP, STEPS) if same else (STOP + 16, STEPS + 30)
    blocks: dict[str, Any] = {
        # What dropout leaves out is drawn by each framework's own generator.
        "lora": LORA | {"dropout": 0.1 if same else 0.0},
        "tiers": {"strategy": strategy, "inactive_gradients": policy, "update_every": list(PERIODS)},
        "training": {"optimizer": optimizer, "weight_decay": 0.01, "seed": 3},
    }
    first, second = prepare(saving, **blocks), prepare(loading, **blocks)
    losses = train(first, range(1, stop + 1))
    save(first, tmp_path / "checkpoint")
    second.load_adapter(tmp_path / "checkpoint")
    second.restore_training(read_training_state(tmp_path / "checkpoint"))
    losses += train(second, range(stop + 1, steps + 1))
    state = save(second, tmp_path / "resumed")
    assert second.training_state().updates == tuple(steps // period for period in PERIODS)

    for name in sorted(set(pair)):
        unbroken = prepare(name, **blocks)
        before = unbroken.weights()
        expected = train(unbroken, range(1, steps + 1))
        if same:
            assert losses == expected
            assert bits(second) == bits(unbroken)
            assert state == save(unbroken, tmp_path / "unbroken")
            assert all(before[matrix].tobytes() != value for matrix, value in bits(unbroken).items())
        else:
            assert losses == pytest.approx(expected, rel=1e-3)
            start, ours, theirs = (flat(weights) for weights in (before, second.weights(), unbroken.weights()))
            deviation = np.linalg.norm(ours - theirs)
            of_weights, of_movement = (deviation / np.linalg.norm(size) for size in (theirs, theirs - start))
            print(f"deviation from {name} {of_weights:.2g} of the weights, {of_movement:.2g} of their movement")
            assert of_movement < 1e-2


def bits(backend: Backend) -> dict[str, bytes]:
    return {name: value.tobytes() for name, value in backend.weights().items()}


def flat(weights: dict[str, NDArray[Any]]) -> NDArray[Any]:
    return np.concatenate([weights[name].ravel() for name in sorted(weights)])


def test_a_state_is_a_copy_that_later_steps_do_not_change(prepare: Prepare, backend_name: str, tmp_path: Path) -> None:
    backend = prepare(backend_name, tiers={"inactive_gradients": "accumulate"})
    train(backend, range(1, STOP + 1))
    state = backend.training_state()
    saved = save(backend, tmp_path)
    train(backend, range(STOP + 1, STEPS + 1))
    write_training_state(tmp_path, state)
    assert (tmp_path / FILE).read_bytes() == saved
    assert (state.steps, state.updates, state.window_steps) == (6, (6, 3, 1), (0, 0, 2))


def test_a_state_that_goes_through_a_file_is_the_same(prepare: Prepare, backend_name: str, tmp_path: Path) -> None:
    backend = prepare(backend_name, tiers={"strategy": "stacked", "inactive_gradients": "accumulate"})
    train(backend, range(1, STOP + 1))
    state = backend.training_state()
    write_training_state(tmp_path, state)
    read = read_training_state(tmp_path)
    assert replace(read, arrays={}).__dict__ == replace(state, arrays={}).__dict__
    assert {key: (array.shape, array.tobytes()) for key, array in read.arrays.items()} == {
        key: (array.shape, array.tobytes()) for key, array in state.arrays.items()
    }
    # At step 6 tiers 0 and 1 have just moved, and tier 2 moved at step 4: all have moments, it alone a window.
    assert set(state.of("window")) == {name for name, tier in state.tier_of.items() if tier == 2}
    assert set(state.of("first_moment")) == set(state.of("second_moment")) == set(state.tier_of)


@pytest.mark.parametrize(
    ("blocks", "faults"),
    [
        (
            {
                "tiers": {"update_every": [1, 2, 8], "inactive_gradients": "accumulate"},
                "training": {"optimizer": "sgd", "seed": 7},
            },
            [
                "its optimizer is adamw, here sgd",
                "its update_every is (1, 2, 4), here (1, 2, 8)",
                "its inactive_gradients is drop, here accumulate",
                "its seed is 0, here 7",
            ],
        ),
        (
            {"tiers": {"strategy": "layer_depth"}, "training": {"seed": 7}},
            ["its seed is 0, here 7", "it has layers.0.mlp.down_proj.lora_a on tier 2, here "],
        ),
        (
            {"tiers": {"strategy": "stacked"}},
            ["it has layers.0.mlp.down_proj.lora_a on tier 2, here layers.0.mlp.down_proj.lora_a[0:2] is on tier 0"],
        ),
        (
            {"lora": LORA | {"targets": ["q_proj", "v_proj", "up_proj"]}},
            ["it has layers.0.mlp.down_proj.lora_a on tier 2, here layers.0.mlp.up_proj.lora_a is on tier 2"],
        ),
        (
            {"lora": LORA | {"rank": 2}},
            [
                "its layers.0.mlp.down_proj.lora_a/first_moment has shape [4, 32], expected [2, 32]",
                "its layers.3.self_attn.v_proj.lora_b/second_moment has shape [16, 4], expected [16, 2]",
            ],
        ),
    ],
    ids=["settings", "other tiers", "ranks on tiers", "other matrices", "other rank"],
)
def test_a_state_of_another_training_is_refused_with_all_that_differs_and_changes_nothing(
    prepare: Prepare, backend_name: str, tmp_path: Path, blocks: dict[str, Any], faults: list[str]
) -> None:
    saved = prepare(backend_name)
    train(saved, range(1, 5))
    other = prepare(backend_name, **blocks)
    train(other, [1])
    before = save(other, tmp_path)
    with pytest.raises(ConfigError, match="the training state does not fit") as refusal:
        other.restore_training(saved.training_state())
    assert [fault for fault in faults if fault not in str(refusal.value)] == []
    assert "Go on with the configuration it was saved with." in str(refusal.value)
    assert save(other, tmp_path) == before


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda content: None, "there is no "),
        (lambda content: b"", "is broken"),
        (lambda content: content[:-1], "is broken"),
        (lambda content: content[: len(content) // 2], "is broken"),
        (lambda content: content.replace(b'\\"steps\\"', b'\\"stops\\"'), "is broken"),
        (lambda content: content.replace(b'"nestune"', b'"another"'), "is broken"),
    ],
    ids=["missing", "empty", "cut", "halved", "other fields", "other header"],
)
def test_a_file_that_is_missing_or_broken_is_refused_with_what_to_do(
    prepare: Prepare, backend_name: str, tmp_path: Path, damage: Callable[[bytes], bytes | None], told: str
) -> None:
    backend = prepare(backend_name)
    train(backend, [1])
    damaged = damage(save(backend, tmp_path))
    (tmp_path / FILE).unlink()
    if damaged is not None:
        (tmp_path / FILE).write_bytes(damaged)
    with pytest.raises(
        RunError, match=rf"{told}.*Delete that folder to go on from the checkpoint before it, or train anew\."
    ) as refusal:
        read_training_state(tmp_path)
    assert FILE in str(refusal.value)
