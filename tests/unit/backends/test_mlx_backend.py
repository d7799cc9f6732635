"""What only MLX can tell: what its graphs compute, the memory they take, and that an update reaches the model."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import fast_mlx  # noqa: F401 - before mlx
import mlx.core as mx
import numpy as np
import pytest
from small_bases import write_base
from tests.contract.conftest import BASE, configuration, random_batch

from nestune.backends.lora_parts import LoraParts
from nestune.backends.mlx_backend import MlxBackend, _arrays, _padded, _prompt_arrays
from nestune.backends.mlx_lora import LoraLinear, parameters_of
from nestune.config import LoraConfig
from nestune.data.batches import Batch
from nestune.errors import RunError
from nestune.tiers.schedule import TierSchedule
from nestune.tiers.tier_map import assign_tiers

ALL = frozenset({0, 1, 2})


def prepared(base: Path = BASE, policy: str = "drop", **blocks: Any) -> MlxBackend:
    tiers = {"inactive_gradients": policy}
    config = configuration("mlx", base=base, **({"tiers": tiers} | blocks))
    backend = MlxBackend(config)
    backend.prepare_training(assign_tiers(backend.lora_parameters(), config.tiers).tier_of)
    return backend


def lazy_step(backend: MlxBackend, due: set[int]) -> tuple[mx.array, dict[str, mx.array]]:
    """A step's loss and gradients, not computed yet."""
    assert backend._optimizer is not None
    needed = backend._optimizer.needs(frozenset(due))
    batch = random_batch(1)
    arrays = (*_arrays(batch), *_prompt_arrays(batch), *backend._said_by_teacher(batch))
    backend._switch(training=True)
    differentiated = {name: backend._matrices[name] for name in needed}
    fixed = {name: matrix for name, matrix in backend._matrices.items() if name not in needed}
    step = backend._compile(needed, tuple(array.shape for array in arrays))
    mx.disable_compile()
    try:
        losses, gradients = step(differentiated, fixed, mx.random.key(0), *arrays, *[mx.array(1.0)] * 3)
        return losses[0], gradients
    finally:
        mx.enable_compile()


def matrix_products(backend: MlxBackend, due: set[int], tmp_path: Path) -> int:
    """How many the graph of a step's loss and gradients has."""
    loss, gradients = lazy_step(backend, due)
    mx.export_to_dot(str(tmp_path / "graph.dot"), loss, *gradients.values())
    return Counter(re.findall(r'label *= *"([^"]+)"', (tmp_path / "graph.dot").read_text()))["Matmul"]


CHECKPOINTING = pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])


@CHECKPOINTING
def test_under_drop_the_backward_pass_ends_at_the_lowest_due_layer(checkpointing: bool, tmp_path: Path) -> None:
    backend = prepared(training={"gradient_checkpointing": checkpointing})
    none, two, four, six = (matrix_products(backend, due, tmp_path) for due in (set(), {0}, {0, 1}, {0, 1, 2}))
    assert six - four == four - two > 0
    # The lowest layer of all that are due need not tell the one below it; the head's own is one more.
    assert 0.8 * (six - four) < two - none <= six - four + 1


@CHECKPOINTING
def test_layers_above_it_that_are_not_due_make_no_gradient_of_their_own(checkpointing: bool, tmp_path: Path) -> None:
    tiers = {"strategy": "layer_depth", "inactive_gradients": "drop"}
    backend = prepared(tiers=tiers, training={"gradient_checkpointing": checkpointing})
    fast, faster, every = (matrix_products(backend, due, tmp_path) for due in ({0}, {0, 1}, {0, 1, 2}))
    # In each of two layers two of each of seven modules; computed again, also the last one's x A, which only B needs.
    assert every - faster == faster - fast == 2 * (2 * 7 + checkpointing)


def test_under_drop_only_due_matrices_are_differentiated_and_moved() -> None:
    backend = prepared()
    assert backend._optimizer is not None
    fast = {p.name for p in backend.lora_parameters() if p.layer in (4, 5)}
    assert backend._optimizer.needs(frozenset({0})) == fast == set(backend._optimizer.names(frozenset({0})))
    before = dict(backend._matrices)
    backend.train_step([random_batch(1)], frozenset({0}), 1e-3)
    assert {name for name, matrix in backend._matrices.items() if matrix is not before[name]} == fast


def test_under_accumulate_every_matrix_is_differentiated_at_every_step(tmp_path: Path) -> None:
    backend = prepared(policy="accumulate")
    assert matrix_products(backend, {0}, tmp_path) == matrix_products(backend, {0, 1, 2}, tmp_path)


