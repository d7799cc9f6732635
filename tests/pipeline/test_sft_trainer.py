"""The drop-in in a real SFTTrainer with a PEFT model: tiers move as scheduled, and as in our own loop."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model
from tests.contract.conftest import BASE, configuration
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

import nestune
from nestune.backends.lora_modules import trainable_lora
from nestune.backends.randomness import initial_weights
from nestune.backends.tiered_optimizer import TieredOptimizer
from nestune.backends.torch_backend import TorchBackend
from nestune.data.batches import Batch
from nestune.tiers.parameters import split_name
from nestune.tiers.schedule import TierSchedule
from nestune.tiers.tier_map import TierMap

STEPS, RATE, SEED, PERIODS = 20, 1e-3, 3, (1, 2, 4)
STRATEGIES = ["layer_depth_reversed", "stacked"]

Weights = dict[str, NDArray[Any]]


@dataclass
class Run:
    """A training by SFTTrainer: what it used and logged, and the weights before it and after each step."""

    tiers: TierMap
    optimizer: TieredOptimizer
    matrices: dict[str, torch.nn.Parameter]
    log: list[dict[str, Any]] = field(default_factory=list)
    batches: list[Mapping[str, torch.Tensor]] = field(default_factory=list)
    weights: list[Weights] = field(default_factory=list)
    graphs: list[list[bool]] = field(default_factory=list)

    def note_weights(self) -> None:
        self.weights.append({name: matrix.detach().numpy().copy() for name, matrix in self.matrices.items()})


class Watch(TrainerCallback):
    """Notes the weights after each step."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.run.note_weights()


def rows() -> Dataset:
    """Questions and answers of different lengths, so that micro-batches have different numbers of answer tokens."""
    numbers = range(1, 61)
    return Dataset.from_list(
        [{"prompt": f"Count to {n}: ", "completion": "one, " * (n % 7) + f"{n}."} for n in numbers]
    )


def train(
    folder: Path,
    strategy: str = "layer_depth_reversed",
    periods: tuple[int, ...] = PERIODS,
    policy: Any = "drop",
    optimizer_norm: float | None = None,
    resume: Path | None = None,
    **arguments: Any,
) -> Run:
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(BASE), config)
    begin_as_our_own_loop(model)
    tiers = nestune.tier_map(model, strategy=strategy, update_every=periods)
    optimizer = nestune.tiered_optimizer(
        model, tiers, lr=RATE, inactive_gradients=policy, max_grad_norm=optimizer_norm, weight_decay=0.0
    )
    run = Run(tiers, optimizer, {matrix.described.name: matrix.values for matrix in trainable_lora(model)})
    run.note_weights()
    settings: dict[str, Any] = {"max_steps": STEPS, "per_device_train_batch_size": 3, "max_grad_norm": 1.0}
    settings |= {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "logging_steps": 1}
    trainer = SFTTrainer(
        model,
        SFTConfig(str(folder), **({"save_strategy": "no"} | settings | arguments)),
        train_dataset=rows(),
        processing_class=AutoTokenizer.from_pretrained(BASE),
        optimizers=(optimizer, None),
        callbacks=[nestune.TierCallback(optimizer), Watch(run)],
    )
    collate = trainer.data_collator

    def collate_and_note(examples: Any) -> Any:
        run.batches.append(collate(examples))
        return run.batches[-1]

    trainer.data_collator = collate_and_note
    watch_graphs(model, run)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    run.log = [line for line in trainer.state.log_history if "loss" in line]
    return run


def begin_as_our_own_loop(model: Any) -> None:
    """Give a new adapter the first weights that our own loop draws."""
    matrices = {matrix.described: matrix.values for matrix in trainable_lora(model)}
    first_weights = initial_weights(list(matrices), SEED)
    with torch.no_grad():
        for described, values in matrices.items():
            values.copy_(torch.from_numpy(first_weights[described.name]))


def watch_graphs(model: Any, run: Run) -> None:
    """Note of each forward pass whether each layer's output requires a gradient, the shallowest first."""
    layers = model.base_model.model.model.layers
    layers[0].register_forward_pre_hook(lambda *_: run.graphs.append([]))
    for layer in layers:
        layer.register_forward_hook(
            lambda _m, _i, output: run.graphs[-1].append(
                (output[0] if isinstance(output, tuple) else output).requires_grad
            )
        )


