"""Bases of several kinds, as Transformers saves them: MLX computes, trains and answers as PyTorch does."""

import json
from pathlib import Path
from typing import Any

import fast_mlx  # noqa: F401 - before all that imports mlx
import numpy as np
import pytest
from small_bases import write_base
from tests.contract.conftest import VOCABULARY, configuration, random_batch

from nestune.backends.base import Backend
from nestune.backends.factory import make_backend
from nestune.backends.mlx_lora import mlx_arguments
from nestune.errors import ConfigError
from nestune.tiers.schedule import TierSchedule
from nestune.tiers.tier_map import assign_tiers

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 64}
LAYERED = {
    "full_attention": {"rope_type": "linear", "rope_theta": 300.0, "factor": 4.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
}
# Each has something of its own: RoPE that mlx-lm reads at another place or by another name, a head that is not the
# embedding, biases, logits that are scaled or capped, attention that mlx-lm cannot make in batches.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen2": ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 20.0}, "tie_word_embeddings": True}),
    "Llama 3": ("llama", {"rope_parameters": LLAMA3}),
    "Mistral, linear RoPE": (
        "mistral",
        {"sliding_window": None, "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}},
    ),
    "Llama, dynamic RoPE": ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 4.0}}),
    "Qwen3, YaRN": ("qwen3", {"head_dim": 16, "rope_parameters": YARN}),
    "Phi": ("phi", {"rope_parameters": {"rope_type": "default", "rope_theta": 20.0, "partial_rotary_factor": 0.75}}),
    "Gemma 2": ("gemma2", {"head_dim": 16, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0}),
    "Gemma 3": (
        "gemma3_text",
        {"head_dim": 16, "num_hidden_layers": 6, "sliding_window": 6, "rope_parameters": LAYERED},
    ),
    "Granite": ("granite", {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5}),
}


def prepared(name: str, base: Path, **blocks: Any) -> Backend:
    config = configuration(name, base=base, lora={"rank": 4}, **blocks)
    backend = make_backend(config)
    backend.prepare_training(assign_tiers(backend.lora_parameters(), config.tiers).tier_of)
    return backend


@pytest.mark.parametrize("kind", KINDS)
def test_logits_losses_and_answers_are_those_of_pytorch(kind: str, tmp_path: Path) -> None:
    model_type, settings = KINDS[kind]
    base = write_base(tmp_path / "base", model_type, **settings)
    torch, mlx = (prepared(name, base, training={"optimizer": "sgd"}) for name in ("torch", "mlx"))
    assert {p.name: p for p in torch.lora_parameters()} == {p.name: p for p in mlx.lora_parameters()}
    generator = np.random.default_rng(0)
    prompts = [generator.integers(3, VOCABULARY, size=size).tolist() for size in (40, 9, 2, 40)]
    logits = [backend.logits(prompts[0]) for backend in (torch, mlx)]
    assert np.abs(logits[0] - logits[1]).max() < 1e-5 * np.ptp(logits[0])
    for step in range(1, 5):
        due = TierSchedule((1, 2, 4)).due(step)
        results = [b.train_step([random_batch(step, rows=2, width=24)], due, 0.05) for b in (torch, mlx)]
        assert results[1].loss == pytest.approx(results[0].loss, rel=1e-5)
    answers = [backend.generate(prompts, 6) for backend in (torch, mlx)]
    assert answers[0] == answers[1]
    assert len({tuple(answer) for answer in answers[0]}) > 2