def test_the_head_sees_supervised_positions_only() -> None:
    backend, seen = prepared(), []
    head = backend._head

    def watched(hidden: mx.array) -> mx.array:
        seen.append(hidden.shape)
        return head(hidden)

    backend._head = watched
    tokens = np.full((8, 65), 7, np.int32)
    supervised = np.zeros(tokens.shape, bool)
    supervised[[0, 3, 7], [5, 64, 1]] = True
    batch = Batch(tokens, supervised, np.full(8, 65, np.int32))
    backend.train_step([batch], frozenset({0}), 1e-3)
    backend.loss([batch])
    assert {positions for positions, _ in seen} == {_arrays(batch)[1].size}
    assert 3 <= _arrays(batch)[1].size <= 32


def test_padding_changes_no_loss() -> None:
    backend, batch = prepared(), random_batch(1, rows=3)
    wider = Batch(np.pad(batch.tokens, ((0, 0), (0, 60))), np.pad(batch.supervised, ((0, 0), (0, 60))), batch.lengths)
    assert _arrays(wider)[0].shape != _arrays(batch)[0].shape
    assert backend.loss([wider]).nats == pytest.approx(backend.loss([batch]).nats, rel=1e-6)


@pytest.mark.parametrize(("least", "in_a_doubling"), [(8, 8), (32, 4)])
def test_sizes_are_padded_to_few(least: int, in_a_doubling: int) -> None:
    sizes = range(1, 5000)
    padded = [_padded(size, least, in_a_doubling) for size in sizes]
    assert padded == sorted(padded)
    for size, to in zip(sizes, padded, strict=True):
        assert size <= to < size + max(least, size / in_a_doubling)
        assert to % least == 0
    for start in (256, 512, 1024, 2048):
        assert len({to for to in padded if start < to <= 2 * start}) == in_a_doubling


def test_without_the_short_cut_the_loss_is_the_same() -> None:
    backend, batch = prepared(), random_batch(1)
    assert backend._body is not backend._model
    short = backend.loss([batch]).nats
    backend._body, backend._head = backend._model, lambda logits: logits
    assert backend.loss([batch]).nats == pytest.approx(short, rel=1e-6)


