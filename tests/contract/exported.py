"""Small models with random weights, and runs whose adapter was trained on one of them."""

import shutil
from pathlib import Path
from typing import Any

from nestune.backends.adapters import METADATA
from nestune.backends.factory import make_backend
from nestune.base_model import resolve_base
from nestune.config import RunConfig
from nestune.files import read_json, write_json
from nestune.runs import RunPaths
from tests.contract.conftest import BASE, configuration, random_batch, tier_map_for

LORA = {"rank": 4, "alpha": 12, "targets": ["q_proj", "k_proj", "down_proj"]}
SHAPE = {
    "vocab_size": 512,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    # Large, so that every matrix matters to the logits.
    "initializer_range": 0.3,
}


def random_base(folder: Path, config: Any, dtype: str = "float32", **saving: Any) -> Path:
    """A base with random weights, biases too, and the demo's tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM

    shutil.copytree(BASE, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    model.to(getattr(torch, dtype)).save_pretrained(folder, **saving)
    settings = read_json(folder / "config.json", "")
    write_json(folder / "config.json", settings | {"rope_theta": settings["rope_parameters"]["rope_theta"]})
    return folder


def qwen2(**changes: Any) -> Any:
    """The configuration of a small Qwen2."""
    from transformers import Qwen2Config

    return Qwen2Config(**{**SHAPE, **changes})


def train(folder: Path, base: Path, backend: str = "torch", learning_rate: float = 5e-3) -> tuple[RunConfig, RunPaths]:
    """Train an adapter on a base for some steps, and leave it in the run's folder as its candidate."""
    config = configuration(backend, base=base, lora=LORA)
    model = make_backend(config)
    model.prepare_training(tier_map_for(model, config.tiers).tier_of)
    for step in range(1, 5):
        model.train_step([random_batch(step)], frozenset({0, 1, 2}), learning_rate)
    run = RunPaths(folder / "runs" / config.name)
    candidate = run.candidate
    candidate.mkdir(parents=True)
    model.save_adapter(candidate)
    of_base = {"reference": str(base), "revision": None, "sha256": resolve_base(config.model).sha256}
    write_json(candidate / METADATA, {"step": 4, "base": of_base})
    return config, run
