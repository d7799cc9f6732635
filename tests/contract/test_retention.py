"""What keeps knowledge in training: KL to the teacher, l2, a fresh adapter beside the parent's; on both backends."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from nestune.backends.base import Backend
from nestune.backends.factory import make_backend
from nestune.backends.training_state import read_training_state, write_training_state
from nestune.data.batches import Batch, held_batches
from nestune.data.openings import held_row
from nestune.errors import ConfigError
from nestune.tiers.schedule import TierSchedule
from tests.contract import conftest
from tests.contract.conftest import MakeBackend, configuration, random_batch, tier_map_for

ALL, RATE = frozenset({0, 1, 2}), 3e-3
LORA = {"rank": 4, "alpha": 8.0}
TOKENS = [0, 17, 250, 33, 5, 120]


def held_batch(seed: int) -> Batch:
    """A batch of which the last rows are held: one learned too, one not."""
    batch = random_batch(seed)
    held = batch.supervised.copy()
    held[:2] = False
    supervised = batch.supervised.copy()
    supervised[3:] = False
    return Batch(batch.tokens, supervised, batch.lengths, held)


def batches(step: int, every: int = 1) -> list[Batch]:
    made = held_batch if step % every == 0 else random_batch
    return [with_prompts(made(2 * step)), with_prompts(made(2 * step + 1))]


def train(backend: Backend, steps: range, every: int = 1) -> list[tuple[float, float | None]]:
    """Loss and divergence of each step."""
    schedule = TierSchedule((1, 2, 4))
    results = (backend.train_step(batches(step, every), schedule.due(step), RATE) for step in steps)
    return [(result.loss, result.kl) for result in results]


def bits(backend: Backend) -> dict[str, bytes]:
    return {name: values.tobytes() for name, values in backend.weights().items()}


def texts(count: int = 12) -> list[Batch]:
    generator = np.random.default_rng(5)
    rows = [held_row(generator.integers(3, 300, size=generator.integers(4, 12)).tolist()) for _ in range(count)]
    return list(held_batches(rows, 5, 0))


@pytest.fixture(scope="module", autouse=True)
def on_the_small_base(small_base: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(conftest.configuration.__kwdefaults__, "base", small_base)
        yield


@pytest.fixture(scope="module")
def parent(on_the_small_base: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of rank 4 that answers otherwise than the base does."""
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("parent")
    config = configuration("torch", lora=LORA, training={"seed": 7})
    backend = make_backend(config)
    backend.prepare_training(tier_map_for(backend, config.tiers).tier_of)
    for step in range(1, 31):
        backend.train_step([random_batch(100 + step)], ALL, 3e-2)
    backend.save_adapter(folder)
    return folder


def with_prompts(batch: Batch) -> Batch:
    """Whatever is not supervised counts as a prompt."""
    inside = np.arange(batch.tokens.shape[1]) < batch.lengths[:, None]
    prompts = inside & ~batch.supervised
    prompts[:, 0] = False
    return Batch(batch.tokens, batch.supervised, batch.lengths, batch.held, prompts)


def without_held(step: list[Batch]) -> list[Batch]:
    return [Batch(batch.tokens, batch.supervised, batch.lengths) for batch in step]


def test_a_weight_of_zero_moves_the_weights_as_no_kl_does(make: MakeBackend) -> None:
    weightless, without = make(lora=LORA, retention={"kl": {"weight": 0.0}}), make(lora=LORA)
    for step in range(1, 7):
        weightless.train_step(batches(step), ALL, RATE)
        without.train_step(without_held(batches(step)), ALL, RATE)
    assert bits(weightless) == bits(without)


def test_prompts_of_weight_one_are_learned_as_answers_are_and_of_none_not_at_all(make: MakeBackend) -> None:
    steps = [[random_batch(2 * step), random_batch(2 * step + 1, rows=2)] for step in range(1, 6)]
    everything = []
    for step in steps:
        batches_of_all = []
        for batch in map(with_prompts, step):
            assert batch.prompts is not None
            batches_of_all.append(Batch(batch.tokens, batch.supervised | batch.prompts, batch.lengths))
        everything.append(batches_of_all)
    counted, alike = make(lora=LORA, training={"prompt_weight": 1.0}), make(lora=LORA)
    for step, of_all in zip(steps, everything, strict=True):
        # What is reported is the loss of the answers alone.
        expected = counted.loss(step).mean
        assert counted.train_step(list(map(with_prompts, step)), ALL, RATE).loss == pytest.approx(expected, rel=1e-4)
        alike.train_step(of_all, ALL, RATE)
    ours, theirs = counted.weights(), alike.weights()
    off = sum(np.square(ours[name] - theirs[name]).sum() for name in ours)
    assert off**0.5 < 1e-3 * sum(np.square(values).sum() for values in ours.values()) ** 0.5