@pytest.fixture(scope="module", params=STRATEGIES)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Twenty steps as anyone would set them up: the trainer clips, one micro-batch a step."""
    return train(tmp_path_factory.mktemp("run"), request.param)


def as_batch(collated: Mapping[str, torch.Tensor]) -> Batch:
    """The same rows as our own loop takes them."""
    labels, attention = collated["labels"].numpy(), collated["attention_mask"].numpy()
    return Batch(collated["input_ids"].numpy().astype(np.int32), labels != -100, attention.sum(1).astype(np.int32))


def part(name: str, weights: Weights) -> NDArray[Any]:
    """The ranks of a matrix that a name of the map stands for."""
    matrix, ranks = split_name(name)
    chosen = slice(None) if ranks is None else slice(ranks.start, ranks.stop)
    return weights[matrix][chosen] if matrix.endswith("a") else weights[matrix][:, chosen]


def assert_equal_to_our_own_loop(run: Run, micro_batches: int) -> None:
    config = configuration(
        "torch",
        tiers={"strategy": run.tiers.strategy, "update_every": list(PERIODS)},
        training={"seed": SEED, "max_grad_norm": 1.0, "weight_decay": 0.0},
    )
    backend = TorchBackend(config)
    assert all(value.tobytes() == run.weights[0][name].tobytes() for name, value in backend.weights().items())
    backend.prepare_training(run.tiers.tier_of)
    schedule = TierSchedule(PERIODS)
    for step, line in enumerate(run.log, start=1):
        batches = [as_batch(batch) for batch in run.batches[(step - 1) * micro_batches : step * micro_batches]]
        result = backend.train_step(batches, schedule.due(step), line["learning_rate"])
        assert line["loss"] == pytest.approx(result.loss, rel=0, abs=1e-5)
        assert line["grad_norm"] == pytest.approx(result.grad_norm, rel=1e-4)
    assert len(run.log) == STEPS
    ours, theirs = (np.concatenate([w[name].ravel() for name in w]) for w in (backend.weights(), run.weights[-1]))
    moved = theirs - np.concatenate([value.ravel() for value in run.weights[0].values()])
    assert np.linalg.norm(ours - theirs) < 1e-3 * np.linalg.norm(moved)


def test_losses_and_weights_are_those_of_our_own_loop_on_the_same_batches(run: Run) -> None:
    assert_equal_to_our_own_loop(run, micro_batches=1)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_micro_batches_of_different_token_counts_are_weighted_as_in_our_own_loop(tmp_path: Path, strategy: str) -> None:
    run = train(tmp_path, strategy, gradient_accumulation_steps=2)
    assert_equal_to_our_own_loop(run, micro_batches=2)


def test_tiers_move_20_10_and_5_times_and_nothing_moves_that_is_not_due(run: Run) -> None:
    assert run.optimizer.update_counts == [20, 10, 5]
    for step, (before, after) in enumerate(pairwise(run.weights), start=1):
        assert [run.log[step - 1][f"tiers/updates_{tier}"] for tier in range(3)] == [step, step // 2, step // 4]
        for name, tier in run.tiers.tier_of.items():
            moves = part(name, before).tobytes() != part(name, after).tobytes()
            # A has no gradient as long as its B is zero, so at a tier's first update only B moves.
            if name.partition("[")[0].endswith("lora_b") or step > PERIODS[tier]:
                assert moves == (step % PERIODS[tier] == 0), (step, name)
            else:
                assert not moves


@pytest.mark.parametrize("checkpointing", [True, False])
def test_no_graph_is_built_below_the_lowest_due_layer_and_in_the_end_all_is_as_before(
    tmp_path: Path, checkpointing: bool
) -> None:
    run = train(tmp_path, activation_checkpointing=checkpointing, max_steps=5)
    lowest = [4, 2, 4, 0, 4]
    assert run.graphs == [[layer >= low for layer in range(6)] for low in lowest]
    assert all(matrix.requires_grad for matrix in run.optimizer.matrices)


def test_a_step_at_which_no_tier_is_due_moves_nothing_and_ends(tmp_path: Path) -> None:
    run = train(tmp_path, periods=(2, 4), max_steps=5)
    assert run.optimizer.update_counts == [2, 1]
    same = [
        all(before[name].tobytes() == after[name].tobytes() for name in before)
        for before, after in pairwise(run.weights)
    ]
    assert same == [True, False, True, False, True]
    assert all(line["loss"] > 0 for line in run.log)


def test_the_trainers_clipping_and_the_optimizers_give_the_same_bits(run: Run, tmp_path: Path) -> None:
    ours = train(tmp_path, run.tiers.strategy, optimizer_norm=1.0, max_grad_norm=0.0)
    assert max(line["grad_norm"] for line in run.log) > 1
    for name, expected in run.weights[-1].items():
        assert ours.weights[-1][name].tobytes() == expected.tobytes()


@pytest.mark.parametrize(("strategy", "policy"), [("layer_depth_reversed", "drop"), ("stacked", "accumulate")])
def test_a_resumed_training_ends_with_the_same_bits(tmp_path: Path, strategy: str, policy: str) -> None:
    """From the middle of the slowest tier's window: step 6 of 5 to 8."""
    options: dict[str, Any] = {"strategy": strategy, "policy": policy, "max_steps": 9, "save_strategy": "steps"}
    options |= {"save_steps": 6, "max_grad_norm": 0, "optimizer_norm": 1.0}
    unbroken = train(tmp_path, **options)
    resumed = train(tmp_path, resume=tmp_path / "checkpoint-6", **options)
    assert resumed.optimizer.update_counts == [9, 4, 2]
    assert len(resumed.weights) == 1 + 3
    for name, expected in unbroken.weights[-1].items():
        assert resumed.weights[-1][name].tobytes() == expected.tobytes()
