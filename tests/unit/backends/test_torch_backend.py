"""What only PyTorch can tell: where a graph is built, and that the head sees supervised positions only."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.contract.conftest import BASE, configuration, random_batch

from nestune.backends.torch_backend import TorchBackend
from nestune.tiers.tier_map import assign_tiers


def prepared(policy: str, **training: Any) -> TorchBackend:
    config = configuration("torch", tiers={"inactive_gradients": policy}, training=training)
    backend = TorchBackend(config)
    backend.prepare_training(assign_tiers(backend.lora_parameters(), config.tiers).tier_of)
    return backend


def layers_with_a_graph(backend: TorchBackend, due: frozenset[int]) -> list[bool]:
    """Whether each layer's output required a gradient in one training step, the shallowest first."""
    seen: dict[int, bool] = {}
    handles = [
        layer.register_forward_hook(
            lambda _module, _inputs, output, index=index: seen.__setitem__(
                index, (output[0] if isinstance(output, tuple) else output).requires_grad
            )
        )
        for index, layer in enumerate(backend._causal.model.layers)
    ]
    backend.train_step([random_batch(1)], due, 1e-3)
    for handle in handles:
        handle.remove()
    return [seen[index] for index in sorted(seen)]


@pytest.mark.parametrize("gradient_checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize(
    ("due", "lowest"), [({0}, 4), ({0, 1}, 2), ({0, 1, 2}, 0)], ids=["fast", "fast and medium", "all"]
)
def test_under_drop_no_graph_is_built_below_the_lowest_due_layer(
    due: set[int], lowest: int, gradient_checkpointing: bool
) -> None:
    backend = prepared("drop", gradient_checkpointing=gradient_checkpointing)
    assert layers_with_a_graph(backend, frozenset(due)) == [layer >= lowest for layer in range(6)]


def bytes_kept(backend: TorchBackend, due: set[int]) -> int:
    """The bytes that autograd keeps for the backward pass of one training step."""
    sizes: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        backend.train_step([random_batch(1)], frozenset(due), 1e-3)
    return sum(sizes)


def test_activations_are_kept_for_due_layers_only() -> None:
    backend = prepared("drop")
    two, four, six = (bytes_kept(backend, due) for due in ({0}, {0, 1}, {0, 1, 2}))
    assert six - four == four - two
    # What does not belong to a layer: the last norm, and what the head is fed.
    assert 0 < two - (six - four) < (six - four) / 10


def test_checkpointing_keeps_less_than_a_layer_for_all_of_them() -> None:
    plain, checkpointing = prepared("drop"), prepared("drop", gradient_checkpointing=True)
    one_layer = (bytes_kept(plain, {0, 1, 2}) - bytes_kept(plain, {0})) / 4
    assert bytes_kept(checkpointing, {0, 1, 2}) < one_layer


def test_a_tier_has_moments_only_once_it_has_moved() -> None:
    backend = prepared("drop")
    backend.train_step([random_batch(1)], frozenset({0, 1}), 1e-3)
    assert backend._optimizer is not None
    with_moments = set(map(id, backend._optimizer.state))
    layer_of = {id(p): name for name, p in backend._parameters.items()}
    assert {layer_of[of].split(".")[1] for of in with_moments} == {"2", "3", "4", "5"}


def test_under_accumulate_every_layer_takes_part() -> None:
    assert layers_with_a_graph(prepared("accumulate"), frozenset({0})) == [True] * 6


def test_under_drop_no_gradient_outlives_the_step() -> None:
    backend = prepared("drop")
    backend.train_step([random_batch(1)], frozenset({0}), 1e-3)
    assert [p.grad for p in backend._parameters.values()] == [None] * len(backend._parameters)


def test_the_head_sees_supervised_positions_only() -> None:
    backend, batch = prepared("drop"), random_batch(1)
    seen: list[int] = []
    handle = backend._causal.lm_head.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0].shape[0]))
    backend.train_step([batch], frozenset({0}), 1e-3)
    handle.remove()
    assert seen == [int(batch.supervised.sum())]


def test_without_the_short_cut_the_loss_is_the_same() -> None:
    backend, batch = prepared("drop"), random_batch(1)
    assert backend._head is backend._causal.get_output_embeddings()
    short = backend.loss([batch]).nats
    backend._states, backend._head = lambda **inputs: backend._causal(**inputs).logits, lambda logits: logits
    assert backend.loss([batch]).nats == pytest.approx(short, rel=1e-6)


def test_answers_are_greedy_whatever_the_base_recommends_for_sampling(tmp_path: Path) -> None:
    """Some bases, Qwen2.5-Instruct among them, punish repetition in generation_config.json."""
    base = tmp_path / "base"
    shutil.copytree(BASE, base)
    settings = json.loads((base / "generation_config.json").read_text())
    settings |= {"repetition_penalty": 5.0, "do_sample": True, "temperature": 3.0}
    (base / "generation_config.json").write_text(json.dumps(settings))
    prompts = [list(range(10, 30)), list(range(40, 50))]
    plain = TorchBackend(configuration("torch")).generate(prompts, 12)
    assert TorchBackend(configuration("torch", model={"base": str(base)})).generate(prompts, 12) == plain


def test_an_answer_ends_at_every_end_token_of_the_base(tmp_path: Path) -> None:
    prompt = list(range(10, 30))
    answer = TorchBackend(configuration("torch")).generate([prompt], 12)[0]
    assert len(answer) > 1
    base = tmp_path / "base"
    shutil.copytree(BASE, base)
    settings = json.loads((base / "generation_config.json").read_text())
    (base / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": [2, answer[1]]}))
    backend = TorchBackend(configuration("torch", model={"base": str(base)}))
    assert backend.generate([prompt], 12) == [answer[: answer.index(answer[1])]]
