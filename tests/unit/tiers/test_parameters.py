"""Names of trainable matrices and of their ranks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nestune.tiers.parameters import LoraParameter, name_of_ranks, parse_parameter, split_name


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.model.layers.3.self_attn.q_proj.lora_A.default.weight",
        "base_model.model.model.layers.3.self_attn.q_proj.lora_A.my_task.weight",
        "model.layers.3.self_attn.q_proj.lora_a",
        "layers.3.self_attn.q_proj.LORA_A.weight",
        "layers.3.self_attn.q_proj.Adapter_a",
        "transformer.h.3.self_attn.q_proj.lora_A.weight",
    ],
)
def test_names_of_every_framework_become_the_canonical_one(name: str) -> None:
    found = parse_parameter(name, (8, 96))
    assert found == LoraParameter(3, "self_attn.q_proj", "a", (8, 96))
    assert found.name == "layers.3.self_attn.q_proj.lora_a"


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.3.self_attn.q_proj.weight",
        "lm_head.lora_A.weight",
        "layers.3.self_attn.q_proj.lora_A.bias",
        "layers.3.self_attn.q_proj.lora_magnitude_vector.weight",
    ],
)
def test_what_is_no_lora_matrix_of_a_layer_has_no_canonical_name(name: str) -> None:
    assert parse_parameter(name, (8, 96)) is None


def test_a_has_a_row_and_b_a_column_for_each_rank() -> None:
    a, b = LoraParameter(0, "mlp.up_proj", "a", (4, 96)), LoraParameter(0, "mlp.up_proj", "b", (256, 4))
    assert (a.rank_axis, a.rank, b.rank_axis, b.rank) == (0, 4, 1, 4)


@given(st.integers(0, 99), st.sampled_from(["self_attn.q_proj", "mlp.experts.0.w1"]), st.sampled_from("ab"), st.data())
def test_a_name_of_ranks_tells_the_matrix_and_the_ranks_again(
    layer: int, module: str, side: str, data: st.DataObject
) -> None:
    matrix = f"layers.{layer}.{module}.lora_{side}"
    start = data.draw(st.integers(0, 100))
    ranks = range(start, data.draw(st.integers(start, 100)))
    assert split_name(name_of_ranks(matrix, ranks)) == (matrix, ranks)
    assert split_name(matrix) == (matrix, None)


def test_ranks_are_named_as_python_names_a_slice() -> None:
    assert name_of_ranks("layers.3.self_attn.q_proj.lora_a", range(3)) == "layers.3.self_attn.q_proj.lora_a[0:3]"
