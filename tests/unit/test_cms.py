"""Continuum memory: a level moves at the multiples of its chunk, by the mean of the gradients since it last moved."""

# ruff: noqa: E402

import json
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn
from torch.nn import functional as F

from nestune.backends.tiered_optimizer import TieredOptimizer
from nestune.cms import (
    GROUPS,
    WEIGHTS,
    LevelStack,
    level_optimizer,
    load_checkpoint,
    reference_stack,
    save_checkpoint,
    statistics,
)
from nestune.errors import ConfigError, RunError

CHUNKS = {"fast": 1, "medium": 8, "slow": 16}
STEPS, RATE = 50, 1e-3
OPTIMIZERS = {"adamw": torch.optim.AdamW, "sgd with momentum": partial(torch.optim.SGD, momentum=0.9)}


def batches(width: int, rows: int = 16, length: int = 32) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets (rows, length, width) of each step, the same at every call."""
    for step in range(1, STEPS + 1):
        generator = torch.Generator().manual_seed(step)
        yield (
            torch.randn(rows, length, width, generator=generator),
            torch.randn(rows, length, width, generator=generator),
        )


def seeded_stack(seed: int, width: int = 8) -> LevelStack:
    torch.manual_seed(seed)
    return reference_stack(width, 2 * width)


def train(stack: LevelStack, optimizer: TieredOptimizer, first: int, last: int) -> None:
    """The steps from `first` to `last`, both included."""
    width = stack.levels["slow"][-1].out_features
    for step, (x, y) in enumerate(batches(width), start=1):
        if first <= step <= last:
            F.mse_loss(stack(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()


def bits(stack: LevelStack, optimizer: TieredOptimizer) -> dict[str, bytes]:
    """Weights, moments and open windows."""
    found = {name: value.numpy().tobytes() for name, value in stack.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        found |= {f"{index} {key}": value.numpy().tobytes() for key, value in state.items()}
    return found


def test_the_reference_stack_has_1052160_parameters() -> None:
    d, h = 256, 512
    lstm = 4 * d * (d + d) + 2 * 4 * d
    feed_forward = (d * h + h) + (h * d + d)
    assert lstm + 2 * feed_forward == 1_052_160
    stack = reference_stack()
    assert {name: sum(p.numel() for p in level.parameters()) for name, level in stack.levels.items()} == {
        "fast": lstm,
        "medium": feed_forward,
        "slow": feed_forward,
    }


def test_levels_run_in_their_order_and_an_lstm_passes_its_output_sequence_on() -> None:
    stack = seeded_stack(0)
    x = torch.randn(2, 5, 8)
    expected = stack.levels["slow"](stack.levels["medium"](stack.levels["fast"](x)[0]))
    assert torch.equal(stack(x), expected)
    assert stack(x).shape == x.shape


def system_b_by_hand(stack: LevelStack, make: Callable[..., torch.optim.Optimizer]) -> tuple[dict[str, Any], list[int]]:
    """Three separate optimizers; `.grad` adds up over backward passes and is zeroed when its level has stepped."""
    lstm, medium, slow = (deepcopy(stack.levels[name]) for name in CHUNKS)
    levels = {"fast": lstm, "medium": medium, "slow": slow}
    optimizers = {name: make(level.parameters(), lr=RATE / CHUNKS[name]) for name, level in levels.items()}
    updates = dict.fromkeys(CHUNKS, 0)
    for step, (x, y) in enumerate(batches(lstm.input_size), start=1):
        F.mse_loss(slow(medium(lstm(x)[0])), y).backward()
        for name, chunk in CHUNKS.items():
            if step % chunk == 0:
                for parameter in levels[name].parameters():
                    parameter.grad /= chunk
                optimizers[name].step()
                optimizers[name].zero_grad()
                updates[name] += 1
    weights = {f"levels.{name}.{key}": v for name, level in levels.items() for key, v in level.state_dict().items()}
    return weights, list(updates.values())


@pytest.mark.parametrize(("width", "optimizer"), [(256, "adamw"), (16, "sgd with momentum")])
def test_fifty_steps_update_50_6_and_3_times_with_the_bits_of_system_b_by_hand(width: int, optimizer: str) -> None:
    stack = seeded_stack(0, width)
    expected, updates = system_b_by_hand(stack, OPTIMIZERS[optimizer])
    tiered = level_optimizer(stack, CHUNKS, lr=RATE, optimizer=OPTIMIZERS[optimizer])
    train(stack, tiered, 1, STEPS)
    assert tiered.update_counts == updates == [50, 6, 3]
    assert [name for name, value in stack.state_dict().items() if not torch.equal(value, expected[name])] == []


def test_only_the_window_of_a_level_that_has_just_moved_is_emptied() -> None:
    stack = seeded_stack(0)
    optimizer = level_optimizer(stack, CHUNKS, lr=RATE)
    chunk_of = {p: CHUNKS[name] for name, level in stack.levels.items() for p in level.parameters()}
    summed: dict[Tensor, Tensor] = {}
    for step, (x, y) in enumerate(batches(8), start=1):
        loss = F.mse_loss(stack(x), y)
        for p, gradient in zip(chunk_of, torch.autograd.grad(loss, list(chunk_of), retain_graph=True), strict=True):
            summed[p] = summed[p] + gradient if p in summed else gradient
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        summed = {p: gradient for p, gradient in summed.items() if step % chunk_of[p]}
        windows = {p: optimizer.state[p]["window"] for p in chunk_of if "window" in optimizer.state.get(p, {})}
        assert windows.keys() == summed.keys()
        assert all(torch.equal(windows[p], summed[p]) for p in summed)


def test_a_level_moves_at_the_multiples_of_its_chunk_and_nowhere_else() -> None:
    stack = seeded_stack(0)
    optimizer = level_optimizer(stack, {"slow": 1, "fast": 7, "medium": 3}, lr=RATE)
    moved: dict[str, list[int]] = {"fast": [], "medium": [], "slow": []}
    for step in range(1, STEPS + 1):
        before = deepcopy(stack.state_dict())
        train(stack, optimizer, step, step)
        after = stack.state_dict()
        for name in {key.split(".")[1] for key in after if not torch.equal(before[key], after[key])}:
            moved[name].append(step)
    assert moved == {"fast": [*range(7, 51, 7)], "medium": [*range(3, 51, 3)], "slow": [*range(1, 51)]}


def test_statistics_tell_updates_chunks_parameters_and_the_open_window_of_each_level() -> None:
    stack = seeded_stack(0)
    optimizer = level_optimizer(stack, {"slow": 16, "medium": 8, "fast": 1}, lr=RATE)
    train(stack, optimizer, 1, 29)
    sizes = {name: sum(p.numel() for p in level.parameters()) for name, level in stack.levels.items()}
    assert statistics(optimizer) == {
        name: {
            "updates": 29 // chunk,
            "chunk": chunk,
            "parameters": sizes[name],
            "steps_in_window": 29 % chunk,
        }
        for name, chunk in CHUNKS.items()
    }


def test_after_a_reset_training_is_that_of_a_new_optimizer() -> None:
    used, new = seeded_stack(0), seeded_stack(0)
    start = deepcopy(used.state_dict())
    reset = level_optimizer(used, CHUNKS, lr=RATE)
    train(used, reset, 1, 13)
    reset.reset()
    assert {name: of["updates"] + of["steps_in_window"] for name, of in statistics(reset).items()} == dict.fromkeys(
        CHUNKS, 0
    )
    used.load_state_dict(start)
    fresh = level_optimizer(new, CHUNKS, lr=RATE)
    train(used, reset, 1, 20)
    train(new, fresh, 1, 20)
    assert bits(used, reset) == bits(new, fresh)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_going_on_from_a_checkpoint_inside_a_window_gives_the_bits_of_an_unbroken_run(
    tmp_path: Path, optimizer: str
) -> None:
    def made(seed: int) -> tuple[LevelStack, TieredOptimizer]:
        stack = seeded_stack(seed)
        return stack, level_optimizer(stack, CHUNKS, lr=RATE, optimizer=OPTIMIZERS[optimizer])

    unbroken, first, second = made(0), made(0), made(1)
    train(*unbroken, 1, STEPS)
    train(*first, 1, 13)
    save_checkpoint(tmp_path / "at_13", *first)
    train(*second, 1, 5)
    load_checkpoint(tmp_path / "at_13", *second)
    assert statistics(second[1]) == statistics(first[1])
    train(*second, 14, STEPS)
    assert bits(*second) == bits(*unbroken)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint of the stack of width 8, after step 13."""
    stack = seeded_stack(0)
    optimizer = level_optimizer(stack, CHUNKS, lr=RATE)
    train(stack, optimizer, 1, 13)
    save_checkpoint(tmp_path / "saved", stack, optimizer)
    return tmp_path / "saved"