def test_an_untrained_adapter_diverges_by_nothing(make: MakeBackend) -> None:
    """KL of a model with itself; in a step, where the teacher sees the held rows alone, but for rounding."""
    backend = make(lora=LORA, retention={"kl": {}})
    assert backend.train_step(batches(1), ALL, 0.0).kl == pytest.approx(0, abs=1e-7)
    assert backend.divergence(texts(), None).nats == 0


def test_the_divergence_is_that_of_the_logits(make: MakeBackend, parent: Path) -> None:
    backend = make(lora=LORA)
    rows = [held_row(TOKENS), held_row(TOKENS[::-1])]

    def log_probabilities(adapter: Path | None) -> NDArray[np.float64]:
        backend.show_adapter(adapter)
        logits = np.stack([backend.logits(row.tokens.tolist()) for row in rows]).astype(np.float64)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    base, trained = log_probabilities(None), log_probabilities(parent)
    for of_teacher, of_model, teacher, shown in ((base, trained, None, parent), (trained, base, parent, None)):
        # The last position predicts nothing.
        expected = (np.exp(of_teacher) * (of_teacher - of_model)).sum(-1)[:, :-1].sum()
        backend.show_adapter(shown)
        seen = backend.divergence(held_batches(rows, 2, 0), teacher)
        assert seen.nats == pytest.approx(expected, rel=1e-4)
        assert seen.tokens == 2 * (len(TOKENS) - 1)
        assert expected > 0.01


def test_the_step_reports_the_divergence_before_it_and_a_step_of_kl_alone_lowers_it(
    make: MakeBackend, parent: Path
) -> None:
    """Training goes on with the parent's matrices, and is held to the base."""
    retention = {"start": "continue", "kl": {"teacher": "base", "weight": 1e6}}
    backend = make(lora=LORA, retention=retention, training={"max_grad_norm": None, "optimizer": "sgd"})
    backend.begin(parent)
    step = [Batch(b.tokens, b.supervised, b.lengths, b.held) for b in batches(1)]
    held = [Batch(b.tokens, b.held, b.lengths, b.held) for b in step if b.held is not None]
    before = backend.divergence(held, None)
    assert before.nats > 0
    assert backend.train_step(step, ALL, 1e-8).kl == pytest.approx(before.mean, rel=1e-4)
    assert backend.divergence(held, None).nats < before.nats


@pytest.mark.parametrize("teacher", ["parent", "base"])
def test_the_gradient_of_the_divergence_is_its_slope(make: MakeBackend, parent: Path, teacher: str) -> None:
    """A step of SGD moves each matrix against the gradient; the slope along that is minus its squared norm."""
    weight = 1e4
    retention = {"kl": {"teacher": teacher, "weight": weight}, "start": "continue"}
    backend = make(lora=LORA, retention=retention, training={"max_grad_norm": None, "optimizer": "sgd"})
    backend.begin(parent)
    # Away from the parent, where the divergence from it has a slope.
    for number in range(4):
        backend.train_step([random_batch(40 + number)], ALL, 0.05)
    held = texts()
    learned = random_batch(1)
    step = [Batch(learned.tokens, learned.supervised, learned.lengths), *held]
    folder = parent if teacher == "parent" else None
    first, before = backend.weights(), backend.divergence(held, folder)
    # Long enough that the divergence falls by more than float32 rounds it by, some 3e-8, short enough for a tangent.
    rate = 1e-5
    backend.train_step(step, ALL, rate)
    moved = sum(((backend.weights()[name] - values).astype(np.float64) ** 2).sum() for name, values in first.items())
    slope = (backend.divergence(held, folder).mean - before.mean) * weight * rate
    # The gradient is that of the cross-entropy too, which is a ten-thousandth of it.
    assert slope == pytest.approx(-moved, rel=0.2)


def test_the_squared_change_pulls_every_weight_towards_the_parents(make: MakeBackend, parent: Path) -> None:
    """With SGD the step of l2 alone is the difference to the step without it: -lr * l2 * the norm's gradient."""
    moved = {}
    for l2 in (0.0, 0.5):
        backend = make(
            lora=LORA,
            retention={"start": "fresh", "l2": l2},
            training={"max_grad_norm": None, "optimizer": "sgd"},
        )
        backend.begin(parent)
        backend.train_step([random_batch(1)], ALL, 0.1)
        before = backend.weights()
        backend.train_step([random_batch(2)], ALL, 0.1)
        moved[l2] = {name: values - before[name] for name, values in backend.weights().items()}
        if l2 == 0:
            plain = before
    scale = LORA["alpha"] / LORA["rank"]
    # At the first step B is 0, so that the norm's gradient is, too: both are at the same place before the second.
    for name, a in plain.items():
        if not name.endswith("lora_a"):
            continue
        b = plain[name[:-1] + "b"]
        of_a, of_b = 2 * scale**2 * (b.T @ b @ a), 2 * scale**2 * (b @ a @ a.T)
        for side, gradient in (("a", of_a), ("b", of_b)):
            key = name[:-1] + side
            np.testing.assert_allclose(moved[0.5][key] - moved[0.0][key], -0.1 * 0.5 * gradient, atol=2e-7)