@pytest.mark.parametrize("policy", ["drop", "accumulate"])
def test_memory_does_not_grow_over_five_hundred_steps(policy: str, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama", hidden_size=16, intermediate_size=32)
    backend = prepared(base, policy, lora={"rank": 2, "targets": ["q_proj", "down_proj"]})
    schedule, peaks = TierSchedule((1, 2, 4)), []
    for step in range(1, 501):
        if step % 100 == 1:
            mx.reset_peak_memory()
        # Each of 25 widths with each set of due tiers once in a hundred steps.
        backend.train_step([random_batch(step, rows=2, width=6 + 7 * step % 25)], schedule.due(step), 1e-3)
        if step % 100 == 0:
            peaks.append(mx.get_peak_memory())
    print(f"peaks of a hundred steps each, in bytes: {peaks}")
    assert peaks[-1] <= 1.02 * peaks[0]


def peak_of_a_step(base: Path, micro_batches: int = 1, **training: Any) -> int:
    backend = prepared(base, training=training)
    step = [random_batch(1, rows=8, width=65)] * micro_batches
    backend.train_step(step, ALL, 1e-3)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    backend.train_step(step, ALL, 1e-3)
    return mx.get_peak_memory() - before


def test_a_step_of_many_micro_batches_takes_the_memory_of_one(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama")
    one, many = peak_of_a_step(base), peak_of_a_step(base, micro_batches=8)
    print(f"bytes of 1 and of 8 micro-batches: {one}, {many}")
    assert many < 1.2 * one


def test_checkpointing_takes_less_memory_the_more_layers_there_are(tmp_path: Path) -> None:
    plain, checkpointed = (
        [
            peak_of_a_step(write_base(tmp_path / f"{layers} {on}", "llama", num_hidden_layers=layers), **training)
            for layers in (4, 12)
        ]
        for on, training in ((False, {}), (True, {"gradient_checkpointing": True}))
    )
    print(f"bytes at 4 and 12 layers: {plain}, checkpointed {checkpointed}")
    assert checkpointed[1] - checkpointed[0] < 0.1 * (plain[1] - plain[0])


def test_checkpointing_one_model_leaves_others_of_its_kind_as_they_are() -> None:
    plain = prepared()
    kinds = {type(layer) for layer in plain._model.layers}
    checkpointed = prepared(training={"gradient_checkpointing": True})
    assert {type(layer) for layer in plain._model.layers} == kinds
    assert kinds.isdisjoint(type(layer) for layer in checkpointed._model.layers)
    assert {type(layer) for layer in prepared()._model.layers} == kinds


def test_an_update_that_does_not_reach_the_model_ends_training() -> None:
    backend = prepared()
    attention = backend._model.layers[3].self_attn
    # As if the model had replaced a module, or kept a copy of it.
    attention.q_proj = LoraLinear(attention.q_proj.linear, LoraConfig(), LoraParts())
    backend.train_step([random_batch(1)], frozenset({0}), 1e-3)
    with pytest.raises(RunError, match=r"an update did not reach the model.*model\.backend: torch"):
        backend.train_step([random_batch(2)], frozenset({0, 1}), 1e-3)


def test_every_module_draws_its_own_dropout() -> None:
    backend = prepared(lora={"dropout": 0.5})
    lazy_step(backend, {0, 1, 2})
    keys = {np.array(module._key).tobytes() for module in backend._modules}
    assert len(keys) == len(backend._modules) == 6 * 7


def test_every_micro_batch_of_every_step_draws_its_own_dropout() -> None:
    backend, keys = prepared(lora={"dropout": 0.5}), []
    compiled = backend._compiled

    def watched(*of_what: Any) -> Any:
        def step(differentiated: Any, fixed: Any, key: mx.array, *batch: mx.array) -> Any:
            keys.append(np.array(key).tobytes())
            return compiled(*of_what)(differentiated, fixed, key, *batch)

        return step

    backend._compiled = watched  # type: ignore[assignment]
    for _ in range(3):
        backend.train_step([random_batch(1), random_batch(1)], frozenset({0}), 1e-3)
    assert len(set(keys)) == len(keys) == 6


def test_importance_is_that_of_the_gradients_of_training_dropout_included() -> None:
    backend = prepared(lora={"dropout": 0.5}, training={"optimizer": "sgd", "max_grad_norm": None})
    micro_batches = [random_batch(1), random_batch(2)]
    measured = backend.measure_importance([micro_batches], "gradient")
    backend.train_step(micro_batches, ALL, 1.0)
    # B was zero, and is minus its gradient now.
    moved = {name: np.abs(values).mean() for name, values in backend.weights().items() if name.endswith("lora_b")}
    assert {name: measured[name] for name in moved} == pytest.approx(moved, rel=1e-5)


def test_activations_that_overflow_end_training_although_the_loss_is_finite(tmp_path: Path) -> None:
    backend = prepared()
    for name, matrix in backend._matrices.items():
        backend._matrices[name] = mx.full(matrix.shape, 1e25)
    backend._put(backend._matrices)
    with pytest.raises(RunError, match=r"training diverged"):
        backend.train_step([random_batch(1)], ALL, 1e-3)


@pytest.mark.parametrize("of_base", [77, [77], [77, 2]])
def test_an_answer_ends_at_every_end_token_of_base_and_tokenizer(of_base: int | list[int], tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama", num_hidden_layers=1)
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": of_base}))
    assert MlxBackend(configuration("mlx", base=base))._end_ids == [2, 77]


def test_an_answer_is_cut_before_its_first_end_token() -> None:
    backend, prompt = prepared(), list(range(10, 30))
    answer = backend.generate([prompt], 12)[0]
    assert len(answer) > 1
    backend._end_ids = [2, answer[1]]
    assert backend.generate([prompt], 12) == [answer[: answer.index(answer[1])]]


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        ({}, mx.float32),
        ({"training": {"precision": "bfloat16"}}, mx.bfloat16),
        ({"model": {"base": str(BASE), "backend": "mlx", "dtype": "bfloat16"}}, mx.bfloat16),
    ],
    ids=["as stored", "precision", "dtype"],
)
def test_the_base_and_activations_have_the_configured_type_and_the_adapter_is_float32(
    block: dict[str, Any], expected: mx.Dtype
) -> None:
    backend = prepared(**block)
    parameters = parameters_of(backend._model, frozen_too=True)
    lora = parameters_of(backend._model)
    assert {values.dtype for name, values in parameters.items() if name not in lora} == {expected}
    assert {values.dtype for values in lora.values()} == {mx.float32}
    assert backend._body(mx.array([[1, 2]])).dtype == expected
    backend.train_step([random_batch(1)], ALL, 1e-3)
    assert {values.dtype for values in parameters_of(backend._model).values()} == {mx.float32}


def test_weights_are_a_copy() -> None:
    backend = prepared()
    for values in backend.weights().values():
        values[:] = 7
    assert not any((values == 7).any() for values in backend.weights().values())
