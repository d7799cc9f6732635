"""`update_every: [1, 1, 1]` is the built-in baseline: an ordinary LoRA loop, bit for bit."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from nestune.data.batches import Batch
from nestune.tiers.parameters import parse_parameter
from nestune.tiers.schedule import TierSchedule
from tests.contract.conftest import BASE, MakeBackend, random_batch

STEPS, RATE, SEED = 20, 1e-3, 5


def ordinary_torch_loop(batches: list[Batch], first_weights: dict[str, NDArray[Any]]) -> dict[str, bytes]:
    """LoRA as PEFT's documentation shows it, with one torch.optim.AdamW over all parameters."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = AutoModelForCausalLM.from_pretrained(BASE).to(device)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    named = {parse_parameter(n, tuple(p.shape)): p for n, p in model.named_parameters() if p.requires_grad}
    matrices = {described.name: p for described, p in named.items() if described is not None}
    assert matrices.keys() == first_weights.keys()
    with torch.no_grad():
        for name, matrix in matrices.items():
            matrix.copy_(torch.from_numpy(first_weights[name]))
    trainable = list(matrices.values())
    optimizer = torch.optim.AdamW(trainable, lr=RATE, weight_decay=0.01)
    for batch in batches:
        tokens = torch.from_numpy(batch.tokens).long().to(device)
        attention = torch.arange(tokens.shape[1], device=device) < torch.from_numpy(batch.lengths).to(device)[:, None]
        targets = torch.from_numpy(batch.supervised)[:, 1:].to(device)
        hidden = base.model(input_ids=tokens, attention_mask=attention.long()).last_hidden_state[:, :-1]
        logits = base.lm_head(hidden[targets])
        loss = torch.nn.functional.cross_entropy(logits, tokens[:, 1:][targets], reduction="sum") / targets.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
    return {name: matrix.detach().cpu().numpy().tobytes() for name, matrix in matrices.items()}


def ordinary_mlx_loop(batches: list[Batch], first_weights: dict[str, NDArray[Any]]) -> dict[str, bytes]:
    """LoRA as mlx-lm trains it: value_and_grad of the model, clip_grad_norm, one optimizer, each step compiled.

    The layer and the shapes that batches are padded to are the backend's, since sums are rounded by how they are
    computed; what is compared is all that makes a step of gradients.
    """
    import mlx.core as mx
    from mlx import nn, optimizers
    from mlx_lm.utils import load_model

    from nestune.backends.lora_parts import LoraParts
    from nestune.backends.mlx_lora import add_lora
    from nestune.config import LoraConfig

    model, _ = load_model(BASE)
    matrices = add_lora(model, LoraConfig(), LoraParts())
    for matrix in matrices:
        matrix.put(mx.array(np.ascontiguousarray(first_weights[matrix.described.name].T)))
    optimizer = optimizers.AdamW(RATE, weight_decay=0.01, bias_correction=True)
    optimizer.init(model.trainable_parameters())

    def loss(tokens: mx.array, places: mx.array, targets: mx.array, weights: mx.array, total: mx.array) -> mx.array:
        hidden = model.model(tokens)
        logits = model.model.embed_tokens.as_linear(hidden.reshape(-1, hidden.shape[-1])[places])
        return (nn.losses.cross_entropy(logits, targets) * weights).sum() / total

    def update(gradients: Any) -> None:
        clipped, _ = optimizers.clip_grad_norm(gradients, 1.0)
        optimizer.update(model, clipped)

    gradients_of = mx.compile(nn.value_and_grad(model, loss), inputs=[model.state], outputs=[model.state])
    update = mx.compile(update, inputs=[model.state, optimizer.state], outputs=[model.state, optimizer.state])
    model.train()
    for batch in batches:
        row, column = np.nonzero(batch.supervised[:, 1:])
        padding = (0, -len(row) % 8)
        _, gradients = gradients_of(
            mx.array(batch.tokens[:, :-1]),
            mx.array(np.pad(row * 8 + column, padding).astype(np.int32)),
            mx.array(np.pad(batch.tokens[row, column + 1], padding)),
            mx.array(np.pad(np.ones(len(row), np.float32), padding)),
            mx.array(float(len(row))),
        )
        update(gradients)
        mx.eval(model.parameters(), optimizer.state)
    return {m.described.name: np.ascontiguousarray(np.array(m.values).T).tobytes() for m in matrices}


@pytest.mark.parametrize(
    "strategy", ["layer_depth", "layer_depth_reversed", "parameter_importance", "stacked", "random"]
)
def test_periods_of_one_equal_an_ordinary_adamw_lora_loop_bit_for_bit(
    make: MakeBackend, backend_name: str, strategy: str
) -> None:
    loops = {"torch": ordinary_torch_loop, "mlx": ordinary_mlx_loop}
    # Of a width that MLX need not pad: a row's last token predicts nothing.
    batches = [random_batch(step, width=9) for step in range(1, STEPS + 1)]
    backend = make(
        tiers={"strategy": strategy, "update_every": [1, 1, 1]}, training={"weight_decay": 0.01, "seed": SEED}
    )
    first_weights = backend.weights()
    schedule = TierSchedule((1, 1, 1))
    for step, batch in enumerate(batches, start=1):
        backend.train_step([batch], schedule.due(step), RATE)
    ours = {name: np.ascontiguousarray(value).tobytes() for name, value in backend.weights().items()}
    assert ours == loops[backend_name](batches, first_weights)
