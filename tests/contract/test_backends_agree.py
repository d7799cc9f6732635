"""PyTorch and MLX, given the same base, data, seed and tiers, learn the same.

How far apart they are, and why (demo base, 50 steps, float32; the tests print their own figures):

- SGD: some 1e-7 of the weights. That is float32, whose sums the two frameworks make in orders of their own.
- Adam and AdamW: some 1e-5 of the weights. MLX computes 1 - 0.999^t in float32, where 0.999 is off by 1.3e-8: that is
  1.3e-5 of the difference, and half of it after the square root. Each of its updates is off by that much.
- Now and then one element in 1e5 parts by up to twice the learning rate, and is then nearly all of the norm. A first
  update of Adam is lr * g / (|g| + eps): of length lr, however small g is. Where rounding decides the sign of g, as in
  a window whose gradients cancel out, each framework has its own: an error d of g becomes one of lr * d / eps, up to
  2 lr. With eps = 1e-8, which both have, the weights stay within 2e-4. They stay together element by element where
  eps is well above the rounding of small gradients (some 1e-9 here): from 1e-6 on.
- In bfloat16, which keeps three digits, the two also round in other places: PyTorch's autocast has norms and the
  residual stream in float32, MLX has all but the adapter in bfloat16. Losses agree to 1e-2, weights to 5e-2.
"""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from nestune.backends.base import Backend
from nestune.backends.factory import make_backend
from nestune.data.batches import Batch
from nestune.tiers.schedule import TierSchedule
from nestune.tiers.strategies import STRATEGIES
from tests.contract.conftest import configuration, random_batch, tier_map_for

pytest.importorskip("torch")
pytest.importorskip("mlx")

SCHEDULE, ALL = TierSchedule((1, 2, 4)), frozenset({0, 1, 2})
Weights = dict[str, NDArray[Any]]


class Pair(NamedTuple):
    """Two backends of one configuration, ready to train."""

    torch: Backend
    mlx: Backend