def test_a_checkpoint_holds_safetensors_and_json_only_and_replaces_an_earlier_one(saved: Path) -> None:
    before = (saved / WEIGHTS).read_bytes()
    stack = seeded_stack(1)
    save_checkpoint(saved, stack, level_optimizer(stack, CHUNKS, lr=RATE))
    assert {file.suffix for file in saved.iterdir()} == {".safetensors", ".json"}
    assert (saved / WEIGHTS).read_bytes() != before
    assert [folder.name for folder in saved.parent.iterdir()] == ["saved"]


def test_a_save_that_fails_leaves_the_earlier_checkpoint_as_it_was(saved: Path) -> None:
    before = {file.name: file.read_bytes() for file in saved.iterdir()}
    stack = seeded_stack(1)
    optimizer = level_optimizer(stack, CHUNKS, lr=RATE)
    optimizer.set_learning_rate(float("nan"))  # JSON has no such number
    with pytest.raises(ValueError, match="JSON"):
        save_checkpoint(saved, stack, optimizer)
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == before


def refused(folder: Path, stack: LevelStack, optimizer: TieredOptimizer, error: type[Exception]) -> str:
    """What loading says, having changed nothing."""
    before = bits(stack, optimizer)
    with pytest.raises(error) as caught:
        load_checkpoint(folder, stack, optimizer)
    assert bits(stack, optimizer) == before
    return str(caught.value)


