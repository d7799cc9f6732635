"""A model with random weights, and tokens to train it on: what a step costs does not depend on what they are."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nestune.data.batches import Batch

DEMO_BASE = Path(__file__).resolve().parents[1] / "demo" / "base"


@dataclass(frozen=True)
class Shape:
    """The model, its weights' type, and what it is trained on: rows x width tokens, half of them supervised."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    vocabulary: int
    rows: int
    width: int
    dtype: str = "float32"


def write_random_base(shape: Shape, folder: Path) -> int:
    """Write a Qwen2 with random weights and the demo's tokenizer; returns how many parameters it has."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            hidden_size=shape.hidden,
            num_hidden_layers=shape.layers,
            intermediate_size=shape.intermediate,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.heads,
            vocab_size=shape.vocabulary,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
        )
    ).to(getattr(torch, shape.dtype))
    model.save_pretrained(folder)
    for path in DEMO_BASE.glob("*token*.json"):
        shutil.copy(path, folder)
    return int(model.num_parameters())


def random_batch(shape: Shape) -> Batch:
    """Full rows of random tokens, each supervised by the toss of a coin."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(3, shape.vocabulary, size=(shape.rows, shape.width)).astype(np.int32)
    supervised = generator.random(tokens.shape) < 0.5
    supervised[:, 0] = False
    return Batch(tokens, supervised, np.full(shape.rows, shape.width, dtype=np.int32))