def test_gpt_neox_agrees_as_far_as_its_activation_does(tmp_path: Path) -> None:
    """mlx-lm approximates GELU by a tanh, which is off by up to 5e-4. Its layers and its head have other names."""
    rope = {"rope_type": "default", "rope_theta": 20.0, "partial_rotary_factor": 0.5}
    base = write_base(tmp_path / "base", "gpt_neox", intermediate_size=256, rope_parameters=rope)
    torch, mlx = (prepared(name, base) for name in ("torch", "mlx"))
    assert {p.name: p for p in torch.lora_parameters()} == {p.name: p for p in mlx.lora_parameters()}
    logits = [backend.logits(list(range(3, 40))) for backend in (torch, mlx)]
    assert np.abs(logits[0] - logits[1]).max() < 1e-3 * np.ptp(logits[0])
    losses = [backend.train_step([random_batch(1)], frozenset({0, 1, 2}), 1e-3).loss for backend in (torch, mlx)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_what_mlx_lm_reads_at_the_top_level_is_told_from_rope_parameters() -> None:
    rope = {"rope_type": "default", "rope_theta": 7.0, "partial_rotary_factor": 0.5}
    told = {"rope_theta": 7.0, "rotary_emb_base": 7.0, "partial_rotary_factor": 0.5, "rotary_pct": 0.5}
    assert mlx_arguments({"rope_parameters": rope}) == told
    assert mlx_arguments({"rope_parameters": LLAMA3})["rope_scaling"] == LLAMA3
    assert mlx_arguments({"rope_parameters": LAYERED}) == {
        "rope_theta": 300.0,
        "rotary_emb_base": 300.0,
        "rope_scaling": LAYERED["full_attention"],
        "rope_local_base_freq": 30.0,
    }


def test_what_a_config_has_at_the_top_level_stays() -> None:
    config = {"rope_theta": 5.0, "rotary_emb_base": 6, "rope_scaling": {"type": "linear"}, "rope_parameters": LLAMA3}
    assert mlx_arguments(config) == {}
    assert mlx_arguments({"rope_theta": 1e6, "rope_scaling": None, "model_type": "qwen2"}) == {}


def test_settings_of_a_language_model_within_another_are_told_there() -> None:
    inner = {"hidden_size": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}
    told = {"rope_theta": 7.0, "rotary_emb_base": 7.0}
    assert mlx_arguments({"model_type": "gemma3", "text_config": inner}) == {"text_config": inner | told}


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"model_type": "unheard_of"}, "unheard_of not supported"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}, "hidden_size": 32}, "quantized by bitsandbytes"),
        ({"hidden_size": 32}, "Expected shape"),
    ],
)
def test_a_base_that_mlx_lm_does_not_load_is_refused_with_what_to_do(
    settings: dict[str, Any], told: str, tmp_path: Path
) -> None:
    base = write_base(tmp_path / "base", "llama", num_hidden_layers=1)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | settings))
    with pytest.raises(ConfigError, match=rf"(?s)model\.base: mlx-lm .*{told}.*model\.backend: torch"):
        prepared("mlx", base)


def test_a_damaged_file_of_weights_is_refused_with_what_to_do(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama", num_hidden_layers=1)
    whole = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match=r"model\.base: .*is no safetensors file.*Take another copy"):
        prepared("mlx", base)


@pytest.mark.parametrize(
    ("targets", "told"),
    [(["nonesuch"], r"nonesuch.*Linear modules here: .*down_proj.*q_proj"), (["lm_head"], r"no LoRA matrix.*lm_head")],
)
def test_targets_that_are_no_module_of_a_layer_are_refused(targets: list[str], told: str, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama", num_hidden_layers=1, tie_word_embeddings=False)
    with pytest.raises(ConfigError, match=rf"lora\.targets is .*{told}"):
        make_backend(configuration("mlx", base=base, lora={"targets": targets}))


def test_all_linear_modules_but_the_head_get_an_adapter(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama", num_hidden_layers=1, tie_word_embeddings=False)
    modules = {p.module for p in prepared("mlx", base, tiers={"update_every": [1]}).lora_parameters()}
    attention = {f"self_attn.{name}_proj" for name in "qkvo"}
    assert modules == attention | {f"mlp.{name}_proj" for name in ("gate", "up", "down")}
    chosen = make_backend(configuration("mlx", base=base, lora={"targets": ["q_proj", "mlp.up_proj"]}))
    assert {p.module for p in chosen.lora_parameters()} == {"self_attn.q_proj", "mlp.up_proj"}