def test_a_checkpoint_of_other_chunks_shapes_and_optimizer_is_refused_with_every_fault(saved: Path) -> None:
    stack = seeded_stack(0, width=4)
    optimizer = level_optimizer(stack, CHUNKS | {"slow": 32}, lr=RATE, optimizer=torch.optim.SGD)
    message = refused(saved, stack, optimizer, ConfigError)
    assert "slow (chunk 16, 4 parameters); here fast (chunk 1, 4 parameters)" in message
    assert "slow (chunk 32, 4 parameters)" in message
    assert "saved by another optimizer, without dampening, momentum, nesterov" in message
    assert "levels.slow.0.weight has shape [16, 8], here [8, 4]" in message
    assert message.endswith("Make stack and optimizer as they were saved, or take another checkpoint.")


@pytest.mark.parametrize("names", [("fast", "medium", "deep"), ("medium", "fast", "slow")], ids=["other", "reordered"])
def test_a_checkpoint_of_other_levels_is_refused(saved: Path, names: tuple[str, ...]) -> None:
    levels = seeded_stack(0).levels
    stack = LevelStack({name: levels[name if name in levels else "slow"] for name in names})
    message = refused(saved, stack, level_optimizer(stack, dict.fromkeys(names, 1), lr=RATE), ConfigError)
    assert "its levels are fast (chunk 1, 4 parameters), medium (chunk 8" in message
    if "deep" in names:
        assert "levels.deep.0.weight has shape none, here [16, 8]" in message
        assert "levels.slow.0.weight has shape [16, 8], here none" in message


def test_a_checkpoint_with_other_frozen_parameters_is_refused(saved: Path) -> None:
    stack = seeded_stack(0)
    stack.levels["slow"][0].weight.requires_grad_(False)
    message = refused(saved, stack, level_optimizer(stack, CHUNKS, lr=RATE), ConfigError)
    assert "slow (chunk 16, 3 parameters)" in message


@pytest.mark.parametrize("file", [WEIGHTS, "optimizer.safetensors", GROUPS])
@pytest.mark.parametrize("damage", ["missing", "cut short"])
def test_a_broken_checkpoint_is_refused(saved: Path, file: str, damage: str) -> None:
    content = (saved / file).read_bytes()
    (saved / file).unlink()
    if damage == "cut short":
        (saved / file).write_bytes(content[: len(content) // 2])
    stack = seeded_stack(0)
    message = refused(saved, stack, level_optimizer(stack, CHUNKS, lr=RATE), RunError)
    assert str(saved) in message
    assert "Take another checkpoint." in message


def test_a_state_of_no_level_stack_is_refused(saved: Path) -> None:
    content = json.loads((saved / GROUPS).read_text())
    (saved / GROUPS).write_text(json.dumps({"groups": [{"lr": 1.0} for _ in content["groups"]]}))
    stack = seeded_stack(0)
    assert "None (chunk None" in refused(saved, stack, level_optimizer(stack, CHUNKS, lr=RATE), ConfigError)


def test_unknown_missing_and_wrong_chunks_are_told_at_once_with_the_known_levels() -> None:
    with pytest.raises(ConfigError) as caught:
        level_optimizer(seeded_stack(0), {"fats": 1, "medium": 0}, lr=RATE)
    assert str(caught.value) == (
        "chunks: there is no level 'fats'; level 'fast' has no chunk; level 'slow' has no chunk; "
        "the chunk of 'medium' is 0. Give each level (fast, medium, slow) a whole number of steps, at least 1."
    )


@pytest.mark.parametrize("chunk", [0, -8, 2.0, "8", True, None])
def test_a_chunk_that_is_no_count_of_steps_is_refused(chunk: Any) -> None:
    with pytest.raises(ConfigError, match=r"the chunk of 'slow' is .* at least 1"):
        level_optimizer(seeded_stack(0), CHUNKS | {"slow": chunk}, lr=RATE)


def test_a_recurrent_level_that_takes_time_first_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"level memory: .*batch_first=True"):
        LevelStack({"memory": nn.LSTM(8, 8), "head": nn.Linear(8, 8)})