def test_a_fresh_adapter_begins_as_the_parent_and_is_saved_as_the_exact_sum(
    make: MakeBackend, parent: Path, tmp_path: Path
) -> None:
    lora = {"rank": 8, "alpha": 16.0}
    backend = make(lora=lora, retention={"start": "fresh"})
    backend.show_adapter(parent)
    of_parent = backend.logits(TOKENS)
    backend.begin(parent)
    np.testing.assert_allclose(backend.logits(TOKENS), of_parent, atol=1e-5)
    for step in range(1, 9):
        backend.train_step([random_batch(step)], ALL, 3e-2)
    trained = backend.logits(TOKENS)
    assert np.abs(trained - of_parent).max() > 0.1
    backend.save_adapter(tmp_path)
    backend.show_adapter(tmp_path)
    np.testing.assert_allclose(backend.logits(TOKENS), trained, atol=1e-4)
    other = make(lora={"rank": 12, "alpha": 24.0})
    other.load_adapter(tmp_path)
    np.testing.assert_allclose(other.logits(TOKENS), trained, atol=1e-4)


@pytest.mark.parametrize("start", ["fresh", "continue"])
def test_training_goes_on_to_the_same_bits(make: MakeBackend, parent: Path, tmp_path: Path, start: str) -> None:
    retention = {"start": start, "kl": {"every": 2}, "l2": 1e-3}
    unbroken, first, second = (make(lora=LORA, retention=retention) for _ in range(3))
    unbroken.begin(parent)
    expected = train(unbroken, range(1, 13), every=2)
    first.begin(parent)
    seen = train(first, range(1, 8), every=2)
    first.save_adapter(tmp_path)
    write_training_state(tmp_path, first.training_state())
    second.begin(parent, tmp_path)
    second.restore_training(read_training_state(tmp_path))
    seen += train(second, range(8, 13), every=2)
    assert seen == expected
    assert bits(second) == bits(unbroken)
    assert all((kl is None) == (step % 2 == 1) for step, (_, kl) in enumerate(expected, start=1))


def test_matrices_of_another_rank_cannot_be_gone_on_with(make: MakeBackend, parent: Path) -> None:
    backend = make(lora={"rank": 8, "alpha": 16.0}, retention={"start": "continue"})
    with pytest.raises(
        ConfigError, match=r"has rank 4, lora\.rank is 8.*Set lora\.rank to 4, or retention\.start to f"
    ):
        backend.begin(parent)


def both(**blocks: Any) -> Iterator[Backend]:
    # PyTorch first: see `backend_name` in the conftest.
    for name in ("torch", "mlx"):
        pytest.importorskip(name)
        config = configuration(name, lora=LORA, **blocks)
        backend = make_backend(config)
        backend.prepare_training(tier_map_for(backend, config.tiers).tier_of)
        yield backend


@pytest.mark.parametrize(
    "retention",
    [
        {"kl": {"weight": 2.0}},
        {"kl": {"weight": 2.0, "teacher": "base"}},
        {"kl": {"weight": 2.0}, "start": "continue"},
        {"l2": 0.01},
        {"l2": 0.01, "start": "continue"},
        {"kl": {"weight": 2.0}, "prompt_weight": 0.3},
    ],
    ids=str,
)
def test_both_backends_give_the_same_curves(parent: Path, retention: dict[str, Any]) -> None:
    curves = []
    training = {"prompt_weight": retention.get("prompt_weight", 0.0)}
    retention = {key: value for key, value in retention.items() if key != "prompt_weight"}
    for backend in both(retention=retention, training=training):
        backend.begin(parent)
        curves.append(train(backend, range(1, 31)))
    torch, mlx = (np.array(curve, dtype=np.float64) for curve in curves)
    print("losses apart", np.abs(mlx[:, 0] / torch[:, 0] - 1).max(), "divergences", np.abs(mlx - torch)[:, 1].max())
    np.testing.assert_allclose(mlx[:, 0], torch[:, 0], rtol=1e-4)
    np.testing.assert_allclose(mlx[:, 1], torch[:, 1], rtol=1e-3, atol=1e-6)


def test_drawn_answers_are_the_same_for_a_seed_and_others_for_another(make: MakeBackend) -> None:
    backend = make()
    prompts = [[0], [0], [0, 1]] * 4
    first, again, other = (backend.generate(prompts, 8, 1.0, seed) for seed in (3, 3, 4))
    assert first == again != other
    # Rows of one prompt are drawn apart.
    assert len({tuple(text) for text in islice(first, 0, None, 3)}) > 1


def test_at_a_low_temperature_what_is_drawn_is_the_likeliest(make: MakeBackend) -> None:
    backend = make()
    prompts = [list(range(10, 30)), list(range(40, 50))]
    assert backend.generate(prompts, 6, 1e-4, 1) == backend.generate(prompts, 6)