def make_both(**blocks: Any) -> Pair:
    made = []
    # PyTorch first: see `backend_name` in the conftest.
    for name in ("torch", "mlx"):
        config = configuration(name, **blocks)
        backend = make_backend(config)
        backend.prepare_training(tier_map_for(backend, config.tiers).tier_of)
        made.append(backend)
    return Pair(*made)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved adapter, trained until it answers otherwise than the base does."""
    backend, folder = make_both().torch, tmp_path_factory.mktemp("adapter")
    for step in range(1, 9):
        backend.train_step([random_batch(step)], ALL, 3e-3)
    backend.save_adapter(folder)
    return folder


@pytest.fixture(scope="module")
def trained(adapter: Path) -> Pair:
    """Both with that adapter; no test changes them."""
    both = make_both()
    for backend in both:
        backend.load_adapter(adapter)
    return both


def micro_batches(step: int) -> list[Batch]:
    """One, at every fifth step two of different sizes."""
    return [random_batch(2 * step), random_batch(2 * step + 1, rows=2)][: 1 if step % 5 else 2]


def flat(weights: Weights) -> NDArray[Any]:
    return np.concatenate([weights[name].ravel() for name in sorted(weights)]).astype(np.float64)


class Apart(NamedTuple):
    """Relative deviations of losses, weights and their movement; in learning rates, what 99 % and all are within."""

    losses: float
    weights: float
    movement: float
    most: float
    all: float


def train_both(both: Pair, steps: int, rate: float) -> Apart:
    """Trains, and prints how far the two are apart afterwards."""
    first, losses = flat(both.torch.weights()), []
    for step in range(1, steps + 1):
        torch, mlx = (backend.train_step(micro_batches(step), SCHEDULE.due(step), rate) for backend in both)
        assert (torch.tokens, torch.positions) == (mlx.tokens, mlx.positions)
        losses.append(mlx.loss / torch.loss - 1)
    ours, theirs = (flat(backend.weights()) for backend in both)
    assert np.linalg.norm(ours - first) / np.linalg.norm(ours) > 0.05
    apart = Apart(
        losses=np.abs(losses).max(),
        weights=np.linalg.norm(theirs - ours) / np.linalg.norm(ours),
        movement=np.linalg.norm(theirs - ours) / np.linalg.norm(ours - first),
        most=np.quantile(np.abs(theirs - ours), 0.99) / rate,
        all=np.abs(theirs - ours).max() / rate,
    )
    print(", ".join(f"{name} {value:.2g}" for name, value in apart._asdict().items()))
    return apart


@pytest.mark.parametrize("policy", ["drop", "accumulate"])
@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_fifty_steps_agree_in_every_loss_and_in_the_final_adapter(optimizer: str, policy: str) -> None:
    both = make_both(
        tiers={"inactive_gradients": policy},
        training={"optimizer": optimizer, "weight_decay": 0.01, "max_grad_norm": 1.0},
    )
    apart = train_both(both, steps=50, rate=0.1 if optimizer == "sgd" else 1e-3)
    # 1e-3 and 1e-2 are promised; closer bounds show a small term that one of the two leaves out.
    assert apart.losses < 1e-4
    assert apart.weights < 1e-3
    assert apart.most < 1e-2
    assert [backend.training_state().updates for backend in both] == [(50, 25, 12)] * 2


def test_with_a_larger_eps_no_element_parts_by_a_tenth_of_the_learning_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from mlx import optimizers

    from nestune.backends import mlx_optimizer, torch_backend

    eps = 1e-6
    of_torch = partial(torch.optim.Adam, eps=eps)
    monkeypatch.setitem(torch_backend.OPTIMIZERS, "adam", of_torch)
    of_mlx = partial(optimizers.Adam, 0.0, eps=eps, bias_correction=True)
    monkeypatch.setitem(mlx_optimizer.OPTIMIZERS, "adam", lambda _: of_mlx())
    both = make_both(tiers={"inactive_gradients": "accumulate"}, training={"optimizer": "adam"})
    assert train_both(both, steps=24, rate=1e-3).all < 0.1


def test_adam_parts_the_two_only_where_a_gradient_is_within_rounding_of_zero() -> None:
    """The first update of B, which is zero before it, so that one of SGD with rate 1 leaves all digits of -g there."""

    def first_updates(optimizer: str, rate: float) -> list[NDArray[Any]]:
        both = make_both(training={"optimizer": optimizer, "max_grad_norm": None})
        for backend in both:
            backend.train_step(micro_batches(5), ALL, rate)
        return [-flat({n: w for n, w in b.weights().items() if n.endswith("lora_b")}) / rate for b in both]

    gradients, directions = first_updates("sgd", 1.0), first_updates("adam", 1e-3)
    apart = np.abs(gradients[0] - gradients[1])
    print(f"gradients: {np.median(np.abs(gradients[0])):.1g}; apart {np.median(apart):.1g}, {apart.max():.1g} at most")
    off_by = abs((1 - float(np.float32(0.999))) / (1 - 0.999) - 1) / 2
    for gradient, direction, bound in zip(gradients, directions, (1e-6, 1.2 * off_by), strict=True):
        np.testing.assert_allclose(direction, gradient / (np.abs(gradient) + 1e-8), atol=bound, rtol=0)
    furthest = np.abs(directions[0] - directions[1]).argmax()
    assert np.abs(gradients[0][furthest]) < 1e-3 * np.median(np.abs(gradients[0]))


def test_in_bfloat16_losses_agree_to_a_hundredth_and_weights_to_a_twentieth() -> None:
    apart = train_both(make_both(training={"precision": "bfloat16"}), steps=24, rate=1e-3)
    assert 1e-4 < apart.losses < 1e-2
    assert apart.weights < 5e-2


@pytest.mark.parametrize("n_tiers", [2, 3, 4])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_gives_the_same_tier_map(trained: Pair, strategy: str, n_tiers: int) -> None:
    block: dict[str, Any] = {"strategy": strategy, "update_every": [1, 2, 4, 8][:n_tiers]}
    if strategy == "manual":
        by_layer = {f"layers.{tier}.*": tier for tier in range(n_tiers - 1)}
        block["assignments"] = {"*.V_proj.lora_a": 1, **by_layer, "*": n_tiers - 1}
    ours, theirs = (tier_map_for(backend, configuration(backend.name, tiers=block).tiers) for backend in trained)
    assert list(ours.tier_of.items()) == list(theirs.tier_of.items())
    assert set(ours.tier_of.values()) == set(range(n_tiers))


def test_both_describe_the_same_matrices(trained: Pair) -> None:
    ours, theirs = ({parameter.name: parameter for parameter in backend.lora_parameters()} for backend in trained)
    assert ours == theirs
    for backend in trained:
        shapes = {name: values.shape for name, values in backend.weights().items()}
        assert shapes == {name: parameter.shape for name, parameter in ours.items()}


def test_a_new_adapter_has_the_same_bits() -> None:
    bits = [{name: w.tobytes() for name, w in backend.weights().items()} for backend in make_both(training={"seed": 7})]
    assert bits[0] == bits[1]


@pytest.mark.parametrize("measure", ["gradient", "squared_gradient", "taylor"])
def test_importances_agree(trained: Pair, measure: Any) -> None:
    ours, theirs = (b.measure_importance([micro_batches(step) for step in range(4)], measure) for b in trained)
    assert theirs == pytest.approx(ours, rel=1e-4, abs=0)
    assert min(ours.values()) > 0


def test_losses_and_logits_of_one_adapter_agree(trained: Pair) -> None:
    batches = [random_batch(50, rows=7, width=31), random_batch(51, rows=1, width=5), random_batch(52, rows=16)]
    ours, theirs = (backend.loss(batches) for backend in trained)
    assert theirs.tokens == ours.tokens == sum(int(batch.supervised.sum()) for batch in batches)
    assert theirs.nats == pytest.approx(ours.nats, rel=1e-5)
    logits = [backend.logits([5, 17, 30, 99, 200]) for backend in trained]
    assert logits[0].shape == logits[1].shape == (5, 512)
    assert logits[0].dtype == logits[1].dtype == np.float32
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-4)


def test_greedy_answers_to_prompts_of_different_lengths_are_the_same(trained: Pair) -> None:
    generator = np.random.default_rng(0)
    prompts = [generator.integers(3, 300, size=size).tolist() for size in (1, 2, 9, 9, 30, 3)]
    ours, theirs = (backend.generate(prompts, 12) for backend in trained)
    assert theirs == ours
    assert len({tuple(answer) for answer in ours}) > 3
    assert {len(answer) == 12 for answer in ours} == {True, False}
    assert [trained.mlx.generate([prompt], 12)[0] for prompt in prompts] == ours
    assert make_both().mlx.generate(prompts, 12) != ours


def test_dropout_draws_from_the_same_law(adapter: Path) -> None:
    """Steps at which nothing is due tell the loss with dropout, each with another draw, and change nothing."""
    both, draws = make_both(lora={"dropout": 0.5}), 100
    for backend in both:
        backend.load_adapter(adapter)
    losses = [[b.train_step([random_batch(60, rows=2)], frozenset(), 1e-3).loss for _ in range(draws)] for b in both]
    mean, spread = np.mean(losses, axis=1), np.std(losses, axis=1)
    print(f"means {mean}, spreads {spread}")
    assert len({*losses[0]}) == len({*losses[1]}) == draws
    assert abs(mean[0] - mean[1]) < 4 * np.sqrt((spread**2).sum() / draws)
    assert spread[1] / spread[0] == pytest.approx(1, abs=4 / np.sqrt(draws))
