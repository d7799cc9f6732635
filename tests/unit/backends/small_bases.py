"""Models of any kind with random weights, in Hugging Face format, that take no time to train."""

import shutil
from pathlib import Path
from typing import Any

from tests.contract.conftest import BASE

SMALL: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 2,
}


def write_base(folder: Path, kind: str, **settings: Any) -> Path:
    """A base as Transformers saves it, with the demo's tokenizer; kind: its `model_type`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(BASE, folder, ignore=shutil.ignore_patterns("model.safetensors", "config.json", "README.md"))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(SMALL | settings)))
    with torch.no_grad():
        for parameter in model.parameters():
            # Larger than new models have them: what attends to what must show in the logits.
            parameter.add_(0.15 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder
