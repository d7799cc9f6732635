"""Which parameters of a PEFT model are divided among tiers, and what keeps them from being."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from nestune.backends.lora_modules import trainable_lora
from nestune.errors import ConfigError

BASE = Path(__file__).parents[3] / "demo" / "base"
MODULES = 6 * 7


def adapted(adapter_name: str = "default", **options: Any) -> PeftModel:
    config = LoraConfig(**({"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options))
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(BASE), config, adapter_name=adapter_name)
    assert isinstance(model, PeftModel)
    return model


@pytest.mark.parametrize("adapter_name", ["default", "week7"])
def test_every_matrix_of_the_adapter_is_found_whatever_the_adapter_is_called(adapter_name: str) -> None:
    model = adapted(adapter_name)
    found = trainable_lora(model)
    parameters = dict(model.named_parameters())
    assert len({matrix.described.name for matrix in found}) == 2 * MODULES
    assert all(matrix.values is parameters[matrix.key] for matrix in found)
    assert {id(matrix.values) for matrix in found} == {id(p) for p in model.parameters() if p.requires_grad}
    assert found[0].described.name == "layers.0.self_attn.q_proj.lora_a"
    assert found[0].described.shape == (4, 96)


def test_a_second_adapter_that_is_not_trained_is_left_alone() -> None:
    model = adapted()
    model.add_adapter("other", LoraConfig(r=2, target_modules="all-linear"))
    assert {matrix.described.rank for matrix in trainable_lora(model)} == {4}
    model.set_adapter("other")
    assert {matrix.described.rank for matrix in trainable_lora(model)} == {2}


def two_adapters_at_once(model: PeftModel) -> None:
    model.add_adapter("other", LoraConfig(r=2, target_modules="all-linear"))
    for parameter in model.parameters():
        parameter.requires_grad_(True)


def interrupted(model: PeftModel) -> None:
    for name, parameter in model.named_parameters():
        if "layers.0." in name:
            parameter.requires_grad_(False)


def frozen(model: PeftModel) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def with_a_norm(model: PeftModel) -> None:
    model.get_submodule("base_model.model.model.norm").requires_grad_(True)


@pytest.mark.parametrize(
    ("options", "change", "told"),
    [
        ({"modules_to_save": ["lm_head"]}, None, [r"modules_to_save\.default\.weight", "without modules_to_save"]),
        ({"use_dora": True}, None, [r"lora_magnitude_vector", r"\(42 in all\)", "without use_dora"]),
        ({"lora_bias": True}, None, [r"lora_B\.default\.bias", "without lora_bias"]),
        ({"bias": "all"}, None, [r'q_proj\..*bias.*bias="none"']),
        (
            {"target_modules": ["lm_head"]},
            None,
            [r"lm_head\.lora_A\S+, .*Let LoRA target modules of the layers by name"],
        ),
        ({}, with_a_norm, [r"trainable, but no LoRA matrix of a layer.*model\.norm\.weight\. Freeze it"]),
        ({}, two_adapters_at_once, [r"several trainable matrices: layers\.0\.self_attn\.q_proj\.lora_a"]),
        ({}, interrupted, [r"require no gradient: .*layers\.0\..*\(14 in all\)", r"set_adapter"]),
        ({}, frozen, [r"no LoRA matrix that requires a gradient.*get_peft_model"]),
    ],
    ids=["head", "dora", "lora bias", "bias", "head's lora", "norm", "two adapters", "part switched off", "none"],
)
def test_what_has_no_tier_is_refused_by_name_with_the_remedy(
    options: dict[str, Any], change: Callable[[PeftModel], None] | None, told: list[str]
) -> None:
    model = adapted(**options)
    if change is not None:
        change(model)
    for pattern in told:
        with pytest.raises(ConfigError, match=pattern):
            trainable_lora(model)


def test_experts_that_are_one_tensor_are_refused() -> None:
    """PEFT lays all experts' ranks out in one matrix, so that a part of it would not be some ranks of A and B."""
    config = MixtralConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=32, num_local_experts=4,
    )  # fmt: skip
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    lora = LoraConfig(r=4, target_modules=["q_proj"], target_parameters=experts)
    with pytest.raises(ConfigError, match=r"experts in one tensor.*layers\.0\.mlp\.experts.*Target the attention"):
        trainable_lora(get_peft_model(MixtralForCausalLM(config), lora))


def test_set_adapter_switches_matrices_on_again_as_the_remedy_says() -> None:
    model = adapted()
    interrupted(model)
    model.set_adapter("default")
    assert len(trainable_lora(model)) == 2 * MODULES


def test_a_model_without_peft_is_read_by_its_names_and_a_bias_is_no_matrix() -> None:
    layer = nn.ModuleDict({"lora_a": nn.Linear(6, 2, bias=False), "lora_b": nn.Linear(2, 6, bias=False)})
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"project": layer})])})
    assert [m.described.name for m in trainable_lora(model)] == [f"layers.0.project.lora_{side}" for side in "ab"]
    layer["lora_b"] = nn.Linear(2, 6, bias=True)
    with pytest.raises(ConfigError, match=r"no LoRA matrix of a layer.*lora_b\.bias"):
        trainable_lora(model)
