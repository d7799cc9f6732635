"""`update_every: [1, 1, 1]` is the built-in baseline: an ordinary LoRA loop, bit for bit."""

import numpy as np
import pytest

from nestune.data.batches import Batch
from nestune.tiers.parameters import parse_parameter
from nestune.tiers.schedule import TierSchedule
from tests.contract.conftest import BASE, MakeBackend, random_batch

STEPS, RATE, SEED = 20, 1e-3, 5


def ordinary_torch_loop(batches: list[Batch]) -> dict[str, bytes]:
    """LoRA as PEFT's documentation shows it, with one torch.optim.AdamW over all parameters."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(BASE)
    torch.manual_seed(SEED)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=RATE, weight_decay=0.01)
    for batch in batches:
        tokens = torch.from_numpy(batch.tokens).long()
        attention = torch.arange(tokens.shape[1]) < torch.from_numpy(batch.lengths)[:, None]
        targets = torch.from_numpy(batch.supervised)[:, 1:]
        hidden = base.model(input_ids=tokens, attention_mask=attention.long()).last_hidden_state[:, :-1]
        logits = base.lm_head(hidden[targets])
        loss = torch.nn.functional.cross_entropy(logits, tokens[:, 1:][targets], reduction="sum") / targets.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
    named = {parse_parameter(n, tuple(p.shape)): p for n, p in model.named_parameters() if p.requires_grad}
    return {p.name: value.detach().numpy().tobytes() for p, value in named.items() if p is not None}


@pytest.mark.parametrize(
    "strategy", ["layer_depth", "layer_depth_reversed", "parameter_importance", "stacked", "random"]
)
def test_periods_of_one_equal_an_ordinary_adamw_lora_loop_bit_for_bit(
    make: MakeBackend, backend_name: str, strategy: str
) -> None:
    loops = {"torch": ordinary_torch_loop}
    batches = [random_batch(step) for step in range(1, STEPS + 1)]
    backend = make(
        tiers={"strategy": strategy, "update_every": [1, 1, 1]}, training={"weight_decay": 0.01, "seed": SEED}
    )
    schedule = TierSchedule((1, 1, 1))
    for step, batch in enumerate(batches, start=1):
        backend.train_step([batch], schedule.due(step), RATE)
    ours = {name: np.ascontiguousarray(value).tobytes() for name, value in backend.weights().items()}
    assert ours == loops[backend_name](batches)
